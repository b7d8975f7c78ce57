"""Accuracy of a model on a split during training: all processes together, each image once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from timm_batchout.data.memory import TensorLoader
from timm_batchout.data.workers import TimmLoader
from timm_batchout.pixels import PixelModel, seeded
from timm_batchout.sites import activation_sites
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.objectives import robust_correct

__all__ = ['in_float32', 'robust_score', 'score']


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Suspend the autocast that Accelerate sets around the forward of a model (and of its moving average)."""
    wrapped = model.__dict__.pop('forward', None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


@torch.no_grad()
def score(
    model: nn.Module, loader: TensorLoader | TimmLoader, accelerator: Accelerator, prefix: str = ''
) -> dict[str, Any]:
    """Accuracy and loss in float32, the spread of the logits, and the mean L2 norm in front of every activation.

    Norms and logit spread are recorded because BatchOut's stop-gradient can let features grow without bound, which
    makes gradient-based attacks fail without making the net robust.

    Args:
        model: The unwrapped model, the same on every process.
        loader: This process's share of the images.
        accelerator: Gathers the shares.
        prefix: Prefix of the names in the result.

    Returns:
        ``{prefix}accuracy``, ``correct``, ``n``, ``loss``, ``logit_std`` and ``norms``, over all images.
    """
    pixel_model = PixelModel(model).to(accelerator.device)
    sites = activation_sites(model)
    norms = torch.zeros(len(sites), 2, device=accelerator.device, dtype=torch.float64)  # sum and count

    def watch(row: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            row.add_(torch.stack([args[0].float().flatten(1).norm(dim=1).sum(), row.new_tensor(len(args[0]))]))

        return hook

    handles = [site.register_forward_pre_hook(watch(row)) for site, row in zip(sites.values(), norms, strict=True)]
    logits = torch.zeros(0, int(model.num_classes), device=accelerator.device)  # type: ignore[arg-type]
    labels = torch.zeros(0, dtype=torch.int64, device=accelerator.device)
    outputs = [(logits, labels)]  # a process may have no image
    try:
        with in_float32(model):
            for images, targets in loader:
                outputs.append((pixel_model(images), targets))
            for _ in range(_forwards(len(loader), accelerator) - len(loader)):
                pixel_model(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    logits, labels = (_all(torch.cat(parts), accelerator) for parts in zip(*outputs, strict=True))
    correct = int((logits.argmax(1) == labels).sum())
    sums = dict(zip(sites, accelerator.reduce(norms, 'sum').tolist(), strict=True))
    return {
        f'{prefix}accuracy': correct / len(labels),
        f'{prefix}correct': correct,
        f'{prefix}n': len(labels),
        f'{prefix}loss': F.cross_entropy(logits, labels).item(),
        f'{prefix}logit_std': logits.std().item(),
        f'{prefix}norms': {name: round(total / count, 2) for name, (total, count) in sums.items() if count},
    }


def robust_score(
    model: nn.Module, loader: TensorLoader | TimmLoader, accelerator: Accelerator, config: TrainConfig
) -> dict[str, Any]:
    """Accuracy in float32 under PGD on the first images of a split.

    Args:
        model: The unwrapped model, the same on every process.
        loader: This process's share of the images.
        accelerator: Sums over the processes.
        config: Its ``robust_val`` says how many images and which attack, at the radius of its ``objective`` by default.

    Returns:
        ``val_robust_accuracy``, ``val_robust_correct`` and ``val_robust_n``, over all processes.
    """
    robust_val, objective = config.robust_val, config.objective
    pixel_model = PixelModel(model).to(accelerator.device)
    epsilon = robust_val.epsilon or objective.epsilon
    counts = torch.zeros(2, device=accelerator.device)
    left = -(-robust_val.images // accelerator.num_processes)
    with seeded(config.seed), in_float32(model):
        for images, labels in loader:
            images, labels = images[:left], labels[:left]
            left -= len(labels)
            if len(labels):
                right = robust_correct(pixel_model, images, labels, epsilon, objective.norm, robust_val.steps)
                counts += counts.new_tensor([int(right.sum()), len(labels)])
    correct, n = accelerator.reduce(counts, 'sum').tolist()
    return {'val_robust_accuracy': correct / n, 'val_robust_correct': int(correct), 'val_robust_n': int(n)}


def _all(share: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all processes, whose shares may differ in length."""
    if accelerator.num_processes == 1:
        return share
    lengths = accelerator.gather(torch.tensor([len(share)], device=share.device)).tolist()
    parts = accelerator.gather(accelerator.pad_across_processes(share)).split(max(lengths))
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _forwards(own: int, accelerator: Accelerator) -> int:
    """The number of forwards this process must take part in: with FSDP, as many as any other process."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return 0
    return int(accelerator.gather(torch.tensor([own], device=accelerator.device)).max())
