"""Quantizing some tensors of a calibrated model and leaving the rest in float, and putting everything back.

An integer LayerNorm or softmax reads and writes codes. Where the tensor beside it is in float, it gets that tensor on
a 16-bit grid of the same place and four times the range instead, so that its own arithmetic alone is in the effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..escape import EscapeQuantizer, far_of
from ..layers import QAct, QConv2d, QIntLayerNorm, QIntSoftmax, QLinear
from ..lifecycle import dequant, phase_of, quant
from ..phase import Phase, QuantLayer
from ..quantizers import Quantizer, UniformQuantizer, build_quantizer
from ..scheme import BitType

__all__ = ['Switches', 'fine', 'narrowed', 'weight_at']

_FINE_BITS, _FINE_RANGE = 16, 4


class Switches:
    """Every tensor of a calibrated ``model`` as a switch of its own; a context that leaves the model as it was.

    Attributes:
        layers: path -> Q layer, of all that can be switched.

    Raises:
        RuntimeError: the model is not calibrated, or is calibrating.
        ValueError: it has no Q layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, QuantLayer] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (QConv2d, QLinear, QAct, QIntSoftmax))
            or (isinstance(module, QIntLayerNorm) and module.integer)
        }
        self._all = [module for module in model.modules() if isinstance(module, QuantLayer)]
        # Kept as long as this object: layers know a changed grid by the addresses of its scales.
        self._fine: dict[str, Quantizer] = {}

    def __enter__(self) -> Switches:
        self._before = phase_of(self.model)
        quant(self.model)  # says what is not calibrated, and freezes weights and tables
        self._fine = {
            name: fine(layer.quantizer)
            for name, layer in self.layers.items()
            if isinstance(layer, QAct) and isinstance(layer.quantizer, UniformQuantizer)
        }
        return self

    def __exit__(self, *_: object) -> None:
        (quant if self._before is Phase.QUANT else dequant)(self.model)

    @contextmanager
    def only(self, paths: Collection[str], instead: Mapping[str, Quantizer] | None = None) -> Iterator[None]:
        """Quantize the layers at ``paths``, and nothing else.

        Args:
            paths: of :attr:`layers`.
            instead: path -> a calibrated quantizer in place of the layer's own, of other bits for instance.

        Raises:
            ValueError: there is no such layer.
        """
        if unknown := [path for path in paths if path not in self.layers]:
            raise ValueError(f'{unknown[0]!r} is no layer that can be switched; {_some(self.layers)} are')
        on = {self.layers[path] for path in paths}
        arithmetic = any(isinstance(layer, (QIntLayerNorm, QIntSoftmax)) for layer in on)
        quantizers = dict(instead or {})
        if arithmetic:
            quantizers = {**{k: q for k, q in self._fine.items() if self.layers[k] not in on}, **quantizers}
        phases = [(layer, layer.phase) for layer in self._all]
        owned: list[tuple[Any, str, Quantizer]] = []
        try:
            for path, quantizer in quantizers.items():
                attribute = 'weight_quantizer' if hasattr(self.layers[path], 'weight_quantizer') else 'quantizer'
                owned.append((self.layers[path], attribute, getattr(self.layers[path], attribute)))
                setattr(self.layers[path], attribute, quantizer)
            for layer, _ in phases:
                layer.phase = Phase.QUANT if layer in on else Phase.FLOAT
            yield
        finally:
            for layer, attribute, quantizer in owned:
                setattr(layer, attribute, quantizer)
            for layer, phase in phases:
                layer.phase = phase

    def without(self, paths: Collection[str]) -> Any:
        """Quantize everything but the layers at ``paths``; a context, as :meth:`only`."""
        left = set(paths)
        if unknown := left.difference(self.layers):
            raise ValueError(f'{min(unknown)!r} is no layer that can be switched; {_some(self.layers)} are')
        return self.only([path for path in self.layers if path not in left])


def _some(layers: Mapping[str, Any]) -> str:
    return ', '.join([*layers][:: max(1, len(layers) // 3)][:3])


def fine(quantizer: UniformQuantizer) -> UniformQuantizer:
    """A 16-bit grid around that of ``quantizer``, four times as wide, hence 64 times as fine from 8 bits."""
    kind = quantizer.spec.bit_type
    ratio = (2**_FINE_BITS - 1) / (2**kind.bits - 1) / _FINE_RANGE
    middle = (kind.qmin + kind.qmax) / 2
    target = BitType(_FINE_BITS, kind.signed)
    zero_point = (quantizer.zero_point - middle) * ratio + (target.qmin + target.qmax) / 2
    return _on_grid(quantizer, target, quantizer.scale / ratio, zero_point)


def narrowed(quantizer: UniformQuantizer, bits: int) -> UniformQuantizer:
    """The range of ``quantizer`` with ``bits`` bits."""
    kind = quantizer.spec.bit_type
    target = BitType(bits, kind.signed)
    ratio = (2**bits - 1) / (2**kind.bits - 1)
    zero_point = (quantizer.zero_point - kind.qmin) * ratio + target.qmin
    return _on_grid(quantizer, target, quantizer.scale / ratio, zero_point)


def weight_at(layer: Any, bits: int) -> Quantizer:
    """A quantizer of ``bits`` bits for the weight of ``layer``, its range found as the layer's own was."""
    spec = dataclasses.replace(layer.weight_quantizer.spec, bit_type=BitType(bits, signed=True))
    channels = None if spec.axis is None else layer.weight.shape[spec.axis]
    quantizer = build_quantizer(spec, channels).to(layer.weight.device)
    quantizer.observe(layer.weight)
    quantizer.take_qparams(layer.weight)
    quantizer.commit()
    return quantizer


def _on_grid(
    like: UniformQuantizer, kind: BitType, scale: torch.Tensor, zero_point: torch.Tensor
) -> UniformQuantizer:
    spec = dataclasses.replace(like.spec, bit_type=kind)
    channels, far = None if spec.axis is None else len(like.scale), far_of(like)
    twin = (UniformQuantizer if far is None else EscapeQuantizer)(spec, channels).to(like.scale.device)
    twin.scale.copy_(scale)
    if far is not None:
        twin.far = torch.round(far * (like.scale / scale)).to(torch.int32)
    twin.zero_point.copy_(zero_point.round().reshape(twin.zero_point.shape))
    twin.name = like.name
    return twin
