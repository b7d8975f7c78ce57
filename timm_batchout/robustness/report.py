"""What an evaluation found: JSON there and back, and tables."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timm_batchout.provenance import write_atomically

__all__ = ['Report', 'Score', 'comparison', 'wilson']


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson, 1927)."""
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class Score:
    """The images that one variant of an attack leaves right.

    Attributes:
        attack: Its name in ``ATTACKS``; 'clean' for none.
        variant: A radius as it was given ('8/255'), an iteration, a stage; '' where there is one only.
        norm: 'Linf', 'L2' or ''.
        radius: In [0, 1] pixels; None where the variant is not one.
        correct, n: Images right before and after, of how many.
        median_distance, mean_distance: Of the perturbations that were found, norm in [0, 1] pixels; None where the
            attack does not minimise it. The median counts images that were not fooled as infinitely far.
        masked: The audit found that gradients do not tell the truth here.
    """

    attack: str
    variant: str
    norm: str
    radius: float | None
    correct: int
    n: int
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
    def key(self) -> tuple[str, str]:
        return self.attack, self.variant


@dataclass
class Report:
    """One model on one data set under several attacks.

    Attributes:
        model: Name or description.
        data: Name of the data.
        n: Images.
        indices: Which of the test set.
        batch_size: Of the chunks; attacks depend on it (random draws, and AutoAttack throughout).
        seed: Of all attacks.
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
    indices: list[int]
    batch_size: int
    seed: int
    weights_sha256: str
    preprocessing: dict[str, Any]
    settings: dict[str, Any]
    scores: list[Score]
    audit: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def score(self, attack: str, variant: str = '') -> Score:
        """Raises KeyError if it was not measured."""
        for score in self.scores:
            if score.key == (attack, variant):
                return score
        raise KeyError(f'{attack} {variant}'.strip())

    def to_dict(self) -> dict[str, Any]:
        report = asdict(self)
        for entry, score in zip(report['scores'], self.scores, strict=True):
            entry['accuracy'] = score.accuracy
            entry['interval95'] = [round(edge, 5) for edge in score.interval]
        if self.indices == list(range(self.n)):
            report['indices'] = f'the first {self.n}'
        return report

    @classmethod
    def from_dict(cls, report: dict[str, Any]) -> 'Report':
        names = Score.__dataclass_fields__
        scores = [Score(**{name: entry[name] for name in names}) for entry in report['scores']]
        indices = report['indices']
        indices = list(range(report['n'])) if isinstance(indices, str) else indices
        return cls(**{**report, 'scores': scores, 'indices': indices})

    def save(self, path: str | Path) -> None:
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + '\n')

    @classmethod
    def load(cls, path: str | Path) -> 'Report':
        return cls.from_dict(json.loads(Path(path).read_text()))

    def table(self) -> str:
        """Markdown: a row per attack and variant."""
        from timm_batchout.robustness.attacks import ATTACKS

        rows = ['| attack | robust accuracy % (95%) | median distance |', '|---|---|---|']
        for score in self.scores:
            low, high = score.interval
            name = 'clean' if score.attack == 'clean' else ATTACKS[score.attack].title
            distance = '' if score.median_distance is None else f'{score.median_distance:.3f}'
            rows.append(
                f'| {" ".join(filter(None, [name, score.norm, score.variant]))}{" (masked)" * score.masked} | '
                f'{100 * score.accuracy:.2f} ({100 * low:.1f} to {100 * high:.1f}) | {distance} |'
            )
        title = f'**{self.model}** on {self.data}, n = {self.n}'
        verdict = f'\n\nGradient masking: {self.audit["verdict"]}' if self.audit else ''
        return title + '\n\n' + '\n'.join(rows) + verdict


def comparison(reports: Sequence[Report]) -> str:
    """One Markdown table of several models; the best that is not masked in bold.

    Raises:
        ValueError: The reports are of different data or images.
    """
    from timm_batchout.robustness.attacks import ATTACKS

    if len({(report.data, tuple(report.indices)) for report in reports}) != 1:
        raise ValueError('The reports are of different images: they cannot stand in one table.')
    columns = list(dict.fromkeys(score.key for report in reports for score in report.scores))
    names = [
        ' '.join(filter(None, ['clean' if a == 'clean' else f'{ATTACKS[a].title} {ATTACKS[a].norm}'.strip(), variant]))
        for a, variant in columns
    ]
    best: dict[tuple[str, str], float] = {}
    for report in reports:
        for score in report.scores:
            if not score.masked:
                best[score.key] = max(best.get(score.key, 0.0), score.accuracy)
    rows = [f'| {reports[0].data}, n = {reports[0].n} | {" | ".join(names)} |', '|---' * (len(names) + 1) + '|']
    for report in reports:
        known = {score.key: score for score in report.scores}
        cells = [_cell(known.get(key), best.get(key)) for key in columns]
        rows.append(f'| {report.model} | {" | ".join(cells)} |')
    return '\n'.join(rows)


def _cell(score: Score | None, best: float | None) -> str:
    if score is None:
        return ''
    text = f'{100 * score.accuracy:.2f}'
    if score.masked:
        return f'{text} (masked)'
    return f'**{text}**' if score.accuracy == best else text
