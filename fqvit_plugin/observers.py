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
    Arithmetic,
    affine_qparams,
    flatten_channels,
    symmetric_qparams,
)
from .grids import Grids
from .registry import OBSERVERS

if TYPE_CHECKING:
    from .scheme import BitType

__all__ = [
    'EmaObserver',
    'MinMaxObserver',
    'MseObserver',
    'Observer',
    'OmseObserver',
    'PercentileObserver',
    'PtfObserver',
    'RangeObserver',
    'SplitObserver',
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
        self.range: Tensor | None = None  # (2, C): low ends, high ends

    def measure(self, x: Tensor) -> Tensor:
        """Minimum and maximum per channel, shape (2, C)."""
        if self.axis is None:
            lo, hi = x.aminmax()
            return torch.stack((lo, hi))[:, None]
        # amin and amax read the tensor in its own order; aminmax over a dimension is a loop over channels.
        others = [d for d in range(x.ndim) if d != self.axis % x.ndim]
        return torch.stack((x.amin(dim=others), x.amax(dim=others)))

    def fold(self, measured: Tensor) -> None:
        """Widen the range to hold the new one."""
        if self.range is None:
            self.range = measured
        else:
            self.range = torch.stack(
                (
                    torch.minimum(self.range[0], measured[0]),
                    torch.maximum(self.range[1], measured[1]),
                )
            )

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Low and high end, shape (C,), or () for one scale.

        Raises:
            RuntimeError: nothing was observed yet.
        """
        if self.range is None:
            raise RuntimeError(f'{type(self).__name__} has observed nothing yet: call update(x) first')
        lo, hi = self.range
        return (lo, hi) if self.channels_kept else (lo.squeeze(0), hi.squeeze(0))

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The grid over the range: symmetric for signed types, affine for unsigned ones."""
        return self._grid(*self.bounds())

    def _grid(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        grid = symmetric_qparams if self.bit_type.signed else affine_qparams
        return grid(lo, hi, self.bit_type.qmin, self.bit_type.qmax, self.arithmetic)


@OBSERVERS.register_module(name=['minmax', 'MinMaxObserver'])
class MinMaxObserver(RangeObserver):
    """The smallest and the largest value ever seen."""


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


@OBSERVERS.register_module(name=['omse', 'OmseObserver'])
class OmseObserver(RangeObserver):
    """The min-max range, shrunk by the factor that gives the last batch the least squared error.

    Ninety candidates, both ends shrunk together by 0 to 89 %. Strict arithmetic scores every channel on its own
    and keeps signed types symmetric; the reference scores all channels together and is always affine.

    Source: Choukroun et al., Low-bit quantization of neural networks for efficient inference, ICCVW 2019.
    """

    candidates = 90
    step = 0.01

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The candidate of least squared error on ``x``; the first one on a tie."""
        lo, hi = self.bounds()
        grids = [self._candidate(lo * s, hi * s) for s in (1.0 - i * self.step for i in range(self.candidates))]
        scales = torch.stack([scale for scale, _ in grids]).reshape(self.candidates, -1)
        zero_points = torch.stack([zp for _, zp in grids]).reshape(self.candidates, -1)
        candidates = Grids(scales, zero_points, self.bit_type, self.arithmetic)
        rows = flatten_channels(x.detach().float(), self.axis)
        best = candidates.best(rows, jointly=self.arithmetic == 'reference').expand(scales.shape[1])[None]
        scale, zero_point = scales.gather(0, best)[0], zero_points.gather(0, best)[0]
        return (scale, zero_point) if self.channels_kept else (scale[0], zero_point[0])

    def _candidate(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        if self.arithmetic == 'reference':
            return affine_qparams(lo, hi, self.bit_type.qmin, self.bit_type.qmax, self.arithmetic)
        return self._grid(lo, hi)


@OBSERVERS.register_module(name=['mse', 'MseObserver'])
class MseObserver(RangeObserver):
    """The part of the min-max range that gives the last batch the least error, each end for itself.

    For few bits, where a range that nearly nothing uses costs most. 46 by 46 candidates are scored on a histogram of
    2,048 bins by ``|error|**norm``; a norm above 2 spares what lies far out, which a block reacts to most.

    Args:
        norm: exponent of the error.
    """

    candidates = 46
    bins = 2048

    def __init__(
        self,
        bit_type: BitType,
        *,
        axis: int | None = None,
        arithmetic: Arithmetic = 'strict',
        norm: float = 2.4,
    ) -> None:
        super().__init__(bit_type, axis=axis, arithmetic=arithmetic)
        if axis is not None or bit_type.signed or norm <= 0:
            raise ValueError(f'the mse observer takes no axis, unsigned types and a norm above 0, got {norm}')
        self.norm = norm

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The candidate of least error on ``x``; the narrowest one on a tie."""
        lo, hi = self.bounds()
        lo, hi = lo.clamp_max(0), hi.clamp_min(0)
        width = ((hi - lo) / (self.bins - 1)).clamp_min(EPS)
        bins = ((x.detach().float().flatten() - lo) / width).round_().long()
        counts = torch.bincount(bins, minlength=self.bins)
        values = lo + torch.arange(self.bins, device=x.device) * width
        shrink = torch.linspace(0.1, 1.0, self.candidates, device=x.device)
        lows, highs = (t.flatten() for t in torch.meshgrid(lo * shrink, hi * shrink, indexing='ij'))
        scales, zero_points = self._grid(lows, highs)
        qmin, qmax = self.bit_type.qmin, self.bit_type.qmax
        errors = []
        for scale, zero_point in zip(scales.split(64), zero_points.split(64), strict=True):
            scale, zero_point = scale[:, None], zero_point[:, None]
            on_grid = (torch.round(values / scale) + zero_point).clamp_(qmin, qmax).sub_(zero_point).mul_(scale)
            errors.append((on_grid.sub_(values).abs_().pow_(self.norm) * counts).sum(1))
        best = torch.cat(errors).argmin()
        return scales[best], zero_points[best]


@OBSERVERS.register_module(name=['ptf', 'PtfObserver'])
class PtfObserver(RangeObserver):
    """Power-of-Two Factor: one scale for the tensor, times ``2**k`` per channel.

    ``scale_c = s * 2**k_c``, where ``k_c`` is the factor of least squared error on the last batch, the smallest one
    on a tie, which gives a dead channel 0.

    Strict arithmetic has eight factors and a zero point for each channel. The largest factor covers the channel of
    the widest range; a channel's candidates have the zero point of its own range, shrunk at both ends alike where
    the candidate is too narrow for it. The reference has four factors, the largest of which covers the range of the
    whole tensor, whose zero point all channels share.

    Args:
        factors: how many powers of two to choose from, 1 to 8; by default 8 in strict arithmetic, 4 in the reference.
        shared_zero_point: as the reference; the default is as the arithmetic says.

    Source: FQ-ViT, section 4.1. The paper's equation 10 has the zero point from ``s``; its code, which made its
    table, takes it from the largest factor's scale, and so does the reference here.
    """

    def __init__(
        self,
        bit_type: BitType,
        *,
        axis: int | None = None,
        arithmetic: Arithmetic = 'strict',
        factors: int | None = None,
        shared_zero_point: bool | None = None,
    ) -> None:
        super().__init__(bit_type, axis=axis, arithmetic=arithmetic)
        strict = arithmetic == 'strict'
        self.factors = factors if factors is not None else (8 if strict else 4)
        self.shared_zero_point = shared_zero_point if shared_zero_point is not None else not strict
        if self.factors not in range(1, 9):
            raise ValueError(f'factors of the ptf observer must be a whole number from 1 to 8, got {factors!r}')
        if axis is None:
            raise ValueError(
                'the ptf observer gives every channel a factor of its own, so it needs an axis; ptf=True puts it '
                'where it belongs, on the inputs of LayerNorm'
            )

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of shape (C,); zero points of the same, or the shared one of shape ()."""
        lo, hi = self.bounds()
        ends = (lo.min(), hi.max()) if self.shared_zero_point else (lo, hi)
        qmin, qmax = self.bit_type.qmin, self.bit_type.qmax
        covering, zero_point = affine_qparams(*ends, qmin, qmax, self.arithmetic)
        base = covering.max() / 2 ** (self.factors - 1)
        scales = torch.stack([base * 2**k for k in range(self.factors)])[:, None]  # (K, 1)
        shared = self.shared_zero_point
        zero_points = zero_point.expand_as(scales) if shared else self._zero_points(scales, lo, hi)
        grids = Grids(scales, zero_points, self.bit_type, self.arithmetic)
        rows = flatten_channels(x.detach().float(), self.axis)
        best = grids.errors(rows, grids.workspace(rows)).argmin(dim=0)  # (C,)
        return base * torch.exp2(best), zero_point if shared else zero_points.gather(0, best[None])[0]

    def _zero_points(self, scales: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """(K, C) int32, of ranges ``lo`` to ``hi`` (C,) on grids of (K, 1) ``scales``."""
        qmin, qmax = self.bit_type.qmin, self.bit_type.qmax
        lo, hi = lo.clamp_max(0), hi.clamp_min(0)  # zero stays on the grid
        fitting = (scales * (qmax - qmin) / (hi - lo).clamp_min(EPS)).clamp_max(1)  # (K, C)
        zero_points = qmin - torch.round(lo * fitting / scales)
        return zero_points.clamp(qmin, qmax).to(torch.int32)


@OBSERVERS.register_module(name=['split', 'SplitObserver'])
class SplitObserver(RangeObserver):
    """The range of one scale that a few channels may exceed, because copies of them carry the rest.

    The hidden activations of a trained MLP can hold one channel that reaches a hundred times as far as the others.
    The limit is the lowest one that costs at most ``share`` of the channels in copies: a channel that reaches
    ``n`` limits gets ``n - 1`` copies, and each takes the next stretch of it. Where this lowers the top of the range
    by less than ``gain`` there is no limit.

    Args:
        share: copies, at most, as a part of the channels (the last axis).
        gain: how far the top must come down, as a factor.

    Attributes:
        copies: (n,) int64, the channel of each copy, known after :meth:`qparams`.

    Source: Zhao et al., Improving neural network quantization without retraining using outlier channel splitting,
    ICML 2019, which halves a channel; stretches keep the step of the grid.
    """

    def __init__(
        self,
        bit_type: BitType,
        *,
        axis: int | None = None,
        arithmetic: Arithmetic = 'strict',
        share: float = 1 / 24,
        gain: float = 8.0,
    ) -> None:
        super().__init__(bit_type, axis=None, arithmetic=arithmetic)
        if axis is not None or not 0 <= share <= 1 or gain < 1:
            raise ValueError(f'split takes no axis, share in 0 to 1 and gain from 1, got {axis}, {share}, {gain}')
        self.share, self.gain = share, gain
        self.copies = torch.zeros(0, dtype=torch.int64)

    def measure(self, x: Tensor) -> Tensor:
        """Minimum and maximum of each channel, shape (2, C)."""
        rows = x.flatten(0, -2)
        return torch.stack((rows.amin(0), rows.amax(0)))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Low and high end, (), the latter without what copies carry."""
        if self.range is None:
            raise RuntimeError('SplitObserver has observed nothing yet: call update(x) first')
        low, high = self.range
        limit = self._limit(high)
        # nothing above zero needs no copy
        counts = (torch.ceil(high / limit.clamp_min(EPS) - 1e-4) - 1).clamp_min(0).long()
        self.copies = torch.repeat_interleave(torch.arange(len(high), device=high.device), counts)
        return low.min(), limit

    def _limit(self, high: Tensor) -> Tensor:
        top = high.max()
        allowed = int(self.share * len(high))
        low_end, limit = top / (allowed + 1), top
        if allowed == 0 or top <= 0:
            return top
        for _ in range(30):
            middle = (low_end + limit) / 2
            fits = bool((torch.ceil(high / middle - 1e-4) - 1).clamp_min(0).sum() <= allowed)
            low_end, limit = (low_end, middle) if fits else (middle, limit)
        return limit if limit * self.gain <= top else top
