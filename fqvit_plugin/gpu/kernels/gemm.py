"""A linear layer up to its output's codes: int8 products, rescaling and, after the first layer of an MLP, GELU."""

import os

import triton
import triton.language as tl

from .rules import look_up, requantize

__all__ = ['linear_kernel']



def _set_blocks(arguments):
    """Tell the descriptors what blocks a choice reads and writes."""
    m, n, k = arguments['BLOCK_M'], arguments['BLOCK_N'], arguments['BLOCK_K']
    arguments['x_desc'].block_shape = [m, k]
    arguments['weight_desc'].block_shape = [n, k]
    arguments['out_desc'].block_shape = [m, arguments['PART']]


def _config(m, n, k, part, warps, stages):
    blocks = {'BLOCK_M': m, 'BLOCK_N': n, 'BLOCK_K': k, 'PART': part}
    return triton.Config(blocks, num_warps=warps, num_stages=stages, pre_hook=_set_blocks)


_CONFIGS = [
    _config(128, 256, 128, 64, 8, 3),
    _config(128, 128, 128, 64, 8, 3),
    _config(128, 128, 128, 64, 4, 3),
    _config(128, 64, 128, 64, 4, 3),
    _config(64, 128, 128, 64, 4, 3),
    _config(64, 64, 128, 64, 4, 3),
]
if os.environ.get('TRITON_INTERPRET') == '1':  # which cannot time anything
    _CONFIGS = [_config(64, 128, 64, 32, 4, 1)]


def _sensible(configs, named_arguments, **options):
    """Those whose blocks are not mostly empty."""
    arguments = {**named_arguments, **options}
    widest, deepest, highest = (max(64, 2 * arguments[name] - 1) for name in ('N', 'K', 'M'))
    fit = [
        c for c in configs
        if c.kwargs['BLOCK_N'] <= widest and c.kwargs['BLOCK_K'] <= deepest and c.kwargs['BLOCK_M'] <= highest
    ]  # fmt: skip
    return fit or configs[-1:]


def _quickly(kernel_call, quantiles):
    return triton.testing.do_bench(kernel_call, warmup=3, rep=12, quantiles=quantiles)


@triton.jit
def _finish(
    sums, top, left, out_desc, gain_ptr, offset_ptr, far_ptr, shift, table, ENTRIES: tl.constexpr,
    BIN: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes of some columns' sums, stored."""
    columns = left + tl.arange(0, COLUMNS)
    gain, offset = tl.load(gain_ptr + columns)[None, :], tl.load(offset_ptr + columns)[None, :]
    escape = 0
    if FAR:
        escape = tl.load(far_ptr + columns)[None, :]
    codes = requantize(sums, gain, offset, shift, LOW, HIGH, WIDE, escape, FAR)
    if ENTRIES:
        codes = look_up(table, codes, BIN, ROWS, COLUMNS)
    out_desc.store([top, left], codes.to(out_desc.dtype))


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a matrix."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.autotune(
    configs=_CONFIGS, key=['bucket', 'N', 'K', 'ENTRIES', 'FAR'], do_bench=_quickly,
    prune_configs_by={'early_config_prune': _sensible},
)  # fmt: skip
@triton.jit(do_not_specialize=['M', 'N', 'K', 'shift', 'bucket'])
def linear_kernel(
    x_desc,
    weight_desc,
    out_desc,
    gain_ptr,
    offset_ptr,
    table_ptr,
    far_ptr,
    M,
    N,
    K,
    shift,
    bucket,  # of M: sizes that share a choice of blocks
    COUNT: tl.constexpr,  # K, for the interpreter, which with numpy 2.4 counts to no other number; elsewhere 0
    ENTRIES: tl.constexpr,  # of the table; 0 without one
    BIN: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,  # whether there are escapes
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
):
    """(M, K) int8 codes and (N, K) int8 weights to (M, N) codes.

    gain, offset: int32, int64, up to a whole block beyond N. The offset holds the bias, the zero points and the half.
    far: int32, as far, escapes of :func:`fqvit_plugin.gpu.packing.pack_escape`.
    """
    # blocks of one strip of 8 rows follow each other: they share weights in the L2 cache
    pid = tl.program_id(0)
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    first = pid // (8 * across) * 8
    height = tl.minimum(down - first, 8)
    within = pid % (8 * across)
    top, left = (first + within % height) * BLOCK_M, within // height * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, COUNT if COUNT > 0 else K, BLOCK_K):
        x = x_desc.load([top, start])
        weight = weight_desc.load([left, start])
        sums = tl.dot(x, weight.T, sums, out_dtype=tl.int32)
    table = 0
    if ENTRIES:
        table = tl.load(table_ptr + tl.arange(0, ENTRIES))
    # by parts: the constants of all columns would not fit the registers
    if BLOCK_N == PART:
        _finish(
            sums, top, left, out_desc, gain_ptr, offset_ptr, far_ptr, shift, table, ENTRIES, BIN, WIDE, FAR, LOW,
            HIGH, BLOCK_M, PART,
        )  # fmt: skip
    else:
        halves = _halves(sums, BLOCK_M, BLOCK_N)
        for i in tl.static_range(2):
            at = left + i * (BLOCK_N // 2)
            if BLOCK_N == 2 * PART:
                _finish(
                    halves[i], top, at, out_desc, gain_ptr, offset_ptr, far_ptr, shift, table, ENTRIES, BIN, WIDE,
                    FAR, LOW, HIGH, BLOCK_M, PART,
                )  # fmt: skip
            else:
                quarters = _halves(halves[i], BLOCK_M, BLOCK_N // 2)
                for j in tl.static_range(2):
                    _finish(
                        quarters[j], top, at + j * PART, out_desc, gain_ptr, offset_ptr, far_ptr, shift, table,
                        ENTRIES, BIN, WIDE, FAR, LOW, HIGH, BLOCK_M, PART,
                    )  # fmt: skip
