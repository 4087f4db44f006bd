"""What an experiment found: the winner, a table, JSON, a Pareto plot, and the winner's config."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich import box
from rich.table import Table

from ..presets import parse_scheme
from .objective import Outcome, Setting
from .space import Group

__all__ = ['choose', 'derived_config', 'describe', 'make_table', 'pareto', 'write_config', 'write_json', 'write_plot']


def choose(outcomes: Sequence[Outcome], budget: int | None) -> Outcome:
    """The best score under the budget; of equal ones the smallest, of those the first.

    Raises:
        ValueError: nothing is under the budget.
    """
    fitting = [o for o in outcomes if budget is None or o.num_bytes <= budget]
    if not fitting:
        raise ValueError(f'no recipe takes at most {budget} bytes')
    return max(fitting, key=lambda o: (o.score, -o.num_bytes))


def pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that no smaller or equally small one beats, by size."""
    front: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda o: (o.num_bytes, -o.score)):
        if not front or outcome.score > front[-1].score:
            front.append(outcome)
    return front


def describe(recipe: dict[str, Any], groups: Sequence[Group] = ()) -> str:
    """Bits and options of a recipe in one line, ``W6, fc1 fc2: 4 (A8, attn8, minmax, ptf, lis)``."""
    scheme = parse_scheme(recipe)
    names = {pattern: group.name for group in groups for pattern in group.layers}
    bits = [f'W{scheme.weight.bit_type.bits}']
    for override in scheme.overrides:
        where = ' '.join(dict.fromkeys(names.get(p, p) for p in override.layers))
        bits += [f'{where}: {getattr(override, name)}' for name in override.fields]
    alpha = dict(scheme.act.observer_options).get('alpha')
    observer = scheme.act.observer if alpha is None else f'{scheme.act.observer}:{alpha:g}'
    flags = [f'A{scheme.act.bit_type.bits}', f'attn{scheme.probs.bit_type.bits}', observer]
    flags += ['ptf' if scheme.norm_input.observer == 'ptf' else 'no ptf']
    flags += ['lis' if scheme.log_int_softmax else 'no lis']
    return f'{", ".join(bits)} ({", ".join(flags)})'


def make_table(
    outcomes: Sequence[Outcome], winner: Outcome, float_top1: float, groups: Sequence[Group] = (), limit: int = 12
) -> Table:
    """The best recipes, each once, and every baseline, best first."""
    first = {(o.source, o.key): o for o in reversed(outcomes)}
    ranked = sorted(first.values(), key=lambda o: (-o.score, o.num_bytes))
    searched = {id(o) for o in [o for o in ranked if o.source == 'search'][:limit]}
    table = Table(box=box.SIMPLE_HEAD, title=f'float: top-1 {float_top1:.2f} %', title_justify='left')
    for name in ('', 'source'):
        table.add_column(name, no_wrap=True)
    for name in ('top-1 %', 'divergence', 'MB'):
        table.add_column(name, no_wrap=True, justify='right')
    table.add_column('recipe')
    front = {id(o) for o in pareto(ranked)}
    for outcome in ranked:
        if outcome.source != 'search' or id(outcome) in searched or outcome == winner:
            mark = '>' if outcome == winner else '*' if id(outcome) in front else ''
            numbers = f'{outcome.top1:.2f}', f'{outcome.divergence:.5f}', f'{outcome.num_bytes / 1e6:.4f}'
            table.add_row(mark, outcome.source, *numbers, describe(outcome.recipe, groups))
    table.caption = (
        f'>: best under the budget; *: nothing as small is better. {winner.images} images scored, one is '
        f'{100 / winner.images:.2f}.\ndivergence: mean KL from the float model, nats; it decides where top-1 ties.'
    )
    table.caption_justify = 'left'
    return table


def write_json(path: Path, outcomes: Sequence[Outcome], winner: Outcome, facts: dict[str, Any]) -> None:
    """Everything measured, for a program; ``facts`` (budget, images, float accuracy) come first."""
    data = {**facts, 'best': winner.to_dict(), 'measured': [o.to_dict() for o in outcomes]}
    path.write_text(json.dumps(data, indent=2) + '\n', encoding='utf-8')


def write_plot(
    path: Path, outcomes: Sequence[Outcome], winner: Outcome, float_top1: float, budget: int | None
) -> None:
    """Size against accuracy as PNG: trials, baselines, the Pareto front, the budget, the winner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes: Any = figure.subplots()
    for searched, colour, label in ((True, 'tab:blue', 'search'), (False, 'tab:orange', 'uniform')):
        shown = [o for o in outcomes if (o.source == 'search') is searched]
        if shown:
            sizes, scores = [o.num_bytes / 1e6 for o in shown], [o.top1 for o in shown]
            axes.scatter(sizes, scores, color=colour, label=label, zorder=3, s=24)
    front = pareto(outcomes)
    axes.step([o.num_bytes / 1e6 for o in front], [o.top1 for o in front], where='post', color='0.6', label='front')
    axes.scatter(
        winner.num_bytes / 1e6, winner.top1, marker='o', s=120, facecolors='none', edgecolors='black',
        label='best under the budget', zorder=4,
    )  # fmt: skip
    axes.axhline(float_top1, color='0.6', linestyle=':', label='float')
    if budget is not None:
        axes.axvline(budget / 1e6, color='tab:red', linestyle='--', label='budget')
    axes.set(xlabel='size, MB', ylabel=f'top-1 on {winner.images} images, %')
    axes.legend()
    figure.savefig(path, dpi=120)


def write_config(path: Path, setting: Setting, winner: Outcome, groups: Sequence[Group] = ()) -> None:
    """The winner as a config that inherits the given one and evaluates under ``mim test``."""
    header = f'# {describe(winner.recipe, groups)}\n# {winner.num_bytes:,} bytes; found by tools/search.py\n'
    hooks = partial(_hooks, setting=setting)
    text = derived_config(setting.config, setting.cfg_options, winner.recipe, path.parent, hooks)
    path.write_text(header + text, encoding='utf-8')


def derived_config(
    config: str,
    cfg_options: dict[str, Any] | None,
    scheme: dict[str, Any],
    folder: Path,
    hooks: Callable[[Sequence[Any]], list[dict[str, Any]]] | None = None,
) -> str:
    """Text of a config in ``folder`` that is ``config`` with another ``quant_scheme``.

    A new-style config, or one changed by ``--cfg-options``, cannot be inherited: it is written out in full then.

    Args:
        config: path of the given one.
        cfg_options: what ``--cfg-options`` changed in it.
        scheme: as :func:`~fqvit_plugin.scheme.parse_scheme` takes it.
        folder: where the text will lie.
        hooks: makes ``custom_hooks`` of the given ones; they are inherited without.
    """
    base = Config.fromfile(config)
    if cfg_options:
        base.merge_from_dict(cfg_options)
    changes: dict[str, Any] = {} if hooks is None else {'custom_hooks': hooks(base.get('custom_hooks') or [])}
    if cfg_options or '_base_' in base or _is_lazy(config):
        base.quant_scheme = scheme
        base.update(changes)
        return str(base.pretty_text)
    # what the base says of the scheme must not come through
    changes = {'quant_scheme': {**scheme, '_delete_': True} if 'quant_scheme' in base else scheme, **changes}
    lines = [f'{name} = {_pretty(value)}\n' for name, value in changes.items()]
    return f'_base_ = {os.path.relpath(config, folder)!r}\n\n{"".join(lines)}'


def _is_lazy(config: str) -> bool:
    return bool(Config._is_lazy_import(config))


def _hooks(given: Sequence[Any], setting: Setting) -> list[dict[str, Any]]:
    """The config's hooks with a QuantHook that calibrates as the search did, its own options kept."""
    ours: dict[str, Any] = {'type': 'fqvit_plugin.QuantHook'}
    others = []
    for hook in given:
        kind = hook['type'] if isinstance(hook['type'], str) else f'.{hook["type"].__name__}'
        if kind.rpartition('.')[2] == 'QuantHook':
            ours = {**hook, 'type': 'fqvit_plugin.QuantHook'}
        else:
            others.append(dict(hook))
    ours.pop('scheme', None)  # quant_scheme says it
    return [*others, {**ours, 'num_batches': setting.calib_batches, 'seed': setting.seed}]


def _pretty(value: Any, indent: int = 0) -> str:
    """Python text of nested dicts and lists, a line per item."""
    pad = ' ' * (indent + 4)
    if isinstance(value, dict) and value:
        items = [f'{pad}{k}={_pretty(v, indent + 4)},\n' for k, v in value.items()]
        return f'dict(\n{"".join(items)}{" " * indent})'
    if isinstance(value, (list, tuple)) and any(isinstance(v, (dict, list)) or len(str(v)) > 30 for v in value):
        return f'[\n{"".join(f"{pad}{_pretty(v, indent + 4)},{chr(10)}" for v in value)}{" " * indent}]'
    return repr(value)
