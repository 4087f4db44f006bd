"""Choose the bits of every layer under a budget, from what each costs at each width, and write a config."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _main import exit_code
from _measuring import calibrated_model, check_device, check_outputs, progress_bar
from mmengine.config import Config, DictAction
from rich import box
from rich.console import Console
from rich.table import Table

from fqvit_plugin.analysis.collect import first_images
from fqvit_plugin.analysis.page import write_text
from fqvit_plugin.apis import load_config
from fqvit_plugin.calibration import CalibrationSet, forward_of
from fqvit_plugin.layers import QAct
from fqvit_plugin.lifecycle import dequant
from fqvit_plugin.presets import parse_scheme
from fqvit_plugin.search.results import derived_config
from fqvit_plugin.search.setup import configured_scheme
from fqvit_plugin.sensitivity.allocation import (
    Allocation,
    LayerCost,
    allocate,
    allocated_scheme,
    costs_of,
    multiplications,
    stored_bytes,
)
from fqvit_plugin.sensitivity.measure import measure_sensitivity
from fqvit_plugin.sensitivity.records import Sensitivity
from fqvit_plugin.sensitivity.run import IMAGES, sensitivity_on
from fqvit_plugin.sensitivity.switches import Switches, narrowed, weight_at
from fqvit_plugin.sensitivity.terminal import format_kl
from fqvit_plugin.sensitivity.units import Unit
from fqvit_plugin.weight_quantizer import packed_bytes

_EXAMPLES = """\
Bytes are those of weights packed to their bits, and of everything else as reports count it; --as-file counts weights
as an integer checkpoint stores them at most, no fewer than 4 bits each.

examples:
  python tools/allocate.py configs/fqvit_deit_t_w8a8.py deit-tiny.pth --budget-bits 4 --out deit_t_mixed.py
  python tools/allocate.py CONFIG float.pth --budget-ratio 0.6 --candidates 3 4 6 8 --out mixed.py --images 64
  # measure once, allocate often:
  python tools/analyze.py CONFIG float.pth --units tensor --directions only --weight-bits 3 4 6 8 --json s.json
  python tools/allocate.py CONFIG float.pth --sensitivity s.json --budget-bytes 3.5e6 --out mixed.py
  # bit operations, activations too:
  python tools/allocate.py CONFIG float.pth --bit-ops 0.4 --act-candidates 4 6 8 --out mixed.py
  # then:
  mim test mmpretrain mixed.py --checkpoint float.pth

exit codes: 0 done, 2 something is wrong with what was given (one line on stderr), 130 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', metavar='CONFIG', type=Path)
    add('checkpoint', metavar='CHECKPOINT', type=Path, help='float weights, or calibrated by the scheme of CONFIG')
    add('--out', metavar='NEWCONFIG.py', type=Path, required=True, help='the config to write')
    add('--budget-bytes', type=float, metavar='N', help='most bytes of the quantized model')
    add('--budget-ratio', type=float, metavar='R', help='most bytes, as a share of the size at uniform 8 bits')
    add('--budget-bits', type=float, metavar='B', help='as many bytes as weights of B bits take')
    add('--bit-ops', type=float, metavar='R', help='most bit operations, as a share of those at uniform 8 bits')
    add('--candidates', type=int, nargs='+', default=[3, 4, 6, 8], metavar='N', help='of weights: 3 4 6 8')
    add('--act-candidates', type=int, nargs='+', default=[], metavar='N', help='of activations (default: none)')
    add('--as-file', action='store_true', help='count weights as an integer checkpoint stores them')
    add('--sensitivity', metavar='FILE', type=Path, help='what analyze.py --json wrote; default: measure now')
    add('--images', type=int, default=IMAGES, metavar='N', help=f'to measure on (default: {IMAGES})')
    add('--batches', type=int, default=10, metavar='N', help='to calibrate on (default: 10)')
    add('--check-batches', type=int, default=0, metavar='N', help='compare with uniform bits on N other batches')
    add('--seed', type=int, default=0, help="of the images' order (default: 0)")
    add('--device', default='cpu', help='cpu, cuda, cuda:1, ... (default: cpu)')
    add('--force', action='store_true', help='overwrite what exists')
    add('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='as in mim test')
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.out.suffix != '.py':
        raise ValueError(f'--out writes a config: call it {args.out.name}.py, for instance')
    check_outputs([args.out], args.force)
    check_device(args.device)
    sizes = [name for name in ('budget_bytes', 'budget_ratio', 'budget_bits') if getattr(args, name) is not None]
    if len(sizes) > 1:
        raise ValueError('give one of --budget-bytes, --budget-ratio and --budget-bits')
    if not sizes and args.bit_ops is None:
        raise ValueError('give a budget: --budget-bytes, --budget-ratio, --budget-bits or --bit-ops')
    for name in (*sizes, *(['bit_ops'] if args.bit_ops is not None else [])):
        if getattr(args, name) <= 0:
            raise ValueError(f'--{name.replace("_", "-")} must be above 0, got {getattr(args, name):g}')
    for name in ('images', 'batches'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name} must be at least 1, got {getattr(args, name)}')
    if args.act_candidates and args.bit_ops is None:
        raise ValueError('--act-candidates: the bits of activations cost no bytes; give a budget of --bit-ops')


def _measured(args: argparse.Namespace, model: Any, data: CalibrationSet) -> Sensitivity:
    if args.sensitivity is not None:
        values = json.loads(args.sensitivity.read_text(encoding='utf-8'))
        return Sensitivity.from_dict({k: v for k, v in values.items() if k != 'scheme'})
    with progress_bar(Console(stderr=True)) as begin:
        return sensitivity_on(
            model, data, args.images, levels=['tensor'], directions=['only'], weight_bits=args.candidates,
            act_bits=args.act_candidates, kinds=None if args.act_candidates else ['weights'], begin=begin,
        )  # fmt: skip


def _byte_budget(args: argparse.Namespace, costs: Sequence[LayerCost], others: int) -> int | None:
    """What weights may take, in bytes; ``others`` is what the rest of the model takes."""

    def of_weights(bits: int) -> int:
        return sum(stored_bytes(c, bits, args.as_file) for c in costs)

    if args.budget_bits is not None:
        return int(sum(c.weights * args.budget_bits / 8 + packed_bytes(0, 4, c.factors) for c in costs))
    total = args.budget_bytes
    if args.budget_ratio is not None:
        total = args.budget_ratio * (of_weights(8) + others)
    if total is None:
        return None
    if total <= others:
        raise ValueError(f'the budget of {total:,.0f} bytes cannot be met: all but weights takes {others:,}')
    return int(total) - others


def run(args: argparse.Namespace) -> None:
    """Do what the command line says; ValueError, RuntimeError or OSError if that cannot be."""
    _check(args)
    cfg = load_config(args.config, args.cfg_options)
    base = configured_scheme(cfg)
    everything = CalibrationSet.build(cfg, args.batches + args.check_batches, args.seed)
    if args.check_batches and len(everything.batches) <= args.batches:
        raise ValueError(f'--check-batches: the images give {len(everything.batches)} batches; all of them calibrate')
    data = CalibrationSet(everything.loader, everything.batches[: args.batches])
    model, report = calibrated_model(cfg, args.checkpoint, args.device, data)
    if differences := report.scheme.differences(parse_scheme(base)):
        raise ValueError(f'the checkpoint was calibrated by another scheme than that of the config: {differences[0]}')
    layers = Switches(model).layers
    result = _measured(args, model, data)
    dequant(model)
    forward = forward_of(model)
    batch = next(data.load(first_images(data.batches, 1)))
    costs = costs_of(result, layers, multiplications(layers, lambda: forward(model, batch), 1))
    weights_now = sum(
        stored_bytes(c, layers[c.path].weight_quantizer.spec.bit_type.bits)
        for c in costs  # type: ignore
    )
    others = report.quantized_bytes - weights_now
    budget = _byte_budget(args, costs, others)
    uniform_ops = sum(c.macs * 64 for c in costs)
    ops = None if args.bit_ops is None else args.bit_ops * uniform_ops
    found = allocate(
        costs, args.candidates, args.act_candidates, max_bytes=budget, max_bit_ops=ops, as_file=args.as_file
    )
    scheme = allocated_scheme(base, found)
    parse_scheme(scheme)
    header = _header(found, others, uniform_ops, args.as_file)
    text = derived_config(str(args.config), args.cfg_options, scheme, args.out.parent, _hooks_of(cfg))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(_table(costs, found, sorted(set(args.candidates))))
    console.print(header)
    if args.check_batches:
        _compare(console, model, layers, costs, found, everything, args)
    write_text(args.out, ''.join(f'# {line}\n' for line in header.splitlines()) + text)
    console.print(f'written: {args.out}', soft_wrap=True, markup=False)


def _header(found: Allocation, others: int, uniform_ops: int, as_file: bool) -> str:
    how = 'as an integer checkpoint stores them' if as_file else 'packed to their bits'
    return (
        f'{found.num_bytes + others:,} bytes, {found.num_bytes:,} of them weights {how}; sum of divergences '
        f'{format_kl(found.kl)}\n{100 * found.bit_ops / uniform_ops:.1f} % of the bit operations of 8 by 8 bits; '
        'by tools/allocate.py'
    )


def _hooks_of(cfg: Config) -> Any:
    """A QuantHook's own ``scheme`` would come before the new ``quant_scheme``; ``None`` where no hook has one."""
    hooks = cfg.get('custom_hooks') or []
    if not any('scheme' in hook for hook in hooks):
        return None
    return lambda given: [{k: v for k, v in hook.items() if k != 'scheme'} for hook in given]


def _table(costs: Sequence[LayerCost], found: Allocation, candidates: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column('layer', overflow='fold')
    for name in ('weights', 'bits', *(f'KL at {b}' for b in candidates)):
        table.add_column(name, justify='right', no_wrap=True)
    table.add_column('input', justify='right')
    for c in costs:
        chosen = found.weight_bits[c.path]
        kls = [f'[bold]{format_kl(c.kl[b])}[/]' if b == chosen else format_kl(c.kl[b]) for b in candidates]
        act = found.act_bits.get(c.input_path, c.input_bits)
        table.add_row(c.path.removeprefix('backbone.'), f'{c.weights:,}', str(chosen), *kls, str(act))
    return table


def _compare(
    console: Console,
    model: Any,
    layers: Mapping[str, Any],
    costs: Sequence[LayerCost],
    found: Allocation,
    everything: CalibrationSet,
    args: argparse.Namespace,
) -> None:
    """What was chosen beside uniform bits, on batches that nothing was measured or calibrated on."""
    batches = everything.batches[args.batches :]
    recipes: dict[str, tuple[Mapping[str, int], Mapping[str, int]]] = {'chosen': (found.weight_bits, found.act_bits)}
    recipes |= {f'W{b}': ({c.path: b for c in costs}, {}) for b in sorted(set(args.candidates))}
    units = []
    for name, (weight_bits, act_bits) in recipes.items():
        instead: dict[str, Any] = {path: weight_at(layers[path], bits) for path, bits in weight_bits.items()}
        alone = tuple(instead)
        for path, bits in act_bits.items():
            assert isinstance(layers[path], QAct)
            instead[path] = narrowed(layers[path].quantizer, bits)
        for members, what in ((alone, 'weights'), (tuple(layers), 'all')):
            units.append(
                Unit(
                    f'{name} {what}', 'group', '', '', members, None, {k: instead[k] for k in members if k in instead}
                )
            )
    flat = first_images(batches, sum(map(len, batches)))
    result = measure_sensitivity(model, everything.load(flat), units, forward_of(model), directions=['only'])
    effects = {e.name: e.only for e in result.entries}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f'{result.images} other images', title_justify='left')
    for i, name in enumerate(('', 'weight bytes', 'weights alone: KL', 'agree', 'all quantized: KL', 'agree')):
        table.add_column(name, justify='right' if i else 'left', no_wrap=True)
    for name, (weight_bits, _) in recipes.items():
        size = sum(stored_bytes(c, weight_bits[c.path], args.as_file) for c in costs)
        pair = [effects[f'{name} {what}'] for what in ('weights', 'all')]
        cells = [cell for e in pair if e is not None for cell in (format_kl(e.kl), f'{100 * e.agree:.1f} %')]
        table.add_row(name, f'{size:,}', *cells)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, allocate, and turn a user's mistake into one line and exit code 2."""
    args = _parser().parse_args(argv)
    return exit_code('allocate.py', lambda: run(args))


if __name__ == '__main__':
    sys.exit(main())
