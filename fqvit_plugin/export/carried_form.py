"""A program in float32 that carries its integers: for engines whose integers have 32 bits, as OpenVINO's.

Codes lie between QuantizeLinear and DequantizeLinear of scale 1, so products of codes are the engine's int8 products
and their sums whole numbers below 2**24, where float32 is exact. What follows them multiplies by gains of 24 bits,
more than fit beside a sum of 20. Every such product is cut in two: a coarse part whose products and sums are exact,
and a fine one that is less than a step or few, so that its rounding is far below float32's rounding of the whole.
Only a value that lies within 1e-7 or so of a tie may then be rounded to the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dyadic import MEAN_BITS, RECIPROCAL_BITS
from ..integer.program import Op
from ..intmath import LARGEST_EXPONENT
from .carried_norm import write_norm
from .escapes import escapes_of
from .graph import Graph
from .layouts import LAYOUTS
from .pairs import quotient, split, times
from .qdq_form import PlainGrid, QdqWriter
from .softmax import write_log_int_softmax

__all__ = ['CarriedWriter', 'write_rounded']

#: Bits of float32's significand.
_BITS = 24


def write_rounded(graph: Graph, parts: Sequence[tuple[str, Any]], term: Any, reach: Any) -> str:
    """``floor(sum(x r) + term + 1/2)`` of whole numbers ``x`` and constants ``r``, as a float.

    Args:
        parts: of ``x``, float32 by name, and ``r``, () or (C,).
        term: () or (C,).
        reach: () or (C,), the largest ``abs(sum(x r))`` that counts, and its parts'; beyond it, results saturate.
    """
    term = np.asarray(term, np.float64) + 0.5
    unit = 2.0 ** (np.ceil(np.log2(reach + np.abs(term).max())) - _BITS)
    ratios = [np.asarray(r, np.float64) for _, r in parts]
    coarse = [np.round(r / unit) * unit for r in ratios]
    coarse_term = np.round(term / unit) * unit
    exact = _total(graph, [(x, c) for (x, _), c in zip(parts, coarse, strict=True)], coarse_term)
    rest = [(x, r - c) for (x, _), r, c in zip(parts, ratios, coarse, strict=True)]
    fine = _total(graph, rest, term - coarse_term)
    if exact is None or fine is None:
        return graph.node('Floor', exact or fine or graph.constant(term, np.float32))
    whole = graph.node('Round', exact)
    # a tie is where the two cancel: their sum is exact there
    left = graph.node('Add', graph.node('Sub', exact, whole), fine)
    return graph.node('Add', whole, graph.node('Floor', left))


def _total(graph: Graph, parts: Sequence[tuple[str, np.ndarray]], term: np.ndarray) -> str | None:
    total = None
    for x, r in parts:
        if np.any(r):
            product = graph.node('Mul', x, graph.constant(r, np.float32))
            total = product if total is None else graph.node('Add', total, product)
    if total is None or not np.any(term):
        return total
    return graph.node('Add', total, graph.constant(term, np.float32))


class CarriedWriter(QdqWriter):
    """:class:`QdqWriter` with steps of 1: a reading of codes is a whole number, ``stored - zero``."""

    def grid(self, name: str) -> PlainGrid:
        """The grid in whole numbers: ``lift`` is what the channels' zero points are above ``zero``."""
        zeros = self.program.grids[name].zero
        zero = 0 if self.target.symmetric else zeros[0]
        lift = np.asarray(zeros) - zero
        return PlainGrid(1.0, zero, lift if len(set(zeros)) > 1 else lift[0], None, self.program.grids[name].bits)

    def _whole(self, name: str) -> str:
        return self.plus(self.reading(name), -self.lift(name))

    def _real(self, name: str, output: str | None = None) -> str:
        scale = np.asarray(self.program.grids[name].scale)
        x = self.op('Mul', self._whole(name), scale if len(scale) > 1 else scale[0])
        return x if output is None else self.graph.node('Identity', x, output=output)

    # ---------------------------------------------------------------- kernels

    def _quantize(self, op: Op, *, scale: Any, zero: int, bits: int) -> None:
        # engines multiply by a constant's reciprocal, and images of 8 bits lie where that decides halves
        ratio = quotient(self.graph, op.inputs[0], float(np.float32(scale)))
        self.quantize(self.graph.node('Round', ratio), op.output)

    def _most(self, name: str, steps: float) -> Any:
        """What no whole steps of ``name`` pass: ``steps``, or what channels hold farther out."""
        far = self.program.grids[name].far
        return np.maximum(steps, np.abs(far)) if far else steps

    def _reach(self, name: str, steps: float) -> Any:
        """Up to where results tell codes of ``name`` apart: ``steps``, or in some channels where escapes begin."""
        grid = self.program.grids[name]
        if not grid.far:
            return steps
        borders = np.abs(escapes_of(grid).borders).max(0) + 2.0**8  # of codes; zero points are a code
        return np.where(np.asarray(grid.far) != 0, np.maximum(steps, borders), steps)

    def _kept(self, x: str) -> str:
        """Whole numbers as they are, by an operator that OpenVINO moves no quantization across."""
        return self.graph.node('Round', x)

    def _sums(self, op: Op) -> str:
        if op.kind == 'matmul':
            return self._product(*(self._whole(x) for x in op.inputs))
        if op.kind == 'mean_sums':
            # OpenVINO would sum codes in 8 bits, where they saturate
            x = self._kept(self._whole(op.inputs[0]))
            dims = self.graph.constant(list(op.settings['dims']), np.int64)
            return self.graph.node('ReduceSum', x, dims, keepdims=0)
        weight = self.graph.constant(self.values(op)['weight'].T, np.int8, f'{op.output}.weight')
        zero = self.graph.constant(0, np.int8)
        weight = self.graph.node('DequantizeLinear', weight, self.scalar(1), zero)
        return self._product(self._operand(op.inputs[0]), weight)

    def _operand(self, name: str) -> str:
        """Steps that a layer multiplies, quantized where OpenVINO looks for it.

        Through windows that are rolled or padded it follows no quantization, and would take steps of 9 bits for 8.
        """
        maker = self._makers[name]
        while maker.kind in LAYOUTS and maker.kind not in ('roll', 'pad_map'):
            maker = self._makers[maker.inputs[0]]
        if maker.kind not in LAYOUTS:
            return self._whole(name)
        return self.dequantize(self.quantized(self.reading(name), name), name)

    def _product(self, a: str, b: str) -> str:
        # OpenVINO would take one of the factors behind a product of int8 into it, and be far off in the other
        return self._kept(self.graph.node('MatMul', a, b))

    def _affine(
        self, op: Op, *, gain: Any, offset: Any, shift: int, offset_shift: int, bits: int, **unused: Any
    ) -> None:
        sums = self._sums(self._makers[op.inputs[0]])
        ratio, term = gain / 2.0**shift, offset * 2.0 ** (offset_shift - shift) + self.lift(op.output)
        steps = write_rounded(self.graph, [(sums, ratio)], term, self._reach(op.output, 2.0**bits))
        if bits > 8:
            self._reals[op.output] = steps
        else:
            self.quantize(steps, op.output)

    def _add(self, op: Op, *, gain_a: Any, gain_b: Any, zero: Any, shift: int, **unused: Any) -> None:
        ratios = [np.asarray(gain) / 2.0**shift for gain in (gain_a, gain_b)]
        parts = [(self._whole(x), r) for x, r in zip(op.inputs, ratios, strict=True)]
        reach = sum(self._most(x, 2.0**8) * np.abs(r).max() for x, r in zip(op.inputs, ratios, strict=True))
        self.quantize(write_rounded(self.graph, parts, self.lift(op.output), reach), op.output)

    def _lookup(self, op: Op, *, table: np.ndarray) -> None:
        source, half = op.inputs[0], len(table) // 2
        grid = self.grid(source)
        x = self._reals[source] if source in self._reals else self.reading(source)
        index = self.plus(x, grid.zero + half)
        limit = 2 ** (grid.bits - 1)
        index = self.graph.node('Clip', index, self.scalar(half - limit), self.scalar(half + limit - 1))
        steps = self.graph.constant(table.astype(np.int64) - self.grid(op.output).zero, np.float32)
        self.quantize(self.graph.node('Gather', steps, self.graph.cast(index, np.int32)), op.output)

    def _layernorm(
        self, op: Op, *, gain: Any, offset: Any, shifts: Any, guard: int, bits: int, **others: Any
    ) -> None:
        powers = 2.0 ** others['factors'].astype(np.int64)
        x = self.times(self._whole(op.inputs[0]), powers)
        if np.broadcast_to(self._most(op.inputs[0], 255) * powers, gain.shape).sum() >= 2**_BITS:
            raise ValueError(f'{op.output}: sums of {len(gain)} channels pass 2**24, which float32 does not hold')
        x_hat = write_norm(self.graph, x, len(gain), guard, others['root_bits'])
        units = 2.0 ** shifts.astype(np.int64)
        term = offset / units + self.lift(op.output)
        self.quantize(write_rounded(self.graph, [(x_hat, gain / units)], term, 2.0**9), op.output)

    def _attend(
        self, op: Op, *, exponents: Any, gain: int, shift: int, bits: int, mask: Any = None, **unused: Any
    ) -> None:
        g, (logits, value) = self.graph, op.inputs
        scale = min(self.program.grids[logits].scale)
        powers = write_log_int_softmax(g, self.reading(logits), self.shapes[logits], exponents, scale, mask)
        powers = g.node('Round', self.op('Mul', powers, 2.0**LARGEST_EXPONENT))
        high = g.node('Floor', self.op('Mul', powers, 2.0**-8))
        low = g.node('Sub', powers, self.op('Mul', high, 2.0**8))
        x, last = self._whole(value), g.constant([-1], np.int64)
        sums = [g.node('MatMul', p, x) for p in (high, low)]
        totals = [g.node('ReduceSum', p, last, keepdims=1) for p in (high, low)]
        whole, part = _mean(g, sums, totals)
        ratio = gain / 2.0**shift
        parts = [(whole, ratio), (part, ratio * 2.0**-MEAN_BITS)]
        self.quantize(write_rounded(g, parts, self.lift(op.output), 2.0**8 * max(1.0, ratio)), op.output)


def _mean(g: Graph, sums: list[str], totals: list[str]) -> tuple[str, str]:
    """``sums / totals`` rounded to 16 fractional bits as the kernel does: a whole number, and units of the rest.

    Each is given as multiples of 256 and of 1.
    """

    def joined(high: str, low: str) -> str:
        return g.node('Add', g.node('Mul', high, g.constant(2.0**8, np.float32)), low)

    total, summed = joined(*totals), joined(*sums)
    whole = g.node('Round', g.node('Div', summed, total))
    left = joined(*(g.node('Sub', s, g.node('Mul', whole, t)) for s, t in zip(sums, totals, strict=True)))
    part = g.node('Div', left, g.node('Mul', total, g.constant(2.0**-MEAN_BITS, np.float32)))
    # the kernel's reciprocal is a floor, which takes off the mean what it takes off the reciprocal
    lost = g.node('Mul', _floored(g, total), g.constant(2.0 ** (MEAN_BITS - RECIPROCAL_BITS), np.float32))
    part = g.node('Sub', part, g.node('Mul', summed, lost))
    return whole, g.node('Floor', g.node('Add', part, g.constant(0.5, np.float32)))


def _floored(g: Graph, total: str) -> str:
    """What a floor takes off ``2**44 / total``."""
    reciprocal = g.node('Div', g.constant(2.0**RECIPROCAL_BITS, np.float32), total)
    products = times(g, split(g, reciprocal), split(g, total))
    error = g.constant(2.0**RECIPROCAL_BITS, np.float32)
    for product in products:
        error = g.node('Sub', error, product)
    fraction = g.node('Sub', reciprocal, g.node('Floor', reciprocal))
    fraction = g.node('Add', fraction, g.node('Div', error, total))
    return g.node('Sub', fraction, g.node('Floor', fraction))
