"""Constants of the engine's steps, from those of the kernels, with proof that doubles hold every number exactly.

A double holds integers up to 2**53, so ``floor(x * gain * 2**-shift + offset * 2**-shift + 0.5)`` is the kernels'
``(x * gain + offset + 2**(shift - 1)) >> shift`` as long as that sum stays below. Powers of two change no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    'attend_fields',
    'norm_fields',
    'packed',
    'padded',
    'requant',
    'sum_bound',
    'sum_fields',
    'table_of',
    'zero_start',
]

_EXACT = 2.0**52
_WIDE = 2.0**30
#: Up to here 64 squares fit 32 bits, as factors up to 2**4 give them.
_NARROW = 5700
#: Columns are padded to whole vectors of any instruction set.
_PAD = 64


def padded(x: Tensor, columns: int) -> Tensor:
    """() or (C,) as (columns, rounded up), contiguous; zeros behind."""
    out = torch.zeros(-(-columns // _PAD) * _PAD, dtype=x.dtype)
    out[:columns] = x
    return out


def _byte_limits(bits: int) -> tuple[int, int]:
    """The smallest and the largest byte of codes of ``bits`` bits: the stored code plus 128."""
    return 128 - 2 ** (bits - 1), 127 + 2 ** (bits - 1)


def _escapes(columns: int, tensors: dict[str, tuple[Tensor | None, Tensor]]) -> dict[str, dict[str, Any]]:
    """The fields of Escapes, one for each of ``tensors``, for all channels in which one of them has an escape.

    Args:
        columns: C.
        tensors: field -> ``far`` of the kernel, and what the end codes of its channels stand for; () or (C,).
    """
    none = torch.zeros(columns, dtype=torch.int32)
    fars = {name: none if far is None else far for name, (far, _) in tensors.items()}
    channels = torch.stack(list(fars.values())).any(0).nonzero()[:, 0]
    if not len(channels):
        return {}
    return {
        name: dict(
            count=len(channels),
            channel=channels.int(),
            end=torch.where(far > 0, 255, torch.where(far < 0, 0, -1))[channels].int(),
            value=tensors[name][1].expand(columns)[channels].int(),
        )
        for name, far in fars.items()
    }


def _bytes(far: Tensor | None, zero: Tensor) -> tuple[Tensor | None, Tensor]:
    """``far``, and as bytes."""
    return far, zero + 128 if far is None else far + zero + 128


def sum_bound(weight: Tensor, zero: int) -> Tensor:
    """(O,) the largest magnitude of ``(x - zero) @ weight.T`` over all codes of 8 bits, float64."""
    positive, negative = weight.clamp(min=0).double().sum(1), weight.clamp(max=0).double().sum(1)
    low, high = -128 - zero, 127 - zero
    return torch.maximum((positive * high + negative * low).abs(), (positive * low + negative * high).abs())


def requant(
    columns: int, bound: Tensor, constants: dict[str, Tensor], settings: dict[str, Any], table: Tensor | None = None
) -> dict[str, Any] | None:
    """The fields of a Requant for the kernel ``affine``, or None where doubles might round.

    Args:
        bound: () or (C,), the largest magnitude of its input.
        constants: ``gain``, ``offset``, ``zero`` of the kernel.
        settings: ``shift``, ``offset_shift``, ``bits``.
        table: of the kernel ``lookup``, if that follows.
    """
    gain, offset, zero = (constants[name] for name in ('gain', 'offset', 'zero'))
    if max(gain.ndim, offset.ndim, zero.ndim) > 1 or (table is None and settings['bits'] > 8):
        return None
    shift, bits = settings['shift'], settings['bits']
    whole = offset.double() * 2.0 ** settings['offset_shift'] + 2.0 ** (shift - 1)
    largest = bound * gain.double().abs() + whole.abs()
    if float(largest.max()) >= _EXACT or float(bound.max()) >= 2.0**31:
        return None
    low, high = _byte_limits(bits)
    middle = 128
    if table is not None:
        middle = table.shape[0] // 2
        low, high = middle - 2 ** (bits - 1), middle + 2 ** (bits - 1) - 1
        if low < 0 or high >= table.shape[0]:
            return None
    return dict(
        gain=padded(gain.double() * 2.0**-shift, columns),
        offset=padded(whole * 2.0**-shift, columns),
        zero=padded(zero.int() + middle, columns),
        table=0 if table is None else table_of(table),
        low=low,
        high=high,
        wide=int(float(largest.max()) * 2.0**-shift >= _WIDE),
        **_escapes(columns, {'far': _bytes(constants.get('far'), zero)}),
    )


def table_of(table: Tensor) -> Tensor:
    """A table of stored codes as bytes, with room behind for reads of four."""
    return torch.cat((table.to(torch.int16) + 128, torch.zeros(64))).to(torch.uint8)


def sum_fields(
    columns: int, constants: dict[str, Tensor], settings: dict[str, Any], swap: bool
) -> dict[str, Any] | None:
    """The fields of a Sum for the kernel ``add``, or None where doubles might round.

    Args:
        swap: whether the engine's first operand is the kernel's second.
    """
    if any(c.ndim > 1 for c in constants.values()):
        return None
    shift, bits = settings['shift'], settings['bits']
    gains = [constants[f'gain_{name}'].double() for name in 'ab']
    # bytes are codes plus 128; the result's zero point and its 128 go into the constant too
    zeros = [constants[f'zero_{name}'].double() + 128 for name in 'ab']
    whole = 2.0 ** (shift - 1) + (constants['zero'].double() + 128) * 2.0**shift
    whole = whole - gains[0] * zeros[0] - gains[1] * zeros[1]
    fars = [_bytes(constants.get(f'far_{name}'), constants[f'zero_{name}']) for name in 'ab']
    reach = [value.abs().clamp(min=256) if far is not None else 256 for far, value in fars]
    largest = whole.abs() + reach[0] * gains[0].abs() + reach[1] * gains[1].abs()
    if float(largest.max()) >= _EXACT or float(largest.max()) * 2.0**-shift >= _WIDE:
        return None
    if swap:
        gains.reverse()
        fars.reverse()
    tensors = {'far_a': fars[0], 'far_b': fars[1], 'far': _bytes(constants.get('far'), constants['zero'])}
    low, high = _byte_limits(bits)
    return dict(
        gain_a=padded(gains[0] * 2.0**-shift, columns),
        gain_b=padded(gains[1] * 2.0**-shift, columns),
        offset=padded(whole * 2.0**-shift, columns),
        low=low,
        high=high,
        **_escapes(columns, tensors),
    )


def norm_fields(
    channels: int, bits: int, constants: dict[str, Tensor], settings: dict[str, Any]
) -> dict[str, Any] | None:
    """The fields of a Norm for the kernel ``layernorm``, without its tensors; None where numbers might not fit.

    Args:
        bits: of its input's codes.
    """
    factor = 1 << constants['factors'].int()
    center = (constants['zero'].int() + 128) * factor
    largest = float(torch.maximum((255 * factor - center).abs(), center.abs()).max())
    lowest_byte, highest_byte = _byte_limits(bits)
    far = constants.get('far')
    values = center * 0 if far is None else far * factor
    largest = max(largest, float(values.abs().max()))
    highest = torch.maximum(highest_byte * factor - center, values)
    difference = float(highest.max() - torch.minimum(lowest_byte * factor - center, values).min())
    gain, shifts = constants['gain'].double(), constants['shifts'].long()
    offset = constants['offset'].long() + (1 << (shifts - 1))
    x_hat = 2.0**17 * channels**0.5  # |x_hat| <= sqrt(C) 2**16, and a little for the floored root
    sums = float((gain.abs() * x_hat + offset.double().abs()).max())
    variance = (channels * difference / 2) ** 2 + settings['guard']
    radicand = variance * 4.0 ** settings['root_bits']
    # C u and its sum fit 32 bits, the sum of squares a double and C times it 64 bits, and so does the radicand
    squares = channels * largest**2
    fits = largest * channels < 2**30 and squares < _EXACT and channels * squares < 2.0**62
    if not fits or radicand >= 2.0**62 or sums >= _EXACT:
        return None
    low, high = _byte_limits(settings['bits'])
    shrink = torch.exp2(-shifts.double())
    return dict(
        channels=channels,
        factor=padded(factor.int(), channels),
        center=padded(center.int(), channels),
        gain=padded(gain * shrink, channels),
        offset=padded(offset.double() * shrink, channels),
        zero=padded(constants['out_zero'].int() + 128, channels),
        whole_gain=padded(constants['gain'].int(), channels),
        whole_offset=padded(offset, channels),
        shifts=padded(constants['shifts'], channels),
        guard=settings['guard'],
        root_bits=settings['root_bits'],
        low=low,
        high=high,
        wide=int(largest >= _NARROW),
        **_escapes(channels, {'far': (far, values)}),
    )


def attend_fields(constants: dict[str, Tensor], settings: dict[str, Any], keys: int) -> dict[str, Any] | None:
    """The fields of an Attention that the kernel ``attend`` gives; None where it is out of bounds."""
    exponents = constants['exponents']
    shift = settings['shift'] + 16
    # the mean has 24 bits, the sums of low and of high powers 2**14 for each key
    ratio = abs(settings['gain']) * 2.0**-shift
    if abs(settings['gain']) > 2**24 or ratio * 2**24 >= _WIDE or keys > 2**14 or int(exponents.max()) > 15:
        return None
    last = exponents[-1:].expand(max(0, 256 - len(exponents)))
    low, high = _byte_limits(settings['bits'])
    fields: dict[str, Any] = dict(
        exponents=torch.cat((exponents, last))[:256].contiguous(),
        zero_v=settings['zero'],
        gain=settings['gain'] * 2.0**-shift,
        out_zero=settings['out_zero'] + 128,
        low=low,
        high=high,
        masks=1,
    )
    mask = constants.get('mask')
    if mask is not None:
        if bool(mask.all(-1).any()):  # a row without any position: the kernel divides by zero
            return None
        fields |= dict(mask=mask.to(torch.uint8).mul(255).contiguous(), masks=mask.shape[0])
    return fields


def packed(library: Any, weight: Tensor) -> Tensor:
    """(O, I) int8 weights as the engine reads them."""
    weight = weight.contiguous()
    out = torch.empty(library.fq_packed_size(*weight.shape) + 64, dtype=torch.int8)
    library.fq_pack(weight.data_ptr(), *weight.shape, out.data_ptr())
    return out


def zero_start(weight: Tensor, zero: int) -> Tensor:
    """(O, padded) what each sum starts from, so that bytes (stored codes plus 128) lose their zero point."""
    return padded((-(zero + 128) * weight.sum(1, dtype=torch.int64)).int(), len(weight))
