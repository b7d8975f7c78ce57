"""All published models at one glance: a leaderboard in Markdown, and a page for the eye, from the staged results."""

import html
import json
from pathlib import Path
from typing import Any

from timm_batchout.provenance import write_atomically
from timm_batchout.robustness.report import Report, Score, Variant
from timm_batchout.robustness.tables import attack_title, cell, describe

__all__ = ['write_gallery']

Key = tuple[str, Variant]
CONTROLS = ('noise', 'corruptions', 'transfer')  # no attacks on the model itself: they stand in the cards
FIRST = ('clean', 'autoattack', 'autoattack_l2', 'pgd', 'pgd_l2', 'ddn')


def write_gallery(cards: Path) -> None:
    """Write README.md and index.html of the folder of all cards, from the results.json in it."""
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
    """The lines of a column's head: attack, variant, images."""
    counts = sorted({scores[key].n for scores in map(_scores, reports) if key in scores})
    return [attack_title(key[0]), *filter(None, [describe(key[1])]), f'n = {" or ".join(map(str, counts))}']


def _scores(report: Report) -> dict[Key, Score]:
    return {score.key: score for score in report.scores}


def _markdown(tables: Tables) -> str:
    lines = [
        '# The zoo',
        '',
        'Written by `timm-batchout publish --all` from the results.json of each model. Accuracy in percent; '
        '"masked": the audit found that gradients mislead this attack, so that the number overstates robustness; '
        'bold: the best of a column. Intervals and controls are in the cards. As a page, with curves: index.html.',
        '',
    ]
    for data, models in tables:
        keys = _columns([report for _, report in models])
        heads = ['<br>'.join(_head([report for _, report in models], key)) for key in keys]
        lines += [f'## {data}', '', f'| | {" | ".join(heads)} | gradient masking |']
        lines.append('|---' * (len(keys) + 2) + '|')
        best = {key: _best([report for _, report in models], key) for key in keys}
        for repo, report in models:
            scores = _scores(report)
            cells = [cell(scores.get(key), best[key]) for key in keys]
            name = repo.split('/')[1]
            lines.append(f'| [{name}]({name}/README.md) | {" | ".join(cells)} | {_masking(report)} |')
        lines.append('')
    return '\n'.join(lines)


def _best(reports: list[Report], key: Key) -> float:
    scores = [_scores(report).get(key) for report in reports]
    return max((score.accuracy for score in scores if score and not score.masked), default=0)


def _masking(report: Report) -> str:
    if not report.audit or not report.audit.pgd:  # nothing was measured
        return 'not checked'
    return 'likely' if report.audit.suspicions else 'no sign of it'


def _page(tables: Tables, cards: Path) -> str:
    """One file without any other: tables that sort on a click, curves as SVG."""
    sections = []
    for data, models in tables:
        keys = _columns([report for _, report in models])
        heads = [['model'], *(_head([report for _, report in models], key) for key in keys), ['masking']]
        head = ''.join(f'<th>{"<br>".join(map(html.escape, lines))}</th>' for lines in heads)
        rows = ''.join(_row(repo, report, keys) for repo, report in models)
        sections.append(
            f'<h2>{html.escape(data)}</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
            f'<tbody>{rows}</tbody></table></div>\n'
        )
        for repo, report in models:
            name = repo.split('/')[1]
            curves = cards / name / 'curves.svg'
            verdict = report.audit.verdict if report.audit else 'not checked.'
            sections.append(
                f'<section id="{html.escape(name)}"><h3>{html.escape(repo)}</h3>\n'
                f'<p>Gradient masking: {html.escape(verdict)}</p>\n'
                f"<pre>timm.create_model('hf-hub:{html.escape(repo)}', pretrained=True)</pre>\n"
                f'{_inline(curves, name)}</section>\n'
            )
    return PAGE.replace('{sections}', ''.join(sections))


def _row(repo: str, report: Report, keys: list[Key]) -> str:
    scores = _scores(report)
    name = html.escape(repo.split('/')[1])
    cells = [f'<td><a href="#{name}">{name}</a></td>']
    for key in keys:
        score: Any = scores.get(key)
        if score is None:
            cells.append('<td data-value="-1"></td>')
            continue
        low, high = (f'{100 * edge:.1f}' for edge in score.interval)
        kind = ' class="masked"' if score.masked else ''
        cells.append(
            f'<td{kind} data-value="{score.accuracy}" title="95%: {low} to {high}, n = {score.n}">'
            f'{100 * score.accuracy:.2f}{" (masked)" if score.masked else ""}</td>'
        )
    return f'<tr>{"".join(cells)}<td>{_masking(report)}</td></tr>\n'


def _inline(path: Path, name: str) -> str:
    """The figure without its XML head; matplotlib's ids would clash with those of the other figures."""
    if not path.is_file():
        return ''
    svg = path.read_text()
    svg = svg[svg.index('<svg') :]
    for marker in ('id="', 'href="#', 'url(#'):
        svg = svg.replace(marker, f'{marker}{name}-')
    return svg


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>timm-batchout: the zoo</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th, td { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th { cursor: pointer; font-weight: 600; }
th[aria-sort]::after { content: " \\25be"; }
th[aria-sort=ascending]::after { content: " \\25b4"; }
.masked { color: #999; font-style: italic; }
section svg { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .5rem; overflow-x: auto; }
</style>
</head>
<body>
<h1>timm-batchout: the zoo</h1>
<p>Accuracy in percent. Click a column to sort by it; hold the pointer over a number for its 95% interval.
Grey: the audit found that gradients mislead this attack, so the number overstates robustness.</p>
{sections}
<script>
for (const head of document.querySelectorAll('th')) head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], column = head.cellIndex;
  const up = head.getAttribute('aria-sort') === 'descending';
  for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const value = row => { const cell = row.cells[column]; return cell.dataset.value ?? cell.textContent; };
  const rows = [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    return isNaN(x) || isNaN(y) ? String(y).localeCompare(String(x)) : y - x;
  });
  body.append(...(up ? rows.reverse() : rows));
});
</script>
</body>
</html>
"""
