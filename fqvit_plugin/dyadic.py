"""Dyadic rescaling: from integer sums to another grid by a multiplication, an addition and a shift.

One rule, two executions. The integer kernels follow it in int64; the simulation follows it here in float64, whose
53 bits hold every number that occurs, so that both put out the same codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .intmath import by_slices

__all__ = [
    'MEAN_BITS',
    'RECIPROCAL_BITS',
    'AddRule',
    'MeanRule',
    'Rescale',
    'add_rule',
    'added',
    'mean_rule',
    'rescale',
    'rescaled',
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


def rescaled(x: Tensor, rule: Rescale) -> Tensor:
    """``x`` under ``rule``: float32 integers to float32 integers, not yet saturated.

    Args:
        x: (…, C) of at most 28 bits.
    """
    # |x gain| < 2**52 and |offset| <= 2**51; powers of two go into the constants beforehand, which changes no bit
    shrink = torch.exp2(-rule.shift)
    gain, offset = rule.gain * shrink, rule.offset * shrink + 0.5
    return by_slices(lambda rows: rows.double().mul_(gain).add_(offset).floor_().to(rows.dtype), x)


class AddRule(NamedTuple):
    """``y = (a gain_a + b gain_b + 2**(shift - 1)) >> shift``; gains () or (C,) of at most 30 bits, all float64."""

    gain_a: Tensor
    gain_b: Tensor
    shift: Tensor


def add_rule(scale_a: Tensor, scale_b: Tensor, scale: Tensor) -> AddRule:
    """Integers for the sum of two tensors of steps, on the grid of ``scale``; all () or (C,) float64."""
    a, b = scale_a / scale, scale_b / scale
    shift = torch.minimum(shift_for(a, _ADD_BITS), shift_for(b, _ADD_BITS))
    return AddRule(torch.round(a * torch.exp2(shift)), torch.round(b * torch.exp2(shift)), shift)


def added(a: Tensor, b: Tensor, rule: AddRule) -> Tensor:
    """The sum of float32 integers of at most 16 bits under ``rule``, not yet saturated."""
    shrink = torch.exp2(-rule.shift)
    y = (a.double() * (rule.gain_a * shrink)).add_(b.double().mul_(rule.gain_b * shrink))
    return y.add_(0.5).floor_().to(a.dtype)


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
