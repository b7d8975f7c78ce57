"""The command line: timm-batchout train | evaluate | verify | list. Every flag is a field of a config dataclass."""

import difflib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import timm

from timm_batchout.provenance import environment, write_atomically
from timm_batchout.robustness.evaluate import evaluate, parse_epsilon
from timm_batchout.training.config import DataConfig, TrainConfig
from timm_batchout.training.data import data_label, load_split
from timm_batchout.zoo import weights
from timm_batchout.zoo.timm_twins import check_model_name

__all__ = ['main']


@dataclass
class EvaluateConfig:
    """Clean accuracy of a model on a test set, and robust accuracy under FGSM.

    Args:
        model: A timm model name, with or without tag.
        checkpoint: Score this .safetensors file instead of the pretrained weights.
        data: The test set.
        epsilons: FGSM radii in [0, 1] pixels; fractions are welcome: '[1/255, 2/255]'.
        batch_size: Images at a time.
        output: Write the numbers to this JSON file as well.
    """

    model: str
    checkpoint: str = ''
    data: DataConfig = field(default_factory=DataConfig)
    epsilons: list[float | str] = field(default_factory=list)
    batch_size: int = 500
    output: str = ''


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
    for epsilon in config.epsilons:
        parse_epsilon(epsilon)  # before any weights or images are read
    split = load_split(config.data, train=False)
    model = _load(config.model, config.checkpoint)
    report = {
        'model': config.model,
        'checkpoint': config.checkpoint or None,
        'data': data_label(config.data),
        'test': evaluate(model, split.images, split.labels, config.epsilons, config.batch_size),
        'environment': environment(),
    }
    print(json.dumps(report, indent=2))
    if config.output:
        write_atomically(Path(config.output), json.dumps(report, indent=2) + '\n')
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
        found = evaluate(
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


def _load(name: str, checkpoint: str) -> Any:
    """A model by name, with its pretrained weights or those of a safetensors file."""
    check_model_name(name)
    if not checkpoint:
        return timm.create_model(name, pretrained=True)
    if not checkpoint.endswith('.safetensors'):
        raise ValueError(f'checkpoint must be a .safetensors file, got {checkpoint!r}: pickles can run code.')
    return timm.create_model(name, checkpoint_path=checkpoint)


if __name__ == '__main__':
    sys.exit(main())
