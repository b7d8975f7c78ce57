"""The command line: timm-batchout COMMAND. Every flag is a field of a config dataclass."""

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

import timm_batchout
from timm_batchout.cli.commands import COMMANDS
from timm_batchout.training.config import read_recipe

__all__ = ['main']


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 if ``evaluate --expect`` found a difference, 2 after an error."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
    if name == '--version':
        print(f'timm-batchout {timm_batchout.__version__}')
        return 0
    if name not in COMMANDS:
        print(__doc__)
        for command, (_, config_class) in COMMANDS.items():
            print(f'  {command:9} {(config_class.__doc__ or "").splitlines()[0]}')
        print('\ntimm-batchout COMMAND --help lists its flags.')
        if name in ('-h', '--help', 'help'):
            return 0
        return _fail(f'there is no command {name!r}.{_nearest(name, list(COMMANDS))}')
    run, config_class = COMMANDS[name]
    try:
        status = run(parse(config_class, arguments, f'timm-batchout {name}'))
        sys.stdout.flush()
        return status
    except ImportError as error:
        return _fail(f'{error.name} is missing. In a checkout: pip install -e ".[train,attacks]"')
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FileNotFoundError as error:
        return _fail(f'there is no file {str(error.filename)!r}.' if error.filename else str(error))
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
    arguments = _spelled_out(config_class, _named(config_class, arguments))
    from jsonargparse import ActionConfigFile, ArgumentParser  # not at the top: `list` works without the extra packages

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
    for field in fields(config_class):
        if is_dataclass(field.type) and parsed[field.name] is None:
            raise ValueError(f'{field.name} is empty (null): give it its keys, or leave it out.')
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


def _spelled_out(config_class: type, arguments: list[str]) -> list[str]:
    """``--dry-run`` is ``--dry_run``, a switch without a value is on, and ``--eps 1/255 2/255`` is a list."""
    kinds = dict(_kinds(config_class))
    spelled: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith('--'):
            spelled.append(argument)
            continue
        flag, equals, value = argument.partition('=')
        flag = flag[:2] + flag[2:].replace('-', '_')
        kind = kinds.get(flag[2:])
        words = [value] if equals else []
        while kind and not equals and rest and not rest[0].startswith('-'):
            words.append(rest.pop(0))
        if kind == 'switch':
            spelled += [f'{flag}={" ".join(words) or "true"}']
        elif kind == 'list' and words:
            whole = len(words) == 1 and words[0].startswith('[')
            spelled += [f'{flag}={words[0] if whole else "[" + ", ".join(words) + "]"}']
        else:
            spelled += [flag + equals + value]
    return spelled


def _kinds(config_class: Any, prefix: str = '') -> Iterator[tuple[str, str]]:
    """The dotted names of all fields that are 'switch' or 'list'."""
    for field in fields(config_class):
        if isinstance(field.default, bool):
            yield prefix + field.name, 'switch'
        elif str(field.type).startswith('list'):
            yield prefix + field.name, 'list'
        elif is_dataclass(field.type):
            yield from _kinds(field.type, f'{prefix}{field.name}.')


def _with_bases(arguments: list[str]) -> list[str]:
    """Recipes that name a ``base`` (a file beside them) become the whole recipe, as YAML text."""
    merged = list(arguments)
    for i, argument in enumerate(arguments):
        flag = '--config=' if argument.startswith('--config=') else ''
        path = Path(argument.removeprefix(flag))
        if (flag or arguments[i - 1 : i] == ['--config']) and path.is_file():
            merged[i] = flag + yaml.safe_dump(read_recipe(path), sort_keys=False)
    return merged


def _nearest(word: str, words: list[str]) -> str:
    """' Did you mean ...?', compared by the last part of dotted keys: errors name nested keys with and without path."""
    by_last_part = {candidate.rpartition('.')[2]: candidate for candidate in words}
    close = difflib.get_close_matches(word.rpartition('.')[2], by_last_part, n=1)
    return f' Did you mean {by_last_part[close[0]]!r}?' if close else ''


def _fail(message: str) -> int:
    print(f'error: {message}', file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main())
