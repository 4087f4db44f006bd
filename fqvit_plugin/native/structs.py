"""The engine's structs, as ``src/common.h`` has them, and how a planned step becomes one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ['KINDS', 'NativeStep', 'Step', 'check_sizes', 'linked']

_N, _P, _D = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A struct; a value may be a type or name several fields of it, as ``'a b c': _N``."""
    flat = [(field, kind) for names, kind in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {'_fields_': flat})


_Escapes = _struct('Escapes', **{'count': _N, 'channel end value': _P})
_Requant = _struct('Requant', **{'gain offset zero table': _P, 'low high wide': _N, 'far': _Escapes})
_Sum = _struct('Sum', **{'gain_a gain_b offset': _P, 'low high': _N, 'far_a far_b far': _Escapes})
_Gemm = _struct(
    'Gemm',
    **{'x y residual rows columns depth out_rows': _N, 'map weight start': _P, 'requant': _Requant, 'sum': _Sum},
)
_Attention = _struct(
    'Attention',
    **{
        'q k v y q_first k_first v_first q_row k_row v_row y_row q_head k_head v_head y_head': _N,
        'q_size k_size v_size y_size groups heads queries keys depth value_depth zero_q zero_k zero_v': _N,
        'logits': _Requant,
        'bias': _P,
        'sum': _Sum,
        'mask': _P,
        'masks': _N,
        'exponents': _P,
        'gain': _D,
        'out_zero low high': _N,
    },
)
_Norm = _struct(
    'Norm',
    **{
        'x y rows in_rows channels pieces': _N,
        'map factor center gain offset zero whole_gain whole_offset shifts': _P,
        'guard root_bits low high fill wide': _N,
        'far': _Escapes,
    },
)
_Gather = _struct('Gather', **{'x y in_size runs run': _N, 'index': _P, 'fill': _N})
_Prepend = _struct('Prepend', **{'x y in_size size': _N, 'tokens': _P})
_Add = _struct('Add', **{'a b y rows columns': _N, 'constant': _P, 'sum': _Sum})
_Lookup = _struct('Lookup', **{'x y size': _N, 'table': _P})
_Quantize = _struct('Quantize', **{'y size': _N, 'scale': _D, 'low high zero': _N})
_Mean = _struct('Mean', **{'x y rows columns start': _N, 'requant': _Requant})

#: In the engine's order.
KINDS: dict[str, type[ctypes.Structure]] = {
    'gemm': _Gemm,
    'attention': _Attention,
    'norm': _Norm,
    'gather': _Gather,
    'prepend': _Prepend,
    'add': _Add,
    'lookup': _Lookup,
    'quantize': _Quantize,
    'mean': _Mean,
}
#: Fields that say where a tensor lies; planned steps hold its name there.
_PLACES = frozenset({'x', 'y', 'a', 'b', 'q', 'k', 'v', 'residual'})


class Step(ctypes.Structure):
    """A kind and a pointer to its struct."""

    _fields_ = [('kind', _N), ('arguments', _P)]


@dataclass(frozen=True)
class NativeStep:
    """A step of the engine before its tensors have places.

    Args:
        kind: in :data:`KINDS`.
        fields: of the struct; names of buffers, numbers, constants (contiguous tensors) and nested structs. What is
            left out is 0 or null.
    """

    kind: str
    fields: Mapping[str, Any]

    @property
    def output(self) -> str:
        """The buffer that it writes."""
        return str(self.fields['y'])

    @property
    def inputs(self) -> list[str]:
        """The buffers that it reads."""
        return [v for k, v in self.fields.items() if k in _PLACES and k != 'y' and isinstance(v, str)]


def check_sizes(library: ctypes.CDLL) -> None:
    """Compare the structs with the compiled ones.

    Raises:
        RuntimeError: they differ.
    """
    for i, (kind, struct) in enumerate(KINDS.items()):
        if library.fq_size(i) != ctypes.sizeof(struct):
            raise RuntimeError(
                f'the struct {kind} has {library.fq_size(i)} bytes in C++, {ctypes.sizeof(struct)} here'
            )


def linked(step: NativeStep, offsets: Mapping[str, int]) -> ctypes.Structure:
    """The struct of ``step``, with buffers at ``offsets``. Constants must outlive it."""
    struct = KINDS[step.kind]()
    if step.kind == 'gemm':
        struct.residual = -1
    for name, value in step.fields.items():
        setattr(struct, name, offsets[value] if name in _PLACES else _plain(struct, name, value))
    return struct


def _plain(struct: ctypes.Structure, name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_contiguous() or value.device.type != 'cpu':
            raise ValueError(f'{name} must be contiguous and on the CPU')
        return value.data_ptr()
    if isinstance(value, Mapping):
        inner = getattr(struct, name)
        for key, entry in value.items():
            setattr(inner, key, _plain(inner, key, entry))
        return inner
    return value


def constants_of(step: NativeStep) -> list[Tensor]:
    """The tensors that the struct points to."""
    return list(_tensors(step.fields))


def _tensors(fields: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in fields.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
