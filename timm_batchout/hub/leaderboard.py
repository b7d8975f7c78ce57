"""The leaderboard of all published models, in Markdown and as an HTML page, from the staged results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_batchout.hub.card import templates, without_markup
from timm_batchout.provenance import write_atomically
from timm_batchout.robustness.report import Report, Score, Variant
from timm_batchout.robustness.tables import attack_title, cell, describe, leaders

__all__ = ['write_gallery']

Key = tuple[str, Variant]
CONTROLS = ('noise', 'corruptions', 'transfer')  # not attacks on the model itself: shown in the cards only
FIRST = ('clean', 'autoattack', 'autoattack_l2', 'pgd', 'pgd_l2', 'ddn')


def write_gallery(cards: Path) -> None:
    """Write README.md and index.html in the folder of all cards, from the results.json of each."""
    entries = [json.loads(path.read_text()) for path in sorted(cards.glob('*/results.json'))]
    tables = []
    for data in sorted({entry['report']['data'] for entry in entries}):
        same = [entry for entry in entries if entry['report']['data'] == data]
        tables.append((data, [(entry['repo'], Report.from_dict(entry['report'])) for entry in same]))
    write_atomically(cards / 'README.md', _markdown(tables))
    write_atomically(cards / 'index.html', _page(tables, cards))


Tables = list[tuple[str, list[tuple[str, Report]]]]


def _columns(reports: list[Report]) -> list[Key]:
    """Clean first, then the strongest attacks; without the stages and iterations in between, and without controls."""
    keys: dict[Key, None] = {}
    for score in (score for report in reports for score in report.scores):
        last = score.attack.startswith('deepfool') and score.iteration == 5
        if score.attack not in CONTROLS and not score.stage and (score.iteration is None or last):
            keys[score.key] = None
    return sorted(keys, key=lambda key: FIRST.index(key[0]) if key[0] in FIRST else len(FIRST))


def _head(reports: list[Report], key: Key) -> list[str]:
    """The lines of a column's head: attack, variant, number of images."""
    counts = sorted({scores[key].n for scores in map(_scores, reports) if key in scores})
    return [attack_title(key[0]), *filter(None, [describe(key[1])]), f'n = {" or ".join(map(str, counts))}']


def _scores(report: Report) -> dict[Key, Score]:
    return {score.key: score for score in report.scores}


def _markdown(tables: Tables) -> str:
    lines = [
        '# Leaderboard',
        '',
        'Written by `timm-batchout publish --all` from the results.json of each model. Accuracy in percent. '
        '"masked": the audit found masked gradients, so this number overstates robustness. '
        'Bold: the best of a column, and those not significantly different from it. Intervals and controls are in the '
        'cards. index.html is the same as a page, with curves.',
        '',
    ]
    for data, models in tables:
        keys = _columns([report for _, report in models])
        heads = ['<br>'.join(_head([report for _, report in models], key)) for key in keys]
        lines += [f'## {without_markup(data)}', '', f'| | {" | ".join(heads)} | gradient masking |']
        lines.append('|---' * (len(keys) + 2) + '|')
        leading = {key: _leading(models, key) for key in keys}
        for repo, report in models:
            scores = _scores(report)
            cells = [cell(scores.get(key), repo in leading[key]) for key in keys]
            name = repo.split('/')[1]
            lines.append(f'| [{name}]({name}/README.md) | {" | ".join(cells)} | {_masking(report)} |')
        lines.append('')
    return '\n'.join(lines)


def _leading(models: Sequence[tuple[str, Report]], key: Key) -> set[str]:
    """The repositories whose scores lead a column."""
    leads = leaders([_scores(report).get(key) for _, report in models])
    return {repo for (repo, _), lead in zip(models, leads, strict=True) if lead}


def _masking(report: Report) -> str:
    if not report.audit or not report.audit.pgd:  # nothing was measured
        return 'not checked'
    return 'likely' if report.audit.suspicions else 'no sign of it'


def _page(tables: Tables, cards: Path) -> str:
    """One HTML page: sortable tables, the strongest attacks first, the other columns hidden until requested."""
    shown = []
    for data, models in tables:
        reports = [report for _, report in models]
        keys = sorted(_columns(reports), key=lambda key: not _first(key))
        leading = {key: _leading(models, key) for key in keys}
        heads: list[dict[str, Any]] = [{'lines': ['model']}, {'lines': ['masking']}]
        shown.append(
            {
                'data': data,
                'heads': heads + [{'lines': _head(reports, key), 'more': not _first(key)} for key in keys],
                'models': [
                    {
                        'repo': repo,
                        'name': repo.split('/')[1],
                        'masking': _masking(report),
                        'verdict': report.audit.verdict if report.audit else 'not checked.',
                        'curves': (cards / repo.split('/')[1] / 'curves.svg').is_file(),
                        'cells': [
                            _cell(_scores(report).get(key), repo in leading[key], not _first(key)) for key in keys
                        ],
                    }
                    for repo, report in models
                ],
            }
        )
    return templates().get_template('leaderboard.html.j2').render(tables=shown)


def _first(key: Key) -> bool:
    """Whether a column is visible from the start."""
    return key[0] in ('clean', 'autoattack', 'autoattack_l2')


def _cell(score: Score | None, leads: bool, more: bool) -> dict[str, Any]:
    kinds = ['more'] if more else []
    if score is None:
        return {'kind': ' '.join(kinds), 'value': -1, 'text': ''}
    if score.masked:
        kinds.append('masked')
    elif leads:
        kinds.append('best')
    low, high = (f'{100 * edge:.1f}' for edge in score.interval)
    return {
        'kind': ' '.join(kinds),
        'value': score.accuracy,
        'title': f'95%: {low} to {high}, n = {score.n}',
        'text': f'{100 * score.accuracy:.2f}{" (masked)" * score.masked}',
    }
