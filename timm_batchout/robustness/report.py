"""What an evaluation found: JSON there and back, and tables."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timm_batchout.provenance import write_atomically

__all__ = ['Report', 'Score', 'cell', 'comparison', 'title', 'wilson']


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
        """Raises ValueError if the file holds something else."""
        text = Path(path).read_bytes()
        try:
            return cls.from_dict(json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{str(path)!r} is no report that `timm-batchout evaluate` wrote ({error!r}).') from error

    def table(self) -> str:
        """Markdown: a row per attack and variant."""
        rows = ['| attack | robust accuracy % (95%) | median distance |', '|---|---|---|']
        for score in self.scores:
            low, high = score.interval
            distance = '' if score.median_distance is None else f'{score.median_distance:.3f}'
            rows.append(
                f'| {title(*score.key)}{" (masked)" * score.masked} | '
                f'{100 * score.accuracy:.2f} ({100 * low:.1f} to {100 * high:.1f}) | {distance} |'
            )
        head = f'**{self.model}** on {self.data}, n = {self.n}'
        verdict = f'\n\nGradient masking: {self.audit["verdict"]}' if self.audit else ''
        return head + '\n\n' + '\n'.join(rows) + verdict


def comparison(reports: Sequence[Report], names: Sequence[str] = ()) -> str:
    """One Markdown table of several models, a row for each attack; the best that is not masked in bold.

    Nothing is best where nothing withstands, where it is the only one, or where the models were not attacked alike
    (other settings, or images of another net), which the row says. Stages of AutoAttack are left out where they left
    right what the whole attack did.

    Args:
        reports: Of the same images.
        names: Column heads; the models' names if left out.

    Raises:
        ValueError: The reports are of different data or images.
    """
    if len({(report.data, report.indices, report.n) for report in reports}) != 1:
        raise ValueError('The reports are of different images: they cannot stand in one table.')
    rows = [
        f'| {reports[0].data}, accuracy % | n | {" | ".join(names or [report.model for report in reports])} |',
        '|---' * (len(reports) + 2) + '|',
    ]
    known = [{(*score.key, score.n): score for score in report.scores} for report in reports]
    for key in dict.fromkeys(key for scores in known for key in scores):
        same = [scores.get(key) for scores in known]
        whole = [scores.get((key[0], key[1].partition(' after ')[0], key[2])) for scores in known]
        if ' after ' in key[1] and [_correct(score) for score in same] == [_correct(score) for score in whole]:
            continue
        honest = [score.accuracy for score in same if score and not score.masked]
        alike = _attacked_alike(reports, key[0])
        comparable = alike and len([score for score in same if score]) > 1
        cells = [cell(score, max(honest, default=0) if comparable else 0) for score in same]
        rows.append(f'| {title(*key[:2])}{"" if alike else " (settings differ)"} | {key[2]} | {" | ".join(cells)} |')
        distances = [score.median_distance if score else None for score in same]
        if any(distances):
            shown = ['' if distance is None else f'{distance:.3f}' for distance in distances]
            rows.append(f'| {title(*key[:2])}: median distance | {key[2]} | {" | ".join(shown)} |')
    return '\n'.join(rows)


def title(attack: str, variant: str) -> str:
    """As tables name an attack: 'PGD Linf 8/255'."""
    from timm_batchout.robustness.attacks import ATTACKS

    if attack == 'clean':
        return 'clean'
    variant = '1 iteration' if variant == '1 iterations' else variant
    return ' '.join(filter(None, [ATTACKS[attack].title, ATTACKS[attack].norm, variant]))


def _correct(score: Score | None) -> int | None:
    return score.correct if score else None


def _attacked_alike(reports: Sequence[Report], attack: str) -> bool:
    """With the same settings; how many images and which radii stand in the table."""
    settings = [report.settings[attack] for report in reports if attack in report.settings]
    alike = [{name: value for name, value in each.items() if name not in ('n', 'eps')} for each in settings]
    return all(each == alike[0] for each in alike)


def cell(score: Score | None, best: float) -> str:
    """In percent; bold where it is the best, but 0 never is."""
    if score is None:
        return ''
    text = f'{100 * score.accuracy:.2f}'
    if score.masked:
        return f'{text} (masked)'
    return f'**{text}**' if score.accuracy == best > 0 else text
