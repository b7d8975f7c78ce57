"""Importing this module registers the zoo with timm: this package's nets, and a twin of every net of timm's."""

from timm_batchout.zoo import (
    cifar_nets,  # noqa: F401
    paper_nets,  # noqa: F401
    timm_twins,  # noqa: F401  (last, because our own nets have twins, too)
)
