"""What is switched as one: every tensor, and the tensors of a layer, of a block, and of a kind together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..analysis.records import block_of
from ..layers import QAct, QConv2d, QIntLayerNorm, QIntSoftmax, QLinear
from ..quantizers import Quantizer, UniformQuantizer
from .kinds import KINDS, WEIGHTS, kind_of, layer_of
from .records import LEVELS
from .switches import narrowed, weight_at

__all__ = ['Unit', 'units_of']


@dataclass(frozen=True)
class Unit:
    """Some Q layers that are switched together.

    Args:
        name, level, kind, block: as in :class:`~fqvit_plugin.sensitivity.records.Entry`.
        members: paths of the Q layers.
        bits: of the one tensor it is.
        instead: quantizers of other bits that its layers get.
    """

    name: str
    level: str
    kind: str
    block: str
    members: tuple[str, ...]
    bits: int | None = None
    instead: Mapping[str, Quantizer] = field(default_factory=dict)


def units_of(
    layers: Mapping[str, Any],
    levels: Collection[str] = LEVELS,
    weight_bits: Sequence[int] = (),
    act_bits: Sequence[int] = (),
) -> list[Unit]:
    """The units of a calibrated model, in its order, smaller ones first.

    Args:
        layers: path -> Q layer.
        levels: some of :data:`~fqvit_plugin.sensitivity.records.LEVELS`.
        weight_bits: further bits at which every weight is measured, its range found anew.
        act_bits: further bits at which every activation on a uniform grid is measured, in the range that it has.

    Raises:
        ValueError: there is no such level, or no such width.
    """
    if unknown := sorted(set(levels).difference(LEVELS)):
        raise ValueError(f'unknown level {unknown[0]!r}; there is: {", ".join(LEVELS)}')
    kinds = {path: kind_of(path, layer) for path, layer in layers.items()}
    tensors = [Unit(p, 'tensor', kinds[p], block_of(p), (p,), _bits_of(layer)) for p, layer in layers.items()]
    found: list[Unit] = tensors if 'tensor' in levels else []
    found = found + [
        Unit(u.name, 'tensor', u.kind, u.block, u.members, bits, {u.name: _at(layers[u.name], bits)})
        for u in tensors
        for bits in (weight_bits if u.kind == WEIGHTS else act_bits)
        if bits != u.bits and _has_grid(layers[u.name])
    ]
    if 'layer' in levels:
        found += _together(tensors, 'layer', {u.name: layer_of(u.name) for u in tensors}, kinds)
    if 'block' in levels:
        found += _together(tensors, 'block', {u.name: u.block for u in tensors}, kinds)
    if 'group' in levels:
        by_kind = [u for kind in KINDS for u in tensors if u.kind == kind]
        found += _together(by_kind, 'group', kinds, kinds)
    return found


def _together(tensors: Sequence[Unit], level: str, key: Mapping[str, str], kinds: Mapping[str, str]) -> list[Unit]:
    members: dict[str, list[str]] = {}
    for unit in tensors:
        members.setdefault(key[unit.name], []).append(unit.name)
    units = []
    for name, paths in members.items():
        if len(paths) > 1 or level == 'group':
            kind = kinds[paths[0]] if len({kinds[p] for p in paths}) == 1 else ''
            block = '' if level == 'group' else block_of(paths[0])
            units.append(Unit(name, level, kind, block, tuple(paths)))
    return units


def _bits_of(layer: Any) -> int | None:
    if isinstance(layer, QIntLayerNorm):
        return None
    if isinstance(layer, QIntSoftmax):
        return layer.spec.bit_type.bits
    quantizer = layer.weight_quantizer if isinstance(layer, (QConv2d, QLinear)) else layer.quantizer
    bits: int = quantizer.spec.bit_type.bits
    return bits


def _has_grid(layer: Any) -> bool:
    if isinstance(layer, (QConv2d, QLinear)):
        return isinstance(layer.weight_quantizer, UniformQuantizer)
    return isinstance(layer, QAct) and isinstance(layer.quantizer, UniformQuantizer)


def _at(layer: Any, bits: int) -> Quantizer:
    return narrowed(layer.quantizer, bits) if isinstance(layer, QAct) else weight_at(layer, bits)
