"""Save and resume: one folder per checkpoint, written completely or not at all, sealed with its files' hashes."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load as accelerate_load
from safetensors import SafetensorError
from torch import Tensor, nn

from timm_batchout.provenance import free_space, write_atomically

__all__ = ['CHECKPOINTS', 'Progress', 'newest_checkpoint', 'restore_checkpoint', 'save_checkpoint']

CHECKPOINTS = 'checkpoints'
SEAL = 'sha256.json'
PROGRESS, EMA = 'progress.pt', 'ema.pt'


class Progress:
    """The progress of a run: what a checkpoint holds besides weights, optimizer and random states.

    Attributes:
        epoch: Number of finished epochs.
        step: Forwards done in the unfinished epoch; 0 at the end of an epoch.
        losses: Their losses, float32 (processes, forwards of an epoch); zeros where not yet done.
        seconds: Time spent on the unfinished epoch.
        metrics: Records of the finished epochs.
        best: Highest validation accuracy so far.
    """

    FIELDS = ('epoch', 'step', 'losses', 'seconds', 'metrics', 'best')

    def __init__(self, processes: int, forwards: int):
        self.epoch = 0
        self.step = 0
        self.losses: Tensor = torch.zeros(processes, forwards)
        self.seconds = 0.0
        self.metrics: list[dict[str, Any]] = []
        self.best = -1.0

    def finish_epoch(self, record: dict[str, Any]) -> None:
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.losses = torch.zeros_like(self.losses)
        self.metrics.append(record)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.FIELDS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.FIELDS:
            setattr(self, name, state[name])


def save_checkpoint(
    accelerator: Accelerator, output: Path, progress: Progress, ema: nn.Module | None, forwards: int, keep: int
) -> None:
    """Save everything the accelerator prepared, the progress and the moving average to ``output/checkpoints/step_N``.

    Raises:
        RuntimeError: It could not be written. Earlier checkpoints are intact.
    """
    folder = output / CHECKPOINTS
    temporary = folder / 'unfinished'
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # Not registered with the accelerator, which would read them as pickles that can run code.
            torch.save(progress.state_dict(), temporary / PROGRESS)
            if ema is not None:
                torch.save(ema.state_dict(), temporary / EMA)
            write_atomically(temporary / SEAL, json.dumps(_hashes(temporary), indent=1))
            final = folder / f'step_{forwards:09d}'
            shutil.rmtree(final, ignore_errors=True)  # a damaged one that this resumed run skipped
            temporary.rename(final)
            for old in _ours(folder)[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = max(_ours(folder), default=None)
        rest = f'The last checkpoint is {last}' if last else 'No earlier checkpoint exists'
        raise RuntimeError(
            f'A checkpoint could not be written to {folder}: {free_space(error, output)}. {rest}.'
        ) from error


def _ours(folder: Path) -> list[Path]:
    """The checkpoints, the oldest first. Other names in that folder do not belong to this run."""
    return sorted(path for path in folder.glob('step_*') if re.fullmatch(r'step_\d{9}', path.name) and path.is_dir())


def newest_checkpoint(output: Path) -> Path | None:
    """The newest intact checkpoint; damaged ones are skipped with a warning."""
    for checkpoint in reversed(_ours(output / CHECKPOINTS)):
        damage = _damage(checkpoint)
        if not damage:
            return checkpoint
        warnings.warn(f'Skipping damaged checkpoint {checkpoint}: {damage}.', stacklevel=2)
    return None


def restore_checkpoint(accelerator: Accelerator, checkpoint: Path, progress: Progress, ema: nn.Module | None) -> None:
    """Load a checkpoint into everything the accelerator prepared, the progress and the moving average.

    Raises:
        ValueError: The checkpoint was written by another number of processes, contains pickled code, or belongs to
            another net, optimizer or batch size.
    """
    with _clear_errors(checkpoint):
        state = torch.load(checkpoint / PROGRESS, map_location='cpu', weights_only=True)
    processes, forwards = state['losses'].shape
    if processes != accelerator.num_processes:
        raise ValueError(
            f'{checkpoint} was written by {processes} process{"es" * (processes > 1)}; resume with {processes}, not '
            f'{accelerator.num_processes}.'
        )
    if forwards != progress.losses.shape[1]:
        if state['step']:
            raise ValueError(
                f'{checkpoint} was saved within an epoch of {forwards} batches; this recipe has '
                f'{progress.losses.shape[1]}. batch_size and data can only change between epochs.'
            )
        state['losses'] = progress.losses
    with _clear_errors(checkpoint):
        random_states = accelerate_load(checkpoint / f'random_states_{accelerator.process_index}.pkl')
        accelerator.load_state(str(checkpoint))
        # Accelerate skips random states that it cannot load, and the run would end with other weights.
        if not torch.equal(torch.get_rng_state(), random_states['torch_manual_seed']):
            raise ValueError('its random states could not be loaded')
        if ema is not None:
            ema.load_state_dict(torch.load(checkpoint / EMA, map_location='cpu', weights_only=True))
    progress.load_state_dict(state)


@contextmanager
def _clear_errors(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f'{checkpoint} contains pickled code and was not loaded. Was it written by this run?'
        ) from error
    except (EOFError, KeyError, TypeError, ValueError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(
            f'{checkpoint} does not fit this recipe ({error}): model, optimizer and ema_decay must stay the same.'
        ) from error


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != SEAL)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _damage(checkpoint: Path) -> str:
    """The damage to a checkpoint's files in words; '' if it is intact."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text())
        found = _hashes(checkpoint)
    except (OSError, ValueError) as error:
        return str(error)
    if not isinstance(sealed, dict):
        return f'{SEAL} contains {str(sealed)[:40]!r}, not the hashes of the files'
    changed = [name for name in sorted({*sealed, *found}) if sealed.get(name) != found.get(name)]
    return f'changed or missing: {", ".join(changed)}' if changed else ''
