"""timm-batchout list"""

import json
from dataclasses import dataclass

from timm_batchout.hub.listing import bundled_reports, list_robust
from timm_batchout.robustness.tables import overview

__all__ = ['ListConfig', 'run']


@dataclass
class ListConfig:
    """List the bundled weights and their accuracy.

    Args:
        data: Only models of this data set: mnist, cifar10.
        norm: With --json, only AutoAttack in this norm: Linf or L2.
        json: Print JSON: a record for each model and radius of AutoAttack, the most robust first.
    """

    data: str = ''
    norm: str = ''
    json: bool = False


def run(config: ListConfig) -> int:
    if config.norm and not config.json:
        raise ValueError('--norm filters the records of --json. Add --json, or leave out --norm.')
    if config.json:
        print(json.dumps([entry._asdict() for entry in list_robust(config.data, config.norm)], indent=1))
    else:
        print(overview(bundled_reports(config.data)))
    return 0
