"""Measuring one tensor against its grid: pure functions, and a tally that adds up batches.

Memory does not grow with the number of batches: sums, and histograms over a range that is known beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import align, log2_codes
from ..quantizers import Log2Quantizer, Quantizer, UniformQuantizer
from ..scheme import QuantSpec
from .records import Scales, TensorRecord, decibels

__all__ = ['VALUE_BINS', 'Grid', 'Tally', 'code_histogram', 'histogram', 'log2_grid', 'uniform_grid']

VALUE_BINS = 64
CODE_BINS = 256

#: histc counts in the tensor's own float32, which is exact up to 2**24: longer tensors are counted in pieces.
_PIECE = 1 << 24


@dataclass(frozen=True)
class Grid:
    """What a quantizer can represent.

    Args:
        first, last: the codes at its ends.
        low, high: the reals there, shape () or (C,).
        margin: beyond the ends by more than this a value saturates; half a step, same shape.
        axis: of ``low``, ``high`` and ``margin``.
    """

    first: int
    last: int
    low: Tensor
    high: Tensor
    margin: Tensor
    axis: int | None = None

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return self.last - self.first + 1

    @property
    def covered(self) -> tuple[float, float]:
        """Both ends over all channels."""
        return float(self.low.min()), float(self.high.max())

    def count_saturated(self, x: Tensor) -> int:
        """How many values of ``x`` lie beyond the ends by more than half a step."""
        low, high = align(self.low - self.margin, x, self.axis), align(self.high + self.margin, x, self.axis)
        return int(((x < low) | (x > high)).sum())


def uniform_grid(quantizer: UniformQuantizer) -> Grid:
    """The grid of a calibrated quantizer: ``(code - zero_point) * scale``, and to what an escape stands for."""
    kind, scale = quantizer.spec.bit_type, quantizer.widest_step
    low, high = (steps * scale for steps in quantizer.step_range())
    return Grid(kind.qmin, kind.qmax, low, high, scale / 2, quantizer.spec.axis)


def log2_grid(spec: QuantSpec) -> Grid:
    """The powers of two and zero, 0 to 1; the reference has one code more than fits the bits."""
    last = 2**spec.bit_type.bits - (1 if spec.arithmetic == 'strict' else 0)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    return Grid(0, last, zero, one, zero)


def histogram(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Counts of ``x`` in ``bins`` equal parts of ``[low, high]``, int64; values outside are not counted."""
    if not low < high:
        low, high = low - 0.5, low + 0.5
    pieces = x.detach().float().reshape(-1).split(_PIECE)
    return torch.stack([torch.histc(p, bins, low, high).long() for p in pieces]).sum(0).cpu()


def code_histogram(codes: Tensor, grid: Grid) -> Tensor:
    """How often each code of ``grid`` occurs, int64."""
    return histogram(codes, grid.codes, grid.first - 0.5, grid.last + 0.5)


class Tally:
    """Adds up what batches of one tensor tell.

    Args:
        spec: recipe of the tensor.
        quantizer: its quantizer, calibrated; ``None`` for Log-Int-Softmax, which has the grid but no quantizer.
    """

    def __init__(self, spec: QuantSpec, quantizer: Quantizer | None) -> None:
        self.spec = spec
        self.quantizer = quantizer
        self.is_log2 = quantizer is None or isinstance(quantizer, Log2Quantizer)
        self.grid: Grid | None = None  # stays None for a quantizer of somebody else's
        if isinstance(quantizer, UniformQuantizer):
            self.grid = uniform_grid(quantizer)
        elif self.is_log2:
            self.grid = log2_grid(spec)
        self.count = self.saturated = 0
        self.signal = self.noise = 0.0
        self.low, self.high = math.inf, -math.inf
        self.values = torch.zeros(VALUE_BINS, dtype=torch.int64)
        self.codes = torch.zeros(self.grid.codes if self.grid else 0, dtype=torch.int64)

    def add(self, x: Tensor, on_grid: Tensor | None = None) -> None:
        """Take a batch into account.

        Args:
            x: the float tensor; it is not changed.
            on_grid: what replaces it, when that is not just ``quantizer(x)``.
        """
        x = x.detach().float()
        if on_grid is None:
            assert self.quantizer is not None
            on_grid = self.quantizer(x)
        self.count += x.numel()
        self.signal += float(x.square().sum(dtype=torch.float64))
        self.noise += float((x - on_grid).square_().sum(dtype=torch.float64))
        low, high = x.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        if self.grid is None:
            return
        self.values += histogram(x, VALUE_BINS, *self.grid.covered)
        self.codes += code_histogram(self._codes(x, on_grid), self.grid)
        self.saturated += int(((x > 0) & (on_grid == 0)).sum()) if self.is_log2 else self.grid.count_saturated(x)

    def _codes(self, x: Tensor, on_grid: Tensor) -> Tensor:
        if isinstance(self.quantizer, UniformQuantizer):
            return self.quantizer.quantize(x)
        return log2_codes(on_grid, self.spec.bit_type.bits, self.spec.arithmetic)  # exact: they are powers of two

    def record(self, path: str, kind: str, total_sqnr: float | None) -> TensorRecord:
        """The sums as a record."""
        return TensorRecord(
            path=path,
            kind=kind,
            bits=self.spec.bit_type.name,
            observer='log2' if self.is_log2 else self.spec.observer,
            scales=_scales(self.quantizer),
            covered=None if self.grid is None else self.grid.covered,
            seen=(self.low, self.high),
            count=self.count,
            saturated=self.saturated / max(self.count, 1),
            sqnr=decibels(self.signal, self.noise),
            total_sqnr=total_sqnr,
            codes_used=int((self.codes > 0).sum()),
            codes=len(self.codes),
            value_counts=tuple(self.values.tolist()),
            code_counts=tuple(_at_most(self.codes, CODE_BINS).tolist()),
        )


def _at_most(counts: Tensor, bins: int) -> Tensor:
    """``counts``, neighbours added together until there are at most ``bins``."""
    width = -(-len(counts) // bins)
    if width <= 1:
        return counts
    padded = torch.nn.functional.pad(counts, (0, -len(counts) % width))
    return padded.view(-1, width).sum(1)


def _scales(quantizer: Any) -> Scales | None:
    if not isinstance(quantizer, UniformQuantizer):
        return None
    scale, zero_point = quantizer.scale.detach().float().cpu().reshape(-1), quantizer.zero_point.reshape(-1)
    shifts: tuple[int, ...] = ()
    if quantizer.spec.observer == 'ptf':
        exponents = torch.log2(scale / scale.min()).round().long()
        shifts = tuple(torch.bincount(exponents).tolist())
    return Scales(
        lowest=float(scale.min()),
        median=float(scale.median()),
        highest=float(scale.max()),
        channels=len(scale),
        zero_point=(int(zero_point.min()), int(zero_point.max())),
        shifts=shifts,
    )
