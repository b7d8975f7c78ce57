"""The command line: timm-batchout COMMAND. Every flag is a field of a config dataclass."""

import difflib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from timm_batchout.provenance import write_atomically
from timm_batchout.robustness import Report, comparison, evaluate
from timm_batchout.robustness.fgsm_scores import fgsm_scores
from timm_batchout.robustness.plots import draw_curves
from timm_batchout.training.config import DataConfig, TrainConfig
from timm_batchout.training.data import data_label, load_split
from timm_batchout.zoo import weights
from timm_batchout.zoo.timm_twins import check_model_name

__all__ = ['main']

READING = '## Reading'


@dataclass
class EvaluateConfig:
    """Accuracy of a model, clean and under attack, and whether its gradients can be trusted, as one JSON report.

    Args:
        model: A timm model name, with or without tag, or hf-hub:NAMESPACE/NAME.
        checkpoint: Score this .safetensors file instead of the pretrained weights.
        model_args: Keyword arguments for ``timm.create_model``.
        data: The test set.
        n: Its first images; 0: all of it.
        attacks: fgsm, pgd, pgd_l2, deepfool, ddn, autoattack, autoattack_l2, transfer, noise, corruptions.
        eps: L-infinity radii in [0, 1] pixels; fractions are welcome: '[1/255, 2/255]'.
        eps_l2: L2 radii in [0, 1] pixels.
        settings: Of the attacks, in place of their defaults: '{pgd: {steps: 100}}'.
        transfer_from: The model whose adversarial images 'transfer' takes.
        audit: Check for gradient masking.
        batch_size: Images at a time.
        seed: Of the attacks.
        device: Where to compute; empty: a GPU if there is one.
        output: Write the report to this JSON file.
        figure: Draw accuracy over the radius to this file (.svg, .png).
        resume: Go on where a run with the same settings was broken off.
    """

    model: str
    checkpoint: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    n: int = 0
    attacks: list[str] = field(default_factory=lambda: ['fgsm'])
    eps: list[float | str] = field(default_factory=lambda: ['8/255'])
    eps_l2: list[float | str] = field(default_factory=lambda: ['0.5'])
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    transfer_from: str = ''
    audit: bool = True
    batch_size: int = 100
    seed: int = 0
    device: str = ''
    output: str = ''
    figure: str = ''
    resume: bool = False


@dataclass
class CompareConfig:
    """Reports of several models as one table, and as curves.

    Args:
        reports: JSON files that ``evaluate`` wrote.
        figure: Draw accuracy over the radius to this file (.svg, .png).
    """

    reports: list[str]
    figure: str = ''


@dataclass
class ReproduceConfig:
    """The paper's figures: train what they need by the recipes, attack it, draw, and judge each claim.

    Args:
        figure: 2, 3, 4a, 4b, 5a, 5b or all.
        data: Where the data sets are: '{mnist: {root: PATH}, cifar10: {root: PATH}}', or other fields of the recipe's
            data, e.g. '{cifar10: {name: image_folder, root: PATH, label: NAME}}'.
        seeds: One run of every net for each.
        recipes: Folder of the recipes.
        runs: Folder of the training runs. Finished ones are used again, broken-off ones go on.
        output: Folder for figN.json, figN.svg and RESULTS.md; what stands there of other figures is kept.
        sweep_epochs: Epochs of the nets of figures 4b, 5a and 5b; 0: as in the recipe.
        quick: One epoch and 200 test images, to see whether everything works.
        n_deepfool: Test images for DeepFool.
    """

    figure: Literal['2', '3', '4a', '4b', '5a', '5b', 'all']
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    recipes: str = 'recipes/paper'
    runs: str = 'runs/paper'
    output: str = 'runs/paper'
    sweep_epochs: int = 0
    quick: bool = False
    n_deepfool: int = 1000


@dataclass
class VerifyConfig:
    """Score the bundled weights again and compare with the numbers in their JSON, image by image counted.

    Args:
        roots: Where the test sets are, by data name. Models whose data is not named are skipped, and said to be.
        models: Which bundled models ('arch.tag'); empty: all.
    """

    roots: dict[str, str]
    models: list[str] = field(default_factory=list)


@dataclass
class ListConfig:
    """The bundled weights and their accuracy, as Markdown tables made from their JSON."""


def run_train(config: TrainConfig) -> int:
    from timm_batchout.training.loop import Interrupted, train

    try:
        train(config)
    except Interrupted as stopped:  # asked for, and saved: no failure
        print(stopped)
    return 0


def run_evaluate(config: EvaluateConfig) -> int:
    from timm_batchout.robustness.attacks import check_available

    check_available([*config.attacks, *(['pgd'] if config.audit else [])])
    if config.figure and not config.output:
        raise ValueError('A figure is drawn from a report: name an --output as well.')
    model = _load(config.model, config.checkpoint, config.model_args)
    split = load_split(config.data, train=False)
    n = config.n or len(split)
    if not 0 < n <= len(split):
        raise ValueError(f'n must lie in [1, {len(split)}], the images of the test set, got {config.n}.')
    chunks = Path(f'{config.output}.chunks') if config.output else None
    state = _processes()
    if chunks and not config.resume and state.is_main_process:
        shutil.rmtree(chunks, ignore_errors=True)
    state.wait_for_everyone()
    device = config.device or str(state.device)
    report = evaluate(
        model.to(device),
        split.images[:n].to(device),
        split.labels[:n].to(device),
        config.attacks,
        config.eps,
        config.eps_l2,
        settings=config.settings,
        transfer_from=_load(config.transfer_from, '').to(device) if config.transfer_from else None,
        audit=config.audit,
        batch_size=config.batch_size,
        seed=config.seed,
        name=config.checkpoint or config.model,
        data=data_label(config.data),
        chunks=chunks,
        rank=state.process_index,
        world_size=state.num_processes,
        wait=state.wait_for_everyone,
        progress=sys.stderr.isatty(),
    )
    if state.is_main_process:
        print(report.table())
        if chunks:
            report.save(config.output)
            shutil.rmtree(chunks, ignore_errors=True)
        if config.figure:
            draw_curves([report], config.figure)
    return 0


def run_compare(config: CompareConfig) -> int:
    reports = [Report.load(path) for path in config.reports]
    print(comparison(reports))
    if config.figure:
        draw_curves(reports, config.figure)
    return 0


def run_reproduce(config: ReproduceConfig) -> int:
    from timm_batchout.paper.claims import results
    from timm_batchout.paper.draw import draw
    from timm_batchout.paper.figures import FIGURES, Paper

    paper = Paper(
        Path(config.recipes), Path(config.runs), config.data, config.seeds, config.sweep_epochs, config.quick,
        n_deepfool=config.n_deepfool,
    )  # fmt: skip
    output = Path(config.output)
    for name in FIGURES if config.figure == 'all' else [config.figure]:
        figure = paper.measure(name)
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / f'fig{name}.json', json.dumps(figure, indent=1) + '\n')
        draw(figure, output / f'fig{name}.svg')
    known = {name: output / f'fig{name}.json' for name in FIGURES}
    figures = {name: json.loads(path.read_text()) for name, path in known.items() if path.is_file()}
    reports = [Report.load(path) for path in sorted((output / 'reports').glob('*.json'))]
    path = output / 'RESULTS.md'
    reading = path.read_text().partition(READING)[2] if path.is_file() else ''  # what people wrote
    write_atomically(path, results(figures, reports) + (READING + reading if reading else ''))
    print(path.read_text())
    return 0


def run_verify(config: VerifyConfig) -> int:
    cards = weights.bundled_cards()
    unknown = set(config.models) - set(cards)
    if unknown:
        raise ValueError(f'No bundled weights for {", ".join(sorted(unknown))}. There are: {", ".join(cards)}.')
    splits: dict[str, Any] = {}
    differing = 0
    for name, card in cards.items():
        data = DataConfig(**card['recipe']['data'])
        if (config.models and name not in config.models) or card['data'] not in config.roots:
            print(f'{name}: skipped, name its data to check it: --roots {{"{card["data"]}": PATH}}')
            continue
        if card['data'] not in splits:
            splits[card['data']] = load_split(replace(data, root=config.roots[card['data']]), train=False)
        split = splits[card['data']]
        found = fgsm_scores(
            timm.create_model(name, pretrained=True), split.images, split.labels, list(card['test']['fgsm'])
        )
        same = found == card['test']
        differing += not same
        print(f'{name}: clean {found["clean"]["accuracy"]:.4f}, ' + ('as stated' if same else f'STATED {card["test"]}'))
    return 1 if differing else 0


def run_list(config: ListConfig) -> int:
    print(weights.table(weights.bundled_cards()))
    return 0


COMMANDS: dict[str, tuple[Callable[[Any], int], type]] = {
    'train': (run_train, TrainConfig),
    'evaluate': (run_evaluate, EvaluateConfig),
    'compare': (run_compare, CompareConfig),
    'reproduce': (run_reproduce, ReproduceConfig),
    'verify': (run_verify, VerifyConfig),
    'list': (run_list, ListConfig),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where ``verify`` found a difference, 2 after an error."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
    if name not in COMMANDS:
        print(__doc__)
        for command, (_, config_class) in COMMANDS.items():
            print(f'  {command:9} {(config_class.__doc__ or "").splitlines()[0]}')
        print('\ntimm-batchout COMMAND --help lists its flags.')
        if name in ('-h', '--help'):
            return 0
        return _fail(f'there is no command {name!r}.{_nearest(name, list(COMMANDS))}')
    run, config_class = COMMANDS[name]
    try:
        return run(parse(config_class, arguments, f'timm-batchout {name}'))
    except ImportError as error:
        return _fail(f'{error.name} is missing: pip install "timm-batchout[train]"')
    except (ValueError, FloatingPointError, RuntimeError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail('interrupted')


def parse(config_class: type, arguments: list[str], prog: str = '') -> Any:
    """``--config recipe.yaml`` files and flags, to a config object.

    Raises:
        ValueError: An unknown key (the nearest valid one is named) or a value of the wrong type.
    """
    if not arguments and not fields(config_class):
        return config_class()  # nothing to parse: `list` works without the extra packages
    arguments = _named(config_class, arguments)
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=prog, exit_on_error=False, description=(config_class.__doc__ or '').splitlines()[0])
    parser.add_argument('--config', action=ActionConfigFile, help='YAML file; later files and flags override it')
    parser.add_class_arguments(config_class)
    try:
        parsed = parser.parse_args(_with_bases(arguments))
    except Exception as error:  # --help's SystemExit is none; jsonargparse raises argparse's errors and some of its own
        unknown = re.search(r"[Oo]ption '([\w.]+)'|arguments: --([\w.]+)", str(error))
        keys = [action.dest for action in parser._actions]
        hint = _nearest(next(filter(None, unknown.groups())), keys) if unknown else ''
        raise ValueError(f'{error}{hint}') from error
    values = vars(getattr(parser, 'instantiate', parser.instantiate_classes)(parsed))
    return config_class(**{key: value for key, value in values.items() if key != 'config'})


def _named(config_class: type, arguments: list[str]) -> list[str]:
    """What stands before the first flag is the first field: MODEL, or several files."""
    flags = next((i for i, argument in enumerate(arguments) if argument.startswith('-')), len(arguments))
    if flags == 0 or not fields(config_class):
        return arguments
    first = fields(config_class)[0]
    several = str(first.type).startswith('list')
    if flags > 1 and not several:
        raise ValueError(f'Name one {first.name}, got {flags}: {" ".join(arguments[:flags])}.')
    value = json.dumps(arguments[:flags]) if several else arguments[0]
    return [f'--{first.name}={value}', *arguments[flags:]]


def _with_bases(arguments: list[str]) -> list[str]:
    """Recipes that name a ``base`` (a file beside them) are merged with it, key by key, into YAML text."""
    merged = list(arguments)
    for i, argument in enumerate(arguments):
        path = Path(argument.removeprefix('--config='))
        if (argument.startswith('--config=') or arguments[i - 1 : i] == ['--config']) and path.is_file():
            recipe = _read_recipe(path)
            if recipe:
                merged[i] = ('--config=' if argument.startswith('--config=') else '') + recipe
    return merged


def _read_recipe(path: Path) -> str:
    """The recipe, merged with its base; '' if it has none."""
    import yaml

    recipe = yaml.safe_load(path.read_text())
    if not isinstance(recipe, dict) or 'base' not in recipe:
        return ''
    base = path.parent / recipe.pop('base')
    if not base.is_file():
        raise ValueError(f'{str(path)!r} names the base {str(base)!r}, which is not there.')
    whole = yaml.safe_load(_read_recipe(base) or base.read_text())
    return yaml.safe_dump(_merge(whole, recipe), sort_keys=False)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merge(base[key], over[key]) for key in base if isinstance(base[key], dict) and key in over}
    return {**base, **over, **both}


def _nearest(word: str, words: list[str]) -> str:
    """' Did you mean ...?', compared by the last part of dotted keys: errors name nested keys with and without path."""
    by_last_part = {candidate.rpartition('.')[2]: candidate for candidate in words}
    close = difflib.get_close_matches(word.rpartition('.')[2], by_last_part, n=1)
    return f' Did you mean {by_last_part[close[0]]!r}?' if close else ''


def _fail(message: str) -> int:
    print(f'error: {message}', file=sys.stderr)
    return 2


def _load(name: str, checkpoint: str, model_args: dict[str, Any] | None = None) -> Any:
    """A model by name, with its pretrained weights or those of a safetensors file."""
    check_model_name(name)
    if checkpoint and not checkpoint.endswith('.safetensors'):
        raise ValueError(f'checkpoint must be a .safetensors file, got {checkpoint!r}: pickles can run code.')
    weights_of = {'checkpoint_path': checkpoint} if checkpoint else {'pretrained': True}
    return timm.create_model(name, **{**weights_of, **(model_args or {})})


def _processes() -> Any:
    """Accelerate's view of the processes that share the work."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


if __name__ == '__main__':
    sys.exit(main())
