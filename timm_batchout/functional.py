"""BatchOut, the method: Algorithm 1 and Eq. 2, 3 and 5 of the paper.

Subramanya, Mopuri, Babu: "BatchOut: Batch-level feature augmentation to improve robustness to adversarial
examples", ICVGIP 2018. While a net trains, the first half of each mini-batch of pre-activations is pushed a little
toward other samples of the same batch. Backward treats the push as a constant, and at test time nothing happens.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

__all__ = ['batchout', 'gaussian_noise']

Eta = float | tuple[float, float] | Tensor | tuple[Tensor, Tensor]


def _push(
    x: Tensor, target: Tensor, weight: Tensor | float, chosen: Tensor | None, stop_gradient: bool, inplace: bool
) -> Tensor:
    """Eq. 3, ``(1 - eta) * x_j + eta * target_j``, for the chosen samples (None: the first ones)."""
    out = x if inplace else x.clone()  # keeps the strides, where cat would not
    # Backward and forward-mode AD treat what is not recorded as a constant: both see the identity.
    recorded = torch.is_grad_enabled() and not stop_gradient
    with torch.set_grad_enabled(recorded), _set_fwd_grad_enabled(not stop_gradient):
        if chosen is None:
            out[: target.shape[0]].lerp_(target, weight)
        else:
            out.index_copy_(0, chosen, torch.lerp(_take(x, chosen), target, weight))
    return out


def _take(x: Tensor, index: Tensor) -> Tensor:
    """A copy of these samples, in x's memory format."""
    return _in_memory_order(x, lambda x: x.index_select(0, index))


def _in_memory_order(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(x)``, computed with the channels last where they lie last in memory.

    index_select would make the result contiguous (a push across two memory formats takes five times as long), and
    randn_like takes nine times as long for a tensor that is not.
    """
    if x.ndim > 3 and (channels_last := x.movedim(1, -1)).is_contiguous():
        return function(channels_last).movedim(-1, 1)
    return function(x)


def batchout(
    x: Tensor,
    k: float = 0.5,
    eta: Eta = 0.1,
    training: bool = True,
    *,
    per_sample: bool = True,
    select: Literal['first', 'random'] = 'first',
    stop_gradient: bool = True,
    inplace: bool = False,
) -> Tensor:
    """Push ``floor(k * m)`` of the m samples toward other samples of the batch: ``x_j + eta * (x_r - x_j)``.

    Partners are drawn uniformly from the whole batch, with replacement, and read before any sample is changed
    (Algorithm 1, Eq. 2). All draws come from torch's global generator of ``x.device``.

    Args:
        x: Activations of one layer, shape (m, ...), any floating dtype, device and memory format.
        k: Share of the mini-batch to augment, in [0, 1].
        eta: Magnitude. A number, or a (low, high) pair to draw from uniformly. Either may be a 0-d tensor, whose
            value can then change between the calls of a compiled net without a recompilation.
        training: False makes this the identity.
        per_sample: Draw one eta per augmented sample (True) or one per call. No effect on a constant eta.
        select: Augment the 'first' samples of the batch, as in the paper, or a 'random' choice of them.
        stop_gradient: Treat the push as a constant in backward (paper, section 6.1): the gradient w.r.t. ``x`` is
            the upstream gradient, for every sample. False differentiates through the push, as a control.
        inplace: Overwrite ``x``. For use before an in-place activation, which would overwrite it anyway.

    Returns:
        A new tensor with the shape, dtype, device and (for dense ``x``) strides of ``x``. ``x`` itself if ``inplace``
        is set or there is nothing to do: not training, ``m == 1``, ``floor(k * m) == 0`` or a constant eta of 0.

    Raises:
        ValueError: k outside [0, 1]; eta negative, not finite, or a pair with low > high; unknown ``select``.
    """
    n = _num_augmented(x, k, eta, training, select)
    if n == 0:
        return x
    m = x.shape[0]
    partners = torch.randint(m, (n,), device=x.device)
    weight = _draw_eta(eta, n if per_sample else 1, x)
    chosen = None if select == 'first' else torch.randperm(m, device=x.device)[:n]
    x_r = _take(x.detach() if stop_gradient else x, partners)  # a copy: read before x changes
    return _push(x, x_r, weight, chosen, stop_gradient, inplace)  # x_j + eta * (x_r - x_j)


def gaussian_noise(
    x: Tensor,
    k: float = 0.5,
    eta: Eta = 0.1,
    training: bool = True,
    *,
    per_sample: bool = True,
    select: Literal['first', 'random'] = 'first',
    stop_gradient: bool = True,
    inplace: bool = False,
) -> Tensor:
    """The paper's random baseline (Eq. 5): ``x_j + eta * ||x_j||_2 * n / ||n||_2`` with ``n ~ N(0, I)``.

    Arguments, result and errors are those of ``batchout``; only the direction of the push differs.
    """
    n = _num_augmented(x, k, eta, training, select)
    if n == 0:
        return x
    weight = _draw_eta(eta, n if per_sample else 1, x)
    chosen = None if select == 'first' else torch.randperm(x.shape[0], device=x.device)[:n]

    source = x.detach() if stop_gradient else x
    clean = source[:n] if chosen is None else _take(source, chosen)
    noise = _in_memory_order(clean, torch.randn_like)
    # A push toward a point at distance ||x_j||. Norms in float32 at least: half-precision squares overflow.
    target = torch.addcmul(clean, noise, (_sample_norm(clean) / _sample_norm(noise)).to(x.dtype))
    return _push(x, target, weight, chosen, stop_gradient, inplace)


def _num_augmented(x: Tensor, k: float, eta: Eta, training: bool, select: str) -> int:
    """How many samples to augment: floor(k * m), or 0 if the result is ``x`` itself."""
    if not training:
        return 0
    _check_k(k)
    _check_eta(eta)
    if select not in ('first', 'random'):
        raise ValueError(f"select must be 'first' or 'random', got {select!r}.")
    if x.ndim == 0 or x.shape[0] <= 1 or (isinstance(eta, (int, float)) and eta == 0):
        return 0
    top, bottom = float(k).as_integer_ratio()  # k exactly, as a constant that torch.compile does not make symbolic
    return int(top / bottom * x.shape[0] + 1e-9)  # 0.29 of 100 is 29, though the binary 0.29 is a little less


def _draw_eta(eta: Eta, count: int, x: Tensor) -> Tensor | float:
    """A constant eta unchanged; otherwise draws (count, 1, ...) in ``x``'s dtype, broadcastable over ``x[:n]``."""
    if isinstance(eta, (int, float)):
        return float(eta)
    shape = (count,) + (1,) * (x.ndim - 1)
    low, high = eta if isinstance(eta, (tuple, list)) else (eta, eta)
    # Drawn in float32 and on x's device. Bounds that are 0-d CPU tensors enter as scalars, without a device sync.
    return (torch.rand(shape, device=x.device) * (high - low) + low).to(x.dtype)


def _sample_norm(x: Tensor) -> Tensor:
    """L2 norm of each sample, shape (m, 1, ...), float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dims = tuple(range(1, x.ndim + 1))  # never empty, which would mean all
    return torch.linalg.vector_norm(x.unsqueeze(-1), dim=dims, keepdim=True, dtype=dtype).squeeze(-1)


def _check_k(k: float) -> None:
    if not isinstance(k, (int, float)) or not 0 <= k <= 1:
        raise ValueError(f'k is the share of the mini-batch to augment and must lie in [0, 1], got {k!r}.')


def _check_eta(eta: Eta) -> None:
    """Check numbers only: reading a tensor's value would synchronise the device and break a compiled graph."""
    bounds = eta if isinstance(eta, (tuple, list)) else (eta, eta)
    if len(bounds) != 2:
        raise ValueError(f'eta must be a number or a (low, high) pair, got {eta!r}.')
    if any(isinstance(bound, Tensor) for bound in bounds):
        if any(isinstance(bound, Tensor) and bound.ndim for bound in bounds):
            raise ValueError('eta, or a bound of it, must be a 0-d tensor: one magnitude, not one per feature.')
        return
    low, high = bounds
    for bound in bounds:
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            raise ValueError(f'eta must be a number or a (low, high) pair of numbers, got {eta!r}.')
        if not math.isfinite(bound) or bound < 0:
            raise ValueError(f'eta must be finite and at least 0, got {eta!r}.')
    if low > high:
        raise ValueError(f'eta=(low, high) needs low <= high, got {eta!r}.')
