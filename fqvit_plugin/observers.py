"""Observers find the range of a tensor: ``update(x)`` with every batch, ``qparams(x)`` with the last one.

To add one, subclass :class:`Observer` (or :class:`RangeObserver` when it keeps a low and a high end), decorate it
with ``@OBSERVERS.register_module()``, and name it in ``get_scheme(observer=...)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .functional import (
    EPS,
    PULL,
    Arithmetic,
    affine_qparams,
    flatten_channels,
    symmetric_qparams,
)
from .registry import OBSERVERS

if TYPE_CHECKING:
    from .scheme import BitType

__all__ = [
    'FARTHEST',
    'EmaObserver',
    'EscapingObserver',
    'MinMaxObserver',
    'Observer',
    'PercentileObserver',
    'RangeObserver',
]

#: torch.quantile refuses more elements than this, where the reference falls back on numpy's float64 ranks.
_TORCH_QUANTILE_LIMIT = 1 << 24


class Observer(ABC):
    """Finds scale and zero point of one tensor from batches of it.

    A batch is first *measured*, a pure function of that batch, and the measurements are *folded* in batch order.
    The split is what lets several processes measure different batches and agree on one result (distributed.py).

    Args:
        bit_type: the integers to cover.
        axis: the axis that keeps its own scale, ``None`` for one scale.
        arithmetic: ``'strict'`` or ``'reference'``.
    """

    #: One zero point for all channels although each has its own scale.
    shared_zero_point = False

    def __init__(self, bit_type: BitType, *, axis: int | None = None, arithmetic: Arithmetic = 'strict') -> None:
        self.bit_type = bit_type
        self.axis = axis
        self.arithmetic = arithmetic
        #: None: measurements are folded as they come. A list: they wait there for their turn among the ranks'.
        self.deferred: list[Tensor] | None = None

    @property
    def channels_kept(self) -> bool:
        """Whether ``qparams`` gives a scale per channel."""
        return self.axis is not None

    def update(self, x: Tensor) -> None:
        """Take one batch into account.

        Raises:
            ValueError: ``x`` is empty, or holds NaN or infinity.
        """
        if x.numel() == 0:
            raise ValueError('cannot observe an empty tensor')
        measured = self.measure(x.detach().float())
        if not torch.isfinite(measured).all():
            raise ValueError('the tensor holds NaN or infinity')
        if self.deferred is None:
            self.fold(measured)
        else:
            self.deferred.append(measured)

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """What one batch tells, as a small tensor; NaN or infinity in ``x`` must show in it."""

    @abstractmethod
    def fold(self, measured: Tensor) -> None:
        """Add one measurement to what is known; called in batch order."""

    @abstractmethod
    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and int32 zero point; ``x`` is the last batch, which the searching observers score on.

        Raises:
            RuntimeError: nothing was observed yet.
        """


class RangeObserver(Observer):
    """An observer that keeps a low and a high end per channel (abstract)."""

    def __init__(self, bit_type: BitType, *, axis: int | None = None, arithmetic: Arithmetic = 'strict') -> None:
        super().__init__(bit_type, axis=axis, arithmetic=arithmetic)
        self.range: Tensor | None = None  # (2, C): low ends, high ends; (4, C) where escapes want two ranges

    def measure(self, x: Tensor) -> Tensor:
        """Minimum and maximum per channel, shape (2, C)."""
        if self.axis is None:
            lo, hi = x.aminmax()
            return torch.stack((lo, hi))[:, None]
        # amin and amax read the tensor in its own order; aminmax over a dimension is a loop over channels.
        others = [d for d in range(x.ndim) if d != self.axis % x.ndim]
        return torch.stack((x.amin(dim=others), x.amax(dim=others)))

    def fold(self, measured: Tensor) -> None:
        """Widen every range to hold the new one."""
        if self.range is not None:
            lows, highs = torch.minimum(self.range, measured)[::2], torch.maximum(self.range, measured)[1::2]
            measured = torch.stack((lows, highs), 1).flatten(0, 1)
        self.range = measured

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Low and high end, shape (C,), or () for one scale.

        Raises:
            RuntimeError: nothing was observed yet.
        """
        if self.range is None:
            raise RuntimeError(f'{type(self).__name__} has observed nothing yet: call update(x) first')
        lo, hi = self.range[:2]
        return (lo, hi) if self.channels_kept else (lo.squeeze(0), hi.squeeze(0))

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The grid over the range: symmetric for signed types, affine for unsigned ones."""
        return self._grid(*self.bounds())

    def _grid(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        grid = symmetric_qparams if self.bit_type.signed else affine_qparams
        return grid(lo, hi, self.bit_type.qmin, self.bit_type.qmax, self.arithmetic)


class EscapingObserver(RangeObserver):
    """A range that may leave out of a channel what a few tokens hold far beyond all others (abstract).

    Attributes:
        escapes: whether it may; for tokens (…, C) with ``axis=-1``. A quantizer asks for it, see
            :mod:`fqvit_plugin.escape`.
        far: (C,) int32, what that is in whole steps, 0 for the other channels; known after :meth:`qparams`.
    """

    def __init__(self, bit_type: BitType, *, axis: int | None = None, arithmetic: Arithmetic = 'strict') -> None:
        super().__init__(bit_type, axis=axis, arithmetic=arithmetic)
        self.escapes = False
        self.far: Tensor | None = None

    def measure(self, x: Tensor) -> Tensor:
        """Minimum and maximum per channel, (2, C); with escapes also those without the tokens far out, (4, C)."""
        ends = super().measure(x)
        if not self.escapes:
            return ends
        tokens = x.flatten(0, -2)
        return torch.cat((ends, super().measure(tokens[~_far_out(tokens)])))

    def near(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The range without what is far out, and what that is on average in the last batch, 0 where there is none.

        Args:
            rows: the last batch, (C, S).

        Returns:
            Low and high ends and far values, (C,), or () for one scale.
        """
        lo, hi = self.bounds()
        if not self.escapes:
            return lo, hi, torch.zeros_like(lo)
        assert self.range is not None
        near_lo, near_hi = self.range[2], self.range[3]
        width = near_hi.clamp_min(0) - near_lo.clamp_max(0)
        below, above = near_lo - lo, hi - near_hi
        sign = torch.where(below > above, -1.0, 1.0)
        # one code is left for one side only; the other keeps its range
        apart = (torch.maximum(below, above) > _APART * width) & (torch.minimum(below, above) < width)
        end, near = torch.where(sign < 0, lo, hi), torch.where(sign < 0, near_lo, near_hi)
        beyond = (rows - near[:, None]) * sign[:, None] > (end - near)[:, None].abs() / (1 + PULL)
        count = beyond.sum(1)
        mean = torch.where(count > 0, (rows * beyond).sum(1) / count.clamp_min(1), end)
        # well beyond the range, which is up to twice as wide on the grid that it gets
        far = (near + sign * torch.maximum((mean - near).abs(), (end - near).abs() / 2)) * apart
        return torch.where(far < 0, near_lo, lo), torch.where(far > 0, near_hi, hi), far


#: What is far out keeps 16 bits, in steps of its grid and, where LayerNorm reads it, of the finest one.
FARTHEST = 2**15 - 1
#: A token is far out if its variance over the channels is so many times the median token's.
_FAR_OUT = 16
#: A channel has an escape if what such tokens hold lies so many times the others' range beyond it.
_APART = 4


def _far_out(tokens: Tensor) -> Tensor:
    """(R,) which of the tokens (R, C) are far out."""
    variance = tokens.var(-1, correction=0)
    return variance > _FAR_OUT * variance.median()


@OBSERVERS.register_module(name=['minmax', 'MinMaxObserver'])
class MinMaxObserver(EscapingObserver):
    """The smallest and the largest value ever seen."""

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The grid over the range: symmetric for signed types, affine for unsigned ones."""
        if not self.escapes:
            return super().qparams(x)
        lo, hi, far = self.near(flatten_channels(x.detach().float(), self.axis))
        qmin, qmax = self.bit_type.qmin, self.bit_type.qmax
        least = far.abs() / FARTHEST * (qmax - qmin)
        wider = (least / (hi.clamp_min(0) - lo.clamp_max(0)).clamp_min(EPS)).clamp_min(1)
        lo, hi = lo * wider, hi * wider
        pairs = [affine_qparams(lo, hi, *ends) for ends in ((qmin, qmax), (qmin + 1, qmax), (qmin, qmax - 1))]
        which = (far < 0).long() + 2 * (far > 0).long()
        scale, zero_point = (torch.stack(p).gather(0, which[None])[0] for p in zip(*pairs, strict=True))
        self.far = torch.round(far / scale).to(torch.int32)
        return scale, zero_point


class _AveragedRange(RangeObserver):
    """A range averaged over batches with exponentially fading weights (abstract).

    Strict arithmetic divides by the sum of the weights, so every batch counts from the first on; the reference
    starts at the first batch, which keeps 91 % of the weight after ten batches at its sigma of 0.01.
    """

    def __init__(
        self,
        bit_type: BitType,
        *,
        axis: int | None = None,
        arithmetic: Arithmetic = 'strict',
        sigma: float | None = None,
    ) -> None:
        super().__init__(bit_type, axis=axis, arithmetic=arithmetic)
        self.sigma = sigma if sigma is not None else (0.1 if arithmetic == 'strict' else 0.01)
        if not 0 < self.sigma <= 1:
            raise ValueError(f'sigma must be in (0, 1], got {self.sigma}')
        self._weight = 0.0

    def fold(self, measured: Tensor) -> None:
        """Move the range towards the new one by its share of the weight."""
        if self.range is None:
            self.range, self._weight = measured, self.sigma
        elif self.arithmetic == 'reference':
            self.range = self.range + self.sigma * (measured - self.range)
        else:
            self._weight = (1 - self.sigma) * self._weight + self.sigma
            self.range = self.range + self.sigma / self._weight * (measured - self.range)


@OBSERVERS.register_module(name=['ema', 'EmaObserver'])
class EmaObserver(_AveragedRange):
    """Each batch's extremes, averaged over batches; ``sigma`` is the weight of the newest."""


@OBSERVERS.register_module(name=['percentile', 'PercentileObserver'])
class PercentileObserver(_AveragedRange):
    """Each batch's quantiles ``1 - alpha`` and ``alpha``, averaged over batches.

    Exact at every size and on every device: the two order statistics next to the rank are picked and interpolated
    linearly, as ``torch.quantile`` does up to its limit of 16 million elements. Picking the few largest of many
    values takes one pass over them, see :func:`_ends`.

    Args:
        alpha: the upper quantile, in (0.5, 1].
    """

    def __init__(
        self,
        bit_type: BitType,
        *,
        axis: int | None = None,
        arithmetic: Arithmetic = 'strict',
        sigma: float | None = None,
        alpha: float = 0.99999,
    ) -> None:
        super().__init__(bit_type, axis=axis, arithmetic=arithmetic, sigma=sigma)
        if not 0.5 < alpha <= 1:
            raise ValueError(f'alpha must be in (0.5, 1], got {alpha}')
        self.alpha = alpha

    def measure(self, x: Tensor) -> Tensor:
        """Both quantiles per channel, shape (2, C)."""
        rows = flatten_channels(x, self.axis)
        return torch.stack((self._quantile(rows, 1.0 - self.alpha), self._quantile(rows, self.alpha)))

    def _quantile(self, rows: Tensor, q: float) -> Tensor:
        samples = rows.shape[1]
        rank, weight = self._rank(q, samples)
        upper_half = q > 0.5
        # Both neighbours of the rank, counted from the nearer end, where they are found cheaply.
        count = samples - rank if upper_half else min(rank + 2, samples)
        ends = _ends(rows, count, upper_half)
        extreme = ends[:, 0]
        if upper_half:
            below, above = ends[:, -1], ends[:, max(count - 2, 0)]
        else:
            below, above = ends[:, rank], ends[:, -1]
        value = torch.lerp(below, above, weight)
        return torch.where(torch.isfinite(extreme), value, extreme)  # NaN and infinity must show

    def _rank(self, q: float, samples: int) -> tuple[int, float]:
        """Index below the quantile, and the weight of the value above it."""
        if self.arithmetic == 'reference' and samples <= _TORCH_QUANTILE_LIMIT:
            position = float(torch.tensor(q, dtype=torch.float32) * (samples - 1))  # torch ranks in float32
        else:
            position = q * (samples - 1)
        return int(position), position - int(position)


def _ends(rows: Tensor, count: int, largest: bool) -> Tensor:
    """The ``count`` largest values of each row, or smallest, extreme first; NaN counts as larger than any number.

    Cut into blocks, a row has its ``count`` largest values in the ``count`` blocks of largest maxima: a value in any
    other block is below ``count`` maxima. So only those blocks are searched.

    Args:
        rows: (C, S).
        count: 1 to S.
        largest: which end.
    Returns:
        (C, count).
    """
    samples = rows.shape[1]
    # Balances the maxima to search, S / width, against the values of the chosen blocks, count * width.
    width = int((samples / count) ** 0.5)
    blocks = samples // max(width, 1)
    if width < 4 or blocks <= count:
        return rows.topk(count, dim=1, largest=largest).values
    cut = blocks * width
    body = rows[:, :cut].reshape(len(rows), blocks, width)
    extremes = body.amax(dim=2) if largest else body.amin(dim=2)
    chosen = extremes.topk(count, dim=1, largest=largest, sorted=False).indices  # (C, count)
    candidates = body.gather(1, chosen[:, :, None].expand(-1, -1, width)).flatten(1)
    return torch.cat((candidates, rows[:, cut:]), dim=1).topk(count, dim=1, largest=largest).values
