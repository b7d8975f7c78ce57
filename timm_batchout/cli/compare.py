"""timm-batchout compare"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from timm_batchout.robustness.report import Report
from timm_batchout.robustness.tables import compare

__all__ = ['CompareConfig', 'run']

COLUMNS = ('attack', 'norm', 'radius', 'iteration', 'stage', 'corruption', 'correct', 'n', 'accuracy', 'masked')


@dataclass
class CompareConfig:
    """Show several reports, or several training runs, as one table and as curves.

    Args:
        reports: JSON files of ``evaluate``; or run folders of ``train``.
        csv: Print comma-separated values, a line for each score of a report, instead of a Markdown table.
        figure: Draw accuracy over the radius, or training curves, to this file (.svg, .png).
    """

    reports: list[str]
    csv: bool = False
    figure: str = ''


def run(config: CompareConfig) -> int:
    folders = [path for path in config.reports if Path(path).is_dir()]
    if folders:
        return _compare_runs(config, folders)
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


def _compare_runs(config: CompareConfig, folders: list[str]) -> int:
    if len(folders) < len(config.reports):
        raise ValueError('Compare either reports or run folders, not both at once.')
    if config.csv:
        raise ValueError('--csv is for reports. The metrics of a run are in its metrics.jsonl.')
    from timm_batchout.training.curves import draw_training, read_metrics, training_table

    runs = {folder.rstrip('/'): read_metrics(folder) for folder in folders}
    print(training_table(runs))
    if config.figure:
        draw_training(runs, config.figure)
    return 0
