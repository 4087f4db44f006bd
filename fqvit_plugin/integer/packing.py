"""Weights of four bits in bytes: two to a byte, and the factors that groups of their columns share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['apart', 'fits', 'pack', 'unpack']


def fits(weight: Tensor, bits: int) -> bool:
    """Whether every one of ``weight`` has so few bits."""
    limit = 2 ** (bits - 1)
    return bool(weight.min() >= -limit and weight.max() < limit)


def pack(weight: Tensor) -> Tensor:
    """Two weights of 4 bits to a byte, the first in the low half."""
    flat = torch.nn.functional.pad(weight.flatten(), (0, weight.numel() % 2)).to(torch.uint8) & 15
    return flat[0::2] | (flat[1::2] << 4)


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """What :func:`pack` packed, int8 (rows, columns)."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=1).flatten().to(torch.int8)
    return ((pairs ^ 8) - 8)[: rows * columns].view(rows, columns)


def apart(weight: Tensor, groups: Tensor) -> tuple[Tensor, Tensor] | None:
    """``codes`` of 4 bits and ``factors`` from 1 to 15, so that ``weight == codes * factors[:, groups]``.

    Args:
        weight: (O, I) int8.
        groups: (I,) the group of each column.

    Returns:
        (O, I) and (O, G) int8, with the smallest factors; None where there are none.
    """
    factors = weight.new_zeros(len(weight), int(groups.max()) + 1)
    for factor in range(15, 0, -1):
        codes = torch.div(weight, factor, rounding_mode='floor')
        off = (codes * factor != weight) | (codes < -8) | (codes > 7)
        wrong = torch.zeros_like(factors, dtype=torch.int32).index_add_(1, groups, off.int())
        factors[wrong == 0] = factor
    if not factors.all():
        return None
    return torch.div(weight, factors[:, groups], rounding_mode='floor'), factors
