"""Each claim of the paper beside what was measured, as a Markdown document. Verdicts follow a rule, not a hand."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from draw import Values, by_label, curve, described
from scipy.stats import t as student_t

from timm_batchout.robustness.report import Report
from timm_batchout.robustness.tables import attack_title
from timm_batchout.robustness.tables import compare as compare_reports

__all__ = ['over_seeds', 'results']

Figure = dict[str, Any]
HEADS = {'fgsm': 'FGSM', 'deepfool': 'DeepFool', 'deepfool_unclipped': 'DeepFool, not clipped,'}
PAPER = {'2': ('99.47', '99.31', '99.12'), '3': ('80.22', '80.01', '80.79')}  # clean accuracy, sections 6.2 and 6.3
BASELINE, FGSM_AT, BATCHOUT = 'baseline', 'FGSM adversarial training', 'BatchOut'


def results(figures: dict[str, Figure], reports: Sequence[Report] = (), variants: Sequence[Report] = ()) -> str:
    """RESULTS.md, except for its hand-written conclusion.

    Args:
        figures: Results of ``Paper.measure``, by name.
        reports: Reports on the bundled weights.
        variants: Reports on nets trained with other settings, evaluated from their run folders.
    """
    lines = [
        '# Reproducing the paper',
        '',
        'Written by `reproduce.py` from the JSON files beside it. Accuracies are percentages: the mean over seeds, and '
        'the standard deviation if there are several.',
        '',
        *_clean(figures),
        '## Claims',
        '',
        'Every claim is a list of comparisons ("BatchOut is above the baseline at epsilon 0.1"). A comparison counts '
        'as yes or no if the difference is larger than its 95% interval (over test images and, if several, over '
        "seeds, by Welch's t), otherwise as open; the ratio of two losses is compared directly. A claim *holds* if no "
        'comparison says no and at least half say yes; it *holds in part* if some say yes; it is *open* if all are '
        'open; otherwise it *does not hold*.',
        '',
        '| claim of the paper | comparisons | largest and smallest difference, points | verdict |',
        '|---|---|---|---|',
    ]
    for name, claim, compared in CLAIMS:
        if name in figures:
            lines.append(_row(claim, compared(figures[name])))
    lines += ['', *_sections(figures)]
    if variants:
        runs = [Path(report.model).parent.name for report in variants]  # the model is .../RUN/model.safetensors
        lines += ['## Other training settings', '', compare_reports(variants, runs), '']
    if reports:
        lines += ['## The bundled weights under stronger attacks', '']
    for data in dict.fromkeys(report.data for report in reports):
        same = [report for report in reports if report.data == data]
        lines += [compare_reports(same), '', 'Verdicts of the gradient masking audits:', '']
        lines += [f'- {report.model}: {report.audit.verdict}' for report in same if report.audit] + ['']
    return '\n'.join(lines) + '\n'


def over_seeds(figures: dict[str, Figure]) -> dict[str, Any]:
    """seeds.json: mean and standard deviation of the accuracy (percent) of every net under every attack."""
    report: dict[str, Any] = {}
    for figure in figures.values():
        for label in dict.fromkeys(net['label'] for net in figure['nets']):
            nets = [net for net in figure['nets'] if net['label'] == label]
            columns = zip(*(net['report']['scores'] for net in nets), strict=True)
            report.setdefault(figure['title'], {})[label] = {
                'data': nets[0]['data'],
                'seeds': [net['seed'] for net in nets],
                'accuracy': {
                    ' '.join(filter(None, [attack_title(same[0]['attack']), described(same[0])])): _mean_and_deviation(
                        [100 * score['accuracy'] for score in same]
                    )
                    for same in columns
                },
            }
    return report


def _mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
    deviation = round(stdev(values), 3) if len(values) > 1 else None
    return {'mean': round(mean(values), 3), 'std': deviation, 'values': [round(value, 2) for value in values]}


def _clean(figures: dict[str, Figure]) -> list[str]:
    lines = ['## Clean accuracy', '', '| | baseline | FGSM adversarial training | BatchOut |', '|---|---|---|---|']
    for name, paper in PAPER.items():
        if name in figures:
            data = figures[name]['nets'][0]['data']
            ours = by_label(figures[name], 'clean').values()
            lines.append(f'| {data}, ours | {" | ".join(map(_spread, ours))} |')
            lines.append(f'| {data.split()[0]}, paper | {" | ".join(paper)} |')
    return [*lines, '']


def _sections(figures: dict[str, Figure]) -> list[str]:
    """A picture and a table for every figure."""
    lines = []
    for name, figure in figures.items():
        first = figure['nets'][0]
        lines += [f'## {figure["title"]}', '', f'![{figure["title"]}](fig{name}.svg)', '']
        seeds = sorted({net['seed'] for net in figure['nets']})
        recipe = first['recipe']
        counts = {score['attack']: score['n'] for score in first['report']['scores']}
        lines += [
            f'{first["data"]}, {recipe["epochs"]} epochs of {recipe["optimizer"]["name"]}, seeds '
            f'{", ".join(map(str, seeds))}; test images: '
            + ', '.join(f'{n} ({attack})' for attack, n in counts.items())
            + '.',
            '',
        ]
        clean = by_label(figure, 'clean')
        columns: dict[str, Values] = {'clean': clean}
        for attack, head in HEADS.items():
            columns |= {f'{head} {variant}': values for variant, values in curve(figure, attack).items()}
        if name == '4a':
            columns = {'training loss': _final_loss(figure), **columns}
        lines += [f'| | {" | ".join(columns)} |', '|---' * (len(columns) + 1) + '|']
        for label in clean:
            cells = (
                _spread(values[label], 3 if column == 'training loss' else 2) for column, values in columns.items()
            )
            lines.append(f'| {label} | {" | ".join(cells)} |')
        lines.append('')
    return lines


def _spread(values: Sequence[float], digits: int = 2) -> str:
    around = f' ± {stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{mean(values):.{digits}f}{around}'


class Comparison(NamedTuple):
    """One measured comparison of a claim.

    Attributes:
        excess: Difference, or excess over what the claim states, in points.
        half: Half the width of its 95% interval.
        shown: Text for the table.
    """

    excess: float
    half: float
    shown: str


Claim = tuple[str, str, Callable[[Figure], list[Comparison]]]  # figure, text, what is compared


def _above(figure: Figure, attack: str, upper: str, lower: str, variants: Sequence[str] = ()) -> list[Comparison]:
    """One comparison for every variant of an attack."""
    counts = {score['attack']: score['n'] for score in figure['nets'][0]['report']['scores']}
    attacked = curve(figure, attack)
    return [
        _difference(values[upper], values[lower], counts[attack])
        for variant, values in attacked.items()
        if not variants or variant in variants
    ]


def _difference(a: Sequence[float], b: Sequence[float], n: int) -> Comparison:
    """A difference with two independent sources of error: the test images and, if there are several, the seeds."""
    images = sum(mean(x) * (100 - mean(x)) / n / len(x) for x in (a, b))
    squared = 1.96**2 * images
    several = [x for x in (a, b) if len(x) > 1]
    seeds = [stdev(x) ** 2 / len(x) for x in several]
    if sum(seeds) > 0:
        # Welch's degrees of freedom: with three seeds 2 to 4, where 1.96 would be far too narrow.
        freedom = sum(seeds) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(seeds, several, strict=True))
        squared += student_t.ppf(0.975, freedom) ** 2 * sum(seeds)
    difference = mean(a) - mean(b)
    return Comparison(difference, math.sqrt(squared), f'{difference:+.2f}')


def _costs_little(figure: Figure) -> list[Comparison]:
    """BatchOut's clean accuracy is less than 0.5 points below the baseline's."""
    clean = by_label(figure, 'clean')
    difference, half, shown = _difference(clean[BATCHOUT], clean[BASELINE], _n(figure))
    return [Comparison(difference + 0.5, half, shown)]


def _final_loss(figure: Figure) -> Values:
    losses: Values = {}
    for net in figure['nets']:
        losses.setdefault(net['label'], []).append(net['train_loss'][-1])
    return losses


def _row(claim: str, comparisons: Sequence[Comparison]) -> str:
    yes = sum(one.excess > one.half for one in comparisons)
    no = sum(one.excess < -one.half for one in comparisons)
    verdict = 'holds in part' if yes else 'does not hold' if no else 'open'
    if yes and not no and 2 * yes >= len(comparisons):
        verdict = 'holds'
    most, least = max(comparisons), min(comparisons)
    extremes = most.shown + (f', {least.shown}' if len(comparisons) > 1 else '')
    count = f'{yes} yes, {no} no, {len(comparisons) - yes - no} open'
    return f'| {claim} | {count} | {extremes} | {verdict} |'


def _n(figure: Figure) -> int:
    return figure['nets'][0]['report']['n']


def _everywhere_best(figure: Figure) -> list[Comparison]:
    values = by_label(figure, 'fgsm', '0.3')
    return [_difference(values['C1+C2+F1'], values[label], _n(figure)) for label in values if label != 'C1+C2+F1']


def _pairs_above_singles(figure: Figure) -> list[Comparison]:
    values = by_label(figure, 'fgsm', '0.3')
    pairs = [label for label in values if label.count('+') == 1]
    return [_difference(values[pair], values[one], _n(figure)) for pair in pairs for one in pair.split('+')]


def _k(attack: str, variant: str, sign: int) -> Callable[[Figure], list[Comparison]]:
    def compare(figure: Figure) -> list[Comparison]:
        values = by_label(figure, attack, variant)
        labels = [label for label in values if label != '0']
        steps = [_difference(values[above], values[below], _n(figure)) for below, above in pairwise(labels)]
        return [one._replace(excess=sign * one.excess) for one in steps]

    return compare


def _converges(figure: Figure) -> list[Comparison]:
    losses = _final_loss(figure)
    percent = 100 * mean(losses[BATCHOUT]) / mean(losses[BASELINE])
    return [Comparison(110 - percent, 0.0, f'{percent:.0f}% of its loss')]


def _deepfool(figure: str, data: str, claim: str, upper: str, lower: str) -> list[Claim]:
    """The paper does not say whether its DeepFool clips to [0, 1]."""
    return [
        (figure, f'{data}, DeepFool, clipped: {claim}', lambda f: _above(f, 'deepfool', upper, lower)),
        (figure, f'{data}, DeepFool, not clipped: {claim}', lambda f: _above(f, 'deepfool_unclipped', upper, lower)),
    ]


def _of_three_nets(figure: str, data: str, cost: str) -> list[Claim]:
    """What figures 2 and 3 are about."""
    return [
        (figure, f'{data}: BatchOut costs {cost} clean accuracy (here: less than 0.5 points)', _costs_little),
        (figure, f'{data}, FGSM: BatchOut is above the baseline', lambda f: _above(f, 'fgsm', BATCHOUT, BASELINE)),
        *_deepfool(figure, data, 'BatchOut is above the baseline', BATCHOUT, BASELINE),
        (figure, f'{data}, FGSM: FGSM training is above the baseline', lambda f: _above(f, 'fgsm', FGSM_AT, BASELINE)),
        *_deepfool(figure, data, 'BatchOut is above FGSM training', BATCHOUT, FGSM_AT),
    ]


CLAIMS: list[Claim] = [
    *_of_three_nets('2', 'MNIST', 'little'),
    *_deepfool('2', 'MNIST', 'FGSM training is above the baseline', FGSM_AT, BASELINE),
    *_of_three_nets('2-adamw', 'MNIST with AdamW', 'little'),
    *_deepfool('2-adamw', 'MNIST with AdamW', 'FGSM training is above the baseline', FGSM_AT, BASELINE),
    *_of_three_nets('3', 'CIFAR-10', 'no'),
    ('4a', "Training converges as fast (here: the last loss is at most 110% of the baseline's)", _converges),
    ('4b', 'FGSM 0.3: BatchOut at all layers is above every smaller choice', _everywhere_best),
    ('4b', 'FGSM 0.3: at two layers it is above either of them alone', _pairs_above_singles),
    (
        '4b',
        'FGSM 0.3: at F1 alone it is above C1+C2',
        lambda f: [_difference(by_label(f, 'fgsm', '0.3')['F1'], by_label(f, 'fgsm', '0.3')['C1+C2'], _n(f))],
    ),
    ('5a', 'Clean accuracy falls as k grows (from one k to the next)', _k('clean', '', -1)),
    ('5a', 'FGSM 0.4: accuracy rises as k grows (from one k to the next)', _k('fgsm', '0.4', 1)),
    ('5b', 'FGSM: BatchOut is above Gaussian noise', lambda f: _above(f, 'fgsm', BATCHOUT, 'Gaussian noise')),
]
