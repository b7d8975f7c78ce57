"""The wheel, installed without the checkout, answers with trained weights."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', '--quiet']
    subprocess.run([*pip, 'wheel', '--no-deps', '--wheel-dir', str(folder), str(ROOT)], check=True)
    (path,) = folder.glob('*.whl')
    return path


@pytest.mark.slow
def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 40 * 2**20


@pytest.mark.slow
def test_wheel_works_without_the_checkout(wheel, tmp_path):
    pip = [sys.executable, '-m', 'pip', '--quiet']
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
