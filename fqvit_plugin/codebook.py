"""Codes of few bits that stand for searched levels, and hidden activations whose outliers are split."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .quantizers import UniformQuantizer
from .registry import QUANTIZERS
from .scheme import BitType, QuantSpec

__all__ = ['HiddenQuantizer', 'LevelsQuantizer', 'best_levels', 'copies_of']

#: Bits of the grid that the levels of a codebook lie on: what integer products take.
CONTAINER_BITS = 8


@QUANTIZERS.register_module(name=['levels', 'LevelsQuantizer'])
class LevelsQuantizer(UniformQuantizer):
    """One scale, and codes of fewer than 8 bits that stand for ``2**bits`` levels of an 8-bit grid.

    The levels are those of least squared error on the last batch. A product takes the levels, so that integer
    arithmetic sees an 8-bit tensor that holds 16 values. With 8 bits it is a uniform grid.

    Buffers:
        levels: (2**bits,) int64, ascending codes of the 8-bit grid; empty at 8 bits.

    Source: Lloyd, Least squares quantization in PCM, 1982; searched levels generalize the searched logarithm's base
    of AdaLog (Wu et al., ECCV 2024).
    """

    levels: Tensor

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        self.level_count = 2**spec.bit_type.bits if spec.bit_type.bits < CONTAINER_BITS else 0
        if spec.bit_type.signed or spec.axis is not None:
            raise ValueError(f'{type(self).__name__} takes unsigned types and one scale, got {spec.bit_type.name}')
        self.asked = spec
        if self.level_count:
            spec = dataclasses.replace(spec, bit_type=BitType(CONTAINER_BITS, False))
        super().__init__(spec, channels)
        self.register_buffer('levels', torch.zeros(0, dtype=torch.int64))
        self._found: Tensor | None = None

    @property
    def code_name(self) -> str:
        """``uint8``, or ``uint4 of levels``."""
        return f'uint{self.asked.bit_type.bits} of levels' if self.level_count else super().code_name

    def take_qparams(self, x: Tensor) -> None:
        """Find scale, zero point and levels with ``x`` as the last batch."""
        super().take_qparams(x)
        assert self._taken is not None
        self._found = torch.zeros(0, dtype=torch.int64, device=x.device)
        if self.level_count:
            scale, zero_point = self._taken
            kind = self.spec.bit_type
            codes = (torch.round(x.detach().float() / scale) + zero_point).clamp_(kind.qmin, kind.qmax)
            counts = torch.bincount(codes.flatten().long(), minlength=2**kind.bits)
            self._found = best_levels(counts, self.level_count)

    def commit(self) -> None:
        """Write what was taken into the buffers."""
        found = self._found
        super().commit()
        assert found is not None
        self.levels = found

    def reset(self) -> None:
        """Start observing afresh."""
        super().reset()
        self._found = None

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of the 8-bit grid, in floating point."""
        return self._on_levels(super().quantize(x))

    def steps(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Whole steps from zero, in floating point."""
        return self._stepped(super().steps(x, inplace))

    def saturated_(self, x: Tensor) -> Tensor:
        """Whole steps, each replaced by the nearest level's."""
        return self._stepped(super().saturated_(x))

    def nearest(self) -> Tensor:
        """The level nearest to each code of the 8-bit grid, in their order, the lower one of two; (256,) int64."""
        kind = self.spec.bit_type
        return self._on_levels(torch.arange(kind.qmin, kind.qmax + 1, device=self.levels.device))

    def _stepped(self, steps: Tensor) -> Tensor:
        return self._on_levels(steps + self.zero_point).sub_(self.zero_point) if len(self.levels) else steps

    def _on_levels(self, codes: Tensor) -> Tensor:
        if not len(self.levels):
            return codes
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return self.levels[torch.bucketize(codes.contiguous(), middles.to(codes.dtype))].to(codes.dtype)


@QUANTIZERS.register_module(name=['hidden', 'HiddenQuantizer'])
class HiddenQuantizer(LevelsQuantizer):
    """Activations after GELU: levels, and copies of channels beyond the range.

    Such channels are continued by copies (:class:`~fqvit_plugin.searching.SplitObserver`): the linear layer before
    computes them once more for each copy, moved down by ``shifts``, and the layer after gives every copy the
    channel's own weights, so that the sum of what saturates is the whole.

    Buffers, besides ``levels``:
        copies, shifts: (n,) int64 and float32; the channel of each copy, and how far it is moved down.
    """

    copies: Tensor
    shifts: Tensor

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        super().__init__(spec, channels)
        self.register_buffer('copies', torch.zeros(0, dtype=torch.int64))
        self.register_buffer('shifts', torch.zeros(0))

    def commit(self) -> None:
        """Write what was taken into the buffers."""
        copies = getattr(self.observer, 'copies', torch.zeros(0, dtype=torch.int64))
        super().commit()  # which forgets the observer
        self.copies = copies.to(self.scale.device)
        top = self.levels[-1] if self.level_count else self.spec.bit_type.qmax
        # the first copy of a channel starts where the channel itself ends, the second where the first ends
        order = torch.arange(len(self.copies), device=self.copies.device)
        first = torch.searchsorted(self.copies, self.copies)
        self.shifts = (order - first + 1) * (top - self.zero_point) * self.scale


def best_levels(counts: Tensor, number: int) -> Tensor:
    """The ``number`` codes that stand for all codes with the least squared error; exact, by dynamic programming.

    Args:
        counts: (N,) how often each code 0 to N - 1 occurs.
        number: 1 to N.

    Returns:
        (number,) int64, ascending.
    """
    size = len(counts)
    x = torch.arange(size, dtype=torch.float64, device=counts.device)
    weight = counts.double() + 1e-9  # codes that never occur still want an order
    sums = torch.stack([torch.cat((x.new_zeros(1), (weight * x**k).cumsum(0))) for k in range(3)])
    # (N + 1, N + 1): weight, first and second moment of the codes from row to column
    mass, first, second = sums[:, None, :] - sums[:, :, None]
    center = torch.round(first / mass.clamp_min(1e-300)).clamp(0, size - 1)
    cost = second - 2 * center * first + center**2 * mass
    cost = torch.where(torch.ones_like(cost).triu(1).bool(), cost, torch.inf)
    best, cuts = cost[0].clone(), []
    for _ in range(number - 1):
        best, cut = (best[:, None] + cost).min(0)
        cuts.append(cut)
    end, levels = size, []
    for cut in reversed(cuts):
        start = int(cut[end])
        levels.append(int(center[start, end]))
        end = start
    levels.append(int(center[0, end]))
    return torch.tensor(levels[::-1], dtype=torch.int64, device=counts.device)


def copies_of(act: Any) -> tuple[Tensor, Tensor] | None:
    """``copies`` and ``shifts`` of a layer's quantizer, or None where it has none."""
    quantizer = getattr(act, 'quantizer', None)
    if isinstance(quantizer, HiddenQuantizer) and len(quantizer.copies):
        return quantizer.copies, quantizer.shifts
    return None
