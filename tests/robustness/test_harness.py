"""The evaluation harness: attacks that agree with their libraries, reports that can be trusted, an audit that fires."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import planted
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_batchout as tb
from timm_batchout.cli.evaluate import EvaluateConfig
from timm_batchout.cli.main import main
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
from timm_batchout.recipe import parse
from timm_batchout.robustness.chunks import Chunks
from timm_batchout.robustness.deepfool import deepfool
from timm_batchout.robustness.harness import evaluate as evaluate_and_audit
from timm_batchout.robustness.report import Report, Score, Variant, paired_difference, wilson
from timm_batchout.robustness.tables import compare, leaders, table

foolbox = pytest.importorskip('foolbox')
evaluate = partial(evaluate_and_audit, audit=False)  # audits have tests of their own
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
    assert report.audit.verdict == 'no sign of it.' and not any(score.masked for score in report.scores)

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
    arguments = (nn.Sequential(planted.Noise(0.3), net), *digits, ['fgsm', 'deepfool', 'noise'], ['0.1'])
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
    chunks = Chunks(tmp_path / 'chunks')
    options = {'batch_size': 25, 'chunks': chunks, 'world_size': 2}
    names = []

    def finished():
        names.append(sorted(path.name for path in (tmp_path / 'chunks').rglob('*.json')))

    assert without_time(evaluate(*arguments, **options, rank=1, wait=finished)) == without_time(whole)
    assert names == [[], sorted(names[1])] and 0 < len(names[1]) < 12, 'its own share before the others come'
    assert without_time(evaluate(*arguments, **options, rank=0)) == without_time(whole)
    stranger = tmp_path / 'chunks' / 'notes.txt'
    stranger.write_text('mine')
    chunks.discard()
    assert list((tmp_path / 'chunks').iterdir()) == [stranger]


@pytest.mark.parametrize('damage', [b'', b'null', b'{}', b'{"records": []}', 'flip', 'cut'])
def test_a_damaged_chunk_is_measured_again(net, digits, tmp_path, damage):
    arguments = {'model': net, 'images': digits[0], 'labels': digits[1], 'eps': ['0.1'], 'batch_size': 30}
    whole = evaluate(**arguments, chunks=Chunks(tmp_path))
    (path,) = tmp_path.rglob('fgsm_0000030.json')
    content = path.read_bytes()
    if damage == 'flip':
        at = content.index(b'"right": [') + len(b'"right": [')
        damage = content[:at] + (b'0' if content[at : at + 1] == b'1' else b'1') + content[at + 1 :]
    elif damage == 'cut':
        damage = content.replace(b'"right": [1, ', b'"right": [').replace(b'"right": [0, ', b'"right": [')
    path.write_bytes(damage)
    assert without_time(evaluate(**arguments, chunks=Chunks(tmp_path))) == without_time(whole)
    assert path.read_bytes() == content
    measured = path.stat().st_mtime_ns
    evaluate(**arguments, chunks=Chunks(tmp_path))
    assert path.stat().st_mtime_ns == measured, 'a sound one is taken as it is'
    evaluate(**arguments, chunks=Chunks(tmp_path, resume=False))
    assert path.stat().st_mtime_ns > measured


KILL = """
import os, signal, sys
from timm_batchout.cli.main import main
from timm_batchout.robustness.harness import evaluate as module
import timm_batchout.robustness.harness
code = sys.modules['timm_batchout.robustness.harness']
records, calls = code._records, []
def dying(*args):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return records(*args)
code._records = dying
main(sys.argv[1:])
"""


def test_an_interrupted_evaluation_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    module = sys.modules['timm_batchout.robustness.harness']
    records, calls = module._records, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return records(*args)

    command = ['evaluate', 'mnist_cnn', '--data.name', 'digits', '--images', '20', '--batch_size', '5']
    command += ['--audit', 'false', '--device', 'cpu', '--output', str(tmp_path / 'report.json')]
    monkeypatch.setattr(module, '_records', interrupted)
    assert main(command) == 2
    assert 'Finished chunks are saved: repeat the command to continue' in capsys.readouterr().err
    assert len(list(tmp_path.rglob('*_*.json'))) == 2
    assert main(command) == 0 and len(calls) == 3 + 8 - 2, 'what was finished is not measured again'


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


def test_autoattack(net, digits):
    pytest.importorskip('pyautoattack')
    images, labels = digits[0][:6], digits[1][:6]
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
    assert audits[0].transfer is None and 0 < audits[1].transfer <= 1


class Tuple(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attacks': ['fgms']}, "Unknown attack 'fgms'"),
        ({'attacks': ['transfer']}, 'transfer_from'),
        ({'eps': [-0.1]}, r'epsilon is in \[0, 1\] pixels'),
        ({'eps': ['8']}, r'epsilon is in \[0, 1\] pixels'),
        ({'eps_l2': ['-1']}, 'at least 0'),
        ({'eps_l2': ['1/0']}, "must be a number such as 0.3 or '8/255', got '1/0'"),
        ({'eps_l2': [math.inf]}, 'must be finite and at least 0, got inf'),
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
        ({'images': torch.zeros(0, 1, 28, 28), 'labels': torch.zeros(0)}, 'The data set has no images'),
        ({'labels': torch.tensor([0])}, 'Got 2 images but 1 labels'),
        ({'images': torch.zeros(2, 1, 28, 28, dtype=torch.int64)}, 'uint8, or floating in .0, 1., got torch.int64'),
        ({'labels': torch.tensor([0.0, 1.0])}, r'int64, got \[2\], torch.float32'),
        ({'labels': torch.tensor([True, False])}, r'int64, got \[2\], torch.bool'),
        ({'labels': torch.tensor([[0], [1]])}, r'int64, got \[2, 1\], torch.int64'),
        ({'labels': torch.tensor([0, 10])}, r'Labels must lie in \[0, 10\)'),
        ({'labels': torch.tensor([-1, 0])}, r'Labels must lie in \[0, 10\)'),
        ({'model': nn.Sequential(nn.Flatten(), nn.Linear(784, 1))}, 'two classes or more'),
        ({'model': Tuple()}, 'must return a tensor of logits'),
        ({'labels': None}, 'two tensors, or one data set'),
        ({'images': [torch.zeros(1, 28, 28)], 'labels': None}, 'pairs of an image'),
        ({'images': [(torch.zeros(1, 28, 28), 0)]}, 'two tensors, or one data set'),
        ({'world_size': 2}, 'name one as chunks'),
        (
            {'model': timm.create_model('test_resnet', in_chans=1)},
            'The images have 1 channels, but the mean of the model has 3',
        ),
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
        ([str(damaged)], 'is a file. Give the architecture as MODEL, and the file as --checkpoint'),
        (['mnist_cnn', '--checkpoint', 'nowhere.safetensors'], "'nowhere.safetensors' does not exist"),
        (['mnist_cnn', '--checkpoint', str(damaged)], "damaged.safetensors' is damaged"),
        (['mnist_cnn', 'cifar_vgg'], 'Name one model, got 2: mnist_cnn cifar_vgg'),
        (['mnist_cnm'], "Did you mean 'mnist_cnn'"),
        (['mnist_cnn', '--data.name', 'digits', '--images', '9999'], 'images must lie in [1, '),
        (['mnist_cnn', '--attacks', '[fgsn]'], "Unknown attack 'fgsn'"),
        (['cifar_vgg', '--data.root', str(tmp_path)], 'mnist not found in'),
        (['mnist_cnn', '--figure', 'curve.svg'], 'Add an --output'),
        (['mnist_cnn', '--checkpoint', 'weights.pth'], "'weights.pth' does not exist"),
        (['mnist_cnn', '--data.name', 'digits', '--output', str(tmp_path)], 'is a folder. Name a file in it'),
        (['mnist_cnn', '--data.name', 'digits', '--output', str(damaged)], 'is not a report and is not overwritten'),
    ):
        assert main(['evaluate', *arguments]) == 2
        assert message in capsys.readouterr().err, arguments


def test_files_that_are_no_reports(tmp_path, capsys):
    for text in ('{', '[]', '{}', '{"scores": [{}]}', '\xff', '[' * 100_000):
        (tmp_path / 'other.json').write_text(text, 'latin-1')
        assert main(['compare', str(tmp_path / 'other.json')]) == 2
        assert "other.json' is not a report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        (('scores', 1, 'correct'), -5, r'scores\[1\].correct must lie in \[0, n=60\], got -5'),
        (('scores', 1, 'correct'), 61, r'scores\[1\].correct must lie in \[0, n=60\], got 61'),
        (('scores', 1, 'correct'), math.nan, r'scores\[1\].correct must be of type int'),
        (('scores', 1, 'correct'), None, r'scores\[1\].correct must be of type int'),
        (('scores', 1, 'n'), 0, r'scores\[1\].n must be at least 1'),
        (('scores', 1, 'masked'), 'no', r'scores\[1\].masked must be of type bool'),
        (('scores', 1, 'radius'), -0.1, r'scores\[1\].radius must be at least 0'),
        (('scores', 1, 'radius'), math.inf, r'scores\[1\].radius must be of type float or null'),
        (('scores', 1, 'attack'), 7, r'scores\[1\].attack must be of type str'),
        (('scores', 1, 'extra'), 7, r'scores\[1\].extra is not a field'),
        (('scores', 0), None, r'scores\[0\] must be of type dict'),
        (('scores',), [], r'scores\[0\] must be the clean one'),
        (('settings',), None, 'settings must be of type dict'),
        (('settings', 'fgsm'), None, 'settings.fgsm must be of type dict'),
        (('data',), ['x'], 'data must be of type str'),
        (('n',), 0, 'n must be at least 1'),
        (('preprocessing',), {}, 'preprocessing.mean must be of type list'),
        (('audit',), {'n': 'many'}, 'audit.n must be of type int'),
        (('audit',), {'suspicions': [3]}, r'audit.suspicions\[0\] must be of type str'),
        (('seconds',), math.nan, 'seconds must be of type float'),
    ],
)
def test_reports_from_elsewhere_are_checked_field_by_field(net, digits, tmp_path, path, value, message):
    report = evaluate(net, *digits, eps=['0.1']).to_dict()
    *parents, last = path
    inner = report
    for step in parents:
        inner = inner[step]
    inner[last] = value
    (tmp_path / 'report.json').write_text(json.dumps(report))
    with pytest.raises(ValueError, match=f"report.json' is not a report .*{message}"):
        Report.load(tmp_path / 'report.json')


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


def test_bold_is_what_so_many_images_tell_apart():
    def led(*counts, masked=()):
        scores = [
            None if count is None else Score('fgsm', *count, masked=i in masked) for i, count in enumerate(counts)
        ]
        return leaders(scores)

    assert led((60, 100), (40, 100)) == [True, False]
    assert led((52, 100), (48, 100)) == [False, False] and led((5200, 10_000), (4800, 10_000)) == [True, False]
    assert led((60, 100), (57, 100), (10, 100), None) == [True, True, False, False], 'the first two are one group'
    assert led((90, 100), (50, 100), (10, 100), masked={0}) == [False, True, False]
    assert led((90, 100), (50, 100), masked={0}) == led((0, 100), (0, 100)) == led((9, 10), None) == [False, False]
    assert led((100, 100), (90, 100)) == [True, False]


def test_rows_of_other_settings_are_marked(net, digits):
    one, many = (
        evaluate(net, *digits, ['fgsm', 'pgd'], ['0.05'], settings={'pgd': {'steps': steps}}) for steps in (1, 20)
    )
    without = evaluate(net, *digits, ['noise'], ['0.05'])
    rows = [line for line in compare([one, many, without]).splitlines() if ' 0.05' in line]
    assert rows[0].startswith('| FGSM Linf 0.05 |') and '**' not in rows[0], 'two are alike, one has none'
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
        evaluate(net, *digits, chunks=Chunks(tmp_path))
        assert stores() == 1
    del net.pretrained_cfg
    evaluate(net, *digits, chunks=Chunks(tmp_path))
    assert stores() == 2
    monkeypatch.setattr('timm_batchout.provenance.version', lambda package: 'another')
    evaluate(net, *digits, chunks=Chunks(tmp_path))
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
        'stated': True,
        'crop_pct': 1.0,
    }
    del model.pretrained_cfg
    model.register_parameter('nothing', nn.Parameter(torch.zeros(1)))
    assert 'states no mean and std, so it was given plain [0, 1] pixels' in table(evaluate(model, *digits))


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


@dataclass(frozen=True, kw_only=True)
class Brighter(tb.attacks.Attack):
    share: float = 0.5

    name = 'brighter'
    loss = ''

    def run(self, batch):
        moved = {Variant(radius): (batch.images + self.share * radius).clamp(0, 1) for radius in batch.radii}
        return tb.attacks.Outcome({variant: batch.withstood(x) for variant, x in moved.items()})


def test_an_attack_of_ones_own(net, digits):
    report = evaluate(net, *digits, [Brighter(share=1.0)], ['0.5'])
    with torch.no_grad():
        right = [net.eval()((pixels(digits[0]) + shift).clamp(0, 1)).argmax(1) == digits[1] for shift in (0, 0.5)]
    assert report.score('brighter', 0.5).correct == (right[0] & right[1]).sum()
    assert report.settings == {'brighter': {'share': 1.0}} and Report.from_dict(report.to_dict()) == report
    assert '| brighter 0.5 |' in table(report)
    with pytest.raises(ValueError, match='share of brighter must be a number'):
        Brighter(share='much')


def test_attacks_as_objects_are_those_by_name(net, digits):
    settings = {'pgd': {'n': 7, 'eps': '0.1', 'steps': 3}, 'deepfool': {'iterations': 2}}
    named = evaluate(net, *digits, ['fgsm', 'pgd', 'deepfool'], ['0.2'], settings=settings)
    attacks = ['fgsm', tb.attacks.PGD(n=7, eps='0.1', steps=3), tb.attacks.DeepFool(iterations=2)]
    built = evaluate(net, *digits, attacks, ['0.2'])
    assert (built.scores, built.settings) == (named.scores, named.settings)
    assert [kind.name for kind in tb.attacks.ATTACKS.values()] == list(tb.attacks.ATTACKS)
    with pytest.raises(ValueError, match='steps of pgd must be a whole number, 1 or more, got 0'):
        tb.attacks.PGD(steps=0)
    for twice in (
        {'attacks': ['pgd', tb.attacks.PGD(steps=3)]},
        {'attacks': [tb.attacks.PGD()], 'settings': {'pgd': {'steps': 3}}},
    ):
        with pytest.raises(ValueError, match='pgd is configured twice'):
            evaluate(net, *digits, **twice)


def test_wilson():
    """Values of the R package binom."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_paired_difference_has_the_interval_of_a_paired_t_test():
    from scipy.stats import ttest_rel  # comes with foolbox, without which this module is skipped

    values, others = [98.1, 97.4, 98.9], [97.0, 97.1, 97.6]
    gain, half = paired_difference(values, others)
    low, high = ttest_rel(values, others).confidence_interval()
    assert (gain - half, gain + half) == pytest.approx((low, high))


@pytest.mark.parametrize('name', ['mnist', 'cifar10'])
def test_evaluation_recipes_are_valid(name):
    recipe = Path(__file__).parents[2] / 'recipes' / 'paper' / f'evaluate_{name}.yaml'
    config = parse(EvaluateConfig, ['cifar_vgg', '--config', str(recipe), '--output', 'x'])
    assert set(config.settings) <= set(config.attacks)
    assert config.data.name == name


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
    with pytest.raises(ValueError, match=rf'The weights are {dtype}.*Evaluate model.float'):
        evaluate(copy.deepcopy(net).to(dtype), *digits)


@pytest.mark.parametrize('wrap', [nn.DataParallel, ModelEmaV3, AveragedModel])
def test_a_wrapped_net_scores_as_the_net(digits, wrap):
    states = {'mean': [5.0], 'std': [9.0]}
    model = timm.create_model('test_resnet', in_chans=1, num_classes=10, pretrained_cfg_overlay=states)
    images = digits[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    plain, wrapped = (evaluate(net, images, digits[1], ['fgsm'], ['1/255']) for net in (model, wrap(model)))
    assert plain.preprocessing == wrapped.preprocessing and plain.preprocessing['mean'] == [5.0]
    assert [s.correct for s in plain.scores] == [s.correct for s in wrapped.scores]
