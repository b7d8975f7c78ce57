"""What is published of a run: known harmless fields, without local paths and secrets."""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from timm_batchout.training.config import TrainConfig

__all__ = ['publishable', 'redacted']

NAME = re.compile(r'[\w.+\- ]{0,80}')  # no slash, colon, tilde or question mark, so neither a path nor a URL
DATASET = re.compile(r'(hfds|hfids|wds|torch|tfds)/\w[\w.\-]*(/\w[\w.\-]*)?')
RESULT = ('model', 'data', 'class_names', 'seed', 'metrics', 'seconds', 'environment', 'sha256')
FREE_TEXT = ('data', 'class_names', 'environment')  # published as they are; ``provenance`` wrote 'environment'
PLACES = ('output', 'root')


def publishable(run: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a run's result with only the known fields, and only text that is a name.

    Args:
        run: Content of ``result.json``; empty if unknown.
    """
    kept = {name: run[name] if name in FREE_TEXT else _safe(run[name]) for name in RESULT if name in run}
    return {**kept, 'recipe': _recipe(run['recipe'], TrainConfig)} if 'recipe' in run else kept


def _recipe(recipe: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for field in fields(config_class):
        value = recipe.get(field.name)
        if field.name not in recipe:
            continue
        if is_dataclass(field.type) and isinstance(value, Mapping):
            kept[field.name] = _recipe(value, field.type)
        elif field.name in PLACES:
            kept[field.name] = ''
        elif field.name == 'dataset' and isinstance(value, str) and DATASET.fullmatch(value):
            kept[field.name] = value
        else:
            kept[field.name] = _safe(value)
    return kept


def _safe(value: Any) -> Any:
    """Numbers, names, and containers of them; text that may be a path becomes ''."""
    if isinstance(value, Mapping):
        return {key: _safe(inner) for key, inner in value.items() if isinstance(key, str) and NAME.fullmatch(key)}
    if isinstance(value, (list, tuple)):
        return [_safe(inner) for inner in value]
    return value if not isinstance(value, str) or NAME.fullmatch(value) else ''


def redacted(text: str) -> str:
    """An error message without tokens that a server may have echoed."""
    return re.sub(r'hf_\w{8,}|(?<=[Bb]earer )\S+', '[token]', text)
