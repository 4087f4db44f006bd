"""Which bits each layer gets under a budget: an integer programme over measured divergences.

For every layer ``l`` and width ``b`` a binary ``x[l, b]``, one per layer, so that the sum of divergences is least::

    minimize    sum KL[l, b] x[l, b]  (+ the same of the activations that feed the layers)
    subject to  sum_b x[l, b] = 1,  sum bytes[l, b] x[l, b] <= budget

Bit operations of a layer are multiply-accumulates times bits of its weight times bits of its input. Where both are
chosen, a binary ``y[l, b, a]`` stands for their product.

Sources: HAWQ-V3 (Yao et al., ICML 2021) for the integer programme; its sensitivities are Hessian traces, ours are the
divergences that were measured with one layer quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ..layers import QAct, QConv2d, QLinear
from ..weight_quantizer import factors_of, packed_bytes
from .records import Sensitivity

__all__ = [
    'Allocation',
    'LayerCost',
    'allocate',
    'allocated_scheme',
    'costs_of',
    'multiplications',
    'stored_bytes',
]


@dataclass(frozen=True)
class LayerCost:
    """What a layer takes and costs at each width.

    Args:
        path: of the layer.
        weights: how many it has.
        kl: bits of the weight -> divergence with this weight alone quantized.
        macs: multiply-accumulates for one image.
        input_path: the activation that it reads; empty where nobody told.
        input_bits: bits of that activation.
        input_kl: bits of that activation -> divergence with it alone quantized; empty where it is not chosen.
        factors: how many the weights have at few bits.
    """

    path: str
    weights: int
    kl: Mapping[int, float]
    macs: int = 0
    input_path: str = ''
    input_bits: int = 8
    input_kl: Mapping[int, float] = field(default_factory=dict)
    factors: int = 0


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Args:
        weight_bits: path of a layer -> bits.
        act_bits: path of an activation -> bits, for those that were chosen.
        kl: the sum that was minimized.
        num_bytes: of the weights.
        bit_ops: for one image.
    """

    weight_bits: Mapping[str, int]
    act_bits: Mapping[str, int]
    kl: float
    num_bytes: int
    bit_ops: int


def stored_bytes(cost: LayerCost, bits: int, as_file: bool = False) -> int:
    """Bytes of weights, packed to their bits; or at most as an integer checkpoint stores them, 4 bits or more."""
    if as_file:
        bits = max(bits, 4)
    return packed_bytes(cost.weights, bits, cost.factors)


def costs_of(result: Sensitivity, layers: Mapping[str, Any], macs: Mapping[str, int]) -> list[LayerCost]:
    """The costs of every weight that was measured, in the order of the network.

    Args:
        result: measured with several ``weight_bits``, and ``act_bits`` where activations are chosen.
        layers: path -> Q layer, of the same model.
        macs: of :func:`multiplications`.

    Raises:
        ValueError: a weight was measured at other bits than the rest, or belongs to another model.
    """
    measured: dict[str, dict[int, float]] = {}
    for entry in result.entries:
        if entry.unit == 'tensor' and entry.bits is not None and entry.only is not None:
            measured.setdefault(entry.name, {})[entry.bits] = entry.only.kl
    if unknown := [name for name in measured if name not in layers]:
        raise ValueError(f'the sensitivities are of another model: it has no layer {unknown[0]}')
    names = {layer: path for path, layer in layers.items()}
    costs = []
    for path, layer in layers.items():
        if isinstance(layer, (QConv2d, QLinear)) and path in measured:
            act: Any = getattr(layer, '_input_act', (None,))[0]
            feeds = names.get(act, '')
            bits = act.quantizer.spec.bit_type.bits if isinstance(act, QAct) else 8
            kl, input_kl = measured[path], measured.get(feeds, {})
            costs.append(
                LayerCost(
                    path,
                    layer.weight.numel(),
                    kl,
                    macs.get(path, 0),
                    feeds,
                    bits,
                    input_kl if len(input_kl) > 1 else {},
                    factors_of(layer.weight, layer.weight_quantizer.spec),
                )
            )
    if not costs:
        raise ValueError('no weight was measured: the sensitivities need single tensors and the direction only')
    return costs


def allocate(
    costs: Sequence[LayerCost],
    candidates: Sequence[int],
    act_candidates: Sequence[int] = (),
    *,
    max_bytes: int | None = None,
    max_bit_ops: float | None = None,
    as_file: bool = False,
) -> Allocation:
    """The widths of least total divergence under the budgets.

    Args:
        costs: of every layer.
        candidates: bits that a weight may have.
        act_candidates: bits that an activation which feeds a layer may have; none leaves all as they are.
        max_bytes: of all weights, counted by :func:`stored_bytes`.
        max_bit_ops: of all layers, for one image.
        as_file: count bytes as an integer checkpoint stores them.

    Raises:
        ValueError: a width was not measured, there is no budget, or none of the choices meets it.
    """
    if max_bytes is None and max_bit_ops is None:
        raise ValueError('nothing to allocate under: give a budget of bytes or of bit operations')
    problem = _Problem(costs, sorted(set(candidates)), sorted(set(act_candidates)))
    if max_bytes is not None:
        problem.limit(lambda cost, bits, _: stored_bytes(cost, bits, as_file), max_bytes, 'bytes')
    if max_bit_ops is not None:
        problem.limit(lambda cost, bits, act: cost.macs * bits * act, max_bit_ops, 'bit operations')
    pairs, act_bits = problem.solve()
    weight_bits = {cost.path: pair[0] for cost, pair in zip(costs, pairs, strict=True)}
    kl = sum(cost.kl[pair[0]] for cost, pair in zip(costs, pairs, strict=True))
    kl += sum(problem.act_kl[path][bits] for path, bits in act_bits.items())
    return Allocation(
        weight_bits,
        act_bits,
        kl,
        sum(stored_bytes(cost, pair[0], as_file) for cost, pair in zip(costs, pairs, strict=True)),
        sum(cost.macs * pair[0] * pair[1] for cost, pair in zip(costs, pairs, strict=True)),
    )


class _Problem:
    """The programme: one binary for each layer and pair of widths, then one for each activation and width."""

    def __init__(self, costs: Sequence[LayerCost], bits: list[int], act_bits: list[int]) -> None:
        if not bits:
            raise ValueError('no candidate for the bits of weights')
        chosen = {c.input_path: c.input_kl for c in costs if act_bits and c.input_path and c.input_kl}
        self.act_kl: dict[str, Mapping[int, float]] = chosen
        for path, kl in [*((c.path, c.kl) for c in costs), *chosen.items()]:
            if missing := [b for b in (act_bits if path in chosen else bits) if b not in kl]:
                raise ValueError(f'{path} was measured at {sorted(kl)} bits, not at {missing[0]}')
        self.pairs = [
            (i, b, a)
            for i, c in enumerate(costs)
            for b in bits
            for a in (act_bits if c.input_path in chosen else [c.input_bits])
        ]
        self.acts = [(path, a) for path in chosen for a in act_bits]
        self.costs = costs
        self.weights = [costs[i].kl[b] for i, b, _ in self.pairs] + [chosen[path][a] for path, a in self.acts]
        self.rows: list[np.ndarray] = []
        self.low: list[float] = []
        self.high: list[float] = []
        for i in range(len(costs)):
            self._add(lambda k, i=i: k[0] == i, lambda _: False, 1, 1)
        for path in chosen:
            self._add(lambda _: False, lambda k, path=path: k[0] == path, 1, 1)
        for i, c in enumerate(costs):
            for a in act_bits if c.input_path in chosen else ():
                self._tie(i, c.input_path, a)

    def _add(self, of_pair: Callable[..., Any], of_act: Callable[..., Any], low: float, high: float) -> None:
        row = [float(of_pair(k)) for k in self.pairs] + [float(of_act(k)) for k in self.acts]
        self.rows.append(np.array(row))
        self.low.append(low)
        self.high.append(high)

    def _tie(self, i: int, path: str, act_bits: int) -> None:
        """A layer's pairs have the bits that its input has."""
        self._add(lambda k: (k[0], k[2]) == (i, act_bits), lambda k: -((path, act_bits) == k), 0, 0)

    def limit(self, size: Callable[[LayerCost, int, int], float], most: float, unit: str) -> None:
        """Forbid sums of ``size`` above ``most``."""
        sizes = {i: [size(c, b, a) for j, b, a in self.pairs if j == i] for i, c in enumerate(self.costs)}
        least = sum(map(min, sizes.values()))
        if least > most:
            raise ValueError(f'the budget of {most:,.0f} {unit} cannot be met: the fewest bits take {least:,.0f}')
        # in shares of the budget: solvers compare with tolerances
        self._add(lambda k: size(self.costs[k[0]], k[1], k[2]) / most, lambda _: 0, -np.inf, 1)

    def solve(self) -> tuple[list[tuple[int, int]], dict[str, int]]:
        """Bits of each layer's weight and input, and of each activation."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        objective = np.array(self.weights)
        found = milp(
            objective / max(objective.max(), 1e-300),
            integrality=np.ones(len(objective)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(np.stack(self.rows), self.low, self.high),
            options={'mip_rel_gap': 0, 'time_limit': 60},
        )
        if found.x is None:
            raise ValueError(f'no bits were found: {found.message}')
        on = found.x > 0.5
        pairs = {i: (b, a) for (i, b, a), is_on in zip(self.pairs, on, strict=False) if is_on}
        acts = {path: a for (path, a), is_on in zip(self.acts, on[len(self.pairs) :], strict=True) if is_on}
        return [pairs[i] for i in range(len(self.costs))], acts


def allocated_scheme(base: Mapping[str, Any], found: Allocation) -> dict[str, Any]:
    """``quant_scheme`` of a config with the bits that were chosen.

    Args:
        base: the given one as a dict.
        found: of :func:`allocate`.
    """
    given = list(base.get('overrides', ()))
    usual = Counter(found.weight_bits.values()).most_common(1)[0][0]
    # an override that is there already would come before a width for all
    named = any('weight_bits' in override for override in given)
    overrides = []
    for name, chosen in (('weight_bits', found.weight_bits), ('act_bits', found.act_bits)):
        for bits in sorted(set(chosen.values())):
            layers = [path for path, b in chosen.items() if b == bits]
            if name == 'act_bits' or named or bits != usual:
                overrides.append({'layers': layers, name: bits})
    return {**base, 'weight_bits': usual, 'overrides': [*given, *overrides]}


@torch.no_grad()
def multiplications(layers: Mapping[str, Any], run: Callable[[], Any], images: int) -> dict[str, int]:
    """Multiply-accumulates of each weight layer for one image.

    Args:
        layers: path -> Q layer, of a model in phase float.
        run: passes a batch of ``images`` through the model.
    """
    counts: dict[str, int] = {}

    def count(path: str, layer: Any, _args: Any, output: Any) -> None:
        positions = output.numel() // layer.weight.shape[0]
        counts[path] = counts.get(path, 0) + positions * layer.weight.numel()

    hooks = [
        layer.register_forward_hook(partial(count, path))
        for path, layer in layers.items()
        if isinstance(layer, (QConv2d, QLinear))
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total // images for path, total in counts.items()}
