"""The masking audit: planted nets are caught, honest ones are not accused, and each sign has a test of its own."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import planted
import pytest
import timm
import torch
from torch import nn

from timm_batchout import evaluate
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
from timm_batchout.pixels import PixelModel
from timm_batchout.robustness.attacks import ATTACKS
from timm_batchout.robustness.masking import judge, measure, misled, more
from timm_batchout.robustness.report import Audit, Score, Variant
from timm_batchout.robustness.tables import compare, table

pytest.importorskip('pyautoattack')
RECORDED = json.loads(Path(planted.__file__).with_suffix('.json').read_text())


@pytest.fixture(scope='module')
def digits():
    split = planted.digits(False)
    return split.images[:150], split.labels[:150]


def audited(model, digits, **options):
    return judge(measure(PixelModel(model), digits[0].float() / 255, digits[1], **options))


# Quick to train; the recipe has them all.
@pytest.mark.parametrize(
    ('name', 'sign'),
    [
        ('logits x 1e4', 'zero gradients'),
        ('defensive distillation', 'on the scale-free loss'),
        ('detached input', 'zero gradients'),
        ('thermometer coding', 'queries without gradients fool'),
        ('sine shattering, CNN', 'gradients differ between neighbours'),
        ('sine shattering, MLP', 'FGSM 5'),  # far below PGD
        ('noise 0.3', 'the gradient is random'),
        ('hash ensemble', 'queries without gradients fool'),
        ('decoy: linear', 'queries without gradients fool'),
        ('gradient reversed', 'an attack without bounds leaves'),
        ('gradient drowned in noise', 'on the margin loss'),
        ('gradient of NaN', 'non finite gradients'),
        ('FGSM training, MLP', 'FGSM leaves'),
    ],
)
def test_planted_nets_are_caught(name, sign, digits):
    assert any(sign in reason for reason in audited(planted.MASKING[name](), digits).suspicions)


@pytest.mark.parametrize(
    'name', [pytest.param('CNN', marks=pytest.mark.slow), 'MLP, tanh', 'linear', 'PGD training, MLP', 'BatchOut']
)
def test_honest_nets_are_not_accused_by_any_seed(name, digits):
    model, source = planted.HONEST[name](), PixelModel(planted.plain_mlp())
    for seed in range(3):
        audit = audited(model, digits, seed=seed, source=source)
        assert audit.suspicions == [] and audit.verdict == 'no sign of it.' and audit.n == 100


def test_the_recorded_detection_rate_is_of_these_nets():
    for counts in RECORDED['audits'].values():
        assert counts['masking'] >= 30 and counts['honest'] >= 15
        assert counts['caught'] >= 0.85 * counts['masking'] and counts['accused'] == 0
    assert {record['net'] for record in RECORDED['nets']} == {*planted.MASKING, *planted.HONEST}


def test_few_images_and_constant_nets_tell_nothing(digits):
    masked = planted.MASKING['logits x 1e4']()
    few = evaluate(masked, digits[0][:40], digits[1][:40])
    assert few.audit.verdict.startswith('too few images to tell: ') and few.audit.pgd == {}
    assert not any(score.masked for score in few.scores)

    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 10) + torch.eye(10)[0]

    report = evaluate(Constant(), digits[0], torch.zeros(150, dtype=torch.int64))
    assert report.audit.verdict == 'nothing to check: the model gives every image the same logits.'
    assert report.score('fgsm', '8/255').correct == 150 and not report.score('fgsm', '8/255').masked


def test_what_is_measured_does_not_depend_on_the_attacks_that_were_asked_for(digits):
    audits = [
        asdict(evaluate(planted.plain_mlp(), *digits, attacks, [radius]).audit)
        for attacks, radius in ((['fgsm'], '8/255'), (['pgd', 'noise'], '0.3'), ([], '0.1'))
    ]
    assert audits[0] == audits[1] == audits[2]


def test_without_its_package_the_audit_says_that_it_asked_no_queries(digits, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'pyautoattack.square', None)
    audit = audited(planted.plain_mlp(), digits)
    assert audit.queries == audit.taken == 0 < audit.left and audit.verdict == 'no sign of it.'


def test_masked_figures_are_marked_and_never_best(digits):
    honest, masking = (
        evaluate(model, *digits, ['pgd', 'deepfool', 'noise'], ['0.05'], name=name)
        for name, model in (('honest', planted.plain()), ('masking', planted.MASKING['logits x 1e4']()))
    )
    assert masking.score('pgd', '0.05').masked and not masking.score('noise', '0.05').masked
    assert masking.score('deepfool', iteration=5).correct == honest.score('deepfool', iteration=5).correct, (
        'the margin knows no scale'
    )
    assert not masking.score('deepfool', iteration=5).masked
    quantised = evaluate(planted.MASKING['quantised to 4 levels'](), *digits, ['deepfool'])
    assert quantised.score('deepfool', iteration=5).masked
    assert 'PGD Linf 0.05 (masked)' in table(masking) and 'LIKELY' in table(masking)
    row = next(line for line in compare([honest, masking]).splitlines() if line.startswith('| PGD Linf 0.05 | 150 |'))
    assert f'| {100 * honest.score("pgd", "0.05").accuracy:.2f} |' in row and row.endswith('(masked) |')
    assert '**' not in row, 'nothing is best beside a masked figure'


def test_a_net_without_a_path_for_gradients_is_attacked_in_vain(digits):
    model = planted.MASKING['detached input']()
    report = evaluate(model, *digits, ['fgsm', 'pgd', 'deepfool', 'ddn'], ['0.3'], n=60)
    assert report.score('fgsm', '0.3').correct == report.score('clean').correct and report.score('fgsm', '0.3').masked


@pytest.mark.parametrize(
    ('changes', 'marked'),
    [
        ({}, []),
        ({'suspicions': ['x']}, ['cross-entropy']),
        ({'suspicions': ['x'], 'repeatability': 0.9}, ['cross-entropy', 'margin', 'several']),
        ({'suspicions': ['x'], 'unbounded': {'cross-entropy': 0.1, 'margin': 0.1}}, ['cross-entropy', 'margin']),
    ],
)
def test_which_attacks_a_sign_spoils(changes, marked):
    audit = judge(Audit(**{'n': 100, 'unbounded': {'cross-entropy': 0.1, 'margin': 0.0}, **changes}))
    assert [loss for loss in ('cross-entropy', 'margin', 'several', '') if misled(loss, audit)] == marked
    assert ('AutoAttack' in audit.verdict) == ('several' in marked)
    assert {attack.loss for attack in ATTACKS.values()} == {'cross-entropy', 'margin', 'several', ''}


def test_chance_is_no_sign():
    assert more([1] * 10 + [0] * 90, [0] * 100) and not more([1] * 9 + [0] * 91, [0] * 100)
    assert not more([1] * 30 + [0] * 70, [0] * 70 + [1] * 30), 'as many the other way'
    assert not more([1, 1, 1], [0, 0, 0]), 'three images'
    assert more([1] * 10, [0] * 10 + [1] * 50), 'of the images that both were run on'


def test_orders_that_cannot_be():
    def found(*scores, right):
        return judge(Audit(n=100), [Score(*score) for score in scores], right).suspicions

    few, many = [1] * 5 + [0] * 95, [1] * 40 + [0] * 60
    assert found(
        ('fgsm', 5, 100, 'Linf', 0.1), ('fgsm', 40, 100, 'Linf', 0.2),
        right={('fgsm', Variant(0.1)): few, ('fgsm', Variant(0.2)): many},
    ) == ['accuracy under fgsm rises with the radius']  # fmt: skip
    for strong, weak in (
        ('pgd', 'fgsm'), ('autoattack', 'fgsm'), ('autoattack', 'pgd'), ('pgd', 'transfer'), ('autoattack', 'transfer'),
        ('autoattack_l2', 'pgd_l2'), ('ddn', 'pgd_l2'),
    ):  # fmt: skip
        right = {(weak, Variant(0.1)): few, (strong, Variant(0.1)): many, (strong, Variant(0.05)): many}
        weaker = (weak, 5, 100, 'Linf', 0.1)
        assert found(weaker, (strong, 40, 100, 'Linf', 0.1), right=right) == [f'{weak} at 0.1 fools more than {strong}']
        assert found(weaker, (strong, 40, 100, 'Linf', 0.05), right=right) == [], 'another radius'


def test_queries_that_take_what_autoattacks_gradients_left():
    def found(before, after):
        scores = [
            Score('autoattack', right, 100, 'Linf', 0.1, stage=stage)
            for stage, right in (('apgd-ce', 60), ('apgd-t', 50), ('fab-t', before), ('square', after))
        ]
        return judge(Audit(n=100), scores, {}).suspicions

    assert found(43, 24) == ['autoattack at 0.1: queries fool 19 of 43 images that its gradients leave right']
    assert found(43, 41) == found(5, 3) == found(0, 0) == []


@pytest.fixture
def mnist():
    root = Path(os.environ.get('TIMM_BATCHOUT_DATA', Path(__file__).parents[3] / 'shared' / 'data')) / 'mnist'
    if not root.is_dir():
        pytest.skip('MNIST is not on this machine: set TIMM_BATCHOUT_DATA')
    split = load_split(DataConfig('mnist', str(root)), train=False)
    return split.images, split.labels


@pytest.mark.slow
def test_the_bundled_net_of_fgsm_training_is_caught_on_its_own_data(mnist):
    masked = evaluate(timm.create_model('mnist_cnn.fgsm_at_mnist', pretrained=True), *mnist, n=200)
    assert masked.audit.suspicions and masked.score('fgsm', '8/255').masked
    honest = evaluate(timm.create_model('mnist_cnn.baseline_mnist', pretrained=True), *mnist, n=200)
    assert honest.audit.verdict == 'no sign of it.'


def test_contributing_shows_what_was_recorded():
    assert planted.table(RECORDED) in planted.CONTRIBUTING.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten audits
@pytest.mark.parametrize('name', ['mnist_cnn, dropout', 'CNN', 'linear', 'PGD training 0.2'])
def test_the_verdict_on_an_honest_net_is_the_same_for_ten_seeds(name):
    model, split = planted.HONEST[name](), planted.digits(False)
    for seed in range(10):
        audit = evaluate(model, split.images, split.labels, n=150, seed=seed).audit
        assert audit.n >= 90 and audit.verdict == 'no sign of it.', (seed, audit)
