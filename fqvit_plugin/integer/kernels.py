"""Integer kernels: what an integer program is made of. Integer tensors in, integer tensors out.

A code is stored as a signed integer: ``stored = code - (qmin + 2**(bits - 1))``, so that unsigned codes fit int8 too.
``zero`` arguments are stored zero points. Growth of the accumulators stands next to each product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dyadic import MEAN_BITS, RECIPROCAL_BITS
from ..escape import escaped_steps, limits

__all__ = ['KERNELS', 'cpu_support', 'int8_matmul', 'integer_sqrt']

#: Name in a program -> kernel. Tensors come first, then keyword-only constants (tensors) and settings (plain values).
KERNELS: dict[str, Callable[..., Tensor]] = {}


def _kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    KERNELS[function.__name__] = function
    return function


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of int8 matrices (…, n, k) and (…, k, m) or (k, m), in int32.

    A product is below 2**14, so 2**17 terms fit.
    """
    if b.ndim == 2:
        return _int_mm(a.reshape(-1, a.shape[-1]), b).view(*a.shape[:-1], b.shape[-1])
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    flat = zip(a.expand(*lead, -1, -1).flatten(0, -3), b.expand(*lead, -1, -1).flatten(0, -3), strict=True)
    return torch.stack([_int_mm(x, y) for x, y in flat]).view(*lead, a.shape[-2], b.shape[-1])


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == 'cpu':
        return _cpu_int_mm(a.contiguous(), b)
    # cuBLAS wants more than 16 rows, and columns and terms in eights; rows of zeros change nothing
    (n, k), m = a.shape, b.shape[1]
    a = F.pad(a, (0, -k % 8, 0, max(0, 17 - n)))
    b = F.pad(b, (0, -m % 8, 0, -k % 8))
    return torch._int_mm(a.contiguous(), b.t().contiguous().t())[:n, :m]


def _cpu_int_mm(a: Tensor, b: Tensor) -> Tensor:
    support = cpu_support()
    if support == 'exact':
        return torch._int_mm(a, b)
    if support == 'saturating':  # sums of two products stay below 2**15 when one factor has four bits
        return (torch._int_mm(a, b >> 4) << 4) + torch._int_mm(a, b & 15)
    return a.int() @ b.int()


@cache
def cpu_support() -> str:
    """``'exact'``, ``'saturating'`` or ``'none'``: what this CPU and this torch make of int8 products.

    Without VNNI oneDNN adds pairs of products in 16 bits, which saturate; older versions of torch have none.
    """
    a, b = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 32), -128, dtype=torch.int8)
    try:
        return 'exact' if torch.equal(torch._int_mm(a, b), a.int() @ b.int()) else 'saturating'
    except (RuntimeError, AttributeError):
        return 'none'


def _store(x: Tensor, zero: Tensor, bits: int, far: Tensor | None = None) -> Tensor:
    """Saturate steps to stored codes of ``bits`` bits; the end code for what is nearer to ``far``, see ``_steps``."""
    limit = 2 ** (bits - 1)
    if far is not None:
        x = escaped_steps(x, *limits(-limit - zero, limit - 1 - zero, far), far)
    return (x + zero).clamp_(-limit, limit - 1).to(torch.int8 if bits <= 8 else torch.int16)


def _steps(x: Tensor, zero: Tensor, far: Tensor | None) -> Tensor:
    """Steps of stored codes of 8 bits, int32: ``x - zero``, or ``far`` where the code is the end that it took."""
    steps = x.int() - zero
    if far is None:
        return steps
    return torch.where((far != 0) & (x == torch.where(far < 0, -128, 127)), far, steps)


# ------------------------------------------------------------------------------------------------ products


@_kernel
def linear(x: Tensor, *, weight: Tensor, zero: int) -> Tensor:
    """``(x - zero) @ weight.T``: (…, I) codes and (O, I) int8 to (…, O) int32."""
    # |x - zero| <= 255 and |w| <= 128: 2**15 a term, so up to 2**16 terms
    return int8_matmul(x, weight.t()) - zero * weight.sum(1, dtype=torch.int32)


@_kernel
def matmul(a: Tensor, b: Tensor, *, zero_a: int, zero_b: int) -> Tensor:
    """``(a - zero_a) @ (b - zero_b)``: (…, n, k) and (…, k, m) codes to int32."""
    # 2**16 a term: up to 2**15 terms
    rows = a.sum(-1, keepdim=True, dtype=torch.int32)
    columns = b.sum(-2, keepdim=True, dtype=torch.int32)
    return int8_matmul(a, b) - zero_b * rows - zero_a * columns + zero_a * zero_b * a.shape[-1]


@_kernel
def attend(
    logits: Tensor,
    value: Tensor,
    *,
    exponents: Tensor,
    mask: Tensor | None = None,
    zero: int,
    gain: int,
    shift: int,
    out_zero: int,
    bits: int,
) -> Tensor:
    """Log-Int-Softmax of the rows of ``logits``, times ``value``, on a new grid.

    ``p = 2**exponents[max - logit]`` (0 where the exponent is negative), then with one division for each row
    ``m = (sum(p (value - zero)) (2**44 // sum(p)) + 2**27) >> 28``, the mean with 16 fractional bits, and
    ``(m gain + 2**(shift + 15)) >> (shift + 16)``.

    Args:
        logits: (…, N, T) codes.
        value: (…, T, D) codes.
        exponents: int8, of each distance from the row's maximum; at most 15.
        zero, out_zero: of ``value`` and of the result.
        mask: (W, N, T) bool, true where attention is forbidden; ``logits`` are then (B W, heads, N, T).
        gain, shift: ``gain / 2**shift``, at most 24 bits and 42.
    """
    x = logits.to(torch.int16)
    if mask is not None:
        forbidden = mask[:, None].expand(mask.shape[0], x.shape[1], -1, -1)
        forbidden = forbidden.repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        x = x.masked_fill(forbidden, -(2**14))
    distance = x.amax(-1, keepdim=True) - x
    exponent = exponents[distance.clamp_(max=exponents.shape[0] - 1).int()]
    if mask is not None:
        exponent = exponent.masked_fill(forbidden, -1)
    # -2**e for e < 8 are int8 numbers, 2**7 is not: the signs are taken back below
    low, high = _negative_power(exponent, 0), _negative_power(exponent, 8)
    total = -(low.sum(-1, keepdim=True, dtype=torch.int64) + (high.sum(-1, keepdim=True, dtype=torch.int64) << 8))
    # |sum p v| <= 2**8 sum(p), so its product with the reciprocal stays within 2**52
    sums = -(int8_matmul(low, value).long() + (int8_matmul(high, value).long() << 8)) - zero * total
    mean = (sums * ((1 << RECIPROCAL_BITS) // total) + (1 << (_DROPPED - 1))) >> _DROPPED
    shift += MEAN_BITS
    return _store((mean * gain + (1 << (shift - 1))) >> shift, _as(out_zero, mean), bits)


_DROPPED = RECIPROCAL_BITS - MEAN_BITS


def _negative_power(exponent: Tensor, lowest: int) -> Tensor:
    """``-2**(exponent - lowest)`` where that lies within ``[0, 7]``, else 0; int8."""
    table = [-(1 << (e - lowest)) if 0 <= e - lowest < 8 else 0 for e in range(-1, 16)]
    return torch.tensor(table, dtype=torch.int8, device=exponent.device)[exponent.int() + 1]


def _as(value: int, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)


# ------------------------------------------------------------------------------------------------ new grids


@_kernel
def affine(
    x: Tensor,
    *,
    gain: Tensor,
    offset: Tensor,
    shift: int,
    offset_shift: int,
    zero: Tensor,
    bits: int,
    far: Tensor | None = None,
) -> Tensor:
    """``(x gain + offset 2**offset_shift) / 2**shift``, halves rounded up, as codes: accumulators to a new grid.

    Args:
        x: (…, C) integers below 2**28.
        gain: int32, () or (C,), of at most 24 bits.
        offset: int32, broadcasts to ``x``.
        zero: int32, () or (C,).
    """
    y = x.long() * gain
    y += (offset.long() << offset_shift) + (1 << (shift - 1))
    return _store(y >> shift, zero, bits, far)


@_kernel
def add(
    a: Tensor,
    b: Tensor,
    *,
    gain_a: Tensor,
    gain_b: Tensor,
    zero_a: Tensor,
    zero_b: Tensor,
    shift: int,
    zero: Tensor,
    bits: int,
    far_a: Tensor | None = None,
    far_b: Tensor | None = None,
    far: Tensor | None = None,
) -> Tensor:
    """``((a - zero_a) gain_a + (b - zero_b) gain_b) / 2**shift``, halves rounded up: a residual sum on a new grid.

    ``far``: (C,) int32, steps that the lowest code of a channel stands for if negative, the highest if positive.
    """
    # gains of 30 bits; codes of 8 bits: 2**39; what is far out has 16: 2**47
    y = _steps(a, zero_a, far_a).long() * gain_a + _steps(b, zero_b, far_b).long() * gain_b
    return _store((y + (1 << (shift - 1))) >> shift, zero, bits, far)


@_kernel
def lookup(x: Tensor, *, table: Tensor) -> Tensor:
    """``table[code]``: any function of one code."""
    return table[x.int() + table.shape[0] // 2]


@_kernel
def quantize(x: Tensor, *, scale: Tensor, zero: int, bits: int) -> Tensor:
    """The image's codes; the only kernel that reads floats."""
    steps = torch.round(x.float() / scale)
    limit = 2 ** (bits - 1)
    return steps.clamp_(-limit - zero, limit - 1 - zero).add_(zero).to(torch.int8)


# ------------------------------------------------------------------------------------------------ LayerNorm


@_kernel
def layernorm(
    x: Tensor,
    *,
    zero: Tensor,
    factors: Tensor,
    gain: Tensor,
    offset: Tensor,
    shifts: Tensor,
    guard: int,
    root_bits: int,
    out_zero: Tensor,
    bits: int,
    far: Tensor | None = None,
) -> Tensor:
    """LayerNorm of codes by integer sums, an integer root and dyadic multipliers; see ``intmath.int_layernorm``.

    Args:
        x: (…, C) codes.
        zero: int32, () or (C,).
        factors: uint8 (C,), powers of two of the channels' scales over the finest.
        gain, offset, shifts: int32, int64, uint8 (C,): ``(x_hat gain + offset) / 2**shifts``.
        guard: epsilon in units of the squared finest step, times C squared.
        root_bits: fractional bits of the root.
        far: of ``x``, as in :func:`add`.
    """
    channels = x.shape[-1]
    u = _steps(x, zero, far) << factors.int()  # < 2**15, with factors up to 2**7
    total = u.sum(-1, keepdim=True, dtype=torch.int64)  # < 2**27 for 4096 channels
    variance = channels * (u * u).sum(-1, keepdim=True, dtype=torch.int64) - total * total + guard  # < 2**54 + 2**50
    radicand = variance << 2 * root_bits if root_bits >= 0 else variance >> -2 * root_bits
    root = integer_sqrt(radicand.clamp_(max=2**52)).clamp_(min=1)
    reciprocal = (1 << (45 + root_bits)) // root
    x_hat = ((channels * u.long() - total) * reciprocal + (1 << 28)) >> 29  # product < 2**51; 16 fractional bits
    shifts = shifts.long()
    y = (x_hat * gain + offset + (1 << (shifts - 1))) >> shifts
    return _store(y, out_zero, bits)


def integer_sqrt(x: Tensor) -> Tensor:
    """``floor(sqrt(x))`` of non-negative int64 up to 2**52, by Newton's method from above."""
    # 2**ceil(bits / 2) >= sqrt(x), the bits counted by halving
    bits = torch.zeros_like(x)
    rest = x.clone()
    for step in (32, 16, 8, 4, 2, 1):
        high = rest >= (1 << step)
        bits += high * step
        rest = torch.where(high, rest >> step, rest)
    root = torch.ones_like(x) << ((bits + 2) // 2)
    for _ in range(6):  # the error squares each time: 1/2 of the root, 2**-3, 2**-7, ... below 1 for 27 bits
        root = torch.minimum(root, (root + x // root.clamp(min=1)) >> 1)
    return root


# ------------------------------------------------------------------------------------------------ layout


@_kernel
def mean_sums(x: Tensor, *, zero: int, dims: Sequence[int]) -> Tensor:
    """Sums of ``x - zero`` over ``dims``, int32; the mean's division is part of the next affine."""
    count = 1
    for d in dims:
        count *= x.shape[d]
    return x.sum(tuple(dims), dtype=torch.int32) - zero * count


@_kernel
def patches(x: Tensor, *, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], value: int) -> Tensor:
    """(B, C, H, W) to (B, N, C kh kw), the windows that a convolution multiplies.

    Args:
        padding: left, right, top, bottom.
        value: what the padding holds: the stored zero.
    """
    x = F.pad(x, tuple(padding), value=value)
    x = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # (B, C, h, w, kh, kw)
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@_kernel
def pad_map(x: Tensor, *, bottom: int, right: int, value: int) -> Tensor:
    """(B, H, W, C) with rows and columns of ``value`` added."""
    return F.pad(x, (0, 0, 0, right, 0, bottom), value=value)


@_kernel
def constant(*, value: Tensor) -> Tensor:
    """A tensor that never changes."""
    return value


@_kernel
def prepend(x: Tensor, *, tokens: Tensor) -> Tensor:
    """(B, N, C) behind (P, C) constant tokens."""
    return torch.cat((tokens.expand(x.shape[0], -1, -1), x), dim=1)


@_kernel
def reshape(x: Tensor, *, shape: Sequence[int]) -> Tensor:
    """``x.reshape(shape)``, whose first entry is -1: the batch."""
    return x.reshape(tuple(shape))


@_kernel
def permute(x: Tensor, *, dims: Sequence[int]) -> Tensor:
    """``x.permute(dims)``."""
    return x.permute(tuple(dims))


@_kernel
def select(x: Tensor, *, dim: int, index: int) -> Tensor:
    """``x.select(dim, index)``."""
    return x.select(dim, index)


@_kernel
def crop(x: Tensor, *, dim: int, start: int, stop: int) -> Tensor:
    """``x[start:stop]`` along ``dim``."""
    return x.narrow(dim, start, stop - start)


@_kernel
def roll(x: Tensor, *, shifts: Sequence[int], dims: Sequence[int]) -> Tensor:
    """``torch.roll``."""
    return torch.roll(x, tuple(shifts), tuple(dims))
