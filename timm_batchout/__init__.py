"""BatchOut for timm: importing this package registers its models with ``timm.create_model``."""

from timm_batchout.functional import batchout, gaussian_noise
from timm_batchout.inject import add_batchout, batchout_sites, remove_batchout
from timm_batchout.layer import BatchOut, BatchOutConfig
from timm_batchout.zoo import cifar_nets as _cifar_nets  # noqa: F401
from timm_batchout.zoo import paper_nets as _paper_nets  # noqa: F401  (registers mnist_cnn, cifar_vgg and twins)
from timm_batchout.zoo.timm_twins import register_twins

__version__ = '0.1.0'

__all__ = [
    'BatchOut',
    'BatchOutConfig',
    'add_batchout',
    'batchout',
    'batchout_sites',
    'gaussian_noise',
    'register_twins',
    'remove_batchout',
]
