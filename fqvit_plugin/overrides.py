"""Overrides of a scheme: single layers of a quantized model get other bits or another observer."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

import torch
from torch import nn

from .layers import QAct, QConv2d, QIntSoftmax, QLinear
from .quantizers import build_quantizer
from .scheme import BitType, Override, QuantScheme, QuantSpec, by_channel

__all__ = ['apply_overrides_']

#: field of an override -> the layers it is about
_KINDS: dict[str, tuple[type, ...]] = {
    'weight_bits': (QConv2d, QLinear),
    'act_bits': (QAct,),
    'attn_bits': (QIntSoftmax,),
    'observer': (QAct,),
}


def apply_overrides_(model: nn.Module, scheme: QuantScheme) -> None:
    """Give the Q layers that the scheme's overrides name new, uncalibrated quantizers, in place.

    Raises:
        ValueError: a pattern matches no layer, or a field is about no layer that matches; names some that would.
    """
    layers: dict[str, Any] = {
        n: m for n, m in model.named_modules() if isinstance(m, (QConv2d, QLinear, QAct, QIntSoftmax))
    }
    for override in scheme.overrides:
        matching = {name: layer for name, layer in layers.items() if _matches(name, override)}
        for pattern in override.layers:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
                raise ValueError(f'override of {pattern!r} matches no layer; there is: {_examples(layers)}')
        for field in override.fields:
            if not any(_is_about(layer, field) for layer in matching.values()):
                fitting = {name: layer for name, layer in layers.items() if _is_about(layer, field)}
                raise ValueError(
                    f'override of {", ".join(map(repr, override.layers))}: {field} is about none of the layers that '
                    f'match, such as {next(iter(matching))}; it is about {_examples(fitting)}'
                )
        for layer in matching.values():
            _change_(layer, override, next(model.parameters()).device)


def _matches(name: str, override: Override) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in override.layers)


def _examples(layers: dict[str, Any]) -> str:
    return ', '.join([*layers][:: max(1, len(layers) // 3)][:3]) or 'no such layer in this model'


def _is_about(layer: Any, field: str) -> bool:
    has_ptf = isinstance(layer, QAct) and layer.quantizer.spec.observer == 'ptf'
    return isinstance(layer, _KINDS[field]) and not (field == 'observer' and has_ptf)


def _change_(layer: Any, override: Override, device: torch.device) -> None:
    if isinstance(layer, (QConv2d, QLinear)) and override.weight_bits is not None:
        spec = layer.weight_quantizer.spec
        layer._init_weight_quantizer(_with_bits(spec, override.weight_bits))
    elif isinstance(layer, QIntSoftmax) and override.attn_bits is not None:
        spec = _with_bits(layer.spec, override.attn_bits)
        # as get_scheme: below 8 bits a uniform grid loses nearly all accuracy
        kind = 'log2' if layer.log_int or override.attn_bits < 8 else 'uniform'
        layer.spec = dataclasses.replace(spec, quantizer=kind)
        layer.quantizer = None if layer.log_int else build_quantizer(layer.spec).to(device)
    elif isinstance(layer, QAct):
        spec = getattr(layer.quantizer, 'asked', layer.quantizer.spec)
        if override.act_bits is not None:
            spec = _with_bits(spec, override.act_bits)
            if spec.quantizer == 'hidden' and override.act_bits != 8 and not layer.quantizer.level_count:
                # levels are for recipes of few bits; here a uniform grid is meant, which every export knows
                observer = 'minmax' if spec.observer == 'split' else spec.observer
                spec = dataclasses.replace(spec, quantizer='uniform', observer=observer)
        if override.observer is not None and _is_about(layer, 'observer'):
            axis, options = spec.axis, override.observer_options
            spec = dataclasses.replace(spec, observer=override.observer, axis=None, observer_options=options)
            spec = spec if axis is None else by_channel(spec)
        channels = None if spec.axis is None else len(layer.scale)
        layer.quantizer = build_quantizer(spec, channels).to(device)


def _with_bits(spec: QuantSpec, bits: int) -> QuantSpec:
    return dataclasses.replace(spec, bit_type=BitType(bits, spec.bit_type.signed))
