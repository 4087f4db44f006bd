"""Kernels that walk rows of channels: LayerNorm and residual sums."""

import triton
import triton.language as tl

from .rules import integer_root, saturate

__all__ = ['add_kernel', 'layernorm_kernel']


@triton.jit(do_not_specialize=['rows', 'guard', 'left', 'right', 'numerator'])
def layernorm_kernel(
    x_ptr,
    out_ptr,
    zero_ptr,
    factor_ptr,
    gain_ptr,
    offset_ptr,
    shift_ptr,
    out_zero_ptr,
    rows,
    guard,
    left,  # the radicand is (variance << left) >> right; one of them is 0
    right,
    numerator,
    CHANNELS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(rows, CHANNELS) codes to normalized codes; every parameter (CHANNELS,), the half is part of the offset."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    known = channel < CHANNELS
    inside = (row < rows)[:, None] & known[None, :]
    at = row[:, None] * CHANNELS + channel[None, :]
    zero = tl.load(zero_ptr + channel, mask=known, other=0)[None, :]
    factor = tl.load(factor_ptr + channel, mask=known, other=0).to(tl.int32)[None, :]
    u = (tl.load(x_ptr + at, mask=inside, other=0).to(tl.int32) - zero) << factor
    u = tl.where(inside, u, 0)
    total = tl.sum(u, 1).to(tl.int64)
    squares = tl.sum((u * u).to(tl.int64), 1)
    variance = squares * CHANNELS - total * total + guard
    radicand = tl.minimum((variance << left) >> right, 4503599627370496)  # 2**52
    root = tl.maximum(integer_root(radicand), 1)
    reciprocal = numerator // root
    x_hat = ((u.to(tl.int64) * CHANNELS - total[:, None]) * reciprocal[:, None] + 268435456) >> 29  # 2**28
    gain = tl.load(gain_ptr + channel, mask=known, other=0).to(tl.int64)[None, :]
    offset = tl.load(offset_ptr + channel, mask=known, other=0)[None, :]
    shift = tl.load(shift_ptr + channel, mask=known, other=0).to(tl.int64)[None, :]
    out_zero = tl.load(out_zero_ptr + channel, mask=known, other=0)[None, :]
    codes = saturate((x_hat * gain + offset) >> shift, out_zero, LOW, HIGH)
    tl.store(out_ptr + at, codes.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['rows', 'b_rows', 'shift'])
def add_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    gain_a_ptr,
    gain_b_ptr,
    offset_ptr,
    zero_ptr,
    rows,
    b_rows,  # b repeats after so many
    shift,
    PER_CHANNEL: tl.constexpr,  # parameters are (CHANNELS,), else ()
    CHANNELS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of (rows, CHANNELS) and (b_rows, CHANNELS) codes; the offset holds both zero points and the half."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < CHANNELS
    inside = (row < rows)[:, None] & known[None, :]
    if PER_CHANNEL:
        gain_a = tl.load(gain_a_ptr + channel, mask=known, other=0)[None, :].to(tl.int64)
        gain_b = tl.load(gain_b_ptr + channel, mask=known, other=0)[None, :].to(tl.int64)
        offset = tl.load(offset_ptr + channel, mask=known, other=0)[None, :]
        zero = tl.load(zero_ptr + channel, mask=known, other=0)[None, :]
    else:
        gain_a, gain_b = tl.load(gain_a_ptr).to(tl.int64), tl.load(gain_b_ptr).to(tl.int64)
        offset, zero = tl.load(offset_ptr), tl.load(zero_ptr)
    at = row[:, None] * CHANNELS + channel[None, :]
    a = tl.load(a_ptr + at, mask=inside, other=0).to(tl.int64)
    b = tl.load(b_ptr + (row % b_rows)[:, None] * CHANNELS + channel[None, :], mask=inside, other=0).to(tl.int64)
    codes = saturate((a * gain_a + b * gain_b + offset) >> shift, zero, LOW, HIGH)
    tl.store(out_ptr + at, codes.to(out_ptr.dtype.element_ty), mask=inside)
