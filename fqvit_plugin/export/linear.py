"""Linear layers and patch embeddings of form ``qdq``: int8 weights with a scale for each output channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..integer.program import Op

if TYPE_CHECKING:
    from .qdq_form import QdqWriter

__all__ = ['LinearWriter']

#: A dead channel's weight scale: engines want positive ones.
_TINY = 2.0**-60


class LinearWriter:
    """Writes ``linear`` together with the ``affine`` that reads its accumulators.

    Args:
        writer: whose graph and tensors these are.
        unsigned_weights: store weights as uint8 with zero point 128.
    """

    def __init__(self, writer: QdqWriter, unsigned_weights: bool) -> None:
        self._writer, self._unsigned = writer, unsigned_weights
        self._makers = {op.output: op for op in writer.program.ops}

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
        weight, ratio = weight * np.where(ratio < 0, -1, 1)[:, None], np.abs(ratio)
        patches = self._makers.get(op.inputs[0])
        source = patches.inputs[0] if patches is not None and patches.kind == 'patches' else op.inputs[0]
        axis = w.axis(name)
        if w.target.symmetric:  # the zero points of input and output become part of the bias
            taken = ratio * weight.sum(1) * w.axis(source).zero
            term = term - taken + (axis.zero if axis.bits <= 8 else 0)
        if patches is not None and patches.kind == 'patches':
            return self._convolution(patches, name, weight, ratio, term)
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
        return np.maximum(ratio * w.axis(name).step / w.axis(source).step, _TINY)

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
        unit = scale * w.axis(source).step
        real = term * w.axis(name).step
        if not w.target.gemm or np.abs(real / unit).max() >= 2**31 - 1:
            return w.graph.constant(real, np.float32, f'{name}.bias')
        stored = w.graph.constant(np.round(real / unit), np.int32, f'{name}.bias')
        units, zeros = w.graph.constant(unit, np.float32), w.graph.constant(np.zeros(len(unit)), np.int32)
        return w.graph.node('DequantizeLinear', stored, units, zeros, axis=0)

    def _matmul(self, source: str, name: str, weight: np.ndarray, ratio: np.ndarray, term: np.ndarray) -> str | None:
        w, scale = self._writer, self._scales(source, name, ratio)
        y = w.graph.node('MatMul', w.reading(source), self._dequantized(name, weight.T, scale, 1))
        return self._finish(name, w.graph.node('Add', y, self._bias(source, name, scale, term)))

    def _convolution(
        self, patches: Op, name: str, weight: np.ndarray, ratio: np.ndarray, term: np.ndarray
    ) -> str | None:
        w, source = self._writer, patches.inputs[0]
        scale, settings = self._scales(source, name, ratio), patches.settings
        (left, right, top, bottom), x = settings['padding'], w.reading(source)
        pads = [top, left, bottom, right]
        if w.target.symmetric and any(pads):  # a convolution pads with 0, which is not the reading of the real zero
            amounts = w.graph.constant([0, 0, top, left, 0, 0, bottom, right], np.int64)
            x, pads = w.graph.node('Pad', x, amounts, w.scalar(w.lift(source))), [0, 0, 0, 0]
        kernel = list(settings['kernel'])
        filters = self._dequantized(name, weight.reshape(len(weight), -1, *kernel), scale, 0)
        bias = self._bias(source, name, scale, term)
        y = w.graph.node('Conv', x, filters, bias, kernel_shape=kernel, strides=list(settings['stride']), pads=pads)
        codes = w.quantized(y, name)
        if w.target.layout_on_codes:
            w.hold(name, self._tokens(codes, name, name))
        else:
            w.hold_reading(name, self._tokens(w.dequantize(codes, name), name, f'{name}.y'))
        return None

    def _tokens(self, x: str, name: str, output: str) -> str:
        """(B, C, H, W) to (B, N, C)."""
        _, tokens, channels = self._writer.shapes[name]
        flat = self._writer.graph.shape(x, [-1, channels, tokens])
        return self._writer.graph.node('Transpose', flat, output=output, perm=[0, 2, 1])

    def _finish(self, name: str, y: str, shape: list[int] | None = None) -> str | None:
        if self._writer.axis(name).bits > 8:
            return y
        self._writer.quantize(y, name, shape=shape)
        return None
