"""The paper's two nets (appendix, tables 1 and 2), plain and with BatchOut, in timm's model contract.

``mnist_cnn`` and ``cifar_vgg`` are the plain nets; ``batchout_mnist_cnn`` and ``batchout_cifar_vgg`` are the same nets
with BatchOut in front of every ReLU, so weights fit both. Inputs are pixels in [0, 1].
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, is_scriptable
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from torch import Tensor, nn

from timm_batchout.inject import add_batchout
from timm_batchout.layer import BatchOutConfig
from timm_batchout.sites import activation_sites
from timm_batchout.zoo.cifar_nets import CIFAR10_CLASSES
from timm_batchout.zoo.pretrained import read_weights_card, trusted

__all__ = ['PaperNet']

_logger = logging.getLogger(__name__)


@register_notrace_function  # the check is Python control flow on shapes, which FX cannot trace
def check_input_size(x: Tensor, in_chans: int, height: int, width: int) -> None:
    """Fully connected layers fix the input size: raise a clear error before the first convolution raises its own."""
    if x.dim() != 4 or x.shape[1] != in_chans or x.shape[2] != height or x.shape[3] != width:
        raise ValueError(
            f'This net takes images of shape (batch, {in_chans}, {height}, {width}), got {list(x.shape)}. '
            'Resize the images, or create the model with in_chans=... and img_size=...'
        )


class PaperNet(nn.Module):
    """Convolution stages, each followed by a 2x2 max pool, then fully connected layers. No normalisation.

    Args:
        channels: Output channels of the convolutions, one tuple per stage.
        kernel_size: Kernel size of every convolution; stride 1, padded to keep the size.
        hidden: Widths of the fully connected layers.
        img_size: Height and width of the input, or one number for both.
        num_classes: 0 removes the classifier: the output is then the last hidden layer, (B, hidden[-1]).
        global_pool: 'flatten' (the paper's) feeds every position of the last feature map to the first fully connected
            layer; timm's pools ('avg', 'max', 'avgmax', 'catavgmax') pool it first. '' requires num_classes=0: the
            output is then the unpooled feature map.
        drop_rate: Dropout before the first fully connected layer and before the classifier (paper: 0.5).

    Raises:
        ValueError: img_size too small for the stages, or global_pool='' with a classifier.
    """

    def __init__(
        self,
        channels: tuple[tuple[int, ...], ...],
        kernel_size: int,
        hidden: tuple[int, ...],
        img_size: int | tuple[int, int] = 32,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'flatten',
        drop_rate: float = 0.5,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self._factory = {'device': device, 'dtype': dtype}
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.in_chans = in_chans
        self.img_size = (height, width)
        self.num_features = channels[-1][-1]
        self.feature_size = (height >> len(channels), width >> len(channels))
        if min(self.feature_size) < 1:
            raise ValueError(f'img_size={img_size} is too small: {len(channels)} poolings leave no pixel.')
        self.hidden = hidden
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.stages = nn.Sequential()
        self.feature_info = []
        prev = in_chans
        for i, widths in enumerate(channels):
            layers: list[tuple[str, nn.Module]] = [('pool', nn.MaxPool2d(2))] if i else []
            for j, width_out in enumerate(widths, 1):
                conv = nn.Conv2d(prev, width_out, kernel_size, padding=kernel_size // 2, **self._factory)
                layers += [(f'conv{j}', conv), (f'act{j}', nn.ReLU(inplace=True))]
                prev = width_out
            self.stages.append(nn.Sequential(OrderedDict(layers)))
            self.feature_info.append(dict(num_chs=prev, reduction=2**i, module=f'stages.{i}'))
        self.pool: nn.Module = nn.MaxPool2d(2)
        self.feature_info.append(dict(num_chs=prev, reduction=2 ** len(channels), module='pool'))

        self.drop = nn.Dropout(drop_rate)
        self.pre_logits = self._build_pre_logits(self._build_pool(global_pool, num_classes))
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self._build_head(num_classes)
        self._initialize_weights()

    def _build_pool(self, global_pool: str, num_classes: int) -> int:
        """Set the pooling; returns the number of features that enter the first fully connected layer."""
        if global_pool == '' and num_classes > 0:
            raise ValueError("global_pool='' returns feature maps and requires num_classes=0.")
        self.pool_type = global_pool
        self.global_pool: nn.Module
        self.head_hidden_size = self.hidden[-1] if global_pool else self.num_features
        if global_pool in ('', 'flatten'):
            self.global_pool = nn.Flatten(1) if global_pool else nn.Identity()
            return self.num_features * self.feature_size[0] * self.feature_size[1]
        pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.global_pool = pool
        return self.num_features * pool.feat_mult()

    def _build_pre_logits(self, prev: int) -> nn.Module:
        if self.pool_type == '':
            return nn.Identity()
        layers: list[tuple[str, nn.Module]] = []
        for j, width in enumerate(self.hidden, 1):
            layers += [(f'fc{j}', nn.Linear(prev, width, **self._factory)), (f'act{j}', nn.ReLU(inplace=True))]
            prev = width
        return nn.Sequential(OrderedDict(layers))

    def _build_head(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes, **self._factory) if num_classes else nn.Identity()

    def _initialize_weights(self) -> None:
        # He et al., for ReLU nets without normalisation. A small classifier, so that training starts at uniform odds.
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
                nn.init.constant_(module.bias, 0)  # type: ignore[arg-type]
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.01)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r'^stages\.0', blocks=r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.conv(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; another pool type also renews the first fully connected layer.

        Raises:
            ValueError: A net without pooling (global_pool='') has no fully connected layers left to classify with.
        """
        weight = next(self.parameters())
        self._factory = {'device': weight.device, 'dtype': weight.dtype}
        if self.pool_type == '' and (num_classes > 0 or global_pool):
            raise ValueError("This net was reduced to feature maps (global_pool=''). Create a new one to classify.")
        if global_pool is not None and global_pool != self.pool_type:
            in_features = self._build_pool(global_pool, num_classes)
            if global_pool == '':
                self.pre_logits = nn.Identity()
            else:  # in place: the activations after it, and BatchOut's hooks on them, stay
                self.pre_logits.fc1 = nn.Linear(in_features, self.hidden[0], **self._factory)
        self._build_head(num_classes)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward with the feature maps of ``feature_info``: each stage before its max pool, and the last pool.

        Args:
            x: Images, (B, C, H, W), in [0, 1].
            indices: Take the last n if int, all if None, select matching indices if a sequence.
            norm: No effect, because there is no final norm layer.
            stop_early: Stop at the last wanted feature map.
            output_fmt: 'NCHW'.
            intermediates_only: Return the feature maps only.

        Raises:
            ValueError: Another output format, or an input size that the net was not built for.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        check_input_size(x, self.in_chans, self.img_size[0], self.img_size[1])
        intermediates = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > max_index:
                break
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in take_indices:
                intermediates.append(x)
        if not stop_early or max_index == len(self.stages):
            x = self.pool(x)
            if len(self.stages) in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the layers that the wanted intermediates do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        if max_index < len(self.stages):
            self.stages = self.stages[: max_index + 1]
            self.pool = nn.Identity()
            self.num_features = self.feature_info[max_index]['num_chs']
            prune_head = True  # the head was sized for the last feature map
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        check_input_size(x, self.in_chans, self.img_size[0], self.img_size[1])
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x)
        else:
            x = self.stages(x)
        return self.pool(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pre_logits(self.global_pool(self.drop(x)))
        return x if pre_logits else self.head(self.head_drop(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# Appendix, tables 1 and 2: eta in front of each ReLU, in the order of the layers.
MNIST_ETA = {'stages.0.act1': 0.05, 'stages.1.act1': 0.1, 'pre_logits.act1': 0.1}
CIFAR_ETA = {
    'stages.0.act1': (0.0, 0.1),
    'stages.0.act2': (0.0, 0.1),
    'stages.1.act1': (0.0, 0.1),
    'stages.1.act2': (0.0, 0.1),
    'stages.1.act3': (0.0, 0.15),
    'pre_logits.act1': (0.0, 0.15),
    'pre_logits.act2': (0.0, 0.15),
}

_mnist_cnn = partial(PaperNet, channels=((32,), (32,)), kernel_size=5, hidden=(256,))
_cifar_vgg = partial(PaperNet, channels=((32, 64), (64, 64, 64)), kernel_size=3, hidden=(512, 512))


def _cfg(name: str, input_size: tuple[int, int, int], **kwargs: Any) -> dict[str, Any]:
    """A pretrained cfg; its weights file and notes come from the JSON beside the weights."""
    return dict(
        input_size=input_size,
        mean=(0.0,) * input_size[0],
        std=(1.0,) * input_size[0],
        num_classes=10,
        fixed_input_size=True,
        crop_pct=1.0,
        interpolation='bilinear',
        first_conv='stages.0.conv1',
        classifier='head',
        license='apache-2.0',
        paper_name='BatchOut: Batch-level feature augmentation to improve robustness to adversarial examples',
        **read_weights_card(name),
        **kwargs,
    )


_mnist_cfg = partial(_cfg, input_size=(1, 28, 28), pool_size=(7, 7), label_names=tuple('0123456789'))
_cifar_cfg = partial(
    _cfg,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    label_names=CIFAR10_CLASSES,
)

default_cfgs = generate_default_cfgs(
    {
        name: make_cfg(name)
        for make_cfg, names in (
            (
                _mnist_cfg,
                (
                    'mnist_cnn.baseline_mnist',
                    'mnist_cnn.fgsm_at_mnist',
                    'mnist_cnn.pgd_at_mnist',
                    'batchout_mnist_cnn.mnist',
                ),
            ),
            (
                _cifar_cfg,
                (
                    'cifar_vgg.baseline_cifar10',
                    'cifar_vgg.fgsm_at_cifar10',
                    'cifar_vgg.pgd_at_cifar10',
                    'batchout_cifar_vgg.cifar10',
                ),
            ),
        )
        for name in names
    }
)


def _create(variant: str, net: Callable[..., PaperNet], pretrained: bool, **kwargs: Any) -> PaperNet:
    if pretrained:
        kwargs = trusted(variant, kwargs)
    return build_model_with_cfg(
        net,
        variant,
        pretrained,
        pretrained_filter_fn=None,
        feature_cfg=dict(out_indices=(0, 1, 2), feature_cls='getter'),
        **kwargs,
    )


def _create_batchout(
    variant: str, net: partial[PaperNet], paper_eta: dict[str, Any], pretrained: bool, **kwargs: Any
) -> PaperNet:
    """The net with BatchOut. Keyword arguments named as in ``BatchOutConfig`` override the paper's values."""
    chosen = {name: kwargs.pop(name) for name in BatchOutConfig.__dataclass_fields__ if name in kwargs}
    config = BatchOutConfig(**{'eta': paper_eta, **chosen})

    def build(**model_args: Any) -> PaperNet:
        model = net(**model_args)
        if is_scriptable():
            # TorchScript cannot compile hooks. It serves inference, where BatchOut is the identity.
            _logger.warning(f'{variant} is made scriptable, without BatchOut. Do not train this one.')
            return model
        if 'eta' in chosen:
            return add_batchout(model, config)
        present = activation_sites(model)  # a net without fully connected layers lacks some of the paper's sites
        eta = {name: value for name, value in paper_eta.items() if name in present}
        return add_batchout(model, replace(config, eta=eta))

    return _create(variant, build, pretrained, **kwargs)


@register_model
def mnist_cnn(pretrained: bool = False, **kwargs: Any) -> PaperNet:
    """The paper's MNIST net (table 1), without BatchOut."""
    return _create('mnist_cnn', _mnist_cnn, pretrained, **kwargs)


@register_model
def cifar_vgg(pretrained: bool = False, **kwargs: Any) -> PaperNet:
    """The paper's VGG-style CIFAR-10 net (table 2), without BatchOut."""
    return _create('cifar_vgg', _cifar_vgg, pretrained, **kwargs)


@register_model
def batchout_mnist_cnn(pretrained: bool = False, **kwargs: Any) -> PaperNet:
    """The paper's MNIST net (table 1), with BatchOut."""
    return _create_batchout('batchout_mnist_cnn', _mnist_cnn, MNIST_ETA, pretrained, **kwargs)


@register_model
def batchout_cifar_vgg(pretrained: bool = False, **kwargs: Any) -> PaperNet:
    """The paper's VGG-style CIFAR-10 net (table 2), with BatchOut."""
    return _create_batchout('batchout_cifar_vgg', _cifar_vgg, CIFAR_ETA, pretrained, **kwargs)
