"""Kernels that walk rows of channels: residual sums, LayerNorm, and both at once."""

import triton
import triton.language as tl

from .rules import decoded, integer_quotient, integer_root, requantize, weighted_sum

__all__ = ['add_kernel', 'norm_kernel']


@triton.jit
def _channels(ptr, channel, known):
    """A row of int32 constants, one for each channel."""
    return tl.load(ptr + channel, mask=known, other=0)[None, :]


@triton.jit
def _joined(upper, lower):
    """int64 of its halves."""
    return (upper.to(tl.int64) << 32) | lower.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _wide(ptr, channel, known, CHANNELS: tl.constexpr):
    """A row of int64 constants; their lower halves lie behind the upper ones, so that threads get what they need."""
    return _joined(_channels(ptr, channel, known), _channels(ptr + CHANNELS, channel, known))


@triton.jit
def _add(
    a, b, gain_a_ptr, gain_b_ptr, offset_ptr, far_ptr, shift, channel, known, PER_CHANNEL: tl.constexpr,
    FAR: tl.constexpr, CHANNELS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Codes of a residual sum; the offset holds the zero points and the half.

    FAR: which have an escape: 1 for a, 2 for b, 4 for the sum; rows of ``far_ptr``.
    """
    a, b, escape = a.to(tl.int32), b.to(tl.int32), 0
    if FAR & 1:
        a = decoded(a, _channels(far_ptr, channel, known))
    if FAR & 2:
        b = decoded(b, _channels(far_ptr + CHANNELS, channel, known))
    if FAR & 4:
        escape = _channels(far_ptr + 2 * CHANNELS, channel, known)
    if PER_CHANNEL:
        gain_a, gain_b = _channels(gain_a_ptr, channel, known), _channels(gain_b_ptr, channel, known)
        offset = _wide(offset_ptr, channel, known, CHANNELS)
    else:
        gain_a, gain_b = tl.load(gain_a_ptr), tl.load(gain_b_ptr)
        offset = _joined(tl.load(offset_ptr), tl.load(offset_ptr + 1))
    return weighted_sum(a, b, gain_a, gain_b, offset, shift, LOW, HIGH, escape, FAR & 7)


@triton.jit(do_not_specialize=['rows', 'b_rows', 'shift'])
def add_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    gain_a_ptr,
    gain_b_ptr,
    offset_ptr,
    far_ptr,
    rows,
    b_rows,  # b repeats after so many
    shift,
    PER_CHANNEL: tl.constexpr,  # parameters are (CHANNELS,), else ()
    FAR: tl.constexpr,  # which tensors have escapes, see _add
    CHANNELS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of (rows, CHANNELS) and (b_rows, CHANNELS) codes."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    # by fours, as constants are loaded: codes then lie with the threads that hold their channels' constants
    channel = tl.program_id(1) * BLOCK_C + tl.max_contiguous(tl.arange(0, BLOCK_C), 4)
    known = channel < CHANNELS
    inside = (row < rows)[:, None] & known[None, :]
    at = row[:, None] * CHANNELS + channel[None, :]
    a = tl.load(a_ptr + at, mask=inside, other=0)
    b = tl.load(b_ptr + (row % b_rows)[:, None] * CHANNELS + channel[None, :], mask=inside, other=0)
    codes = _add(
        a, b, gain_a_ptr, gain_b_ptr, offset_ptr, far_ptr, shift, channel, known, PER_CHANNEL, FAR, CHANNELS, LOW,
        HIGH,
    )  # fmt: skip
    tl.store(out_ptr + at, codes.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normalize(
    codes, channel, known, zero_ptr, gain_ptr, offset_ptr, shifts_ptr, guard, left, right, numerator,
    CHANNELS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Codes of rows of codes, normalized; ``NARROW`` says that a row's sum of squares fits 32 bits."""
    # two small numbers in one: the power of two of the channel's step, and the shift of its result
    shifts = _channels(shifts_ptr, channel, known)
    # beyond the last channel there are zeros only
    u = (codes - _channels(zero_ptr, channel, known)) << (shifts & 15)
    total = tl.sum(u, 1)  # |u| <= 2**15, also far out: below 2**27 for 4096 channels
    if NARROW:
        squares = tl.sum((u * u).to(tl.uint32, bitcast=True), 1).to(tl.int64)
    else:
        squares = tl.sum((u * u).to(tl.int64), 1)
    variance = squares * CHANNELS - total.to(tl.int64) * total.to(tl.int64) + guard
    root = integer_root(tl.minimum((variance << left) >> right, 4503599627370496))  # 2**52
    reciprocal = integer_quotient(numerator, tl.maximum(root, 1))
    distance = u * CHANNELS - total[:, None]  # below 2**28
    x_hat = (distance.to(tl.int64) * reciprocal[:, None] + 268435456) >> 29  # 2**28; 16 fractional bits: below 2**24
    gain, offset = _channels(gain_ptr, channel, known), _wide(offset_ptr, channel, known, CHANNELS)
    return requantize(x_hat.to(tl.int32), gain, offset, shifts >> 4, LOW, HIGH, WIDE)


@triton.jit(
    do_not_specialize=['rows', 'shift', 'size', 'source_size', 'guard', 'left', 'right', 'numerator']
)
def norm_kernel(
    a_ptr,
    b_ptr,
    sum_ptr,
    out_ptr,
    source_ptr,
    target_ptr,
    gain_a_ptr,
    gain_b_ptr,
    add_offset_ptr,
    zero_ptr,
    gain_ptr,
    offset_ptr,
    shifts_ptr,
    far_ptr,
    rows,
    shift,
    size,  # rows of an image
    source_size,  # of an image: elements or rows of a
    guard,
    left,  # the radicand is (variance << left) >> right; one of them is 0
    right,
    numerator,
    ADD: tl.constexpr,  # 0: a alone is normalized; 1: a + b, with one gain each; 2: with a gain for each channel
    SOURCE: tl.constexpr,  # 0: a lies as it is; 1: its rows lie elsewhere; 2: its elements do
    TARGET: tl.constexpr,  # whether normalized rows go elsewhere
    FAR: tl.constexpr,  # which tensors have escapes: 8 for what is normalized, others as for _add
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    ADD_LOW: tl.constexpr,
    ADD_HIGH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of codes, or of the sum of two tensors of codes, which is stored, and their LayerNorm.

    source: (size,) int32, row of an image of ``a`` -- (size, CHANNELS) with ``SOURCE`` 2, its element.
    target: (size,) int32, the row where a normalized row goes. zero: (CHANNELS,) int32, of what is normalized.
    gain, shifts: (CHANNELS,) int32; ``shifts`` is ``shift * 16 + factor``. offset: (2, CHANNELS) int32, the upper and
    the lower halves of int64 numbers, which hold zero point and half; likewise that of the sum. far: (4, CHANNELS)
    int32, the escapes of a, b, their sum and what is normalized; read where ``FAR`` says so.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.max_contiguous(tl.arange(0, BLOCK_C), 4)  # as above
    known, stored = channel < CHANNELS, row < rows
    inside = stored[:, None] & known[None, :]
    image, place = (row // size).to(tl.int64), row % size
    at = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    if SOURCE == 0:
        from_at = at
    elif SOURCE == 1:
        source = tl.load(source_ptr + place, mask=stored, other=0)
        from_at = (image * source_size + source)[:, None] * CHANNELS + channel[None, :]
    else:
        source = tl.load(source_ptr + place[:, None] * CHANNELS + channel[None, :], mask=inside, other=0)
        from_at = image[:, None] * source_size + source
    codes = tl.load(a_ptr + from_at, mask=inside, other=0).to(tl.int32)
    if ADD:
        b = tl.load(b_ptr + at, mask=inside, other=0)
        codes = _add(
            codes, b, gain_a_ptr, gain_b_ptr, add_offset_ptr, far_ptr, shift, channel, known, ADD == 2, FAR, CHANNELS,
            ADD_LOW, ADD_HIGH,
        )  # fmt: skip
        tl.store(sum_ptr + at, codes.to(sum_ptr.dtype.element_ty), mask=inside)
    if FAR & 8:
        codes = decoded(codes, _channels(far_ptr + 3 * CHANNELS, channel, known))
    codes = _normalize(
        codes, channel, known, zero_ptr, gain_ptr, offset_ptr, shifts_ptr, guard, left, right, numerator, CHANNELS,
        LOW, HIGH, WIDE, NARROW,
    )  # fmt: skip
    if TARGET:
        target = tl.load(target_ptr + place, mask=stored, other=0)
        at = (image * size + target)[:, None] * CHANNELS + channel[None, :]
    tl.store(out_ptr + at, codes.to(out_ptr.dtype.element_ty), mask=inside)
