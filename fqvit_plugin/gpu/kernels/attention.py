"""Attention, fused: scores, their codes, Log-Int-Softmax and the mean of the values, by blocks of queries."""

import triton
import triton.language as tl

from ...dyadic import MEAN_BITS, RECIPROCAL_BITS
from .rules import requantize, saturate

__all__ = ['attention_kernel']

_ONE = tl.constexpr(1 << RECIPROCAL_BITS)
_DROPPED = tl.constexpr(RECIPROCAL_BITS - MEAN_BITS)
_HALF = tl.constexpr(1 << (RECIPROCAL_BITS - MEAN_BITS - 1))

_SCALARS = [
    'score_gain', 'score_offset', 'score_shift', 'score_zero', 'gain_a', 'gain_b', 'sum_offset', 'sum_shift',
    'sum_zero', 'windows', 'zero_q', 'zero_k', 'zero_v', 'gain', 'half', 'shift', 'out_zero', 'distances', 'heads',
]  # fmt: skip


@triton.jit(do_not_specialize=_SCALARS)
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    powers_ptr,
    bias_ptr,
    mask_ptr,
    q_b, q_h, q_n, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    o_b, o_h, o_n, o_d,
    score_gain,
    score_offset,
    score_shift,
    score_zero,
    gain_a,
    gain_b,
    sum_offset,
    sum_shift,
    sum_zero,
    windows,
    zero_q,
    zero_k,
    zero_v,
    gain,
    half,
    shift,
    out_zero,
    distances,
    heads,
    N: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    SCORE_LOW: tl.constexpr,
    SCORE_HIGH: tl.constexpr,
    LOGIT_LOW: tl.constexpr,
    LOGIT_HIGH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,  # all tokens
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values (B, heads, N, D) int8, by their strides, to (B, heads, N, D) codes.

    powers: (distances,) int32, ``2**exponent`` of a distance from the row's maximum, or 0.
    bias: (heads, N, N) int8. mask: (windows, N, N), not 0 where attention is forbidden.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, dim = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    asked, known, used = query < N, token < N, dim < D
    b, h = batch.to(tl.int64), head.to(tl.int64)
    q_at = q_ptr + b * q_b + h * q_h + query[:, None] * q_n + dim[None, :] * q_d
    k_at = k_ptr + b * k_b + h * k_h + token[None, :] * k_n + dim[:, None] * k_d
    q = tl.load(q_at, mask=asked[:, None] & used[None, :], other=0)
    k = tl.load(k_at, mask=known[None, :] & used[:, None], other=0)
    # 2**16 a term and at most 2**8 dims
    sums = tl.dot(q, k, out_dtype=tl.int32)
    sums -= zero_k * tl.sum(q.to(tl.int32), 1)[:, None]
    sums -= zero_q * tl.sum(k.to(tl.int32), 0)[None, :]
    sums += zero_q * zero_k * D
    logits = requantize(sums, score_gain, score_offset, score_shift, score_zero, SCORE_LOW, SCORE_HIGH)
    allowed = asked[:, None] & known[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + (head * N + query[:, None]) * N + token[None, :], mask=allowed, other=0)
        steps = logits.to(tl.int64) * gain_a + bias.to(tl.int64) * gain_b + sum_offset
        logits = saturate(steps >> sum_shift, sum_zero, LOGIT_LOW, LOGIT_HIGH)
    open_ = known[None, :] & (query[:, None] >= 0)  # rows beyond the last query count too: no division by zero
    if MASK:
        window = (batch % windows).to(tl.int64)
        mask_at = mask_ptr + (window * N + query[:, None]) * N + token[None, :]
        open_ = open_ & (tl.load(mask_at, mask=allowed, other=0) == 0)
    logits = tl.where(open_, logits, -16384)
    distance = tl.minimum(tl.max(logits, 1)[:, None] - logits, distances - 1)
    power = tl.where(open_, tl.load(powers_ptr + distance), 0)  # at most 2**15
    total = tl.maximum(tl.sum(power, 1), 1).to(tl.int64)
    # -128 is an int8 number, 128 is not: the signs are taken back below
    low, high = (-(power & 255)).to(tl.int8), (-(power >> 8)).to(tl.int8)
    v_at = v_ptr + b * v_b + h * v_h + token[:, None] * v_n + dim[None, :] * v_d
    v = tl.load(v_at, mask=known[:, None] & used[None, :], other=0)
    weighted = tl.dot(low, v, out_dtype=tl.int32).to(tl.int64)
    weighted += tl.dot(high, v, out_dtype=tl.int32).to(tl.int64) << 8
    weighted = -weighted - (total * zero_v)[:, None]
    reciprocal = _ONE // total
    mean = (weighted * reciprocal[:, None] + _HALF) >> _DROPPED
    codes = saturate((mean * gain + half) >> shift, out_zero, LOW, HIGH)
    o_at = out_ptr + b * o_b + h * o_h + query[:, None] * o_n + dim[None, :] * o_d
    tl.store(o_at, codes.to(out_ptr.dtype.element_ty), mask=asked[:, None] & used[None, :])
