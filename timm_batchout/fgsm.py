"""The Fast Gradient Sign Method (Goodfellow et al., 2014; paper, Eq. 4), for training and for evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['fgsm']


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
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        loss = F.cross_entropy(model(images), labels, reduction='sum')
        (gradient,) = torch.autograd.grad(loss, images)
    return (images.detach() + epsilon * gradient.sign()).clamp_(0, 1)
