"""The examples run from a folder of images to a model card."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / 'recipes' / 'examples'


def test_own_images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part in ('train', 'validation'):
        for i, label in enumerate(('ant', 'bee', 'cat')):
            folder = tmp_path / 'animals' / part / label
            folder.mkdir(parents=True)
            for j in range(20):
                noise = torch.randint(0, 120, (50 + j % 5, 60 - j % 4, 3), generator=generator)
                noise[:, :, i] += 100
                Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f'{j}.png')
    output = tmp_path / 'runs'
    command = [
        sys.executable, str(EXAMPLES / 'own_images.py'), str(tmp_path / 'animals'), '--model', 'test_resnet',
        '--scratch', '--size', '32', '--epochs', '2', '--batch_size', '9', '--output', str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for name in ('test_resnet', 'batchout_test_resnet'):
        report = json.loads((output / name / 'report.json').read_text())
        result = json.loads((output / name / 'result.json').read_text())
        assert report['scores'][0]['correct'] == result['metrics']['test_correct'], 'the same images, the same pixels'
        assert {score['attack'] for score in report['scores']} == {'clean', 'fgsm', 'pgd', 'corruptions'}
    assert '| animals, accuracy % | n | test_resnet | batchout_test_resnet |' in done.stdout
    assert (output / 'curves.svg').stat().st_size > 10_000
    card = (output / 'own_images' / 'README.md').read_text()
    assert 'ant' in (output / 'own_images' / 'config.json').read_text() and 'PGD' in card


def test_examples_are_short():
    for path in EXAMPLES.glob('*.py'):
        assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 60, path
