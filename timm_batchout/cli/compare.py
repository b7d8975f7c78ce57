"""timm-batchout compare"""

import csv
import sys
from dataclasses import dataclass

from timm_batchout.robustness.report import Report
from timm_batchout.robustness.tables import compare

__all__ = ['CompareConfig', 'run']

COLUMNS = ('attack', 'norm', 'radius', 'iteration', 'stage', 'corruption', 'correct', 'n', 'accuracy', 'masked')


@dataclass
class CompareConfig:
    """Show reports of several models as one table, and as curves.

    Args:
        reports: JSON files that ``evaluate`` wrote.
        csv: Print comma-separated values, a line for each score, instead of a Markdown table.
        figure: Draw accuracy over the radius to this file (.svg, .png).
    """

    reports: list[str]
    csv: bool = False
    figure: str = ''


def run(config: CompareConfig) -> int:
    reports = [Report.load(path) for path in config.reports]
    if config.csv:
        writer = csv.writer(sys.stdout, lineterminator='\n')
        writer.writerow(['model', 'data', *COLUMNS])
        for report in reports:
            for score in report.scores:
                writer.writerow([report.model, report.data, *(getattr(score, name) for name in COLUMNS)])
    else:
        print(compare(reports))
    if config.figure:
        from timm_batchout.robustness.plots import draw_curves

        draw_curves(reports, config.figure)
    return 0
