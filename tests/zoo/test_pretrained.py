"""The bundled weights give the accuracy in their report, counted image by image, on the real test sets."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from bundle_weights import readme_table, write_half
from safetensors.torch import load_file, save_file

import timm_batchout  # noqa: F401
from timm_batchout.cli.main import main
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
from timm_batchout.robustness.harness import evaluate
from timm_batchout.robustness.report import Report
from timm_batchout.zoo.pretrained import FOLDER, bundled_cards

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get('TIMM_BATCHOUT_DATA', ROOT.parent / 'shared' / 'data'))
ROOTS = {
    'MNIST': DATA / 'mnist',
    'CIFAR-10': DATA / 'cifar10',
}
CARDS = bundled_cards()
REPORTS = {name: Report.from_dict(card['report']) for name, card in CARDS.items()}


def test_set_of(name):
    card = CARDS[name]
    root = ROOTS[card['training']['data']]
    if not root.exists():
        pytest.skip(f'{card["training"]["data"]} is not on this machine: set TIMM_BATCHOUT_DATA')
    return load_split(replace(DataConfig(**card['training']['recipe']['data']), root=str(root)), train=False)


test_set_of.__test__ = False


@pytest.mark.parametrize('name', [name for name in CARDS if 'mnist' in name])
def test_mnist_accuracy(name):
    split = test_set_of(name)
    report = evaluate(timm.create_model(name, pretrained=True), split.images, split.labels, [], audit=False)
    assert report.weights_sha256 == REPORTS[name].weights_sha256
    assert report.score('clean').correct == REPORTS[name].score('clean').correct


@pytest.mark.slow
@pytest.mark.parametrize('name', CARDS)
def test_evaluation_gives_the_bundled_report_again(name, capsys):
    card = CARDS[name]
    test_set_of(name)
    data = ['--data.name', card['training']['recipe']['data']['name']]
    command = ['evaluate', name, *data, '--data.root', str(ROOTS[card['training']['data']]), '--audit', 'false']
    eps = ['0.1', '0.2'] if 'mnist' in name else ['2/255', '8/255']
    assert main([*command, '--eps', *eps, '--expect', str(FOLDER / f'{name}.json')]) == 0, capsys.readouterr().out


def test_a_report_that_claims_one_image_more_is_not_confirmed(tmp_path, capsys):
    name = 'mnist_cnn.baseline_mnist'
    test_set_of(name)
    card = json.loads((FOLDER / f'{name}.json').read_text())
    card['report']['scores'][0]['correct'] += 1
    (tmp_path / 'claimed.json').write_text(json.dumps(card))
    command = ['evaluate', name, '--data.root', str(ROOTS['MNIST']), '--attacks', '[]', '--audit', 'false']
    assert main([*command, '--expect', str(tmp_path / 'claimed.json')]) == 1
    assert 'clean' in capsys.readouterr().out


def test_robust_accuracy_falls_with_the_radius():
    for name, report in REPORTS.items():
        counts = [score.correct for score in report.scores if score.attack in ('clean', 'fgsm')]
        # Nets trained on FGSM images learn to recognise them (label leaking), so theirs may rise; README says so.
        assert 'fgsm_at' in name or counts == sorted(counts, reverse=True), name


def test_readme_shows_every_bundled_model_as_reported():
    table = readme_table()
    for name, report in REPORTS.items():
        assert f'| `{name}` | {100 * report.score("clean").accuracy:.2f} |' in table
    assert table in (ROOT / 'README.md').read_text(), 'README is behind: run recipes/paper/bundle_weights.py'


def test_weights_that_are_stored_in_half_precision_are_trained_on_in_float32(tmp_path):
    model = timm.create_model('mnist_cnn')
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    write_half(tmp_path / 'model.safetensors')
    half = load_file(tmp_path / 'half.safetensors')
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    again = timm.create_model('mnist_cnn', checkpoint_path=str(tmp_path / 'half.safetensors'))
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, half[name].float())
        assert torch.allclose(tensor, model.state_dict()[name], rtol=2**-11, atol=1e-7)
