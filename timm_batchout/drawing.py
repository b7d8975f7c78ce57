"""Figures that are drawn to files only, and reproducibly: the same numbers give the same file."""

import io
from pathlib import Path
from typing import Any

from timm_batchout.provenance import write_atomically

__all__ = ['literal', 'pyplot', 'save_figure']


def pyplot() -> Any:
    """matplotlib's pyplot, set up to draw to files only."""
    import matplotlib

    matplotlib.use('Agg')
    matplotlib.rcParams['svg.hashsalt'] = 'timm-batchout'
    from matplotlib import pyplot as plt

    return plt


def literal(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace('$', r'\$')


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of the path's suffix, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    kind = path.suffix.lstrip('.') or 'png'
    figure.savefig(drawn, format=kind, metadata={'Date': None} if kind == 'svg' else None)
    write_atomically(path, drawn.getvalue())  # a link is replaced, not written through
    pyplot().close(figure)
