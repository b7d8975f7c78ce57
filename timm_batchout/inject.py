"""BatchOut into any net, by forward pre-hooks on its activations: same parameters, state_dict and eval logits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from timm_batchout.batchout import BatchOut, BatchOutConfig
from timm_batchout.sites import activation_sites, match_sites

__all__ = ['add_batchout', 'batchout_sites', 'remove_batchout']

ModelT = TypeVar('ModelT', bound=nn.Module)


def add_batchout(model: ModelT, config: BatchOutConfig | None = None) -> ModelT:
    """Hook BatchOut before the activations of a net, in place.

    Attach before ``torch.compile``: hooks added after the first compiled call never fire.

    Args:
        model: Any net with activation modules (``nn.ReLU``, ``nn.GELU``, timm's own, ...).
        config: What to hook in, and where. None: the paper's k = 0.5 with eta = 0.1 at every activation.

    Returns:
        The same model, to chain.

    Raises:
        ValueError: The model has BatchOut already, is compiled or scripted, or has no activation module; a pattern in
            ``config.sites`` or ``config.eta`` matches no site. The model is left untouched.
    """
    config = BatchOutConfig() if config is None else config
    if hasattr(model, '_orig_mod') or isinstance(model, torch.jit.ScriptModule):
        raise ValueError('The model is compiled or scripted, so new hooks would never fire. Call add_batchout first.')
    if batchout_sites(model):
        raise ValueError('This model has BatchOut already. Call remove_batchout(model) first to change it.')
    sites = activation_sites(model)
    if not sites:
        raise ValueError(
            f'{type(model).__name__} has no activation module to hook BatchOut to (activations called as functions '
            'are invisible to hooks). Put nn.ReLU modules in the net, or use the BatchOut layer in its forward.'
        )
    etas = _eta_by_site(config, list(sites))  # checks every pattern before the first hook is added
    for name, eta in etas.items():
        layer_config = replace(config, eta=eta)
        sites[name].register_forward_pre_hook(_layer(layer_config).pre_hook)
    return model


def remove_batchout(model: ModelT) -> ModelT:
    """Take every BatchOut hook off again, in place; other hooks stay. A model without any is returned as it is."""
    for _, module, hook_id, _ in _hooks(model):
        del module._forward_pre_hooks[hook_id]
    return model


def batchout_sites(model: nn.Module) -> dict[str, BatchOut]:
    """What sits where: the name of every augmented activation, and the BatchOut layer in front of it.

    ``batchout_sites(model)['act1'].set_eta(0.2)`` changes one site; for a plain net the dict is empty.
    """
    return {name: layer for name, _, _, layer in _hooks(model)}


def _eta_by_site(config: BatchOutConfig, names: list[str]) -> dict[str, object]:
    """Site name -> eta, in the net's order, for the sites that the config asks for."""
    wanted = list(names)
    if config.sites != 'act':
        chosen = {name for pattern in config.sites for name in match_sites(pattern, names)}
        wanted = [name for name in names if name in chosen]
    if not isinstance(config.eta, dict):
        return dict.fromkeys(wanted, config.eta)
    etas = {name: eta for pattern, eta in config.eta.items() for name in match_sites(pattern, names)}
    return {name: etas[name] for name in wanted if name in etas}


def _layer(config: BatchOutConfig) -> BatchOut:
    return BatchOut(
        config.k,
        config.eta,
        config.noise,
        per_sample=config.per_sample,
        select=config.select,
        stop_gradient=config.stop_gradient,
    )


def _hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, BatchOut]]:
    """Every BatchOut hook of a net: module name, module, hook id, layer."""
    for name, module in model.named_modules():
        for hook_id, hook in list(module._forward_pre_hooks.items()):
            layer = getattr(hook, '__self__', None)
            if isinstance(layer, BatchOut):
                yield name, module, hook_id, layer
