"""What the simulation does between two matrix products, each thing once: in PyTorch, and in one pass of C++.

The C++ of ``cpp/simulation.cpp`` serves contiguous float32 tensors on a CPU, where every pass over memory counts;
compilers, GPUs and machines without a C++ compiler take PyTorch's way. Both give the same bits, because every number
is a whole one that its type holds. ``FQVIT_NATIVE=0`` in the environment switches the C++ off.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch import is_compiling
from .compiled import load_library
from .dyadic import MEAN_BITS, RECIPROCAL_BITS, AddRule, MeanRule, Rescale
from .escape import escaped_steps, limits
from .intmath import (
    LARGEST_EXPONENT,
    LayerNormConstants,
    by_slices,
    log_int_powers_,
    log_int_softmax_shift,
    whole_layernorm,
)

__all__ = [
    'Add',
    'Affine',
    'Finish',
    'ToEscape',
    'ToGrid',
    'ToTable',
    'add',
    'affine',
    'layernorm',
    'powers',
    'weighted_mean',
    'whole_steps',
]

#: Elements of a slice in PyTorch's way: float64 copies of them stay in the cache.
_SLICE = 1 << 17
SOURCE = Path(__file__).parent / 'cpp' / 'simulation.cpp'


# ------------------------------------------------------------------------------------------------ constants


def _row(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """() or (C,) as (C,)."""
    return x.to(dtype).expand(channels).contiguous()


class Affine(NamedTuple):
    """``floor(x gain + offset)``: (C,) float64 each, the offset with the half that rounds."""

    gain: Tensor
    offset: Tensor

    @classmethod
    def of(cls, rule: Rescale, channels: int) -> Affine:
        """A dyadic rule; powers of two go into the constants, which changes no bit."""
        shrink = torch.exp2(-rule.shift)
        pair = (rule.gain * shrink, rule.offset * shrink + 0.5)
        return cls(*(_row(t, channels, torch.float64) for t in pair))


class Add(NamedTuple):
    """``floor(round(a / scale_a) gain_a + round(b / scale_b) gain_b + 1/2)``: (C,), reciprocals in float32."""

    inverse_a: Tensor
    inverse_b: Tensor
    gain_a: Tensor
    gain_b: Tensor

    @classmethod
    def of(cls, rule: AddRule, scale_a: Tensor, scale_b: Tensor, channels: int) -> Add:
        """A dyadic rule and the grids of the operands."""
        shrink = torch.exp2(-rule.shift)
        inverses = (_row(1 / s, channels, torch.float32) for s in (scale_a, scale_b))
        gains = (_row(g * shrink, channels, torch.float64) for g in (rule.gain_a, rule.gain_b))
        return cls(*inverses, *gains)


class ToGrid(NamedTuple):
    """Whole steps to the nearest of a grid's points: ``clamp(steps, low, high) scale``, (C,) float32 each."""

    low: Tensor
    high: Tensor
    scale: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor, scale: Tensor, channels: int) -> ToGrid:
        """From () or (C,)."""
        return cls(*(_row(t, channels, torch.float32) for t in (low, high, scale)))

    def finish(self, steps: Tensor) -> Tensor:
        """PyTorch's way; float32."""
        # clamp_ with two tensors is not vectorized on CPUs: twenty times slower than these two
        return steps.float().clamp_min_(self.low).clamp_max_(self.high).mul_(self.scale)


class ToTable(NamedTuple):
    """Whole steps to ``table[steps - first]``, the ends for what lies beyond; the table is float32."""

    table: Tensor
    first: int

    def finish(self, steps: Tensor) -> Tensor:
        """PyTorch's way; float32."""
        last = self.first + len(self.table) - 1
        index = steps.clamp_(self.first, last).sub_(self.first).int()
        return self.table.index_select(0, index.flatten()).view(index.shape)


class ToEscape(NamedTuple):
    """Whole steps to the nearest of a grid's points and of far ones, see :mod:`fqvit_plugin.escape`; (C,) float32."""

    low: Tensor
    high: Tensor
    far: Tensor
    scale: Tensor

    @classmethod
    def of(cls, grid: ToGrid, far: Tensor) -> ToEscape:
        """From a grid and whole steps."""
        far = far.float()
        return cls(*limits(grid.low, grid.high, far), far, grid.scale)

    def finish(self, steps: Tensor) -> Tensor:
        """PyTorch's way; float32."""
        return escaped_steps(steps.float(), self.low, self.high, self.far).mul_(self.scale)


Finish = ToGrid | ToTable | ToEscape


def _grid_before(finish: Finish, x: Tensor) -> ToGrid:
    """What a pass that knows grids alone does of ``finish`` to (…, C)."""
    if isinstance(finish, ToGrid):
        return finish
    one = torch.ones(x.shape[-1])
    if isinstance(finish, ToEscape):  # float32 holds whole numbers up to 2**24
        return ToGrid(one * -(2.0**24), one * 2.0**24, one)
    return ToGrid(one * finish.first, one * (finish.first + len(finish.table) - 1), one)


def _rest_after(finish: Finish, x: Tensor) -> Tensor:
    """The rest of ``finish``, in place."""
    if isinstance(finish, ToEscape):
        return x.copy_(finish.finish(x))
    if isinstance(finish, ToTable):
        rows, channels = x.numel() // x.shape[-1], x.shape[-1]
        identity = torch.ones(channels, dtype=torch.float64)
        _call(_library().fq_table, x, x, rows, channels, identity, identity / 2, *_table(finish))
    return x


def _table(finish: ToTable) -> tuple[Tensor, int, int]:
    return finish.table, finish.first, len(finish.table)


# ------------------------------------------------------------------------------------------------ C++


@cache
def _library() -> Any:
    """The compiled functions, or None where there is no compiler or they are not wanted."""
    if os.environ.get('FQVIT_NATIVE') == '0':
        return None
    try:
        return load_library(SOURCE)
    except (RuntimeError, OSError):
        return None


def _native(*tensors: Tensor) -> Any:
    """The library, if it can serve these tensors."""
    if is_compiling() or torch.is_grad_enabled():
        return None
    plain = all(t.device.type == 'cpu' and t.dtype is torch.float32 and t.is_contiguous() for t in tensors)
    return _library() if plain and all(t.numel() for t in tensors) else None


def _call(function: Any, *arguments: Any) -> None:
    """Call with tensors as pointers, ints as int64 and floats as given by ctypes."""
    function.restype = None
    function(*(_argument(a) for a in arguments))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value


# ------------------------------------------------------------------------------------------------ passes


def affine(x: Tensor, rule: Affine, finish: Finish) -> Tensor:
    """Accumulators (…, C) of at most 28 bits to a grid or through a table, float32; may overwrite ``x``."""
    if lib := _native(x):
        rows, channels = x.numel() // x.shape[-1], x.shape[-1]
        if isinstance(finish, ToTable):
            _call(lib.fq_table, x, x, rows, channels, *rule, *_table(finish))
            return x
        _call(lib.fq_rescale, x, x, rows, channels, *rule, *_grid_before(finish, x))
        return _rest_after(finish, x)
    out = x if x.dtype is torch.float32 else torch.empty_like(x, dtype=torch.float32)
    # |x gain| < 2**52 and |offset| <= 2**51
    return by_slices(
        lambda rows: finish.finish(torch.addcmul(rule.offset, rows.double(), rule.gain).floor_()),
        x,
        out=out,
        size=_SLICE,
    )


def add(a: Tensor, b: Tensor, rule: Add, finish: Finish) -> Tensor:
    """The sum of reals on two grids, (…, C), on a third; ``b`` broadcasts to ``a`` along leading axes."""
    a, b = a.contiguous(), b.contiguous()
    if (lib := _native(a, b)) and _is_tail(b.shape, a.shape):
        channels, out = a.shape[-1], torch.empty_like(a)
        grid = _grid_before(finish, out)
        _call(lib.fq_add, a, b, out, a.numel() // channels, b.numel() // channels, channels, *rule, *grid)
        return _rest_after(finish, out)

    def rows(a: Tensor, second: Tensor) -> Tensor:
        first = torch.mul(a, rule.inverse_a).round_().double()
        return finish.finish(torch.addcmul(second, first, rule.gain_a).floor_())

    def second(b: Tensor) -> Tensor:
        return torch.mul(b, rule.inverse_b).round_().double().mul_(rule.gain_b).add_(0.5)

    if a.shape == b.shape:
        return by_slices(lambda a, b: rows(a, second(b)), a, b, out=torch.empty_like(a), size=_SLICE)
    return rows(a, second(b))


def _is_tail(shape: Sequence[int], of: Sequence[int]) -> bool:
    """Whether ``shape`` without leading ones is how ``of`` ends."""
    shape = list(shape)
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return list(of[len(of) - len(shape) :]) == shape


def whole_steps(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale``, rounded: the steps of reals that lie on the grid of ``scale`` (). A new tensor."""
    # by the reciprocal: either is far nearer to the whole number than half a step
    if (lib := _native(x)) and scale.device.type == 'cpu':
        out = torch.empty_like(x)
        inverse = ctypes.c_float(float(1 / scale))
        _call(lib.fq_steps, x, out, x.numel() // x.shape[-1], x.shape[-1], inverse)
        return out
    return torch.mul(x, 1 / scale).round_()


def powers(steps: Tensor, scale: Tensor, bits: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-Int-Softmax: the powers of rows of steps, those of two above 2**-7.5 and the others, and their sum.

    Args:
        steps: (…, T), or (B, windows, heads, N, T) with a mask; overwritten.
        scale: (), of the logits.
        bits: of the codes.
        mask: (windows, 1, N, T), negative where attention is forbidden.

    Returns:
        (…, T) twice, and (…, 1).
    """
    masks = () if mask is None else (mask.contiguous(),)
    if lib := _native(steps, *masks):
        low, total = torch.empty_like(steps), steps.new_empty(*steps.shape[:-1], 1)
        octaves, zero = float(log_int_softmax_shift(scale)), float(min(2**bits - 1, LARGEST_EXPONENT + 1))
        shape = (0, 0, 0) if mask is None else (steps.shape[1], steps.shape[2], steps.shape[3])
        _call(
            lib.fq_powers, steps, steps, low, total, total.numel(), steps.shape[-1],
            ctypes.c_float(octaves), ctypes.c_float(zero), masks[0] if masks else ctypes.c_void_p(None), *shape,
        )  # fmt: skip
        return steps, low, total
    both = log_int_powers_(steps, scale, bits, mask)
    total = both.sum(dim=-1, keepdim=True)  # exact up to 512 tokens
    high = torch.threshold(both, 2.0**-7.5, 0.0)
    return high, both - high, total


def weighted_mean(high: Tensor, low: Tensor, total: Tensor, rule: MeanRule, finish: Finish) -> Tensor:
    """``(high + low) / total`` in steps of the values to the grid of the result, with one division for each row.

    ``r = 2**44 // total``, then ``m = (sums r + 2**27) >> 28`` (16 fractional bits) and
    ``(m gain + 2**(shift + 15)) >> (shift + 16)``, with ``sums`` and ``total`` in units of 2**-15.

    Args:
        high, low: (…, D) float32, multiples of 2**-7 and 2**-15; ``high`` is overwritten.
        total: (…, 1) float32, multiples of 2**-15 from 1 to 2**14.
    """
    gain = rule.gain * torch.exp2(-rule.shift - MEAN_BITS)
    if lib := _native(high, low, total):
        gain_value = ctypes.c_double(float(gain))
        grid = _grid_before(finish, high)
        _call(lib.fq_mean, high, low, total, high, total.numel(), high.shape[-1], gain_value, *grid)
        return _rest_after(finish, high)
    one = 2.0**LARGEST_EXPONENT

    def rows(high: Tensor, low: Tensor, total: Tensor) -> Tensor:
        # floor(2**44 / total) is exact: no quotient below 2**29 comes within 2**-53 of its size to the next integer.
        # sums r <= 2**52
        reciprocal = torch.floor(2.0**RECIPROCAL_BITS / (total.double() * one))
        y = high.double().add_(low).mul_(one)
        y = y.mul_(reciprocal.mul_(2.0 ** (MEAN_BITS - RECIPROCAL_BITS))).add_(0.5).floor_()
        return finish.finish(y.mul_(gain).add_(0.5).floor_())

    return by_slices(rows, high, low, total, out=high, size=_SLICE)


def layernorm(x: Tensor, layer: LayerNormConstants, finish: Finish) -> Tensor:
    """The strict integer LayerNorm of (…, C), on the grid of its result; see ``intmath.int_layernorm``."""
    if lib := _native(x):
        out, channels = torch.empty_like(x), x.shape[-1]
        shrink = torch.exp2(-layer.shift)
        pair = (layer.gain * shrink, layer.offset * shrink + 0.5)
        gain, offset = (_row(t, channels, torch.float64) for t in pair)
        scalars: Sequence[Any] = (
            ctypes.c_float(float(layer.finest)),
            ctypes.c_double(float(layer.guard)),
            ctypes.c_double(float(layer.root_bits)),
        )
        grid = _grid_before(finish, x)
        _call(lib.fq_layernorm, x, out, x.numel() // channels, channels, *scalars, gain, offset, *grid)
        return _rest_after(finish, out)
    return by_slices(lambda rows: finish.finish(whole_layernorm(rows, layer)), x)
