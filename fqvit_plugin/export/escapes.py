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
    size, near = np.abs(far), np.where(far > 0, high, -low)  # as if ``far`` were above
    between = -(-(size + PULL * near) // (1 + PULL))
    beyond = -(-(PULL * near - size) // (PULL - 1))  # of a far value that an ordinary code has too
    above = np.where(size > near, between, beyond)
    return np.where(far < 0, -above, -_NEVER), np.where(far > 0, above, _NEVER)


def encoded(graph: Graph, x: str, grid: Grid, at: Callable[[np.ndarray], str], half: float = 0) -> str:
    """Places on the axis of codes as codes, to be saturated yet.

    Args:
        at: the constant of places on that axis, in the numbers of ``x``.
        half: 1/2 if ``x`` is not rounded yet.
    """
    escapes, limit = escapes_of(grid), 2 ** (grid.bits - 1)
    low, high = escapes.ends
    ordinary = graph.node('Max', x, at(low + 1)) if _some(low) else x
    ordinary = graph.node('Min', ordinary, at(high - 1)) if _some(high) else ordinary
    near = _between(graph, x, escapes.borders, at, half)
    return graph.node('Where', near, ordinary, at(escapes.far.clip(-limit, limit - 1)))


def decoded(graph: Graph, x: str, grid: Grid, at: Callable[[np.ndarray], str], half: float = 0) -> str:
    """Codes as places on their axis; arguments as :func:`encoded`'s, ``half`` if ``x`` is not whole."""
    escapes = escapes_of(grid)
    return graph.node('Where', _between(graph, x, escapes.ends, at, half), x, at(escapes.far))


def _between(
    graph: Graph, x: str, ends: tuple[np.ndarray, np.ndarray], at: Callable[[np.ndarray], str], half: float
) -> str:
    """Whether ``x`` lies strictly between; engines take long over operators that decide nothing."""
    low, high = ends
    tests = [graph.node('Greater', x, at(low + half))] if _some(low) else []
    tests += [graph.node('Less', x, at(high - half))] if _some(high) else []
    return tests[0] if len(tests) == 1 else graph.node('And', *tests)


def _some(ends: np.ndarray) -> bool:
    return bool((np.abs(ends) < _NEVER).any())
