"""What attacks do to a model: ``evaluate`` it, get a ``Report``."""

from timm_batchout.robustness.harness import evaluate
from timm_batchout.robustness.report import Report
from timm_batchout.robustness.tables import comparison

__all__ = ['Report', 'comparison', 'evaluate']
