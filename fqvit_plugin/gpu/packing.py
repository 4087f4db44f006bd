"""Constants as the kernels read them. No Triton here: what is packed can be tested anywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    'ExponentLine',
    'Rescaling',
    'exponent_line',
    'halves',
    'pack_escape',
    'pack_table',
    'rescaling',
    'unpack_table',
]

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


def halves(numbers: Tensor) -> Tensor:
    """(2, …) int32: the upper and the lower halves of int64 numbers."""
    return torch.stack([numbers >> 32, ((numbers & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000]).to(torch.int32)


def pack_escape(far: Tensor, zero: Tensor) -> Tensor:
    """(C,) int32, ``4 (far + zero) + side``: what an end code stands for, as far from zero as codes lie, and the end.

    Args:
        far: (C,) whole steps, see :mod:`fqvit_plugin.escape`.
        zero: () or (C,), of the codes. ``side`` is 0 where a channel has no escape, 1 for the lowest code, 2 for the
            highest.

    Raises:
        ValueError: it is so far out that the kernels' int32 would not hold it.
    """
    far = far.long()
    if int(far.abs().max()) > 2**24:
        raise ValueError(f'an escape of {int(far.abs().max())} steps: the kernels hold no more than {2**24}')
    return ((far + zero) * 4 + (far < 0) + 2 * (far > 0).long()).to(torch.int32)


def pack_table(table: Tensor) -> Tensor | None:
    """A table of int8 codes that seldom changes, by bins of ``2**BIN`` entries; None if a bin holds two changes.

    An int32 entry becomes the code in its second byte when the index within the bin is added to it: it holds the
    lower of a bin's codes there, and below it what carries from the change on. Where the code falls, the index is
    mirrored first, by the fourth byte. GELU's table, 65,536 entries, becomes one of 1,024.
    """
    size = 2**BIN
    if len(table) % size:
        return None
    bins = table.to(torch.int32).view(-1, size)
    steps = bins.diff(dim=1)
    if int((steps != 0).sum(1).max()) > 1 or int(steps.abs().max()) > 1:
        return None
    falls = steps.sum(1) < 0
    lower = bins.amin(1)
    high = (bins > lower[:, None]).sum(1)  # entries with the higher code: the last ones, or once mirrored
    return (((lower & 255) << 8) + (256 - size + high) + (falls.int() * (size - 1) << 24)).to(torch.int32)


def unpack_table(packed: Tensor) -> Tensor:
    """What :func:`pack_table` was given."""
    size = 2**BIN
    index = torch.arange(size)[None, :] ^ (packed[:, None] >> 24)
    return ((packed[:, None] + index) >> 8 & 255).flatten().to(torch.uint8).view(torch.int8)


class ExponentLine(NamedTuple):
    """``octaves = (distance slope + 2**(shift - 1)) >> shift``; codes from ``last`` on stand for zero."""

    slope: int
    shift: int
    last: int

    @property
    def end(self) -> int:
        """A distance that stands for zero."""
        return (17 << self.shift) // self.slope + 1


def exponent_line(exponents: Tensor) -> ExponentLine | None:
    """The line along which a table of exponents (15 downwards, then -1) falls; None if there is none.

    Log-Int-Softmax rounds the product of a distance and a factor, so there is one unless a product lies on a tie.
    """
    exponents = exponents.to(torch.int64)
    distance = torch.arange(len(exponents))
    for last in range(16, 0, -1):
        octaves = torch.where(exponents < 0, last, 15 - exponents).double()[1:]
        lowest = max(0.0, float(((octaves - 0.5) / distance[1:]).max()))
        above = (octaves + 0.5) / distance[1:]
        highest = float(above[exponents[1:] >= 0].min()) if bool((exponents[1:] >= 0).any()) else lowest * 2
        factor = (lowest + highest) / 2
        shift = 1
        # 32 bits hold the product with a distance that ends the line and three times the table besides
        while shift < 25 and factor * 2 ** (shift + 1) * len(exponents) * 4 < 2**30:
            shift += 1
        line = ExponentLine(round(factor * 2**shift), shift, last)
        if line.slope > 0 and torch.equal(_exponents(line, distance), exponents):
            return line
    return None


def _exponents(line: ExponentLine, distance: Tensor) -> Tensor:
    octaves = (distance * line.slope + (1 << (line.shift - 1))) >> line.shift
    return torch.where(octaves < line.last, 15 - octaves, -1)
