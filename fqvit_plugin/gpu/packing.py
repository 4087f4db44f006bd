"""Constants as the kernels read them. No Triton here: what is packed can be tested anywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ['ExponentLine', 'Rescaling', 'exponent_line', 'pack_table', 'rescaling', 'unpack_table']

#: Bits of an index that tell apart the entries of a bin of a packed table.
BIN = 6


class Rescaling(NamedTuple):
    """``(x gain + offset) >> shift``, or, unless ``wide``, ``>> (32 + shift)``, which spares the lower half.

    Args:
        gain: int32.
        offset: int64.
        shift: int32, () or one for each gain.
        wide: whether the gain would not fit 32 bits otherwise.
    """

    gain: Tensor
    offset: Tensor
    shift: Tensor
    wide: bool


def rescaling(gain: Tensor, offset: Tensor, shift: Tensor) -> Rescaling:
    """``(x gain + offset) >> shift`` for ``x`` below 2**28, with a shift of at least 32 bits if that can be had."""
    gain, offset, shift = gain.long(), offset.long(), shift.long()
    left = (32 - shift).clamp(min=0)
    wide = bool(((gain.abs() << left) >= 2**31).any()) or bool((offset.abs() >= (2**61 >> left)).any())
    if not wide:
        gain, offset, shift = gain << left, offset << left, (shift - 32).clamp(min=0)
    return Rescaling(gain.to(torch.int32), offset, shift.to(torch.int32), wide)


def pack_table(table: Tensor) -> Tensor | None:
    """A table of int8 codes that seldom changes, by bins of ``2**BIN`` entries; None if a bin holds two changes.

    An int16 entry holds a bin's first code (8 bits), whether the code falls at its change (bit 7) and where it changes
    (7 bits; ``2**BIN``: nowhere). GELU's table, 65,536 entries, becomes one of 1,024.
    """
    if len(table) % 2**BIN:
        return None
    bins = table.to(torch.int32).view(-1, 2**BIN)
    steps = bins.diff(dim=1)
    if int((steps != 0).sum(1).max()) > 1 or int(steps.abs().max()) > 1:
        return None
    where = torch.where((steps != 0).any(1), (steps != 0).int().argmax(1) + 1, 2**BIN)
    return (bins[:, 0] * 256 + (steps.sum(1) < 0) * 128 + where).to(torch.int16)


def unpack_table(packed: Tensor) -> Tensor:
    """What :func:`pack_table` was given."""
    entries = packed.to(torch.int32)[:, None]
    behind = torch.arange(2**BIN)[None, :] >= entries % 128
    return ((entries >> 8) + behind * (1 - 2 * ((entries >> 7) & 1))).flatten().to(torch.int8)


class ExponentLine(NamedTuple):
    """``octaves = (distance slope + 2**(shift - 1)) >> shift``; codes from ``last`` on stand for zero."""

    slope: int
    shift: int
    last: int


def exponent_line(exponents: Tensor) -> ExponentLine | None:
    """The line along which a table of exponents (15 downwards, then -1) falls; None if there is none.

    Log-Int-Softmax rounds the product of a distance and a factor, so there is one unless a product lies on a tie.
    """
    exponents = exponents.to(torch.int64)
    distance = torch.arange(len(exponents))
    for last in range(16, 0, -1):
        octaves = torch.where(exponents < 0, last, 15 - exponents).double()[1:]
        lowest = float(((octaves - 0.5) / distance[1:]).max())
        above = (octaves + 0.5) / distance[1:]
        highest = float(above[exponents[1:] >= 0].min()) if bool((exponents[1:] >= 0).any()) else lowest * 2
        factor = (lowest + highest) / 2
        shift = 1
        while shift < 30 and factor * 2 ** (shift + 1) * len(exponents) < 2**30:
            shift += 1
        line = ExponentLine(round(factor * 2**shift), shift, last)
        if factor > 0 and torch.equal(_exponents(line, distance), exponents):
            return line
    return None


def _exponents(line: ExponentLine, distance: Tensor) -> Tensor:
    octaves = (distance * line.slope + (1 << (line.shift - 1))) >> line.shift
    return torch.where(octaves < line.last, 15 - octaves, -1)
