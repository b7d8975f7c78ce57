"""The attacks by name: one class each, whose fields are its settings.

An attack takes a chunk of images and says, image by image, what is still classified correctly. foolbox and pyautoattack
do the attacking; DeepFool is our own (equal to foolbox's to the sample, with every iteration from one pass).
An image counts as robust if it is classified correctly both before and after the attack.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from timm_batchout.pixels import PixelModel, frozen, gradient_sign, seeded
from timm_batchout.robustness.deepfool import deepfool
from timm_batchout.robustness.report import Variant
from timm_batchout.text import did_you_mean

__all__ = [
    'ATTACKS',
    'DDN',
    'FGSM',
    'PGD',
    'PGDL2',
    'Attack',
    'AutoAttack',
    'AutoAttackL2',
    'Batch',
    'Corruptions',
    'DeepFool',
    'DeepFoolUnclipped',
    'GaussianNoise',
    'Outcome',
    'Transfer',
    'as_attacks',
]

STAGES = ('apgd-ce', 'apgd-t', 'fab-t', 'square')  # of AutoAttack's standard version


@dataclass(frozen=True)
class Batch:
    """Images under attack.

    Args:
        model: The model under attack.
        images: (B, C, H, W), float32, in [0, 1].
        labels: (B,), int64.
        radii: In [0, 1] pixels.
        seed: Seed of everything the attack draws.
        source: The model that 'transfer' crafts images on.
    """

    model: PixelModel
    images: Tensor
    labels: Tensor
    radii: Sequence[float] = ()
    seed: int = 0
    source: PixelModel | None = None

    @cached_property
    def classified(self) -> Tensor:
        """(B,) bool: classified correctly before the attack."""
        return self.correct(self.images)

    def withstood(self, attacked: Tensor) -> Tensor:
        """(B,) bool: classified correctly before the attack, and as these images after it."""
        return self.classified & self.correct(attacked)

    def part(self, chosen: Tensor) -> 'Batch':
        """The images that a (B,) bool mask selects."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    @torch.no_grad()
    def correct(self, images: Tensor) -> Tensor:
        """(B,) bool: classified correctly as these images."""
        return self.model(images).argmax(1) == self.labels


@dataclass
class Outcome:
    """The effect of an attack on a chunk of B images, for each of its variants (a radius, an iteration, a stage).

    Attributes:
        right: (B,) bool per variant: classified correctly before and after.
        distance: (B,) float32 per variant, for attacks that minimise it: norm of the perturbation in [0, 1] pixels;
            0 where the image was misclassified before, infinite where no adversarial image was found.
    """

    right: dict[Variant, Tensor] = field(default_factory=dict)
    distance: dict[Variant, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack and its settings, which every report states.

    A subclass (a frozen dataclass with ``name`` and ``run``) can be given to ``evaluate`` like those of this module.

    Args:
        n: Attack only the first n of the drawn images; None: all of them.
        eps: Radii of this attack, as ``evaluate`` takes them; empty: those of ``evaluate``.

    Attributes:
        name: Name on the command line and in reports.
        norm: Norm of the radius, 'Linf' or 'L2'; '' for the controls, which are not attacks within a radius.
        package: The package it needs; '' for none.
        loss: The loss whose gradient it follows, 'cross-entropy' or 'margin'; 'several' if it has other means as well,
            '' if it uses no gradient of the model. Where the audit finds that gradient masked, the attack is misled.

    Raises:
        ValueError: A setting of the wrong type or out of range.
    """

    n: int | None = None
    eps: Sequence[str | float] = ()

    name: ClassVar[str]
    norm: ClassVar[str] = 'Linf'
    package: ClassVar[str] = ''
    loss: ClassVar[str] = 'cross-entropy'

    def __post_init__(self) -> None:
        if not isinstance(self.eps, (list, tuple)):
            object.__setattr__(self, 'eps', (self.eps,))
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name != 'eps' and not (value is None and setting.default is None):
                self._check(setting.name, value, setting.default)

    def _check(self, setting: str, value: Any, default: Any) -> None:
        """A value has the type of the default; a list is a choice from it."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(default, bool):
            fits, wanted = isinstance(value, bool), 'true or false'
        elif isinstance(default, int) or default is None:  # n: its range is checked where the images are known
            whole = number and isinstance(value, int)
            fits, wanted = whole and (value > 0 or default is None), 'a whole number, 1 or more'
        elif isinstance(default, float):
            fits, wanted = number and 0 <= value < math.inf, 'a number, 0 or more'
        else:
            fits, wanted = isinstance(value, (list, tuple)) and len(value) > 0, f'some of {list(default)}'
            fits = fits and all(choice in default for choice in value)
        if not fits:
            raise ValueError(f'{setting} of {self.name} must be {wanted}, got {value!r}.')

    def settings(self) -> dict[str, Any]:
        """For reports: its own settings, then ``n`` and ``eps`` if they are set."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        shared = {name: values.pop(name) for name in ('n', 'eps')}
        return values | {name: value for name, value in shared.items() if value not in (None, [])}

    @abstractmethod
    def run(self, batch: Batch) -> Outcome:
        """Attack a batch at each of its radii."""


def as_attacks(
    attacks: Sequence[str | Attack], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Attack]:
    """The attacks by name.

    Args:
        attacks: Names in ``ATTACKS``, or attacks with their settings.
        settings: Settings of attacks given by name, in place of the defaults.

    Raises:
        ValueError: An unknown attack or setting, a setting of the wrong type, settings for an attack that is not
            listed or listed twice, a package that is not installed.
    """
    settings = settings or {}
    names = [attack if isinstance(attack, str) else attack.name for attack in attacks]
    for name in attacks:
        if isinstance(name, str) and name not in ATTACKS:
            raise ValueError(f'Unknown attack {name!r}. Available: {", ".join(ATTACKS)}.{did_you_mean(name, ATTACKS)}')
    unused = sorted(set(settings) - set(names))
    if unused:
        raise ValueError(f'Settings for {", ".join(unused)}, which is not among the attacks: {", ".join(names)}.')
    chosen: dict[str, Attack] = {}
    for name, given in zip(names, attacks, strict=True):
        attack = _configured(name, settings.get(name) or {}) if isinstance(given, str) else given
        if chosen.get(name, attack) != attack or (attack is given and name in settings):
            raise ValueError(f'{name} is configured twice: give its settings in one place.')
        chosen[name] = attack
    for attack in chosen.values():
        if attack.package:
            try:
                __import__(attack.package)
            except ImportError as error:
                raise ValueError(
                    f'Attack {attack.name!r} needs {attack.package}. In a checkout: pip install -e ".[attacks]"'
                ) from error
    return chosen


def _configured(name: str, settings: Mapping[str, Any]) -> Attack:
    kind = ATTACKS[name]
    known = [setting.name for setting in fields(kind)]
    for setting in settings:
        if setting not in known:
            raise ValueError(f'{name} has no setting {setting!r}. Available: {", ".join(known)}.')
    return kind(**settings)


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step along the sign of the gradient (Goodfellow et al., 2015)."""

    name = 'fgsm'

    def run(self, batch: Batch) -> Outcome:
        sign = gradient_sign(batch.model, batch.images, batch.labels)  # one gradient serves all radii
        attacked = {Variant(radius): (batch.images + radius * sign).clamp(0, 1) for radius in batch.radii}
        return Outcome({variant: batch.withstood(x) for variant, x in attacked.items()})


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """foolbox's projected gradient descent on the cross-entropy (Madry et al., 2018).

    Args:
        steps: Gradient steps.
        rel_stepsize: Step size as a share of the radius.
        random_start: Start from a random point within the radius.
    """

    steps: int = 20
    rel_stepsize: float = 0.125
    random_start: bool = True

    name = 'pgd'
    package = 'foolbox'

    def run(self, batch: Batch) -> Outcome:
        import foolbox

        kind = foolbox.attacks.L2PGD if self.norm == 'L2' else foolbox.attacks.LinfPGD
        attack = kind(steps=self.steps, rel_stepsize=self.rel_stepsize, random_start=self.random_start)
        crafted_on = self._crafted_on(batch)
        target = foolbox.PyTorchModel(crafted_on, bounds=(0, 1), device=batch.images.device)
        outcome = Outcome()
        for radius in batch.radii:
            with seeded(batch.seed), frozen(crafted_on):
                _, attacked, _ = attack(target, batch.images, batch.labels, epsilons=radius)
            outcome.right[Variant(radius)] = batch.withstood(attacked)
        return outcome

    def _crafted_on(self, batch: Batch) -> PixelModel:
        return batch.model


@dataclass(frozen=True, kw_only=True)
class PGDL2(PGD):
    """``PGD`` in L2."""

    name = 'pgd_l2'
    norm = 'L2'


@dataclass(frozen=True, kw_only=True)
class Transfer(PGD):
    """``PGD`` images crafted on another model and scored on this one."""

    name = 'transfer'
    loss = ''

    def _crafted_on(self, batch: Batch) -> PixelModel:
        assert batch.source is not None, 'evaluate refuses transfer without transfer_from'
        return batch.source


@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack):
    """Steps to the nearest linearised decision boundary (Moosavi-Dezfooli et al., 2016), scored at each iteration.

    Args:
        iterations: How many.
        overshoot: Go this share further than the boundary.
    """

    iterations: int = 5
    overshoot: float = 0.02

    name = 'deepfool'
    norm = 'L2'
    loss = 'margin'
    clip: ClassVar[bool] = True

    def run(self, batch: Batch) -> Outcome:
        before = batch.classified
        found = deepfool(batch.model, batch.images, batch.labels, self.iterations, self.overshoot, clip=self.clip)
        outcome = Outcome()
        for i, (right, distance) in enumerate(zip(found.right, found.distance, strict=True), 1):
            outcome.right[Variant(iteration=i)] = before & right
            outcome.distance[Variant(iteration=i)] = torch.where(right, torch.inf, distance).where(before, 0.0)
        return outcome


@dataclass(frozen=True, kw_only=True)
class DeepFoolUnclipped(DeepFool):
    """``DeepFool`` whose iterates may leave [0, 1], as in the method's original code."""

    name = 'deepfool_unclipped'
    clip = False


@dataclass(frozen=True, kw_only=True)
class DDN(Attack):
    """foolbox's decoupled direction and norm attack, which minimises the L2 distance (Rony et al., 2019).

    Args:
        steps: Gradient steps.
    """

    steps: int = 100

    name = 'ddn'
    norm = 'L2'
    package = 'foolbox'

    def run(self, batch: Batch) -> Outcome:
        import foolbox

        target = foolbox.PyTorchModel(batch.model, bounds=(0, 1), device=batch.images.device)
        attack = foolbox.attacks.DDNAttack(steps=self.steps)
        with seeded(batch.seed):
            _, attacked, _ = attack(target, batch.images, batch.labels, epsilons=None)
        withstood = batch.withstood(attacked)
        norm = (attacked - batch.images).flatten(1).norm(dim=1)
        distance = torch.where(withstood, torch.inf, norm).where(batch.classified, 0.0)
        outcome = Outcome({Variant(radius): batch.classified & (distance > radius) for radius in batch.radii})
        outcome.right[Variant()] = withstood
        outcome.distance[Variant()] = distance
        return outcome


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """pyautoattack's AutoAttack (Croce and Hein, 2020), stage by stage, each on the images the earlier ones left.

    Args:
        stages: Which stages; all four are the standard version.
    """

    stages: Sequence[str] = STAGES

    name = 'autoattack'
    package = 'pyautoattack'
    loss = 'several'

    def run(self, batch: Batch) -> Outcome:
        with torch.no_grad():
            classes = batch.model(batch.images[:1]).shape[1]
        outcome = Outcome()
        for radius in batch.radii:
            right = batch.classified.clone()
            for stage in self.stages:
                if stage == 'apgd-t' and classes < 4:
                    continue  # its loss compares the third and fourth largest logit
                if right.any():
                    right[right.clone()] = self._stage(stage, classes, batch.part(right), radius)
                outcome.right[Variant(radius, stage=stage)] = right.clone()
            outcome.right[Variant(radius)] = right
        return outcome

    def _stage(self, stage: str, classes: int, batch: Batch, radius: float) -> Tensor:
        import pyautoattack

        with seeded(batch.seed):
            attack = pyautoattack.AutoAttack(
                batch.model, eps=radius, norm=self.norm, seed=batch.seed, device=batch.images.device
            )
            attack.attacks_to_run = [stage]
            attack.fab.n_target_classes = min(9, classes - 1)
            attack.apgd_targeted.n_target_classes = min(9, classes - 1)
            attacked, _ = attack.run_standard_evaluation(batch.images, batch.labels, batch_size=len(batch.images))
        return batch.correct(attacked)


@dataclass(frozen=True, kw_only=True)
class AutoAttackL2(AutoAttack):
    """``AutoAttack`` in L2."""

    name = 'autoattack_l2'
    norm = 'L2'


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Attack):
    """Gaussian noise with the radius as its standard deviation: a control, not an attack."""

    name = 'noise'
    norm = ''
    loss = ''

    def run(self, batch: Batch) -> Outcome:
        generator = torch.Generator().manual_seed(batch.seed)
        noise = torch.randn(batch.images.shape, generator=generator).to(batch.images.device)
        noisy = {Variant(radius): (batch.images + radius * noise).clamp(0, 1) for radius in batch.radii}
        return Outcome({variant: batch.withstood(x) for variant, x in noisy.items()})


@dataclass(frozen=True, kw_only=True)
class Corruptions(Attack):
    """What a camera or a network does to images, by torchvision, at one medium strength: a control, not an attack."""

    name = 'corruptions'
    norm = ''
    loss = ''

    def run(self, batch: Batch) -> Outcome:
        from torchvision.transforms.v2 import functional as tv

        images = batch.images
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
        return Outcome({Variant(corruption=name): batch.withstood(x.clamp(0, 1)) for name, x in changed.items()})


ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind
    for kind in (
        FGSM, PGD, PGDL2, DeepFool, DeepFoolUnclipped, DDN, AutoAttack, AutoAttackL2, Transfer, GaussianNoise,
        Corruptions,
    )
}  # fmt: skip
