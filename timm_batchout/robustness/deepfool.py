"""DeepFool (Moosavi-Dezfooli et al., 2016) in L2, with the result after every iteration from one pass."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ['DeepFool', 'deepfool']


class DeepFool(NamedTuple):
    """One row per iteration, from 1 on.

    Attributes:
        right: (iterations, B) bool: still classified correctly after this many iterations.
        distance: (iterations, B) float32: L2 norm of the perturbation, in [0, 1] pixels.
        adversarial: (B, C, H, W): the images after the last iteration.
    """

    right: Tensor
    distance: Tensor
    adversarial: Tensor


def deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    iterations: int = 5,
    overshoot: float = 0.02,
    candidates: int = 10,
    clip: bool = True,
) -> DeepFool:
    """The results of foolbox's ``L2DeepFoolAttack(steps=i, overshoot, candidates)`` for every i up to ``iterations``.

    Each iteration takes one forward, and one backward per candidate class, instead of one of both per candidate class.
    Images that are fooled leave the batch.

    Args:
        model: Maps images in [0, 1] to logits (B, classes).
        images: (B, C, H, W), float32, in [0, 1].
        labels: (B,), int64. Images that are misclassified from the start are left unchanged.
        iterations: Number of iterations.
        overshoot: Go this share further than the linearised boundary.
        candidates: Number of most likely classes to consider.
        clip: Clip to [0, 1] at each iteration. False: as in the method's original code; the result may then leave
            [0, 1], and if most pixels are at 0 or 1 (MNIST), far fewer iterations are needed.
    """
    with torch.no_grad():
        logits = model(images)
    classes = logits.argsort(dim=1).flip(1)[:, :candidates]
    adversarial = images.clone()
    total = torch.zeros_like(images)
    active = torch.arange(len(images), device=images.device)
    right, distance = [], []
    for _ in range(iterations):
        x, order = adversarial[active].requires_grad_(), classes[active]
        logits = model(x)
        keep = logits.argmax(1) == labels[active]
        scores = logits.gather(1, order)
        margins = scores[:, 1:] - scores[:, :1]
        grads = [
            torch.autograd.grad(margins[:, k].sum(), x, retain_graph=k + 1 < margins.shape[1])[0]
            for k in range(margins.shape[1] if keep.any() else 0)
        ]
        active = active[keep]
        if len(active):
            step = _step(margins.detach()[keep], torch.stack([grad[keep] for grad in grads], 1))
            total[active] += step
            moved = images[active] + (1 + overshoot) * total[active]
            adversarial[active] = moved.clamp(0, 1) if clip else moved
        with torch.no_grad():
            still = torch.zeros(len(images), dtype=torch.bool, device=images.device)
            if len(active):
                still[active] = model(adversarial[active]).argmax(1) == labels[active]
        right.append(still)
        distance.append((adversarial - images).flatten(1).norm(dim=1))
    return DeepFool(torch.stack(right), torch.stack(distance), adversarial)


def _step(margins: Tensor, grads: Tensor) -> Tensor:
    """The step to the nearest linearised boundary: margins (B, K), grads (B, K, C, H, W) to (B, C, H, W)."""
    norms = grads.flatten(2).norm(dim=2)
    distances = margins.abs() / (norms + 1e-8)
    best = distances.argmin(1)
    rows = torch.arange(len(best), device=best.device)
    length = (distances[rows, best] + 1e-4) / (norms[rows, best] + 1e-8)
    return length.view(-1, 1, 1, 1) * grads[rows, best]
