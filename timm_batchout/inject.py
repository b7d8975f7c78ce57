"""Add BatchOut to any net by forward pre-hooks: same parameters, state_dict keys and eval logits."""

from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import update_wrapper
from typing import Any, TypeVar

import torch
from torch import nn

from timm_batchout.layer import BatchOut, BatchOutConfig
from timm_batchout.sites import ImageCount, activation_sites, block_sites, match_sites, windowed_blocks

__all__ = ['add_batchout', 'batchout_sites', 'remove_batchout']

ModelT = TypeVar('ModelT', bound=nn.Module)


def add_batchout(model: ModelT, config: BatchOutConfig | None = None, **options: Any) -> ModelT:
    """Hook BatchOut before the activations of a net (or its blocks or stages), in place.

    The leading dimension of every augmented tensor must be the batch. A sample is an image: where a block folds the
    windows of an image into the batch dimension, all of them are pushed toward the windows of one partner image.

    Attach before ``torch.compile``: hooks added after the first compiled call never fire.

    Args:
        model: Any net with activation modules (``nn.ReLU``, ``nn.GELU``, timm's own, ...). ``sites='block'`` and
            'stage' need timm's ``group_matcher``.
        config: What to add, and where. None: the paper's k = 0.5 with eta = 0.1 at every activation.
        **options: Fields of ``BatchOutConfig`` in place of a config: ``add_batchout(model, eta=(0, 0.1))``.

    Returns:
        The same model, so that calls can be chained.

    Raises:
        ValueError: The model already has BatchOut, is compiled or scripted, or has no site of the requested kind; a
            pattern in ``config.sites`` or ``config.eta`` matches no site; attention around a site takes positions
            first. The model is left unchanged.
    """
    if config is not None and options:
        raise ValueError(f'Give a config or keywords, not both: got a config and {", ".join(options)}.')
    config = BatchOutConfig(**options) if config is None else config
    if any(map(_is_compiled, model.modules())):
        raise ValueError('The model is compiled or scripted, so new hooks would never fire. Call add_batchout first.')
    if batchout_sites(model):
        raise ValueError('This model already has BatchOut. Call remove_batchout(model) first to change it.')
    sites = _find_sites(model, config)
    etas = _eta_by_site(config, list(sites))  # checks every pattern before the first hook is added
    _check_batch_first(model, list(etas))
    counts = {}
    for name, block in windowed_blocks(model):  # before the sites: the block itself may be one
        counts[f'{name}.'] = count = ImageCount()
        block.register_forward_pre_hook(count.pre_hook)
    for name, eta in etas.items():
        images = next((count for prefix, count in counts.items() if f'{name}.'.startswith(prefix)), None)
        _hook(sites[name], config, eta, images)
    if hasattr(model, 'reset_classifier'):
        model.reset_classifier = _ResetClassifier(model, config)  # type: ignore[assignment]
    return model


def _hook(site: nn.Module, config: BatchOutConfig, eta: Any, images: ImageCount | None = None) -> None:
    layer = BatchOut(
        config.k,
        eta,
        config.noise,
        per_sample=config.per_sample,
        select=config.select,
        stop_gradient=config.stop_gradient,
    )
    layer.images = images
    site.register_forward_pre_hook(layer.pre_hook, with_kwargs=True)


class _ResetClassifier:
    """``reset_classifier`` of a net with BatchOut: the activation inside a new MLP head gets BatchOut, too."""

    def __init__(self, model: nn.Module, config: BatchOutConfig):
        self.model, self.config = model, config
        update_wrapper(self, type(model).reset_classifier)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        type(self.model).reset_classifier(self.model, *args, **kwargs)  # type: ignore[attr-defined]
        if self.config.sites in ('block', 'stage'):
            return
        known = batchout_sites(self.model)
        for name, site in activation_sites(self.model).items():
            eta = _eta_of(self.config, name)
            if name not in known and eta is not None:
                _hook(site, self.config, eta)


def remove_batchout(model: ModelT) -> ModelT:
    """Remove every BatchOut hook, in place. Other hooks stay, and a model without BatchOut is returned unchanged.

    BatchOut's arguments are also removed from the ``create_model`` arguments that timm remembers, so that
    ``timm.models.push_to_hf_hub(remove_batchout(model), ...)`` publishes a plain net that loads without this package.
    """
    for _, module, hook_id, _ in _hooks(model, (BatchOut, ImageCount)):
        del module._forward_pre_hooks[hook_id]
        module._forward_pre_hooks_with_kwargs.pop(hook_id, None)
    if isinstance(vars(model).get('reset_classifier'), _ResetClassifier):
        del model.reset_classifier
    remembered: Any = getattr(model, '_model_args', None)
    if remembered:
        ours = {field.name for field in fields(BatchOutConfig)}
        kept: Any = {name: value for name, value in remembered.items() if name not in ours}
        model._model_args = kept
    return model


def batchout_sites(model: nn.Module) -> dict[str, BatchOut]:
    """The name of every augmented activation, and the BatchOut layer in front of it.

    ``batchout_sites(model)['act1'].set_eta(0.2)`` changes one site. The dict of a plain net is empty.
    """
    return {name: layer for name, _, _, layer in _hooks(model, (BatchOut,))}


def _is_compiled(module: nn.Module) -> bool:
    scripted_or_wrapped = isinstance(module, torch.jit.ScriptModule) or hasattr(module, '_orig_mod')
    return scripted_or_wrapped or module._compiled_call_impl is not None  # model.compile() works in place


def _find_sites(model: nn.Module, config: BatchOutConfig) -> dict[str, nn.Module]:
    """The candidate modules of the config's placement, by name."""
    net = type(model).__name__
    if config.sites in ('block', 'stage'):
        sites = block_sites(model, coarse=config.sites == 'stage')
        if not sites:
            raise ValueError(
                f'{net} has no {config.sites}s that timm numbers and that hold an activation, so '
                f"sites={config.sites!r} is not possible. Use sites='act', or a list of activations by name or glob."
            )
        return sites
    sites = activation_sites(model)
    if not sites:
        raise ValueError(
            f'{net} has no activation module to hook (hooks cannot see activations that are called as functions). '
            'Use nn.ReLU modules in the net, or the BatchOut layer in its forward.'
        )
    return sites


def _check_batch_first(model: nn.Module, names: list[str]) -> None:
    """Raise where the leading dimension is known not to be the batch: BatchOut would mix positions of one sample."""
    for prefix, module in model.named_modules():
        attention = [child for child in module.children() if isinstance(child, nn.MultiheadAttention)]
        inside = [name for name in names if name.startswith(f'{prefix}.' if prefix else '')]
        if inside and any(not child.batch_first for child in attention):
            raise ValueError(
                f'{prefix or type(model).__name__} takes positions first (batch_first=False), so BatchOut at '
                f'{inside[0]!r} would mix the positions of each sample. Build it with batch_first=True, or name other '
                'activations in sites.'
            )


def _eta_by_site(config: BatchOutConfig, names: list[str]) -> dict[str, Any]:
    """Site name -> eta, in the net's order, for the sites that the config asks for; every pattern must match one."""
    patterns = [] if isinstance(config.sites, str) else list(config.sites)
    for pattern in [*patterns, *(config.eta if isinstance(config.eta, dict) else ())]:
        match_sites(pattern, names)
    etas = {name: _eta_of(config, name) for name in names}
    chosen = {name: eta for name, eta in etas.items() if eta is not None}
    if not chosen:
        raise ValueError(f'sites={config.sites!r} and eta={config.eta!r} select no common site.')
    return chosen


def _eta_of(config: BatchOutConfig, name: str) -> Any:
    """The eta of a site; None if the config leaves the site out."""
    if not isinstance(config.sites, str) and not any(fnmatchcase(name, pattern) for pattern in config.sites):
        return None
    if not isinstance(config.eta, dict):
        return config.eta
    return next((eta for pattern, eta in reversed(config.eta.items()) if fnmatchcase(name, pattern)), None)


def _hooks(model: nn.Module, owners: tuple[type, ...]) -> Iterator[tuple[str, nn.Module, int, Any]]:
    """The hooks that are methods of objects of these types: module name, module, hook id, object."""
    for name, module in model.named_modules():
        for hook_id, hook in list(module._forward_pre_hooks.items()):
            owner = getattr(hook, '__self__', None)
            if isinstance(owner, owners):
                yield name, module, hook_id, owner
