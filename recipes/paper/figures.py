"""The paper's figures: which nets each one needs, trained by the recipes, attacked, and written to one JSON."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import timm
from accelerate import Accelerator

from timm_batchout.data.config import DataConfig
from timm_batchout.data.images import Split
from timm_batchout.data.memory import data_label, load_split
from timm_batchout.provenance import environment
from timm_batchout.recipe import configure, read_recipe
from timm_batchout.robustness.attacks import as_attacks
from timm_batchout.robustness.chunks import Chunks
from timm_batchout.robustness.harness import evaluate
from timm_batchout.robustness.inputs import weights_sha256
from timm_batchout.robustness.report import Report
from timm_batchout.text import did_you_mean
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.launch import recipe_changes, train

__all__ = ['FIGURES', 'Figure', 'Net', 'Paper']


@dataclass(frozen=True)
class Net:
    """A net of a figure: a recipe, and what is changed in its ``model_args`` and its ``optimizer``."""

    label: str
    recipe: str
    tag: str = ''
    model_args: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """What a figure of the paper shows.

    Attributes:
        title: What it is about, and where the paper has it.
        nets: In the order in which they are drawn.
        eps: Radii of FGSM, in [0, 1] pixels.
        deepfool: DeepFool after 1 to 5 iterations, too, its iterates clipped to [0, 1] or not (the paper does not say).
        sweep: It compares settings of the method; these nets may be trained for fewer epochs.
    """

    title: str
    nets: tuple[Net, ...]
    eps: tuple[str, ...]
    deepfool: bool = False
    sweep: bool = False


def _only_at(*places: str) -> Net:
    """BatchOut of the MNIST net at some of its layers."""
    sites = {'C1': ('stages.0.act1', 0.05), 'C2': ('stages.1.act1', 0.1), 'F1': ('pre_logits.act1', 0.1)}
    eta = {name: value if place in places else 0 for place, (name, value) in sites.items()}
    return Net('+'.join(places), 'mnist_batchout', '+'.join(places), {'eta': eta})


def _with_share(k: str) -> Net:
    return Net(k, 'mnist_batchout', f'k{k}', {'k': float(k)})


def _three(data: str) -> tuple[Net, ...]:
    return (
        Net('baseline', f'{data}_baseline'),
        Net('FGSM adversarial training', f'{data}_fgsm_at'),
        Net('BatchOut', f'{data}_batchout'),
    )


ADAMW = {'name': 'adamw', 'lr': 1e-3, 'weight_decay': 0.05}
MNIST_EPS = ('0.05', '0.1', '0.2', '0.3', '0.4')
BASELINE, BATCHOUT = Net('baseline', 'mnist_baseline'), Net('BatchOut', 'mnist_batchout')
FIGURES = {
    '2': Figure('MNIST (Fig. 2)', _three('mnist'), MNIST_EPS, deepfool=True),
    '2-adamw': Figure(  # The paper does not name its optimizer.
        'MNIST, trained with AdamW (Fig. 2)',
        tuple(replace(net, tag='adamw', optimizer=ADAMW) for net in _three('mnist')),
        MNIST_EPS,
        deepfool=True,
    ),
    '3': Figure('CIFAR-10 (Fig. 3)', _three('cifar10'), ('1/255', '2/255', '4/255', '8/255'), deepfool=True),
    '4a': Figure('Convergence (Fig. 4a)', (_three('cifar10')[0], _three('cifar10')[2]), ()),
    '4b': Figure(
        'BatchOut at some layers (Fig. 4b)',
        (
            replace(BASELINE, label='none'),
            *(_only_at(place) for place in ('C1', 'C2', 'F1')),
            *(_only_at(*places) for places in (('C1', 'C2'), ('C1', 'F1'), ('C2', 'F1'))),
            replace(BATCHOUT, label='C1+C2+F1'),
        ),
        ('0.3',),
        sweep=True,
    ),
    '5a': Figure(
        'The share k of the mini-batch (Fig. 5a)',
        (
            replace(BASELINE, label='0'),
            _with_share('0.3'),
            replace(BATCHOUT, label='0.5'),
            _with_share('0.7'),
            _with_share('1.0'),
        ),
        ('0.4',),
        sweep=True,
    ),
    '5b': Figure(
        'Gaussian noise of the same magnitude (Fig. 5b)',
        (BASELINE, Net('Gaussian noise', 'mnist_gaussian'), BATCHOUT),
        MNIST_EPS,
        sweep=True,
    ),
}


@dataclass
class Paper:
    """Where the recipes, the data and the finished runs are, and how far to go.

    Attributes:
        recipes: Folder of the recipes.
        runs: Folder of the runs; finished ones are used again.
        data: Per data set ('mnist', 'cifar10'), fields of ``DataConfig`` in place of the recipe's.
        seeds: One run of every net for each.
        sweep_epochs: Epochs of the nets of figures 4b, 5a and 5b; 0: as in the recipe.
        quick: One epoch and 200 images: to see whether everything works.
        n: FGSM's images of the test set; 0: all.
        n_deepfool: DeepFool's.
    """

    recipes: Path
    runs: Path
    data: dict[str, dict[str, Any]]
    seeds: Sequence[int]
    sweep_epochs: int = 0
    quick: bool = False
    n: int = 0
    n_deepfool: int = 1000

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds is empty: name one at least, --seeds '[0]'.")
        data_sets = {net.recipe.partition('_')[0] for figure in FIGURES.values() for net in figure.nets}
        for name, changed in self.data.items():
            _check_name('data', name, data_sets)
            for key in changed:
                _check_name(f'data.{name}', key, {field.name for field in fields(DataConfig)})

    def measure(self, name: str) -> dict[str, Any]:
        """Train and attack all nets of a figure: what its JSON holds."""
        figure = FIGURES[name]
        nets = [self._measure(figure, net, seed) for net in figure.nets for seed in self.seeds]
        return {'figure': name, 'title': figure.title, 'nets': nets, 'environment': environment(Accelerator().device)}

    def _measure(self, figure: Figure, net: Net, seed: int) -> dict[str, Any]:
        config = self.config(figure, net, seed)
        result = self._trained(config)
        recipe = {**result['recipe'], 'data': {**result['recipe']['data'], 'root': ''}}
        metrics = [json.loads(line) for line in (Path(config.output) / 'metrics.jsonl').read_text().splitlines()]
        return {
            'label': net.label,
            'data': data_label(config.data),
            'seed': seed,
            'train_loss': [line['train_loss'] for line in metrics],
            'val_accuracy': [line.get('val_accuracy') for line in metrics],
            'report': self._report(figure, config).to_dict(),
            'recipe': recipe,
            'training_environment': result['environment'],
        }

    def config(self, figure: Figure, net: Net, seed: int) -> TrainConfig:
        """The recipe of a net, as it is run.

        Raises:
            ValueError: The recipe does not exist.
        """
        path = self.recipes / f'{net.recipe}.yaml'
        if not path.is_file():
            raise ValueError(f'{str(path)!r} does not exist. Name the folder of the recipes: --recipes recipes/paper.')
        recipe = read_recipe(path)
        recipe = {
            **recipe,
            'model_args': {**recipe.get('model_args', {}), **net.model_args},
            'optimizer': {**recipe['optimizer'], **net.optimizer},
            'data': {**recipe['data'], **self.data.get(net.recipe.partition('_')[0], {})},
            'seed': seed,
            'resume': 'auto',
        }
        epochs = ''
        if self.quick or (figure.sweep and self.sweep_epochs):
            recipe['epochs'] = 1 if self.quick else self.sweep_epochs
            epochs = f'{recipe["epochs"]}epochs'
        if self.quick:
            recipe['schedule'] = {'warmup_epochs': 0.5}
        recipe['output'] = str(self.runs / '-'.join(filter(None, [net.recipe, net.tag, epochs, str(seed)])))
        return configure(TrainConfig, recipe)

    def _trained(self, config: TrainConfig) -> dict[str, Any]:
        """The result of a run, which is started, resumed, or reused."""
        path = Path(config.output) / 'result.json'
        if path.is_file():
            result = json.loads(path.read_text())
            # The precision is the machine's choice: a GPU trains in bfloat16 what an old CPU trains in float32.
            changes = recipe_changes(result['recipe'], replace(config, precision=result['recipe']['precision']))
            if changes:
                raise ValueError(
                    f'{config.output} already contains a finished run with a different recipe; move or delete it.\n'
                    + '\n'.join(changes)
                )
            return result
        return train(config)

    def _report(self, figure: Figure, config: TrainConfig) -> Report:
        """FGSM and DeepFool on a trained net; the report is kept beside the net and reused for the same weights."""
        split = self._test(config.data)
        n = min(self.n or len(split), 200 if self.quick else len(split))
        n_deepfool = min(self.n_deepfool, n)
        settings = {name: {'n': n_deepfool} for name in ('deepfool', 'deepfool_unclipped') if figure.deepfool}
        attacks = [*(['fgsm'] if figure.eps else []), *settings]
        model = timm.create_model(
            config.model, checkpoint_path=f'{config.output}/model.safetensors', **config.model_args
        )
        wanted = [*figure.eps, *([n_deepfool] if figure.deepfool else []), n]
        data = data_label(config.data)
        path = Path(config.output) / f'report-{"-".join(str(x).replace("/", "of") for x in wanted)}.json'
        chunks = Chunks(path.with_suffix('.chunks'))
        report = Report.load(path) if path.is_file() else None
        asked = (weights_sha256(model), {name: a.settings() for name, a in as_attacks(attacks, settings).items()}, data)
        if report is None or (report.weights_sha256, report.settings, report.data) != asked:
            report = evaluate(
                model.to(Accelerator().device), split.images, split.labels, attacks, figure.eps,
                settings=settings, n=n, name=config.model, data=data, chunks=chunks, audit=False,
            )  # fmt: skip
            report.save(path)
        chunks.discard()
        return report

    def _test(self, data: DataConfig) -> Split:
        split = load_split(data, train=False)
        assert isinstance(split, Split), 'the paper has no data that streams'
        return split


def _check_name(where: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f'{where} has no {name!r}. Available: {", ".join(sorted(known))}.{did_you_mean(name, known)}')
