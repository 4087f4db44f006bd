"""The arithmetic that the kernels share; :mod:`fqvit_plugin.integer.kernels` holds its definition."""

import os

import triton
import triton.language as tl

from ...functional import PULL

__all__ = ['decoded', 'integer_quotient', 'integer_root', 'look_up', 'requantize', 'saturate', 'weighted_sum']

#: Whether instructions are named, which the interpreter cannot run. LLVM joins neighbouring 64-bit operations to
#: vectors and no longer sees that their factors have 32 bits: each product then takes four instructions, not one.
_ASSEMBLY = tl.constexpr(os.environ.get('TRITON_INTERPRET') != '1')
_PULL = tl.constexpr(PULL)
#: Where steps end that may escape: beyond every far value, and so near that int32 holds the distances.
_FURTHEST = tl.constexpr(2**27)


@triton.jit
def saturate(steps, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Stored codes of ``steps``, which hold the zero point, as int32."""
    return tl.minimum(tl.maximum(steps, LOW), HIGH).to(tl.int32)


@triton.jit
def decoded(codes, escape):
    """int32 codes of 8 bits; where one is the end that an escape took, what that end stands for instead.

    escape: of :func:`fqvit_plugin.gpu.packing.pack_escape`.
    """
    side = escape & 3
    end = tl.where(side == 1, -128, tl.where(side == 2, 127, 128))
    return tl.where(codes == end, escape >> 2, codes)


@triton.jit
def _escaped(steps, escape, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Stored codes of ``steps``, which hold the zero point, as int32: the end for what is nearer to a far value."""
    steps = saturate(steps, -_FURTHEST, _FURTHEST)
    side, far = escape & 3, escape >> 2
    below, above = (side == 1).to(tl.int32), (side == 2).to(tl.int32)
    ordinary = tl.minimum(tl.maximum(steps, LOW + below), HIGH - above)
    outside = ((side == 1) & (steps < ordinary)) | ((side == 2) & (steps > ordinary))
    escapes = outside & (tl.abs(steps - far) <= _PULL * tl.abs(steps - ordinary))
    return tl.where(escapes, saturate(far, LOW, HIGH), ordinary)


@triton.jit
def _codes(steps, escape, LOW: tl.constexpr, HIGH: tl.constexpr, FAR: tl.constexpr):
    """Stored codes of ``steps``, which hold the zero point; with ``FAR`` some channels have an escape."""
    return _escaped(steps, escape, LOW, HIGH) if FAR else saturate(steps, LOW, HIGH)


@triton.jit
def _high_steps(x, gain, offset, shift):
    """``(x gain + offset) >> (32 + shift)`` of int32, int32, int64 and int32."""
    if _ASSEMBLY:
        steps = tl.inline_asm_elementwise(
            '{ .reg .b64 t; .reg .b32 l, h; mad.wide.s32 t, $1, $2, $3; mov.b64 {l, h}, t; shr.s32 $0, h, $4; }',
            '=r,r,r,l,r', [x, gain, offset, shift], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        steps = ((x.to(tl.int64) * gain.to(tl.int64) + offset) >> 32).to(tl.int32) >> shift
    return steps


@triton.jit
def requantize(
    x, gain, offset, shift, LOW: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, escape=0,
    FAR: tl.constexpr = False,
):  # fmt: skip
    """``(x gain + offset) >> shift``, or ``>> (32 + shift)`` unless ``WIDE``, saturated.

    The half that rounds and the zero point are part of ``offset``. escape: with ``FAR``, of
    :func:`fqvit_plugin.gpu.packing.pack_escape`.
    """
    if WIDE:  # noqa: SIM108 - both sides of the shorter form must have one type
        steps = (x.to(tl.int64) * gain.to(tl.int64) + offset) >> shift
    else:
        steps = _high_steps(x, gain, offset, shift)
    return _codes(steps, escape, LOW, HIGH, FAR)


@triton.jit
def weighted_sum(
    a, b, gain_a, gain_b, offset, shift, LOW: tl.constexpr, HIGH: tl.constexpr, escape=0, FAR: tl.constexpr = 0
):
    """``(a gain_a + b gain_b + offset) >> shift`` of int32 codes and gains, saturated; the result fits 32 bits.

    FAR: 1, 2 and 4, added up: ``a``, ``b`` (whose 25 bits with gains of 30 make a result that leaves 32 bits) or the
    sum may be far out. escape: with 4, see :func:`requantize`.
    """
    if _ASSEMBLY:
        steps = tl.inline_asm_elementwise(
            '{ .reg .b64 t; mad.wide.s32 t, $1, $3, $5; mad.wide.s32 t, $2, $4, t; '
            'shr.s64 t, t, $6; ' + ('cvt.sat.s32.s64 $0, t; }' if FAR else 'cvt.u32.u64 $0, t; }'),
            '=r,r,r,r,r,l,r', [a, b, gain_a, gain_b, offset, shift], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        total = a.to(tl.int64) * gain_a.to(tl.int64) + b.to(tl.int64) * gain_b.to(tl.int64) + offset
        steps = total >> shift
        if FAR == 0:
            steps = steps.to(tl.int32)
    return _codes(steps, escape, LOW, HIGH, FAR & 4)


@triton.jit
def look_up(table, index, BIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Entries of a table of int32 at (ROWS, COLUMNS) indices; with ``BIN`` bits a bin, of a packed one.

    The table goes into shared memory, where the look-ups meet no more than a few bank conflicts.
    """
    flat = tl.reshape(index, (ROWS * COLUMNS,))
    entry = tl.reshape(tl.gather(table, flat >> BIN, 0), (ROWS, COLUMNS))
    if BIN > 0:  # the index within the bin, or its mirror image, carries into the code
        entry = (entry + ((index ^ (entry >> 24)) & ((1 << BIN) - 1))) >> 8
    return entry


@triton.jit
def integer_root(x):
    """``floor(sqrt(x))`` of int64 up to 2**52, as int32.

    The root of a float32 is off by less than 2**5, after a step of Newton's method by one; two comparisons settle it.
    """
    root = tl.sqrt(x.to(tl.float32)).to(tl.int32)
    rest = (x - root.to(tl.int64) * root.to(tl.int64)).to(tl.float32)
    root += (rest / (2.0 * tl.maximum(root, 1).to(tl.float32))).to(tl.int32)
    root = tl.where(root.to(tl.int64) * root.to(tl.int64) > x, root - 1, root)
    above = (root + 1).to(tl.int64)
    return tl.where(above * above <= x, root + 1, root)


@triton.jit
def integer_quotient(a, b):
    """``floor(a / b)`` of a power of two in int64 and an int32 of at least 1.

    Each float32 step leaves an error 2**21 times smaller, the third one of one at most; two comparisons settle it.
    """
    inverse = 1.0 / b.to(tl.float32)
    b = b.to(tl.int64)
    quotient = (a.to(tl.float32) * inverse).to(tl.int64)
    quotient += ((a - quotient * b).to(tl.float32) * inverse).to(tl.int64)
    quotient += ((a - quotient * b).to(tl.float32) * inverse).to(tl.int64)
    rest = a - quotient * b
    return tl.where(rest < 0, quotient - 1, tl.where(rest >= b, quotient + 1, quotient))
