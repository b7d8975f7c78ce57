"""Do the gradients tell the truth? Checks for gradient masking (Athalye et al., 2018; Carlini et al., 2019)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_batchout.robustness.report import Score

__all__ = ['measure', 'misled', 'suspicions', 'verdict']

TOLERANCE = 0.05  # shares of images that differ by less say nothing at a few hundred images
REPEATABLE = 0.99
LOSSES = ('cross-entropy', 'scale-free', 'margin')


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, radius: float = 8 / 255, steps: int = 20, seed: int = 0
) -> dict[str, Any]:
    """What the gradients of a model look like around some images that it classifies right.

    Args:
        model: ``PixelModel``: [0, 1] images to logits.
        images: (B, C, H, W), floating, in [0, 1]. A hundred or more.
        labels: (B,), int64.
        radius: Of PGD, L-infinity, in [0, 1] pixels.
        steps: Of PGD.
        seed: Of its random starts.

    Returns:
        ``n`` (images classified right), ``logit_std``, ``zero_gradients`` and ``non_finite_gradients`` (shares),
        ``repeatability`` (cosine of the gradients of the same image, twice), ``smoothness`` (of an image and a random
        neighbour within the radius), ``pgd`` (what PGD leaves right, by loss) and ``unbounded`` (the same at radius 1).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logits = model(images)
    right = logits.argmax(1) == labels
    images, labels, logits = images[right], labels[right], logits[right]
    if len(images) == 0:
        return {'n': 0}
    noise = torch.empty_like(images, device='cpu').uniform_(-1, 1, generator=generator).to(images.device)
    neighbours = (images + radius * noise).clamp(0, 1)
    first, second, beside = (_gradient(model, x, labels, LOSSES[0]).flatten(1) for x in (images, images, neighbours))
    finite = torch.isfinite(first).all(1)
    return {
        'n': len(images),
        'radius': radius,
        'steps': steps,
        'logit_std': logits.std().item(),
        'zero_gradients': (first == 0).all(1).float().mean().item(),
        'non_finite_gradients': (~finite).float().mean().item(),
        'repeatability': _cosine(first[finite], second[finite]),
        'smoothness': _cosine(first[finite], beside[finite]),
        'pgd': {loss: _pgd(model, images, labels, neighbours, radius, steps, loss) for loss in LOSSES},
        'unbounded': {loss: _pgd(model, images, labels, images, 1.0, 2 * steps, loss) for loss in LOSSES},
    }


def suspicions(
    measured: dict[str, Any], scores: Sequence[Score] = (), right: Mapping[tuple[str, str], Sequence[int]] | None = None
) -> list[str]:
    """What does not fit with honest gradients, in words; empty where nothing does.

    Args:
        measured: What ``measure`` found.
        scores: Of the attacks, which should be ordered by their strength.
        right: Image by image, by ``Score.key``, so that attacks on more and on fewer images are compared on the same.
    """
    found = []
    if measured['n'] == 0:
        return ['no image was classified right: there is nothing to check']
    for name in ('zero_gradients', 'non_finite_gradients'):
        if measured[name] > 0.01:
            found.append(f'{measured[name]:.0%} of the images have {name.replace("_", " ")}')
    if measured['repeatability'] < REPEATABLE:
        found.append(f'the gradient is random (cosine {measured["repeatability"]:.2f} of the same image, twice)')
    pgd = measured['pgd']
    best = min(pgd, key=pgd.__getitem__)
    if pgd['cross-entropy'] - pgd[best] > TOLERANCE:
        found.append(
            f'PGD on the cross-entropy leaves {pgd["cross-entropy"]:.1%} right, on the {best} loss {pgd[best]:.1%}'
        )
    unbounded = measured['unbounded']
    if unbounded['cross-entropy'] > TOLERANCE:
        found.append(f'an attack without bounds leaves {unbounded["cross-entropy"]:.1%} right')
    return found + _disorder(scores, right or {})


def _disorder(scores: Sequence[Score], right: Mapping[tuple[str, str], Sequence[int]]) -> list[str]:
    """Stronger attacks that do less."""

    def excess(strong: Score, weak: Score) -> bool:
        """More images withstand the stronger attack, of those that both were run on."""
        if not right:
            return strong.accuracy - weak.accuracy > TOLERANCE
        pairs = list(zip(right[strong.key], right[weak.key], strict=False))  # as many as both have
        more, fewer = (sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
        # McNemar's test, three standard deviations: what a few images do by chance is no sign.
        return more - fewer > max(0.01 * len(pairs), 3 * (more + fewer) ** 0.5)

    found = []
    by_attack: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.norm and score.radius is not None:
            by_attack.setdefault(score.attack, {})[score.variant] = score
    for attack, variants in by_attack.items():
        ordered = sorted(variants.values(), key=lambda score: score.radius or 0)
        if any(excess(larger, smaller) for smaller, larger in pairwise(ordered)):
            found.append(f'accuracy under {attack} rises with the radius')
    for strong, weak in (('pgd', 'fgsm'), ('autoattack', 'pgd'), ('pgd', 'transfer'), ('autoattack_l2', 'pgd_l2')):
        for variant, score in by_attack.get(strong, {}).items():
            other = by_attack.get(weak, {}).get(variant)
            if other and excess(score, other):
                found.append(f'{weak} at {variant} does more than {strong}')
    return found


def misled(loss: str, measured: dict[str, Any], found: Sequence[str]) -> bool:
    """Do attacks along the gradient of this loss overstate robustness? Large logits spare the margin's."""
    if loss == 'margin' and measured['n']:
        return measured['repeatability'] < REPEATABLE or measured['unbounded'][loss] > TOLERANCE
    return bool(loss and found)


def verdict(found: Sequence[str]) -> str:
    if not found:
        return 'no sign of it.'
    return f'LIKELY: {"; ".join(found)}. FGSM and PGD figures overstate robustness.'


def _gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> Tensor:
    x = images.detach().requires_grad_()
    logits = model(x)
    if loss == 'margin':
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        value = (others - logits.gather(1, labels[:, None])[:, 0]).sum()
    else:
        if loss == 'scale-free':
            logits = logits / logits.detach().std(1, keepdim=True).clamp_min(1e-12)
        value = F.cross_entropy(logits, labels, reduction='sum')
    return torch.autograd.grad(value, x)[0]


def _pgd(
    model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, radius: float, steps: int, loss: str
) -> float:
    """The share of images that stay right at the end of every step: foolbox has no PGD on these losses."""
    x, right = start, torch.ones(len(images), dtype=torch.bool, device=images.device)
    for _ in range(steps):
        step = 2.5 / steps * radius * _gradient(model, x, labels, loss).nan_to_num().sign()
        x = torch.minimum(torch.maximum(x + step, images - radius), images + radius).clamp(0, 1)
        with torch.no_grad():
            right &= model(x).argmax(1) == labels
    return right.float().mean().item()


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean over the images that have a gradient; 1 where none has."""
    some = (a != 0).any(1) & (b != 0).any(1)
    if not some.any():
        return 1.0
    scale = a[some].abs().amax(1, keepdim=True)  # tiny gradients would underflow in the norm
    return F.cosine_similarity(a[some] / scale, b[some] / b[some].abs().amax(1, keepdim=True)).mean().item()
