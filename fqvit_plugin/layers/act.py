"""QAct, a tensor's quantizer as a layer, and QActOf, a function with the quantizer of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import is_compiling
from ..escape import far_of
from ..exact import Exact, reals
from ..functional import align
from ..fused import Finish, ToEscape, ToGrid, ToTable
from ..intmath import by_slices
from ..phase import Phase, QuantLayer
from ..quantizers import UniformQuantizer, build_quantizer
from ..scheme import QuantSpec
from ..tables import function_table
from .common import ACT_SPEC, parse_spec, register, versions

__all__ = ['QAct', 'QActOf']


@register
class QAct(QuantLayer):
    """A tensor's quantizer as a layer: the identity in float, the nearest grid point under quant.

    Args:
        spec: recipe of the tensor.
        channels: length of ``spec.axis``, when it keeps its own scales.
        inplace: write over the input under quant; for tensors that nobody else reads.
    """

    def __init__(
        self,
        spec: QuantSpec | Mapping[str, Any] = ACT_SPEC,
        channels: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.inplace = inplace
        self.quantizer: Any = build_quantizer(parse_spec(spec), channels)
        self._constants: tuple[tuple[Any, ...], Any] = ((), None)
        self.tuned: Any = None  #: the logarithm of the scale while it is tuned

    @property
    def scale(self) -> Tensor:
        """The scale in force."""
        return self.quantizer.scale

    @property
    def is_exact(self) -> bool:
        """Whether its codes are whole numbers that products and sums can be made of without rounding."""
        spec = self.quantizer.spec
        uniform = isinstance(self.quantizer, UniformQuantizer) and spec.axis in (None, -1)
        return self.phase is Phase.QUANT and uniform and spec.arithmetic == 'strict' and spec.bit_type.bits <= 8

    def to_grid(self, channels: int) -> Finish:
        """What lays whole steps of (…, channels) on its grid, or on its levels."""
        if (far := far_of(self.quantizer)) is not None:
            return ToEscape.of(self._evenly(channels, self.scale), far)
        levels = getattr(self.quantizer, 'levels', None)
        if levels is None or not len(levels):
            return self._evenly(channels, self.scale)
        spec, zero_point = self.quantizer.spec.bit_type, self.quantizer.zero_point
        table = (self.quantizer.nearest() - zero_point).float() * self.scale
        return ToTable(table, spec.qmin - int(zero_point))

    def to_steps(self, channels: int) -> ToGrid:
        """What saturates whole steps of (…, channels) and leaves them steps; for layers without levels."""
        return self._evenly(channels, torch.ones_like(self.scale))

    def _evenly(self, channels: int, scale: Tensor) -> ToGrid:
        spec, zero_point = self.quantizer.spec.bit_type, self.quantizer.zero_point
        return ToGrid.of(spec.qmin - zero_point, spec.qmax - zero_point, scale, channels)

    def laid(self, x: Exact) -> Tensor:
        """``x`` on its grid, by the integer rules."""
        return x.laid(*self.constants(lambda: (x.rule(self.scale), self.to_grid(x.channels)), x.channels, *x.sources))

    def constants(self, make: Callable[[], Any], channels: int, *sources: Tensor, use: str = 'grid') -> Any:
        """What ``make`` gives, kept until the use, the grid, the sources or the number of channels change."""
        if is_compiling():
            return make()
        key = (use, channels, *versions(*self.quantizer.buffers(), *sources))
        if self._constants[0] != key:
            self._constants = (key, make())
        return self._constants[1]

    def soft(self, x: Tensor, quantizer: Any) -> Tensor:
        """``x`` on the grid, with gradients for ``x`` and for a scale that is tuned."""
        if not isinstance(quantizer, UniformQuantizer):
            return super().soft(x, quantizer)
        spec, axis = quantizer.spec.bit_type, quantizer.spec.axis
        scale = quantizer.scale if self.tuned is None else self.tuned.exp()
        scale, zero_point = align(scale, x, axis), align(quantizer.zero_point, x, axis)
        steps = x / scale
        inside = steps.clamp(spec.qmin - zero_point, spec.qmax - zero_point)
        fixed = self.tuned is None
        whole = quantizer.steps(x.detach()) if fixed else quantizer.saturated_(inside.detach().round())
        return (inside + (whole - inside).detach()) * scale

    def forward(self, x: Tensor | Exact) -> Tensor:
        """Same shape out as in."""
        if isinstance(x, Exact):
            if self.is_exact:
                return self.laid(x)
            x = x.value()
        return self.quantized(x, self.quantizer, self.inplace)


class QActOf(QAct):
    """A function of one value and the quantizer of its result, as one layer.

    Under strict quant it is a table over a 16-bit grid, as integer arithmetic has it; see :mod:`fqvit_plugin.tables`.

    Args:
        function: GELU, for instance; it belongs to somebody else.
    """

    table: Tensor | None
    table_step: Any

    def __init__(self, function: nn.Module, spec: QuantSpec | Mapping[str, Any] = ACT_SPEC) -> None:
        super().__init__(spec, inplace=True)
        self._function = (function,)  # in a tuple: no submodule, it keeps its place in the float model
        self.register_buffer('table', None, persistent=False)  #: codes in force, as reals
        self.register_buffer('table_step', None, persistent=False)
        self.table_zero = 0
        self._frozen_at: tuple[int, ...] = ()

    @property
    def function(self) -> nn.Module:
        """What is quantized by this layer."""
        return self._function[0]

    def freeze(self) -> None:
        """Make the table."""
        self.thaw()
        spec = self.quantizer.spec
        if spec.arithmetic == 'strict' and isinstance(self.quantizer, UniformQuantizer) and spec.axis is None:
            with suppress(ValueError):  # a function that has no table; the integer model refuses it
                step, self.table_zero, codes = function_table(self.function, self.quantizer)
                self.table = (codes - self.quantizer.zero_point).float() * self.scale
                self.table_step = torch.tensor(step, device=self.scale.device)
        self._frozen_at = versions(*self._quantizer_buffers())

    def thaw(self) -> None:
        """Forget it."""
        self.table, self.table_step = None, None
        self._frozen_at = ()

    def _quantizer_buffers(self) -> tuple[Tensor, ...]:
        return tuple(self.quantizer.buffers())

    def forward(self, x: Tensor | Exact) -> Tensor:
        """Same shape out as in; may overwrite ``x`` under quant."""
        quant = self.phase is Phase.QUANT
        if quant and not is_compiling() and self._frozen_at != versions(*self._quantizer_buffers()):
            self.freeze()
        if not quant or self.table is None:
            return self.quantized(self.function(reals(x)), self.quantizer, self.inplace)
        read = ToTable(self.table, -(len(self.table) // 2) - self.table_zero)
        if isinstance(x, Exact):
            return x.laid(self.constants(lambda: x.rule(self.table_step), x.channels, *x.sources, use='table'), read)
        return by_slices(lambda rows: read.finish(torch.div(rows, self.table_step).round_()), x.float())
