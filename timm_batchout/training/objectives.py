"""A batch becomes a loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_batchout.pixels import fgsm
from timm_batchout.training.config import ObjectiveConfig

__all__ = ['make_objective']

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


def make_objective(config: ObjectiveConfig) -> Objective:
    """``objective(model, images, labels) -> mean loss`` of a mini-batch, to call backward on."""
    smoothing = config.label_smoothing
    if config.name == 'plain':
        return lambda model, images, labels: plain(model, images, labels, smoothing)
    return lambda model, images, labels: fgsm_training(model, images, labels, config.epsilon, smoothing)


def plain(model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


def fgsm_training(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, label_smoothing: float = 0.0
) -> Tensor:
    """Half of the mini-batch is replaced by its FGSM images of the net at this instant (paper, section 6.2)."""
    half = len(images) // 2
    # In eval mode: the net that an attacker would see, without dropout or BatchOut.
    model.eval()
    adversarial = fgsm(model, images[:half], labels[:half], epsilon)
    model.train()
    return plain(model, torch.cat([adversarial, images[half:]]), labels, label_smoothing)
