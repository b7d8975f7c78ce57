"""Save and resume: one folder per epoch, complete or not there at all."""

import shutil
from pathlib import Path

from accelerate import Accelerator

__all__ = ['newest_checkpoint', 'restore_checkpoint', 'save_checkpoint']

KEEP = 2


def save_checkpoint(accelerator: Accelerator, output: Path, epoch: int) -> None:
    """Model, optimizer and random states after ``epoch`` epochs, in ``output/checkpoints/epoch_N``."""
    folder = output / 'checkpoints'
    temporary = folder / 'unfinished'
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        temporary.rename(folder / f'epoch_{epoch:04d}')
        for old in sorted(folder.glob('epoch_*'))[:-KEEP]:
            shutil.rmtree(old)


def newest_checkpoint(output: Path) -> Path | None:
    return max((output / 'checkpoints').glob('epoch_*'), default=None)


def restore_checkpoint(accelerator: Accelerator, checkpoint: Path) -> int:
    """Load a checkpoint into what the accelerator prepared; returns the number of finished epochs."""
    accelerator.load_state(str(checkpoint))
    return int(checkpoint.name.removeprefix('epoch_'))
