"""An escape: the outermost code of a channel that stands for a value far beyond the others.

Large vision transformers keep a few tokens in which one channel of the residual stream is a hundred times as far out
as in all others. A range that holds both has steps too coarse for the others; what those few tokens have there need
hardly be exact, as LayerNorm divides it by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import PULL, align
from .observers import EscapingObserver
from .quantizers import UniformQuantizer
from .registry import QUANTIZERS
from .scheme import QuantSpec

__all__ = ['EscapeQuantizer', 'escaped_steps', 'far_of', 'limits']


def limits(low: Tensor | int, high: Tensor | int, far: Tensor) -> tuple[Tensor, Tensor]:
    """The ends ``low`` and ``high`` of codes or steps without the one that ``far`` takes, below or above."""
    return low + (far < 0).to(far.dtype), high - (far > 0).to(far.dtype)


def escaped_steps(steps: Tensor, low: Tensor, high: Tensor, far: Tensor) -> Tensor:
    """Whole steps to those of a code: ``far`` from an eighth of the way there on, else the nearest of the others.

    Args:
        steps: (…, C).
        low, high: of the ordinary codes, see :func:`limits`.
        far: (C,) whole steps; 0 where a channel has none.
    """
    ordinary = torch.minimum(torch.maximum(steps, low), high)
    outside = torch.where(far < 0, steps < ordinary, steps > ordinary) & (far != 0)
    escapes = outside & ((steps - far).abs() <= PULL * (steps - ordinary).abs())
    return torch.where(escapes, far, ordinary)


def far_of(quantizer: object) -> Tensor | None:
    """``far`` of a quantizer, or None where no channel has an escape."""
    return quantizer.far if isinstance(quantizer, EscapeQuantizer) and len(quantizer.far) else None


@QUANTIZERS.register_module(name=['escape', 'EscapeQuantizer'])
class EscapeQuantizer(UniformQuantizer):
    """A grid for each channel of the last axis, where some have an escape.

    Which ones, the observer says (:class:`~fqvit_plugin.searching.PtfObserver`); one that says nothing gives none.

    Buffers, besides those of the grid:
        far: (C,) int32, whole steps that the lowest code of a channel stands for if negative, the highest one if
            positive, 0 for none; (0,) where no channel has any.

    Source: escape codes of entropy coding; Sun et al., Massive activations in large language models, COLM 2024, and
    Darcet et al., Vision transformers need registers, ICLR 2024 (the tokens).
    """

    far: Tensor

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        super().__init__(spec, channels)
        self.register_buffer('far', torch.zeros(0, dtype=torch.int32))
        self._ask()

    def _ask(self) -> None:
        if self.spec.axis != -1 or self.spec.bit_type.signed or self.observer.shared_zero_point:
            return  # a zero point that all channels share may be an end code
        if isinstance(self.observer, EscapingObserver):
            self.observer.escapes = True

    def commit(self) -> None:
        """Write what was taken into the buffers."""
        far = getattr(self.observer, 'far', None)
        super().commit()  # which forgets the observer
        self.far = far if far is not None and bool(far.any()) else self.far.new_zeros(0)

    def reset(self) -> None:
        """Start observing afresh."""
        super().reset()
        self._ask()

    def step_range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest whole steps of each channel."""
        low, high = super().step_range()
        return (torch.minimum(low, self.far), torch.maximum(high, self.far)) if len(self.far) else (low, high)

    def quantize(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, in floating point."""
        steps, kind = self.steps(x), self.spec.bit_type
        _, zero_point = self._aligned(x)
        return (steps + zero_point).clamp_(kind.qmin, kind.qmax)  # which makes the end code of what is far

    def steps(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Whole steps from zero, in floating point."""
        if far_of(self) is None:
            return super().steps(x, inplace)
        scale, _ = self._aligned(x)
        return self.saturated_(torch.round(x.float() / scale))

    def saturated_(self, x: Tensor) -> Tensor:
        """Whole steps, those without a code replaced by the nearest that has one."""
        if far_of(self) is None:
            return super().saturated_(x)
        far = align(self.far, x, self.spec.axis)
        low, high = (align(end, x, self.spec.axis) for end in limits(*super().step_range(), self.far))
        return escaped_steps(x, low.to(x), high.to(x), far.to(x))
