"""Attention, fused: scores, their codes, Log-Int-Softmax and the mean of the values, by blocks of queries."""

import os

import triton
import triton.language as tl

from ...dyadic import MEAN_BITS, RECIPROCAL_BITS
from .rules import integer_quotient, requantize, saturate, scaled

__all__ = ['attention_kernel']

assert RECIPROCAL_BITS == 44
_DROPPED = tl.constexpr(RECIPROCAL_BITS - MEAN_BITS)
_HALF = tl.constexpr(1 << (RECIPROCAL_BITS - MEAN_BITS - 1))


def _config(queries, tokens, warps):
    # one stage: Triton 3.4 cannot overlap the loads of a loop with several products on Hopper
    return triton.Config({'BLOCK_Q': queries, 'BLOCK_T': tokens}, num_warps=warps, num_stages=1)


_CONFIGS = [_config(64, 64, 4), _config(64, 128, 4), _config(64, 256, 4), _config(64, 256, 8), _config(128, 256, 8)]
if os.environ.get('TRITON_INTERPRET') == '1':  # which cannot time anything
    _CONFIGS = [_config(32, 64, 4)]


def _sensible(configs, named_arguments, **options):
    """Those whose blocks are neither mostly empty nor make the scores be computed twice without need."""
    tokens = {**named_arguments, **options}['N']
    fit = [config for config in configs if tokens <= config.kwargs['BLOCK_T'] < max(65, 2 * tokens)]
    return fit or configs[:3]


@triton.jit
def _logits(
    q, k, q_sums, bias_at, mask_at, query, token, numbers_ptr, zero_q, N: tl.constexpr, PITCH: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, SCORE_LOW: tl.constexpr, SCORE_HIGH: tl.constexpr,
    LOGIT_LOW: tl.constexpr, LOGIT_HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Codes of a block's logits, far below them where attention is forbidden."""
    # 2**16 a term and at most 2**8 dims
    sums = tl.dot(q, k, out_dtype=tl.int32)
    sums = sums - q_sums[:, None] - (zero_q * tl.sum(k.to(tl.int32), 0))[None, :]
    gain, offset, shift = tl.load(numbers_ptr).to(tl.int32), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
    logits = requantize(sums, gain, offset, shift.to(tl.int32), SCORE_LOW, SCORE_HIGH, WIDE)
    near = (query < N)[:, None] & (token < PITCH)[None, :]
    if BIAS:
        bias = tl.load(bias_at, mask=near, other=0)
        gain_a, gain_b = tl.load(numbers_ptr + 3).to(tl.int32), tl.load(numbers_ptr + 4).to(tl.int32)
        steps = logits.to(tl.int64) * gain_a.to(tl.int64) + bias.to(tl.int64) * gain_b.to(tl.int64)
        steps = scaled(steps + tl.load(numbers_ptr + 5), tl.load(numbers_ptr + 6), True)
        logits = saturate(steps, LOGIT_LOW, LOGIT_HIGH)
    if MASK:
        logits = tl.where(tl.load(mask_at, mask=near, other=0) == 0, logits, -16384)
    # rows beyond the last query keep the tokens: nothing is divided by zero there
    return tl.where((token < N)[None, :], logits, -16384)


@triton.jit
def _powers(best, logits, powers_ptr, numbers_ptr, DISTANCES: tl.constexpr, LAST: tl.constexpr):
    """Powers of two of the distances from the row's maximum, 0 where attention is forbidden; at most 2**15."""
    distance = best[:, None] - logits
    if LAST == 0:
        power = tl.load(powers_ptr + tl.minimum(distance, DISTANCES - 1))
    else:  # the exponents fall along a line
        slope, shift = tl.load(numbers_ptr + 7).to(tl.int32), tl.load(numbers_ptr + 8).to(tl.int32)
        octaves = (tl.minimum(distance, DISTANCES - 1) * slope + (1 << (shift - 1))) >> shift
        power = 32768 >> tl.minimum(octaves, 16)
        if LAST < 16:
            power = tl.where(octaves < LAST, power, 0)
    return tl.where(logits > -16384, power, 0)


@triton.autotune(configs=_CONFIGS, key=['N', 'D', 'BIAS', 'MASK'], prune_configs_by={'early_config_prune': _sensible})
@triton.jit(do_not_specialize=['windows', 'heads'])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    powers_ptr,
    bias_ptr,
    mask_ptr,
    numbers_ptr,
    q_b, q_h, q_n, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    o_b, o_h, o_n, o_d,
    windows,
    heads,
    N: tl.constexpr,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    DISTANCES: tl.constexpr,
    LAST: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    WIDE: tl.constexpr,
    MEAN_WIDE: tl.constexpr,
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

    powers: (DISTANCES,) int32, ``2**exponent`` of a distance from the row's maximum, or 0; read if ``LAST`` is 0.
    bias: (heads, N, PITCH) int8. mask: (windows, N, PITCH), not 0 where attention is forbidden.
    numbers: int64: gain, offset, shift of the scores; both gains, offset, shift of the sum with the bias; slope and
    shift of the exponents; gain, offset, shift of the mean; zero points of queries, keys and values.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, dim = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    used = dim < D
    b, h = batch.to(tl.int64), head.to(tl.int64)
    zero_q, zero_k = tl.load(numbers_ptr + 12).to(tl.int32), tl.load(numbers_ptr + 13).to(tl.int32)
    q_at = q_ptr + b * q_b + h * q_h + query[:, None] * q_n + dim[None, :] * q_d
    q = tl.load(q_at, mask=(query < N)[:, None] & used[None, :], other=0)
    q_sums = zero_k * tl.sum(q.to(tl.int32), 1) - zero_q * zero_k * D
    k_at = k_ptr + b * k_b + h * k_h + token[None, :] * k_n + dim[:, None] * k_d
    v_at = v_ptr + b * v_b + h * v_h + token[:, None] * v_n + dim[None, :] * v_d
    bias_at = bias_ptr + (head * N + query[:, None]) * PITCH + token[None, :]
    mask_at = mask_ptr + ((batch % windows) * N + query[:, None]) * PITCH + token[None, :]
    best = tl.full((BLOCK_Q,), -16384, tl.int32)
    if N > BLOCK_T:  # the maximum first: exponents are a table of the distance from it, which no running one allows
        for start in range(0, N, BLOCK_T):
            k = tl.load(k_at + start * k_n, mask=(token + start < N)[None, :] & used[:, None], other=0)
            logits = _logits(
                q, k, q_sums, bias_at + start, mask_at + start, query, token + start, numbers_ptr, zero_q, N, PITCH, BIAS,
                MASK, SCORE_LOW, SCORE_HIGH, LOGIT_LOW, LOGIT_HIGH, WIDE,
            )  # fmt: skip
            best = tl.maximum(best, tl.max(logits, 1))
    total = tl.zeros((BLOCK_Q,), dtype=tl.int32)
    low_sums = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.int32)
    high_sums = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.int32)
    for start in range(0, N, BLOCK_T):
        k = tl.load(k_at + start * k_n, mask=(token + start < N)[None, :] & used[:, None], other=0)
        v = tl.load(v_at + start * v_n, mask=(token + start < N)[:, None] & used[None, :], other=0)
        logits = _logits(
            q, k, q_sums, bias_at + start, mask_at + start, query, token + start, numbers_ptr, zero_q, N, PITCH, BIAS, MASK,
            SCORE_LOW, SCORE_HIGH, LOGIT_LOW, LOGIT_HIGH, WIDE,
        )  # fmt: skip
        if N <= BLOCK_T:
            best = tl.max(logits, 1)
        power = _powers(best, logits, powers_ptr, numbers_ptr, DISTANCES, LAST)
        total += tl.sum(power, 1)
        # -128 is an int8 number, 128 is not: the signs are taken back below
        low_sums = tl.dot((-(power & 255)).to(tl.int8), v, low_sums, out_dtype=tl.int32)
        high_sums = tl.dot(((255 - power) >> 8).to(tl.int8), v, high_sums, out_dtype=tl.int32)
    # every row holds a token at its maximum, which counts 2**15: the reciprocal has 30 bits
    total = tl.maximum(total, 32768)
    zero_v = tl.load(numbers_ptr + 14).to(tl.int32)
    one = tl.full((BLOCK_Q,), 17592186044416, tl.int64)  # 2**RECIPROCAL_BITS
    reciprocal = integer_quotient(one, total.to(tl.int64)).to(tl.int32)
    if MEAN_WIDE:
        total64 = total.to(tl.int64)
        weighted = -low_sums.to(tl.int64) - (high_sums.to(tl.int64) << 8) - (total64 * zero_v)[:, None]
    else:
        weighted = -low_sums - (high_sums << 8) - (total * zero_v)[:, None]
    mean = ((weighted.to(tl.int64) * reciprocal.to(tl.int64)[:, None] + _HALF) >> _DROPPED).to(tl.int32)
    gain, offset, shift = tl.load(numbers_ptr + 9), tl.load(numbers_ptr + 10), tl.load(numbers_ptr + 11)
    codes = saturate(scaled(mean.to(tl.int64) * gain + offset, shift, True), LOW, HIGH)
    o_at = out_ptr + b * o_b + h * o_h + query[:, None] * o_n + dim[None, :] * o_d
    tl.store(o_at, codes.to(out_ptr.dtype.element_ty), mask=(query < N)[:, None] & used[None, :])
