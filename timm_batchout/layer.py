"""BatchOut as a layer, and its configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from timm_batchout.functional import _check_eta, _check_k, batchout, gaussian_noise

__all__ = ['BatchOut', 'BatchOutConfig']


@dataclass(frozen=True)
class BatchOutConfig:
    """What to hook into a net, and where; the defaults are the paper's.

    Args:
        k: Share of the mini-batch to augment, in [0, 1].
        eta: Magnitude for all sites, a number or a (low, high) pair; or a mapping from site names or globs to
            magnitudes, which then uses only those sites. The last pattern that matches a site decides.
        noise: 'batchout' (Eq. 2) or 'gaussian' (Eq. 5).
        sites: 'act' for the input of every activation of the net (see ``timm_batchout.sites``), names or globs of
            such activations, or 'block' or 'stage' for the input of every block or stage of a timm net.
        per_sample: One eta per augmented sample, or one per call.
        select: Augment the 'first' samples or a 'random' choice.
        stop_gradient: Treat the push as a constant in backward.

    Raises:
        ValueError: A value is out of range.
    """

    k: float = 0.5
    eta: Any = 0.1  # float | (low, high) | {pattern: float | (low, high)}
    noise: Literal['batchout', 'gaussian'] = 'batchout'
    sites: Any = 'act'  # 'act' | 'block' | 'stage' | sequence of globs
    per_sample: bool = True
    select: Literal['first', 'random'] = 'first'
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, 'k', _as_number(self.k))
        _check_k(self.k)
        if isinstance(self.eta, Mapping):
            if not self.eta:
                raise ValueError('eta is an empty mapping. Name at least one site, or give one number for all sites.')
            if not all(isinstance(name, str) for name in self.eta):
                raise ValueError(f'eta per site must map names or globs to magnitudes, got {self.eta!r}.')
            object.__setattr__(self, 'eta', {name: _as_eta(value) for name, value in self.eta.items()})
        else:
            object.__setattr__(self, 'eta', _as_eta(self.eta))
        if self.noise not in _METHODS:
            raise ValueError(f"noise must be 'batchout' or 'gaussian', got {self.noise!r}.")
        if self.select not in ('first', 'random'):
            raise ValueError(f"select must be 'first' or 'random', got {self.select!r}.")
        if isinstance(self.sites, str):
            if self.sites not in ('act', 'block', 'stage'):
                raise ValueError(
                    f"sites must be 'act', 'block', 'stage' or a list of site names or globs, got {self.sites!r}."
                )
        elif isinstance(self.sites, Sequence) and all(isinstance(name, str) for name in self.sites):
            object.__setattr__(self, 'sites', tuple(self.sites))
        else:
            raise ValueError(f'sites must be a list of site names or globs, got {self.sites!r}.')


def _as_eta(eta: Any) -> Any:
    """A number or a pair of numbers. YAML and JSON have no tuples; NumPy's numbers and 0-d tensors have values."""
    eta = tuple(map(_as_number, eta)) if isinstance(eta, (list, tuple)) else _as_number(eta)
    _check_eta(eta)
    return eta


def _as_number(value: Any) -> Any:
    """NumPy numbers and 0-d tensors as Python numbers; anything else unchanged, for the check to refuse."""
    is_number = not isinstance(value, bool) and isinstance(value, Real)
    return float(value) if is_number or (isinstance(value, Tensor) and value.ndim == 0) else value


class BatchOut(nn.Module):
    """BatchOut as a layer, placed before an activation; ``timm_batchout.add_batchout`` hooks it into any net.

    It has no parameters and no state_dict entries. Its magnitude lives in two 0-d float32 CPU tensors, so that
    ``set_eta`` (a warm-up, say) does not recompile a compiled net and ``model.half()`` does not round it.

    Arguments are those of ``BatchOutConfig``; ``eta`` is a number or a pair.

    Shape:
        (m, ...) to (m, ...), same dtype, device and strides.
    """

    def __init__(
        self,
        k: float = 0.5,
        eta: float | tuple[float, float] = 0.1,
        noise: Literal['batchout', 'gaussian'] = 'batchout',
        *,
        per_sample: bool = True,
        select: Literal['first', 'random'] = 'first',
        stop_gradient: bool = True,
    ):
        super().__init__()
        if isinstance(eta, Mapping):
            raise ValueError(f'A BatchOut layer takes one eta, a number or a (low, high) pair, got {eta!r}.')
        config = BatchOutConfig(k, eta, noise, per_sample=per_sample, select=select, stop_gradient=stop_gradient)
        self.k = k
        self.noise = noise
        self.per_sample = per_sample
        self.select = select
        self.stop_gradient = stop_gradient
        self._eta = config.eta
        self.eta_low, self.eta_high = (torch.tensor(bound, dtype=torch.float32) for bound in _bounds(self._eta))
        # Apart from the tensors, forward reads only this flag of what eta changes: dynamo guards on every such value.
        self.active = self._eta != 0
        # Set by add_batchout inside windowed blocks: gives the number of images that the rows belong to.
        self.images: Any = None

    def set_eta(self, eta: float | tuple[float, float]) -> None:
        """Change the magnitude, in place: a number or a (low, high) pair."""
        self._eta = _as_eta(eta)
        for tensor, bound in zip((self.eta_low, self.eta_high), _bounds(self._eta), strict=True):
            tensor.fill_(bound)
        self.active = self._eta != 0

    @property
    def eta(self) -> float | tuple[float, float]:
        """The magnitude: a number, or the (low, high) pair it is drawn from."""
        return self._eta

    def forward(self, x: Tensor) -> Tensor:
        return self.augment(x, self.training)

    def augment(self, x: Tensor, training: bool, inplace: bool = False) -> Tensor:
        if not training or not self.active:
            return x
        return _METHODS[self.noise](
            x,
            self.k,
            (self.eta_low, self.eta_high),
            per_sample=self.per_sample,
            select=self.select,
            stop_gradient=self.stop_gradient,
            inplace=inplace,
        )

    def pre_hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook (``with_kwargs``) of an activation. A bound method, so that copies of a net copy it."""
        # The hooked module's flag: this layer is not a submodule of the net, so train() and eval() do not reach it.
        if not module.training:
            return None
        name = '' if args else next(iter(kwargs), '')
        x = args[0] if args else kwargs.get(name)
        if not isinstance(x, Tensor):
            raise TypeError(
                f'{type(module).__name__} takes a {type(x).__name__}, not one tensor, so BatchOut cannot augment its '
                "input. Use sites='act', or a list of activations by name or glob; before torch.fx, eval mode or "
                'remove_batchout(model).'
            )
        # An in-place activation overwrites its input. A net may reuse that tensor and must then find the same values.
        inplace = getattr(module, 'inplace', False) is True
        count = x.shape[0] if self.images is None else self.images.on(x.device)
        if count == x.shape[0]:
            x = self.augment(x, True, inplace)
        else:  # (images * windows, ...): all windows of an image are pushed toward the same windows of its partner
            x = self.augment(x.unflatten(0, (count, -1)), True, inplace).flatten(0, 1)
        return (args, {**kwargs, name: x}) if name else ((x, *args[1:]), kwargs)

    def extra_repr(self) -> str:
        control = '' if self.stop_gradient else ', stop_gradient=False'
        return f'k={self.k}, eta={self.eta}, noise={self.noise!r}{control}'


def _bounds(eta: Any) -> tuple[float, float]:
    return eta if isinstance(eta, tuple) else (eta, eta)


_METHODS = {'batchout': batchout, 'gaussian': gaussian_noise}
