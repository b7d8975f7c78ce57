"""ResNet-18 for 32x32 images: timm's ResNet with a 3x3 stem and without the stem's pooling.

``resnet18_cifar`` is the net that most robustness papers train on CIFAR-10 (He et al., 2016, section 4.2, with the
blocks of ResNet-18); ``resnet18_cifar_w32`` is the same at half the width. Both have a ``batchout_`` twin.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from timm_batchout.zoo.pretrained import read_weights_card, trusted

__all__ = ['CIFAR10_CLASSES', 'CifarResNet']

CIFAR10_CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
STEM_REDUCTION = 4  # of the 7x7 stem and pooling that these nets lack


class CifarResNet(ResNet):
    """timm's ResNet on small images.

    Args:
        width: Channels of the stem and of the first stage; each further stage doubles them. An even number.
        layers: Blocks per stage.
        in_chans: Channels of the images.
        **kwargs: Arguments of timm's ``ResNet``.

    Raises:
        ValueError: A width that is odd or below 2.
    """

    def __init__(self, width: int = 64, layers: tuple[int, ...] = (2, 2, 2, 2), in_chans: int = 3, **kwargs: Any):
        if width < 2 or width % 2:
            raise ValueError(f'width must be an even number of channels, at least 2; got {width}.')
        options: dict[str, Any] = dict(channels=tuple(width * 2**stage for stage in range(len(layers))), **kwargs)
        # Only the deep stem takes a width. Its convolutions are replaced by a single one.
        block: Any = BasicBlock
        super().__init__(block, layers, in_chans=in_chans, stem_type='deep', stem_width=width // 2, **options)
        stem = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode='fan_out', nonlinearity='relu')
        weight = self.fc.weight
        self.add_module('conv1', stem.to(device=weight.device, dtype=weight.dtype))
        self.add_module('maxpool', nn.Identity())
        info: Any
        for info in self.feature_info:
            info['reduction'] = max(1, info['reduction'] // STEM_REDUCTION)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return dict(stem=r'^conv1|bn1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')


def _cfg(name: str = '') -> dict[str, Any]:
    """A pretrained cfg; with a name, that of bundled weights."""
    weights: dict[str, Any] = {**read_weights_card(name), 'label_names': CIFAR10_CLASSES} if name else {}
    return dict(
        input_size=(3, 32, 32),
        pool_size=(4, 4),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        num_classes=10,
        crop_pct=1.0,
        interpolation='bilinear',
        first_conv='conv1',
        classifier='fc',
        license='apache-2.0',
        **weights,
    )


default_cfgs = generate_default_cfgs(
    {
        'resnet18_cifar': _cfg(),
        **{
            name: _cfg(name)
            for name in (
                'resnet18_cifar_w32.baseline_cifar10',
                'resnet18_cifar_w32.batchout_cifar10',
                'resnet18_cifar_w32.trades_cifar10',
            )
        },
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    if pretrained:
        kwargs = trusted(variant, kwargs)
    return build_model_with_cfg(CifarResNet, variant, pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for 32x32 images, 11.2 million parameters at ``width=64``."""
    return _create('resnet18_cifar', pretrained, **kwargs)


@register_model
def resnet18_cifar_w32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """``resnet18_cifar`` at half the width: 2.8 million parameters."""
    return _create('resnet18_cifar_w32', pretrained, **{'width': 32, **kwargs})
