"""The attacks by name. Each takes a chunk of images and says, image by image, what is still classified right.

foolbox and pyautoattack do the attacking; DeepFool is our own (to the sample foolbox's, in one pass over iterations).
An image counts as robust if it is classified right before the attack and after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from timm_batchout.pixels import PixelModel, frozen, gradient_sign, seeded
from timm_batchout.robustness.deepfool import deepfool
from timm_batchout.robustness.report import Variant

__all__ = ['ATTACKS', 'Attack', 'Outcome', 'check_available']


@dataclass
class Outcome:
    """What an attack did to a chunk of B images, for each of its variants (a radius, an iteration, a stage).

    Attributes:
        right: (B,) bool per variant: classified right before and after.
        distance: (B,) float32 per variant: norm of the perturbation in [0, 1] pixels; 0 where wrong before, infinite
            where nothing was found. Attacks that minimise it only.
    """

    right: dict[Variant, Tensor] = field(default_factory=dict)
    distance: dict[Variant, Tensor] = field(default_factory=dict)


Radii = Sequence[float]
Run = Callable[..., Outcome]


@dataclass(frozen=True)
class Attack:
    """One attack, as the command line and the reports name it.

    Attributes:
        norm: 'Linf', 'L2', or '' for what is no attack by a radius.
        run: ``run(model, images, labels, radii, seed, **settings)``.
        settings: Its defaults; a report holds them.
        extra: The package that it needs.
        loss: The one whose gradient it follows, 'cross-entropy' or 'margin': where that is masked, it says nothing.
            'several' where it has other means as well; '' where it follows none of the model.
    """

    norm: str
    run: Run
    settings: dict[str, Any] = field(default_factory=dict)
    extra: str = ''
    loss: str = 'cross-entropy'


def check_available(names: Sequence[str]) -> None:
    """Raise ValueError for an attack that there is not, or whose package is not installed."""
    for name in names:
        if name not in ATTACKS:
            raise ValueError(f'There is no attack {name!r}; there are {", ".join(ATTACKS)}.')
        if ATTACKS[name].extra:
            try:
                __import__(ATTACKS[name].extra)
            except ImportError as error:
                raise ValueError(
                    f'Attack {name!r} needs {ATTACKS[name].extra}. In a checkout: pip install -e ".[attacks]"'
                ) from error


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(images).argmax(1) == labels


def _fgsm(model: PixelModel, images: Tensor, labels: Tensor, radii: Radii, seed: int) -> Outcome:
    before = _right(model, images, labels)
    sign = gradient_sign(model, images, labels)  # one gradient serves all radii
    attacked = {Variant(radius): (images + radius * sign).clamp(0, 1) for radius in radii}
    return Outcome({variant: before & _right(model, x, labels) for variant, x in attacked.items()})


def _foolbox(name: str) -> Run:
    def run(model: PixelModel, images: Tensor, labels: Tensor, radii: Radii, seed: int, **settings: Any) -> Outcome:
        import foolbox

        attack = getattr(foolbox.attacks, name)(**settings)
        target = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        before = _right(model, images, labels)
        outcome = Outcome()
        for radius in radii:
            with seeded(seed):
                _, attacked, _ = attack(target, images, labels, epsilons=radius)
            outcome.right[Variant(radius)] = before & _right(model, attacked, labels)
        return outcome

    return run


def _transfer(
    model: PixelModel, images: Tensor, labels: Tensor, radii: Radii, seed: int, source: nn.Module, **settings: Any
) -> Outcome:
    """PGD images of another model (``PixelModel``), scored on this one."""
    import foolbox

    target = foolbox.PyTorchModel(source, bounds=(0, 1), device=images.device)
    before = _right(model, images, labels)
    outcome = Outcome()
    for radius in radii:
        with seeded(seed), frozen(source):
            _, attacked, _ = foolbox.attacks.LinfPGD(**settings)(target, images, labels, epsilons=radius)
        outcome.right[Variant(radius)] = before & _right(model, attacked, labels)
    return outcome


def _deepfool(clip: bool) -> Run:
    def run(
        model: PixelModel, images: Tensor, labels: Tensor, radii: Radii, seed: int, iterations: int, overshoot: float
    ) -> Outcome:
        before = _right(model, images, labels)
        found = deepfool(model, images, labels, iterations, overshoot, clip=clip)
        outcome = Outcome()
        for i, (right, distance) in enumerate(zip(found.right, found.distance, strict=True), 1):
            outcome.right[Variant(iteration=i)] = before & right
            outcome.distance[Variant(iteration=i)] = torch.where(right, torch.inf, distance).where(before, 0.0)
        return outcome

    return run


def _ddn(model: PixelModel, images: Tensor, labels: Tensor, radii: Radii, seed: int, steps: int) -> Outcome:
    import foolbox

    target = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    before = _right(model, images, labels)
    with seeded(seed):
        _, attacked, _ = foolbox.attacks.DDNAttack(steps=steps)(target, images, labels, epsilons=None)
    fooled = ~_right(model, attacked, labels)
    norm = (attacked - images).flatten(1).norm(dim=1)
    distance = torch.where(fooled, norm, torch.inf).where(before, 0.0)
    outcome = Outcome({Variant(radius): before & (distance > radius) for radius in radii})
    outcome.right[Variant()] = before & ~fooled
    outcome.distance[Variant()] = distance
    return outcome


def _autoattack(norm: str) -> Run:
    """Stage by stage: each takes what the ones before it left. With the four stages it is the standard version."""

    def run(
        model: PixelModel, images: Tensor, labels: Tensor, radii: Radii, seed: int, stages: Sequence[str]
    ) -> Outcome:
        from pyautoattack import AutoAttack

        before = _right(model, images, labels)
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        outcome = Outcome()
        for radius in radii:
            right = before.clone()
            for stage in stages:
                if stage == 'apgd-t' and classes < 4:
                    continue  # its loss compares the third and fourth largest logit
                left = right.nonzero()[:, 0]
                if len(left):
                    with seeded(seed):
                        attack = AutoAttack(model, eps=radius, norm=norm, seed=seed, device=images.device)
                        attack.attacks_to_run = [stage]
                        attack.fab.n_target_classes = min(9, classes - 1)
                        attack.apgd_targeted.n_target_classes = min(9, classes - 1)
                        attacked, _ = attack.run_standard_evaluation(images[left], labels[left], batch_size=len(left))
                    right[left] = _right(model, attacked, labels[left])
                outcome.right[Variant(radius, stage=stage)] = right.clone()
            outcome.right[Variant(radius)] = right
        return outcome

    return run


def _noise(model: PixelModel, images: Tensor, labels: Tensor, radii: Radii, seed: int) -> Outcome:
    """Gaussian noise with the radius as its standard deviation: no attack, a control."""
    before = _right(model, images, labels)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return Outcome(
        {Variant(radius): before & _right(model, (images + radius * noise).clamp(0, 1), labels) for radius in radii}
    )


def _corruptions(model: PixelModel, images: Tensor, labels: Tensor, radii: Radii, seed: int) -> Outcome:
    """What a camera or a network does to images, by torchvision, at one middling strength: no attack, a control."""
    from torchvision.transforms.v2 import functional as tv

    changed = {
        'blur': tv.gaussian_blur(images, [3, 3], [1.0, 1.0]),
        'brighter': tv.adjust_brightness(images, 1.4),
        'darker': tv.adjust_brightness(images, 0.6),
        'less contrast': tv.adjust_contrast(images, 0.5) if images.shape[1] in (1, 3) else images,
        'rotated by 10 degrees': tv.rotate(images, 10, interpolation=tv.InterpolationMode.BILINEAR),
    }
    if images.shape[1] == 3:
        eight_bits = (images * 255).round().to(torch.uint8).cpu()
        changed['JPEG quality 25'] = torch.stack([tv.jpeg(image, 25) for image in eight_bits]).to(images) / 255
    before = _right(model, images, labels)
    return Outcome(
        {Variant(corruption=name): before & _right(model, x.clamp(0, 1), labels) for name, x in changed.items()}
    )


PGD = {'steps': 20, 'rel_stepsize': 0.125, 'random_start': True}
DEEPFOOL = {'iterations': 5, 'overshoot': 0.02}
STANDARD = {'stages': ['apgd-ce', 'apgd-t', 'fab-t', 'square']}  # AutoAttack's
ATTACKS: dict[str, Attack] = {
    'fgsm': Attack('Linf', _fgsm),
    'pgd': Attack('Linf', _foolbox('LinfPGD'), PGD, 'foolbox'),
    'pgd_l2': Attack('L2', _foolbox('L2PGD'), PGD, 'foolbox'),
    'deepfool': Attack('L2', _deepfool(clip=True), DEEPFOOL, loss='margin'),
    'deepfool_unclipped': Attack('L2', _deepfool(clip=False), DEEPFOOL, loss='margin'),
    'ddn': Attack('L2', _ddn, {'steps': 100}, 'foolbox'),
    'autoattack': Attack('Linf', _autoattack('Linf'), STANDARD, 'pyautoattack', loss='several'),
    'autoattack_l2': Attack('L2', _autoattack('L2'), STANDARD, 'pyautoattack', loss='several'),
    'transfer': Attack('Linf', _transfer, PGD, 'foolbox', loss=''),
    'noise': Attack('', _noise, loss=''),
    'corruptions': Attack('', _corruptions, loss=''),
}
