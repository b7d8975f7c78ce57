"""Recipes and flags to config objects: YAML, a mapping or command line words, checked against a dataclass.

Imports neither torch nor timm, so that the command line can answer at once.
"""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import yaml

from timm_batchout.text import did_you_mean

__all__ = ['configure', 'help_text', 'parse', 'read_recipe']

Config = TypeVar('Config')
MOST_ALIASES = 100  # in a YAML file; each may stand for everything before it
DEEPEST = 50  # nesting of a YAML file
LONGEST_CHAIN = 20  # recipes, each the base of the next


def parse(config_class: type[Config], words: Sequence[str]) -> Config:
    """``--config recipe.yaml`` files and flags to a config object; later ones override earlier ones.

    Args:
        config_class: A dataclass, whose fields may be dataclasses. Words before the first flag are its first field.
        words: The words of the command line.

    Raises:
        ValueError: An unknown key (the message suggests a valid one), a value of the wrong type, a missing recipe.
    """
    if not words and all(_has_default(field) for field in fields(config_class)):  # type: ignore[arg-type]
        return config_class()  # nothing to parse: `list` works without the extra packages
    words = _with_recipes(config_class, _spelled_out(config_class, _named(config_class, list(words))))
    return _checked(config_class, lambda parser: parser.parse_args(words))


def configure(config_class: type[Config], recipe: str | Path | Mapping[str, Any] | None, **overrides: Any) -> Config:
    """A recipe and overrides to a config object.

    Args:
        config_class: See ``parse``.
        recipe: A YAML file, a mapping, or None.
        **overrides: Fields. A mapping for a nested config changes the keys it names and keeps the rest.

    Raises:
        ValueError: See ``parse``.
    """
    values = read_recipe(Path(recipe)) if isinstance(recipe, (str, Path)) else dict(recipe or {})
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    return _checked(config_class, lambda parser: parser.parse_object(_numbers(config_class, _merge(values, plain))))


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _checked(config_class: type[Config], read: Any) -> Config:
    from jsonargparse import ActionConfigFile, ArgumentParser  # here, because `list` works without the extra packages

    parser = ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    parser.add_argument('--config', action=ActionConfigFile)
    parser.add_class_arguments(config_class)
    try:
        parsed = read(parser)
    except Exception as error:  # jsonargparse raises argparse's errors and some of its own
        unknown = re.search(r"[Oo]ption '([\w.]+)'|arguments: --([\w.]+)|[Kk]ey '([\w.]+)'", str(error))
        keys = [action.dest for action in parser._actions]
        hint = did_you_mean(next(filter(None, unknown.groups())), keys) if unknown else ''
        raise ValueError(f'{error}{hint}') from error
    for field in fields(config_class):  # type: ignore[arg-type]
        if is_dataclass(field.type) and parsed[field.name] is None:
            raise ValueError(f'{field.name} is empty (null). Set its keys, or leave it out.')
    values = vars(getattr(parser, 'instantiate', parser.instantiate_classes)(parsed))
    config = config_class(**{key: value for key, value in values.items() if key != 'config'})
    _check_text(asdict(config))  # type: ignore[call-overload]
    return config


def _check_text(values: Mapping[str, Any], prefix: str = '') -> None:
    """Raise ValueError for a character that no file name may contain: it would fail only when a file is opened."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_text(value, f'{prefix}{name}.')
        elif isinstance(value, str) and '\0' in value:
            raise ValueError(f'{prefix}{name} contains a NUL character: {value!r}.')


def _named(config_class: Any, words: list[str]) -> list[str]:
    """Words before the first flag are the first field: MODEL, or several files."""
    flags = next((i for i, word in enumerate(words) if word.startswith('-')), len(words))
    if flags == 0 or not fields(config_class):
        return words
    first = fields(config_class)[0]
    several = str(first.type).startswith('list')
    if flags > 1 and not several:
        raise ValueError(f'Name one {first.name}, got {flags}: {" ".join(words[:flags])}.')
    value = json.dumps(words[:flags]) if several else words[0]
    return [f'--{first.name}={value}', *words[flags:]]


def _spelled_out(config_class: Any, words: list[str]) -> list[str]:
    """``--dry-run`` is ``--dry_run``, a switch without a value is on, ``--eps 1/255 2/255`` a list, 8/255 a number."""
    kinds = dict(_kinds(config_class))
    spelled: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith('--'):
            spelled.append(word)
            continue
        flag, equals, value = word.partition('=')
        flag = flag[:2] + flag[2:].replace('-', '_')
        kind = kinds.get(flag[2:])
        if kind == 'number' and rest and not equals:
            equals, value = '=', rest.pop(0)
        values = [value] if equals else []
        while kind in ('switch', 'list') and not equals and rest and not rest[0].startswith('-'):
            values.append(rest.pop(0))
        if kind == 'switch':
            spelled += [f'{flag}={" ".join(values) or "true"}']
        elif kind == 'list' and values:
            whole = len(values) == 1 and values[0].startswith('[')
            spelled += [f'{flag}={values[0] if whole else "[" + ", ".join(values) + "]"}']
        else:
            spelled += [f'{flag}{equals}{_number(value) if kind == "number" else value}']
    return spelled


def _kinds(config_class: Any, prefix: str = '') -> Iterator[tuple[str, str]]:
    """The dotted name of every field that is a 'switch', a 'number' or a 'list', and which."""
    for field in fields(config_class):
        if field.type is float:
            yield prefix + field.name, 'number'
        elif isinstance(field.default, bool):
            yield prefix + field.name, 'switch'
        elif str(field.type).startswith('list'):
            yield prefix + field.name, 'list'
        elif is_dataclass(field.type):
            yield from _kinds(field.type, f'{prefix}{field.name}.')


def _with_recipes(config_class: Any, words: list[str]) -> list[str]:
    """Replace recipe files by the whole recipe, including its bases, as YAML text."""
    merged = list(words)
    for i, word in enumerate(words):
        flag = '--config=' if word.startswith('--config=') else ''
        if flag or words[i - 1 : i] == ['--config']:
            recipe = _numbers(config_class, read_recipe(Path(word.removeprefix(flag))))
            merged[i] = flag + yaml.safe_dump(recipe, sort_keys=False)
    return merged


def _numbers(config_class: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with fractions turned into numbers, where the config has numbers."""
    kinds = {field.name: field.type for field in fields(config_class)}
    return {
        key: _numbers(kinds[key], value)
        if is_dataclass(kinds.get(key)) and isinstance(value, Mapping)
        else _number(value)
        if kinds.get(key) is float
        else value
        for key, value in values.items()
    }


def _number(value: Any) -> Any:
    """'8/255' as a number; anything else unchanged, for the check to refuse."""
    try:
        return float(Fraction(value)) if isinstance(value, str) and '/' in value else value
    except (ValueError, ZeroDivisionError):
        return value


def read_recipe(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """A recipe, merged over its ``base`` if it names one (a file beside it).

    Args:
        path: The file.
        above: The recipes that lead to this one as a base.

    Raises:
        ValueError: The file is missing, not YAML or not a mapping; it is nested too deeply, or has too many aliases or
            bases; its base is missing, or based on it.
    """
    recipe = _read_yaml(path)
    if not isinstance(recipe, dict):
        raise ValueError(f'{str(path)!r} must contain a mapping, got {str(recipe)[:40]!r}.')
    if 'base' not in recipe:
        return recipe
    base = path.parent / str(recipe.pop('base'))
    above = [*above, path.resolve()]
    if base.resolve() in above:
        raise ValueError(f'{str(path)!r} names the base {str(base)!r}, which is based on it.')
    if len(above) > LONGEST_CHAIN:
        raise ValueError(f'{str(above[0])!r} has a chain of more than {LONGEST_CHAIN} bases. Merge some of them.')
    if not base.is_file():
        raise ValueError(f'{str(path)!r} names the base {str(base)!r}, which does not exist.')
    return _merge(read_recipe(base, above), recipe)


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text()
        depth = aliases = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > DEEPEST or aliases > MOST_ALIASES:
                most = f'{DEEPEST} levels' if depth > DEEPEST else f'{MOST_ALIASES} aliases'
                raise ValueError(f'{str(path)!r} is not a recipe: it has more than {most}.')
        return yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f'Recipe {str(path)!r} does not exist.') from error
        raise ValueError(f'{str(path)!r} cannot be read as YAML: {error}.') from error
    except ValueError as error:
        if 'null byte' in str(error) or 'null character' in str(error):
            raise ValueError(f'{str(path)!r} is not a file name.') from error
        raise


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merge(base[key], over[key])
        for key in base
        if isinstance(base[key], dict) and isinstance(over.get(key), dict)
    }
    return {**base, **over, **both}


def help_text(config_class: Any, command: str, group: str = '') -> str:
    """The text of ``COMMAND --help``: the fields of a config or of a config nested in it; other nested ones by name.

    Args:
        config_class: A dataclass whose docstring describes the fields.
        command: The command as it is typed.
        group: Name of the nested config.

    Raises:
        ValueError: An unknown group.
    """
    groups = {field.name: field.type for field in fields(config_class) if is_dataclass(field.type)}
    if group and group not in groups:
        raise ValueError(f'Unknown group {group!r}. Available: {", ".join(groups)}.{did_you_mean(group, groups)}')
    shown = groups[group] if group else config_class
    doc = _documented(shown)
    described = {param.arg_name: ' '.join((param.description or '').split()) for param in doc.params}
    own = [field for field in fields(shown) if field.name not in groups or group]
    positional = bool(own) and not group and (own[0].name == 'model' or not _has_default(own[0]))
    first = own[0].name.upper() if positional else ''
    lines = [f'usage: {" ".join(filter(None, [command, first, "[--config RECIPE.yaml] [FLAGS]" if own else ""]))}']
    lines += ['', *textwrap.wrap(' '.join(filter(None, [doc.short_description, doc.long_description])), 110), '']
    for field in own:
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        shown_default = '' if default is MISSING or default in ('', {}, []) else f' (default: {_as_typed(default)})'
        flag = f'  --{group + "." if group else ""}{field.name}'
        text = textwrap.wrap(f'{described.get(field.name, "")}{shown_default}', 82)
        lines += [f'{flag:28}{text[0]}' if len(flag) < 28 else f'{flag}\n{"":28}{text[0]}']
        lines += [f'{"":28}{line}' for line in text[1:]]
    if groups and not group:
        lines += ['', f'Groups of flags; `{command} --help GROUP` describes them:']
        for name, nested in groups.items():
            lines.append(f'  --{name + ".*":24}  {_documented(nested).short_description}')
    return '\n'.join(lines)


def _documented(config_class: Any) -> Any:
    from docstring_parser import parse as parse_docstring

    return parse_docstring((config_class.__doc__ or '').replace('``', ''))


def _as_typed(value: Any) -> str:
    if isinstance(value, list):
        return ' '.join(map(_as_typed, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
