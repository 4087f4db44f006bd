"""Escapes in a graph: end codes that stand for what a few tokens hold far out, see :mod:`fqvit_plugin.escape`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..functional import PULL
from ..integer.program import Grid
from .graph import Graph

__all__ = ['decoded', 'encoded', 'escapes_of']

#: Beyond every number of a graph, and exact in float32.
_NEVER = 2**60


class Escapes(NamedTuple):
    """What the channels' codes stand for, (C,) int64, on the axis of stored codes, which goes on beyond their ends.

    Args:
        ends: the codes that are taken, below and above; beyond all codes where none is.
        far: where on the axis lies what they stand for.
        borders: what is not strictly between them is far out.
    """

    ends: tuple[np.ndarray, np.ndarray]
    far: np.ndarray
    borders: tuple[np.ndarray, np.ndarray]


def escapes_of(grid: Grid) -> Escapes:
    """The escapes of a grid that has some."""
    far, zero = np.asarray(grid.far, np.int64), np.asarray(grid.zero, np.int64)
    limit = 2 ** (grid.bits - 1)
    ends = np.where(far < 0, -limit, -_NEVER), np.where(far > 0, limit - 1, _NEVER)
    borders = _borders(-limit + (far < 0) - zero, limit - 1 - (far > 0) - zero, far)
    return Escapes(ends, far + zero, (borders[0] + zero, borders[1] + zero))


def _borders(low: np.ndarray, high: np.ndarray, far: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole steps from which on ``escaped_steps`` gives ``far``, downwards and upwards."""
    up, size = far > 0, np.abs(far)
    near, other = np.where(up, high, -low), np.where(up, low, -high)  # as if ``far`` were above
    between = -(-(size + PULL * near) // (1 + PULL))
    beyond = -(-(PULL * near - size) // (PULL - 1))  # of a far value that an ordinary code has too
    above = np.where(size > near, between, beyond)
    below = (PULL * other - size) // (PULL - 1)
    none = far == 0
    return (
        np.where(none, -_NEVER, np.where(up, below, -above)),
        np.where(none, _NEVER, np.where(up, above, -below)),
    )


def encoded(graph: Graph, x: str, grid: Grid, at: Callable[[np.ndarray], str], half: float = 0) -> str:
    """Places on the axis of codes as codes, to be saturated yet.

    Args:
        at: the constant of places on that axis, in the numbers of ``x``.
        half: 1/2 if ``x`` is not rounded yet.
    """
    escapes = escapes_of(grid)
    low, high = escapes.ends
    ordinary = graph.node('Min', graph.node('Max', x, at(low + 1)), at(high - 1))
    limit = 2 ** (grid.bits - 1)
    below, above = escapes.borders
    return _where_between(
        graph, x, at(below + half), at(above - half), ordinary, at(escapes.far.clip(-limit, limit - 1))
    )


def decoded(graph: Graph, x: str, grid: Grid, at: Callable[[np.ndarray], str], half: float = 0) -> str:
    """Codes as places on their axis; arguments as :func:`encoded`'s, ``half`` if ``x`` is not whole."""
    escapes = escapes_of(grid)
    low, high = escapes.ends
    return _where_between(graph, x, at(low + half), at(high - half), x, at(escapes.far))


def _where_between(graph: Graph, x: str, low: str, high: str, then: str, otherwise: str) -> str:
    between = graph.node('And', graph.node('Greater', x, low), graph.node('Less', x, high))
    return graph.node('Where', between, then, otherwise)
