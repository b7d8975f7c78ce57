"""Save and resume: one folder per checkpoint, complete and sealed with the hashes of its files, or not there at all."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from timm_batchout.provenance import write_atomically

__all__ = ['Progress', 'describe', 'newest_checkpoint', 'restore_checkpoint', 'save_checkpoint']

SEAL = 'sha256.json'
PROGRESS, EMA = 'progress.pt', 'ema.pt'


class Progress:
    """How far a run is: what a checkpoint holds beside weights, optimizer and random states.

    Attributes:
        epoch: Finished epochs.
        step: Forwards of the unfinished epoch that are done; 0 at the end of an epoch.
        losses: Their losses, float32 (processes, forwards of an epoch); zeros where not yet done.
        seconds: Time that the unfinished epoch has taken so far.
        metrics: The records of the finished epochs.
        best: The highest validation accuracy so far.
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
    """All that the accelerator prepared, the progress and the moving average, in ``output/checkpoints/step_N``.

    Raises:
        RuntimeError: It could not be written. Earlier checkpoints are intact.
    """
    folder = output / 'checkpoints'
    temporary = folder / 'unfinished'
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # Not registered with the accelerator, which would read them back as pickles that can run code.
            torch.save(progress.state_dict(), temporary / PROGRESS)
            if ema is not None:
                torch.save(ema.state_dict(), temporary / EMA)
            write_atomically(temporary / SEAL, json.dumps(_hashes(temporary), indent=1))
            final = folder / f'step_{forwards:09d}'
            shutil.rmtree(final, ignore_errors=True)  # a damaged one that a resumed run passed over
            temporary.rename(final)
            for old in sorted(folder.glob('step_*'))[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = max(folder.glob('step_*'), default=None)
        rest = f'{last} is the last one' if last else 'there is no earlier one'
        raise RuntimeError(
            f'A checkpoint could not be written to {folder}: {describe(error, output)}. {rest}.'
        ) from error


def describe(error: Exception, folder: Path) -> str:
    """A failed write, in words: torch and safetensors do not say that a disk is full."""
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f'{first_line} ({shutil.disk_usage(folder).free / 2**20:.1f} MiB are free)'


def newest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint whose files are what was written; damaged ones are named in a warning and passed over."""
    for checkpoint in sorted((output / 'checkpoints').glob('step_*'), reverse=True):
        damage = _damage(checkpoint)
        if not damage:
            return checkpoint
        warnings.warn(f'{checkpoint} is damaged ({damage}) and is passed over.', stacklevel=2)
    return None


def restore_checkpoint(accelerator: Accelerator, checkpoint: Path, progress: Progress, ema: nn.Module | None) -> None:
    """Load a checkpoint into what the accelerator prepared, the progress and the moving average.

    Raises:
        ValueError: It is of another number of processes, or of a net, an optimizer or batches that it does not fit.
    """
    with _clear_errors(checkpoint):
        state = torch.load(checkpoint / PROGRESS, map_location='cpu', weights_only=True)
    processes, forwards = state['losses'].shape
    if processes != accelerator.num_processes:
        raise ValueError(
            f'{checkpoint} is of a run on {processes} processes, this is one on {accelerator.num_processes}: '
            f'go on with {processes}.'
        )
    if forwards != progress.losses.shape[1]:
        if state['step']:
            raise ValueError(
                f'{checkpoint} is within an epoch of {forwards} batches, now they are {progress.losses.shape[1]}: '
                'batch_size and data can change between epochs only.'
            )
        state['losses'] = progress.losses
    with _clear_errors(checkpoint):
        accelerator.load_state(str(checkpoint))
        if ema is not None:
            ema.load_state_dict(torch.load(checkpoint / EMA, map_location='cpu', weights_only=True))
    progress.load_state_dict(state)


@contextmanager
def _clear_errors(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(f'{checkpoint} holds what could run code, and is not read. Is it of this run?') from error
    except (KeyError, ValueError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(
            f'{checkpoint} does not fit this recipe ({error}): model, optimizer and ema_decay must stay.'
        ) from error


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != SEAL)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files; '' if nothing is."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text())
        found = _hashes(checkpoint)
    except (OSError, ValueError) as error:
        return str(error)
    changed = [name for name in sorted({*sealed, *found}) if sealed.get(name) != found.get(name)]
    return f'changed or missing: {", ".join(changed)}' if changed else ''
