"""Curves of robust accuracy over the radius, one per model."""

from collections.abc import Sequence
from pathlib import Path

from timm_batchout.drawing import literal, pyplot, save_figure
from timm_batchout.robustness.report import Report, Variant
from timm_batchout.robustness.tables import TITLES, attack_title
from timm_batchout.text import format_radius

__all__ = ['draw_curves']

COLUMNS = 3  # more in a row cannot be read on a page
ITERATED = ('deepfool', 'deepfool_unclipped')  # over iterations, not radii


def draw_curves(reports: Sequence[Report], path: str | Path) -> None:
    """A panel for AutoAttack, and for each attack with several radii (or iterations).

    Bands are 95% intervals; masked curves are dashed.

    Args:
        reports: Reports on the same data.
        path: The file; its suffix decides the format (.svg, .png, .pdf).

    Raises:
        ValueError: No attack has two radii or more.
    """
    plt = pyplot()
    from matplotlib.lines import Line2D

    # AutoAttack comes first, with a panel even for one radius, because it is the number that counts.
    order = sorted(TITLES, key=lambda attack: not attack.startswith('autoattack'))
    curves = {attack: _variants(reports, attack) for attack in order}
    curves = {attack: v for attack, v in curves.items() if len(v) > 1 or (v and attack.startswith('autoattack'))}
    if not curves:
        raise ValueError('A curve needs an attack at two radii or more.')
    columns = min(len(curves), COLUMNS)
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows + 0.5), squeeze=False, sharey=True, layout='constrained'
    )
    for ax in axes.flat[len(curves) :]:
        ax.remove()
    any_masked = False
    for ax, (attack, variants) in zip(axes.flat, curves.items(), strict=False):
        for report in reports:
            known = {score.key: score for score in report.scores}
            points = [(x, known[attack, v]) for v, x in variants.items() if (attack, v) in known]
            xs = [0.0, *(x for x, _ in points)]
            scores = [report.score('clean'), *(score for _, score in points)]
            masked = any(score.masked for score in scores)
            any_masked |= masked
            style = 'none' if len(points) == 1 else '--' if masked else '-'  # one radius is no curve
            (line,) = ax.plot(xs, [100 * s.accuracy for s in scores], linestyle=style, marker='.')
            low, high = ([100 * edge for edge in edges] for edges in zip(*(s.interval for s in scores), strict=True))
            if style != 'none':
                ax.fill_between(xs, low, high, color=line.get_color(), alpha=0.15)
            else:
                ax.vlines(xs, low, high, color=line.get_color())
        labels = [format_radius(x) for x in variants.values()]
        if attack not in ITERATED and any('/255' in label for label in labels):
            ax.set_xticks([0.0, *variants.values()], ['0', *labels], fontsize=8)
        unit = 'iterations' if attack in ITERATED else 'standard deviation' if attack == 'noise' else 'radius'
        ax.set(title=attack_title(attack), xlabel=unit + ', pixels in [0, 1]' * (attack not in ITERATED), ylim=(0, 100))
        ax.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel('robust accuracy, %')
    lines = [Line2D([], [], color=f'C{i}', marker='.', label=literal(r.model)) for i, r in enumerate(reports)]
    if any_masked:
        lines.append(Line2D([], [], color='gray', linestyle='--', label='dashed: gradients masked, overstated'))
    figure.legend(handles=lines, loc='outside upper center', ncols=columns)
    save_figure(figure, Path(path))


def _variants(reports: Sequence[Report], attack: str) -> dict[Variant, float]:
    """Each variant of an attack and its place on the axis."""
    found: dict[Variant, float] = {}
    for score in (score for report in reports for score in report.scores if score.attack == attack):
        x = score.radius if score.radius is not None else score.iteration
        if x is not None and not score.stage:
            found[score.variant] = x
    return dict(sorted(found.items(), key=lambda item: item[1]))
