"""What every Q layer needs: its place in the registries, its recipe, and a sign that a tensor has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor

from ..registry import LAYERS
from ..scheme import BitType, QuantSpec

__all__ = ['ACT_SPEC', 'WEIGHT_SPEC', 'parse_spec', 'register', 'versions']

WEIGHT_SPEC = QuantSpec(BitType(8, signed=True), axis=0)
ACT_SPEC = QuantSpec(BitType(8, signed=False))


def register(cls: type) -> type:
    """Found as ``type='fqvit_plugin.QLinear'`` anywhere, and as ``type='QLinear'`` in MMPretrain."""
    LAYERS.register_module(module=cls)
    MMPRETRAIN_MODELS.register_module(module=cls, force=True)
    return cls


def parse_spec(spec: QuantSpec | Mapping[str, Any]) -> QuantSpec:
    """A QuantSpec, also from a config's ``dict(bit_type='int8', observer='minmax', …)``."""
    if isinstance(spec, QuantSpec):
        return spec
    values = dict(spec)
    values['bit_type'] = BitType.parse(values.get('bit_type', 'uint8'))
    try:
        return QuantSpec(**values)
    except TypeError as error:
        raise ValueError(f'not a tensor recipe: {error}') from None


def versions(*tensors: Tensor) -> tuple[int, ...]:
    """Numbers that change when a tensor is replaced or written to."""
    return tuple(n for t in tensors for n in (t.data_ptr(), 0 if t.is_inference() else t._version))
