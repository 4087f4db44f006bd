"""Products and sums of tensors on grids: by the integer rules where the grids are exact, else in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..exact import Exact, Joined, Powers, Sum, Sums
from ..fused import whole_steps
from ..layers import QAct
from ..phase import full_precision

__all__ = [
    'attended',
    'joined',
    'layer_scaled',
    'mean',
    'on_grid',
    'product',
    'scale_of',
    'scores',
    'summed',
]


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two activations, in float32 under quant whatever autocast says."""
    with full_precision(a, b):
        return a @ b


def scores(q: Tensor, k: Tensor, q_act: QAct, k_act: QAct, factor: float) -> Sums:
    """``factor * q @ k.T`` of queries and keys (…, N, D) on the grids of their quantizers, which are exact."""
    q, k = whole_steps(q, q_act.scale), whole_steps(k, k_act.scale)
    return Sums(product(q, k.transpose(-2, -1)), (q_act.scale, k_act.scale), factor)


def attended(probs: Any, v: Tensor, v_act: QAct, merge: Callable[[Tensor], Tensor]) -> Tensor | Exact:
    """``probs @ v``, in the layout that ``merge`` makes; ``v`` (…, T, D) is on the grid of ``v_act``."""
    if isinstance(probs, Powers) and not v_act.is_exact:  # its quantizer alone is switched off
        probs = probs.value()
    if not isinstance(probs, Powers):
        return merge(product(probs, v))
    with full_precision(v):
        return probs.times(whole_steps(v, v_act.scale), v_act.scale, merge)


def summed(a: Tensor, a_act: QAct, b: Tensor, b_act: QAct) -> Tensor | Exact:
    """``a + b`` of two tensors on the grids of their quantizers; ``b`` broadcasts to ``a``."""
    return Sum(a, a_act.scale, b, b_act.scale) if a_act.is_exact and b_act.is_exact else a + b


def on_grid(x: Tensor, x_act: QAct) -> Tensor | Exact:
    """``x``, on the grid of ``x_act``, on its way to another grid: its sum with zeros."""
    return summed(x, x_act, x.new_zeros(x.shape[-1]), x_act) if x_act.is_exact else x


def joined(first: list[Tensor], rest: Tensor | Exact) -> Tensor | Exact:
    """Tokens (B, P_i, C) before others (B, N, C)."""
    if not first:
        return rest
    if isinstance(rest, Exact):
        return Joined(torch.cat(first, dim=1), rest)
    return torch.cat((*first, rest), dim=1)


def mean(x: Tensor, x_act: Any, dims: tuple[int, ...]) -> Tensor | Exact:
    """The mean over ``dims`` of a tensor on the grid of ``x_act``, where it is known."""
    if x_act is None or not x_act.is_exact or x_act.scale.ndim:
        return x.mean(dims)
    count = math.prod([x.shape[d] for d in dims])
    return Sums(whole_steps(x, x_act.scale).sum(dims), (x_act.scale,), 1 / count)


def scale_of(layer: Any) -> Tensor | None:
    """The weights of a layer scale, or None for the identity.

    Raises:
        ValueError: something else stands there.
    """
    if isinstance(layer, nn.Identity):
        return None
    weight = getattr(layer, 'weight', None) if hasattr(layer, 'weight') else getattr(layer, 'gamma', None)
    if not isinstance(weight, Tensor):
        raise ValueError(f'{type(layer).__name__} where a layer scale was expected: not covered by the integer model')
    return weight


def layer_scaled(x: Any, layer: nn.Module) -> Any:
    """``layer(x)`` of a layer scale or the identity, also of an exact ``x``."""
    if not isinstance(x, Sums):
        return layer(x)
    weight = scale_of(layer)
    return x if weight is None else x.times(weight)
