"""``batchout_<arch>`` for every architecture that timm knows: timm's net with BatchOut added by hooks.

``timm.create_model('batchout_resnet50.a1_in1k', pretrained=True)`` is timm's ``resnet50.a1_in1k``: same weights, same
state_dict keys, same logits in eval; its features are augmented while it trains.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import timm
import torch
from timm.layers import is_scriptable
from timm.models import model_entrypoint, register_model
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from timm.models._registry import _model_default_cfgs, _model_pretrained_cfgs  # the public getters copy: 0.2 s for all
from torch import nn

from timm_batchout.inject import add_batchout, batchout_sites
from timm_batchout.layer import BatchOutConfig
from timm_batchout.text import did_you_mean
from timm_batchout.zoo.pretrained import from_hub

__all__ = ['check_model_name', 'create_twin', 'depth_scaled_eta', 'register_twins']

_logger = logging.getLogger(__name__)

PREFIX = 'batchout_'
_OPTIONS = tuple(field.name for field in fields(BatchOutConfig))

# timm's register_model looks up a model's pretrained cfgs here.
default_cfgs: dict[str, DefaultCfg] = {}


def register_twins(names: str | Iterable[str] | None = None) -> list[str]:
    """Register ``batchout_<arch>`` with timm, with every pretrained tag of the base.

    Importing ``timm_batchout`` does this for every model registered by then. Call it again after importing another
    package that registers models. Architectures that already have a twin keep it.

    Args:
        names: One or several architectures; None: every model that timm lists, without deprecated names.

    Returns:
        The names of the new twins.

    Raises:
        ValueError: An architecture that timm does not know (the message suggests one), or that is itself a twin.
    """
    if names is None:
        names = timm.list_models()
    else:
        names = [_check_base_name(name) for name in ([names] if isinstance(names, str) else names)]
    twins = [_register(name) for name in names if not name.startswith(PREFIX) and not timm.is_model(PREFIX + name)]
    _logger.debug(f'{len(twins)} twins registered.')
    return twins


def check_model_name(name: str) -> None:
    """Check a model name, so that the error can suggest what was meant.

    Raises:
        ValueError: An unknown architecture, or a twin of a twin.
    """
    arch = name.partition('.')[0]
    if ':' in name or timm.is_model(arch):
        return
    base = arch.removeprefix(PREFIX)
    if timm.is_model(base):
        if base.startswith(PREFIX):
            raise ValueError(_twin_of_a_twin(base))
        raise ValueError(f'{arch!r} is not registered yet: call timm_batchout.register_twins() first.')
    raise ValueError(_unknown(arch, timm.list_models()))


def create_twin(arch: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ``arch`` with BatchOut; every ``batchout_<arch>`` calls this.

    Args:
        arch: The base architecture.
        pretrained: Load the weights of the base.
        **kwargs: Fields of ``BatchOutConfig`` (``k``, ``eta``, ``noise``, ``sites``, ...); the rest goes to the base.

    Raises:
        ValueError: A value out of range, a net without sites, a pattern that matches none; before weights are loaded.
    """
    config = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    BatchOutConfig(**config)  # values out of range, before any work
    cfg = kwargs.get('pretrained_cfg')
    if isinstance(cfg, PretrainedCfg):
        cfg = cfg.to_dict()
    if isinstance(cfg, dict):  # the twin's own cfg: a net saved from this one has the base's architecture
        kwargs['pretrained_cfg'] = {**cfg, 'architecture': arch}
    create_base = model_entrypoint(arch)
    if is_scriptable():
        # TorchScript cannot compile hooks. It serves inference, where BatchOut is the identity.
        _logger.warning(f'{PREFIX}{arch} is made scriptable, without BatchOut. Do not train this one.')
        return create_base(pretrained=pretrained, **kwargs)
    if pretrained:
        _check_sites(create_base, kwargs, config)
        if isinstance(cfg, dict) and cfg.get('source') == 'hf-hub':  # 'hf-hub:...', not the base's own weights
            kwargs = from_hub(arch, kwargs)
    return _hook(create_base(pretrained=pretrained, **kwargs), config)


def _check_sites(create_base: Callable[..., nn.Module], kwargs: dict[str, Any], config: dict[str, Any]) -> None:
    """Find bad sites before weights are downloaded, on a net without values (meta device)."""
    placement = {'device': 'meta'} if 'device' in kwargs else {}
    try:
        with torch.device('meta'):
            model = create_base(pretrained=False, **{**kwargs, **placement})
    except Exception:  # a net that computes with values while it is built is checked afterwards
        return
    _hook(model, config)


def depth_scaled_eta(sites: int, factor: float = 2.0) -> tuple[float, float]:
    """The range of eta at which this many sites together push ``factor`` times as much as those of the paper's net.

    Pushes at different depths have independent directions, so their squares add: the total is the root of the sum of
    the mean squares of eta. For the paper's CIFAR-10 net (appendix, table 2: four sites up to 0.1, three up to 0.15)
    it is 0.19.

    Args:
        sites: Number of sites that share that total.
        factor: 2 made a ResNet more robust than 1 at the same clean accuracy; a ViT gained nothing from any
            (recipes/twins/RESULTS.md).

    Returns:
        (0.0, high).
    """
    paper = 4 * 0.1**2 + 3 * 0.15**2  # the mean square of a uniform draw from [0, high] is high ** 2 / 3
    return 0.0, factor * math.sqrt(paper / sites)


def _hook(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    add_batchout(model, BatchOutConfig(**options))
    if 'eta' not in options:
        layers = batchout_sites(model).values()
        for layer in layers:
            layer.set_eta(depth_scaled_eta(len(layers)))
    return model


def _register(arch: str) -> str:
    def twin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_twin(arch, pretrained, **kwargs)

    name = PREFIX + arch
    twin.__name__ = twin.__qualname__ = name
    twin.__doc__ = f"timm's {arch} with BatchOut; see ``create_twin`` for the arguments."
    setattr(sys.modules[__name__], name, twin)  # where pickle looks up a function
    if arch in _model_default_cfgs:
        base: Any = _model_default_cfgs[arch]
        # The registered cfgs name the base's Hub repository in full; those of the module may contain 'timm/' only.
        cfgs = {tag: _model_pretrained_cfgs[f'{arch}.{tag}' if tag else arch] for tag in base.tags}
        default_cfgs[name] = DefaultCfg(base.tags, cfgs, base.is_pretrained)
    register_model(twin)
    return name


def _check_base_name(name: str) -> str:
    if name.startswith(PREFIX):
        raise ValueError(_twin_of_a_twin(name))
    if not timm.is_model(name):
        raise ValueError(_unknown(name, timm.list_models(exclude_filters=f'{PREFIX}*')))
    return name


def _twin_of_a_twin(name: str) -> str:
    return f'{name!r} already has BatchOut. Use {name!r} itself.'


def _unknown(name: str, names: list[str]) -> str:
    hint = did_you_mean(name, names) or ' timm.list_models() lists all models.'
    return f'Unknown model {name!r}.{hint}'


register_twins()
