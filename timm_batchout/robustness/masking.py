"""The audit for gradient masking (Athalye et al., 2018; Carlini et al., 2019): can the gradients be trusted?"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_batchout.pixels import frozen, seeded
from timm_batchout.robustness.report import Audit, Score, Variant
from timm_batchout.text import format_radius

__all__ = ['judge', 'measure', 'misled']

RIGHT_IMAGES = 100  # the most images that are examined
ENOUGH = 50  # with fewer, chance looks like masking: honest nets were accused at 10 and 20 images, none from 50 on
# In [0, 1] pixels: from where nets are first fooled to where hardly an image is left.
RADII = (1 / 1020, 1 / 510, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 0.1, 0.2, 0.3, 0.5)
STEPS = 20  # gradient steps of PGD
QUERIES = 500  # queries of the gradient-free attack
UNBOUNDED = 0.05  # share of the images that an attack without bounds may leave right
REPEATABLE = 0.99
# The limits below lie between the planted and the honest nets of recipes/audit/planted.py.
OVERFITTED = 2.5  # FGSM leaves half right at this multiple of the radius where PGD does; honest nets: up to 1
NO_GRADIENT = 0.05  # share of the images; honest nets with large logits: 0.04
SMOOTH = 0.1  # cosine; honest nets: 0.85 and more, and 0.25 beyond the training radius of an adversarially trained one
OTHER_LOSS = 0.15  # share of the images; label smoothing without masking: up to 0.1
QUERIED = 0.09  # share of the images that gradients leave; honest nets: up to 4 images, 0.087
ENOUGH_LEFT = 0.2
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


def measure(model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0, source: nn.Module | None = None) -> Audit:
    """Measure the gradients of a model around images that it classifies correctly, and list signs of masking.

    The measurements do not depend on the attacks of a report; the radius to examine is found by bisection.

    Args:
        model: ``PixelModel``: maps images in [0, 1] to logits.
        images: (B, C, H, W), floating, in [0, 1]. Up to a hundred that are classified correctly are used.
        labels: (B,), int64.
        seed: Seed of random starts and queries, and of anything the model draws.
        source: A ``PixelModel`` whose PGD images are also tried.

    Returns:
        Measurements and suspicions, without a verdict. Only the number of images if nothing can be concluded, with
        fewer than 50 images or the same logits for every image.
    """
    with seeded(seed), torch.no_grad():
        logits = model(images)
    right = (logits.argmax(1) == labels).nonzero()[:RIGHT_IMAGES, 0]
    constant = len(images) > 1 and bool((logits == logits[:1]).all())
    if len(right) < ENOUGH or constant:
        return Audit(n=len(right), constant=constant)
    with seeded(seed), frozen(model):
        return _measure(model, images[right], labels[right], logits[right].std().item(), seed, source)


def _measure(
    model: nn.Module, images: Tensor, labels: Tensor, logit_std: float, seed: int, source: nn.Module | None
) -> Audit:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty_like(images, device='cpu').uniform_(-1, 1, generator=generator).to(images.device)
    first, second = (_gradient(model, images, labels, LOSSES[0]) for _ in range(2))
    sign = first.nan_to_num().sign()
    fgsm = {radius: _right(model, (images + radius * sign).clamp(0, 1), labels) for radius in RADII}

    def pgd(radius: float, loss: str, source: nn.Module = model) -> Tensor:
        start = (images + radius * noise).clamp(0, 1)
        return _pgd(model, images, labels, start, radius, STEPS, loss, source)

    tried = _bisected(lambda radius: pgd(radius, LOSSES[0]))
    radius = _telling(tried)
    by_loss = {LOSSES[0]: tried[radius], **{loss: pgd(radius, loss) for loss in LOSSES[1:]}}
    unbounded = {loss: _share(_pgd(model, images, labels, images, 1.0, 2 * STEPS, loss, model)) for loss in LOSSES}
    transferred = None if source is None else pgd(radius, LOSSES[0], source)
    left = torch.stack(list(by_loss.values())).all(0)
    taken = _taken_by_queries(model, images[left], labels[left], radius, seed)
    beside = (images + radius * noise).clamp(0, 1)
    moved = (beside != images).flatten(1)  # clipped pixels keep their gradient and would hide the others
    there = _gradient(model, beside, labels, LOSSES[0]).flatten(1)
    flat, finite = first.flatten(1), torch.isfinite(first).flatten(1).all(1)
    audit = Audit(
        n=len(images),
        radius=radius,
        radii=[{'radius': r, 'fgsm': _share(fgsm[r]), 'pgd': _share(tried[r]) if r in tried else None} for r in RADII],
        steps=STEPS,
        logit_std=logit_std,
        zero_gradients=(flat == 0).all(1).float().mean().item(),
        non_finite_gradients=(~finite).float().mean().item(),
        repeatability=_cosine(flat[finite], second.flatten(1)[finite]),
        smoothness=_cosine((flat * moved)[finite], (there * moved)[finite]),
        pgd={loss: _share(mask) for loss, mask in by_loss.items()},
        unbounded=unbounded,
        transfer=None if transferred is None else _share(transferred),
        queries=QUERIES if taken is not None else 0,
        left=int(left.sum()),
        taken=taken or 0,
    )
    audit.suspicions = [
        *_of_gradients(audit),
        *_of_single_steps(fgsm, tried),
        *_of_losses(by_loss, transferred),
        *_of_extremes(audit),
    ]
    return audit


def _of_gradients(audit: Audit) -> list[str]:
    found = []
    for name in ('zero_gradients', 'non_finite_gradients'):
        share = getattr(audit, name)
        if share > NO_GRADIENT:
            found.append(f'{share:.0%} of the images have {name.replace("_", " ")}')
    if audit.repeatability < REPEATABLE:
        found.append(f'the gradient is random (cosine {audit.repeatability:.2f} between two computations)')
    if audit.smoothness < SMOOTH:
        found.append(
            f'gradients differ between neighbours within {format_radius(audit.radius)} (cosine {audit.smoothness:.2f})'
        )
    return found


def _of_single_steps(fgsm: Mapping[float, Tensor], pgd: Mapping[float, Tensor]) -> list[str]:
    """FGSM accuracy far above PGD's (a net that overfitted to FGSM), or below it.

    An image that PGD fools within a radius is fooled within every larger one, so the radii need not be equal.
    """
    found = []
    halved = min((radius for radius in pgd if _share(pgd[radius]) <= 0.5), default=1.0)
    for radius in sorted(fgsm, reverse=True):
        if radius >= OVERFITTED * halved and _share(fgsm[radius]) > 0.5:
            found.append(
                f'FGSM leaves {_share(fgsm[radius]):.0%} right at {format_radius(radius)}, PGD '
                f'{_share(pgd[halved]):.0%} at {format_radius(halved)}'
            )
            break
    for larger, strong in sorted(pgd.items(), reverse=True):
        for radius, weak in sorted(fgsm.items()):
            if radius <= larger and more(strong, weak):
                return [
                    *found,
                    f'PGD leaves {_share(strong):.0%} right at {format_radius(larger)}, FGSM {_share(weak):.0%} at '
                    f'{format_radius(radius)}',
                ]
    return found


def _of_losses(by_loss: Mapping[str, Tensor], transferred: Tensor | None) -> list[str]:
    usual = by_loss[LOSSES[0]]
    best = min(by_loss, key=lambda loss: _share(by_loss[loss]))
    found = []
    if _share(usual) - _share(by_loss[best]) > OTHER_LOSS and more(usual, by_loss[best]):
        found.append(
            f'PGD on the cross-entropy leaves {_share(usual):.0%} right, on the {best} loss {_share(by_loss[best]):.0%}'
        )
    if transferred is not None and more(usual, transferred):
        found.append(f"PGD leaves {_share(usual):.0%} right, another net's images {_share(transferred):.0%}")
    return found


def _of_extremes(audit: Audit) -> list[str]:
    found = []
    if audit.unbounded[LOSSES[0]] > UNBOUNDED:
        found.append(f'an attack without bounds leaves {audit.unbounded[LOSSES[0]]:.0%} right')
    if _too_many(audit.taken, audit.left):
        found.append(
            f'{audit.queries} queries without gradients fool {audit.taken} of {audit.left} images that PGD leaves right'
        )
    return found


def judge(
    audit: Audit, scores: Sequence[Score] = (), right: Mapping[tuple[str, Variant], Sequence[int]] | None = None
) -> Audit:
    """Compare the attacks of the report with each other, and state the verdict.

    Args:
        audit: The result of ``measure``.
        scores: Scores of the attacks, whose order should follow their strength.
        right: For each ``Score.key``, 0 or 1 per image, so that attacks on different numbers of images are compared on
            the same images.
    """
    if audit.constant:
        verdict = 'nothing to check: the model gives every image the same logits.'
    elif audit.n < ENOUGH:
        verdict = f'too few images to tell: {audit.n} were classified correctly, {ENOUGH} or more are needed.'
    else:
        audit.suspicions += _disorder(scores, right or {})
        attacks = 'FGSM, PGD and AutoAttack' if _random(audit) else 'FGSM and PGD'
        reasons = '; '.join(audit.suspicions)
        verdict = f'LIKELY: {reasons}. {attacks} figures overstate robustness.' if reasons else 'no sign of it.'
    audit.verdict = verdict
    return audit


def _disorder(scores: Sequence[Score], right: Mapping[tuple[str, Variant], Sequence[int]]) -> list[str]:
    """Signs of masking: stronger attacks that fool less, and queries that fool images AutoAttack's gradients left."""

    def excess(strong: Score, weak: Score) -> bool:
        return more(right[strong.key], right[weak.key])

    found = []
    by_attack: dict[str, dict[float, Score]] = {}
    for score in scores:
        if score.norm and score.radius is not None and not score.stage:
            by_attack.setdefault(score.attack, {})[score.radius] = score
    for attack, by_radius in by_attack.items():
        ordered = [score for _, score in sorted(by_radius.items())]
        if any(excess(larger, smaller) for smaller, larger in pairwise(ordered)):
            found.append(f'accuracy under {attack} rises with the radius')
    for strong, weak in STRONGER:
        for radius, score in by_attack.get(strong, {}).items():
            other = by_attack.get(weak, {}).get(radius)
            if other and excess(score, other):
                found.append(f'{weak} at {format_radius(radius)} fools more than {strong}')
    stages = {(score.attack, score.radius, score.stage): score for score in scores if score.stage}
    for (attack, at, stage), score in stages.items():
        before = stages.get((attack, at, 'fab-t'))
        if stage == 'square' and before and _too_many(before.correct - score.correct, before.correct):
            found.append(
                f'{attack} at {format_radius(at or 0)}: queries fool {before.correct - score.correct} of '
                f'{before.correct} images that its gradients leave right'
            )
    return found


def more(a: Tensor | Sequence[int], b: Tensor | Sequence[int]) -> bool:
    """Whether significantly more images are right in ``a`` than in ``b``, of those that both were run on.

    McNemar's test at three standard deviations, so that a few images by chance are no sign.
    """
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=False)]  # lengths may differ
    up, down = (sum(x > y for x, y in pairs), sum(x < y for x, y in pairs))
    return up - down > max(0.01 * len(pairs), 3 * (up + down) ** 0.5)


def _too_many(taken: int, left: int) -> bool:
    """Whether queries fool many images that gradients did not; on honest nets they fool none or a few."""
    return taken >= 5 and taken > QUERIED * left


def misled(loss: str, audit: Audit) -> bool:
    """Whether attacks along the gradient of this loss (``Attack.loss``) overstate robustness.

    Large logits do not mislead the margin loss. AutoAttack, with its several losses and queries, is misled only by
    randomness.
    """
    if not loss or not audit.suspicions:
        return False
    if loss == 'several':
        return _random(audit)
    if loss == 'margin':
        return _random(audit) or audit.unbounded[loss] > UNBOUNDED
    return True


def _random(audit: Audit) -> bool:
    return audit.repeatability < REPEATABLE


def _bisected(pgd: Any) -> dict[float, Tensor]:
    """PGD at radii that close in on the one at which it leaves half of the images right."""
    tried: dict[float, Tensor] = {}
    low, high = 0, len(RADII) - 1
    while low <= high:
        middle = (low + high + 1) // 2
        tried[RADII[middle]] = pgd(RADII[middle])
        low, high = (middle + 1, high) if _share(tried[RADII[middle]]) > 0.5 else (low, middle - 1)
    return tried


def _telling(tried: Mapping[float, Tensor]) -> float:
    """The radius at which to compare attacks: PGD leaves few images right there, but enough to compare others."""
    some = {radius: share for radius, right in tried.items() if ENOUGH_LEFT <= (share := _share(right)) <= 0.8}
    return min(some, key=some.__getitem__) if some else min(tried, key=lambda r: abs(_share(tried[r]) - 0.5))


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
) -> Tensor:
    """(B,) bool: the images that are classified correctly after every step. (foolbox has no PGD on these losses.)

    The gradients are those of ``source``. Images that are fooled leave the batch.
    """
    right = torch.ones(len(images), dtype=torch.bool, device=images.device)
    left, x = torch.arange(len(images), device=images.device), start
    for _ in range(steps):
        step = 2.5 / steps * radius * _gradient(source, x, labels[left], loss).nan_to_num().sign()
        x = torch.minimum(torch.maximum(x + step, images[left] - radius), images[left] + radius).clamp(0, 1)
        keep = _right(model, x, labels[left])
        right[left[~keep]] = False
        left, x = left[keep], x[keep]
        if not len(left):
            break
    return right


def _taken_by_queries(model: nn.Module, images: Tensor, labels: Tensor, radius: float, seed: int) -> int | None:
    """Number of images that AutoAttack's Square fools without gradients; None if its package is missing."""
    try:
        from pyautoattack.square import SquareAttack
    except ImportError:
        return None
    if not len(images):
        return 0
    attack = SquareAttack(model, 'Linf', QUERIES, radius, seed=seed, device=images.device)
    with torch.no_grad():
        return int((~_right(model, attack.perturb(images, labels), labels)).sum())


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(images).argmax(1) == labels


def _share(right: Tensor) -> float:
    return right.float().mean().item()


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine over the images that have a gradient; 1 if none has."""
    some = (a != 0).any(1) & (b != 0).any(1)
    if not some.any():
        return 1.0
    scale = a[some].abs().amax(1, keepdim=True)  # tiny gradients would underflow in the norm
    return F.cosine_similarity(a[some] / scale, b[some] / b[some].abs().amax(1, keepdim=True)).mean().item()
