"""A linear layer up to its output's codes: int8 products, rescaling and, after the first layer of an MLP, GELU."""

import os

import triton
import triton.language as tl

from .rules import requantize

__all__ = ['linear_kernel']


def _config(m, n, k, warps, stages):
    return triton.Config({'BLOCK_M': m, 'BLOCK_N': n, 'BLOCK_K': k}, num_warps=warps, num_stages=stages)


_CONFIGS = [
    _config(128, 128, 128, 8, 3),
    _config(128, 128, 64, 8, 4),
    _config(128, 64, 128, 4, 3),
    _config(64, 128, 64, 4, 4),
    _config(64, 64, 128, 4, 4),
]
if os.environ.get('TRITON_INTERPRET') == '1':  # which cannot time anything
    _CONFIGS = [_config(64, 64, 64, 4, 1)]


@triton.autotune(configs=_CONFIGS, key=['bucket', 'N', 'K', 'TABLE'])
@triton.jit(do_not_specialize=['M', 'shift', 'bucket'])
def linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    gain_ptr,
    offset_ptr,
    zero_ptr,
    table_ptr,
    M,
    shift,
    bucket,  # of M: sizes that share a choice of blocks
    N: tl.constexpr,
    K: tl.constexpr,
    TABLE: tl.constexpr,  # entries of the table, 0 without one
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(M, K) int8 codes and (N, K) int8 weights to (M, N) codes.

    gain, offset, zero: (N,) int32, int64, int32. The offset holds the bias, the zero point of ``x`` and the half.
    """
    # blocks of one strip of 8 rows follow each other: they share weights in the L2 cache
    pid = tl.program_id(0)
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    first = pid // (8 * across) * 8
    height = tl.minimum(down - first, 8)
    within = pid % (8 * across)
    rows = ((first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    terms = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows[:, None] * K + terms[None, :]
    weight_at = weight_ptr + columns[None, :].to(tl.int64) * K + terms[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_at, mask=(rows[:, None] < M) & (terms[None, :] < K - start), other=0)
        weight = tl.load(weight_at, mask=(columns[None, :] < N) & (terms[:, None] < K - start), other=0)
        sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    inside = columns < N
    gain = tl.load(gain_ptr + columns, mask=inside, other=0)[None, :]
    offset = tl.load(offset_ptr + columns, mask=inside, other=0)[None, :]
    zero = tl.load(zero_ptr + columns, mask=inside, other=0)[None, :]
    codes = requantize(sums, gain, offset, shift, zero, LOW, HIGH)
    if TABLE > 0:
        codes = tl.load(table_ptr + codes + TABLE // 2)
    out_at = out_ptr + rows[:, None] * N + columns[None, :]
    tl.store(out_at, codes.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & inside[None, :])
