"""The paper's figures, on the digits, end to end; and the rule that judges its claims."""

import json
import shutil

import pytest
from claims import Comparison, _converges, _costs_little, _difference, _k, _row
from figures import FIGURES, Paper
from PIL import Image
from reproduce import main

from timm_batchout.zoo.paper_nets import MNIST_ETA


def reproduce(folder, figure, *arguments):
    command = ['--figure', figure, '--quick', 'true', '--runs', str(folder / 'runs'), '--output', str(folder)]
    return main([*command, '--data', '{mnist: {name: digits}}', *arguments])


@pytest.mark.slow
def test_figures_of_the_digits(tmp_path, capsys):
    assert reproduce(tmp_path, '2', '--seeds', '[0, 1]', '--deepfool_images', '20') == 0
    figure = json.loads((tmp_path / 'fig2.json').read_text())
    assert [(net['label'], net['seed']) for net in figure['nets']] == [
        (label, seed) for label in ('baseline', 'FGSM adversarial training', 'BatchOut') for seed in (0, 1)
    ]
    assert {len(net['report']['scores']) for net in figure['nets']} == {1 + 5 + 5 + 5}
    assert (tmp_path / 'fig2.svg').read_text().count('BatchOut') >= 1
    text = (tmp_path / 'RESULTS.md').read_text()
    assert '| MNIST, FGSM: BatchOut is above the baseline | ' in text and '99.47 | 99.31 | 99.12' in text
    seeds = json.loads((tmp_path / 'seeds.json').read_text())['MNIST (Fig. 2)']['BatchOut']
    assert seeds['seeds'] == [0, 1] and len(seeds['accuracy']['FGSM Linf 0.1']['values']) == 2
    weights = {path: path.read_bytes() for path in (tmp_path / 'runs').rglob('*.safetensors')}

    # What people wrote stays; finished runs are used again, and another figure joins.
    (tmp_path / 'RESULTS.md').write_text(text + '## Reading\n\nmine')
    drawing = (tmp_path / 'fig2.svg').read_bytes()
    assert reproduce(tmp_path, '2', '--seeds', '[0, 1]', '--deepfool_images', '20') == 0
    assert json.loads((tmp_path / 'fig2.json').read_text())['nets'] == figure['nets']
    assert (tmp_path / 'fig2.svg').read_bytes() == drawing
    assert reproduce(tmp_path, '5b', '--seeds', '[0]') == 0
    assert all(path.read_bytes() == content for path, content in weights.items())
    text = (tmp_path / 'RESULTS.md').read_text()
    assert 'BatchOut is above Gaussian noise' in text and 'Fig. 2' in text and text.endswith('## Reading\n\nmine')

    # A report stands for the weights and the settings that it was made with.
    reports = sorted((tmp_path / 'runs').rglob('report-0.05*-200.json'))
    one, two, three = (path for path in reports if path.parent.name.endswith('-0') and '-20-' not in path.name)
    shutil.copy(two.parent / 'model.safetensors', one.parent / 'model.safetensors')  # trained again
    two.write_text(two.read_text().replace('"fgsm": {}', '"fgsm": {"n": 1}'))
    stamp = three.stat().st_mtime_ns
    assert reproduce(tmp_path, '5b', '--seeds', '[0]') == 0
    assert three.stat().st_mtime_ns == stamp, 'as it was'
    first, second = (json.loads(path.read_text()) for path in (one, two))
    assert first['weights_sha256'] == second['weights_sha256'] and second['settings'] == {'fgsm': {}}
    assert not list((tmp_path / 'runs').rglob('*.chunks'))

    run = tmp_path / 'runs' / 'mnist_baseline-1epochs-0' / 'result.json'
    run.write_text(run.read_text().replace('"precision": "no"', '"precision": "bf16"'))
    assert reproduce(tmp_path, '5b', '--seeds', '[0]') == 0, 'the precision is the choice of who trained it'
    run.write_text(run.read_text().replace('"lr": 0.02', '"lr": 0.04'))
    capsys.readouterr()
    assert reproduce(tmp_path, '5b', '--seeds', '[0]') == 2
    assert 'optimizer.lr: saved 0.04, now 0.02' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_figure(tmp_path):
    """CIFAR-10's net on a few coloured squares."""
    for split in ('train', 'test'):
        for i in range(256):
            path = tmp_path / 'data' / split / f'{i % 10}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (32, 32), (25 * (i % 10), i, 100)).save(path)
    data = f'{{mnist: {{name: digits}}, cifar10: {{name: image_folder, root: {tmp_path / "data"}, val_fraction: 0.3}}}}'
    assert reproduce(tmp_path, 'all', '--seeds', '[0]', '--data', data, '--deepfool_images', '10') == 0
    assert sorted(path.stem for path in tmp_path.glob('*.svg')) == [f'fig{name}' for name in sorted(FIGURES)]
    text = (tmp_path / 'RESULTS.md').read_text()
    assert all(figure.title in text for figure in FIGURES.values())
    assert text.count('| C1+C2+F1 |') == 1


def test_bad_figures(tmp_path, capsys):
    assert reproduce(tmp_path, '6') == 2
    assert reproduce(tmp_path, '2', '--recipes', str(tmp_path)) == 2
    assert "mnist_baseline.yaml' does not exist" in capsys.readouterr().err
    for arguments, message in (
        (['--seeds', '[]'], 'seeds is empty'),
        (['--data', '{mnist: {nmae: digits}}'], "data.mnist has no 'nmae'"),
        (['--data', '{mnist: {nmae: digits}}'], "Did you mean 'name'?"),
        (['--data', '{minst: {name: digits}}'], "Did you mean 'mnist'?"),
    ):
        assert reproduce(tmp_path, '2', *arguments) == 2
        assert message in capsys.readouterr().err, arguments
    assert not (tmp_path / 'runs').exists()


def test_the_nets_of_the_figures(tmp_path):
    """One folder per recipe; layers of Fig. 4b with the paper's eta; the paper's recipe where nothing is swept."""
    recipes = shutil.copytree('recipes/paper', tmp_path / 'recipes')
    paper = Paper(recipes, tmp_path / 'runs', {}, [0], sweep_epochs=3)
    configs = {}
    for figure in FIGURES.values():
        for net in figure.nets:
            config = paper.config(figure, net, 0)
            assert configs.setdefault(config.output, config) == config
            assert config.epochs == (3 if figure.sweep else 15 if 'mnist' in net.recipe else 40)
    eta = configs[str(tmp_path / 'runs' / 'mnist_batchout-C1+F1-3epochs-0')].model_args['eta']
    assert eta == {**MNIST_ETA, 'stages.1.act1': 0}


def test_the_rule_that_judges():
    def row(*comparisons):
        return _row('c', [Comparison(excess, 0.5, f'{excess:+.2f}') for excess in comparisons])

    assert row(1.0, 0.1) == '| c | 1 yes, 0 no, 1 open | +1.00, +0.10 | holds |'
    assert row(1.0, -1.0).endswith('| holds in part |')
    assert row(1.0, 0.1, 0.1).endswith('| holds in part |')
    assert row(0.4, -0.4).endswith('| 0 yes, 0 no, 2 open | +0.40, -0.40 | open |')
    assert row(0.4, -1.0).endswith('| does not hold |')


def test_the_intervals_of_differences():
    difference, half, shown = _difference([50.0], [40.0], 100)
    assert (difference, shown) == (10, '+10.00') and half == pytest.approx(1.96 * (25 + 24) ** 0.5)
    images = (55 * 45 + 40 * 60) / 200
    assert _difference([50.0, 60.0], [40.0, 40.0], 100).half == pytest.approx(
        (1.96**2 * images + 12.7062**2 * 25) ** 0.5
    ), 'two seeds, one degree of freedom'
    welch = _difference([50.0, 52.0, 54.0], [40.0, 42.0, 44.0], 10**9).half
    assert welch == pytest.approx(2.776 * (8 / 3) ** 0.5, rel=1e-3), 'three and three, as spread: four'


def test_differences_stand_as_they_are():
    def figure(*nets):
        scores = [{'attack': 'clean', 'radius': None, 'iteration': None, 'stage': '', 'corruption': '', 'n': 10**6}]
        return {
            'nets': [
                {
                    'label': label,
                    'train_loss': [loss],
                    'report': {'n': 10**6, 'scores': [{**scores[0], 'accuracy': accuracy}]},
                }
                for label, accuracy, loss in nets
            ]
        }

    cost = figure(('baseline', 0.99, 0.2), ('BatchOut', 0.9888, 0.21))
    assert _row('c', _costs_little(cost)).endswith('| 1 yes, 0 no, 0 open | -0.12 | holds |'), 'within 0.5 points'
    assert _row('c', _converges(cost)).endswith('| 105% of its loss | holds |')
    shares = figure(('0', 0.99, 0), ('0.3', 0.98, 0), ('0.5', 0.97, 0))
    assert _row('c', _k('clean', '', -1)(shares)).endswith('| -1.00 | holds |')
