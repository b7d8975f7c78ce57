"""Accuracy of a model on a split while it trains: per image, on all processes together, each image once."""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from timm_batchout.sites import activation_sites
from timm_batchout.training.data import TensorLoader

__all__ = ['score']


@torch.no_grad()
def score(model: nn.Module, loader: TensorLoader, accelerator: Accelerator, prefix: str = '') -> dict[str, Any]:
    """Accuracy and loss in float32, the spread of the logits, and the mean L2 norm in front of every activation.

    Norms and logit spread are there because BatchOut's stop-gradient can let features run away, which makes
    gradient-based attacks fail without making the net robust.

    Args:
        model: Not wrapped for distribution; every process has the same.
        loader: This process's share of the images, every ``world_size``-th one.
        accelerator: Joins the shares.
        prefix: Of the names in the result.

    Returns:
        ``{prefix}accuracy``, ``correct``, ``n``, ``loss``, ``logit_std`` and ``norms``, of all images.
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
    logits, labels = (_all(torch.cat(parts), loader.total, accelerator) for parts in zip(*outputs, strict=True))
    correct = int((logits.argmax(1) == labels).sum())
    means = {name: torch.cat(values).mean() for name, values in norms.items()}
    return {
        f'{prefix}accuracy': correct / len(labels),
        f'{prefix}correct': correct,
        f'{prefix}n': len(labels),
        f'{prefix}loss': F.cross_entropy(logits, labels).item(),
        f'{prefix}logit_std': logits.std().item(),
        f'{prefix}norms': {name: round(accelerator.reduce(mean, 'mean').item(), 2) for name, mean in means.items()},
    }


def _all(share: Tensor, total: int, accelerator: Accelerator) -> Tensor:
    """The rows of all processes in the order of the images. Shares differ by one row at most."""
    world = accelerator.num_processes
    if world == 1:
        return share
    longest = -(-total // world)
    padded = torch.cat([share, share[:1].expand(longest - len(share), *share.shape[1:])])
    gathered = accelerator.gather(padded.contiguous()).unflatten(0, (world, longest))
    return gathered.transpose(0, 1).flatten(0, 1)[:total]
