"""Attention, fused: scores, their codes, Log-Int-Softmax and the mean of the values, by blocks of queries."""

import os

import triton
import triton.language as tl

from ...dyadic import MEAN_BITS, RECIPROCAL_BITS
from .rules import integer_quotient, requantize, weighted_sum

__all__ = ['attention_kernel']

assert RECIPROCAL_BITS == 44
_DROPPED = tl.constexpr(RECIPROCAL_BITS - MEAN_BITS)
_HALF = tl.constexpr(1 << (RECIPROCAL_BITS - MEAN_BITS - 1))


def _config(queries, tokens, warps, registers=None):
    # one stage: Triton cannot overlap the loads of a loop with several products on Hopper
    return triton.Config({'BLOCK_Q': queries, 'BLOCK_T': tokens}, num_warps=warps, num_stages=1, maxnreg=registers)


_CONFIGS = [
    _config(64, 64, 4),
    _config(64, 128, 4),
    _config(64, 256, 4),
    _config(64, 256, 4, 168),
    _config(64, 256, 8, 128),
    _config(128, 256, 8),
]
if os.environ.get('TRITON_INTERPRET') == '1':  # which cannot time anything
    _CONFIGS = [_config(32, 64, 4)]


def _sensible(configs, named_arguments, **options):
    """Those whose blocks are neither mostly empty nor make the scores be computed twice without need."""
    tokens = {**named_arguments, **options}['N']
    fit = [config for config in configs if tokens <= config.kwargs['BLOCK_T'] < max(65, 2 * tokens)]
    return fit or configs[:3]


@triton.jit
def _logits(
    q, k, q_sums, bias_at, mask_at, query, token, numbers_ptr, offsets_ptr, zero_q, N: tl.constexpr,
    PITCH: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, SCORE_LOW: tl.constexpr, SCORE_HIGH: tl.constexpr,
    LOGIT_LOW: tl.constexpr, LOGIT_HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Codes of a block's logits, far below them where attention is forbidden."""
    # 2**16 a term and at most 2**8 dims
    sums = tl.dot(q, k, out_dtype=tl.int32)
    sums = sums - q_sums[:, None] - (zero_q * tl.sum(k.to(tl.int32), 0))[None, :]
    gain, shift = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    logits = requantize(sums, gain, tl.load(offsets_ptr), shift, SCORE_LOW, SCORE_HIGH, WIDE)
    near = (query < N)[:, None] & (token < PITCH)[None, :]
    if BIAS:
        bias = tl.load(bias_at, mask=near, other=0).to(tl.int32)
        gain_a, gain_b, shift = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
        logits = weighted_sum(logits, bias, gain_a, gain_b, tl.load(offsets_ptr + 1), shift, LOGIT_LOW, LOGIT_HIGH)
    allowed = (token < N)[None, :]  # rows beyond the last query keep the tokens: nothing is divided by zero there
    if MASK:
        allowed = allowed & (tl.load(mask_at, mask=near, other=0) == 0)
    return tl.where(allowed, logits, tl.load(numbers_ptr + 12))


@triton.jit
def _weights(best, logits, octaves_ptr, numbers_ptr, DISTANCES: tl.constexpr, LAST: tl.constexpr):
    """Powers of two, from 2**15 at the row's maximum down to 2**0 and 0: in int32 and as the bits of float16."""
    distance = best[:, None] - logits
    if LAST == 0:
        octaves = tl.load(octaves_ptr + tl.minimum(distance, DISTANCES - 1))
        counted = (octaves < 16) & (logits > tl.load(numbers_ptr + 12))
    else:  # they lie along a line, at whose end what is forbidden lies too
        shift = tl.load(numbers_ptr + 6)
        octaves = (distance * tl.load(numbers_ptr + 5) + (1 << (shift - 1))) >> shift
        counted = octaves < LAST
    return tl.where(counted, 32768 >> octaves, 0), tl.where(counted, 30720 - octaves * 1024, 0)


@triton.jit
def _half(bits):
    """float16 of these bits."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.autotune(
    configs=_CONFIGS, key=['bucket', 'N', 'D', 'BIAS', 'MASK'], prune_configs_by={'early_config_prune': _sensible}
)
@triton.jit(do_not_specialize=['windows', 'heads', 'bucket'])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    octaves_ptr,
    bias_ptr,
    mask_ptr,
    numbers_ptr,
    offsets_ptr,
    q_b, q_h, q_n, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    o_b, o_h, o_n, o_d,
    windows,
    heads,
    bucket,  # of batch times heads: sizes that share a choice of blocks
    N: tl.constexpr,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    DISTANCES: tl.constexpr,
    LAST: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    WIDE: tl.constexpr,
    MEAN_WIDE: tl.constexpr,
    LONG: tl.constexpr,  # more than 256 tokens: sums of weighted values may not fit 32 bits
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

    octaves: (DISTANCES,) int32, 15 less the exponent of a distance from the row's maximum, 16 for none; read if
    ``LAST`` is 0. bias: (heads, N, PITCH) int8. mask: (windows, N, PITCH), not 0 where attention is forbidden.
    numbers: int32: gain, shift of the scores; both gains, shift of the sum with the bias; slope and shift of the
    octaves; gain, shift of the mean; zero points of queries, keys and values; a logit that counts as forbidden.
    offsets: int64, of scores, sum and mean.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, dim = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    used = dim < D
    b, h = batch.to(tl.int64), head.to(tl.int64)
    zero_q, zero_k = tl.load(numbers_ptr + 9), tl.load(numbers_ptr + 10)
    q_at = q_ptr + b * q_b + h * q_h + query[:, None] * q_n + dim[None, :] * q_d
    q = tl.load(q_at, mask=(query < N)[:, None] & used[None, :], other=0)
    q_sums = zero_k * tl.sum(q.to(tl.int32), 1) - zero_q * zero_k * D
    k_at = k_ptr + b * k_b + h * k_h + token[None, :] * k_n + dim[:, None] * k_d
    v_at = v_ptr + b * v_b + h * v_h + token[:, None] * v_n + dim[None, :] * v_d
    bias_at = bias_ptr + (head * N + query[:, None]) * PITCH + token[None, :]
    mask_at = mask_ptr + ((batch % windows) * N + query[:, None]) * PITCH + token[None, :]
    best = tl.full((BLOCK_Q,), -128, tl.int32)
    if N > BLOCK_T:  # the maximum first: exponents are a table of the distance from it, which no running one allows
        for start in range(0, N, BLOCK_T):
            k = tl.load(k_at + start * k_n, mask=(token + start < N)[None, :] & used[:, None], other=0)
            logits = _logits(
                q, k, q_sums, bias_at + start, mask_at + start, query, token + start, numbers_ptr, offsets_ptr,
                zero_q, N, PITCH, BIAS, MASK, SCORE_LOW, SCORE_HIGH, LOGIT_LOW, LOGIT_HIGH, WIDE,
            )  # fmt: skip
            best = tl.maximum(best, tl.max(logits, 1))
    total = tl.zeros((BLOCK_Q,), dtype=tl.int32)
    sums = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.int64 if LONG else tl.int32)
    for start in range(0, N, BLOCK_T):
        k = tl.load(k_at + start * k_n, mask=(token + start < N)[None, :] & used[:, None], other=0)
        v = tl.load(v_at + start * v_n, mask=(token + start < N)[:, None] & used[None, :], other=0)
        logits = _logits(
            q, k, q_sums, bias_at + start, mask_at + start, query, token + start, numbers_ptr, offsets_ptr,
            zero_q, N, PITCH, BIAS, MASK, SCORE_LOW, SCORE_HIGH, LOGIT_LOW, LOGIT_HIGH, WIDE,
        )  # fmt: skip
        if N <= BLOCK_T:
            best = tl.max(logits, 1)
        weight, bits = _weights(best, logits, octaves_ptr, numbers_ptr, DISTANCES, LAST)
        total += tl.sum(weight, 1)
        # As float16, values and weights spare the turning around of values that int8 products would want. A weight
        # is cut in two, multiples of 256 and the rest, each so small that float32 holds the sums of 256 products.
        v16 = _half((v.to(tl.int16) + 128) | 0x6400) - 1152.0  # 1024 + 128
        weight16 = _half(bits)
        high = _half(tl.maximum(bits, 23552))  # 256.0
        sums += tl.dot(high, v16).to(sums.dtype)
        sums += tl.dot(weight16 - high, v16).to(sums.dtype)
    # every row holds a token at its maximum, which counts 2**15: the reciprocal has 30 bits
    total = tl.maximum(total, 32768)
    zero_v = tl.load(numbers_ptr + 11)
    one = tl.full((BLOCK_Q,), 17592186044416, tl.int64)  # 2**RECIPROCAL_BITS
    reciprocal = integer_quotient(one, total).to(tl.int32)[:, None]
    weighted = sums - (total.to(sums.dtype) * zero_v)[:, None]
    mean = ((weighted.to(tl.int64) * reciprocal.to(tl.int64) + _HALF) >> _DROPPED).to(tl.int32)
    gain, shift = tl.load(numbers_ptr + 7), tl.load(numbers_ptr + 8)
    codes = requantize(mean, gain, tl.load(offsets_ptr + 2), shift, LOW, HIGH, MEAN_WIDE)
    o_at = out_ptr + b * o_b + h * o_h + query[:, None] * o_n + dim[None, :] * o_d
    tl.store(o_at, codes.to(out_ptr.dtype.element_ty), mask=(query < N)[:, None] & used[None, :])
