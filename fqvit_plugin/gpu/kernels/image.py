"""The first step: codes of the image, cut into the patches that the first layer multiplies."""

import triton
import triton.language as tl

__all__ = ['patches_kernel']


@triton.jit(do_not_specialize=['rows', 'zero', 'value'])
def patches_kernel(
    image_ptr,
    out_ptr,
    scale_ptr,
    rows,
    zero,
    value,  # what padding holds
    DOWN: tl.constexpr,  # patches of an image, vertically
    ACROSS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(B, CHANNELS, HEIGHT, WIDTH) float32 to (B DOWN ACROSS, CHANNELS KERNEL_Y KERNEL_X) int8."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    term = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    terms: tl.constexpr = CHANNELS * KERNEL_Y * KERNEL_X
    known = (row < rows)[:, None] & (term < terms)[None, :]
    image, place = (row // (DOWN * ACROSS)).to(tl.int64), row % (DOWN * ACROSS)
    y = (place // ACROSS * STRIDE_Y - TOP)[:, None] + (term // KERNEL_X % KERNEL_Y)[None, :]
    x = (place % ACROSS * STRIDE_X - LEFT)[:, None] + (term % KERNEL_X)[None, :]
    inside = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    plane = image[:, None] * CHANNELS + (term // (KERNEL_X * KERNEL_Y))[None, :]
    pixel = tl.load(image_ptr + (plane * HEIGHT + y) * WIDTH + x, mask=known & inside, other=0.0)
    steps = tl.div_rn(pixel, tl.load(scale_ptr))
    # between whole numbers first, so that the large number, which rounds halves to even, is large enough
    steps = tl.minimum(tl.maximum(steps, (LOW - zero).to(tl.float32)), (HIGH - zero).to(tl.float32))
    codes = ((steps + 12582912.0) - 12582912.0).to(tl.int32) + zero  # 1.5 * 2**23
    codes = tl.where(inside, codes, value)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * terms + term[None, :], codes.to(tl.int8), mask=known)
