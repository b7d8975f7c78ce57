"""The wheel, installed without the checkout, answers with trained weights."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_works_without_the_checkout(tmp_path):
    pip = [sys.executable, '-m', 'pip', '--quiet']
    subprocess.run([*pip, 'wheel', '--no-deps', '--wheel-dir', str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob('*.whl')
    assert wheel.stat().st_size < 60 * 2**20
    site = tmp_path / 'site'
    subprocess.run([*pip, 'install', '--no-deps', '--target', str(site), str(wheel)], check=True)
    code = (
        f'import sys; sys.path.insert(0, {str(site)!r})\n'
        'import socket; socket.socket.connect = None\n'
        'import timm, timm_batchout\n'
        'assert timm_batchout.__file__.startswith(sys.path[0]), timm_batchout.__file__\n'
        'for name in ("batchout_cifar_vgg", "batchout_mnist_cnn"):\n'
        '    timm.create_model(name, pretrained=True)\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)
