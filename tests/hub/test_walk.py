"""A stranger's walk: own images in folders, to a trained twin, a report, the Hub and back, by four commands."""

import json
import subprocess
import sys

import pytest
import torch

from timm_batchout.cli.main import main
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_test_set
from timm_batchout.robustness.report import Report

from .loopback import LoopbackHub

pytestmark = pytest.mark.hub


@pytest.fixture(scope='module')
def animals(tmp_path_factory, make_class_folders):
    """Pictures of several sizes; one of the test pictures is broken."""
    root = tmp_path_factory.mktemp('animals')
    make_class_folders(root, train=24, validation=8)
    (root / 'validation' / 'bee' / '3.png').write_bytes(b'broken')
    return root


@pytest.fixture(scope='module')
def data(animals):
    return ['--data.name', 'timm', '--data.root', str(animals), '--data.workers', '0', '--data.image_size', '48']


@pytest.fixture(scope='module')
def run(animals, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('walk') / 'run'
    recipe = ['--epochs', '2', '--batch_size', '12', '--optimizer.lr', '0.01', '--eval_batch_size', '12']
    assert main(['train', 'batchout_test_resnet', *data, *recipe, '--output', str(folder)]) == 0
    return folder


def test_train_evaluate_publish_load(run, data, animals, tmp_path):
    weights, report = run / 'model.safetensors', run / 'report.json'
    evaluate = ['evaluate', 'batchout_test_resnet', '--checkpoint', str(weights), *data]
    evaluate += ['--model_args', '{num_classes: 3}']
    assert main([*evaluate, '--attacks', 'fgsm', 'pgd', '--eps', '2/255', '--output', str(report)]) == 0
    result, found = json.loads((run / 'result.json').read_text()), Report.load(report)
    assert result['class_names'] == ['ant', 'bee', 'cat']
    assert found.n == found.score('clean').n == result['metrics']['test_n'] == 23, 'the broken one is left out'
    assert found.score('clean').correct == result['metrics']['test_correct']
    assert found.preprocessing['input_size'] == [3, 48, 48] and found.preprocessing['crop_pct'] < 1
    with LoopbackHub(tmp_path / 'hub') as hub:
        publish = [
            'publish', 'batchout_test_resnet', '--checkpoint', str(weights), '--run', str(run), '--report', str(report),
            '--model_args', '{num_classes: 3}', '--repo', 'alice/animals', '--cards', str(tmp_path / 'cards'),
        ]  # fmt: skip
        environment = {**hub.environment('hf_owner', tmp_path / 'a'), 'OMP_NUM_THREADS': '1'}
        for code in (
            f'from timm_batchout.cli.main import main; assert main({publish!r}) == 0',
            f"""
import timm, torch
from pathlib import Path
from PIL import Image
assert not timm.list_models('batchout_*'), 'plain timm'
model = timm.create_model('hf-hub:alice/animals', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
right = 0
for path in sorted(Path({str(animals)!r}, 'validation').rglob('*.png')):
    if path.stat().st_size > 6:
        label = model.pretrained_cfg['label_names'][model(transform(Image.open(path))[None]).argmax()]
        right += label == path.parent.name
assert right == {found.score('clean').correct}, right
""",
        ):
            done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_images_are_drawn_before_they_are_decoded(animals, data, monkeypatch):
    import timm

    images = load_test_set(
        DataConfig('timm', str(animals), workers=0, image_size=48), timm.create_model('test_resnet', num_classes=3)
    )
    decoded = []
    read = type(images.samples).__getitem__
    monkeypatch.setattr(type(images.samples), '__getitem__', lambda self, key: decoded.append(key) or read(self, key))
    chosen = images.select(torch.tensor([5, 1, 20]))
    assert decoded == [] and len(chosen) == 3
    pixels, labels = chosen.read(slice(1, 3))
    assert [index for _, index in decoded] == [1, 20]
    assert pixels.shape == (2, 3, 48, 48) and pixels.dtype == torch.uint8 and labels.tolist() == [0, 2]


def test_a_broken_image_stops_where_the_config_says_so(run, data, capsys):
    command = ['evaluate', 'batchout_test_resnet', '--checkpoint', str(run / 'model.safetensors'), *data]
    command += ['--model_args', '{num_classes: 3}', '--data.broken', 'stop']
    assert main(command) == 2
    assert 'cannot be read' in capsys.readouterr().err
