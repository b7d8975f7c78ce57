"""The result of an evaluation, and its JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, stdev
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from timm_batchout.provenance import write_atomically
from timm_batchout.text import parse_radius

__all__ = ['Audit', 'Report', 'Score', 'Variant', 'differences', 'paired_difference', 'wilson']

Checked = TypeVar('Checked')


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion (Wilson, 1927)."""
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean of ``values - others``, of two pairs (seeds, say) or more, and half its 95% interval (Student's t)."""
    from scipy.stats import t as student_t

    gains = [value - other for value, other in zip(values, others, strict=True)]
    return mean(gains), float(student_t.ppf(0.975, len(gains) - 1)) * stdev(gains) / math.sqrt(len(gains))


class Variant(NamedTuple):
    """The fields that distinguish the scores of one attack; each is a field of ``Score``."""

    radius: float | None = None
    iteration: int | None = None
    stage: str = ''
    corruption: str = ''


@dataclass
class Score:
    """The accuracy under one variant of an attack.

    Attributes:
        attack: Name in ``ATTACKS``; 'clean' for no attack.
        correct, n: Number of images classified correctly before and after, and of all images.
        norm: Norm of the radius and of distances: 'Linf', 'L2' or ''.
        radius: Radius in [0, 1] pixels; None for an attack without a radius.
        iteration: Iteration of DeepFool, counted from 1.
        stage: After this stage of AutoAttack; '' for the whole attack.
        corruption: Name of the corruption.
        median_distance, mean_distance: Norm of the perturbations that were found, in [0, 1] pixels; None if the attack
            does not minimise it. The median counts images that were not fooled as infinitely far.
        masked: The audit found masked gradients, which mislead this attack.
    """

    attack: str
    correct: int
    n: int
    norm: str = ''
    radius: float | None = None
    iteration: int | None = None
    stage: str = ''
    corruption: str = ''
    median_distance: float | None = None
    mean_distance: float | None = None
    masked: bool = False

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval (Wilson)."""
        return wilson(self.correct, self.n)

    @property
    def variant(self) -> Variant:
        return Variant(self.radius, self.iteration, self.stage, self.corruption)

    @property
    def key(self) -> tuple[str, Variant]:
        return self.attack, self.variant


@dataclass
class Audit:
    """The audit for gradient masking: measurements on ``n`` correctly classified images, and a verdict.

    Attributes:
        verdict: The verdict in words.
        suspicions: Signs of masked gradients; empty if there are none.
        n: Number of images; if they are too few, nothing below was measured.
        constant: The model gives every image the same logits, so there is nothing to check.
        radius: L-infinity radius in [0, 1] pixels at which the following was measured: PGD leaves few images right
            there, but enough to compare other attacks.
        radii: For each radius, the shares that FGSM (``fgsm``) and PGD (``pgd``; None: not run) leave right.
        steps: Gradient steps of PGD.
        logit_std: Standard deviation of all logits.
        zero_gradients, non_finite_gradients: Shares of images whose gradient of the cross-entropy is 0 or not finite.
        repeatability: Mean cosine of two computations of the gradient of the same image.
        smoothness: Mean cosine of the gradients of an image and a random neighbour, over the pixels that differ.
        pgd: Shares that PGD leaves right, by its loss.
        unbounded: Shares that PGD leaves right at radius 1, by its loss.
        queries: Queries of the gradient-free attack; 0: its package is not installed.
        left, taken: Number of images that PGD leaves right on all losses, and of those that the queries fool.
        transfer: Share that PGD images of another net leave right; None if no net was given.
    """

    verdict: str = ''
    suspicions: list[str] = field(default_factory=list)
    n: int = 0
    constant: bool = False
    radius: float = 0.0
    radii: list[dict[str, float | None]] = field(default_factory=list)
    steps: int = 0
    logit_std: float = 0.0
    zero_gradients: float = 0.0
    non_finite_gradients: float = 0.0
    repeatability: float = 1.0
    smoothness: float = 1.0
    pgd: dict[str, float] = field(default_factory=dict)
    unbounded: dict[str, float] = field(default_factory=dict)
    queries: int = 0
    left: int = 0
    taken: int = 0
    transfer: float | None = None


@dataclass
class Report:
    """One model on one data set under several attacks.

    Attributes:
        model: Name or description of the model.
        data: Name of the data.
        n: Number of images.
        indices: Their numbers in the data set; attacks run on fewer images took the first of these.
        batch_size: Images per chunk; attacks depend on it (random draws, and AutoAttack throughout).
        seed: Seed of the draw of images and of all attacks.
        weights_sha256: Hash of the state_dict, keys and bytes.
        preprocessing: ``mean`` and ``std`` inside the model, and its input size.
        settings: Settings of each attack.
        scores: The scores, the clean one first.
        audit: Result of the masking audit; None if it was switched off.
        environment: Versions and hardware.
        seconds: Wall time of the call that finished it; the only difference between two runs.
    """

    model: str
    data: str
    n: int
    indices: str
    batch_size: int
    seed: int
    weights_sha256: str
    preprocessing: dict[str, Any]
    settings: dict[str, Any]
    scores: list[Score]
    audit: Audit | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def score(
        self,
        attack: str,
        radius: float | str | None = None,
        *,
        iteration: int | None = None,
        stage: str = '',
        corruption: str = '',
    ) -> Score:
        """The score of one variant of an attack; the radius in [0, 1] pixels, as a number or as '8/255'.

        Raises:
            KeyError: This variant was not measured.
        """
        value = parse_radius(radius, 'L2') if isinstance(radius, str) else radius
        variant = Variant(value, iteration, stage, corruption)
        for score in self.scores:
            if score.key == (attack, variant):
                return score
        raise KeyError(f'{attack} {variant}')

    def to_dict(self) -> dict[str, Any]:
        report = asdict(self)
        for entry, score in zip(report['scores'], self.scores, strict=True):
            entry['accuracy'] = score.accuracy
            entry['interval95'] = [round(edge, 5) for edge in score.interval]
        return report

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> 'Report':
        """The inverse of ``to_dict``, checked field by field, because reports also come from other people.

        Raises:
            ValueError: A field is missing, unknown, of the wrong type or out of range; the message names it.
        """
        values = dict(_of_type('the report', report, dict))
        scores = []
        for i, entry in enumerate(_of_type('scores', values.get('scores'), list)):
            where = f'scores[{i}]'
            stated = dict(_of_type(where, entry, dict))
            for derived in ('accuracy', 'interval95'):
                stated.pop(derived, None)
            scores.append(_checked(Score, stated, where))
            _check_score(scores[-1], where)
        if not scores or scores[0].attack != 'clean':
            raise ValueError('scores[0] must be the clean one.')
        audit = values.get('audit')
        values['audit'] = None if audit is None else _checked(Audit, dict(_of_type('audit', audit, dict)), 'audit')
        checked = _checked(cls, {**values, 'scores': scores}, '')
        if not 0 < checked.n < math.inf:
            raise ValueError(f'n must be at least 1, got {checked.n!r}.')
        for name in ('mean', 'std', 'input_size'):
            _of_type(f'preprocessing.{name}', checked.preprocessing.get(name), list)
        for name, settings in checked.settings.items():
            _of_type(f'settings.{name}', settings, dict)
        return checked

    def save(self, path: str | Path) -> None:
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + '\n')

    @classmethod
    def load(cls, path: str | Path) -> 'Report':
        """A report that ``evaluate`` wrote, or the one inside a bundled model's JSON or a card's results.json.

        Raises:
            ValueError: The file is not a report.
        """
        text = Path(path).read_bytes()
        try:
            content = _of_type('the file', json.loads(text), dict)
            return cls.from_dict(content.get('report', content))
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{str(path)!r} is not a report of `timm-batchout evaluate`: {error}') from error


def _checked(cls: type[Checked], values: Mapping[str, Any], where: str) -> Checked:
    """The dataclass of these values, which must be complete, without extras, and of the types of the fields."""
    known = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]
    prefix = f'{where}.' if where else ''
    for name in values:
        if name not in known:
            raise ValueError(f'{prefix}{name} is not a field of a report. Fields: {", ".join(known)}.')
    for name, entry in known.items():
        if name in values:
            _check_type(f'{prefix}{name}', values[name], entry.type)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f'{prefix}{name} is missing.')
    return cls(**values)


def _check_type(where: str, value: Any, kind: Any) -> None:
    """Raise ValueError unless a value has the annotated type: a plain type, a list or dict, or a union."""
    allowed = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    types = tuple(float if one is float else (get_origin(one) or one) for one in allowed)
    if float in types:
        types += (int,)
    fits = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        wanted = ' or '.join('null' if one is type(None) else one.__name__ for one in types)
        raise ValueError(f'{where} must be of type {wanted}, got {str(value)[:40]!r}.')
    if isinstance(value, list) and kind == list[str]:
        for i, inner in enumerate(value):
            _check_type(f'{where}[{i}]', inner, str)


def _of_type(where: str, value: Any, kind: type[Checked]) -> Checked:
    if not isinstance(value, kind):
        raise ValueError(f'{where} must be of type {kind.__name__}, got {str(value)[:40]!r}.')
    return value


def _check_score(score: Score, where: str) -> None:
    if score.n < 1:
        raise ValueError(f'{where}.n must be at least 1, got {score.n}.')
    if not 0 <= score.correct <= score.n:
        raise ValueError(f'{where}.correct must lie in [0, n={score.n}], got {score.correct}.')
    for name in ('radius', 'median_distance', 'mean_distance'):
        value = getattr(score, name)
        if value is not None and value < 0:
            raise ValueError(f'{where}.{name} must be at least 0, got {value}.')


ROUNDING = 0.005  # share of the images: FGSM on two processors differed by up to 28 of 10,000


def differences(report: Report, expected: Report) -> list[str]:
    """The differences between a report and an earlier one of the same weights and images; empty if it confirms it.

    Clean counts must be equal. Under attack 0.5% of the images may differ: attacks take signs of gradients, which are
    mostly rounding where a net is very confident, and processors round differently.
    """
    for name in ('weights_sha256', 'data', 'indices', 'n'):
        if getattr(report, name) != getattr(expected, name):
            return [f'{name} is {getattr(report, name)!r}, expected {getattr(expected, name)!r}']
    found = []
    known = {score.key: score for score in expected.scores}
    for score in report.scores:
        other = known.get(score.key)
        allowed = 0 if score.attack == 'clean' else ROUNDING * score.n
        if other and score.n == other.n and abs(score.correct - other.correct) > allowed:
            found.append(
                f'{score.attack} {score.variant}: {score.correct} of {score.n} correct, expected {other.correct}'
            )
    return found
