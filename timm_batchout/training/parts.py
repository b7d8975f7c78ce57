"""A recipe to a trainer: objective, loaders, optimizer and schedule."""

from typing import Any

import timm.optim
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from timm_batchout.data.images import Split
from timm_batchout.data.memory import TensorLoader
from timm_batchout.data.timm_splits import TimmSplit, input_cfg
from timm_batchout.data.workers import TimmLoader
from timm_batchout.inject import batchout_sites
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.objectives import Objective
from timm_batchout.training.run_folder import RunFolder
from timm_batchout.training.trainer import Trainer

__all__ = ['make_trainer']


def make_trainer(
    config: TrainConfig,
    model: nn.Module,
    splits: tuple[Split, ...] | tuple[TimmSplit, ...],
    accelerator: Accelerator,
) -> Trainer:
    """A trainer at the beginning of its run.

    Args:
        config: The recipe.
        model: The model, with BatchOut if the recipe names a twin, in its memory format.
        splits: Training, validation and test split.
        accelerator: Devices and processes.
    """
    cfg, classes = input_cfg(model, config.data), int(model.num_classes)  # type: ignore[arg-type]
    objective = Objective(config.objective, list(batchout_sites(model).values()))
    loader, val_loader, test_loader = (_loader(i, splits[i], config, cfg, classes, accelerator) for i in range(3))
    mixup, cutmix = config.augment.mixup, config.augment.cutmix
    lr = config.optimizer.lr * (accelerator.num_processes if config.optimizer.scale_lr else 1)
    optimizer: Any = timm.optim.create_optimizer_v2(
        model,
        opt=config.optimizer.name,
        lr=lr,
        weight_decay=config.optimizer.weight_decay,
        momentum=config.optimizer.momentum,
    )
    schedule, _ = create_scheduler_v2(
        optimizer,
        config.schedule.name,
        num_epochs=config.epochs,
        decay_epochs=config.schedule.decay_epochs,
        decay_rate=config.schedule.decay_rate,
        min_lr=lr * config.schedule.min_lr,
        warmup_lr=0.0,
        warmup_epochs=config.schedule.warmup_epochs,  # type: ignore[arg-type]  # a float will do
        step_on_epochs=False,
        updates_per_epoch=-(-len(loader) // config.accumulate),
    )
    if config.compile:
        model.compile(backend=config.compile)
    model, optimizer = accelerator.prepare(model, optimizer)
    # After prepare: only now do all processes have the weights of the first one.
    ema = ModelEmaV3(accelerator.unwrap_model(model), decay=config.ema_decay) if config.ema_decay else None
    return Trainer(
        config=config,
        accelerator=accelerator,
        folder=RunFolder(config.output),
        model=model,
        ema=ema,
        cfg=cfg,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        loader=loader,
        val_loader=val_loader,
        test_loader=test_loader,
        # No smoothing here: the loss smooths the labels, whether mixed or not.
        mixup=Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=classes) if mixup or cutmix else None,
        class_names=list(splits[0].class_names),
    )


def _loader(
    number: int,
    split: Split | TimmSplit,
    config: TrainConfig,
    cfg: dict[str, Any],
    classes: int,
    accelerator: Accelerator,
) -> TensorLoader | TimmLoader:
    """The loader of a split: training (number 0) in random order, the others in their own."""
    size = config.eval_batch_size if number else config.batch_size
    options: dict[str, Any] = {
        'device': accelerator.device,
        'channels_last': config.channels_last,
        'shuffle': number == 0,
        'seed': config.seed,
        'rank': accelerator.process_index,
        'world_size': accelerator.num_processes,
        'augment': config.augment,
    }
    if isinstance(split, TimmSplit):
        return TimmLoader(split, size, cfg, classes, **options)
    return TensorLoader(split, size, **options)
