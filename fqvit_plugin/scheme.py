"""Recipes as frozen values: which tensor becomes which integer, and by which rules.

A scheme is parsed once, at the edge (hook, tool, config), and cannot be wrong afterwards: every error is raised
here and names the field, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .functional import Arithmetic
from .registry import OBSERVERS, QUANTIZERS, STEPS, lookup

if TYPE_CHECKING:
    from .observers import Observer

__all__ = [
    'PRESETS',
    'BitType',
    'Override',
    'QuantScheme',
    'QuantSpec',
    'StepSpec',
    'by_channel',
    'parse_observer',
    'require_bool',
]

PRESETS = ('strict', 'reference')


@dataclass(frozen=True)
class BitType:
    """An integer type of 2 to 16 bits, for instance ``BitType(8, signed=False)`` for uint8."""

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise ValueError(f'bits must be a whole number from 2 to 16, got {self.bits!r}')

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def name(self) -> str:
        """``int8``, ``uint4``, …"""
        return f'{"" if self.signed else "u"}int{self.bits}'

    @classmethod
    def parse(cls, name: str | BitType) -> BitType:
        """Read ``'int8'`` or ``'uint4'``; a BitType passes through.

        Raises:
            ValueError: not of that form, or outside 2 to 16 bits.
        """
        if isinstance(name, BitType):
            return name
        stem = name[1:] if name.startswith('u') else name
        if not (stem.startswith('int') and stem[3:].isdigit()):
            raise ValueError(f'bit type must read like int8 or uint4, got {name!r}')
        return cls(int(stem[3:]), signed=not name.startswith('u'))


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Args:
        bit_type: the integers it becomes.
        observer: name in ``OBSERVERS``; how its range is found.
        axis: the axis that keeps its own scale, ``None`` for one scale per tensor.
        quantizer: name in ``QUANTIZERS``; ``'uniform'`` or ``'log2'``.
        arithmetic: ``'strict'`` or ``'reference'``.
        observer_options: keyword arguments of the observer, as sorted pairs.
        group_size: of a weight with a scale for each row: how many columns share a factor; ``None`` for no factors.
    """

    bit_type: BitType
    observer: str = 'minmax'
    axis: int | None = None
    quantizer: str = 'uniform'
    arithmetic: Arithmetic = 'strict'
    observer_options: tuple[tuple[str, float], ...] = ()
    group_size: int | None = None

    def __post_init__(self) -> None:
        lookup(QUANTIZERS, self.quantizer)
        if self.arithmetic not in PRESETS:
            raise ValueError(f'preset must be one of {", ".join(PRESETS)}, got {self.arithmetic!r}')
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 2):
            raise ValueError(f'group_size must be None or a whole number from 2, got {size!r}')
        if size is not None and (self.axis != 0 or not self.bit_type.signed or self.arithmetic == 'reference'):
            raise ValueError("group_size is for signed weights with a scale for each row, under preset='strict'")
        self.build_observer()  # a recipe that cannot be built is no recipe

    def build_observer(self) -> Observer:
        """A fresh observer of this recipe.

        Raises:
            ValueError: unknown observer, or one that does not take these options or no axis.
        """
        observer = lookup(OBSERVERS, self.observer)
        options = dict(self.observer_options)
        try:
            return observer(self.bit_type, axis=self.axis, arithmetic=self.arithmetic, **options)
        except TypeError as error:  # mmengine swallows the traceback of a TypeError in a hook
            reason = str(error).split('() ')[-1]
            raise ValueError(f'observer {self.observer!r} does not take {options}: {reason}') from None


@dataclass(frozen=True)
class Override:
    """What some layers do otherwise than the scheme says; see :meth:`parse` for the form in a config.

    Args:
        layers: glob patterns of module paths in the quantized classifier, as ``named_modules()`` gives them;
            ``*`` stands for anything, dots too.
        weight_bits: of matching convolutions and linear layers.
        act_bits: of matching activations; Power-of-Two Factor stays where it is.
        attn_bits: of matching attention probabilities.
        observer: of matching activations without Power-of-Two Factor.
        observer_options: keyword arguments of the observer, as sorted pairs.
    """

    layers: tuple[str, ...]
    weight_bits: int | None = None
    act_bits: int | None = None
    attn_bits: int | None = None
    observer: str | None = None
    observer_options: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.layers or not all(isinstance(p, str) and p for p in self.layers):
            raise ValueError(f"layers of an override must be a glob such as 'backbone.*.ffn.*', got {self.layers!r}")
        if not self.fields:
            raise ValueError(f'override of {self.layers[0]!r} changes nothing: give {", ".join(_CHANGES)}')
        for field in self.fields:
            if field != 'observer':
                BitType(getattr(self, field), signed=False)
        if self.observer is not None:
            QuantSpec(BitType(8, False), self.observer, observer_options=self.observer_options)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of what it changes."""
        return tuple(name for name in _CHANGES if getattr(self, name) is not None)

    @classmethod
    def parse(cls, value: Mapping[str, Any] | Override) -> Override:
        """Read ``dict(layers='backbone.layers.*.ffn.*', weight_bits=4, observer='percentile')``.

        ``layers`` is a pattern or a list of them; ``observer`` a name, or a dict as ``get_scheme`` takes it.

        Raises:
            ValueError: an unknown field, no pattern, or a width or observer there is not.
        """
        if isinstance(value, Override):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"an override must read dict(layers='backbone.*.ffn.*', weight_bits=4), got {value!r}")
        values = {k: v for k, v in value.items() if k != '_scope_'}
        if unknown := sorted(set(values) - {'layers', *_CHANGES}):
            raise ValueError(f'unknown field {unknown[0]!r} of an override; there is: layers, {", ".join(_CHANGES)}')
        layers = values.pop('layers', ())
        if (observer := values.pop('observer', None)) is not None:
            values['observer'], values['observer_options'] = parse_observer(observer)
        return cls(layers=(layers,) if isinstance(layers, str) else tuple(layers), **values)


_CHANGES = ('weight_bits', 'act_bits', 'attn_bits', 'observer')


@dataclass(frozen=True)
class StepSpec:
    """A step of calibration beyond finding ranges, by its name in ``STEPS`` and its options, as sorted pairs."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Any:
        """The step.

        Raises:
            ValueError: unknown step, or one that does not take these options.
        """
        step = lookup(STEPS, self.name)
        try:
            return step(**dict(self.options))
        except TypeError as error:
            reason = str(error).split('() ')[-1]
            raise ValueError(f'step {self.name!r} does not take {dict(self.options)}: {reason}') from None

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | StepSpec) -> StepSpec:
        """Read ``'round'`` or ``dict(type='round', damp=0.01)``.

        Raises:
            ValueError: neither of these forms, or not to be built.
        """
        if isinstance(value, StepSpec):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping) or 'type' not in value:
            raise ValueError(f"a step must be a name or dict(type='round', ...), got {value!r}")
        options = {k: v for k, v in value.items() if k not in ('_scope_', 'type')}
        return cls(value['type'], tuple(sorted(options.items())))


#: Fields of a scheme that say how a kind of tensor is quantized.
_SPECS = ('weight', 'edge_weight', 'act', 'operand', 'hidden', 'branch', 'norm_input', 'probs')


@dataclass(frozen=True)
class QuantScheme:
    """How every kind of tensor of a vision transformer becomes integer codes; see :mod:`fqvit_plugin.presets`.

    Args:
        name: what the recipe is called in reports and checkpoints.
        weight: weights of the blocks' linear layers; axis 0 keeps its own scale.
        edge_weight: weights outside of blocks: patch embedding and classifier.
        act: activations that no block multiplies: image, attention logits, features, class logits.
        operand: activations that products in blocks read: outputs of LayerNorm, query, key, value, context; levels
            where bits are few.
        hidden: what an MLP holds between its linear layers.
        branch: what attention and MLP hand to the residual sum, and what a plain ViT's stream begins as (patches,
            class token, position embedding); in strict arithmetic a scale for each channel.
        norm_input: the residual stream, which every LayerNorm reads (Power-of-Two Factor lives here).
        probs: attention probabilities.
        log_int_softmax: integer Log-Int-Softmax instead of a float softmax with quantized output.
        int_norm: integer LayerNorm instead of a float one with quantized output.
        input_quant: quantize the normalized image too.
        overrides: what some layers do otherwise; of two that match a layer, the later one holds.
        steps: what calibration does beyond finding ranges, in order.
    """

    name: str
    weight: QuantSpec
    edge_weight: QuantSpec
    act: QuantSpec
    operand: QuantSpec
    hidden: QuantSpec
    branch: QuantSpec
    norm_input: QuantSpec
    probs: QuantSpec
    log_int_softmax: bool
    int_norm: bool
    input_quant: bool
    overrides: tuple[Override, ...] = ()
    steps: tuple[StepSpec, ...] = ()

    def __post_init__(self) -> None:
        for field in ('log_int_softmax', 'int_norm', 'input_quant'):
            require_bool(field, getattr(self, field))

    @property
    def arithmetic(self) -> Arithmetic:
        """The preset, which is one for the whole model."""
        return self.act.arithmetic

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as written into a checkpoint; :meth:`from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantScheme:
        """The scheme that :meth:`to_dict` wrote.

        Raises:
            ValueError: a field is missing or unknown.
        """
        try:
            values = dict(data)
            for field in _SPECS:
                spec = dict(values[field])
                spec['bit_type'] = BitType(**spec['bit_type'])
                spec['observer_options'] = _pairs(spec['observer_options'])
                values[field] = QuantSpec(**spec)
            values['overrides'] = tuple(_read_override(item) for item in values.get('overrides', ()))
            values['steps'] = tuple(StepSpec(s['name'], _pairs(s['options'])) for s in values['steps'])
            return cls(**values)
        except KeyError as error:
            raise ValueError(f'not a quantization scheme of this version: it says nothing of {error}') from None
        except TypeError as error:
            raise ValueError(f'not a quantization scheme of this version: {error}') from None

    def differences(self, other: QuantScheme) -> list[str]:
        """One line per field in which ``other`` differs, ``field: ours != theirs``; empty when equal."""
        return _differences(self.to_dict(), other.to_dict())


def _read_override(data: Mapping[str, Any]) -> Override:
    return Override(
        **{**data, 'layers': tuple(data['layers']), 'observer_options': _pairs(data['observer_options'])}
    )


def _pairs(items: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((key, value) for key, value in items)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = '') -> list[str]:
    lines = []
    for key, value in ours.items():
        if isinstance(value, Mapping):
            lines += _differences(value, theirs[key], f'{prefix}{key}.')
        elif value != theirs[key]:
            lines.append(f'{prefix}{key}: {value!r} != {theirs[key]!r}')
    return lines


def by_channel(spec: QuantSpec) -> QuantSpec:
    """``spec`` with a scale for each channel of the last axis, where its observer knows axes."""
    try:
        return dataclasses.replace(spec, axis=-1)
    except ValueError:
        return spec


def require_bool(name: str, value: Any) -> None:
    """``--cfg-options quant_scheme.lis=no`` gives a string, which would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f'{name} must be True or False, got {value!r}')


def parse_observer(observer: str | Mapping[str, Any]) -> tuple[str, tuple[tuple[str, float], ...]]:
    if isinstance(observer, str):
        return observer, ()
    options = dict(observer)
    name = options.pop('type', None)
    if name is None:
        raise ValueError(f'observer must be a name or dict(type=name, …), got {dict(observer)!r}')
    return name, tuple(sorted(options.items()))
