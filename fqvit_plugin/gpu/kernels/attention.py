"""Attention, fused: scores, their codes, Log-Int-Softmax and the mean of the values, by blocks of queries."""

import os

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


def _config(queries, tokens, warps):
    # one stage: Triton 3.4 cannot overlap the loads of a loop with several products on Hopper
    return triton.Config({'BLOCK_Q': queries, 'BLOCK_T': tokens}, num_warps=warps, num_stages=1)


_CONFIGS = [_config(64, 64, 4), _config(64, 128, 8), _config(32, 256, 4), _config(64, 256, 8)]
if os.environ.get('TRITON_INTERPRET') == '1':  # which cannot time anything
    _CONFIGS = [_config(32, 64, 4)]


def _sensible(configs, named_arguments, **options):
    """Those whose blocks are not mostly empty."""
    return [config for config in configs if config.kwargs['BLOCK_T'] < max(65, 2 * options['N'])]


@triton.jit
def _logits(
    q, k, bias_at, mask_at, query, token, score_gain, score_offset, score_shift, score_zero, gain_a, gain_b,
    sum_offset, sum_shift, sum_zero, zero_q, zero_k, N: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, SCORE_LOW: tl.constexpr, SCORE_HIGH: tl.constexpr, LOGIT_LOW: tl.constexpr,
    LOGIT_HIGH: tl.constexpr,
):  # fmt: skip
    """Codes of a block's logits, -2**14 where attention is forbidden."""
    # 2**16 a term and at most 2**8 dims
    sums = tl.dot(q, k, out_dtype=tl.int32)
    sums -= zero_k * tl.sum(q.to(tl.int32), 1)[:, None]
    sums -= zero_q * tl.sum(k.to(tl.int32), 0)[None, :]
    sums += zero_q * zero_k * D
    logits = requantize(sums, score_gain, score_offset, score_shift, score_zero, SCORE_LOW, SCORE_HIGH)
    known = (query < N)[:, None] & (token < N)[None, :]
    if BIAS:
        bias = tl.load(bias_at, mask=known, other=0)
        steps = logits.to(tl.int64) * gain_a + bias.to(tl.int64) * gain_b + sum_offset
        logits = saturate(steps >> sum_shift, sum_zero, LOGIT_LOW, LOGIT_HIGH)
    if MASK:
        logits = tl.where(tl.load(mask_at, mask=known, other=0) == 0, logits, -16384)
    # rows beyond the last query keep the tokens: nothing is divided by zero there
    return tl.where((token < N)[None, :], logits, -16384)


@triton.autotune(configs=_CONFIGS, key=['N', 'D', 'BIAS', 'MASK'], prune_configs_by={'early_config_prune': _sensible})
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
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values (B, heads, N, D) int8, by their strides, to (B, heads, N, D) codes.

    powers: (distances,) int32, ``2**exponent`` of a distance from the row's maximum, or 0.
    bias: (heads, N, N) int8. mask: (windows, N, N), not 0 where attention is forbidden.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, dim = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    used = dim < D
    b, h = batch.to(tl.int64), head.to(tl.int64)
    q_at = q_ptr + b * q_b + h * q_h + query[:, None] * q_n + dim[None, :] * q_d
    q = tl.load(q_at, mask=(query < N)[:, None] & used[None, :], other=0)
    k_at = k_ptr + b * k_b + h * k_h + token[None, :] * k_n + dim[:, None] * k_d
    v_at = v_ptr + b * v_b + h * v_h + token[:, None] * v_n + dim[None, :] * v_d
    bias_at = bias_ptr + (head * N + query[:, None]) * N + token[None, :]
    mask_at = mask_ptr + ((batch % windows).to(tl.int64) * N + query[:, None]) * N + token[None, :]
    best = tl.full((BLOCK_Q,), -16384, tl.int32)
    if N > BLOCK_T:  # the maximum first: exponents are a table of the distance from it, which no running one allows
        for start in range(0, N, BLOCK_T):
            k = tl.load(k_at + start * k_n, mask=(token + start < N)[None, :] & used[:, None], other=0)
            logits = _logits(
                q, k, bias_at + start, mask_at + start, query, token + start, score_gain, score_offset, score_shift,
                score_zero, gain_a, gain_b, sum_offset, sum_shift, sum_zero, zero_q, zero_k, N, D, BIAS, MASK,
                SCORE_LOW, SCORE_HIGH, LOGIT_LOW, LOGIT_HIGH,
            )  # fmt: skip
            best = tl.maximum(best, tl.max(logits, 1))
    total = tl.zeros((BLOCK_Q,), dtype=tl.int32)
    low_sums = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.int32)
    high_sums = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.int32)
    for start in range(0, N, BLOCK_T):
        k = tl.load(k_at + start * k_n, mask=(token + start < N)[None, :] & used[:, None], other=0)
        v = tl.load(v_at + start * v_n, mask=(token + start < N)[:, None] & used[None, :], other=0)
        logits = _logits(
            q, k, bias_at + start, mask_at + start, query, token + start, score_gain, score_offset, score_shift,
            score_zero, gain_a, gain_b, sum_offset, sum_shift, sum_zero, zero_q, zero_k, N, D, BIAS, MASK,
            SCORE_LOW, SCORE_HIGH, LOGIT_LOW, LOGIT_HIGH,
        )  # fmt: skip
        if N <= BLOCK_T:
            best = tl.max(logits, 1)
        distance = tl.minimum(best[:, None] - logits, distances - 1)
        power = tl.where(logits > -16384, tl.load(powers_ptr + distance), 0)  # at most 2**15
        total += tl.sum(power, 1)
        # -128 is an int8 number, 128 is not: the signs are taken back below
        low_sums = tl.dot((-(power & 255)).to(tl.int8), v, low_sums, out_dtype=tl.int32)
        high_sums = tl.dot((-(power >> 8)).to(tl.int8), v, high_sums, out_dtype=tl.int32)
    total64 = tl.maximum(total, 1).to(tl.int64)
    reciprocal = _ONE // total64
    weighted = -low_sums.to(tl.int64) - (high_sums.to(tl.int64) << 8) - (total64 * zero_v)[:, None]
    mean = (weighted * reciprocal[:, None] + _HALF) >> _DROPPED
    codes = saturate((mean * gain + half) >> shift, out_zero, LOW, HIGH)
    o_at = out_ptr + b * o_b + h * o_h + query[:, None] * o_n + dim[None, :] * o_d
    tl.store(o_at, codes.to(out_ptr.dtype.element_ty), mask=(query < N)[:, None] & used[None, :])
