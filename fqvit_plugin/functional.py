"""Quantization arithmetic as pure functions on tensors: each formula stands here once.

Codes and reals are tied by ``x = (x_q - zero_point) * scale``. Two sets of rules exist, named by
``arithmetic``: ``'reference'`` reproduces the published FQ-ViT implementation, ``'strict'`` (the default
everywhere) follows ONNX ``QuantizeLinear`` and keeps zero on the grid. ``docs/numerics.md`` lists them side by side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    'EPS',
    'FINEST',
    'PULL',
    'Arithmetic',
    'affine_qparams',
    'align',
    'dequantize',
    'fake_quantize',
    'flatten_channels',
    'log2_codes',
    'log2_dequantize',
    'quantize',
    'round_steps_',
    'saturate_',
    'steps',
    'symmetric_qparams',
]

Arithmetic = Literal['strict', 'reference']

#: The smallest scale: a constant zero tensor still has a grid.
EPS = torch.finfo(torch.float32).eps
#: The smallest scale of a channel over the largest of its tensor, strict and affine. All channels' gains share one
#: shift (dyadic.rescale), so a dead channel's grid, if it were as fine as it liked, would take the others' bits.
FINEST = 2.0**-10
#: How many times nearer than a far value the ordinary codes must be to be taken, see :mod:`fqvit_plugin.escape`.
#: LayerNorm divides a token by what it holds far out: if that is taken for much less than it is, all other channels
#: of the token grow; if for more, they shrink, which costs far less.
PULL = 7


def flatten_channels(x: Tensor, axis: int | None) -> Tensor:
    """View ``x`` as ``(channels, samples)``; ``axis=None`` is one channel, shape ``(1, x.numel())``."""
    if axis is None:
        return x.reshape(1, -1)
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def align(param: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Shape a per-channel ``param`` of shape ``(C,)`` to broadcast along ``axis`` of ``x``; scalars pass."""
    if param.ndim == 0 or axis is None:
        return param
    shape = [1] * x.ndim  # (1, …, C, …, 1)
    shape[axis] = -1
    return param.reshape(shape)


def symmetric_qparams(
    lo: Tensor, hi: Tensor, qmin: int, qmax: int, arithmetic: Arithmetic = 'strict'
) -> tuple[Tensor, Tensor]:
    """Scale and zero point 0 of a signed grid that covers ``[lo, hi]``.

    ``scale = max(-lo, hi) / qmax`` (strict), so the largest magnitude is a code of its own, or
    ``/ ((qmax - qmin) / 2)`` (reference: 127.5 for int8, which clips the positive extreme by half a step).

    Args:
        lo, hi: range ends, shape () or (C,).
    Returns:
        ``(scale, zero_point)`` of the same shape; the zero point is int32.
    """
    magnitude = torch.maximum(-lo, hi)
    steps = float(qmax) if arithmetic == 'strict' else (qmax - qmin) / 2
    scale = (magnitude / steps).clamp_min(EPS)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def affine_qparams(
    lo: Tensor, hi: Tensor, qmin: int, qmax: int, arithmetic: Arithmetic = 'strict'
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a grid over ``[lo, hi]``: ``scale = (hi - lo) / (qmax - qmin)``.

    Strict arithmetic first widens the range to hold 0, so that 0 is a code and an all-positive tensor does not
    saturate; the reference does not, and clamps the zero point instead. Nor is a channel's scale below ``FINEST``
    times the largest in strict arithmetic.

    Args:
        lo, hi: range ends, shape () or (C,).
    Returns:
        ``(scale, zero_point)`` of the same shape; the zero point is int32 within ``[qmin, qmax]``.
    """
    if arithmetic == 'strict':
        lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    scale = ((hi - lo) / float(qmax - qmin)).clamp_min(EPS)
    if arithmetic == 'strict':
        scale = scale.clamp_min(scale.max() * FINEST)
    zero_point = (qmin - torch.round(lo / scale)).clamp(qmin, qmax)
    return scale, zero_point.to(torch.int32)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    arithmetic: Arithmetic = 'strict',
) -> Tensor:
    """Codes ``x_q``, still in floating point: ``round_half_even(x / scale) + zero_point``, saturated.

    The reference rounds the sum ``x / scale + zero_point`` instead; the two differ at ties only.
    """
    return steps(x, scale, zero_point, qmin, qmax, arithmetic).add_(zero_point)


def steps(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    arithmetic: Arithmetic = 'strict',
    inplace: bool = False,
) -> Tensor:
    """``quantize(x) - zero_point``: whole steps of ``scale`` away from zero, what integer arithmetic works on.

    ``inplace`` writes over ``x``. New memory costs more than the arithmetic on it.
    """
    return round_steps_(x.div_(scale) if inplace else x / scale, zero_point, qmin, qmax, arithmetic)


def round_steps_(
    ratio: Tensor, zero_point: Tensor, qmin: int, qmax: int, arithmetic: Arithmetic = 'strict'
) -> Tensor:
    """:func:`steps` from ``ratio = x / scale``, in place."""
    if arithmetic == 'strict':
        return saturate_(ratio.round_(), zero_point, qmin, qmax)
    return ratio.add_(zero_point).round_().clamp_(qmin, qmax).sub_(zero_point)


def saturate_(x: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Clamp steps to those that have a code, in place."""
    # clamp_ with two tensors is not vectorized on CPUs: twenty times slower than these two.
    return x.clamp_min_(qmin - zero_point).clamp_max_(qmax - zero_point)


def dequantize(x_q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Reals of codes: ``(x_q - zero_point) * scale``."""
    return (x_q - zero_point) * scale


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    arithmetic: Arithmetic = 'strict',
) -> Tensor:
    """``dequantize(quantize(x))``: the nearest point of the grid, in float."""
    return steps(x, scale, zero_point, qmin, qmax, arithmetic).mul_(scale)


def log2_codes(x: Tensor, bits: int, arithmetic: Arithmetic = 'strict') -> Tensor:
    """Codes ``k`` of probabilities on the grid ``2**-k``: ``k = round(-log2(x))``; ``2**bits`` stands for zero.

    Strict arithmetic gives zero the last code ``2**bits - 1``, so ``bits`` bits hold every code; the reference
    has ``2**bits`` powers and zero besides, one level more than fits. Zero probabilities have an infinite
    exponent and become the zero code.
    """
    exponent = torch.round(-torch.log2(x))
    last = 2**bits - 1
    if arithmetic == 'strict':
        return exponent.clamp_(0, last)
    return torch.where(exponent > last, float(2**bits), exponent.clamp(0, last))


def log2_dequantize(k: Tensor, bits: int, arithmetic: Arithmetic = 'strict') -> Tensor:
    """Probabilities of log2 codes: ``2**-k``, and 0 at the zero code (see :func:`log2_codes`)."""
    zero = 2**bits - 1 if arithmetic == 'strict' else 2**bits
    return torch.exp2(-k).masked_fill_(k >= zero, 0.0)
