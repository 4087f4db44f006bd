"""Dyadic rescaling: from integer sums to another grid by a multiplication, an addition and a shift.

One rule, two executions. The integer kernels follow it in int64; the simulation (:mod:`fqvit_plugin.fused`) does so
in float64, whose 53 bits hold every number that occurs, so that both put out the same codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    'MEAN_BITS',
    'RECIPROCAL_BITS',
    'AddRule',
    'MeanRule',
    'Rescale',
    'add_rule',
    'affine_rule',
    'mean_rule',
    'rescale',
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


#: Bits of a row's reciprocal where attention divides, and fractional bits of its mean; see ``fused.weighted_mean``.
RECIPROCAL_BITS = 44
MEAN_BITS = 16


class MeanRule(NamedTuple):
    """``ratio ~ gain / 2**shift``, both () float64."""

    gain: Tensor
    shift: Tensor


def mean_rule(ratio: Tensor) -> MeanRule:
    """Integers for a mean times ``ratio``, the step of the values over that of the result."""
    shift = shift_for(ratio)
    return MeanRule(torch.round(ratio * torch.exp2(shift)), shift)
