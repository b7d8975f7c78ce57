"""Do the gradients tell the truth? Checks for gradient masking (Athalye et al., 2018; Carlini et al., 2019)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_batchout.pixels import seeded
from timm_batchout.robustness.report import Score, Variant
from timm_batchout.text import format_radius

__all__ = ['measure', 'misled', 'suspicions', 'verdict']

TOLERANCE = 0.05  # shares of images that differ by less say nothing at a few hundred images
REPEATABLE = 0.99
# FGSM above PGD on the six bundled nets: at most 0.57 where training was honest, 0.81 to 1 where it overfitted to FGSM.
SINGLE_STEP = 0.7
SMOOTH = 0.1  # on the same nets: 0.44 and more, and below 0.05
NEIGHBOURHOOD = 0.5  # farther away is another image, with a gradient of its own
INFORMATIVE = 0.1  # losses can be compared where PGD leaves as much
LOSSES = ('cross-entropy', 'scale-free', 'margin')
STRONGER = (  # the first of two should leave no more right than the second
    ('pgd', 'fgsm'),
    ('autoattack', 'fgsm'),
    ('autoattack', 'pgd'),
    ('pgd', 'transfer'),
    ('autoattack', 'transfer'),
    ('autoattack_l2', 'pgd_l2'),
    ('ddn', 'pgd_l2'),
)


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radii: Sequence[float] = (),
    steps: int = 20,
    seed: int = 0,
    source: nn.Module | None = None,
) -> dict[str, Any]:
    """What the gradients of a model look like around some images that it classifies right.

    Args:
        model: ``PixelModel``: [0, 1] images to logits.
        images: (B, C, H, W), floating, in [0, 1]. A hundred or more.
        labels: (B,), int64.
        radii: L-infinity, in [0, 1] pixels; none above 0: 8/255.
        steps: Of PGD.
        seed: Of its random starts, and of what the model draws.
        source: ``PixelModel`` whose PGD images are tried as well.

    Returns:
        ``n`` (images classified right; no more if 0), ``radii`` (for each: what FGSM, and PGD on the cross-entropy,
        leave right), ``radius`` (the one of them where PGD leaves nearest to half right, for what follows), ``steps``,
        ``logit_std``, ``zero_gradients`` and ``non_finite_gradients`` (shares), ``repeatability`` (cosine of the
        gradients of the same image, twice), ``smoothness`` (of an image and a random neighbour within the largest
        radius, ``neighbourhood``), ``pgd`` (what PGD leaves right, by loss), ``unbounded`` (the same at radius 1) and,
        with a source, ``transfer`` (what its PGD images leave right).
    """
    with seeded(seed):
        return _measure(model, images, labels, sorted({r for r in radii if r > 0}) or [8 / 255], steps, seed, source)


def _measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radii: list[float],
    steps: int,
    seed: int,
    source: nn.Module | None,
) -> dict[str, Any]:
    with torch.no_grad():
        logits = model(images)
    right = logits.argmax(1) == labels
    images, labels, logits = images[right], labels[right], logits[right]
    if len(images) == 0:
        return {'n': 0}
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty_like(images, device='cpu').uniform_(-1, 1, generator=generator).to(images.device)

    def start(radius: float) -> Tensor:
        return (images + radius * noise).clamp(0, 1)

    def pgd(radius: float, loss: str, source: nn.Module = model) -> float:
        return _pgd(model, images, labels, start(radius), radius, steps, loss, source)

    neighbourhood = min(radii[-1], NEIGHBOURHOOD)
    first, second, beside = (
        _gradient(model, x, labels, LOSSES[0]).flatten(1) for x in (images, images, start(neighbourhood))
    )
    finite = torch.isfinite(first).all(1)
    tried: list[dict[str, float]] = []
    # Where PGD leaves nothing at any radius, all losses are alike: on to smaller ones, within reason.
    smaller = [radii[0] / 2**i for i in range(1, 5)]
    for radius in [*reversed(radii), *smaller]:
        if radius in smaller and max(entry['pgd'] for entry in tried) >= INFORMATIVE:
            break
        stepped = (images + radius * first.view_as(images).nan_to_num().sign()).clamp(0, 1)
        tried.append({'radius': radius, 'fgsm': _share_right(model, stepped, labels), 'pgd': pgd(radius, LOSSES[0])})
    radius = min(tried, key=lambda entry: abs(entry['pgd'] - 0.5))['radius']
    return {
        'n': len(images),
        'radii': tried,
        'radius': radius,
        'steps': steps,
        'logit_std': logits.std().item(),
        'zero_gradients': (first == 0).all(1).float().mean().item(),
        'non_finite_gradients': (~finite).float().mean().item(),
        'repeatability': _cosine(first[finite], second[finite]),
        'neighbourhood': neighbourhood,
        'smoothness': _cosine(first[finite], beside[finite]),
        'pgd': {loss: pgd(radius, loss) for loss in LOSSES},
        'unbounded': {loss: _pgd(model, images, labels, images, 1.0, 2 * steps, loss, model) for loss in LOSSES},
        **({} if source is None else {'transfer': pgd(radius, LOSSES[0], source)}),
    }


def suspicions(
    measured: dict[str, Any],
    scores: Sequence[Score] = (),
    right: Mapping[tuple[str, Variant], Sequence[int]] | None = None,
) -> list[str]:
    """What does not fit with honest gradients, in words; empty where nothing does.

    Args:
        measured: What ``measure`` found.
        scores: Of the attacks, which should be ordered by their strength.
        right: Image by image, by ``Score.key``, so that attacks on more and on fewer images are compared on the same.
    """
    if measured['n'] == 0:
        return []
    found = []
    for name in ('zero_gradients', 'non_finite_gradients'):
        if measured[name] > 0.01:
            found.append(f'{measured[name]:.0%} of the images have {name.replace("_", " ")}')
    if _random(measured):
        found.append(f'the gradient is random (cosine {measured["repeatability"]:.2f} of the same image, twice)')
    if measured['smoothness'] < SMOOTH:
        found.append(
            f'neighbours within {measured["neighbourhood"]:.4g} have other gradients (cosine '
            f'{measured["smoothness"]:.2f})'
        )
    apart = max(measured['radii'], key=lambda entry: entry['fgsm'] - entry['pgd'])
    if apart['fgsm'] - apart['pgd'] > SINGLE_STEP:
        found.append(f'at {apart["radius"]:.4g} FGSM leaves {apart["fgsm"]:.1%} right, PGD {apart["pgd"]:.1%}')
    pgd = measured['pgd']
    best = min(pgd, key=pgd.__getitem__)
    if pgd['cross-entropy'] - pgd[best] > TOLERANCE:
        found.append(
            f'PGD on the cross-entropy leaves {pgd["cross-entropy"]:.1%} right, on the {best} loss {pgd[best]:.1%}'
        )
    if pgd['cross-entropy'] - measured.get('transfer', 1) > TOLERANCE:
        found.append(f"PGD leaves {pgd['cross-entropy']:.1%} right, another net's images {measured['transfer']:.1%}")
    unbounded = measured['unbounded']
    if unbounded['cross-entropy'] > TOLERANCE:
        found.append(f'an attack without bounds leaves {unbounded["cross-entropy"]:.1%} right')
    return found + _disorder(scores, right or {})


def _disorder(scores: Sequence[Score], right: Mapping[tuple[str, Variant], Sequence[int]]) -> list[str]:
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
    by_attack: dict[str, dict[float, Score]] = {}
    for score in scores:
        if score.norm and score.radius is not None:
            by_attack.setdefault(score.attack, {})[score.radius] = score  # '0.1' is '0.10'
    for attack, by_radius in by_attack.items():
        ordered = [score for _, score in sorted(by_radius.items())]
        if any(excess(larger, smaller) for smaller, larger in pairwise(ordered)):
            found.append(f'accuracy under {attack} rises with the radius')
    for strong, weak in STRONGER:
        for radius, score in by_attack.get(strong, {}).items():
            other = by_attack.get(weak, {}).get(radius)
            if other and excess(score, other):
                found.append(f'{weak} at {format_radius(radius)} does more than {strong}')
    return found


def misled(loss: str, measured: dict[str, Any], found: Sequence[str]) -> bool:
    """Do attacks along the gradient of this loss (``Attack.loss``) overstate robustness?

    Large logits spare the margin's; AutoAttack's several losses, and its queries, are spared by all but randomness.
    """
    if not loss or not measured['n']:
        return False
    if loss == 'several':
        return _random(measured)
    if loss == 'margin':
        return _random(measured) or measured['unbounded'][loss] > TOLERANCE
    return bool(found)


def verdict(measured: dict[str, Any], found: Sequence[str]) -> str:
    """In plain words."""
    if not measured['n']:
        return 'nothing to check: no image was classified right.'
    if not found:
        return 'no sign of it.'
    attacks = 'FGSM, PGD and AutoAttack' if _random(measured) else 'FGSM and PGD'
    return f'LIKELY: {"; ".join(found)}. {attacks} figures overstate robustness.'


def _random(measured: dict[str, Any]) -> bool:
    return measured['repeatability'] < REPEATABLE


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
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    radius: float,
    steps: int,
    loss: str,
    source: nn.Module,
) -> float:
    """The share of images that stay right at the end of every step: foolbox has no PGD on these losses.

    The gradients are those of ``source``.
    """
    x, right = start, torch.ones(len(images), dtype=torch.bool, device=images.device)
    for _ in range(steps):
        step = 2.5 / steps * radius * _gradient(source, x, labels, loss).nan_to_num().sign()
        x = torch.minimum(torch.maximum(x + step, images - radius), images + radius).clamp(0, 1)
        with torch.no_grad():
            right &= model(x).argmax(1) == labels
    return right.float().mean().item()


@torch.no_grad()
def _share_right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean over the images that have a gradient; 1 where none has."""
    some = (a != 0).any(1) & (b != 0).any(1)
    if not some.any():
        return 1.0
    scale = a[some].abs().amax(1, keepdim=True)  # tiny gradients would underflow in the norm
    return F.cosine_similarity(a[some] / scale, b[some] / b[some].abs().amax(1, keepdim=True)).mean().item()
