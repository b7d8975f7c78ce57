"""The evaluation harness: attacks that agree with their libraries, reports that can be trusted, an audit that fires."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_batchout  # noqa: F401
from timm_batchout.cli.evaluate import EvaluateConfig
from timm_batchout.cli.main import main
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
from timm_batchout.pixels import PixelModel
from timm_batchout.recipe import parse
from timm_batchout.robustness.deepfool import deepfool
from timm_batchout.robustness.harness import evaluate
from timm_batchout.robustness.masking import measure, misled, suspicions, verdict
from timm_batchout.robustness.report import Report, Score, Variant, wilson
from timm_batchout.robustness.tables import compare, table

foolbox = pytest.importorskip('foolbox')
ALL = ['fgsm', 'pgd', 'pgd_l2', 'deepfool', 'ddn', 'noise', 'corruptions']


@pytest.fixture(scope='module')
def digits():
    split = load_split(DataConfig('digits'), train=False)
    return split.images[:60], split.labels[:60]


@pytest.fixture(scope='module')
def net():
    """A small net that knows the digits, trained here in a second or two."""
    return trained(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)))


@pytest.fixture(scope='module')
def linear():
    return trained(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))


def trained(model, epsilon=0.0):
    """With ``epsilon``, on PGD images of so many pixels."""
    torch.manual_seed(0)
    for layer in model.modules():
        if hasattr(layer, 'reset_parameters'):
            layer.reset_parameters()
    split = load_split(DataConfig('digits'), train=True)
    images, labels = split.images.float() / 255, split.labels
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(80):
        x = images
        for _ in range(5 if epsilon else 0):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
            x = (images + (x + epsilon / 3 * gradient.sign() - images).clamp(-epsilon, epsilon)).clamp(0, 1)
        F.cross_entropy(model(x.detach()), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def pixels(images):
    return images.float() / 255


def test_fgsm_is_foolboxes_to_the_last_bit(net, digits):
    images, labels = pixels(digits[0]), digits[1]
    from timm_batchout.pixels import fgsm

    target = foolbox.PyTorchModel(net, bounds=(0, 1), device='cpu')
    for epsilon in (0.05, 0.2):
        _, theirs, _ = foolbox.attacks.LinfFastGradientAttack()(target, images, labels, epsilons=epsilon)
        assert torch.equal(fgsm(net, images, labels, epsilon), theirs)


@pytest.mark.parametrize(('classes', 'clip'), [(2, True), (3, True), (10, True), (10, False)])
def test_deepfool_is_foolboxes_to_the_sample(digits, classes, clip):
    torch.manual_seed(classes)
    net = nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1152, classes)).eval()
    images = pixels(digits[0])
    labels = net(images).argmax(1)
    labels[:5] = (labels[:5] + 1) % classes  # wrong from the start
    target = foolbox.PyTorchModel(net, bounds=(0, 1) if clip else (-100, 100), device='cpu')
    ours = deepfool(net, images, labels, iterations=4, clip=clip)
    for i in range(1, 5):
        attack = foolbox.attacks.L2DeepFoolAttack(steps=i, overshoot=0.02)
        _, theirs, _ = attack(target, images, labels, epsilons=None)
        assert torch.equal(net(theirs).argmax(1) == labels, ours.right[i - 1])
        assert torch.allclose((theirs - images).flatten(1).norm(dim=1), ours.distance[i - 1], atol=1e-4)
    assert not ours.right[:, :5].any() and not ours.distance[:, :5].any()


def test_a_report_of_everything(net, digits, tmp_path):
    net.zero_grad()
    net.train()
    state = torch.get_rng_state()
    report = evaluate(net, *digits, ALL, ['0.05', '0.2'], ['0.5', 2], audit=True, name='net', data='digits')
    assert net.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    clean = report.score('clean')
    right = (net.eval()(pixels(digits[0])).argmax(1) == digits[1]).sum().item()
    assert clean.correct == right > 50
    assert clean.interval == wilson(right, 60)
    for attack in ('fgsm', 'pgd'):
        assert clean.correct >= report.score(attack, '0.05').correct > report.score(attack, '0.2').correct
    assert report.score('pgd', '0.2').correct <= report.score('fgsm', '0.2').correct
    assert report.score('noise', '0.05').correct >= report.score('fgsm', '0.05').correct
    assert report.score('ddn', '0.5').correct >= report.score('ddn', '2').correct
    assert report.score('ddn').correct == 0
    assert 0.1 < report.score('ddn').median_distance < 5
    iterations = [report.score('deepfool', iteration=i).correct for i in range(1, 6)]
    assert iterations == sorted(iterations, reverse=True) and iterations[-1] < 40
    assert report.audit['verdict'] == 'no sign of it.' and not any(score.masked for score in report.scores)

    report.save(tmp_path / 'report.json')
    assert Report.load(tmp_path / 'report.json') == report
    saved = json.loads((tmp_path / 'report.json').read_text())
    assert saved['settings']['pgd'] == {'steps': 20, 'rel_stepsize': 0.125, 'random_start': True}
    assert 'foolbox' in saved['environment'] and 'pyautoattack' not in saved['environment']
    assert saved['indices'] == 'the first n of torch.randperm(60), seed 0'
    assert len(saved['weights_sha256']) == 64
    assert f'| clean | {100 * right / 60:.2f} (' in table(report)


def test_layers_keep_their_modes(net, linear, digits):
    """A frozen BatchNorm of a net in training stays in eval mode, and an error changes nothing."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), net).train()
    model[0].eval()
    linear.train()
    arguments = (model, *digits, ['transfer'], ['0.1'])
    evaluate(*arguments, transfer_from=linear, settings={'transfer': {'steps': 1, 'n': 2}}, audit=True)
    with pytest.raises(ValueError, match='Images must lie'):
        evaluate(model, digits[0] * 2.0, digits[1])
    assert [layer.training for layer in (model, *model, linear)] == [True, False, True, True, True]
    linear.eval()


def test_a_net_that_draws_gives_one_report(net, digits):
    arguments = (Noisy(net), *digits, ['fgsm', 'deepfool', 'noise'], ['0.1'])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = evaluate(*arguments, audit=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert without_time(evaluate(*arguments, audit=True)) == without_time(first)


def test_parts_of_a_sorted_data_set_are_fair_samples(net, digits):
    """Image folders are sorted by class: the first n of one are all of one class."""
    order = digits[1].argsort()
    images, labels = digits[0][order], digits[1][order]
    report = evaluate(net, images, labels, ['noise'], ['0'], settings={'noise': {'n': 20}}, n=40, seed=3)
    drawn = torch.randperm(60, generator=torch.Generator().manual_seed(3))  # as the report says
    right = net.eval()(pixels(images)).argmax(1) == labels
    assert report.score('clean').correct == right[drawn[:40]].sum() != right[:40].sum()
    assert report.score('noise', '0').correct == right[drawn[:20]].sum() != right[:20].sum()
    assert report.n == 40 and report.indices == 'the first n of torch.randperm(60), seed 3'


def without_time(report):
    return {**report.to_dict(), 'seconds': 0}


def test_one_seed_one_report_however_the_work_is_shared(net, digits, tmp_path):
    arguments = (net, *digits, ['pgd', 'ddn', 'noise'], ['0.1'])
    whole = evaluate(*arguments, batch_size=25)
    assert without_time(evaluate(*arguments, batch_size=25)) == without_time(whole)
    assert without_time(evaluate(*arguments, batch_size=25, seed=1)) != without_time(whole)
    options = {'batch_size': 25, 'chunks': tmp_path, 'world_size': 2}

    def other_process():
        if not list(tmp_path.rglob('*_0000025.json')):
            evaluate(*arguments, **options, rank=1, wait=lambda: None)

    with pytest.raises(FileNotFoundError):  # the second process alone finds no chunk of the first
        other_process()
    assert without_time(evaluate(*arguments, **options, rank=0)) == without_time(whole)


KILL = """
import os, signal, sys
from timm_batchout.cli.main import main
from timm_batchout.robustness.harness import evaluate as module
import timm_batchout.robustness.harness
code = sys.modules['timm_batchout.robustness.harness']
chunk, calls = code._chunk, []
def dying(*args):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return chunk(*args)
code._chunk = dying
main(sys.argv[1:])
"""


def test_killed_and_resumed(tmp_path, capsys):
    command = [
        'evaluate', 'batchout_mnist_cnn', '--data.name', 'digits', '--images', '20', '--attacks', '[fgsm, pgd]',
        '--eps', '[0.1, 8/255]', '--batch_size', '5', '--audit', 'false', '--settings', '{pgd: {steps: 3}}',
        '--device', 'cpu',
    ]  # fmt: skip
    assert main([*command, '--output', str(tmp_path / 'whole.json'), '--figure', str(tmp_path / 'curve.svg')]) == 0
    assert 'PGD Linf 8/255' in capsys.readouterr().out
    environment = {**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())}
    output = str(tmp_path / 'killed.json')
    assert subprocess.run([sys.executable, '-c', KILL, *command, '--output', output], env=environment).returncode == -9
    assert len(list((tmp_path / 'killed.json.chunks').rglob('*.json'))) == 4 and not (tmp_path / 'killed.json').exists()
    assert main([*command, '--output', output, '--resume', 'true']) == 0
    whole, resumed = (Report.load(tmp_path / name) for name in ('whole.json', 'killed.json'))
    assert without_time(whole) == without_time(resumed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['curve.svg', 'killed.json', 'whole.json']
    assert main(['compare', str(tmp_path / 'whole.json'), output]) == 0
    assert '**' in capsys.readouterr().out


# The audit, on nets built to mask, and on honest ones.


class Scaled(nn.Module):
    """Logits so large that the gradient of the cross-entropy underflows."""

    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.scale * self.model(x)


class Quantised(nn.Module):
    """Images in a few levels: no gradient gets through."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x * 4).round() / 4)


class Noisy(nn.Module):
    """Noise on the image, new each time."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.3 * torch.randn_like(x))


def audited(model, digits, **options):
    options = {'radii': [0.05, 0.1, 0.2], **options}
    return suspicions(measure(PixelModel(model), pixels(digits[0]), digits[1], **options))


def test_the_audit_fires_on_nets_that_mask(net, digits):
    assert any('zero gradients' in reason for reason in audited(Scaled(net, 1e4), digits))
    assert any('PGD on the cross-entropy leaves' in reason for reason in audited(Scaled(net, 1e4), digits))
    assert any('zero gradients' in reason for reason in audited(Quantised(net), digits))
    assert any('gradient is random' in reason for reason in audited(Noisy(net), digits))
    assert any("another net's images" in reason for reason in audited(Quantised(net), digits, source=PixelModel(net)))


def test_the_audit_is_silent_on_honest_nets(net, linear, digits):
    robust = trained(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)), epsilon=0.1)
    for honest in (net, linear, robust):
        assert audited(honest, digits, source=PixelModel(linear)) == []
    radii = ['0.1']
    weak, strong = (evaluate(model, *digits, ['pgd'], radii).score('pgd', '0.1').correct for model in (net, robust))
    assert strong > weak + 10, 'the robust net is robust'


def test_masked_figures_are_marked_and_never_best(net, digits):
    honest, masking = (
        evaluate(model, *digits, ['pgd', 'deepfool', 'noise'], ['0.05'], audit=True, name=name)
        for name, model in (('honest', net), ('masking', Scaled(net, 1e4)))
    )
    assert masking.score('pgd', '0.05').masked and not masking.score('noise', '0.05').masked
    assert masking.score('deepfool', iteration=5).correct == honest.score('deepfool', iteration=5).correct, (
        'the margin knows no scale'
    )
    assert not masking.score('deepfool', iteration=5).masked
    assert evaluate(Quantised(net), *digits, ['deepfool'], audit=True).score('deepfool', iteration=5).masked
    assert masking.score('pgd', '0.05').correct > honest.score('pgd', '0.05').correct
    assert 'PGD Linf 0.05 (masked)' in table(masking) and 'LIKELY' in table(masking)
    compared = compare([honest, masking])
    row = next(line for line in compared.splitlines() if line.startswith('| PGD Linf 0.05 | 60 |'))
    assert f'| {100 * honest.score("pgd", "0.05").accuracy:.2f} |' in row and row.endswith('(masked) |')
    assert '**' not in row, 'nothing is best beside a masked figure'


FINE: dict = {
    'n': 9, 'zero_gradients': 0, 'non_finite_gradients': 0, 'repeatability': 1, 'smoothness': 0.5, 'neighbourhood': 0.3,
    'radii': [{'radius': 0.3, 'fgsm': 0.6, 'pgd': 0.0}], 'pgd': {'cross-entropy': 0.2, 'margin': 0.2},
    'unbounded': {'cross-entropy': 0, 'margin': 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ('changes', 'reason', 'marked'),
    [
        ({}, '', []),
        ({'zero_gradients': 0.02}, '2% of the images have zero gradients', ['cross-entropy']),
        ({'non_finite_gradients': 0.02}, '2% of the images have non finite gradients', ['cross-entropy']),
        ({'repeatability': 0.9}, 'the gradient is random', ['cross-entropy', 'margin', 'several']),
        ({'smoothness': -0.1}, 'neighbours within 0.3 have other gradients', ['cross-entropy']),
        ({'radii': [*FINE['radii'], {'radius': 0.1, 'fgsm': 0.95, 'pgd': 0.2}]}, 'at 0.1 FGSM leaves 95.0% right, PGD',
         ['cross-entropy']),
        ({'pgd': {'cross-entropy': 0.3, 'margin': 0.2}}, 'PGD on the cross-entropy leaves 30.0% right, on the margin',
         ['cross-entropy']),
        ({'transfer': 0.1}, "PGD leaves 20.0% right, another net's images 10.0%", ['cross-entropy']),
        ({'unbounded': {'cross-entropy': 0.1, 'margin': 0.0}}, 'an attack without bounds leaves 10.0%',
         ['cross-entropy']),
        ({'unbounded': {'cross-entropy': 0.1, 'margin': 0.1}}, 'an attack without bounds leaves 10.0%',
         ['cross-entropy', 'margin']),
    ],
)  # fmt: skip
def test_every_suspicion_alone(changes, reason, marked):
    measured = {**FINE, **changes}
    found = suspicions(measured)
    assert len(found) == bool(reason) and ''.join(found).startswith(reason)
    losses = ['cross-entropy', 'margin', 'several', '']
    assert [loss for loss in losses if misled(loss, measured, found)] == marked
    assert ('AutoAttack' in verdict(measured, found)) == ('several' in marked)


def test_a_net_that_overfitted_to_fgsm_is_found_by_the_default_attack(net, digits):
    """FGSM alone at 0.3, where PGD leaves nothing on any loss: the bundled net of FGSM training on MNIST."""
    fgsm_at = evaluate(
        timm.create_model('mnist_cnn.fgsm_at_mnist', pretrained=True), *digits, eps='0.3', n=20, audit=True
    )
    assert fgsm_at.score('fgsm', '0.3').masked and 'have other gradients' in fgsm_at.audit['verdict']
    honest = evaluate(net, *digits, eps='0.3', audit=True)
    assert honest.audit['verdict'] == 'no sign of it.' and honest.score('clean').correct == honest.audit['n']
    tried = {entry['radius']: entry for entry in honest.audit['radii']}
    assert round(tried[0.3]['fgsm'] * honest.audit['n']) == honest.score('fgsm', '0.3').correct
    assert tried[0.3]['pgd'] == 0 < honest.audit['pgd']['cross-entropy'] == tried[honest.audit['radius']]['pgd'] < 1


def test_nothing_to_check(net, digits):
    wrong = (net(pixels(digits[0])).argmax(1) + 1) % 10
    report = evaluate(net, digits[0], wrong, audit=True)
    assert report.audit['verdict'] == 'nothing to check: no image was classified right.'
    assert report.audit['n'] == 0 and not report.score('fgsm', '8/255').masked and 'LIKELY' not in table(report)


def test_orders_that_cannot_be():
    def found(*scores, right=None):
        return suspicions(FINE, [Score(*score) for score in scores], right)

    assert found(('fgsm', 5, 100, 'Linf', 0.1), ('fgsm', 40, 100, 'Linf', 0.2)) == [
        'accuracy under fgsm rises with the radius'
    ]
    for strong, weak in (
        ('pgd', 'fgsm'), ('autoattack', 'fgsm'), ('autoattack', 'pgd'), ('pgd', 'transfer'), ('autoattack', 'transfer'),
        ('autoattack_l2', 'pgd_l2'), ('ddn', 'pgd_l2'),
    ):  # fmt: skip
        weaker = (weak, 5, 100, 'Linf', 0.1)
        assert found(weaker, (strong, 40, 100, 'Linf', 0.1)) == [f'{weak} at 0.1 does more than {strong}']
        assert found(weaker, (strong, 9, 100, 'Linf', 0.1)) == [], 'within the tolerance'
        assert found(weaker, (strong, 40, 100, 'Linf', 0.05)) == [], 'another radius'
    on_fewer = [('fgsm', 2, 4, 'Linf', 0.1), ('pgd', 2, 2, 'Linf', 0.1)]
    right = {('fgsm', Variant(0.1)): [1] * 20 + [0] * 20, ('pgd', Variant(0.1)): [1] * 20}
    assert found(*on_fewer, right=right) == [], 'of the images that both were run on, as many withstand both'
    right['fgsm', Variant(0.1)] = [0] * 9 + [1] * 31
    assert found(*on_fewer, right=right) == [], 'nine of twenty: chance'
    right['fgsm', Variant(0.1)] = [0] * 10 + [1] * 30
    assert found(*on_fewer, right=right) == ['fgsm at 0.1 does more than pgd']


def test_autoattack(net, digits):
    pytest.importorskip('pyautoattack')
    images, labels = digits[0][:12], digits[1][:12]
    state = torch.get_rng_state()
    report = evaluate(net, images, labels, ['autoattack', 'pgd'], ['0.05'])
    assert torch.equal(torch.get_rng_state(), state)
    assert report.score('autoattack', '0.05').correct <= report.score('pgd', '0.05').correct
    stages = [
        report.score('autoattack', '0.05', stage=stage).correct for stage in ('apgd-ce', 'apgd-t', 'fab-t', 'square')
    ]
    assert stages == sorted(stages, reverse=True) and stages[-1] == report.score('autoattack', '0.05').correct
    two = nn.Sequential(nn.Flatten(), nn.Linear(784, 2)).eval()
    quick = {'autoattack_l2': {'stages': ['apgd-ce', 'apgd-t', 'fab-t']}}  # without 5,000 queries
    labels = two(pixels(images[:4])).argmax(1)
    few = evaluate(two, images[:4], labels, ['autoattack_l2'], eps_l2=['0.1'], settings=quick)
    assert ('autoattack_l2', Variant(0.1)) in {score.key for score in few.scores}


def test_transfer(net, linear, digits):
    report = evaluate(net, *digits, ['pgd', 'transfer'], ['0.2'], transfer_from=linear)
    assert report.score('pgd', '0.2').correct <= report.score('transfer', '0.2').correct < report.score('clean').correct
    assert len(report.settings['transfer']['source_sha256']) == 64
    audits = [evaluate(net, *digits, audit=True, transfer_from=source).audit for source in (None, linear)]
    assert ['transfer' in audit for audit in audits] == [False, True]


class Tuple(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attacks': ['fgms']}, "There is no attack 'fgms'"),
        ({'attacks': ['transfer']}, 'transfer_from'),
        ({'eps': [-0.1]}, r'epsilon is in \[0, 1\] pixels'),
        ({'eps': ['8']}, r'epsilon is in \[0, 1\] pixels'),
        ({'eps_l2': ['-1']}, 'at least 0'),
        ({'eps_l2': ['1/0']}, "must be a number such as 0.3 or '8/255', got '1/0'"),
        ({'eps_l2': [math.inf]}, 'finite, got inf'),
        ({'batch_size': 0}, 'batch_size must be at least 1, got 0'),
        (
            {'attacks': ['pgd'], 'settings': {'pgd': {'steps': 'abc'}}},
            "steps of pgd must be a whole number.* got 'abc'",
        ),
        ({'attacks': ['pgd'], 'settings': {'pgd': {'steps': 0}}}, 'steps of pgd must be a whole number, 1 or more'),
        ({'attacks': ['pgd'], 'settings': {'pgd': {'n': 2.5}}}, 'n of pgd must be a whole number, 1 or more, got 2.5'),
        ({'attacks': ['pgd'], 'settings': {'pgd': {'rel_stepsize': 'x'}}}, 'rel_stepsize of pgd must be a number'),
        ({'attacks': ['pgd'], 'settings': {'pgd': {'random_start': 1}}}, 'must be true or false, got 1'),
        ({'attacks': ['pgd'], 'settings': {'pgd': {'eps': [None]}}}, 'epsilon must be a number'),
        ({'attacks': ['autoattack'], 'settings': {'autoattack': {'stages': []}}}, r"some of \['apgd-ce'"),
        ({'attacks': ['autoattack'], 'settings': {'autoattack': {'stages': ['apgd']}}}, r"some of \['apgd-ce'"),
        ({'settings': {'pgd': {'steps': 3}}}, 'not among the attacks'),
        ({'attacks': ['pgd'], 'settings': {'pgd': {'stpes': 3}}}, "no setting 'stpes'"),
        ({'images': torch.full((2, 1, 28, 28), 1.5)}, r'Images must lie in \[0, 1\]'),
        ({'images': torch.full((2, 1, 28, 28), math.nan)}, r'Images must lie in \[0, 1\]'),
        ({'n': 3}, r'n must lie in \[1, 2\]'),
        ({'n': -1}, r'n must lie in \[1, 2\]'),
        ({'images': torch.zeros(0, 1, 28, 28), 'labels': torch.zeros(0)}, 'no images'),
        ({'labels': torch.tensor([0])}, '2 images, 1 labels'),
        ({'images': torch.zeros(2, 1, 28, 28, dtype=torch.int64)}, 'uint8, or floating in .0, 1., got torch.int64'),
        ({'labels': torch.tensor([0.0, 1.0])}, r'int64, got \[2\], torch.float32'),
        ({'labels': torch.tensor([True, False])}, r'int64, got \[2\], torch.bool'),
        ({'labels': torch.tensor([[0], [1]])}, r'int64, got \[2, 1\], torch.int64'),
        ({'labels': torch.tensor([0, 10])}, r'Labels must lie in \[0, 10\)'),
        ({'labels': torch.tensor([-1, 0])}, r'Labels must lie in \[0, 10\)'),
        ({'model': nn.Sequential(nn.Flatten(), nn.Linear(784, 1))}, 'two classes or more'),
        ({'model': Tuple()}, 'must return a tensor of logits'),
        ({'labels': None}, 'two tensors, or a data set'),
        ({'images': [torch.zeros(1, 28, 28)], 'labels': None}, 'pairs of an image'),
        ({'images': [(torch.zeros(1, 28, 28), 0)]}, 'two tensors, or a data set'),
        ({'world_size': 2}, 'name one as chunks'),
        ({'model': timm.create_model('test_resnet', in_chans=1)}, 'The images have 1 channels, the model takes 3'),
    ],
)
def test_bad_input(net, changes, message):
    arguments = {'model': net, 'images': torch.zeros(2, 1, 28, 28), 'labels': torch.tensor([0, 1]), **changes}
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments)


def test_bad_commands(tmp_path, capsys):
    damaged = tmp_path / 'damaged.safetensors'
    damaged.write_bytes(b'half of it')
    for arguments, message in (
        ([str(damaged)], 'is a file: name the architecture as MODEL, and the file as --checkpoint'),
        (['mnist_cnn', '--checkpoint', 'nowhere.safetensors'], "'nowhere.safetensors' is not there"),
        (['mnist_cnn', '--checkpoint', str(damaged)], 'damaged.safetensors is damaged'),
        (['mnist_cnn', 'cifar_vgg'], 'Name one model, got 2: mnist_cnn cifar_vgg'),
        (['mnist_cnm'], "Did you mean 'mnist_cnn'"),
        (['mnist_cnn', '--data.name', 'digits', '--images', '9999'], 'images must lie in [1, '),
        (['mnist_cnn', '--attacks', '[fgsn]'], "There is no attack 'fgsn'"),
        (['cifar_vgg', '--data.root', str(tmp_path)], 'mnist is not in'),
        (['mnist_cnn', '--figure', 'curve.svg'], 'name an --output'),
        (['mnist_cnn', '--checkpoint', 'weights.pth'], '.safetensors'),
    ):
        assert main(['evaluate', *arguments]) == 2
        assert message in capsys.readouterr().err, arguments


def test_files_that_are_no_reports(tmp_path, capsys):
    for text in ('{', '[]', '{}', '{"scores": [{}]}', '\xff'):
        (tmp_path / 'other.json').write_text(text, 'latin-1')
        assert main(['compare', str(tmp_path / 'other.json')]) == 2
        assert "other.json' is no report" in capsys.readouterr().err


def test_the_audit_needs_no_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'foolbox', None)
    command = ['evaluate', 'mnist_cnn', '--data.name', 'digits', '--images', '2', '--device', 'cpu']
    assert main(command) == 0 and 'Gradient masking' in capsys.readouterr().out
    assert main([*command, '--attacks', '[pgd]']) == 2 and 'needs foolbox' in capsys.readouterr().err


def test_a_data_set_is_its_images_and_labels(net, digits):
    pairs = list(zip(pixels(digits[0]), digits[1].tolist(), strict=True))
    assert without_time(evaluate(net, pairs, eps='0.1')) == without_time(
        evaluate(net, pixels(digits[0]), digits[1], eps=['0.1'])
    )


def test_rows_of_other_settings_are_marked(net, digits):
    one, many = (
        evaluate(net, *digits, ['fgsm', 'pgd'], ['0.05'], settings={'pgd': {'steps': steps}}) for steps in (1, 20)
    )
    without = evaluate(net, *digits, ['noise'], ['0.05'])
    rows = [line for line in compare([one, many, without]).splitlines() if ' 0.05' in line]
    assert rows[0].startswith('| FGSM Linf 0.05 |') and rows[0].count('**') == 4, 'two are alike, one has none'
    assert rows[1].startswith('| PGD Linf 0.05 (settings differ) |') and '**' not in rows[1]
    assert rows[2].startswith('| Gaussian noise 0.05 |') and '**' not in rows[2], 'the only one'


def test_weights_that_are_broken(digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    nn.init.constant_(net[1].weight, math.nan)
    with pytest.raises(ValueError, match='NaN or infinite'):
        evaluate(net, *digits)


def test_logits_that_are_broken_on_a_later_image(digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    images = pixels(digits[0])
    images[40] = 0.0  # all black
    net[1].register_forward_hook(lambda layer, args, out: out / args[0].amax(1, keepdim=True))
    with pytest.raises(ValueError, match='logits of 1 of 60 images are NaN or infinite'):
        evaluate(net, images, digits[1])


def test_labels_of_any_integer(net, digits):
    whole = evaluate(net, *digits)
    assert without_time(evaluate(net, digits[0], digits[1].int())) == without_time(whole)


def test_chunks_of_other_preprocessing_or_packages_are_not_taken(net, digits, tmp_path, monkeypatch):
    def stores():
        return len(list(tmp_path.iterdir()))

    net.pretrained_cfg = {'mean': (0.5,), 'std': (0.5,)}
    for _ in range(2):
        evaluate(net, *digits, chunks=tmp_path)
        assert stores() == 1
    del net.pretrained_cfg
    evaluate(net, *digits, chunks=tmp_path)
    assert stores() == 2
    monkeypatch.setattr('timm_batchout.provenance.version', lambda package: 'another')
    evaluate(net, *digits, chunks=tmp_path)
    assert stores() == 3


def test_reports_of_other_images_do_not_stand_in_one_table(net, digits):
    a, b = (evaluate(net, digits[0][:n], digits[1][:n]) for n in (4, 5))
    with pytest.raises(ValueError, match='different images'):
        compare([a, b])


def test_normalisation_is_inside(digits):
    model = timm.create_model('test_resnet', in_chans=1, num_classes=10)
    model.pretrained_cfg.update(mean=(0.3,), std=(0.2,))
    report = evaluate(model, *digits, ['fgsm'], ['8/255'])
    with torch.no_grad():
        right = model.eval()((pixels(digits[0]) - 0.3) / 0.2).argmax(1) == digits[1]
    assert report.score('clean').correct == right.sum()
    assert report.preprocessing == {
        'mean': [pytest.approx(0.3)],
        'std': [pytest.approx(0.2)],
        'input_size': [1, 28, 28],
    }


def test_attacks_with_images_and_radii_of_their_own(net, digits):
    settings = {'pgd': {'n': 7, 'eps': '0.1', 'steps': 3}, 'ddn': {'n': 5, 'eps': [1], 'steps': 3}}
    report = evaluate(net, *digits, ['fgsm', 'pgd', 'ddn'], ['0.05', '0.2'], settings=settings, batch_size=4)
    counts = {score.key: score.n for score in report.scores}
    assert counts == {
        ('clean', Variant()): 60, ('fgsm', Variant(0.05)): 60, ('fgsm', Variant(0.2)): 60,
        ('pgd', Variant(0.1)): 7, ('ddn', Variant(1.0)): 5, ('ddn', Variant()): 5,
    }  # fmt: skip
    alone = evaluate(net, *digits, ['pgd'], ['0.1'], n=7, settings={'pgd': {'steps': 3}}, batch_size=4)
    assert alone.score('pgd', '0.1') == report.score('pgd', '0.1')
    for wrong in (0, 61):
        with pytest.raises(ValueError, match=f'n of pgd must lie in .1, 60., the images, got {wrong}'):
            evaluate(net, *digits, ['pgd'], settings={'pgd': {'n': wrong}})


def test_wilson():
    """Values of the R package binom."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


@pytest.mark.parametrize(('name', 'data'), [('mnist', 'mnist'), ('variants', 'mnist'), ('cifar10', 'cifar10')])
def test_evaluation_recipes_are_valid(name, data):
    recipe = Path(__file__).parents[2] / 'recipes' / 'paper' / f'evaluate_{name}.yaml'
    config = parse(EvaluateConfig, ['cifar_vgg', '--config', str(recipe), '--output', 'x'])
    assert set(config.settings) <= set(config.attacks)
    assert config.data.name == data


@pytest.mark.parametrize('attack', ['fgsm', 'pgd', 'deepfool', 'ddn', 'autoattack'])
def test_inside_no_grad_and_for_any_layout_the_same_counts(digits, net, attack):
    images, labels = digits[0][:3].float() / 255, digits[1][:3]
    attempt = [net, images, labels, [attack], ['0.1']]
    expected = [score.correct for score in evaluate(*attempt).scores]
    last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    with torch.no_grad():
        assert [score.correct for score in evaluate(*attempt).scores] == expected
        assert not torch.is_grad_enabled()
    for other in (last, images.clone().requires_grad_()):
        assert [score.correct for score in evaluate(net, other, *attempt[2:]).scores] == expected


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_a_net_of_another_precision_is_refused_with_the_remedy(digits, net, dtype):
    with pytest.raises(ValueError, match=rf'The weights are {dtype}.*evaluate model.float'):
        evaluate(copy.deepcopy(net).to(dtype), *digits)


@pytest.mark.parametrize('wrap', [nn.DataParallel, ModelEmaV3, AveragedModel])
def test_a_wrapped_net_scores_as_the_net(digits, wrap):
    states = {'mean': [5.0], 'std': [9.0]}
    model = timm.create_model('test_resnet', in_chans=1, num_classes=10, pretrained_cfg_overlay=states)
    images = digits[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    plain, wrapped = (evaluate(net, images, digits[1], ['fgsm'], ['1/255']) for net in (model, wrap(model)))
    assert plain.preprocessing == wrapped.preprocessing and plain.preprocessing['mean'] == [5.0]
    assert [s.correct for s in plain.scores] == [s.correct for s in wrapped.scores]
