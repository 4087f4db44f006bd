"""Observers that search: for the part of a range that errs least, for factors of channels, for channels to split."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .functional import EPS, Arithmetic, affine_qparams, flatten_channels
from .grids import Grids
from .observers import FARTHEST, EscapingObserver, RangeObserver
from .registry import OBSERVERS

if TYPE_CHECKING:
    from .scheme import BitType

__all__ = ['MseObserver', 'OmseObserver', 'PtfObserver', 'SplitObserver']


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
class PtfObserver(EscapingObserver):
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
        rows = flatten_channels(x.detach().float(), self.axis)
        lo, hi, far = self.near(rows)
        if bool(far.any()):  # what has a code of its own has no say in the rest of the grid
            rows = torch.minimum(torch.maximum(rows, lo[:, None]), hi[:, None])
        scale, zero_point = self._search(rows, lo, hi, far)
        self.far = torch.round(far / scale).to(torch.int32)
        return scale, zero_point

    def _search(self, rows: Tensor, lo: Tensor, hi: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of channels (C, S) of ranges (C,), of which some have an escape."""
        ends = (lo.min(), hi.max()) if self.shared_zero_point else (lo, hi)
        qmin, qmax = self.bit_type.qmin, self.bit_type.qmax
        covering, zero_point = affine_qparams(*ends, qmin, qmax, self.arithmetic)
        base = covering.max() / 2 ** (self.factors - 1)
        base = base * torch.exp2(torch.log2(far.abs().max() / (base * FARTHEST)).ceil().clamp_min(0))
        scales = torch.stack([base * 2**k for k in range(self.factors)])[:, None]  # (K, 1)
        shared = self.shared_zero_point
        zero_points = zero_point.expand_as(scales) if shared else self._zero_points(scales, lo, hi, far)
        grids = Grids(scales, zero_points, self.bit_type, self.arithmetic)
        best = grids.errors(rows, grids.workspace(rows)).argmin(dim=0)  # (C,)
        return base * torch.exp2(best), zero_point if shared else zero_points.gather(0, best[None])[0]

    def _zero_points(self, scales: Tensor, lo: Tensor, hi: Tensor, far: Tensor) -> Tensor:
        """(K, C) int32, of ranges ``lo`` to ``hi`` (C,) on grids of (K, 1) ``scales``, an escape's code left out."""
        low, high = self.bit_type.qmin + (far < 0).float(), self.bit_type.qmax - (far > 0).float()
        lo, hi = lo.clamp_max(0), hi.clamp_min(0)  # zero stays on the grid
        fitting = (scales * (high - low) / (hi - lo).clamp_min(EPS)).clamp_max(1)  # (K, C)
        zero_points = low - torch.round(lo * fitting / scales)
        return torch.minimum(torch.maximum(zero_points, low), high).to(torch.int32)


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
