"""Named recipes: FQ-ViT's own, and those of fewer bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from .functional import Arithmetic
from .observers import EscapingObserver
from .scheme import (
    PRESETS,
    BitType,
    Override,
    QuantScheme,
    QuantSpec,
    StepSpec,
    by_channel,
    parse_observer,
    require_bool,
)

__all__ = ['LOW_BITS', 'SCHEMES', 'get_scheme', 'parse_scheme']

#: Recipes in which blocks have fewer than 8 bits.
LOW_BITS: dict[str, dict[str, Any]] = {
    'fqvit_w6a6': dict(weight_bits=6, act_bits=6, attn_bits=6, steps=('equalize', 'round')),
    'fqvit_w4a8': dict(weight_bits=4, group_size=16, steps=('round',)),
    'fqvit_w4a4': dict(weight_bits=4, act_bits=4, attn_bits=4, group_size=16, steps=('equalize', 'round')),
}

#: scheme name -> its bits, where they are not 8, columns of a weight that share a factor, and its steps
SCHEMES: dict[str, dict[str, Any]] = {
    'fqvit_w8a8': dict(),
    'fqvit_w8a8_attn4': dict(attn_bits=4),
    **LOW_BITS,
}


def get_scheme(
    name: str,
    *,
    observer: str | Mapping[str, Any] = 'minmax',
    ptf: bool = True,
    lis: bool = True,
    preset: str = 'strict',
    input_quant: bool = True,
    overrides: Sequence[Mapping[str, Any] | Override] = (),
    steps: Sequence[str | Mapping[str, Any] | StepSpec] | None = None,
    group_size: int | None = None,
    **bits: int,
) -> QuantScheme:
    """The named recipe of FQ-ViT.

    Args:
        name: of :data:`SCHEMES`; ``'fqvit_w8a8'`` has 8-bit softmax codes, ``'fqvit_w8a8_attn4'`` 4-bit ones. Those
            of fewer bits keep 8 outside of blocks, in the residual stream and its branches, and for attention logits.
        observer: range finder of the activations: ``'minmax'``, ``'ema'``, ``'percentile'``, ``'omse'``, a
            name you registered, or ``dict(type='percentile', alpha=0.9999)`` with its options.
        ptf: Power-of-Two Factor on the inputs of every LayerNorm.
        lis: Log-Int-Softmax; without it the softmax is float and its output is quantized, uniformly at 8 bits
            and on the log2 grid below (4 uniform bits lose nearly all accuracy: paper, table 4).
        preset: ``'strict'``, or ``'reference'`` for the published implementation's numbers.
        input_quant: quantize the input image (the paper: on for DeiT and Swin, off for ViT).
        overrides: what some layers do otherwise, ``dict(layers='backbone.*.ffn.*', weight_bits=4)`` each; see
            :class:`Override`.
        steps: what calibration does beyond finding ranges, names or ``dict(type='round', damp=0.01)``, in order; by
            default as the name says, ``[]`` for none. The reference preset has none.
        group_size: how many columns of a weight in a block share a factor, see
            :class:`~fqvit_plugin.weight_quantizer.WeightQuantizer`; by default as the name says, 0 for no factors.
        bits: ``weight_bits``, ``act_bits``, ``attn_bits``, each 2 to 16, to depart from the name; ``stream_bits``
            (activations) and ``edge_bits`` (weights) of what keeps 8 bits, see above.

    Returns:
        A frozen :class:`QuantScheme`.

    Raises:
        ValueError: unknown name, observer, preset or keyword, or bits outside 2 to 16.

    Source: Lin et al., FQ-ViT, IJCAI 2022, sections 3 and 4.
    """
    if name not in SCHEMES:
        raise ValueError(f'unknown scheme {name!r}; there is: {", ".join(SCHEMES)}')
    if preset not in PRESETS:
        raise ValueError(f'unknown preset {preset!r}; there is: {", ".join(PRESETS)}')
    for flag, value in (('ptf', ptf), ('lis', lis), ('input_quant', input_quant)):
        require_bool(flag, value)
    given = {k: v for k, v in SCHEMES[name].items() if k not in ('steps', 'group_size')}
    known = dict(weight_bits=8, act_bits=8, attn_bits=8) | given
    if unknown := sorted(set(bits) - {*known, 'stream_bits', 'edge_bits'}):
        allowed = ', '.join((*known, 'stream_bits', 'edge_bits'))
        raise ValueError(f'unknown option {unknown[0]!r} of get_scheme; bits are set by {allowed}')
    low = name in LOW_BITS
    known.update(bits)
    stream = bits.get('stream_bits', 8 if low else known['act_bits'])
    edge = bits.get('edge_bits', 8 if low else known['weight_bits'])
    arithmetic = cast(Arithmetic, preset)
    observer_name, options = parse_observer(observer)
    edge_weight = QuantSpec(BitType(edge, True), axis=0, arithmetic=arithmetic)
    if group_size is None:
        group_size = SCHEMES[name].get('group_size', 0) if arithmetic == 'strict' else 0
    weight = dataclasses.replace(
        edge_weight, bit_type=BitType(known['weight_bits'], True), group_size=None if group_size == 0 else group_size
    )
    act = QuantSpec(BitType(stream, False), observer_name, arithmetic=arithmetic, observer_options=options)
    operand = dataclasses.replace(act, bit_type=BitType(known['act_bits'], False))
    if operand.bit_type.bits < 8 and low:
        operand = dataclasses.replace(operand, quantizer='levels')
    norm_input = dataclasses.replace(act, observer='ptf', observer_options=(), axis=-1) if ptf else act
    attn_type = BitType(known['attn_bits'], False)
    probs_quantizer = 'log2' if lis or attn_type.bits < 8 else 'uniform'
    if steps is None:
        steps = SCHEMES[name].get('steps', ()) if arithmetic == 'strict' else ()
    if steps and arithmetic == 'reference':
        raise ValueError(f"steps need preset='strict'; the reference has none, got {steps!r}")
    return QuantScheme(
        name=name,
        weight=weight,
        edge_weight=edge_weight,
        act=act,
        operand=operand,
        hidden=_hidden(dataclasses.replace(act, bit_type=operand.bit_type), levels=low),
        branch=act if arithmetic == 'reference' else _escaping(by_channel(act)),
        norm_input=_escaping(norm_input),
        probs=dataclasses.replace(act, bit_type=attn_type, quantizer=probs_quantizer),
        log_int_softmax=lis,
        # The reference keeps LayerNorm in float where it has no PTF; strict arithmetic never needs to.
        int_norm=ptf or arithmetic == 'strict',
        input_quant=input_quant,
        overrides=_parse_overrides(overrides),
        steps=_parse_steps(steps),
    )


def _hidden(act: QuantSpec, levels: bool) -> QuantSpec:
    """The recipe of hidden activations, in strict arithmetic with splits, and with levels where bits are few."""
    if act.arithmetic == 'reference' or (act.bit_type.bits < 8 and not levels):
        return act
    if act.observer == 'minmax':
        return dataclasses.replace(act, quantizer='hidden', observer='split', observer_options=())
    return dataclasses.replace(act, quantizer='hidden') if act.bit_type.bits < 8 else act


def _escaping(spec: QuantSpec) -> QuantSpec:
    """``spec``, in strict arithmetic with escapes for channels where its observer finds some."""
    strict = spec.arithmetic == 'strict' and spec.axis == -1
    can = strict and isinstance(spec.build_observer(), EscapingObserver)
    return dataclasses.replace(spec, quantizer='escape') if can else spec


def _parse_steps(steps: Any) -> tuple[StepSpec, ...]:
    if isinstance(steps, (str, Mapping)):
        raise ValueError(f"steps must be a list such as ['equalize', 'round'], got {steps!r}")
    return tuple(StepSpec.parse(step) for step in steps)


def _parse_overrides(overrides: Sequence[Mapping[str, Any] | Override]) -> tuple[Override, ...]:
    if isinstance(overrides, (str, Mapping)):
        raise ValueError(f'overrides must be a list of dict(layers=..., ...), got {overrides!r}')
    return tuple(Override.parse(item) for item in overrides)


def parse_scheme(value: str | Mapping[str, Any] | QuantScheme) -> QuantScheme:
    """The scheme a config means: a name, or ``dict(type=name, observer=..., ...)`` as :func:`get_scheme` takes it.

    Raises:
        ValueError: as :func:`get_scheme`, or neither of these forms.
    """
    if isinstance(value, QuantScheme):
        return value
    if isinstance(value, str):
        return get_scheme(value)
    if not isinstance(value, Mapping) or 'type' not in value:
        raise ValueError(f"quant_scheme must be a name or dict(type='fqvit_w8a8', ...), got {value!r}")
    options = {k: v for k, v in value.items() if k != '_scope_'}  # mmengine adds _scope_ to inherited dicts
    return get_scheme(options.pop('type'), **options)
