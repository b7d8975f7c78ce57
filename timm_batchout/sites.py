"""Where BatchOut goes: the sites of a net.

The paper augments "pre-relu activations" (section 6.1) after every convolution and fully connected layer. In any other
net the sites are the inputs of its activation modules. Gates are left out: a sigmoid, or an activation inside a channel
attention block, computes a weight for features, not features. Layers that compute position biases are left out too:
the rows of their input are positions, not images.

Hooks cannot see activations that a forward calls as functions. Of timm's nets only MobileViT V2 has such activations
(on the values of its attention).

The alternative placement, one site per block or per stage, is the input of each of timm's blocks or stages.
"""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from timm.layers import activations as timm_activations
from timm.layers import register_notrace_module
from torch import nn
from torch.fx import Proxy

__all__ = ['ImageCount', 'activation_sites', 'block_sites', 'match_sites', 'windowed_blocks']

# Softmax, Sigmoid, Tanh and their hard versions are gates or normalisers wherever timm's backbones use them.
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Softplus,
    timm_activations.Swish, timm_activations.Mish, timm_activations.HardSwish, timm_activations.HardMish,
    timm_activations.PReLU, timm_activations.GELU, timm_activations.GELUTanh, timm_activations.QuickGELU,
)  # fmt: skip

# Make them leaves for FX, which then calls them with their hooks; torch.nn's own activations are leaves already.
for activation in _ACTIVATIONS:
    if activation.__module__ == timm_activations.__name__:
        register_notrace_module(activation)

# Activations of timm's models, and norms with an activation in their formula: their site is the input of the norm.
_ACTIVATION_NAMES = ('GammaAct', 'EvoNorm2d*', 'FilterResponseNormTlu2d', 'InplaceAbn')

# Attention over channels or places in timm and torchvision, by class name, because they are spread over many files.
_ATTENTION = (
    '*SqueezeExcit*', 'SE', 'SEModule', 'SEBlock', 'SqueezeExciteCl', 'EffectiveSEModule', '*ChannelAttn*',
    'ChannelGate', 'CbamModule', 'LightCbamModule', 'EcaModule', 'CecaModule', 'GatherExcite', 'GlobalContext',
    'SelectiveKernelAttn', 'SplitAttn', '*CoordAttn', 'EfficientLocalAttn', 'BatNonLocalAttn', 'SpatialAttention',
)  # fmt: skip

# Small nets that turn relative positions into attention biases: a class, and two attributes of Swin V2's attention.
_POSITION = ('RelPosMlp',)
_POSITION_ATTRIBUTES = ('cpb_mlp', 'meta_mlp')

# Blocks inside which an image is several rows of the batch: B images become B * windows rows, image by image.
_WINDOWED = ('mobilevit.MobileVitBlock', 'efficientvit_msra.LocalWindowAttention', 'tnt.Block')


def activation_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The activation modules of a net by name, in registration order, without gates and channel attention.

    A module that is called several times in a forward (a shared ReLU) is listed once and augmented at every call.
    The net itself is never a site, even when it is an activation.
    """
    sites: dict[str, nn.Module] = {}
    left_out: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(left_out):
            continue
        if _is_left_out(name, module):
            left_out += (f'{name}.',)
        elif _is_activation(module):
            sites[name] = module
    return sites


def _is_left_out(name: str, module: nn.Module) -> bool:
    return name.rpartition('.')[2] in _POSITION_ATTRIBUTES or _is_called(module, _ATTENTION + _POSITION)


def _is_activation(module: nn.Module) -> bool:
    if isinstance(module, _ACTIVATIONS):
        return True
    # apply_act: timm's norms can be told to leave their activation out
    return _is_called(module, _ACTIVATION_NAMES) and bool(getattr(module, 'apply_act', True))


def _is_called(module: nn.Module, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(type(module).__name__, pattern) for pattern in patterns)


def block_sites(model: nn.Module, coarse: bool = False) -> dict[str, nn.Module]:
    """The blocks of a timm net (coarse: its stages) by name, in registration order.

    They are what ``model.group_matcher(coarse)`` numbers, timm's own notion of depth; of those, the modules that hold
    an activation site. Empty for a net without ``group_matcher`` and for one whose blocks are single layers (VGG).
    """
    group_matcher: Any = getattr(model, 'group_matcher', None)
    try:
        matcher = group_matcher(coarse=coarse) if group_matcher else {}
    except AssertionError:  # RDNet's knows one granularity only
        return {}
    if callable(matcher) or 'blocks' not in matcher:  # Inception V3 groups by a function, HRNet knows a stem only
        return {}
    blocks = matcher['blocks']
    patterns = [blocks] if isinstance(blocks, str) else [pattern for pattern, _ in blocks]
    numbered = [re.compile(pattern) for pattern in patterns if r'\d' in pattern]
    modules = dict(model.named_modules())
    activations = activation_sites(model)
    sites: dict[str, nn.Module] = {}
    for parameter, _ in model.named_parameters():
        match = next(filter(None, (pattern.match(parameter) for pattern in numbered)), None)
        name = match.group(0) if match else ''
        called = name in modules and type(modules[name]).forward is not nn.Module.forward  # a ModuleList never is
        if called and name not in sites and any(act.startswith(f'{name}.') for act in activations):
            sites[name] = modules[name]
    return sites


def windowed_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks that fold windows of an image into the batch dimension, with their names."""
    for name, module in model.named_modules():
        kind = f'{type(module).__module__.rpartition(".")[2]}.{type(module).__name__}'
        if name and kind in _WINDOWED:
            yield name, module


class ImageCount:
    """How many images a windowed block was given, for the sites inside it: they may see more rows than images."""

    def __init__(self) -> None:
        self._by_device: dict[Any, int] = {}  # nn.DataParallel's replicas share this object

    def on(self, device: Any) -> int:
        return self._by_device[device]

    def pre_hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training:  # nothing is pushed, and an exported net's symbolic sizes must not be kept
            return
        if any(isinstance(arg, Proxy) for arg in args):
            raise TypeError(
                f'torch.fx cannot trace a {type(module).__name__} in training with BatchOut inside: it counts images. '
                'Trace the net in eval mode, or call remove_batchout(model) first.'
            )
        # A TNT block takes the pixels of all windows first and the patches of the images second.
        tensors = [arg for arg in args if hasattr(arg, 'shape')]
        self._by_device[tensors[0].device] = min(tensor.shape[0] for tensor in tensors)


def match_sites(pattern: str, names: list[str]) -> list[str]:
    """The names that a glob (or an exact name) matches.

    Raises:
        ValueError: No name matches; the message lists the names.
    """
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        shown = ', '.join(names[:12]) + (f', ... ({len(names)} in all)' if len(names) > 12 else '')
        raise ValueError(f'The pattern {pattern!r} matches no site. Sites of this net: {shown}.')
    return matched
