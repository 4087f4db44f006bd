"""Integer LayerNorm and Log-Int-Softmax, in the reference's arithmetic and in ours.

The strict functions compute with integers throughout. They carry them in float64 tensors, where every value
named here stays below 2**53 and is therefore exact; the bound stands next to each step. Vector units are fast at
float64 and slow at int64 division, so this is the quicker way to the same codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    'int_layernorm',
    'int_layernorm_reference',
    'log_int_softmax',
    'log_int_softmax_codes',
    'log_int_softmax_reference',
]


def int_layernorm_reference(x: Tensor, in_scale: Tensor, out_scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The published integer LayerNorm, emulated in float32 as published.

    Its 8-bit multiplier is floored, it has no epsilon (a constant token gives infinities), and its root is a
    float one; see ``docs/numerics.md``.

    Args:
        x: (…, C), on the grid of ``in_scale``.
        in_scale: (C,) or (), ``s * 2**k`` per channel.
        out_scale: (), step of the output grid.
    Returns:
        (…, C), whole multiples of ``out_scale``, not yet saturated.

    Source: FQ-ViT, section 4.1 and its published code.
    """
    channels = x.shape[-1]
    finest = in_scale.min()
    u = (x / in_scale).round() * (in_scale / finest).round()  # (…, C), integers on the finest step
    mean = u.mean(dim=-1, keepdim=True) * finest
    square_sum, sum_ = (u**2).sum(dim=-1, keepdim=True), u.sum(dim=-1, keepdim=True)
    std = finest / channels * torch.sqrt(channels * square_sum - sum_**2)
    gain = finest / std * weight / out_scale
    magnitude = gain.abs()
    shift = torch.clamp(7 - torch.floor(torch.log2(magnitude)), 0, 31)
    mantissa = torch.clamp(torch.floor(magnitude * torch.pow(2, shift)), 0, 255)
    offset = ((bias - mean / std * weight) / out_scale * torch.pow(2, shift)).round()
    codes = ((gain.sign() * mantissa * u + offset) / torch.pow(2, shift)).round()
    return codes * out_scale


#: Fractional bits of the normalized value x_hat inside int_layernorm.
_XHAT_BITS = 16


def int_layernorm(
    x: Tensor,
    in_scale: Tensor,
    in_range: int,
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
        in_range: the largest ``|u|`` that occurs: code span times the largest factor.
        out_scale: (), step of the output grid.
        weight, bias: (C,).
        eps: LayerNorm's own, in squared units of the real input.
    Returns:
        (…, C), whole multiples of ``out_scale``, not yet saturated. Exact integers for inputs up to 12 bits;
        above, sums may pass 2**53 and are rounded to it.

    Source: FQ-ViT, section 4.1; I-BERT's integer root. Deviations: docs/numerics.md.
    """
    channels = x.shape[-1]
    finest = in_scale.min()
    u = torch.round(x / finest).double()  # |u| <= in_range < 2**12 for 8 bits with factors up to 8
    sum_ = u.sum(dim=-1, keepdim=True)
    variance = channels * (u * u).sum(dim=-1, keepdim=True) - sum_ * sum_  # < (C in_range / 2)**2
    guard = torch.round(eps * (channels / finest.double()) ** 2).clamp_max(2.0**50)
    # Fractional bits of the root, a constant of the layer: as many as keep its radicand within 2**52, where float64
    # roots floor exactly. The guard counts: it outweighs the variance where activations are small. Negative above
    # 12-bit inputs.
    root_bits = 26 - torch.ceil(torch.log2((channels * in_range / 2) ** 2 + guard) / 2)
    radicand = torch.floor((variance + guard) * torch.exp2(2 * root_bits)).clamp_max(2.0**52)
    root = radicand.sqrt().floor().clamp_min(1)
    reciprocal = torch.floor(torch.exp2(45 + root_bits) / root)
    # |C u - S| * reciprocal = |x_hat| 2**45 <= sqrt(C) 2**45 < 2**51
    x_hat = (channels * u - sum_) * reciprocal
    x_hat = torch.floor(x_hat * 2.0 ** (_XHAT_BITS - 45) + 0.5)
    gain, offset, shift = _dyadic_affine(weight.double() / out_scale, bias.double() / out_scale)
    # |x_hat gain| < 2**(6 + 16 + 24); floor(v + 1/2) rounds halves up, an add and a shift in integers
    codes = torch.floor((x_hat * gain + offset) * torch.exp2(-shift) + 0.5)
    return (codes * out_scale).to(out_scale.dtype)


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


def log_int_softmax_reference(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The published Log-Int-Softmax, emulated in float32 as published.

    I-BERT's integer exponential on the 8-bit logit scale, the sum divided by each term, and the quotient's
    logarithm rounded with threshold 1.5. NaN for scales above 1.67; see ``docs/numerics.md``.

    Args:
        x: (…, N) logits on the grid of ``scale``, which may have had a mask added.
        scale: ().
        bits: of the log2 codes.
    Returns:
        (…, N) powers of two or zero; rows need not sum to 1.

    Source: FQ-ViT, section 4.2 and its published code; Kim et al., I-BERT, ICML 2021.
    """
    b, c = 0.96963238 / 0.35815147, 1.0 / 0.35815147
    n = 30
    x_int = x / scale
    x_int = x_int - x_int.amax(dim=-1, keepdim=True)
    ln2 = torch.floor(-0.6931 / scale)
    x_int = torch.maximum(x_int, n * ln2)
    quotient = torch.floor(x_int / ln2)
    rest = x_int - ln2 * quotient
    poly = rest * (rest + torch.floor(b / scale)) + torch.floor(c / scale**2)  # the leading 0.358 cancels
    exp_int = torch.clamp(torch.floor(poly * 2 ** (n - quotient)), min=0)
    ratio = torch.round(exp_int.sum(dim=-1, keepdim=True) / exp_int)
    floor = ratio.log2().floor()
    # An infinite ratio compares as NaN, stays infinite, and ends as zero.
    exponent = torch.where(ratio - 2**floor >= 2 ** (floor - 1), floor + 1, floor)
    last = 2**bits - 1
    return torch.where(exponent > last, 0.0, 2.0 ** -torch.clamp(exponent, 0, last))


#: Fractional bits of the exponentials inside log_int_softmax: row sums of 4096 stay within 2**32.
_EXP_BITS = 20


def log_int_softmax_codes(distance: Tensor, scale: Tensor, bits: int, mask: Tensor | None = None) -> Tensor:
    """Log2 codes of the softmax of integer logits, ``k = round(log2(sum / exp))``; the last code is zero.

    The exponentials come from a table over the logit codes, ``round(2**20 exp(-d s))``, so they are as good as
    the logits at every scale; ``k`` is found by comparing integers, no logarithm is taken.

    A row in which every code would be zero (more than ``2**(2**bits - 1.5)`` equal tokens) counts its codes from its
    largest probability instead, whose code becomes 0: only their differences matter once the row is normalized.

    Args:
        distance: (…, N) int64, ``max(x_q) - x_q`` of the row, zero where masked out.
        scale: (), of the logits.
        bits: of the codes; ``2**bits - 1`` stands for probability zero.
        mask: bool, broadcasts to (…, N), true where attention is forbidden.
    Returns:
        (…, N) codes in float64.
    """
    reals = torch.exp(-torch.arange(int(distance.max()) + 1, device=scale.device) * scale.double())
    exp_table = torch.round(reals * 2.0**_EXP_BITS)
    # sum / exp >= 2**(k - 1/2)  <=>  sum / (exp / sqrt(2)) >= 2**k: the rounding threshold sits in the table.
    threshold_table = torch.round(reals * (2.0**_EXP_BITS / math.sqrt(2)))
    exp, threshold = exp_table[distance], threshold_table[distance]
    if mask is not None:
        exp, threshold = exp.masked_fill(mask, 0), threshold.masked_fill(mask, 0)
    ratio = exp.sum(dim=-1, keepdim=True) / threshold  # inf where the exponential vanished
    last = float(2**bits - 1)
    # frexp: ratio = m 2**e with m in [1/2, 1), so floor(log2(ratio)) = e - 1; quotients of 32-bit integers never
    # round up to a power of two in float64.
    exponent = (torch.frexp(ratio).exponent.double() - 1).masked_fill_(threshold == 0, torch.inf)
    least = exponent.amin(dim=-1, keepdim=True)
    exponent = torch.where(least < last, exponent, exponent - least)
    return exponent.clamp_(0, last)


def log_int_softmax(x: Tensor, scale: Tensor, bits: int, mask: Tensor | None = None) -> Tensor:
    """Log-Int-Softmax with rows that sum to 1: ``2**-k / sum(2**-k)`` of :func:`log_int_softmax_codes`.

    The row sum of powers of two is an integer; dividing by it removes the bias of rounding each exponent alone
    (the reference's rows sum to 1.08 on average). A row's product with V is then shifts, adds and one division.

    Args:
        x: (…, N) logits on the grid of ``scale``.
        scale: ().
        bits: of the log2 codes.
        mask: additive, broadcasts to ``x``; negative entries forbid attention altogether.
    Returns:
        (…, N) probabilities in ``x``'s dtype.

    Source: FQ-ViT, section 4.2. Deviations: docs/numerics.md.
    """
    forbidden = None if mask is None else (mask < 0).expand_as(x)
    x_q = torch.round(x / scale)
    top = x_q if forbidden is None else x_q.masked_fill(forbidden, -torch.inf)
    distance = top.amax(dim=-1, keepdim=True) - x_q
    distance = distance.clamp_min_(0).long()  # a forbidden logit may exceed the row's maximum
    k = log_int_softmax_codes(distance, scale, bits, forbidden)
    powers = torch.exp2(-k).masked_fill_(k >= 2**bits - 1, 0)
    return (powers / powers.sum(dim=-1, keepdim=True)).to(x.dtype)
