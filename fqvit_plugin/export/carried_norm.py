"""The integer LayerNorm in float32 that carries integers: sums in parts, root and reciprocal in pairs of floats."""

from __future__ import annotations

from typing import Any

import numpy as np

from .graph import Graph
from .pairs import split, times, two_sum

__all__ = ['write_norm']


def write_norm(graph: Graph, u: str, channels: int, guard: int, root_bits: int) -> str:
    """The kernel's ``x_hat``, whole units of 2**-16, of whole numbers ``u`` (B, N, C) below 2**16.

    With ``w = u - m``, ``m`` near the mean, and ``V = C sum(w**2) - sum(w)**2``, as with ``u``, ``x_hat`` is
    ``(w - sum(w) / C) K`` with ``K = 2**16 C / sqrt(V)``.
    """
    return _Norm(graph, channels, guard, root_bits).write(u)


class _Norm:
    def __init__(self, graph: Graph, channels: int, guard: int, root_bits: int) -> None:
        self._graph, self._channels, self._guard, self._root_bits = graph, channels, guard, root_bits

    def _op(self, kind: str, x: str, y: Any) -> str:
        return self._graph.node(kind, x, y if isinstance(y, str) else self._graph.constant(y, np.float32))

    def _sum(self, x: str) -> str:
        return self._graph.node('ReduceSum', x, self._graph.constant([-1], np.int64), keepdims=1)

    def _fraction(self, x: str) -> tuple[str, str]:
        whole = self._graph.node('Floor', x)
        return whole, self._op('Sub', x, whole)

    def write(self, u: str) -> str:
        total = self._sum(u)
        middle = self._graph.node('Round', self._op('Mul', total, 1 / self._channels))
        w = self._op('Sub', u, middle)
        high = self._graph.node('Round', self._op('Mul', w, 2.0**-8))
        low = self._op('Sub', w, self._op('Mul', high, 2.0**8))
        left = self._op('Sub', total, self._op('Mul', middle, float(self._channels)))
        mean = self._op('Div', left, float(self._channels))
        k_high, k_low = self._factor(*self._squares(high, low, left))
        # (w - mean) K: products of 8 and 12 bits are exact, and so are their whole parts
        first, first_rest = self._fraction(self._op('Mul', high, self._op('Mul', k_high, 2.0**8)))
        second, second_rest = self._fraction(self._op('Mul', low, k_high))
        shift = self._op('Add', self._op('Mul', mean, k_high), self._op('Mul', mean, k_low))
        rest = self._op('Sub', self._op('Mul', w, k_low), self._op('Sub', shift, 0.5))
        rest = self._graph.node('Floor', self._op('Add', rest, self._op('Add', first_rest, second_rest)))
        return self._op('Add', self._op('Add', first, second), rest)

    def _squares(self, high: str, low: str, left: str) -> tuple[str, str]:
        """``Q = V / C`` as a pair."""
        squares = self._op('Mul', self._sum(self._op('Mul', high, high)), 2.0**16)
        mixed = self._op('Mul', self._sum(self._op('Mul', high, low)), 2.0**9)
        total, lost = two_sum(self._graph, squares, mixed)
        total, more = two_sum(self._graph, total, self._sum(self._op('Mul', low, low)))
        taken = self._op('Mul', self._op('Mul', left, left), -1 / self._channels)
        taken = self._op('Add', taken, self._guard / self._channels)
        total, rest = two_sum(self._graph, total, self._op('Add', self._op('Add', lost, more), taken))
        floor = self._graph.constant(1 / self._channels, np.float32)
        return self._graph.node('Max', total, floor), rest

    def _factor(self, q: str, q_low: str) -> tuple[str, str]:
        """``K`` as a pair, its first part of 12 bits, with the kernel's floor of the root."""
        near = self._graph.node('Sqrt', self._graph.node('Div', self._constant(self._channels * 2.0**32), q))
        k, _ = split(self._graph, near)
        scaled = self._op('Mul', k, 2.0**-16)
        z = self._op('Mul', scaled, scaled)
        q_parts = split(self._graph, q)
        error = self._constant(self._channels)
        for product in times(self._graph, q_parts, split(self._graph, z)):
            error = self._op('Sub', error, product)
        error = self._op('Div', self._op('Sub', error, self._op('Mul', q_low, z)), float(self._channels))
        series = self._op('Add', self._op('Mul', error, 0.375), 0.5)  # of 1 / sqrt(1 - error)
        k_low = self._op('Mul', k, self._op('Mul', error, series))
        return k, self._op('Add', k_low, self._floored(q, q_parts, q_low, k, k_low))

    def _floored(self, q: str, q_parts: tuple[str, str], q_low: str, k: str, k_low: str) -> str:
        """What the root's floor adds to ``K``."""
        unit = 2.0 ** (self._root_bits - 16)
        scaled = self._op('Mul', k, unit)
        root = self._op('Mul', q_parts[0], scaled)
        _, rest = self._fraction(root)
        rest = self._op('Add', rest, self._op('Mul', q_parts[1], scaled))
        rest = self._op('Add', rest, self._op('Mul', self._op('Mul', q, k_low), unit))
        rest = self._op('Add', rest, self._op('Mul', q_low, scaled))
        _, lost = self._fraction(rest)
        return self._op('Mul', k, self._op('Div', lost, self._op('Max', root, 1.0)))

    def _constant(self, value: float) -> str:
        return self._graph.constant(value, np.float32)
