"""Reports as Markdown tables. Names of attacks for display are made here and nowhere else."""

import math
from collections.abc import Mapping, Sequence

from timm_batchout.robustness.report import Report, Score, Variant
from timm_batchout.text import format_radius

__all__ = ['TITLES', 'attack_title', 'cell', 'compare', 'describe', 'leaders', 'overview', 'table', 'title']

TITLES = {  # names for display, with the norm of the radius or distance
    'fgsm': 'FGSM Linf',
    'pgd': 'PGD Linf',
    'pgd_l2': 'PGD L2',
    'deepfool': 'DeepFool L2',
    'deepfool_unclipped': 'DeepFool unclipped L2',
    'ddn': 'DDN L2',
    'autoattack': 'AutoAttack Linf',
    'autoattack_l2': 'AutoAttack L2',
    'transfer': 'PGD on another net Linf',
    'noise': 'Gaussian noise',
    'corruptions': 'Corruptions',
}


def table(report: Report) -> str:
    """A row per attack and variant, and the audit's verdict."""
    rows = ['| attack | robust accuracy % (95%) | median distance |', '|---|---|---|']
    for score in report.scores:
        low, high = score.interval
        distance = '' if score.median_distance is None else f'{score.median_distance:.3f}'
        rows.append(
            f'| {title(score)}{" (masked)" * score.masked} | '
            f'{100 * score.accuracy:.2f} ({100 * low:.1f} to {100 * high:.1f}) | {distance} |'
        )
    head = f'**{report.model}** on {report.data}, n = {report.n}'
    verdict = f'\n\nGradient masking: {report.audit.verdict}' if report.audit else ''
    assumed = '' if report.preprocessing.get('stated', True) else (
        '\n\nThe model states no mean and std, so it was given plain [0, 1] pixels.'
    )  # fmt: skip
    return head + '\n\n' + '\n'.join(rows) + assumed + verdict


def overview(reports: Mapping[str, Report]) -> str:
    """Clean, AutoAttack and FGSM accuracy of several models, one Markdown table for each data set.

    Args:
        reports: Reports by the name to display.
    """
    tables = []
    for data in sorted({report.data for report in reports.values()}):
        # The plain nets first.
        names = sorted((name for name in reports if reports[name].data == data), key=lambda n: ('batchout_' in n, n))
        columns: dict[tuple[str, Variant], set[int]] = {}
        for attack in ('clean', 'autoattack', 'fgsm'):
            for score in (score for name in names for score in reports[name].scores):
                if score.attack == attack and not score.stage:
                    columns.setdefault(score.key, set()).add(score.n)
        heads = [f'{_name(*key)}, n = {" or ".join(map(str, sorted(n)))}' for key, n in columns.items()]
        lines = [f'| {data} | {" | ".join(heads)} |', '|---' * (len(heads) + 1) + '|']
        for name in names:
            known = {score.key: score for score in reports[name].scores}
            lines.append(f'| `{name}` | {" | ".join(cell(known.get(key)) for key in columns)} |')
        tables.append('\n'.join(lines))
    return '\n\n'.join(tables)


def compare(
    reports: Sequence[Report], names: Sequence[str] = (), first_only: bool = False, intervals: bool = False
) -> str:
    """One Markdown table of several models, a row for each attack; the leaders are bold (see ``leaders``).

    Rows in which the models were attacked with different settings, or with images of different nets, say so and have no
    leader. Stages of AutoAttack with the same counts as the whole attack are left out.

    Args:
        reports: Reports on the same images.
        names: Column heads; default: the models' names.
        first_only: Show only the variants that the first report has.
        intervals: Also show 95% intervals (Wilson).

    Raises:
        ValueError: The reports are of different data or images.
    """
    if len({(report.data, report.indices, report.n) for report in reports}) != 1:
        raise ValueError('Cannot compare reports on different images.')
    heads = [name.replace('|', '\\|') for name in (reports[0].data, *(names or [report.model for report in reports]))]
    what = f'{heads[0]}, accuracy %' if heads[0] else 'accuracy %'
    rows = [
        f'| {what} | n | {" | ".join(heads[1:])} |',
        '|---' * (len(reports) + 2) + '|',
    ]
    known = [{(*score.key, score.n): score for score in report.scores} for report in reports]
    for attack, variant, n in dict.fromkeys(key for scores in known[: 1 if first_only else None] for key in scores):
        same = [scores.get((attack, variant, n)) for scores in known]
        whole = [scores.get((attack, variant._replace(stage=''), n)) for scores in known]
        if variant.stage and [_correct(score) for score in same] == [_correct(score) for score in whole]:
            continue
        name = _name(attack, variant)
        alike = _attacked_alike(reports, attack)
        leading = leaders(same) if alike else [False] * len(same)
        cells = [cell(score, leads, intervals) for score, leads in zip(same, leading, strict=True)]
        rows.append(f'| {name}{"" if alike else " (settings differ)"} | {n} | {" | ".join(cells)} |')
        distances = [score.median_distance if score else None for score in same]
        if any(distances):
            medians = ['' if distance is None else f'{distance:.3f}' for distance in distances]
            rows.append(f'| {name}: median distance | {n} | {" | ".join(medians)} |')
    return '\n'.join(rows)


def title(score: Score) -> str:
    """The name of a score in tables: 'PGD Linf 8/255'."""
    return _name(*score.key)


def _name(attack: str, variant: Variant) -> str:
    minimal = attack in TITLES and variant == Variant()  # without a radius: DDN's own
    return ' '.join(filter(None, [attack_title(attack), 'any distance' if minimal else describe(variant)]))


def attack_title(attack: str) -> str:
    """The attack and its norm: 'PGD Linf'."""
    return TITLES.get(attack, attack)


def describe(variant: Variant) -> str:
    """A variant in words: '8/255', '3 iterations', '8/255 after apgd-ce', 'blur'."""
    radius = '' if variant.radius is None else format_radius(variant.radius)
    plural = '' if variant.iteration == 1 else 's'
    iteration = f'{variant.iteration} iteration{plural}' if variant.iteration else ''
    stage = f'after {variant.stage}' if variant.stage else ''
    return ' '.join(filter(None, [radius, iteration, stage, variant.corruption]))


def _correct(score: Score | None) -> int | None:
    return score.correct if score else None


def _attacked_alike(reports: Sequence[Report], attack: str) -> bool:
    """Whether the settings are the same, apart from the number of images and the radii, which the table shows."""
    settings = [report.settings[attack] for report in reports if attack in report.settings]
    alike = [{name: value for name, value in each.items() if name not in ('n', 'eps')} for each in settings]
    return all(each == alike[0] for each in alike)


def leaders(scores: Sequence[Score | None]) -> list[bool]:
    """The leading scores under one attack: the highest, and those not significantly different from it.

    Masked scores never lead, and nothing leads if no score differs significantly from the highest. The test compares
    two proportions at 95%; it is conservative, because the models saw the same images.
    """
    honest = [score for score in scores if score and not score.masked]
    top = max(honest, key=lambda score: score.accuracy, default=None)
    if top is None or not any(_below(score, top) for score in honest):
        return [False] * len(scores)
    return [bool(score and not score.masked and not _below(score, top)) for score in scores]


def _below(score: Score, top: Score) -> bool:
    share = (score.correct + top.correct) / (score.n + top.n)
    error = math.sqrt(share * (1 - share) * (1 / score.n + 1 / top.n))
    return top.accuracy - score.accuracy > 1.96 * error


def cell(score: Score | None, leads: bool = False, interval: bool = False) -> str:
    """A score in percent, optionally with its 95% interval; bold if it leads."""
    if score is None:
        return ''
    text = f'{100 * score.accuracy:.2f}'
    text = f'**{text}**' if leads else text
    if interval:
        low, high = score.interval
        text += f' ({100 * low:.1f} to {100 * high:.1f})'
    return f'{text} (masked)' if score.masked else text
