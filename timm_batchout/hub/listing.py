"""The bundled weights and their robustness. Imports neither torch nor timm."""

import re
from typing import NamedTuple

from timm_batchout.robustness.report import Report
from timm_batchout.zoo.pretrained import bundled_cards

__all__ = ['RobustModel', 'bundled_reports', 'list_robust']


class RobustModel(NamedTuple):
    """A bundled model under standard AutoAttack at one radius.

    Attributes:
        name: Name for ``timm.create_model(name, pretrained=True)``.
        data: Name of its data set.
        norm: 'Linf' or 'L2'.
        epsilon: Radius in [0, 1] pixels.
        accuracy: Robust accuracy under AutoAttack, in [0, 1].
        n: Number of attacked images.
        clean: Accuracy without attack, in [0, 1].
    """

    name: str
    data: str
    norm: str
    epsilon: float
    accuracy: float
    n: int
    clean: float


def bundled_reports(data: str = '') -> dict[str, Report]:
    """The report of every bundled model, by 'arch.tag'.

    Args:
        data: Only models of this data set, e.g. 'cifar10'; '' for all.

    Raises:
        ValueError: No bundled model belongs to this data set.
    """
    reports = {name: Report.from_dict(card['report']) for name, card in bundled_cards().items()}
    chosen = {name: report for name, report in reports.items() if _key(report.data).startswith(_key(data))}
    if not chosen:
        there = ', '.join(sorted({report.data for report in reports.values()}))
        raise ValueError(f'No bundled model for the data set {data!r}. Available: {there}.')
    return chosen


def list_robust(dataset: str = '', norm: str = '') -> list[RobustModel]:
    """The bundled models evaluated with standard AutoAttack, the most robust of each threat model first.

    Args:
        dataset: 'cifar10', 'mnist', ...; '' for all.
        norm: 'Linf' or 'L2'; '' for both.

    Raises:
        ValueError: No bundled model belongs to this data set; an unknown norm.
    """
    if norm not in ('', 'Linf', 'L2'):
        raise ValueError(f"norm must be 'Linf' or 'L2', got {norm!r}.")
    found = [
        RobustModel(
            name, report.data, score.norm, score.radius, score.accuracy, score.n, report.score('clean').accuracy
        )
        for name, report in bundled_reports(dataset).items()
        for score in report.scores
        if score.attack.startswith('autoattack') and not score.stage and score.radius is not None
    ]
    chosen = [model for model in found if norm in ('', model.norm)]
    return sorted(chosen, key=lambda model: (model.data, model.norm, -model.epsilon, -model.accuracy, -model.clean))


def _key(data: str) -> str:
    return re.sub('[^a-z0-9]', '', data.lower())
