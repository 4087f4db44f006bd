"""Linear layers of form ``qdq``: int8 weights with a scale for each output channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..integer.program import Op

if TYPE_CHECKING:
    from .qdq_form import QdqWriter

__all__ = ['LinearWriter']


class LinearWriter:
    """Writes ``linear`` together with the ``affine`` that reads its accumulators.

    Args:
        writer: whose graph and tensors these are.
        unsigned_weights: store weights as uint8 with zero point 128.
    """

    def __init__(self, writer: QdqWriter, unsigned_weights: bool) -> None:
        self._writer, self._unsigned = writer, unsigned_weights

    def flattens(self, name: str) -> bool:
        """Whether a layer's rows are put into one matrix, and the codes of ``name`` must take their shape again."""
        return self._writer.target.gemm and len(self._writer.shapes[name]) > 2

    def write(self, op: Op, name: str, ratio: np.ndarray, term: np.ndarray) -> str | None:
        """The layer ``op`` on the grid of ``name``: its codes, or its values where that has 16 bits.

        Args:
            ratio: (O,) or (), accumulators to steps of ``name``.
            term: (O,) or (), the bias in these steps.
        """
        w = self._writer
        weight = self._weight(op)
        ratio, term = (np.broadcast_to(v, len(weight)).astype(np.float64) for v in (ratio, term))
        weight, ratio = _oriented(weight, ratio)
        source = op.inputs[0]
        grid = w.grid(name)
        # what zero points leave to the values becomes part of the bias
        term = term - ratio * weight.sum(1) * w.grid(source).lift / w.grid(source).step
        if grid.bits <= 8:
            term = term + grid.lift / grid.step
        if self._writer.target.gemm:
            return self._gemm(source, name, weight, ratio, term)
        return self._matmul(source, name, weight, ratio, term)

    def _weight(self, op: Op) -> np.ndarray:
        weight = self._writer.values(op)['weight'].astype(np.int64)
        if weight.min() < -127:
            raise ValueError(f'{op.output}: a weight is -128, outside of the symmetric range that engines take')
        return weight

    def _dequantized(self, name: str, weight: np.ndarray, scale: np.ndarray, axis: int) -> str:
        graph, dtype = self._writer.graph, np.uint8 if self._unsigned else np.int8
        offset = 128 if self._unsigned else 0
        stored = graph.constant(weight + offset, dtype, f'{name}.weight')
        zeros = graph.constant(np.full(len(scale), offset), dtype)
        scales = graph.constant(scale, np.float32)
        return graph.node('DequantizeLinear', stored, scales, zeros, axis=axis)

    def _scales(self, source: str, name: str, ratio: np.ndarray) -> np.ndarray:
        w = self._writer
        return np.asarray(ratio * w.grid(name).step / w.grid(source).step)

    def _gemm(self, source: str, name: str, weight: np.ndarray, ratio: np.ndarray, term: np.ndarray) -> str | None:
        w, scale = self._writer, self._scales(source, name, ratio)
        rows = w.codes(source)
        if len(w.shapes[source]) > 2:
            rows = w.graph.shape(rows, [-1, weight.shape[1]])
        x = w.dequantize(rows, source)
        bias = self._bias(source, name, scale, term)
        y = w.graph.node('Gemm', x, self._dequantized(name, weight.T, scale, 1), bias)
        return self._finish(name, y, [-1, *w.shapes[name][1:]] if self.flattens(name) else None)

    def _bias(self, source: str, name: str, scale: np.ndarray, term: np.ndarray) -> str:
        """As int32 in units of the accumulator, or float where that is too narrow."""
        w = self._writer
        unit = scale * w.grid(source).step
        real = term * w.grid(name).step
        if not w.target.gemm or np.abs(real / unit).max() >= 2**31 - 1:
            return w.graph.constant(real, np.float32, f'{name}.bias')
        stored = w.graph.constant(np.round(real / unit), np.int32, f'{name}.bias')
        units, zeros = w.graph.constant(unit, np.float32), w.graph.constant(np.zeros(len(unit)), np.int32)
        return w.graph.node('DequantizeLinear', stored, units, zeros, axis=0)

    def _matmul(self, source: str, name: str, weight: np.ndarray, ratio: np.ndarray, term: np.ndarray) -> str | None:
        w, scale = self._writer, self._scales(source, name, ratio)
        y = w.graph.node('MatMul', w.reading(source), self._dequantized(name, weight.T, scale, 1))
        return self._finish(name, w.graph.node('Add', y, self._bias(source, name, scale, term)))

    def _finish(self, name: str, y: str, shape: list[int] | None = None) -> str | None:
        if self._writer.grid(name).bits > 8:
            return y
        self._writer.quantize(y, name, shape=shape)
        return None


def _oriented(weight: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same products with positive ratios; a channel of zeros gets the largest, which changes nothing."""
    weight, ratio = weight * np.sign(ratio).astype(np.int64)[:, None], np.abs(ratio)
    alive = weight.any(1)
    return weight, np.where(alive, ratio, ratio[alive].max() if alive.any() else 1.0)
