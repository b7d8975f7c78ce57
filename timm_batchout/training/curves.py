"""Training curves of runs, and a table of them, from the ``metrics.jsonl`` of their folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_batchout.drawing import literal, pyplot, save_figure
from timm_batchout.training.config import METRICS

__all__ = ['draw_training', 'read_metrics', 'training_table']

Metrics = list[dict[str, Any]]  # a record for each epoch
PANELS = {  # title -> the fields to draw, solid and dashed
    'training loss (dashed: validation)': ('train_loss', 'val_loss'),
    'validation accuracy, %': ('val_accuracy', ''),
    'robust validation accuracy, %': ('val_robust_accuracy', ''),
}


def read_metrics(run: str | Path) -> Metrics:
    """The records of all finished epochs of a run.

    Raises:
        ValueError: The folder has no metrics.jsonl, or a damaged one.
    """
    path = Path(run) / METRICS
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError as error:
        raise ValueError(f'{str(run)!r} is not a run folder with a finished epoch: {METRICS} is missing.') from error
    except ValueError as error:
        raise ValueError(f'{str(path)!r} is damaged: {error}.') from error
    if not records or not all(isinstance(record, dict) and 'train_loss' in record for record in records):
        raise ValueError(f'{str(path)!r} does not contain the metrics of a run.')
    return records


def training_table(runs: Mapping[str, Metrics]) -> str:
    """A Markdown table, a row for each run: its last epoch, and the best one by robust or clean validation accuracy.

    Args:
        runs: Metrics by the name to display.
    """
    rows = [
        '| run | epochs | training loss | last: val accuracy % | robust % | best epoch | val accuracy % | robust % |'
    ]
    rows.append('|---' * 8 + '|')
    for name, metrics in runs.items():
        validated = [record for record in metrics if 'val_accuracy' in record] or [metrics[-1]]
        best = max(validated, key=_validation)
        cells = [_percent(record, field) for record in (validated[-1], best) for field in ('', 'robust_')]
        cells.insert(2, str(best['epoch']))
        rows.append(f'| {name} | {len(metrics)} | {metrics[-1]["train_loss"]:.3f} | {" | ".join(cells)} |')
    return '\n'.join(rows)


def _validation(record: dict[str, Any]) -> float:
    """The accuracy that decides which epoch is best."""
    return record.get('val_robust_accuracy') or record.get('val_accuracy') or 0.0


def _percent(record: dict[str, Any], kind: str) -> str:
    value = record.get(f'val_{kind}accuracy')
    return '' if value is None else f'{100 * value:.2f}'


def draw_training(runs: Mapping[str, Metrics], path: str | Path) -> None:
    """Loss and validation accuracy over epochs; robust accuracy as well if a run has it.

    Args:
        runs: Metrics by the name to display.
        path: The file; its suffix decides the format (.svg, .png, .pdf).
    """
    records = [record for metrics in runs.values() for record in metrics]
    panels = {title: fields for title, fields in PANELS.items() if any(fields[0] in record for record in records)}
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.7), squeeze=False, layout='constrained'
    )
    for ax, (title, fields) in zip(axes[0], panels.items(), strict=True):
        scale = 100 if '%' in title else 1
        for number, (name, metrics) in enumerate(runs.items()):
            for field, style in zip(fields, ('-', '--'), strict=True):
                points = [(record['epoch'], scale * record[field]) for record in metrics if field in record]
                if points:
                    label = literal(name) if style == '-' else None
                    ax.plot(*zip(*points, strict=True), style, color=f'C{number}', marker='.', label=label)
        ax.set(title=title, xlabel='epoch')
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc='outside lower center', ncols=min(3, len(runs)))
    save_figure(figure, Path(path))
