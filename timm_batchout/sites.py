"""Where BatchOut goes: the activation sites of a net.

The paper augments "pre-relu activations" (section 6.1) after every convolution and fully connected layer. Carried over
to any net: the input of every activation module. Gates are left out: a sigmoid, or an activation inside a channel
attention block, computes a weight for features, not features.
"""

from fnmatch import fnmatchcase

from timm.layers import activations as timm_activations
from torch import nn

__all__ = ['activation_sites', 'match_sites']

# Softmax, Sigmoid, Tanh and their hard versions are gates or normalisers wherever timm's backbones use them.
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Softplus,
    timm_activations.Swish, timm_activations.Mish, timm_activations.HardSwish, timm_activations.HardMish,
    timm_activations.PReLU, timm_activations.GELU, timm_activations.GELUTanh, timm_activations.QuickGELU,
)  # fmt: skip

# Channel attention of timm, by class name: the classes are spread over many model files.
_ATTENTION = (
    '*SqueezeExcite*', 'SE', 'SEModule', 'SEBlock', 'SqueezeExciteCl', 'EffectiveSEModule', '*ChannelAttn*',
    'ChannelGate', 'CbamModule', 'LightCbamModule', 'EcaModule', 'CecaModule', 'GatherExcite', 'GlobalContext',
    'SelectiveKernelAttn', 'SplitAttn',
)  # fmt: skip


def activation_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The activation modules of a net by name, in registration order, without gates and channel attention.

    A module that is called several times in a forward (a shared ReLU) is listed once and augmented at every call.
    The net itself is never a site, even when it is an activation.
    """
    sites: dict[str, nn.Module] = {}
    attention: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in attention):
            continue
        if name and any(fnmatchcase(type(module).__name__, pattern) for pattern in _ATTENTION):
            attention.append(f'{name}.')
        elif name and isinstance(module, _ACTIVATIONS):
            sites[name] = module
    return sites


def match_sites(pattern: str, names: list[str]) -> list[str]:
    """The names that a glob (or an exact name) matches.

    Raises:
        ValueError: It matches none of them; the message lists them.
    """
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        shown = ', '.join(names[:12]) + (f', ... ({len(names)} in all)' if len(names) > 12 else '')
        raise ValueError(f'The pattern {pattern!r} matches no activation site. Sites of this net: {shown}.')
    return matched
