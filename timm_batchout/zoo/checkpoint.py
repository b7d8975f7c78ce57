"""Weights files: written as safetensors; read from safetensors, timm's train.py, torch.save and Lightning."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models import clean_state_dict
from torch import Tensor, nn
from torch.serialization import safe_globals

__all__ = ['as_safetensors', 'load_checkpoint', 'read_checkpoint']

HOLDERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')  # where training scripts put the weights
PREFIXES = ('model.', 'net.', 'backbone.', 'encoder.')  # attributes of Lightning modules


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a file into a model, all of it.

    Raises:
        ValueError: The file is damaged, contains no weights, contains code, or belongs to another architecture.
    """
    state = read_checkpoint(path)
    own = set(model.state_dict())
    for prefix in PREFIXES:
        if not own & set(state) and any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    missing, foreign = sorted(own - set(state)), sorted(set(state) - own)
    if missing or foreign:
        raise ValueError(
            f'{str(path)!r} does not fit {type(model).__name__}. Missing: {", ".join(missing[:3]) or "nothing"}; '
            f'unexpected: {", ".join(foreign[:3]) or "nothing"}. Name the architecture that it was trained with.'
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f'{str(path)!r} does not fit: {reason} Set --model_args, e.g. num_classes.') from error


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """A state_dict, without the prefixes of ``DataParallel`` and ``torch.compile``.

    Moving averages are preferred, as in timm. Pickles are read with ``weights_only``, which runs no code.

    Raises:
        ValueError: The file is damaged, contains no weights, or contains code.
    """
    path = Path(path)
    try:
        if path.suffix == '.safetensors':
            return clean_state_dict(load_file(path))
        with safe_globals([Namespace]):  # the arguments that timm's train.py saves: names and values, no code
            content: Any = torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f'{str(path)!r} contains more than weights, and its code is not run. If you trust it, save only the '
            'weights: safetensors.torch.save_file(torch.load(FILE, weights_only=False)["state_dict"], NEW).'
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f'{str(path)!r} is damaged ({error}). Write or download it again.') from error
    for holder in HOLDERS:
        if isinstance(content, dict) and isinstance(content.get(holder), dict):
            content = content[holder]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f'{str(path)!r} contains no state_dict: got {type(content).__name__}.')
    return clean_state_dict(content)


def as_safetensors(state_dict: Mapping[str, Tensor]) -> bytes:
    """A state_dict as the content of a safetensors file."""
    # Copies: safetensors refuses tensors that share memory, such as those of a module used twice.
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state_dict.items()}
    return save(tensors, metadata={'format': 'pt'})
