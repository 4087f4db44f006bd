"""Changes of layout, the same for codes and for real values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..integer.program import Op
from .graph import Graph

__all__ = ['LAYOUTS', 'add_layout', 'windows']

#: Kernel -> writes it for one tensor. A padding's value comes last.
LAYOUTS: dict[str, Callable[..., str]] = {}


def _layout(function: Callable[..., str]) -> Callable[..., str]:
    LAYOUTS[function.__name__.strip('_')] = function
    return function


def add_layout(graph: Graph, op: Op, x: str, output: str, filler: Any, dtype: Any) -> str:
    """Write the layout operation ``op`` on ``x``.

    Args:
        filler: what padding holds, or the constant tokens of ``prepend``.
        dtype: of ``x``.
    """
    settings = {k: v for k, v in op.settings.items() if k != 'value'}
    return LAYOUTS[op.kind](graph, x, output, filler=np.asarray(filler, dtype), **settings)


@_layout
def _reshape(graph: Graph, x: str, output: str, *, shape: Any, filler: Any) -> str:
    return graph.shape(x, shape, output)


@_layout
def _permute(graph: Graph, x: str, output: str, *, dims: Any, filler: Any) -> str:
    return graph.node('Transpose', x, output=output, perm=list(dims))


@_layout
def _select(graph: Graph, x: str, output: str, *, dim: int, index: int, filler: Any) -> str:
    return graph.node('Gather', x, graph.constant(index, np.int64), output=output, axis=dim)


@_layout
def _crop(graph: Graph, x: str, output: str | None, *, dim: int, start: int, stop: int, filler: Any = None) -> str:
    bounds = (graph.constant([v], np.int64) for v in (start, stop, dim))
    return graph.node('Slice', x, *bounds, output=output)


@_layout
def _roll(graph: Graph, x: str, output: str, *, shifts: Any, dims: Any, filler: Any) -> str:
    """``y[i] = x[i - shift]``: the last ``shift`` rows come first."""
    for n, (shift, dim) in enumerate(zip(shifts, dims, strict=True)):
        last = _crop(graph, x, None, dim=dim, start=-shift, stop=np.iinfo(np.int64).max)
        first = _crop(graph, x, None, dim=dim, start=0, stop=-shift)
        x = graph.node('Concat', last, first, axis=dim, output=output if n == len(dims) - 1 else None)
    return x


@_layout
def _pad_map(graph: Graph, x: str, output: str, *, bottom: int, right: int, filler: Any) -> str:
    return _pad(graph, x, [0, 0, 0, 0, 0, bottom, right, 0], filler, output)


@_layout
def _prepend(graph: Graph, x: str, output: str, *, filler: Any) -> str:
    batch = graph.node('Shape', x, start=0, end=1)
    shape = graph.node('Concat', batch, graph.constant(filler.shape[-2:], np.int64), axis=0)
    tokens = graph.node('Expand', graph.constant(filler, filler.dtype), shape)
    return graph.node('Concat', tokens, x, output=output, axis=1)


def windows(
    graph: Graph, op: Op, x: str, channels: int, size: tuple[int, int], filler: np.ndarray, output: str
) -> str:
    """(B, C, H, W) to (B, N, C kh kw): one Gather for the rows of the windows, one for the columns."""
    kernel, stride = op.settings['kernel'], op.settings['stride']
    left, right, top, bottom = op.settings['padding']
    if any((left, right, top, bottom)):
        x = _pad(graph, x, [0, 0, top, left, 0, 0, bottom, right], filler)
    padded = (size[0] + top + bottom, size[1] + left + right)
    counts = [(p - k) // s + 1 for p, k, s in zip(padded, kernel, stride, strict=True)]
    rows, columns = (np.arange(n)[:, None] * s + np.arange(k) for n, k, s in zip(counts, kernel, stride, strict=True))
    x = graph.node('Gather', x, graph.constant(rows, np.int64), axis=2)  # (B, C, h, kh, W)
    x = graph.node('Gather', x, graph.constant(columns, np.int64), axis=4)  # (B, C, h, kh, w, kw)
    x = graph.node('Transpose', x, perm=[0, 2, 4, 1, 3, 5])
    return graph.shape(x, [-1, counts[0] * counts[1], channels * kernel[0] * kernel[1]], output)


def _pad(graph: Graph, x: str, amounts: list[int], filler: np.ndarray, output: str | None = None) -> str:
    return graph.node(
        'Pad', x, graph.constant(amounts, np.int64), graph.constant(filler, filler.dtype), output=output
    )
