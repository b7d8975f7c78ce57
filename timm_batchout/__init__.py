"""BatchOut for timm: importing this package registers its models with ``timm.create_model``."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_batchout.functional import batchout, gaussian_noise
    from timm_batchout.hub.listing import list_robust
    from timm_batchout.hub.publish import publish
    from timm_batchout.inject import add_batchout, batchout_sites, remove_batchout
    from timm_batchout.layer import BatchOut, BatchOutConfig
    from timm_batchout.robustness import attacks
    from timm_batchout.robustness.harness import evaluate
    from timm_batchout.robustness.report import Report
    from timm_batchout.robustness.tables import compare
    from timm_batchout.training.launch import train
    from timm_batchout.zoo.timm_twins import register_twins

__version__ = '0.1.0'

__all__ = [
    'BatchOut',
    'BatchOutConfig',
    'Report',
    'add_batchout',
    'attacks',
    'batchout',
    'batchout_sites',
    'compare',
    'evaluate',
    'gaussian_noise',
    'list_robust',
    'publish',
    'register_twins',
    'remove_batchout',
    'train',
]

# Loaded on first use (PEP 562): training and attacks need packages that the method does not.
_MODULES = {
    'functional': ('batchout', 'gaussian_noise'),
    'hub.listing': ('list_robust',),
    'hub.publish': ('publish',),
    'inject': ('add_batchout', 'batchout_sites', 'remove_batchout'),
    'layer': ('BatchOut', 'BatchOutConfig'),
    'robustness.harness': ('evaluate',),
    'robustness.report': ('Report',),
    'robustness.tables': ('compare',),
    'training.launch': ('train',),
    'zoo.timm_twins': ('register_twins',),
}


def __getattr__(name: str) -> Any:
    value: Any
    if name == 'attacks':
        value = import_module(f'{__name__}.robustness.attacks')
    else:
        module = next((module for module, names in _MODULES.items() if name in names), None)
        if module is None:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        value = getattr(import_module(f'{__name__}.{module}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether this process is `timm-batchout ...` or `python -m timm_batchout.cli ...`.

    Then each command registers the models itself if it needs them, so that `--help`, `list` and a misspelt flag are
    answered without loading torch and timm.
    """
    return Path(sys.argv[0]).stem == 'timm-batchout' or sys.orig_argv[1:3] == ['-m', 'timm_batchout.cli']


if not _is_command_line():
    import timm_batchout.zoo.register  # noqa: F401
