"""The arithmetic that the kernels share; :mod:`fqvit_plugin.integer.kernels` holds its definition."""

import triton
import triton.language as tl

__all__ = ['integer_quotient', 'integer_root', 'look_up', 'requantize', 'saturate', 'scaled']


@triton.jit
def saturate(steps, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Stored codes of ``steps``, which hold the zero point, as int32."""
    return tl.minimum(tl.maximum(steps, LOW), HIGH).to(tl.int32)


@triton.jit
def scaled(total, shift, WIDE: tl.constexpr):
    """``total >> shift`` of int64, or, unless ``WIDE``, ``total >> (32 + shift)``: one shift of its high half."""
    if WIDE:
        result = total >> shift
    else:
        result = (total >> 32).to(tl.int32) >> shift
    return result


@triton.jit
def requantize(x, gain, offset, shift, LOW: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """``(x gain + offset) >> shift``, saturated; the half that rounds and the zero point are part of ``offset``.

    With ``x`` and ``gain`` in int32 it is one wide multiply-add.
    """
    return saturate(scaled(x.to(tl.int64) * gain.to(tl.int64) + offset, shift, WIDE), LOW, HIGH)


@triton.jit
def look_up(table, index, BIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Entries of a table of (ROWS, COLUMNS) indices; with ``BIN`` bits a bin, of a packed one.

    The table goes into shared memory, where the look-ups meet no more than a few bank conflicts.
    """
    flat = tl.reshape(index, (ROWS * COLUMNS,))
    entry = tl.reshape(tl.gather(table, flat >> BIN, 0), (ROWS, COLUMNS)).to(tl.int32)
    if BIN > 0:
        # before the step; where it is; its direction
        behind = (index & ((1 << BIN) - 1)) >= (entry & 127)
        entry = (entry >> 8) + tl.where(behind, 1 - ((entry >> 6) & 2), 0)
    return entry


@triton.jit
def integer_root(x):
    """``floor(sqrt(x))`` of int64 up to 2**52.

    A float64 holds such an x, and its root is at most one off, however it was rounded; two comparisons settle it.
    """
    root = tl.sqrt(x.to(tl.float64)).to(tl.int64)
    root = tl.where(root * root > x, root - 1, root)
    return tl.where((root + 1) * (root + 1) <= x, root + 1, root)


@triton.jit
def integer_quotient(a, b):
    """``floor(a / b)`` of int64: ``a`` a power of two, ``b`` from 1 to 2**52, the quotient below 2**52.

    Faster than an integer division, and as :func:`integer_root` at most one off before it is settled.
    """
    quotient = (a.to(tl.float64) / b.to(tl.float64)).to(tl.int64)
    quotient = tl.where(quotient * b > a, quotient - 1, quotient)
    return tl.where((quotient + 1) * b <= a, quotient + 1, quotient)
