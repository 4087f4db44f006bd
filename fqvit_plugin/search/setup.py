"""From a config and a command line to a search space, and the uniform recipes that a search has to beat."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .objective import Objective, Outcome
from .space import Space, derive_groups

__all__ = ['configured_scheme', 'make_space', 'measure_baselines', 'parse_budget']


def configured_scheme(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """``quant_scheme`` of a config as a plain dict; W8A8 where there is none."""
    configured = cfg.get('quant_scheme') or 'fqvit_w8a8'
    if isinstance(configured, str):
        return {'type': configured}
    plain: dict[str, Any] = json.loads(json.dumps(dict(configured)))  # ConfigDict and tuples become plain
    return {k: v for k, v in plain.items() if k != '_scope_'}


def parse_budget(text: str | None, uniform8: int) -> int | None:
    """Bytes of ``'4MB'`` or of ``'0.75'``, a share of ``uniform8``.

    Raises:
        ValueError: neither, or not positive.
    """
    if text is None:
        return None
    number = text.strip().upper().removesuffix('MB')
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ValueError(f'--budget must read like 4MB or 0.75, got {text!r}')
    if number != text.strip().upper():
        return int(value * 1e6)
    if value > 1:
        raise ValueError(f'--budget {text}: a share of the size at 8 bits is at most 1; write {text}MB for megabytes')
    return int(value * uniform8)


def make_space(
    objective: Objective,
    base: dict[str, Any],
    budget: str | None,
    grouping: str,
    weight_bits: Sequence[int],
    options: dict[str, list[Any]],
) -> Space:
    """The space of a model: its groups, and what everything but weights takes.

    Raises:
        ValueError: the budget cannot be met, or an option has no such value.
    """
    sizes = objective.weight_sizes(base)
    groups = derive_groups(sizes, grouping)
    weights8 = sum(g.num_bytes(8) for g in groups)
    names = [n for n in ('ptf', 'lis', 'attn_bits') if n in options]
    fixed = {}
    combinations = itertools.product(*(options[n] for n in names))
    for values in [[], *map(list, combinations)]:
        scheme = {**base, **dict(zip(names, values, strict=False)), 'overrides': []}
        fixed[Space.fixed_key(scheme)] = objective.num_bytes({**scheme, 'weight_bits': 8}) - weights8
    uniform8 = fixed[Space.fixed_key(base)] + weights8
    limit = parse_budget(budget, uniform8)
    space = Space(base, groups, tuple(weight_bits), fixed, limit, options)
    for name, values in options.items():  # a value that does not exist must not cost a trial
        for value in values:
            objective.num_bytes(space.uniform(weight_bits[0], {name: value}))
    return space


def measure_baselines(
    objective: Objective, space: Space, found: Sequence[Outcome], say: Callable[[str], None]
) -> list[Outcome]:
    """Uniform recipes, on the same images: each width with the config's options and with those of the best found."""
    best = max(found, key=lambda o: o.score)
    options = {k: best.recipe[k] for k in space.options if k in best.recipe}  # values as get_scheme takes them
    outcomes: list[Outcome] = []
    for bits in space.weight_bits:
        for source, recipe in (
            (f'uniform W{bits}', space.uniform(bits)),
            (f"uniform W{bits}, best's options", space.uniform(bits, options)),
        ):
            outcome = objective.measure(recipe, source)
            if outcome.key not in {o.key for o in outcomes}:
                say(f'{source}: top-1 {outcome.top1:.2f} %, {outcome.num_bytes / 1e6:.3f} MB')
                outcomes.append(outcome)
    return outcomes
