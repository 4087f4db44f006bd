"""Which function a table holds: a program stores results, an exported graph wants the operator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..integer.program import Grid
from .graph import Graph

__all__ = ['FUNCTIONS', 'function_of', 'write_function']

#: In float64, as the tables were made.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    'identity': lambda x: x,
    'gelu': F.gelu,
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
    'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x),
    'silu': F.silu,
    'relu': F.relu,
    'tanh': torch.tanh,
}
#: A table may differ at so many entries of a thousand, by one step: exp and float32 have last bits of their own. The
#: functions differ from each other at more.
_TOLERANCE = 1


def function_of(table: Tensor, source: Grid, target: Grid) -> str:
    """The name in ``FUNCTIONS`` of what ``table`` tabulates from one grid to the other.

    Raises:
        ValueError: none of them.
    """
    half = len(table) // 2
    x = (torch.arange(-half, half, dtype=torch.float64) - source.zero[0]) * source.scale[0]
    limit = 2 ** (target.bits - 1)
    found: dict[str, int] = {}
    for name, function in FUNCTIONS.items():
        steps = function(x) / target.scale[0]
        roundings = (torch.round(steps), torch.floor(steps + 0.5))  # of halves, either will do
        gaps = torch.stack([((r + target.zero[0]).clamp(-limit, limit - 1) - table).abs() for r in roundings])
        gap = gaps.amin(0)
        if gap.max() <= 1 and int(gap.count_nonzero()) * 1000 <= _TOLERANCE * len(table):
            found[name] = int(gap.count_nonzero())
    if found:
        return min(found, key=lambda name: found[name])
    raise ValueError(
        f'a table of the program is none of {", ".join(FUNCTIONS)}: form "qdq" has no operator for it; '
        "form='integer' has"
    )


def write_function(graph: Graph, name: str, x: str) -> str:
    """The operators of a function, in the shape that engines fuse."""
    scalar = {
        v: graph.constant(v, 'float32') for v in (0.5, 1.0, math.sqrt(2), math.sqrt(2 / math.pi), 0.044715, 1.702)
    }
    if name == 'identity':
        return x
    if name == 'gelu':
        erf = graph.node('Erf', graph.node('Div', x, scalar[math.sqrt(2)]))
        return graph.node('Mul', graph.node('Mul', x, graph.node('Add', erf, scalar[1.0])), scalar[0.5])
    if name == 'gelu_tanh':
        cube = graph.node('Mul', graph.node('Mul', x, graph.node('Mul', x, x)), scalar[0.044715])
        inner = graph.node('Tanh', graph.node('Mul', graph.node('Add', x, cube), scalar[math.sqrt(2 / math.pi)]))
        return graph.node('Mul', graph.node('Mul', x, graph.node('Add', inner, scalar[1.0])), scalar[0.5])
    if name in ('silu', 'quick_gelu'):
        scaled = x if name == 'silu' else graph.node('Mul', x, scalar[1.702])
        return graph.node('Mul', x, graph.node('Sigmoid', scaled))
    return graph.node({'relu': 'Relu', 'tanh': 'Tanh'}[name], x)
