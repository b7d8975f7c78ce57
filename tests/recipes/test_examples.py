"""The examples run from a folder of images to a model card."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / 'recipes' / 'examples'


def test_own_images(tmp_path, make_class_folders):
    make_class_folders(tmp_path / 'animals', train=20, validation=20)
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
