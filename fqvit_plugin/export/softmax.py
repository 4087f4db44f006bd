"""Log-Int-Softmax in standard float operators: the model's own rule, not a float softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..intmath import LARGEST_EXPONENT, log_int_softmax_shift
from .graph import Graph

__all__ = ['write_log_int_softmax']

#: What a mask takes off logits, in steps; beyond every code, and exact in float32 beside them.
_FORBIDDEN = 2.0**20


def write_log_int_softmax(
    graph: Graph, steps: str, shape: tuple[int, ...], exponents: np.ndarray, scale: float, mask: Any
) -> str:
    """``2**-k`` with ``k = round(d c)``, and zero from the last code on; rows are not normalized yet.

    Args:
        steps: logits in whole steps of their grid, float.
        shape: theirs for one image, (windows, heads, N, T).
        exponents: the program's table, which says where zero begins.
        scale: step of the logits.
        mask: (windows, N, T) bool or None.

    Raises:
        ValueError: the table is not the one of this scale.
    """
    c = float(log_int_softmax_shift(torch.tensor(scale, dtype=torch.float32)))
    first_zero = _first_zero(exponents, c)
    if mask is not None:
        steps = graph.shape(steps, [-1, len(mask), *shape[1:]])
        steps = graph.node('Sub', steps, graph.constant(mask[:, None] * _FORBIDDEN, np.float32))
    top = graph.node('ReduceMax', steps, axes=[-1], keepdims=1)
    octaves = graph.node('Mul', graph.node('Sub', top, steps), graph.constant(c, np.float32))
    # 2**-k as an exponential, which engines have vector code for; k is whole, so this is 2**-k but for the last bits
    codes = graph.node('Mul', graph.node('Round', octaves), graph.constant(-math.log(2), np.float32))
    powers = graph.node('ThresholdedRelu', graph.node('Exp', codes), alpha=2.0 ** (0.5 - first_zero))
    return powers if mask is None else graph.shape(powers, [-1, *shape[1:]])


def _first_zero(exponents: np.ndarray, c: float) -> int:
    codes = np.round(np.arange(len(exponents)) * c)
    kept = exponents >= 0
    first_zero = int(codes[kept].max()) + 1
    expected = np.where(codes < first_zero, LARGEST_EXPONENT - codes, -1)
    if not np.array_equal(expected, exponents):
        raise ValueError("a table of exponents is not the Log-Int-Softmax of its logits' scale")
    return first_zero
