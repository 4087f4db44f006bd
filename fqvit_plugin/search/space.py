"""The search space: groups of layers, what each may be, and the recipe that a point of it means under a budget."""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..weight_quantizer import packed_bytes

__all__ = ['GROUPINGS', 'Group', 'Space', 'derive_groups']

#: role of a layer -> how its path ends or what it holds; the first that matches counts
_ROLES = {
    'embed': r'patch_embed\.',
    'qkv': r'\.qkv$',
    'proj': r'attn\..*proj$',
    'fc1': r'ffn\.(layers\.0\.0|fc1)$',
    'fc2': r'ffn\.(layers\.1|fc2)$',
    'merge': r'\.downsample\.',
    'head': r'^head\.',
}
GROUPINGS = ('role', 'stage', 'block')
_INDEX = r'(?<=backbone\.layers\.)\d+|(?<=backbone\.stages\.)\d+'
_BLOCK = r'(?<=\.blocks\.)\d+'


@dataclass(frozen=True)
class Group:
    """Weight layers that share their bits.

    Args:
        name: for tables, ``fc1`` or ``stage2``.
        layers: glob patterns that match them and no other weight layer.
        sizes: number of weights of each.
        factors: number of factors of each at few bits.
    """

    name: str
    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    factors: tuple[int, ...]

    def num_bytes(self, bits: int) -> int:
        """Bytes of its weights, packed at ``bits``."""
        return sum(packed_bytes(size, bits, f) for size, f in zip(self.sizes, self.factors, strict=True))


def derive_groups(sizes: Mapping[str, tuple[int, int]], grouping: str = 'role') -> tuple[Group, ...]:
    """Groups of the weight layers of a quantized classifier.

    Args:
        sizes: module path -> number of weights and of factors, in the model's order.
        grouping: ``'role'`` (embed, qkv, proj, fc1, fc2, merge, head), ``'stage'`` (Swin's stages; four parts of a
            ViT), or ``'block'``.

    Raises:
        ValueError: unknown grouping.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f'grouping must be one of {", ".join(GROUPINGS)}, got {grouping!r}')
    depth = 1 + max((int(m[1]) for p in sizes if (m := re.search(r'backbone\.layers\.(\d+)', p))), default=0)
    members: dict[str, list[str]] = {}
    for path in sizes:
        members.setdefault(_group_name(path, grouping, depth), []).append(path)
    return tuple(
        Group(name, _patterns(paths, list(sizes)), *zip(*(sizes[p] for p in paths), strict=True))
        for name, paths in members.items()
    )


def _group_name(path: str, grouping: str, depth: int) -> str:
    role = next((role for role, pattern in _ROLES.items() if re.search(pattern, path)), 'other')
    stage = re.search(r'backbone\.stages\.(\d+)(?:\.blocks\.(\d+))?', path)
    layer = re.search(r'backbone\.layers\.(\d+)', path)
    if grouping == 'role' or not (stage or layer):
        return role
    if layer:
        index = int(layer[1])
        return f'quarter{index * 4 // depth}' if grouping == 'stage' and depth > 4 else f'block{index}'
    assert stage is not None
    if grouping == 'stage':
        return f'stage{stage[1]}'
    return f'stage{stage[1]}.{role}' if stage[2] is None else f'stage{stage[1]}.block{stage[2]}'


def _patterns(paths: Sequence[str], everything: Sequence[str]) -> tuple[str, ...]:
    """The fewest globs that match ``paths`` alone: with stars for all numbers, for the block's only, or none."""
    for numbers in (f'{_INDEX}|{_BLOCK}', _BLOCK):
        globs = tuple(dict.fromkeys(re.sub(numbers, '*', p) for p in paths))
        matched = [p for p in everything if any(fnmatch.fnmatchcase(p, g) for g in globs)]
        if set(matched) == set(paths):
            return globs
    return tuple(paths)


@dataclass(frozen=True)
class Space:
    """What is searched.

    Args:
        base: ``quant_scheme`` of the config as a dict; what is not searched stays as it says.
        groups: each gets its weight bits.
        weight_bits: widths a group may have, ascending.
        fixed_bytes: :meth:`fixed_key` of options -> bytes of everything but weights.
        budget: most bytes a recipe may take; ``None`` for no limit.
        options: option of ``get_scheme`` -> the values it may take; ``observer`` values may read
            ``'percentile:0.999'``.
    """

    base: dict[str, Any]
    groups: tuple[Group, ...]
    weight_bits: tuple[int, ...]
    fixed_bytes: dict[str, int]
    budget: int | None = None
    options: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weight_bits or list(self.weight_bits) != sorted(set(self.weight_bits)):
            raise ValueError(f'weight bits must ascend, each once, got {list(self.weight_bits)}')
        narrowest = sum(g.num_bytes(self.weight_bits[0]) for g in self.groups)
        for fixed in self.fixed_bytes.values():
            smallest = fixed + narrowest
            if self.budget is not None and smallest > self.budget:
                raise ValueError(
                    f'the budget of {self.budget:,} bytes cannot be met: with {self.weight_bits[0]} bits everywhere '
                    f'the model takes {smallest:,}. Raise the budget or allow fewer bits'
                )

    def num_bytes(self, bits: Mapping[str, int], options: Mapping[str, Any]) -> int:
        """Bytes of the model with these bits for each group, as surgery's report counts them."""
        fixed = self.fixed_bytes[self.fixed_key({**self.base, **options})]
        return fixed + sum(g.num_bytes(bits[g.name]) for g in self.groups)

    @staticmethod
    def fixed_key(scheme: Mapping[str, Any]) -> str:
        """The part of ``quant_scheme`` that decides how many scales there are."""
        return json.dumps([scheme.get(name) for name in ('ptf', 'lis', 'attn_bits')])

    def to_nni(self) -> dict[str, Any]:
        """NNI's form; an option with a single value is not searched."""
        space = {f'bits/{g.name}': list(self.weight_bits) for g in self.groups}
        space.update(self.options)
        return {k: {'_type': 'choice', '_value': v} for k, v in space.items() if len(v) > 1}

    def recipe(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The ``quant_scheme`` a point of the space means, fitted to the budget.

        No trial is wasted on a recipe that cannot win. One over budget is shrunk, a step of the group with the most
        bits at a time, of several the one with the most weights. What is left then is filled the other way round.
        """
        single = {k: v[0] for k, v in self.options.items()}
        options = {k: point.get(k, v) for k, v in single.items()}
        bits = {g.name: point.get(f'bits/{g.name}', self.weight_bits[0]) for g in self.groups}
        return self.build(self._fitted(bits, options), options)

    def uniform(self, bits: int, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The ``quant_scheme`` with the same weight bits everywhere."""
        return self.build({g.name: bits for g in self.groups}, options or {})

    def build(self, bits: Mapping[str, int], options: Mapping[str, Any]) -> dict[str, Any]:
        """``quant_scheme`` with these bits and options: the commonest width for all, overrides for the others."""
        weights = Counter(dict.fromkeys(bits.values(), 0))
        for group in self.groups:
            weights[bits[group.name]] += sum(group.sizes)
        (common, _) = weights.most_common(1)[0]
        given = [rest for o in self.base.get('overrides', []) if len(rest := _without_weight_bits(o)) > 1]
        for width in sorted(set(bits.values()) - {common}):
            layers = [p for g in self.groups if bits[g.name] == width for p in g.layers]
            given.append({'layers': layers[0] if len(layers) == 1 else layers, 'weight_bits': width})
        scheme = {k: v for k, v in self.base.items() if k != 'overrides'}
        scheme.update({k: _option(v) for k, v in options.items()}, weight_bits=common)
        return {**scheme, 'overrides': given} if given else scheme

    def _fitted(self, bits: dict[str, int], options: Mapping[str, Any]) -> dict[str, int]:
        if self.budget is None:
            return bits
        while self.num_bytes(bits, options) > self.budget:
            reducible = [g for g in self.groups if bits[g.name] > self.weight_bits[0]]
            widest = max(reducible, key=lambda g: (bits[g.name], sum(g.sizes)))
            bits[widest.name] = self._step(bits[widest.name], -1)
        while True:
            higher = [{**bits, n: self._step(b, 1)} for n, b in bits.items() if b < self.weight_bits[-1]]
            fitting = [h for h in higher if self.num_bytes(h, options) <= self.budget]
            if not fitting:
                return bits
            # sorted widths: the one that raises the narrowest group is the largest of these lists
            bits = max(fitting, key=lambda h: (sorted(h.values()), -self.num_bytes(h, options)))

    def _step(self, bits: int, by: int) -> int:
        return self.weight_bits[self.weight_bits.index(bits) + by]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them."""
        return {**vars(self), 'groups': [vars(g) for g in self.groups]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Space:
        """What :meth:`to_dict` wrote."""
        groups = tuple(
            Group(g['name'], *(tuple(g[k]) for k in ('layers', 'sizes', 'factors'))) for g in data['groups']
        )
        return cls(**{**data, 'groups': groups, 'weight_bits': tuple(data['weight_bits'])})


def _without_weight_bits(override: Mapping[str, Any]) -> dict[str, Any]:
    """The search decides about weights; what the config overrides beside them stays."""
    return {k: v for k, v in override.items() if k != 'weight_bits'}


def _option(value: Any) -> Any:
    """``'percentile:0.999'`` as ``dict(type='percentile', alpha=0.999)``; anything else as it is."""
    if isinstance(value, str) and ':' in value:
        name, _, alpha = value.partition(':')
        return {'type': name, 'alpha': float(alpha)}
    return value
