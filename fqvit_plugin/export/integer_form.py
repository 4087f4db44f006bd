"""A program as standard integer operators: the kernels' arithmetic, one by one, in the order of the program.

Codes of up to 8 bits are uint8, ``stored + 128``; those of 16 bits, which only index tables, int32,
``stored + 2**15``; accumulators int32; everything else int64. Values bear the program's names.

Products are unsigned by unsigned (``MatMulInteger`` with zero points). Of onnxruntime's kernels for x86 those widen
to 16 bits before they multiply (vpmovzxbw, vpmaddwd); unsigned by signed ones without VNNI add pairs of products
in 16 bits that saturate (vpmaddubsw); signed by signed ones are exact too, but most CPUs run them without vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dyadic import MEAN_BITS, RECIPROCAL_BITS
from ..integer.program import Op, Program
from .escapes import decoded, encoded
from .graph import Graph
from .layouts import LAYOUTS, add_layout

__all__ = ['IntegerWriter', 'code_offset', 'floor_root', 'rounded']

#: Makes shifted numbers non-negative, since operators shift unsigned ones; |x| < 2**61 wherever it is added.
_LIFT = 1 << 61
#: Below every masked logit's distance; distances are at most 255.
_FORBIDDEN = 1 << 14


def code_offset(bits: int) -> int:
    """What is added to stored codes of ``bits`` bits in the graph."""
    return 2**7 if bits <= 8 else 2 ** (bits - 1)


class IntegerWriter:
    """Writes the operations of ``program`` into ``graph``; a method for each kernel.

    Args:
        shapes: of every tensor, for one image.
    """

    def __init__(self, graph: Graph, program: Program, shapes: dict[str, tuple[int, ...]]) -> None:
        self._graph, self._program, self._shapes = graph, program, shapes

    def write(self) -> None:
        """Everything, from ``image`` to ``logits``."""
        for op in self._program.ops:
            values = {k: self._program.constants[name].numpy(force=True) for k, name in op.constants.items()}
            if op.kind in LAYOUTS:
                self._layout(op, values)
            else:
                getattr(self, f'_{op.kind}')(op, **values, **op.settings)
        grid = self._program.grids[self._program.output]
        scale = self._graph.constant(np.asarray(grid.scale).squeeze(), np.float32)
        zero = self._graph.constant(np.asarray(grid.zero).squeeze() + code_offset(grid.bits), np.uint8)
        self._graph.node('DequantizeLinear', self._program.output, scale, zero, output='logits', axis=-1)

    # ---------------------------------------------------------------- small parts

    def _long(self, value: Any) -> str:
        return self._graph.constant(value, np.int64)

    def _op(self, kind: str, x: str, value: Any, dtype: Any = np.int64, output: str | None = None) -> str:
        return self._graph.node(kind, x, self._graph.constant(value, dtype), output=output)

    def _stored(self, steps: str, zero: Any, bits: int, output: str) -> None:
        """Saturated steps as codes."""
        limit, offset = 2 ** (bits - 1), code_offset(bits)
        codes = self._op('Add', steps, np.asarray(zero, np.int64) + offset)
        if (grid := self._program.grids[output]).far:
            codes = encoded(self._graph, codes, grid, lambda place: self._long(place + offset))
        low, high = self._long(offset - limit), self._long(offset + limit - 1)
        self._graph.cast(self._graph.node('Clip', codes, low, high), _dtype(bits), output)

    def _codes(self, name: str) -> str:
        """Codes as int64; what is far out lies beyond theirs."""
        codes, grid = self._graph.cast(name, np.int64), self._program.grids[name]
        if not grid.far:
            return codes
        return decoded(self._graph, codes, grid, lambda place: self._long(place + code_offset(grid.bits)))

    def _sum(self, x: str, dims: list[int], keep: bool) -> str:
        return self._graph.node('ReduceSum', x, self._long(dims), keepdims=int(keep))

    def _layout(self, op: Op, values: dict[str, np.ndarray]) -> None:
        filler = op.settings.get('value', 0) + 128
        if 'tokens' in values:
            filler = values['tokens'].astype(np.int64) + 128
        x = op.inputs[0]
        add_layout(self._graph, op, x, self._shapes[x], op.output, filler, np.uint8)

    # ---------------------------------------------------------------- kernels, named as in integer/kernels.py

    def _quantize(self, op: Op, *, scale: np.ndarray, zero: int, bits: int) -> None:
        steps = self._graph.node('Round', self._op('Div', op.inputs[0], scale, np.float32))
        limit = 2 ** (bits - 1)
        bounds = (self._graph.constant(v - zero, np.float32) for v in (-limit, limit - 1))
        clipped = self._graph.node('Clip', steps, *bounds)
        self._graph.cast(self._op('Add', clipped, zero + 128, np.float32), np.uint8, op.output)

    def _constant(self, op: Op, *, value: np.ndarray) -> None:
        self._graph.constant(value.astype(np.int64) + 128, np.uint8, op.output)

    def _linear(self, op: Op, *, weight: np.ndarray, zero: int) -> None:
        unsigned = self._graph.constant(weight.T.astype(np.int64) + 128, np.uint8)
        self._matmul_integer(op.inputs[0], unsigned, zero, 0, op.output)

    def _matmul(self, op: Op, *, zero_a: int, zero_b: int) -> None:
        a, b = op.inputs
        self._matmul_integer(a, b, zero_a, zero_b, op.output)

    def _matmul_integer(self, a: str, b: str, zero_a: int, zero_b: int, output: str | None = None) -> str:
        zeros = (self._graph.constant(z + 128, np.uint8) for z in (zero_a, zero_b))
        return self._graph.node('MatMulInteger', a, b, *zeros, output=output)

    def _affine(
        self, op: Op, *, gain: Any, offset: Any, zero: Any, shift: int, offset_shift: int, bits: int, **far: Any
    ) -> None:
        product = self._op('Mul', self._graph.cast(op.inputs[0], np.int64), gain)
        steps = rounded(self._graph, product, shift, offset.astype(np.int64) << offset_shift)
        self._stored(steps, zero, bits, op.output)

    def _add(
        self,
        op: Op,
        *,
        gain_a: Any,
        gain_b: Any,
        zero_a: Any,
        zero_b: Any,
        zero: Any,
        shift: int,
        bits: int,
        **far: Any,
    ) -> None:
        gains = zip(op.inputs, (gain_a, gain_b), strict=True)
        parts = [self._op('Mul', self._codes(x), gain) for x, gain in gains]
        term = -sum((z.astype(np.int64) + 128) * g.astype(np.int64) for z, g in ((zero_a, gain_a), (zero_b, gain_b)))
        self._stored(rounded(self._graph, self._graph.node('Add', *parts), shift, term), zero, bits, op.output)

    def _lookup(self, op: Op, *, table: np.ndarray) -> None:
        x, bits = op.inputs[0], self._program.grids[op.inputs[0]].bits
        index = self._graph.cast(x, np.int32) if bits <= 8 else x
        if len(table) // 2 != code_offset(bits):
            index = self._op('Sub', index, code_offset(bits) - len(table) // 2, np.int32)
        codes = self._graph.constant(table.astype(np.int64) + 128, np.uint8)
        self._graph.node('Gather', codes, index, output=op.output)

    def _mean_sums(self, op: Op, *, zero: int, dims: list[int]) -> None:
        count = int(np.prod([self._shapes[op.inputs[0]][d] for d in dims]))
        sums = self._sum(self._graph.cast(op.inputs[0], np.int32), dims, keep=False)
        self._op('Sub', sums, (zero + 128) * count, np.int32, op.output)

    def _layernorm(
        self,
        op: Op,
        *,
        zero: Any,
        factors: Any,
        gain: Any,
        offset: Any,
        shifts: Any,
        out_zero: Any,
        guard: int,
        root_bits: int,
        bits: int,
        **far: Any,
    ) -> None:
        channels = self._shapes[op.inputs[0]][-1]
        centred = self._op('Sub', self._codes(op.inputs[0]), zero.astype(np.int64) + 128)
        u = self._op('Mul', centred, np.int64(1) << factors.astype(np.int64))
        total = self._sum(u, [-1], keep=True)
        squares = self._op('Mul', self._sum(self._graph.node('Mul', u, u), [-1], keep=True), channels)
        variance = self._op('Add', self._graph.node('Sub', squares, self._graph.node('Mul', total, total)), guard)
        root = floor_root(self._graph, variance, root_bits)
        reciprocal = self._graph.node('Div', self._long(1 << (45 + root_bits)), root)  # both positive: a floor
        deviation = self._graph.node('Sub', self._op('Mul', u, channels), total)
        x_hat = rounded(self._graph, self._graph.node('Mul', deviation, reciprocal), 29)
        steps = rounded(self._graph, self._op('Mul', x_hat, gain), shifts, offset)
        self._stored(steps, out_zero, bits, op.output)

    def _attend(
        self, op: Op, *, exponents: Any, zero: int, gain: int, shift: int, out_zero: int, bits: int, mask: Any = None
    ) -> None:
        logits, value = op.inputs
        distance = self._distance(logits, len(exponents), mask)
        # one entry more: what a mask forbids
        powers = np.where(exponents >= 0, np.int64(1) << np.maximum(exponents, 0).astype(np.int64), 0)
        powers = np.append(powers, 0)
        total = self._sum(self._graph.node('Gather', self._long(powers), distance), [-1], keep=True)
        low, high = (
            self._graph.node('Gather', self._graph.constant(table, np.uint8), distance)
            for table in (powers & 255, powers >> 8)
        )
        parts = [
            self._graph.cast(self._matmul_integer(p, value, -128, zero), np.int64) for p in (low, high)
        ]  # (p - 0) (value - zero)
        sums = self._graph.node('Add', parts[0], self._op('Mul', parts[1], 256))
        reciprocal = self._graph.node('Div', self._long(1 << RECIPROCAL_BITS), total)
        mean = rounded(self._graph, self._graph.node('Mul', sums, reciprocal), RECIPROCAL_BITS - MEAN_BITS)
        steps = rounded(self._graph, self._op('Mul', mean, gain), shift + MEAN_BITS)
        self._stored(steps, out_zero, bits, op.output)

    def _distance(self, logits: str, length: int, mask: Any) -> str:
        """Distances from the row's maximum, int32; ``length`` where ``mask`` forbids."""
        x = self._graph.cast(logits, np.int32)
        if mask is None:
            return self._graph.node('Sub', self._graph.node('ReduceMax', x, axes=[-1], keepdims=1), x)
        _, heads, rows, columns = self._shapes[logits]
        x = self._graph.shape(x, [-1, len(mask), heads, rows, columns])
        x = self._op('Sub', x, mask[:, None].astype(np.int64) * _FORBIDDEN, np.int32)
        distance = self._graph.node('Sub', self._graph.node('ReduceMax', x, axes=[-1], keepdims=1), x)
        distance = self._op('Min', distance, length, np.int32)
        return self._graph.shape(distance, [-1, heads, rows, columns])


def rounded(graph: Graph, x: str, shift: Any, term: Any = 0) -> str:
    """``(x + term + 2**(shift - 1)) >> shift`` of int64, |x + term| < 2**61: halves are rounded up."""
    shift = np.asarray(shift, np.int64)
    half = np.int64(1) << (shift - 1)
    lifted = graph.node('Add', x, graph.constant(np.asarray(term, np.int64) + half + _LIFT, np.int64))
    amount = graph.constant(shift, np.uint64)
    shifted = graph.node('BitShift', graph.cast(lifted, np.uint64), amount, direction='RIGHT')
    return graph.node('Sub', graph.cast(shifted, np.int64), graph.constant(np.int64(_LIFT) >> shift, np.int64))


def floor_root(graph: Graph, variance: str, root_bits: int) -> str:
    """``max(1, floor(sqrt(variance * 4**root_bits)))`` of non-negative int64, by the root of float64.

    Radicands are at most 2**52: exact in 53 bits. Their rounded root has the right floor, because the root of
    ``k**2 - 1`` lies ``2**-27`` or more below ``k <= 2**26``, where float64's steps are no larger than that.
    """
    factor = graph.constant(1 << abs(2 * root_bits), np.int64)
    radicand = graph.node('Mul' if root_bits >= 0 else 'Div', variance, factor)
    radicand = graph.node('Min', radicand, graph.constant(1 << 52, np.int64))
    root = graph.cast(graph.node('Sqrt', graph.cast(radicand, np.float64)), np.int64)
    return graph.node('Max', root, graph.constant(1, np.int64))


def _dtype(bits: int) -> Any:
    return np.uint8 if bits <= 8 else np.int32
