"""The training loop, on Accelerate: from a config to a run folder.

run/config.yaml          the resolved recipe
run/metrics.jsonl        one line per epoch
run/checkpoints/epoch_N  all that --resume needs; the newest two are kept
run/model.safetensors    the trained weights, keys as in the plain net
run/result.json          test accuracy, recipe, seed, versions, hardware, sha256 of the weights
"""

import hashlib
import json
import time
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import save_file
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from tqdm import tqdm

import timm_batchout  # noqa: F401  (registers the zoo's models)
from timm_batchout.provenance import environment, write_atomically
from timm_batchout.sites import activation_sites
from timm_batchout.training.checkpoints import newest_checkpoint, restore_checkpoint, save_checkpoint
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.data import Split, TensorLoader, data_label, load_data
from timm_batchout.training.objectives import Objective, make_objective
from timm_batchout.zoo.timm_twins import check_model_name

__all__ = ['train']

RECIPE = 'config.yaml'


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model by a recipe; returns what it writes to ``result.json``.

    Raises:
        ValueError: A config value out of range, data that is not there, images that the model does not take, an
            output folder that holds another run, nothing to resume. Before the first step, in every case.
        FloatingPointError: The loss became NaN or infinite.
    """
    config.validate()
    check_model_name(config.model)
    objective = make_objective(config.objective)
    train_split, val_split, test_split = load_data(config.data)
    AcceleratorState._reset_state()  # else a second run in one process could not choose another precision
    accelerator = Accelerator(mixed_precision=config.precision)
    # device_specific: ranks must not share their draws of partners and dropout masks.
    set_seed(config.seed, device_specific=True)
    model = timm.create_model(config.model, **config.model_args)
    _check_fit(model, train_split)
    if config.batch_size * accelerator.num_processes > len(train_split):
        raise ValueError(f'batch_size={config.batch_size} is larger than the training set ({len(train_split)} images).')
    output = Path(config.output)
    checkpoint = _check_run_folder(output, config)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = timm.optim.create_optimizer_v2(
        model,
        opt=config.optimizer.name,
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        momentum=config.optimizer.momentum,
    )
    loader = _loader(train_split, config.batch_size, accelerator, config, shuffle=True)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * len(loader),
        lr_min=config.optimizer.lr * config.schedule.min_lr,
        warmup_t=round(config.schedule.warmup_epochs * len(loader)),
        warmup_prefix=False,
        t_in_epochs=False,
    )
    val_loader = _loader(val_split, config.eval_batch_size, accelerator, config)
    test_loader = _loader(test_split, config.eval_batch_size, accelerator, config)
    model, optimizer = accelerator.prepare(model, optimizer)

    accelerator.wait_for_everyone()  # every process has looked at the folder before one of them fills it
    if accelerator.is_main_process and not checkpoint:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / RECIPE, config.to_yaml())
    first_epoch = restore_checkpoint(accelerator, checkpoint) if checkpoint else 0
    metrics = _read_metrics(output, first_epoch)
    for epoch in range(first_epoch, config.epochs):
        record = _train_epoch(model, loader, objective, optimizer, schedule, accelerator, epoch, config.epochs)
        record |= evaluate(accelerator.unwrap_model(model), val_loader, prefix='val_')
        metrics.append(record)
        if accelerator.is_main_process:
            write_atomically(output / 'metrics.jsonl', ''.join(json.dumps(line) + '\n' for line in metrics))
            tqdm.write(
                f'epoch {epoch + 1}/{config.epochs}  loss {record["train_loss"]:.3f}  '
                f'val accuracy {record["val_accuracy"]:.4f}  logit std {record["val_logit_std"]:.1f}  '
                f'{record["images_per_second"]:.0f} images/s'
            )
        save_checkpoint(accelerator, output, epoch + 1)

    plain_model = accelerator.unwrap_model(model)
    test = evaluate(plain_model, test_loader, prefix='test_')
    result = {
        'model': config.model,
        'data': data_label(config.data),
        'seed': config.seed,
        'metrics': {**_final(metrics), **test},
        'recipe': {k: v for k, v in asdict(config).items() if k not in ('output', 'resume')},
        'seconds': round(sum(record['seconds'] for record in metrics), 1),
        'environment': environment(accelerator.device),
    }
    if accelerator.is_main_process:
        result['sha256'] = _save_weights(plain_model, output / 'model.safetensors')
        write_atomically(output / 'result.json', json.dumps(result, indent=2) + '\n')
        tqdm.write(f'test accuracy {test["test_accuracy"]:.4f} ({test["test_correct"]}/{test["test_n"]}) -> {output}')
    accelerator.end_training()
    return result


def _loader(split: Split, size: int, accelerator: Accelerator, config: TrainConfig, shuffle: bool = False):
    # Training batches are split over the processes; evaluation is small, and every process does all of it.
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if shuffle else (0, 1)
    return TensorLoader(split, size, accelerator.device, config.channels_last, shuffle, config.seed, rank, world_size)


def _check_fit(model: nn.Module, split: Split) -> None:
    """The model takes these images and has an output for every label."""
    labels = int(split.labels.max()) + 1
    classes = int(model.num_classes)  # type: ignore[arg-type]
    if classes < labels:
        raise ValueError(f'The model has {classes} classes, the data {labels}: set model_args.num_classes={labels}.')
    cfg: Any = model.pretrained_cfg
    if any(cfg['mean']) or any(std != 1 for std in cfg['std']):
        raise ValueError(
            f'This loop feeds pixels in [0, 1]; the model expects mean {cfg["mean"]} and std {cfg["std"]}. '
            'To train it on pixels: model_args.pretrained_cfg_overlay={mean: [0, 0, 0], std: [1, 1, 1]}.'
        )
    try:
        with torch.no_grad():
            model.eval()(split.images[:2].float() / 255)
    except RuntimeError as error:
        raise ValueError(
            f'The model does not take images of shape {list(split.images.shape[1:])}: {error}. Set model_args.in_chans '
            'and model_args.img_size, or choose other data.'
        ) from error
    model.train()


def _check_run_folder(output: Path, config: TrainConfig) -> Path | None:
    """The checkpoint to resume from; None for a new run, whose folder must be free."""
    if not config.resume:
        if output.exists() and any(output.iterdir()):
            raise ValueError(f'{str(output)!r} is not empty. Choose another --output, or go on with --resume true.')
        return None
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        raise ValueError(f'Nothing to resume: {str(output)!r} holds no checkpoint. Start without --resume.')
    saved, asked = (
        [line for line in recipe.splitlines() if not line.startswith('resume:')]
        for recipe in ((output / RECIPE).read_text(), config.to_yaml())
    )
    if saved != asked:
        pairs = zip_longest(saved, asked, fillvalue='')
        changes = [f'  saved {a.strip()!r}, asked for {b.strip()!r}' for a, b in pairs if a != b]
        raise ValueError('The recipe differs from that of the run to resume:\n' + '\n'.join(changes))
    return checkpoint


def _train_epoch(
    model: nn.Module,
    loader: TensorLoader,
    objective: Objective,
    optimizer: Any,
    schedule: CosineLRScheduler,
    accelerator: Accelerator,
    epoch: int,
    epochs: int,
) -> dict[str, Any]:
    model.train()
    loader.epoch = epoch
    losses = torch.zeros(len(loader), device=accelerator.device)
    started = time.perf_counter()
    hidden = None if accelerator.is_local_main_process else True  # None: shown on a terminal only
    progress = tqdm(loader, f'epoch {epoch + 1}/{epochs}', disable=hidden, leave=False, mininterval=1.0, unit='step')
    for step, (images, labels) in enumerate(progress):
        schedule.step_update(epoch * len(loader) + step)
        with accelerator.autocast():
            loss = objective(model, images, labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses[step] = loss.detach()  # read once an epoch: reading it here would stall a GPU every step
    mean_loss = losses.mean().item()
    if not torch.isfinite(losses).all():
        step = int((~torch.isfinite(losses)).nonzero()[0])
        raise FloatingPointError(
            f'The loss became {losses[step].item()} at step {step} of epoch {epoch + 1}. Lower optimizer.lr '
            f'({optimizer.param_groups[0]["lr"]:g} now); the checkpoint of the epoch before is intact.'
        )
    seconds = time.perf_counter() - started
    return {
        'epoch': epoch + 1,
        'step': (epoch + 1) * len(loader),
        'lr': optimizer.param_groups[0]['lr'],
        'train_loss': mean_loss,
        'images_per_second': round(len(loader) * loader.batch_size * accelerator.num_processes / seconds, 1),
        'seconds': round(seconds, 2),
    }


@torch.no_grad()
def evaluate(model: nn.Module, loader: TensorLoader, prefix: str = '') -> dict[str, Any]:
    """Accuracy and loss in float32, the spread of the logits, and the mean L2 norm in front of every activation.

    Norms and logit spread are there because BatchOut's stop-gradient can let features run away, which makes
    gradient-based attacks fail without making the net robust.
    """
    model.eval()
    norms: dict[str, list[Tensor]] = {}

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            norms.setdefault(name, []).append(args[0].float().flatten(1).norm(dim=1))

        return hook

    handles = [site.register_forward_pre_hook(watch(name)) for name, site in activation_sites(model).items()]
    try:
        outputs = [(model(images).float(), labels) for images, labels in loader]
    finally:
        for handle in handles:
            handle.remove()
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    correct = int((logits.argmax(1) == labels).sum())
    return {
        f'{prefix}accuracy': correct / len(labels),
        f'{prefix}correct': correct,
        f'{prefix}n': len(labels),
        f'{prefix}loss': F.cross_entropy(logits, labels).item(),
        f'{prefix}logit_std': logits.std().item(),
        f'{prefix}norms': {name: round(torch.cat(values).mean().item(), 2) for name, values in norms.items()},
    }


def _read_metrics(output: Path, epochs: int) -> list[dict[str, Any]]:
    path = output / 'metrics.jsonl'
    lines = path.read_text().splitlines() if path.is_file() else []
    return [record for record in map(json.loads, lines) if record['epoch'] <= epochs]


def _final(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    last = metrics[-1]
    return {name: last[name] for name in ('train_loss', 'val_accuracy', 'val_correct', 'val_n', 'val_loss')}


def _save_weights(model: nn.Module, path: Path) -> str:
    """Write safetensors; returns the file's sha256."""
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_suffix('.tmp')
    save_file(state_dict, temporary, metadata={'format': 'pt'})
    temporary.rename(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
