"""The Fast Gradient Sign Method (Goodfellow et al., 2014; paper, Eq. 4), for training and for evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['fgsm', 'gradient_sign']


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``images + epsilon * sign(gradient of the cross-entropy)``, clipped to [0, 1].

    Args:
        model: Takes images in [0, 1] to logits (B, classes). Its mode (train or eval) is the caller's choice; its
            parameters' gradients stay untouched.
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
