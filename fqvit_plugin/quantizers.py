"""Quantizers: the only objects that keep a tensor's scale and zero point, as buffers.

An unset scale is NaN, so a forgotten calibration is loud. To add a quantizer, subclass :class:`Quantizer`,
decorate it with ``@QUANTIZERS.register_module()``, and name it in a :class:`~fqvit_plugin.scheme.QuantSpec`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .functional import Arithmetic, align, log2_codes, log2_dequantize, quantize, saturate_, steps
from .registry import QUANTIZERS, lookup
from .scheme import QuantSpec

__all__ = ['Log2Quantizer', 'Quantizer', 'UniformQuantizer', 'build_quantizer']


class Quantizer(nn.Module, ABC):
    """Fake-quantizes one tensor: ``forward(x)`` is the nearest point of its integer grid, in float.

    ``forward(x, inplace=True)`` may write over ``x``.

    Args:
        spec: bits, observer, axis and arithmetic.
        channels: length of ``spec.axis``; ignored when the tensor has one scale.
    """

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.name = ''  # its path in the model, for messages; set when calibration opens

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take one batch into account."""

    @abstractmethod
    def take_qparams(self, x: Tensor) -> None:
        """Find the parameters with ``x`` as the last batch; they hold from :meth:`commit` on."""

    @abstractmethod
    def commit(self) -> None:
        """Make the parameters that were taken the ones in force."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was observed; parameters in force stay until :meth:`commit`."""

    @property
    @abstractmethod
    def is_taken(self) -> bool:
        """Whether parameters wait for :meth:`commit`."""

    @property
    @abstractmethod
    def is_calibrated(self) -> bool:
        """Whether parameters are in force."""

    @property
    def code_name(self) -> str:
        """What its codes are, for reports."""
        return self.spec.bit_type.name

    def extra_repr(self) -> str:
        """Bits, observer and axis, for ``print(model)``."""
        axis = '' if self.spec.axis is None else f', axis={self.spec.axis}'
        return f'{self.code_name}, {self.spec.observer}{axis}'


@QUANTIZERS.register_module(name=['uniform', 'UniformQuantizer'])
class UniformQuantizer(Quantizer):
    """Evenly spaced grid: ``x ~ (x_q - zero_point) * scale``.

    ``scale`` has shape () or (C,), ``zero_point`` (int32) the same, or () where the observer shares it.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        super().__init__(spec, channels)
        self.observer = spec.build_observer()
        if spec.axis is not None and channels is None:
            raise ValueError(f'a scale per channel (axis={spec.axis}) needs the number of channels')
        shape = () if spec.axis is None or channels is None else (channels,)
        self.register_buffer('scale', torch.full(shape, torch.nan))
        zero_shape = () if self.observer.shared_zero_point else shape
        self.register_buffer('zero_point', torch.zeros(zero_shape, dtype=torch.int32))
        self._taken: tuple[Tensor, Tensor] | None = None

    def observe(self, x: Tensor) -> None:
        """Take one batch into account.

        Raises:
            ValueError: the tensor holds NaN or infinity; the message names the layer.
        """
        try:
            self.observer.update(x)
        except ValueError as error:
            raise ValueError(f'calibration of {self.name or "a quantizer"}: {error}') from None

    def take_qparams(self, x: Tensor) -> None:
        """Find scale and zero point with ``x`` as the last batch."""
        self._taken = self.observer.qparams(x)

    def commit(self) -> None:
        """Write what was taken into the buffers."""
        if self._taken is None:
            raise RuntimeError(f'{self.name or "a quantizer"}: no parameters were taken')
        scale, zero_point = self._taken
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))
        self.reset()

    def reset(self) -> None:
        """Start observing afresh."""
        self.observer = self.spec.build_observer()
        self._taken = None

    @property
    def is_taken(self) -> bool:
        """Whether parameters wait for :meth:`commit`."""
        return self._taken is not None

    @property
    def is_calibrated(self) -> bool:
        """Whether the scale is set."""
        return not bool(torch.isnan(self.scale).any())

    @property
    def latest_scale(self) -> Tensor:
        """The scale just taken if there is one, else the one in force."""
        return self.scale if self._taken is None else self._taken[0]

    @property
    def widest_step(self) -> Tensor:
        """From one code to the next, of the shape of ``scale``; the widest where a channel has several."""
        return self.scale

    def step_range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest whole steps, of the shape of ``zero_point``."""
        return self.spec.bit_type.qmin - self.zero_point, self.spec.bit_type.qmax - self.zero_point

    def quantize(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, in floating point."""
        scale, zero_point = self._aligned(x)
        return quantize(x, scale, zero_point, *self._limits)

    def steps(self, x: Tensor, inplace: bool = False) -> Tensor:
        """``quantize(x) - zero_point``: whole steps from zero, in floating point."""
        scale, zero_point = self._aligned(x)
        return steps(x.float(), scale, zero_point, *self._limits, inplace=inplace)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """The nearest grid point of every element; float32 whatever ``x`` is."""
        scale, _ = self._aligned(x)
        return self.steps(x, inplace).mul_(scale)

    def from_steps_(self, x: Tensor) -> Tensor:
        """Grid points of whole steps that may still leave the grid, in place: what integer layers put out."""
        return self.saturated_(x).mul_(align(self.scale, x, self.spec.axis))

    def saturated_(self, x: Tensor) -> Tensor:
        """Whole steps, those without a code replaced by the nearest that has one, in place."""
        zero_point = align(self.zero_point, x, self.spec.axis)
        return saturate_(x, zero_point, self.spec.bit_type.qmin, self.spec.bit_type.qmax)

    def _aligned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axis = self.spec.axis
        return align(self.scale, x, axis), align(self.zero_point, x, axis)

    @property
    def _limits(self) -> tuple[int, int, Arithmetic]:
        return self.spec.bit_type.qmin, self.spec.bit_type.qmax, self.spec.arithmetic


@QUANTIZERS.register_module(name=['log2', 'Log2Quantizer'])
class Log2Quantizer(Quantizer):
    """Powers of two and zero, for attention probabilities in [0, 1]; it has nothing to calibrate.

    Source: FQ-ViT, equation 15; see :func:`~fqvit_plugin.functional.log2_codes`.
    """

    is_taken = True
    is_calibrated = True

    def observe(self, x: Tensor) -> None:
        """Nothing to learn: the grid is fixed."""

    def take_qparams(self, x: Tensor) -> None:
        """Nothing to take."""

    def commit(self) -> None:
        """Nothing to write."""

    def reset(self) -> None:
        """Nothing to forget."""

    def quantize(self, x: Tensor) -> Tensor:
        """Codes, in floating point."""
        return log2_codes(x, self.spec.bit_type.bits, self.spec.arithmetic)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """The nearest power of two, or zero."""
        return log2_dequantize(self.quantize(x.float()), self.spec.bit_type.bits, self.spec.arithmetic)


def build_quantizer(spec: QuantSpec, channels: int | None = None) -> Quantizer:
    """The quantizer that ``spec`` names."""
    return lookup(QUANTIZERS, spec.quantizer)(spec, channels)
