"""BatchOut into any net, by forward pre-hooks: same parameters, state_dict keys and eval logits."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from timm_batchout.layer import BatchOut, BatchOutConfig
from timm_batchout.sites import ImageCount, activation_sites, block_sites, match_sites, windowed_blocks

__all__ = ['add_batchout', 'batchout_sites', 'remove_batchout']

ModelT = TypeVar('ModelT', bound=nn.Module)


def add_batchout(model: ModelT, config: BatchOutConfig | None = None) -> ModelT:
    """Hook BatchOut before the activations of a net (or its blocks or stages), in place.

    A sample is an image: where a block folds the windows of an image into the batch dimension, all of them are pushed
    toward the windows of one partner image.

    Attach before ``torch.compile``: hooks added after the first compiled call never fire.

    Args:
        model: Any net with activation modules (``nn.ReLU``, ``nn.GELU``, timm's own, ...). ``sites='block'`` and
            'stage' need timm's ``group_matcher``.
        config: What to hook in, and where. None: the paper's k = 0.5 with eta = 0.1 at every activation.

    Returns:
        The same model, to chain.

    Raises:
        ValueError: The model has BatchOut already, is compiled or scripted, or has no site of the kind asked for; a
            pattern in ``config.sites`` or ``config.eta`` matches no site. The model is left untouched.
    """
    config = BatchOutConfig() if config is None else config
    if any(map(_is_compiled, model.modules())):
        raise ValueError('The model is compiled or scripted, so new hooks would never fire. Call add_batchout first.')
    if batchout_sites(model):
        raise ValueError('This model has BatchOut already. Call remove_batchout(model) first to change it.')
    sites = _find_sites(model, config)
    etas = _eta_by_site(config, list(sites))  # checks every pattern before the first hook is added
    counts = {}
    for name, block in windowed_blocks(model):  # before the sites: the block itself may be one
        counts[f'{name}.'] = count = ImageCount()
        block.register_forward_pre_hook(count.pre_hook)
    for name, eta in etas.items():
        layer = _layer(replace(config, eta=eta))
        layer.images = next((count for prefix, count in counts.items() if f'{name}.'.startswith(prefix)), None)
        sites[name].register_forward_pre_hook(layer.pre_hook)
    return model


def remove_batchout(model: ModelT) -> ModelT:
    """Take every BatchOut hook off again, in place; other hooks stay. A model without any is returned as it is.

    BatchOut's arguments also leave what timm remembers of ``create_model``'s, so that
    ``timm.models.push_to_hf_hub(remove_batchout(model), ...)`` publishes a plain net that loads without this package.
    """
    for _, module, hook_id, _ in _hooks(model, (BatchOut, ImageCount)):
        del module._forward_pre_hooks[hook_id]
    remembered: Any = getattr(model, '_model_args', None)
    if remembered:
        ours = {field.name for field in fields(BatchOutConfig)}
        kept: Any = {name: value for name, value in remembered.items() if name not in ours}
        model._model_args = kept
    return model


def batchout_sites(model: nn.Module) -> dict[str, BatchOut]:
    """What sits where: the name of every augmented activation, and the BatchOut layer in front of it.

    ``batchout_sites(model)['act1'].set_eta(0.2)`` changes one site; for a plain net the dict is empty.
    """
    return {name: layer for name, _, _, layer in _hooks(model, (BatchOut,))}


def _is_compiled(module: nn.Module) -> bool:
    scripted_or_wrapped = isinstance(module, torch.jit.ScriptModule) or hasattr(module, '_orig_mod')
    return scripted_or_wrapped or module._compiled_call_impl is not None  # model.compile() works in place


def _find_sites(model: nn.Module, config: BatchOutConfig) -> dict[str, nn.Module]:
    """The modules that the config's placement is about, by name."""
    net = type(model).__name__
    if config.sites in ('block', 'stage'):
        sites = block_sites(model, coarse=config.sites == 'stage')
        if not sites:
            raise ValueError(
                f'{net} has no {config.sites}s that timm numbers and that hold an activation, so there is no place for '
                f"sites={config.sites!r}. Use sites='act', or a list of activations by name or glob."
            )
        return sites
    sites = activation_sites(model)
    if not sites:
        raise ValueError(
            f'{net} has no activation module to hook BatchOut to (activations called as functions are invisible to '
            'hooks). Put nn.ReLU modules in the net, or use the BatchOut layer in its forward.'
        )
    return sites


def _eta_by_site(config: BatchOutConfig, names: list[str]) -> dict[str, object]:
    """Site name -> eta, in the net's order, for the sites that the config asks for."""
    wanted = list(names)
    if not isinstance(config.sites, str):
        chosen = {name for pattern in config.sites for name in match_sites(pattern, names)}
        wanted = [name for name in names if name in chosen]
    etas = dict.fromkeys(wanted, config.eta)
    if isinstance(config.eta, dict):
        etas = {name: eta for pattern, eta in config.eta.items() for name in match_sites(pattern, names)}
    chosen_etas = {name: etas[name] for name in wanted if name in etas}
    if not chosen_etas:
        raise ValueError(f'sites={config.sites!r} and eta={config.eta!r} have no site in common: name one at least.')
    return chosen_etas


def _layer(config: BatchOutConfig) -> BatchOut:
    return BatchOut(
        config.k,
        config.eta,
        config.noise,
        per_sample=config.per_sample,
        select=config.select,
        stop_gradient=config.stop_gradient,
    )


def _hooks(model: nn.Module, owners: tuple[type, ...]) -> Iterator[tuple[str, nn.Module, int, Any]]:
    """The hooks that are methods of such objects: module name, module, hook id, object."""
    for name, module in model.named_modules():
        for hook_id, hook in list(module._forward_pre_hooks.items()):
            owner = getattr(hook, '__self__', None)
            if isinstance(owner, owners):
                yield name, module, hook_id, owner
