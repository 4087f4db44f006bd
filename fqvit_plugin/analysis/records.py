"""The results of an analysis as frozen values; ``to_dict`` makes JSON of them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

__all__ = ['Analysis', 'EndToEnd', 'Scales', 'TensorRecord', 'block_of', 'decibels']

#: The number of a block; those of the two linear layers of mmcv's FFN say which one it is.
_NUMBER = re.compile(r'(?<!ffn\.layers)\.\d+(?=\.)')


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinity where there is no noise, NaN where there is no signal either."""
    if noise == 0:
        return math.inf if signal > 0 else math.nan
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def block_of(path: str) -> str:
    """The path of a Q layer up to the innermost numbered block; the first name outside of blocks."""
    numbers = list(_NUMBER.finditer(path))
    return path[: numbers[-1].end()] if numbers else path.split('.')[0]


@dataclass(frozen=True)
class Scales:
    """Scale and zero point of a uniform grid.

    Args:
        lowest, median, highest: over the channels; equal where the tensor has one scale.
        channels: how many scales there are.
        zero_point: the lowest and the highest.
        shifts: with PTF, how many channels have the factor ``2**0``, ``2**1``, ... over the finest scale in use;
            empty elsewhere.
    """

    lowest: float
    median: float
    highest: float
    channels: int
    zero_point: tuple[int, int]
    shifts: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorRecord:
    """One quantized tensor, over all analysed images.

    ``sqnr`` is the quantizer's own error: the float tensor ``x`` against its grid points ``g``,
    ``10 log10(sum x^2 / sum (x - g)^2)`` in dB. ``total_sqnr`` is that of
    the same tensor in the quantized model, with the errors of everything before it.

    Args:
        path: of the Q layer in the model.
        kind: its class.
        bits: name of the integer type.
        observer: what found the range; ``'log2'`` for the fixed grid of probabilities.
        scales: ``None`` on the log2 grid, and for quantizers that have none.
        covered: the real numbers at the two ends of the grid, over all channels.
        seen: the smallest and the largest value.
        count: values that were measured.
        saturated: share of values beyond the grid's ends; on the log2 grid, of positive ones that became zero.
        sqnr: in dB; ``inf`` where nothing was lost, NaN for a tensor of zeros.
        total_sqnr: in dB; ``None`` for weights and where it was not measured.
        codes_used: how many different codes occurred.
        codes: how many the grid has.
        value_counts: histogram of the values over ``covered``, 64 bins.
        code_counts: histogram of the codes from the lowest up, at most 256 bins.
    """

    path: str
    kind: str
    bits: str
    observer: str
    scales: Scales | None
    covered: tuple[float, float] | None
    seen: tuple[float, float]
    count: int
    saturated: float
    sqnr: float
    total_sqnr: float | None
    codes_used: int
    codes: int
    value_counts: tuple[int, ...]
    code_counts: tuple[int, ...]

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter of a layer rather than an activation."""
        return self.kind in ('QConv2d', 'QLinear')

    @property
    def role(self) -> str:
        """The path with ``#`` for the numbers of blocks: what the tensor is, whichever block it is in."""
        return _NUMBER.sub('.#', self.path)

    @property
    def block(self) -> str:
        """See :func:`block_of`."""
        return block_of(self.path)


@dataclass(frozen=True)
class EndToEnd:
    """The quantized model's outputs against the float model's, on the same images.

    Args:
        images: how many.
        sqnr: of the outputs (logits for a classifier), in dB.
        agreement: share of images whose first class is the same; ``None`` where the output is no row of logits.
    """

    images: int
    sqnr: float
    agreement: float | None


@dataclass(frozen=True)
class Analysis:
    """Every quantized tensor in the order of the network, and the whole model."""

    tensors: tuple[TensorRecord, ...]
    end_to_end: EndToEnd

    def worst(self, count: int = 5) -> tuple[TensorRecord, ...]:
        """The tensors of lowest ``sqnr`` on uniform grids.

        The log2 grid is left out: values spread over the octaves have 14.1 dB there, whatever is done
        (``x = 2**u`` with u even in [-1/2, 1/2] rounds to 1: ``E[x^2] / E[(x - 1)^2] = 25.9``).
        """
        uniform = [r for r in self.tensors if r.observer != 'log2' and not math.isnan(r.sqnr)]
        return tuple(sorted(uniform, key=lambda r: r.sqnr)[:count])

    def log2_range(self) -> tuple[int, float, float] | None:
        """How many tensors are on the log2 grid, and their lowest and highest ``sqnr``; ``None`` without one."""
        values = [r.sqnr for r in self.tensors if r.observer == 'log2']
        return (len(values), min(values), max(values)) if values else None

    def roles(self) -> dict[str, tuple[TensorRecord, ...]]:
        """Tensors by role, in the order of the network."""
        counts = Counter(r.role for r in self.tensors)
        return {role: tuple(r for r in self.tensors if r.role == role) for role in counts}

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold: ``None`` for infinity and NaN."""
        return _finite(dataclasses.asdict(self))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
