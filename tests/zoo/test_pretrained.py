"""The bundled weights give the accuracy in their JSON, counted image by image, on the real test sets."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm

import timm_batchout  # noqa: F401
from timm_batchout.cli.commands import _images_apart
from timm_batchout.cli.main import main
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
from timm_batchout.robustness.fgsm_scores import fgsm_scores
from timm_batchout.zoo.pretrained import bundled_cards

SHARED = Path(__file__).parents[3] / 'shared' / 'data'
ROOTS = {'MNIST': SHARED / 'mnist', 'CIFAR-10 (JPEG q75 copy)': SHARED / 'cifar10-jpeg' / 'cifar10-jpeg.tar.xz'}
CARDS = bundled_cards()


def root_of(data):
    if not ROOTS[data].exists():
        pytest.skip(f'{data} is not on this machine ({ROOTS[data].name})')
    return str(ROOTS[data])


@pytest.mark.parametrize('name', [name for name, card in CARDS.items() if card['data'] == 'MNIST'])
def test_mnist_accuracy(name):
    card = CARDS[name]
    data = replace(DataConfig(**card['recipe']['data']), root=root_of(card['data']))
    split = load_split(data, train=False)
    model = timm.create_model(name, pretrained=True)
    assert fgsm_scores(model, split.images, split.labels)['clean'] == card['test']['clean']


@pytest.mark.slow
@pytest.mark.parametrize('data', list(ROOTS))
def test_verify_command(data, capsys):
    root = root_of(data)
    assert main(['verify', '--roots', f'{{"{data}": "{root}"}}']) == 0
    printed = capsys.readouterr().out
    for name, card in CARDS.items():
        line = next(line for line in printed.splitlines() if line.startswith(f'{name}: '))
        assert ('as stated' in line) == (card['data'] == data)


def test_verify_tells_a_difference(monkeypatch, capsys):
    """A card that claims one image more than the weights get right: exit status 1, and the claim is shown."""
    from timm_batchout.zoo import pretrained as weights

    name = 'mnist_cnn.baseline_mnist'
    card = CARDS[name]
    test = card['test'] | {'fgsm': {}, 'clean': {'correct': card['test']['clean']['correct'] + 1, 'accuracy': 1.0}}
    monkeypatch.setattr(weights, 'bundled_cards', lambda: {name: card | {'test': test}})
    assert main(['verify', '--roots', f'{{"MNIST": "{root_of("MNIST")}"}}']) == 1
    assert 'STATED' in capsys.readouterr().out
    assert main(['verify', '--roots', '{}', '--models', '["mnist_cnn.nope"]']) == 2
    assert 'mnist_cnn.nope' in capsys.readouterr().err


def test_verify_allows_for_rounding_under_fgsm_alone():
    def scores(clean, fgsm):
        return {'n': 10000, 'clean': {'correct': clean}, 'fgsm': {'0.1': {'correct': fgsm}}}

    stated = scores(9900, 9000)
    assert _images_apart(stated, stated) == 0
    assert _images_apart(scores(9900, 8950), stated) == 50
    assert _images_apart(scores(9900, 9051), stated) is None
    assert _images_apart(scores(9901, 9000), stated) is None


def test_robust_accuracy_falls_with_epsilon():
    for name, card in CARDS.items():
        scores = [card['test']['clean'], *card['test']['fgsm'].values()]
        counts = [score['correct'] for score in scores]
        # Nets trained on FGSM images learn to recognise them (label leaking), so theirs may rise; README says so.
        assert 'fgsm_at' in name or counts == sorted(counts, reverse=True)
        assert all(score['accuracy'] == score['correct'] / card['test']['n'] for score in scores)
