"""The paper's figures, drawn from what was measured: the mean over seeds, and the range from lowest to highest."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from timm_batchout.robustness.report import Variant
from timm_batchout.robustness.tables import describe

__all__ = ['by_label', 'curve', 'described', 'draw']

Values = dict[str, list[float]]  # label of a net -> one value per seed
Panel = Callable[[Any, dict[str, Any]], None]


def described(score: dict[str, Any]) -> str:
    """What tells the scores of an attack apart, from a score's fields: '0.3', '2 iterations'."""
    return describe(Variant(**{name: score[name] for name in Variant._fields}))


def by_label(figure: dict[str, Any], attack: str, variant: str = '') -> Values:
    """Accuracy of every net in percent, for each seed; nets that were not attacked so are left out."""
    values: Values = {}
    for net in figure['nets']:
        for score in net['report']['scores']:
            if (score['attack'], described(score)) == (attack, variant):
                values.setdefault(net['label'], []).append(100 * score['accuracy'])
    return values


def curve(figure: dict[str, Any], attack: str) -> dict[str, Values]:
    """The variants of an attack (radii, iterations), in the order in which they were measured."""
    names = [described(score) for score in figure['nets'][0]['report']['scores'] if score['attack'] == attack]
    return {name: by_label(figure, attack, name) for name in names}


def draw(figure: dict[str, Any], path: Path) -> None:
    """Write one figure of the paper (the JSON of ``Paper.measure``) as .svg or .png."""
    import matplotlib

    matplotlib.use('Agg')
    matplotlib.rcParams['svg.hashsalt'] = 'timm-batchout'  # the same numbers draw the same file
    from matplotlib import pyplot as plt

    panels = PANELS[figure['figure']]
    canvas, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        panel(ax, figure)
        ax.grid(alpha=0.3)
        ax.legend(fontsize='small')
    seeds = sorted({net['seed'] for net in figure['nets']})
    canvas.suptitle(f'{figure["title"]}: {figure["nets"][0]["data"]}, seeds {", ".join(map(str, seeds))}')
    canvas.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, metadata={'Date': None} if path.suffix == '.svg' else None)
    plt.close(canvas)


def _band(ax: Any, xs: Sequence[Any], values: Sequence[Sequence[float]], label: str) -> None:
    (line,) = ax.plot(xs, [mean(v) for v in values], marker='.', label=label)
    ax.fill_between(xs, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2)


def _over_epsilon(ax: Any, figure: dict[str, Any]) -> None:
    clean, attacked = by_label(figure, 'clean'), curve(figure, 'fgsm')
    for label in clean:
        _band(ax, ['0', *attacked], [clean[label], *(values[label] for values in attacked.values())], label)
    ax.set(xlabel='FGSM, epsilon in [0, 1] pixels', ylabel='accuracy, %', ylim=(0, 100))


def _over_iterations(attack: str, name: str) -> Panel:
    def panel(ax: Any, figure: dict[str, Any]) -> None:
        attacked = curve(figure, attack)
        for label in by_label(figure, 'clean'):
            _band(ax, range(1, len(attacked) + 1), [values[label] for values in attacked.values()], label)
        ax.set(xlabel=f'{name}, iterations', ylabel='accuracy, %', ylim=(0, 100))

    return panel


def _loss(ax: Any, figure: dict[str, Any]) -> None:
    losses: dict[str, list[list[float]]] = {}
    for net in figure['nets']:
        losses.setdefault(net['label'], []).append(net['train_loss'])
    for label, curves in losses.items():
        per_epoch = list(zip(*curves, strict=True))
        _band(ax, range(1, len(per_epoch) + 1), per_epoch, label)
    ax.set(xlabel='epoch', ylabel='training loss', ylim=(0, None))


def _over_nets(ax: Any, figure: dict[str, Any]) -> None:
    """Clean and attacked accuracy, one net beside the other."""
    _band(ax, *_columns(by_label(figure, 'clean')), 'clean')
    for epsilon, values in curve(figure, 'fgsm').items():
        _band(ax, *_columns(values), f'FGSM {epsilon}')
    ax.set(xlabel='share k' if figure['figure'] == '5a' else 'BatchOut at', ylabel='accuracy, %', ylim=(0, 100))
    ax.tick_params(axis='x', labelrotation=0 if figure['figure'] == '5a' else 30)


def _columns(values: Values) -> tuple[list[str], list[list[float]]]:
    return list(values), list(values.values())


OF_THREE_NETS = (
    _over_epsilon,
    _over_iterations('deepfool', 'DeepFool, clipped to [0, 1]'),
    _over_iterations('deepfool_unclipped', 'DeepFool, not clipped'),
)
PANELS: dict[str, tuple[Panel, ...]] = {
    '2': OF_THREE_NETS,
    '2-sgd': OF_THREE_NETS,
    '3': OF_THREE_NETS,
    '4a': (_loss,),
    '4b': (_over_nets,),
    '5a': (_over_nets,),
    '5b': (_over_epsilon,),
}
