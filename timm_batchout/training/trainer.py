"""A model in training, from step to step: forward, backward, update, validation, checkpoint."""

import shlex
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from timm_batchout.data.memory import TensorLoader, data_label
from timm_batchout.data.workers import TimmLoader
from timm_batchout.pixels import PixelModel
from timm_batchout.provenance import environment
from timm_batchout.training.checkpoints import Progress, newest_checkpoint, save_checkpoint
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.objectives import Objective
from timm_batchout.training.run_folder import RECIPE, RunFolder
from timm_batchout.training.stopping import Interrupted, StopSignals
from timm_batchout.training.validate import robust_score, score

__all__ = ['Trainer']

LOOK_EVERY = 20  # forwards between two checks of the losses: reading them stalls a GPU


@dataclass
class Trainer:
    """A model in training; ``parts.make_trainer`` builds it from a recipe.

    Args:
        config: The recipe.
        accelerator: Devices and processes.
        folder: The run folder.
        model: The model, prepared by the accelerator.
        ema: Moving average of its weights; None: no average.
        cfg: The model's input: mean, std, size.
        objective: Computes the loss of a batch.
        optimizer: timm's optimizer, prepared by the accelerator.
        schedule: timm's schedule of the learning rate.
        loader, val_loader, test_loader: This process's share of the images.
        mixup: timm's Mixup or CutMix; None: neither.
        class_names: Names by class number.
    """

    config: TrainConfig
    accelerator: Accelerator
    folder: RunFolder
    model: nn.Module
    ema: ModelEmaV3 | None
    cfg: dict[str, Any]
    objective: Objective
    optimizer: Any
    schedule: Any
    loader: TensorLoader | TimmLoader
    val_loader: TensorLoader | TimmLoader
    test_loader: TensorLoader | TimmLoader
    mixup: Mixup | None
    class_names: list[str]

    def __post_init__(self) -> None:
        accelerator, config, batches = self.accelerator, self.config, len(self.loader)
        self.output = self.folder.path
        self.pixel_model = PixelModel(self.model, self.cfg).to(accelerator.device)
        self.etas = [(layer, layer.eta) for layer in self.objective.layers]  # at full strength
        self.updates_per_epoch = -(-batches // config.accumulate)
        self.progress = Progress(accelerator.num_processes, batches)
        self.losses = torch.zeros(batches, device=accelerator.device)  # of this process in this epoch
        steps = config.checkpoint.steps * config.accumulate  # whole updates: no gradient is half accumulated
        self.saved_at = range(steps, batches, steps) if steps else ()  # within each epoch
        self.stop = StopSignals(accelerator)

    @property
    def forwards(self) -> int:
        """Forwards since the start of the run."""
        return self.progress.epoch * len(self.loader) + self.progress.step

    @property
    def weights(self) -> nn.Module:
        """The model that is evaluated and saved: the model itself or its moving average."""
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)

    def train_epoch(self) -> None:
        """Train the rest of the current epoch, validate, and save a checkpoint."""
        progress = self.progress
        self.model.train()
        self.loader.epoch, self.loader.start = progress.epoch, progress.step
        self.losses.copy_(progress.losses[self.accelerator.process_index])
        started = time.perf_counter() - progress.seconds
        for images, labels in self._progress_bar():
            self._step(images, labels)
            progress.seconds = time.perf_counter() - started
            if progress.step % LOOK_EVERY == 0:
                self._check_losses()
            if self._must_stop():
                self._save()
                raise Interrupted(self._how_to_resume() if self.accelerator.is_main_process else '')
            if progress.step in self.saved_at:
                self._save()
        self._check_losses()
        self._report(self._epoch_record())
        self._save()

    def overfits(self) -> bool:
        """Whether robust validation accuracy has not risen for ``robust_val.patience`` epochs."""
        patience = self.config.robust_val.patience
        robust = [record['val_robust_accuracy'] for record in self.progress.metrics if 'val_robust_accuracy' in record]
        return bool(patience and robust) and len(robust) - 1 - robust.index(max(robust)) >= patience

    def _how_to_resume(self) -> str:
        command = shlex.join(['train', '--config', str(self.output / RECIPE), '--resume'])
        processes = self.accelerator.num_processes
        if processes == 1:
            return f'Stopped and saved. Resume with: timm-batchout {command}'
        return f'Stopped and saved. Resume by the launcher, on {processes} processes: -m timm_batchout.cli {command}'

    def _progress_bar(self) -> tqdm:
        images = self.config.batch_size * self.accelerator.num_processes
        return tqdm(
            self.loader,
            f'epoch {self.progress.epoch + 1}/{self.config.epochs}',
            total=len(self.loader),
            initial=self.progress.step,
            # None: shown on a terminal only
            disable=None if self.accelerator.is_local_main_process and not self.config.quiet else True,
            leave=False,
            mininterval=1.0,
            unit=' images',
            unit_scale=images,
        )

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """A forward and backward, and after the last of an accumulated group, an optimizer step."""
        step, accumulate = self.progress.step, self.config.accumulate
        group, place = divmod(step, accumulate)
        size = min(accumulate, len(self.loader) - group * accumulate)  # an epoch's last group may be smaller
        if place == 0:
            updates = self.progress.epoch * self.updates_per_epoch + group
            self.schedule.step_update(updates)
            self._warm_up_eta(updates)
            self.objective.warm_up(updates / (self.config.epochs * self.updates_per_epoch))
            self.optimizer.zero_grad()
        last = place == size - 1
        targets = labels
        if self.mixup:
            images, targets = self.mixup(images, labels)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                loss = self.objective(self.pixel_model, images, targets)
            self.accelerator.backward(loss / size)
        self.losses[step] = loss.detach()  # read later: reading it here would stall a GPU at each step
        if last:
            self._update()
        self.progress.step += 1

    def _update(self) -> None:
        config = self.config
        if config.clip_grad or config.non_finite == 'skip':
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad or float('inf'))
            # The same on all processes, because gradients are averaged. With fp16 the gradient scaler skips the step.
            if config.non_finite == 'skip' and not torch.isfinite(norm) and self.accelerator.scaler is None:
                return
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.accelerator.unwrap_model(self.model))

    def _warm_up_eta(self, updates: int) -> None:
        length = self.config.schedule.eta_warmup_epochs * self.updates_per_epoch
        if updates > length or not length:
            return
        share = updates / length
        for layer, eta in self.etas:
            layer.set_eta((share * eta[0], share * eta[1]) if isinstance(eta, tuple) else share * eta)

    def _must_stop(self) -> bool:
        if self.progress.step % self.config.accumulate and self.progress.step < len(self.loader):
            return False  # half accumulated gradients would be lost
        return self.stop.seen()

    def _check_losses(self) -> None:
        """Stop at a NaN or infinite loss, before it can get into a checkpoint."""
        done = self.losses[: self.progress.step]
        if self.config.non_finite == 'skip' or torch.isfinite(done).all():
            return
        step = int((~torch.isfinite(done)).nonzero()[0])
        checkpoint = newest_checkpoint(self.output)
        raise FloatingPointError(
            f'The loss became {done[step].item()} at step {step} of epoch {self.progress.epoch + 1}. '
            f'Lower optimizer.lr ({self.optimizer.param_groups[0]["lr"]:g} now), or set non_finite to skip. '
            f'Last good checkpoint: {checkpoint or "none yet"}.'
        )

    def _epoch_record(self) -> dict[str, Any]:
        """End the epoch: validate, and return its line of metrics.jsonl."""
        progress, world_size = self.progress, self.accelerator.num_processes
        images = len(self.loader) * self.config.batch_size * world_size
        losses = self._all_losses()
        finite = torch.isfinite(losses)
        record: dict[str, Any] = {
            'epoch': progress.epoch + 1,
            'step': self.forwards,
            'lr': self.optimizer.param_groups[0]['lr'],
            'train_loss': losses[finite].mean().item(),
            'images_per_second': round(images / progress.seconds, 1),
            'seconds': round(progress.seconds, 2),
        }
        if not finite.any():
            raise FloatingPointError(
                f'Every loss of epoch {record["epoch"]} was NaN or infinite, so skipping such steps does not help. '
                f'Lower optimizer.lr. Last good checkpoint: {newest_checkpoint(self.output) or "none yet"}.'
            )
        if self.config.non_finite == 'skip':
            record['non_finite_losses'] = int((~finite).sum())
        if isinstance(self.loader, TimmLoader):
            broken = torch.tensor(self.loader.broken, device=self.accelerator.device)
            record['broken_images'] = int(self.accelerator.reduce(broken, 'sum'))
        if record['epoch'] == self.config.epochs or record['epoch'] % self.config.eval_epochs == 0:
            record |= score(self.weights, self.val_loader, self.accelerator, prefix='val_')
            if self.config.objective.name != 'plain' and self.config.robust_val.images:
                record |= robust_score(self.weights, self.val_loader, self.accelerator, self.config)
            accuracy = record.get('val_robust_accuracy', record['val_accuracy'])
            if accuracy > progress.best:
                progress.best = accuracy
                self._write_weights('best.safetensors')
        progress.finish_epoch(record)
        return record

    def _report(self, record: dict[str, Any]) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=record['step'])
        if not self.accelerator.is_main_process:
            return
        self.folder.write_metrics(self.progress.metrics)
        line = f'epoch {record["epoch"]}/{self.config.epochs}  loss {record["train_loss"]:.3f}  '
        if 'val_accuracy' in record:
            line += f'val accuracy {record["val_accuracy"]:.4f}  '
            if 'val_robust_accuracy' in record:
                line += f'robust {record["val_robust_accuracy"]:.4f}  '
            line += f'logit std {record["val_logit_std"]:.1f}  '
        left = (self.config.epochs - record['epoch']) * record['seconds']
        line += f'{record["images_per_second"]:.0f} images/s'
        self._say(line + (f'  {timedelta(seconds=round(left))} left' if left else ''))

    def _say(self, line: str) -> None:
        if not self.config.quiet:
            tqdm.write(line)

    def _all_losses(self) -> Tensor:
        """The losses of all processes in this epoch, (processes, forwards)."""
        return self.accelerator.gather(self.losses[None]).cpu()

    def _save(self) -> None:
        if self.progress.step:  # within an epoch
            self._check_losses()
            self.progress.losses = self._all_losses()
        keep = self.config.checkpoint.keep
        save_checkpoint(self.accelerator, self.output, self.progress, self.ema, self.forwards, keep)

    def finish(self) -> dict[str, Any]:
        """Test, write the weights and result.json, and return the content of the latter."""
        test = score(self.weights, self.test_loader, self.accelerator, prefix='test_')
        metrics = self.progress.metrics
        if 'val_accuracy' not in metrics[-1]:  # resumed with fewer epochs, after one that was not validated
            metrics[-1] |= score(self.weights, self.val_loader, self.accelerator, prefix='val_')
        names = ('train_loss', 'val_accuracy', 'val_correct', 'val_n', 'val_loss')
        result = {
            'model': self.config.model,
            'data': data_label(self.config.data),
            'class_names': self.class_names,
            'seed': self.config.seed,
            'metrics': {**{name: metrics[-1][name] for name in names}, **test},
            'recipe': self.config.recipe(),
            'seconds': round(sum(record['seconds'] for record in metrics), 1),
            'environment': {**environment(self.accelerator.device), 'processes': self.accelerator.num_processes},
        }
        result['sha256'] = self._write_weights('model.safetensors')
        if self.accelerator.is_main_process:
            self.folder.write_result(result)
            accuracy = f'{test["test_accuracy"]:.4f} ({test["test_correct"]}/{test["test_n"]})'
            self._say(f'test accuracy {accuracy} -> {self.output}')
        return result

    def _write_weights(self, name: str) -> str:
        """Write the state_dict as safetensors; returns the file's sha256, '' except on the main process."""
        # On all processes, because with FSDP each holds a part.
        whole = self.ema.module.state_dict() if self.ema else self.accelerator.get_state_dict(self.model)
        return self.folder.write_weights(whole, name) if self.accelerator.is_main_process else ''
