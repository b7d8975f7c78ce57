"""The folder of a run: who may write to it, and where a run resumes.

A run folder contains a mark, which is also the lock of the process that trains into it. Nothing is written to any other
folder unless it is empty.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from timm_batchout.provenance import free_space, write_atomically
from timm_batchout.training.checkpoints import CHECKPOINTS, newest_checkpoint
from timm_batchout.training.config import METRICS, TrainConfig
from timm_batchout.zoo.checkpoint import as_safetensors

__all__ = ['MARK', 'RECIPE', 'RunFolder', 'recipe_changes']

MARK = '.timm-batchout-run'
RECIPE = 'config.yaml'
PATIENCE = 10  # seconds: the lock of a killed process is free only after its data workers have ended


class RunFolder:
    """The folder of a run; one process at a time writes to it.

    Args:
        path: The folder; ``claim`` creates it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = FileLock(self.path / MARK)

    def claim(self, config: TrainConfig) -> Path | None:
        """Lock the folder for this run, and find the checkpoint to resume from.

        Returns:
            The newest intact checkpoint; None for a new run.

        Raises:
            ValueError: The folder contains other files or another run, or another process is training into it; there is
                nothing to resume; the recipe differs from that of the run to resume. Nothing was changed.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f'output {str(path)!r} is a file. Choose another --output.')
        if config.resume and config.resume != 'auto' and not _checkpoints(path):
            raise ValueError(
                f'Nothing to resume: {str(path)!r} contains no checkpoint. Start a new run without --resume.'
            )
        marked = (path / MARK).is_file()
        if path.exists() and any(path.iterdir()) and not marked and not (config.resume and _checkpoints(path)):
            raise ValueError(
                f'{str(path)!r} is not empty and is not a run folder. Choose another --output, or empty it.'
            )
        _check_free(path, config)  # also before locking, which touches the mark
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=PATIENCE if config.resume else 0)
        except Timeout as error:
            raise ValueError(
                f'Another process is training into {str(path)!r}. Wait until it ends, or choose another --output.'
            ) from error
        try:
            return self._resumed_from(config)
        except ValueError:
            self.release()
            raise

    def release(self) -> None:
        self._lock.release()

    def _resumed_from(self, config: TrainConfig) -> Path | None:
        path = self.path
        _check_free(path, config)
        _check_checkpoint_names(path)
        if not _results(path):
            return None
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise ValueError(
                f'The run in {str(path)!r} cannot be resumed: its checkpoints are damaged, unreadable or deleted. '
                'Restore one, or move the folder away and start again.'
            )
        _check_recipe(path, config)
        return checkpoint

    def start(self, config: TrainConfig) -> None:
        """Write the resolved recipe."""
        write_atomically(self.path / RECIPE, config.to_yaml())

    def write_metrics(self, metrics: list[dict[str, Any]]) -> None:
        write_atomically(self.path / METRICS, ''.join(json.dumps(record) + '\n' for record in metrics))

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.path / 'result.json', json.dumps(result, indent=2) + '\n')

    def write_weights(self, state_dict: Mapping[str, Tensor], name: str) -> str:
        """Write a state_dict as safetensors; returns the sha256 of the file.

        Raises:
            RuntimeError: It could not be written; the earlier file is intact.
        """
        content = as_safetensors(state_dict)  # save_file would write a file that only its owner can read
        path = self.path / name
        try:
            write_atomically(path, content)
        except OSError as error:
            checkpoint = newest_checkpoint(self.path)
            raise RuntimeError(
                f'{path} could not be written: {free_space(error, self.path)}. Make room, then resume with --resume'
                f'{f" from {checkpoint}" if checkpoint else ""}.'
            ) from error
        return hashlib.sha256(content).hexdigest()


def _checkpoints(path: Path) -> list[Path]:
    return sorted((path / CHECKPOINTS).glob('step_*'))


def _results(path: Path) -> list[Path]:
    """Files of a run that must not be overwritten."""
    names = ('best.safetensors', 'model.safetensors', 'result.json')
    return [*(path / name for name in names if (path / name).exists()), *_checkpoints(path)]


def _check_free(path: Path, config: TrainConfig) -> None:
    """Raise ValueError if a new run would overwrite the results of another one."""
    kept = [file.name for file in _results(path)]
    if kept and not config.resume:
        remedy = 'resume it with --resume' if _checkpoints(path) else 'move or delete it'
        raise ValueError(
            f'{str(path)!r} already contains a run ({", ".join(kept[:3])}): {remedy}, or choose another --output.'
        )


def _check_checkpoint_names(path: Path) -> None:
    for found in _checkpoints(path):
        if re.fullmatch(r'step_\d{9}', found.name) and not found.is_dir():
            raise ValueError(f'{str(found)!r} is a file in the place of a checkpoint. Move it away.')


def _check_recipe(path: Path, config: TrainConfig) -> None:
    """Raise ValueError if a config differs from the recipe of the run in this folder."""
    recipe = path / RECIPE
    try:
        saved = yaml.safe_load(recipe.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = 'is missing' if isinstance(error, FileNotFoundError) else f'cannot be read ({error})'
        raise ValueError(f'{str(recipe)!r} {reason}. Restore it from the recipe that the run began with.') from error
    if not isinstance(saved, dict):
        raise ValueError(f'{str(recipe)!r} is damaged: it contains {str(saved)[:40]!r}, not a recipe. Restore it.')
    changes = recipe_changes(saved, config)
    if changes and not config.allow_changes:
        raise ValueError(
            'The recipe differs from that of the run to resume (resume anyway with --allow-changes):\n'
            + '\n'.join(changes)
        )
    for line in changes:
        if line.split(':')[0].strip() in ('model', 'optimizer.name'):
            raise ValueError(f'This cannot change within a run. Start a new run.\n{line}')


def recipe_changes(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """The differences between a config and a saved recipe. Fields that the recipe lacks have their defaults."""
    default = yaml.safe_load(TrainConfig().to_yaml())
    return [
        f'  {name}: saved {was!r}, now {now!r}'
        for name, was, now in _differences(_filled(saved, default), yaml.safe_load(config.to_yaml()))
        if name not in config.LAUNCH
    ]


def _filled(saved: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    inner = {key: _filled(saved[key], value) for key, value in default.items() if isinstance(saved.get(key), dict)}
    return {**default, **saved, **inner}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) wherever two recipes differ."""
    for key in dict.fromkeys([*a, *b]):
        was, now = a.get(key), b.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f'{prefix}{key}.')
        elif was != now:
            yield prefix + key, was, now
