"""[0, 1] pixels in, logits out: the wrapper through which every part of the package feeds images to a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    'PixelModel',
    'fgsm',
    'frozen',
    'gradient_sign',
    'modes_kept',
    'normalization',
    'seeded',
    'stated_cfg',
    'states_normalization',
]


class PixelModel(nn.Module):
    """A model in eval mode with its normalisation inside.

    Args:
        model: Any classifier. It is put in eval mode; a training loop sets the mode it needs.
        cfg: A dict with ``mean`` and ``std`` per channel; None: ``normalization(model)``.
        channels_last: Pass the images on in that memory format: convolutions are faster, but a model that needs
            contiguous images (``x.view``) fails.

    Shape:
        Images (B, C, H, W), floating, in [0, 1] pixels; to float32 logits (B, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, cfg: dict[str, Any] | None = None, channels_last: bool = False):
        super().__init__()
        self.model = model
        self.channels_last = channels_last
        mean, std = (cfg['mean'], cfg['std']) if cfg else normalization(model)
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        logits = self.model(x).float()
        if images.requires_grad and not logits.requires_grad:  # no path for gradients: they are zero
            logits = logits + 0 * images.sum()
        return logits


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that a model expects, for training, validation and evaluation alike.

    Args:
        model: A timm model, or one inside ``DataParallel``, ``ModelEmaV3``, ``AveragedModel``, ``torch.compile`` and
            other wrappers that hold it as ``module``.

    Returns:
        ``mean`` and ``std`` of its ``pretrained_cfg``; ``(0.0,)`` and ``(1.0,)`` for a model without them, which is
        given plain [0, 1] pixels.
    """
    cfg = stated_cfg(model)
    return tuple(cfg.get('mean') or (0.0,)), tuple(cfg.get('std') or (1.0,))


def states_normalization(model: nn.Module) -> bool:
    """Whether the model states its normalisation; otherwise plain [0, 1] pixels are assumed."""
    return bool(stated_cfg(model).get('mean') and stated_cfg(model).get('std'))


def stated_cfg(model: nn.Module) -> dict[str, Any]:
    """The ``pretrained_cfg`` of a timm model, found through wrappers; empty if the model has none."""
    inner: Any = model
    while isinstance(inner, nn.Module) and not getattr(inner, 'pretrained_cfg', None):
        inner = getattr(inner, '_orig_mod', None) or getattr(inner, 'module', None)
    cfg = getattr(inner, 'pretrained_cfg', None) or {}
    return cfg if isinstance(cfg, dict) else cfg.to_dict()


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``images + epsilon * sign(gradient of the cross-entropy)``, clipped to [0, 1].

    Args:
        model: Takes images in [0, 1] to logits (B, classes). Its mode (train or eval) is the caller's choice, and
            the gradients of its parameters are left alone.
        images: (B, C, H, W), floating, in [0, 1].
        labels: (B,), int64.
        epsilon: L-infinity radius in [0, 1] pixels.

    Returns:
        Adversarial images, detached, shape and dtype of ``images``.
    """
    return (images.detach() + epsilon * gradient_sign(model, images, labels)).clamp_(0, 1)


def gradient_sign(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Sign of the cross-entropy's gradient w.r.t. the images: -1, 0 or 1, shape and dtype of ``images``."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        loss = F.cross_entropy(model(images), labels, reduction='sum')
        return torch.autograd.grad(loss, images)[0].sign()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of the weights: attacks need those of the images only, and the others cost half as much again."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Restore the mode of every layer: a frozen BatchNorm of a net in training stays in eval mode."""
    modes = [(layer, layer.training) for model in models for layer in model.modules()]
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators, and restore them afterwards: attacks draw from them, and some seed them."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
