"""A program as a float graph between QuantizeLinear and DequantizeLinear: what engines turn into their own kernels.

Every number comes from the program's integers: a layer's weight scales are its gains, its bias its offset. Two units
occur. A *reading* of codes is what DequantizeLinear gives, one scale and no factors::

    y = (stored - zero) * step          uint8 codes
    y = stored * step                   int8 codes of zero point 0 (``symmetric``)

and the real value is ``x = (y - lift) * factors``, with the channels' scales over the smallest (PTF's powers of two,
for instance) and ``lift`` for what their zero points are above ``zero``, which is the first channel's, or 0 for
symmetric codes. So every quantizer has one scale and one zero point for the whole tensor, and no code is another than
the program's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..integer.program import Op, Program
from .escapes import decoded, encoded
from .functions import function_of, write_function
from .graph import Graph
from .layouts import LAYOUTS, add_layout
from .linear import LinearWriter
from .softmax import write_log_int_softmax
from .targets import Target

__all__ = ['PlainGrid', 'QdqWriter']


class PlainGrid(NamedTuple):
    """The grid of a tensor of codes, in the terms above; ``factors`` is None where all are 1."""

    step: float
    zero: int
    lift: Any  #: a number, or one for each channel
    factors: np.ndarray | None
    bits: int


class QdqWriter:
    """Writes the operations of ``program`` into ``graph``; a method for each kernel.

    Args:
        shapes: of every tensor, for one image.
        unsigned_weights: store weights as uint8 with zero point 128.
    """

    def __init__(
        self,
        graph: Graph,
        program: Program,
        shapes: dict[str, tuple[int, ...]],
        target: Target,
        unsigned_weights: bool,
    ) -> None:
        self.graph, self.program, self.shapes, self.target = graph, program, shapes, target
        self._makers = {op.output: op for op in self.program.ops}
        self._codes: dict[str, str] = {}  # tensor -> its codes in the graph
        self._readings: dict[str, str] = {}  # as DequantizeLinear gives them
        self._decoded: dict[str, str] = {}  # those with escapes
        self._reals: dict[str, str] = {}  # tensors that are never quantized: what a table reads
        self._linear = LinearWriter(self, unsigned_weights)

    def write(self) -> None:
        """Everything, from ``image`` to ``logits``."""
        for op in self.program.ops:
            if op.kind in LAYOUTS:
                self._layout(op)
            elif op.kind not in ('linear', 'matmul', 'mean_sums'):  # part of the affine that reads them
                getattr(self, f'_{op.kind}')(op, **self.values(op), **op.settings)
        self._real(self.program.output, 'logits')

    # ---------------------------------------------------------------- grids and quantizers

    def values(self, op: Op) -> dict[str, np.ndarray]:
        """The constants of ``op`` by keyword."""
        return {k: self.program.constants[name].numpy(force=True) for k, name in op.constants.items()}

    def grid(self, name: str) -> PlainGrid:
        """The grid of a tensor of codes."""
        scale, zeros, bits = (getattr(self.program.grids[name], field) for field in ('scale', 'zero', 'bits'))
        zero = 0 if self.target.symmetric else zeros[0]
        lift = (np.asarray(zeros) - zero) * min(scale)
        factors = np.asarray(scale) / min(scale)
        varied = len(set(zeros)) > 1
        return PlainGrid(min(scale), zero, lift if varied else lift[0], factors if factors.max() > 1 else None, bits)

    def lift(self, name: str) -> Any:
        """Reading of the real zero."""
        return self.grid(name).lift

    def scalar(self, value: Any) -> str:
        """A float32 constant."""
        return self.graph.constant(value, np.float32)

    def op(self, kind: str, x: str, value: Any) -> str:
        """``x`` by a float constant."""
        return self.graph.node(kind, x, self.scalar(value))

    def times(self, x: str, factor: Any) -> str:
        """``x * factor``, left out where the factor is 1 but for the rounding of a gain."""
        factor = np.asarray(factor, np.float64)
        return x if np.all(np.abs(factor - 1) < 2.0**-20) else self.op('Mul', x, factor)

    def plus(self, x: str, term: Any) -> str:
        """``x + term``, left out where that is 0."""
        return self.op('Add', x, term) if np.any(np.asarray(term)) else x

    def zero_point(self, grid: PlainGrid) -> str:
        """The operand of QuantizeLinear."""
        if self.target.symmetric:
            return self.graph.constant(0, np.int8)
        return self.graph.constant(grid.zero + 128, np.uint8)

    def quantized(self, y: str, name: str, scale: float | None = None, output: str | None = None) -> str:
        """Codes of ``y``, in the unit of a reading of ``name`` or, with ``scale``, in another."""
        grid = self.grid(name)
        scale = grid.step if scale is None else scale
        if grid.bits < 8:
            limit = 2 ** (grid.bits - 1)
            bounds = (self.scalar((stored - grid.zero) * scale) for stored in (-limit, limit - 1))
            y = self.graph.node('Clip', y, *bounds)
        if (channels := self.program.grids[name]).far:
            y = encoded(self.graph, y, channels, lambda place: self.scalar((place - grid.zero) * scale), 0.5)
        return self.graph.node('QuantizeLinear', y, self.scalar(scale), self.zero_point(grid), output=output)

    def quantize(self, y: str, name: str, scale: float | None = None, shape: list[int] | None = None) -> None:
        """Make these the codes of ``name``; ``shape`` is what they are reshaped to."""
        codes = self.quantized(y, name, scale, None if shape else name)
        self.hold(name, self.graph.shape(codes, shape, name) if shape else codes)

    def hold(self, name: str, codes: str) -> None:
        """Let ``codes`` be those of ``name``."""
        self._codes[name] = codes

    def dequantize(self, codes: str, name: str, scale: float | None = None, output: str | None = None) -> str:
        """A reading of ``codes``, which lie on the grid of ``name``."""
        grid = self.grid(name)
        scale = grid.step if scale is None else scale
        return self.graph.node('DequantizeLinear', codes, self.scalar(scale), self.zero_point(grid), output=output)

    def codes(self, name: str) -> str:
        """The codes of ``name``."""
        return self._codes[name]

    def reading(self, name: str) -> str:
        """The reading of ``name``, beyond those of codes where an escape stands for it."""
        reading, channels = self._plain_reading(name), self.program.grids[name]
        if not channels.far:
            return reading
        if name not in self._decoded:
            self._decoded[name] = decoded(
                self.graph, reading, channels, lambda stored: self.scalar(self._read(stored, name)), 0.5
            )
        return self._decoded[name]

    def _plain_reading(self, name: str) -> str:
        if name not in self._readings:
            self._readings[name] = self.dequantize(self._codes[name], name, output=f'{name}.y')
        return self._readings[name]

    def _real(self, name: str, output: str | None = None) -> str:
        grid = self.grid(name)
        x = self.plus(self.reading(name), -self.lift(name))
        x = x if grid.factors is None else self.op('Mul', x, grid.factors)
        return x if output is None else self.graph.node('Identity', x, output=output)

    # ---------------------------------------------------------------- kernels, named as in integer/kernels.py

    def _quantize(self, op: Op, *, scale: Any, zero: int, bits: int) -> None:
        self.quantize(self.plus(op.inputs[0], self.lift(op.output)), op.output)

    def _constant(self, op: Op, *, value: np.ndarray) -> None:
        self._readings[op.output] = self.scalar(self._read(value, op.output))

    def _read(self, stored: Any, name: str) -> np.ndarray:
        grid = self.grid(name)
        return (np.asarray(stored, np.float64) - grid.zero) * grid.step

    def _layout(self, op: Op) -> None:
        source = op.inputs[0]
        stored: Any = self.values(op).get('tokens', op.settings.get('value', 0))
        if self.target.layout_on_codes and source in self._codes:
            filler = np.asarray(stored, np.int64) + 128
            self._codes[op.output] = add_layout(
                self.graph, op, self._codes[source], self.shapes[source], op.output, filler, np.uint8
            )
        else:
            filler, output = self._read(stored, op.output), f'{op.output}.y'
            self._readings[op.output] = add_layout(
                self.graph, op, self._plain_reading(source), self.shapes[source], output, filler, np.float32
            )

    def _affine(
        self, op: Op, *, gain: Any, offset: Any, shift: int, offset_shift: int, bits: int, **unused: Any
    ) -> None:
        maker = self._makers[op.inputs[0]]
        ratio = gain / 2.0**shift  # accumulators to steps
        term = offset * 2.0 ** (offset_shift - shift)
        if maker.kind == 'linear':
            y = self._linear.write(maker, op.output, ratio, term)
            if y is not None:
                self._reals[op.output] = y
        elif maker.kind == 'matmul':
            self._scores(maker, op.output, float(ratio))
        else:
            source = maker.inputs[0]
            step, count = self.grid(op.output).step, self._count(maker)
            mean = self.graph.node('ReduceMean', self.reading(source), axes=list(maker.settings['dims']), keepdims=0)
            mean = self.times(mean, ratio * count * step / self.grid(source).step)
            constant = self.lift(op.output) - self.lift(source) * float(ratio) * count * step / self.grid(source).step
            self.quantize(self.plus(mean, constant + term * step), op.output)

    def _count(self, op: Op) -> int:
        return int(np.prod([self.shapes[op.inputs[0]][d] for d in op.settings['dims']]))

    def _scores(self, op: Op, name: str, ratio: float) -> None:
        """A product of two activations: its factor goes into the quantizer's scale."""
        a, b = (self.plus(self.reading(x), -self.lift(x)) for x in op.inputs)
        unit = self.grid(op.inputs[0]).step * self.grid(op.inputs[1]).step
        scale = unit / ratio
        product = self.plus(self.graph.node('MatMul', a, b), self.lift(name) / self.grid(name).step * scale)
        self.quantize(product, name, scale)

    def _add(self, op: Op, *, gain_a: Any, gain_b: Any, zero: Any, shift: int, **unused: Any) -> None:
        step, parts, constant = self.grid(op.output).step, [], np.asarray(self.lift(op.output))
        for name, gain in zip(op.inputs, (gain_a, gain_b), strict=True):
            factor = gain / 2.0**shift * step / self.grid(name).step
            parts.append(self.times(self.reading(name), factor))
            constant = constant - self.lift(name) * factor
        self.quantize(self.plus(self.graph.node('Add', *parts), constant), op.output)

    def _lookup(self, op: Op, *, table: np.ndarray) -> None:
        source, grids = op.inputs[0], self.program.grids
        x = self._reals[source] if source in self._reals else self._real(source)
        function = function_of(self.program.constants[op.constants['table']].cpu(), grids[source], grids[op.output])
        y = self.plus(write_function(self.graph, function, x), self.lift(op.output))
        shape = (
            [-1, *self.shapes[op.output][1:]] if source in self._reals and self._linear.flattens(op.output) else None
        )
        self.quantize(y, op.output, shape=shape)

    def _layernorm(
        self, op: Op, *, gain: Any, offset: Any, shifts: Any, guard: int, bits: int, **unused: Any
    ) -> None:
        source, grid, channels = self.grid(op.inputs[0]), self.grid(op.output), len(gain)
        gamma = gain / 2.0 ** (shifts.astype(np.int64) - 16) * grid.step
        beta = offset / 2.0 ** shifts.astype(np.int64) * grid.step + self.lift(op.output)
        epsilon = guard * (source.step / channels) ** 2
        x = self._real(op.inputs[0])
        scale, bias = self.scalar(gamma), self.scalar(beta)
        y = self.graph.node('LayerNormalization', x, scale, bias, axis=-1, epsilon=float(epsilon))
        self.quantize(y, op.output)

    def _attend(
        self, op: Op, *, exponents: Any, gain: int, shift: int, bits: int, mask: Any = None, **unused: Any
    ) -> None:
        logits, value = op.inputs
        steps = self.dequantize(self._codes[logits], logits, scale=1.0)
        weights = write_log_int_softmax(
            self.graph, steps, self.shapes[logits], exponents, self.grid(logits).step, mask
        )
        total = self.graph.node('ReduceSum', weights, self.graph.constant([-1], np.int64), keepdims=1)
        factor = gain / 2.0**shift * self.grid(op.output).step / self.grid(value).step
        sums = self.graph.node('MatMul', weights, self.reading(value))
        mean = self.times(self.graph.node('Div', sums, total), factor)
        # weights sum to 1, so the mean's lift is the value's
        self.quantize(self.plus(mean, self.lift(op.output) - self.lift(value) * factor), op.output)
