"""The grid of a weight: codes that a step chose, and factors for groups of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import align
from .quantizers import UniformQuantizer
from .scheme import QuantSpec

__all__ = ['WeightQuantizer', 'factors_of', 'largest_factor', 'least_error', 'packed_bytes']

#: Whole steps of a weight fit this, so that integer products see int8, symmetric as engines want it.
_LARGEST_STEP = 127
#: Factors are stored in this many bits.
_FACTOR_BITS = 4
#: Scales of a row that are tried with all factors.
_ROW_SCALES = 6


class WeightQuantizer(UniformQuantizer):
    """The grid of a weight, factors for groups of its columns, and codes that a step chose in place of the nearest.

    With ``spec.group_size`` a code of ``b`` bits in group ``g`` of row ``o`` stands for ``factors[o, g]`` whole steps
    of the row's scale each: ``w ~ code * factors[o, g] * scale[o]``, where ``2**(b - 1) * factors <= 127``. Integer
    arithmetic sees an int8 weight with a scale for each row.

    Buffers, empty where there are none or nothing was chosen:
        factors: (O, G) int8, from 1.
        codes: int8, the weight in whole steps: factors are in them.
        bias: (O,) float32, the bias that goes with them.

    Source: Dai et al., VS-Quant, MLSys 2021 (integer factors of vectors beside a float scale of a row).
    """

    factors: Tensor
    codes: Tensor
    bias: Tensor

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        super().__init__(spec, channels)
        self.register_buffer('factors', torch.zeros(0, dtype=torch.int8))
        self.register_buffer('codes', torch.zeros(0, dtype=torch.int8))
        self.register_buffer('bias', torch.zeros(0))
        self._found: Tensor | None = None

    @property
    def is_chosen(self) -> bool:
        """Whether codes were chosen."""
        return bool(self.codes.numel())

    @property
    def has_groups(self) -> bool:
        """Whether groups of columns get factors: from 7 bits on there is no room for any."""
        return self.spec.group_size is not None and largest_factor(self.spec.bit_type.bits) > 1

    def choose(self, steps: Tensor, bias: Tensor) -> None:
        """Put ``steps`` (codes times factors) and ``bias`` in force."""
        self.codes, self.bias = steps.to(torch.int8), bias.detach().float()

    def take_qparams(self, x: Tensor) -> None:
        """Find scale, and the factors that cover every group, with ``x`` as the last batch."""
        super().take_qparams(x)
        assert self._taken is not None
        self._found = torch.zeros(0, dtype=torch.int8, device=x.device)
        if self.has_groups:
            most = largest_factor(self.spec.bit_type.bits)
            top = _grouped(x.detach().float().flatten(1), self.spec.group_size).abs().amax(-1).clamp_min(1e-8)
            scale = top.amax(1) / (self.spec.bit_type.qmax + 0.5) / most
            self._found = (top / top.amax(1, keepdim=True) * most).ceil().clamp_(1, most).to(torch.int8)
            self._taken = scale, self._taken[1]

    def commit(self) -> None:
        """Write scale, zero point and factors; codes of an earlier grid go."""
        found = self._found
        super().commit()
        assert found is not None
        self.factors = found
        self.choose(self.codes.new_zeros(0), self.bias.new_zeros(0))

    def reset(self) -> None:
        """Start observing afresh."""
        super().reset()
        self._found = None

    def search_(self, weight: Tensor, importance: Tensor, shrink: float) -> None:
        """Take the scales and factors of least squared error for ``weight``, columns weighted by ``importance``.

        Args:
            weight: (O, I).
            importance: (I,).
            shrink: the narrowest range that is tried, as a part of a row's; groups choose among all factors.
        """
        bits = self.spec.bit_type.bits
        if not self.has_groups:
            self.scale.copy_(least_error(weight, importance, 2 ** (bits - 1), shrink))
            return
        limit, most = 2 ** (bits - 1), largest_factor(bits)
        groups, weights = (_grouped(t, self.spec.group_size) for t in (weight, importance[None]))
        top = weight.abs().amax(1).clamp_min(1e-8) / (limit - 0.5) / most
        least = torch.full_like(top, torch.inf)
        for part in torch.linspace(shrink, 1.0, _ROW_SCALES).tolist():
            errors = torch.stack(
                [_error(groups, (top * part * f)[:, None, None], limit, weights) for f in range(1, most + 1)]
            )
            error, index = errors.min(0)
            better = error.sum(1) < least
            least = torch.minimum(error.sum(1), least)
            self.scale.copy_(torch.where(better, top * part, self.scale))
            self.factors = torch.where(better[:, None], (index + 1).to(torch.int8), self.factors)

    @property
    def widest_step(self) -> Tensor:
        """(O,): that of the widest group of each row."""
        return self.scale * self.factors.amax(1) if self.factors.numel() else self.scale

    def steps(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Whole steps from zero, in floating point: codes times factors."""
        steps = super().steps(x, inplace)
        return steps if (factors := self._factors_like(x)) is None else steps.mul_(factors)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """The nearest grid point of every element; float32 whatever ``x`` is."""
        return self.steps(x, inplace).mul_(align(self.scale, x, self.spec.axis))

    def _aligned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = super()._aligned(x)
        factors = self._factors_like(x)
        return (scale if factors is None else scale * factors), zero_point

    def _factors_like(self, x: Tensor) -> Tensor | None:
        size = self.spec.group_size
        if size is None or not self.factors.numel():
            return None
        return self.factors.repeat_interleave(size, 1)[:, : x[0].numel()].view(x.shape)


def largest_factor(bits: int) -> int:
    """The largest factor of a group of ``bits``-bit codes."""
    return max(1, min(_LARGEST_STEP // 2 ** (bits - 1), 2**_FACTOR_BITS - 1))


def factors_of(weight: Tensor, spec: QuantSpec) -> int:
    """How many factors ``weight`` (O, …) has where its bits are few; 0 without groups."""
    return 0 if spec.group_size is None else len(weight) * -(-weight[0].numel() // spec.group_size)


def packed_bytes(weights: int, bits: int, factors: int = 0) -> int:
    """Bytes of ``weights`` codes of ``bits`` bits, and of their factors where such codes have some."""
    return (weights * bits + 7) // 8 + ((factors * _FACTOR_BITS + 7) // 8 if largest_factor(bits) > 1 else 0)


def least_error(weight: Tensor, importance: Tensor, limit: int, shrink: float) -> Tensor:
    """(O,) scales of least squared error, columns weighted by ``importance``.

    Args:
        weight: (O, I).
        importance: (I,).
        limit: codes are -limit to limit - 1.
        shrink: the narrowest range, as a part of the row's.
    """
    top = weight.abs().amax(1).clamp_min(1e-8) / (limit - 0.5)
    best, best_error = top, torch.full_like(top, torch.inf)
    for part in torch.linspace(shrink, 1.0, 71).tolist():
        error = _error(weight, (top * part)[:, None], limit, importance)
        best, best_error = torch.where(error < best_error, top * part, best), torch.minimum(error, best_error)
    return best


def _error(weight: Tensor, scale: Tensor, limit: int, importance: Tensor) -> Tensor:
    codes = torch.round(weight / scale).clamp_(-limit, limit - 1)
    return codes.mul_(scale).sub_(weight).square_().mul_(importance).sum(-1)


def _grouped(weight: Tensor, size: int | None) -> Tensor:
    """(O, I) as (O, G, size), the last group filled up with zeros."""
    assert size is not None
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
