"""The paper's figures, drawn from what was measured: the mean over seeds, and the range from lowest to highest."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from timm_batchout.drawing import pyplot, save_figure
from timm_batchout.robustness.report import Variant
from timm_batchout.robustness.tables import describe
from timm_batchout.text import parse_radius
from timm_batchout.zoo.pretrained import bundled_cards

__all__ = ['by_label', 'curve', 'described', 'draw']

Values = dict[str, list[float]]  # label of a net -> one value per seed
HERE = Path(__file__).parent
Panel = Callable[[Any, dict[str, Any]], None]
COLORS = {
    'baseline': 'tab:gray',
    'BatchOut': 'tab:blue',
    'FGSM adversarial training': 'tab:orange',
    'Gaussian noise': 'tab:green',
}


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
    """Write one figure of the paper (the JSON of ``Paper.measure``) as .svg or .png.

    Nets with masked gradients are dashed: their accuracy is overstated.
    """
    panels = PANELS[figure['figure']]
    figure = {**figure, 'masked': masked(figure)}
    canvas, axes = pyplot().subplots(
        1, len(panels), figsize=(max(5.4, 4.2 * len(panels)), 4.0), squeeze=False, layout='constrained'
    )
    for ax, panel in zip(axes[0], panels, strict=True):
        panel(ax, figure)
        ax.grid(alpha=0.3)
    lines = {line.get_label(): line for ax in axes[0] for line in ax.get_lines()}
    canvas.legend(handles=lines.values(), loc='outside lower center', ncols=3, fontsize='small')
    data, seeds = figure['nets'][0]['data'], sorted({net['seed'] for net in figure['nets']})
    name = data.partition(' ')[0]
    title = figure['title'].replace(name, data) if name in figure['title'] else f'{figure["title"]}, {data}'
    canvas.suptitle(f'{title}, seed{"s" * (len(seeds) > 1)} {", ".join(map(str, seeds))}', fontsize='medium', wrap=True)
    save_figure(canvas, path)


def masked(figure: dict[str, Any]) -> set[str]:
    """Labels of the nets that are trained like others whose report marks masked scores."""
    if figure['figure'] == '2-adamw':
        reports = [json.loads((HERE / 'variants' / 'mnist_fgsm_at-adamw-1.json').read_text())]
    else:
        tag = f'fgsm_at_{figure["nets"][0]["data"].partition(" ")[0].lower().replace("-", "")}'
        reports = [card['report'] for name, card in bundled_cards().items() if name.endswith(tag)]
    found = any(score['masked'] for report in reports for score in report['scores'])
    return {'FGSM adversarial training'} if found else set()


def _band(ax: Any, xs: Sequence[float], values: Sequence[Sequence[float]], label: str, dashed: bool = False) -> None:
    """The mean over seeds, and the range from lowest to highest."""
    style = {'color': COLORS.get(label), 'linestyle': '--' if dashed else '-'}
    (line,) = ax.plot(
        xs, [mean(v) for v in values], marker='.', label=f'{label} (masked)' if dashed else label, **style
    )
    ax.fill_between(xs, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2)


def _over_epsilon(ax: Any, figure: dict[str, Any]) -> None:
    clean, attacked = by_label(figure, 'clean'), curve(figure, 'fgsm')
    xs = [0.0, *(parse_radius(radius) for radius in attacked)]
    for label in clean:
        ys = [clean[label], *(values[label] for values in attacked.values())]
        _band(ax, xs, ys, label, label in figure['masked'])
    ax.set_xticks(xs, ['0', *attacked], fontsize='small')
    ax.set(xlabel='FGSM, epsilon in [0, 1] pixels', ylabel='accuracy, %', ylim=(0, 100))


def _over_iterations(attack: str, name: str) -> Panel:
    def panel(ax: Any, figure: dict[str, Any]) -> None:
        attacked = curve(figure, attack)
        for label in by_label(figure, 'clean'):
            ys = [values[label] for values in attacked.values()]
            _band(ax, range(1, len(attacked) + 1), ys, label, label in figure['masked'])
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


def _of_each_net(attack: str) -> Panel:
    """Every seed of one net beside those of the others, on an axis that fits them."""

    def panel(ax: Any, figure: dict[str, Any]) -> None:
        shares = figure['figure'] == '5a'
        variant, values = next(iter(curve(figure, attack).items()))
        xs = [float(label) for label in values] if shares else list(range(len(values)))
        means = [mean(v) for v in values.values()]
        ax.plot(xs, means, '-' if shares else '_', color=COLORS['BatchOut'], markersize=14, label='mean of seeds')
        dots = [(x, y) for x, ys in zip(xs, values.values(), strict=True) for y in ys]
        ax.plot(*zip(*dots, strict=True), 'o', color=COLORS['BatchOut'], alpha=0.4, markersize=4, label='one seed')
        ax.set_xticks(xs, list(values), rotation=0 if shares else 30, fontsize='small')
        name = 'clean' if attack == 'clean' else f'FGSM {variant}'
        ax.set(xlabel='share k' if shares else 'BatchOut at', ylabel=f'accuracy, {name}, %')

    return panel


OF_THREE_NETS = (
    _over_epsilon,
    _over_iterations('deepfool', 'DeepFool, clipped to [0, 1]'),
    _over_iterations('deepfool_unclipped', 'DeepFool, not clipped'),
)
OF_EACH_NET = (_of_each_net('clean'), _of_each_net('fgsm'))
PANELS: dict[str, tuple[Panel, ...]] = {
    '2': OF_THREE_NETS,
    '2-adamw': OF_THREE_NETS,
    '3': OF_THREE_NETS,
    '4a': (_loss,),
    '4b': OF_EACH_NET,
    '5a': OF_EACH_NET,
    '5b': (_over_epsilon,),
}
