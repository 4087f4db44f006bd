"""More than 24 bits in float32: sums and products with their rounding errors (Dekker, 1971)."""

from __future__ import annotations

import numpy as np

from .graph import Graph

__all__ = ['quotient', 'split', 'times', 'two_sum']


def split(g: Graph, x: str) -> tuple[str, str]:
    """``x`` as two numbers of 12 bits. Exact with and without fused multiply-add."""
    big = g.node('Mul', x, g.constant(2.0**12 + 1, np.float32))
    high = g.node('Sub', big, g.node('Sub', big, x))
    return high, g.node('Sub', x, high)


def times(g: Graph, a: tuple[str, str], b: tuple[str, str]) -> list[str]:
    """The four exact products of two split numbers, largest first."""
    return [g.node('Mul', x, y) for x, y in ((a[0], b[0]), (a[0], b[1]), (a[1], b[0]), (a[1], b[1]))]


def two_sum(g: Graph, a: str, b: str) -> tuple[str, str]:
    """``a + b`` and what its rounding lost."""
    total = g.node('Add', a, b)
    b_part = g.node('Sub', total, a)
    lost_a = g.node('Sub', a, g.node('Sub', total, b_part))
    return total, g.node('Add', lost_a, g.node('Sub', b, b_part))


def quotient(g: Graph, x: str, divisor: float) -> str:
    """``x / divisor`` rounded once, by a multiplication and what it is off."""
    reciprocal = g.constant(1 / np.float64(divisor), np.float32)
    near = g.node('Mul', x, reciprocal)
    fraction, exponent = np.frexp(np.float64(divisor))
    high = np.float32(np.ldexp(np.round(fraction * 2.0**12), exponent - 12))
    parts = g.constant(high, np.float32), g.constant(np.float32(divisor) - high, np.float32)
    error = x
    for product in times(g, split(g, near), parts):
        error = g.node('Sub', error, product)
    return g.node('Add', near, g.node('Mul', error, reciprocal))
