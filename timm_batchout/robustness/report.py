"""What an evaluation found: JSON there and back, and tables."""

import json
import math
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from timm_batchout.provenance import write_atomically

__all__ = ['Report', 'Score', 'Variant', 'differences', 'wilson']


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson, 1927)."""
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


class Variant(NamedTuple):
    """What tells the scores of one attack apart: a field of ``Score`` each."""

    radius: float | None = None
    iteration: int | None = None
    stage: str = ''
    corruption: str = ''


@dataclass
class Score:
    """The images that one variant of an attack leaves right.

    Attributes:
        attack: Its name in ``ATTACKS``; 'clean' for none.
        correct, n: Images right before and after, of how many.
        norm: Of the radius and of distances: 'Linf', 'L2' or ''.
        radius: In [0, 1] pixels; None where the attack has no radius.
        iteration: DeepFool's, from 1 on.
        stage: After this stage of AutoAttack; '' for the whole attack.
        corruption: Its name.
        median_distance, mean_distance: Of the perturbations that were found, norm in [0, 1] pixels; None where the
            attack does not minimise it. The median counts images that were not fooled as infinitely far.
        masked: The audit found that gradients do not tell the truth here.
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
        """95%, Wilson."""
        return wilson(self.correct, self.n)

    @property
    def variant(self) -> Variant:
        return Variant(self.radius, self.iteration, self.stage, self.corruption)

    @property
    def key(self) -> tuple[str, Variant]:
        return self.attack, self.variant


@dataclass
class Report:
    """One model on one data set under several attacks.

    Attributes:
        model: Name or description.
        data: Name of the data.
        n: Images.
        indices: Which of the data set; attacks that were run on fewer took the first of these.
        batch_size: Of the chunks; attacks depend on it (random draws, and AutoAttack throughout).
        seed: Of the draw of images, and of all attacks.
        weights_sha256: Of the state_dict, keys and bytes.
        preprocessing: ``mean`` and ``std`` inside the model; its input size.
        settings: Of each attack.
        scores: The clean one first.
        audit: What the masking audit found; None if it was not asked for.
        environment: Versions and hardware.
        seconds: Wall time; the only thing in which two runs differ.
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
    audit: dict[str, Any] | None = None
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
            KeyError: It was not measured.
        """
        value = float(Fraction(radius)) if isinstance(radius, str) else radius
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
    def from_dict(cls, report: dict[str, Any]) -> 'Report':
        names = Score.__dataclass_fields__
        scores = [Score(**{name: entry[name] for name in names}) for entry in report['scores']]
        return cls(**{**report, 'scores': scores})

    def save(self, path: str | Path) -> None:
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + '\n')

    @classmethod
    def load(cls, path: str | Path) -> 'Report':
        """A report that ``evaluate`` wrote, or the one inside a bundled model's JSON or a card's results.json.

        Raises:
            ValueError: The file holds something else.
        """
        text = Path(path).read_bytes()
        try:
            content = json.loads(text)
            return cls.from_dict(content.get('report', content))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{str(path)!r} is no report that `timm-batchout evaluate` wrote ({error!r}).') from error


ROUNDING = 0.005  # of the images: FGSM on one processor and another differed by up to 28 of 10,000


def differences(report: Report, expected: Report) -> list[str]:
    """Where a report does not confirm an earlier one of the same weights and images; empty where it does.

    Clean counts must be equal. Under attack 0.5% of the images may differ: attacks take signs of gradients, which are
    rounding and little else where a net is sure of itself, and processors round differently.
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
