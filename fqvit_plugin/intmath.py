"""Integer LayerNorm and Log-Int-Softmax, in the reference's arithmetic and in ours.

The strict functions compute with integers throughout. They carry them in floating point, float32 where every value
stays below 2**24 and float64 where it stays below 2**53, and are therefore exact; the bound stands next to each
step. Vector units are fast at floats and slow at int64, so this is the quicker way to the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._torch import is_compiling

__all__ = [
    'LARGEST_EXPONENT',
    'LayerNormConstants',
    'by_slices',
    'input_range',
    'int_layernorm',
    'int_layernorm_reference',
    'layernorm_constants',
    'log_int_powers_',
    'log_int_softmax_',
    'log_int_softmax_codes',
    'log_int_softmax_reference_',
    'log_int_softmax_shift',
    'whole_layernorm',
]


#: Elements that are worked on at a time. The functions below need several tensors of scratch memory, and new memory
#: costs more than their arithmetic: slices reuse it while it is in the cache.
_SLICE = 1 << 19


def by_slices(
    function: Callable[..., Tensor], x: Tensor, *others: Tensor, out: Tensor | None = None, size: int = _SLICE
) -> Tensor:
    """``function(x, *others)``, taken over slices of rows; compilers, which need no scratch memory, see it whole.

    Args:
        x: (…, C).
        others: tensors with the rows of ``x``.
        out: of the shape of ``x``; may be ``x``.
        size: elements of ``x`` in a slice.
    """
    if is_compiling() or x.numel() <= size or not all(t.is_contiguous() for t in (x, *others)):
        return function(x, *others)
    out = torch.empty_like(x) if out is None else out
    rows = max(1, size // x.shape[-1])
    slices = (t.view(-1, t.shape[-1]).split(rows) for t in (out, x, *others))
    for target, *sources in zip(*slices, strict=True):
        result = function(*sources)
        if result.data_ptr() != target.data_ptr():
            target.copy_(result)
    return out


def int_layernorm_reference(x: Tensor, in_scale: Tensor, out_scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The published integer LayerNorm, emulated in float32 as published.

    Its 8-bit multiplier is floored, it has no epsilon (a constant token gives infinities), and its root is a
    float one; see ``docs/numerics.md``.

    Args:
        x: (…, C), on the grid of ``in_scale``.
        in_scale: (C,) or (), ``s * 2**k`` per channel.
        out_scale: () or (C,), step of the output grid.
    Returns:
        (…, C), whole steps of ``out_scale``, not yet saturated.

    Source: FQ-ViT, section 4.1 and its published code.
    """
    return by_slices(lambda rows: _layernorm_reference(rows, in_scale, out_scale, weight, bias), x)


def _layernorm_reference(x: Tensor, in_scale: Tensor, out_scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels = x.shape[-1]
    finest = in_scale.min()
    u = (x / in_scale).round() * (in_scale / finest).round()  # (…, C), integers on the finest step
    mean = u.mean(dim=-1, keepdim=True) * finest
    square_sum, sum_ = (u * u).sum(dim=-1, keepdim=True), u.sum(dim=-1, keepdim=True)
    std = finest / channels * torch.sqrt(channels * square_sum - sum_**2)
    gain = (finest / std * weight).div_(out_scale)
    mantissa = gain.abs()
    # 2**N with N = clamp(7 - floor(log2(gain)), 0, 31), made of the bits of the exponent
    shift = (mantissa.view(torch.int32) >> 23).neg_().add_(127 + 7).clamp_(0, 31)
    shift = shift.add_(127).bitwise_left_shift_(23).view(torch.float32)
    mantissa = mantissa.mul_(shift).floor_().clamp_(0, 255).copysign_(gain)
    offset = (mean / std * weight).neg_().add_(bias).div_(out_scale).mul_(shift).round_()
    return mantissa.mul_(u).add_(offset).div_(shift).round_()


#: Fractional bits of the normalized value x_hat inside int_layernorm.
_XHAT_BITS = 16


def int_layernorm(
    x: Tensor,
    in_scale: Tensor,
    in_range: int | Tensor,
    out_scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm of integer codes by integer sums, an integer root and dyadic multipliers.

    With ``u = x / min(in_scale)`` (integers), ``S = sum u`` and ``V = C sum u^2 - S^2`` per token::

        x_hat = (C u - S) / sqrt(V + eps (C / s)^2)        one reciprocal per token, 16 fractional bits kept
        y_q   = (x_hat * M_c + B_c) >> N_c                 M_c 24 bits with gamma / s_out, B_c with beta / s_out

    Args:
        x: (…, C), on the grid of ``in_scale``.
        in_scale: (C,) or (), ``s * 2**k`` per channel.
        in_range: the largest difference between two ``u``, and no ``|u|`` is larger; see :func:`input_range`.
        out_scale: () or (C,), step of the output grid.
        weight, bias: (C,).
        eps: LayerNorm's own, in squared units of the real input.
    Returns:
        (…, C) float32, whole steps of ``out_scale``, not yet saturated. Exact integers for ``|u|`` up to 2**19 (12
        bits and factors up to 128) while ``C sum u**2`` stays below 2**53; above, sums are rounded.

    Source: FQ-ViT, section 4.1; I-BERT's integer root. Deviations: docs/numerics.md.
    """
    constants = layernorm_constants(x.shape[-1], in_scale, in_range, out_scale, weight, bias, eps)
    return by_slices(lambda rows: whole_layernorm(rows, constants).to(constants.dtype), x)


class LayerNormConstants(NamedTuple):
    """What :func:`int_layernorm` computes once for each call; integers in float64 but for the first and the last.

    Args:
        finest: (), the smallest scale of the channels.
        guard: (), epsilon in units of ``(finest / C)**2``.
        root_bits: (), fractional bits of the root.
        gain, offset, shift: (C,), ``M``, ``B`` and ``N``.
        dtype: of the result.
        wide: whether ``u**2`` or ``C u`` may pass 2**24, so that float32 does not hold them.
    """

    finest: Tensor
    guard: Tensor
    root_bits: Tensor
    gain: Tensor
    offset: Tensor
    shift: Tensor
    dtype: torch.dtype
    wide: bool


def input_range(scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The largest difference between two ``u`` of an input of :func:`int_layernorm`, a whole number.

    Args:
        scale: () or (C,), ``s * 2**k``.
        low, high: () or (C,), the smallest and the largest steps of a channel, at most and at least 0.
    """
    factor = (scale / scale.min()).round()
    return (high * factor).max() - (low * factor).min()


def layernorm_constants(
    channels: int,
    in_scale: Tensor,
    in_range: int | Tensor,
    out_scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> LayerNormConstants:
    """The constants of a layer; arguments as :func:`int_layernorm`'s."""
    finest = in_scale.min()
    guard = torch.round(eps * (channels / finest.double()) ** 2).clamp_max(2.0**50)
    # Fractional bits of the root, a constant of the layer: as many as keep its radicand within 2**52, where float64
    # roots floor exactly. The guard counts: it outweighs the variance where activations are small. Negative above
    # 12-bit inputs.
    in_range = torch.as_tensor(in_range, dtype=torch.float64, device=in_scale.device)
    root_bits = 26 - torch.ceil(torch.log2((channels * in_range / 2) ** 2 + guard) / 2)
    root_bits = root_bits.clamp_max(17)  # 2**(45 + 17) is the largest numerator that int64 holds
    affine = _dyadic_affine(weight.double() / out_scale, bias.double() / out_scale)
    # what a compiler traces may not depend on values; either way gives the same numbers
    wide = is_compiling() or bool(in_range > 2**12) or bool(channels * in_range > 2**24)
    return LayerNormConstants(finest, guard, root_bits, *affine, out_scale.dtype, wide)


def whole_layernorm(x: Tensor, layer: LayerNormConstants) -> Tensor:
    """:func:`int_layernorm` by constants that are known, in float64."""
    channels = x.shape[-1]
    u = torch.div(x, layer.finest).round_()  # |u| <= in_range: 2**12 for 8 bits with factors up to 8, 2**15 up to 128
    if layer.wide:
        u = u.double()
    sum_ = u.sum(dim=-1, keepdim=True)  # <= C in_range, which float32 holds up to 2**24, as it does the squares
    square_sum = (u * u).sum(dim=-1, keepdim=True, dtype=torch.float64)
    variance = channels * square_sum - sum_.double().square()  # < (C in_range / 2)**2
    radicand = torch.floor((variance + layer.guard) * torch.exp2(2 * layer.root_bits)).clamp_max(2.0**52)
    root = radicand.sqrt().floor().clamp_min(1)
    reciprocal = torch.floor(torch.exp2(45 + layer.root_bits) / root)
    # |C u - S| <= C in_range; times the reciprocal it is |x_hat| 2**45 <= sqrt(C) 2**45 < 2**51
    x_hat = u.mul_(channels).sub_(sum_).double().mul_(reciprocal * 2.0 ** (_XHAT_BITS - 45)).add_(0.5).floor_()
    # |x_hat gain| < 2**(6 + 16 + 24); floor(v + 1/2) rounds halves up, an add and a shift in integers. Powers of two
    # go into the constants beforehand, which changes no bit.
    shrink = torch.exp2(-layer.shift)
    return x_hat.mul_(layer.gain * shrink).add_(layer.offset * shrink + 0.5).floor_()


def _dyadic_affine(gain: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers ``(M, B, N)`` with ``x_hat * 2**16 * M * 2**-N ~ x_hat * gain`` and ``B * 2**-N ~ offset``.

    ``M`` has 24 bits unless that would push ``B`` past 2**51 or ``N`` past 40, where bits of no weight are given up.
    """
    tiny = torch.finfo(torch.float64).tiny
    by_gain = _XHAT_BITS + 23 - torch.floor(torch.log2(gain.abs().clamp_min(tiny)))
    by_offset = 50 - torch.ceil(torch.log2(offset.abs() + 1))
    shift = torch.minimum(by_gain, by_offset).clamp(_XHAT_BITS, 40)
    return (
        torch.round(gain * torch.exp2(shift - _XHAT_BITS)),
        torch.round(offset * torch.exp2(shift)),
        shift,
    )


def log_int_softmax_reference_(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The published Log-Int-Softmax, emulated in float32 as published, in place.

    I-BERT's integer exponential on the 8-bit logit scale, the sum divided by each term, and the quotient's
    logarithm rounded with threshold 1.5. NaN for scales above 1.67; see ``docs/numerics.md``.

    Args:
        x: (…, N) logits on the grid of ``scale``, which may have had a mask added; overwritten with the result.
        scale: ().
        bits: of the log2 codes.
    Returns:
        ``x``, now powers of two or zero; rows need not sum to 1.

    Source: FQ-ViT, section 4.2 and its published code; Kim et al., I-BERT, ICML 2021.
    """
    return by_slices(lambda rows: _log_int_softmax_rows_(rows, scale, bits), x, out=x)


def _log_int_softmax_rows_(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    b, c = 0.96963238 / 0.35815147, 1.0 / 0.35815147
    n = 30
    x.div_(scale)
    x.sub_(x.amax(dim=-1, keepdim=True))
    ln2 = torch.floor(-0.6931 / scale)
    x.clamp_min_(n * ln2)
    quotient = torch.div(x, ln2).floor_()
    x.addcmul_(quotient, ln2, value=-1)  # the rest; the product is a whole number, so this rounds once, as published
    # x (x + b) + c; the leading 0.358 cancels
    exp_int = torch.add(x, torch.floor(b / scale)).mul_(x).add_(torch.floor(c / scale**2))
    exp_int.mul_((n - quotient).exp2_()).floor_()
    # Published with every term clamped at zero. Terms are negative only where c / scale**2 floors to 0, then all are.
    sum_ = exp_int.sum(dim=-1, keepdim=True).clamp_min_(0)
    ratio = torch.div(sum_, exp_int, out=x).round_()
    # 2**-k made of bits. The exponent rounds up from a mantissa of 1.5 on: half a mantissa more, and it has carried
    # over; without its mantissa the number is 2**k.
    ratio.view(torch.int32).add_(1 << 22).bitwise_and_(255 << 23)
    ratio.reciprocal_()
    last = min(2**bits - 1, 126)  # 2**-127 has no normal form
    return torch.threshold_(x, 2.0 ** -(last + 0.5), 0.0).mul_(sum_ / sum_)  # NaN where the sum vanished


#: Log2 codes from here on are zero: 2**-15.5 of the row's largest probability. All sums of powers up to 512 tokens
#: are then exact in float32, and codes fit two signed bytes of shifts.
_DEPTH = 16

#: A row's largest probability is ``2**15`` in integers.
LARGEST_EXPONENT = _DEPTH - 1


def log_int_softmax_shift(scale: Tensor) -> Tensor:
    """Octaves per logit step, ``scale * log2(e)``, rounded to a 16-bit mantissa.

    Its product with a distance of up to 8 bits is exact in float32: an integer multiplication and a shift.
    """
    octaves = (scale * math.log2(math.e)).view(torch.int32)
    return ((octaves + (1 << 7)) & -(1 << 8)).view(torch.float32)


def log_int_softmax_codes(distance: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, int]:
    """Codes of logits ``distance`` steps below their row's maximum, and the first code that stands for zero."""
    return torch.round(distance * log_int_softmax_shift(scale)), _first_zero(bits)


def _first_zero(bits: int) -> int:
    return min(2**bits - 1, _DEPTH)


def log_int_softmax_(steps: Tensor, scale: Tensor, bits: int, mask: Tensor | None = None) -> Tensor:
    """Log-Int-Softmax with rows that sum to 1: ``2**-k / sum(2**-k)``, in place.

    The code of a logit is its distance to the row's maximum in octaves, ``k = round(d * log2(e) * scale)``, hence a
    function of the integer ``d`` alone: a table of the layer, here multiplied out. FQ-ViT adds ``log2`` of the row's
    sum of exponentials to every exponent of a row before rounding; rows that are normalized afterwards do not need it
    (only their differences count), so no exponential is ever summed. The row sum of powers of two is an integer, and
    a row's product with V is then shifts, adds and one division.

    Args:
        steps: (…, N) float32, integer logits, up to a constant of the row; overwritten with the result.
        scale: (), of the logits.
        bits: of the codes; codes from ``min(2**bits - 1, 16)`` on are zero.
        mask: additive, broadcasts to ``steps``; negative entries forbid attention altogether. NaN for rows without
            one that is allowed, as softmax gives.
    Returns:
        ``steps``, now probabilities.

    Source: FQ-ViT, section 4.2. Deviations: docs/numerics.md.
    """
    powers = log_int_powers_(steps, scale, bits, mask)
    return powers.div_(powers.sum(dim=-1, keepdim=True))


def log_int_powers_(steps: Tensor, scale: Tensor, bits: int, mask: Tensor | None = None) -> Tensor:
    """The powers of two of :func:`log_int_softmax_`, ``2**-k`` or 0, before their row's sum divides them."""
    if mask is not None:
        steps.add_(torch.where(mask < 0, -torch.inf, 0.0))
    steps.sub_(steps.amax(dim=-1, keepdim=True))
    powers = steps.mul_(log_int_softmax_shift(scale)).round_().exp2_()
    return torch.threshold_(powers, 2.0 ** -_first_zero(bits), 0.0)
