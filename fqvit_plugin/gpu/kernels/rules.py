"""The arithmetic that the kernels share; :mod:`fqvit_plugin.integer.kernels` holds its definition."""

import triton
import triton.language as tl

__all__ = ['integer_root', 'requantize', 'saturate']


@triton.jit
def saturate(steps, zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Stored codes of int64 ``steps``, as int32."""
    return tl.minimum(tl.maximum(steps + zero, LOW), HIGH).to(tl.int32)


@triton.jit
def requantize(x, gain, offset, shift, zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """``(x gain + offset) >> shift`` in int64, saturated; the half that rounds is part of ``offset``.

    With ``x`` and ``gain`` in int32 it is one wide multiply-add.
    """
    return saturate((x.to(tl.int64) * gain.to(tl.int64) + offset) >> shift, zero, LOW, HIGH)


@triton.jit
def integer_root(x):
    """``floor(sqrt(x))`` of int64 up to 2**52.

    A float64 holds such an x, and its root is at most one off, however it was rounded; two comparisons settle it.
    """
    root = tl.sqrt(x.to(tl.float64)).to(tl.int64)
    root = tl.where(root * root > x, root - 1, root)
    return tl.where((root + 1) * (root + 1) <= x, root + 1, root)
