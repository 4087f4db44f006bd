"""Changes of layout, the same for codes and for real values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..integer.program import Op
from .graph import Graph

__all__ = ['LAYOUTS', 'add_layout']

#: Kernels that move codes and compute nothing.
LAYOUTS = frozenset({'crop', 'pad_map', 'patches', 'permute', 'prepend', 'reshape', 'roll', 'select'})

#: Kernel -> writes it for one tensor. A padding's value comes last.
_LAYOUTS: dict[str, Callable[..., str]] = {}


def _layout(function: Callable[..., str]) -> Callable[..., str]:
    _LAYOUTS[function.__name__.strip('_')] = function
    return function


def add_layout(graph: Graph, op: Op, x: str, shape: tuple[int, ...], output: str, filler: Any, dtype: Any) -> str:
    """Write the layout operation ``op`` on ``x``.

    Args:
        shape: of ``x``, for one image.
        filler: what padding holds, or the constant tokens of ``prepend``.
        dtype: of ``x``.
    """
    if op.kind == 'patches':
        return _windows(graph, op, x, shape, np.asarray(filler, dtype), output)
    settings = {k: v for k, v in op.settings.items() if k != 'value'}
    return _LAYOUTS[op.kind](graph, x, output, filler=np.asarray(filler, dtype), **settings)


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


def _windows(graph: Graph, op: Op, x: str, shape: tuple[int, ...], filler: np.ndarray, output: str) -> str:
    """(B, C, H, W) to (B, N, C kh kw), the windows that a convolution multiplies; ``shape`` is that of one image."""
    (kh, kw), (down, across) = op.settings['kernel'], op.settings['stride']
    left, right, top, bottom = op.settings['padding']
    _, channels, height, width = shape
    if any((left, right, top, bottom)):
        x = _pad(graph, x, [0, 0, top, left, 0, 0, bottom, right], filler)
    height, width = height + top + bottom, width + left + right
    rows, columns = (height - kh) // down + 1, (width - kw) // across + 1
    if (height, width) == (rows * kh, columns * kw) and (kh, kw) == (down, across):
        x = graph.shape(x, [-1, channels, rows, kh, columns, kw])
    else:
        picks = (np.arange(n)[:, None] * s + np.arange(k) for n, s, k in ((rows, down, kh), (columns, across, kw)))
        for axis, pick in zip((2, 4), picks, strict=True):  # (B, C, h, kh, W), then (B, C, h, kh, w, kw)
            x = graph.node('Gather', x, graph.constant(pick, np.int64), axis=axis)
    x = graph.node('Transpose', x, perm=[0, 2, 4, 1, 3, 5])
    return graph.shape(x, [-1, rows * columns, channels * kh * kw], output)


def _pad(graph: Graph, x: str, amounts: list[int], filler: np.ndarray, output: str | None = None) -> str:
    return graph.node(
        'Pad', x, graph.constant(amounts, np.int64), graph.constant(filler, filler.dtype), output=output
    )
