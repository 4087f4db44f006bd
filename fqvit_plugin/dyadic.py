"""Dyadic rescaling: from integer sums to another grid by a multiplication, an addition and a shift.

One rule, two executions. The integer kernels follow it in int64; the simulation follows it here in float64, whose
53 bits hold every number that occurs, so that both put out the same codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._torch import is_compiling
from .functional import whole_steps
from .intmath import SLICE, by_slices

__all__ = [
    'MEAN_BITS',
    'RECIPROCAL_BITS',
    'AddRule',
    'MeanRule',
    'Rescale',
    'add_rule',
    'added',
    'affine_rule',
    'mean_rule',
    'rescale',
    'rescaled_',
    'weighted_mean',
]

#: Bits of a gain: as exact as a float32 multiplier, and the product with a sum of 28 bits fits 52.
GAIN_BITS = 24
_OFFSET_BITS = 30
_ADD_BITS = 30
_LARGEST_SHIFT = 42


class Rescale(NamedTuple):
    """``y = (x gain + offset + 2**(shift - 1)) >> shift``: halves are rounded up.

    Args:
        gain: float64 integers, () or (C,), of at most 24 bits.
        offset: float64 integers, () or (C,), with 30 leading bits: multiples of ``2**offset_shift``.
        shift: () float64, 1 to 42.
        offset_shift: () float64.
    """

    gain: Tensor
    offset: Tensor
    shift: Tensor
    offset_shift: Tensor


def shift_for(ratio: Tensor, bits: int = GAIN_BITS) -> Tensor:
    """The shift that gives the largest ``|ratio|`` a gain of ``bits`` bits; 1 to 42, () float64."""
    tiny = torch.finfo(torch.float64).tiny
    exponent = torch.floor(torch.log2(ratio.abs().max().double().clamp_min(tiny))) + 1
    return (bits - exponent).clamp(1, _LARGEST_SHIFT)


def rescale(ratio: Tensor, term: Tensor) -> Rescale:
    """Integers for ``y ~ x * ratio + term``.

    Args:
        ratio: () or (C,) float64, the step of ``x`` over the step of ``y``; below 2**23.
        term: () or (C,) float64, in steps of ``y``.
    """
    shift = shift_for(ratio)
    gain = torch.round(ratio * torch.exp2(shift))
    offset = (term * torch.exp2(shift)).clamp(-(2.0**51), 2.0**51)  # beyond, every code saturates
    bits = torch.ceil(torch.log2(offset.abs().max() + 1))
    unit = torch.exp2((bits - _OFFSET_BITS).clamp_min(0))
    return Rescale(gain, torch.round(offset / unit) * unit, shift, torch.log2(unit))


def affine_rule(
    scales: Sequence[Tensor], factor: Tensor | float, bias: Tensor | None, scale: Tensor
) -> Rescale:
    """The rule from accumulators to a grid: ``x = sums * prod(scales) * factor + bias * factor``.

    Args:
        scales: () or (C,), of the operands of the product.
        factor: () or (C,), layer scale for instance.
        bias: (C,), or None.
        scale: () or (C,), of the grid.
    """
    ratio = torch.ones((), dtype=torch.float64, device=scale.device) * factor / scale.double()
    term = torch.zeros_like(ratio) if bias is None else bias.detach().double() * ratio
    for operand in scales:
        ratio = ratio * operand.double()
    return rescale(ratio, term)


def rescaled_(x: Tensor, rule: Rescale) -> Tensor:
    """``x`` under ``rule``: float32 integers, not yet saturated; overwrites ``x`` where that is float32.

    Args:
        x: (…, C) float32 or float64 integers of at most 28 bits.
    """
    # |x gain| < 2**52 and |offset| <= 2**51; powers of two go into the constants beforehand, which changes no bit
    shrink = torch.exp2(-rule.shift)
    gain, offset = rule.gain * shrink, rule.offset * shrink + 0.5
    if x.dtype is torch.float64:
        return x.mul_(gain).add_(offset).floor_().float()
    return by_slices(lambda rows: rows.double().mul_(gain).add_(offset).floor_().float(), x, out=x)


class AddRule(NamedTuple):
    """``y = (a gain_a + b gain_b + 2**(shift - 1)) >> shift``; gains () or (C,) of at most 30 bits, all float64."""

    gain_a: Tensor
    gain_b: Tensor
    shift: Tensor


def add_rule(scale_a: Tensor, scale_b: Tensor, scale: Tensor) -> AddRule:
    """Integers for the sum of two tensors of steps, on the grid of ``scale``; all () or (C,)."""
    a, b = scale_a.double() / scale.double(), scale_b.double() / scale.double()
    shift = torch.minimum(shift_for(a, _ADD_BITS), shift_for(b, _ADD_BITS))
    return AddRule(torch.round(a * torch.exp2(shift)), torch.round(b * torch.exp2(shift)), shift)


def added(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, rule: AddRule) -> Tensor:
    """The sum of reals on the grids of ``scale_a`` and ``scale_b`` under ``rule``, float32, not yet saturated.

    Args:
        a: float32, whole steps of at most 16 bits.
        b: the same; broadcasts to ``a``.
    """
    shrink = torch.exp2(-rule.shift)
    gain_a, gain_b = rule.gain_a * shrink, rule.gain_b * shrink

    def rows(a: Tensor, b: Tensor) -> Tensor:
        first = whole_steps(a, scale_a).double().mul_(gain_a)
        return first.add_(whole_steps(b, scale_b).double().mul_(gain_b)).add_(0.5).floor_().float()

    count = max(1, SLICE // max(a[0].numel(), 1))
    if is_compiling() or count >= len(a):
        return rows(a, b)
    out = torch.empty_like(a)
    broadcast = b.ndim < a.ndim or len(b) == 1
    for part in (slice(i, i + count) for i in range(0, len(a), count)):
        out[part] = rows(a[part], b if broadcast else b[part])
    return out


#: Bits of a row's reciprocal in :func:`weighted_mean`, and fractional bits of its mean.
RECIPROCAL_BITS = 44
MEAN_BITS = 16


class MeanRule(NamedTuple):
    """``ratio ~ gain / 2**shift``, both () float64; see :func:`weighted_mean`."""

    gain: Tensor
    shift: Tensor


def mean_rule(ratio: Tensor) -> MeanRule:
    """Integers for a mean times ``ratio``, the step of the values over that of the result."""
    shift = shift_for(ratio)
    return MeanRule(torch.round(ratio * torch.exp2(shift)), shift)


def weighted_mean(sums: Tensor, total: Tensor, rule: MeanRule) -> Tensor:
    """``sums / total * ratio`` in whole steps, with one division for each row: what attention puts out.

    ``r = 2**44 // total``, then ``m = (sums r + 2**27) >> 28`` (16 fractional bits) and
    ``(m gain + 2**(shift + 15)) >> (shift + 16)``.

    Args:
        sums: (…, D) float64 integers, ``sum(p v)`` with ``|v| < 2**8``, so at most ``2**8 total``.
        total: (…, 1) float64 integers, ``sum(p)``, 2**15 to 2**29.
    """
    # floor(2**44 / total) is exact: no quotient below 2**29 comes within 2**-53 of its size to the next integer.
    # sums r <= 2**52
    reciprocal = torch.floor(2.0**RECIPROCAL_BITS / total)
    y = (sums * reciprocal).mul_(2.0 ** (MEAN_BITS - RECIPROCAL_BITS)).add_(0.5).floor_()
    return y.mul_(rule.gain * torch.exp2(-rule.shift - MEAN_BITS)).add_(0.5).floor_()
