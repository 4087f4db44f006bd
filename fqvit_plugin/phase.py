"""The phase of a quantized model, and what every layer that has one shares."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ._torch import is_autocast_enabled
from .quantizers import Quantizer

__all__ = ['Phase', 'QuantLayer', 'full_precision']


class Phase(enum.Enum):
    """What the quantizers do in a forward pass; one per model, changed by :mod:`fqvit_plugin.lifecycle`."""

    FLOAT = 'float'  #: nothing is quantized or observed
    CALIBRATE = 'calibrate'  #: observe; the pass stays float
    LAST_CALIBRATE = 'last calibrate'  #: observe and take parameters; the pass stays float
    QUANT = 'quant'  #: quantize
    TUNE = 'tune'  #: quantize so that gradients pass, while rounding is tuned


def full_precision(*operands: Tensor) -> AbstractContextManager:
    """Autocast off where all operands are float32: points of an 8-bit grid do not survive in half precision."""
    device = operands[0].device.type
    if is_autocast_enabled(device) and all(x.dtype is torch.float32 for x in operands):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class QuantLayer(nn.Module):
    """A layer that acts by its phase: the base of the five Q layers."""

    phase = Phase.FLOAT

    def quantized(self, x: Tensor, quantizer: Quantizer, inplace: bool = False) -> Tensor:
        """``x`` as this phase wants it: untouched, observed by ``quantizer``, or on its grid."""
        if self.phase is Phase.FLOAT:
            return x
        if self.phase is Phase.QUANT:
            return quantizer(x, inplace)
        if self.phase is Phase.TUNE:
            return self.soft(x, quantizer)
        quantizer.observe(x)
        if self.phase is Phase.LAST_CALIBRATE:
            quantizer.take_qparams(x)
        return x

    def soft(self, x: Tensor, quantizer: Quantizer) -> Tensor:
        """``x`` on the grid, with the gradient of ``x`` itself (straight-through)."""
        return x + (quantizer(x.detach()) - x).detach()

    def freeze(self) -> None:
        """Prepare what stays constant under quant; called when that phase is entered."""

    def thaw(self) -> None:
        """Give up what :meth:`freeze` prepared."""

    def quantizers(self) -> Iterator[Quantizer]:
        """The quantizers this layer owns itself."""
        return (child for child in self.children() if isinstance(child, Quantizer))
