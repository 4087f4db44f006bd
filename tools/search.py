"""Search a recipe under a size budget, by an NNI experiment: bits per group of layers, observer, PTF, LIS."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _main import exit_code
from mmengine.config import DictAction
from rich.console import Console

from fqvit_plugin.search.experiment import TUNERS, Plan, run_experiment
from fqvit_plugin.search.objective import Objective, Outcome, Setting, count_test_images
from fqvit_plugin.search.results import choose, make_table, write_config, write_json, write_plot
from fqvit_plugin.search.setup import configured_scheme, make_space, measure_baselines
from fqvit_plugin.search.space import GROUPINGS, Space
from fqvit_plugin.search.trial import Job

_EXAMPLES = """\
examples:
  python tools/search.py configs/fqvit_swin_t_w8a8.py swin-tiny.pth --out search --budget 0.75 --trials 40
  python tools/search.py configs/fqvit_deit_t_w8a8.py deit-tiny.pth --out search --budget 4MB \\
      --weight-bits 4 6 8 --groups stage --patience 15
  python tools/search.py configs/fqvit_swin_t_w8a8.py swin-tiny.pth --out search --budget 0.75 --trials 80 --resume
  # then
  mim test mmpretrain search/best.py --checkpoint swin-tiny.pth

written to --out: best.py (the recipe as a config), results.json, pareto.png, and everything of NNI's.
Scored are training images that do not calibrate, or those of a search_dataloader in the config.

exit codes: 0 done, 2 something is wrong with what was given (one line on stderr), 130 interrupted (--resume goes on)
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', metavar='CONFIG', type=Path)
    add('checkpoint', metavar='CHECKPOINT', type=Path, help='float weights')
    add('--out', metavar='DIR', type=Path, required=True, help='folder for everything that is written')
    add('--budget', metavar='SIZE', help='4MB, or a share of the size at uniform 8 bits, 0.75; default: none')
    add('--trials', type=int, default=20, metavar='N', help='default: 20')
    add('--concurrency', type=int, default=1, metavar='N', help='trials at a time (default: 1)')
    add('--tuner', choices=TUNERS, default='tpe', help='default: tpe')
    add('--patience', type=int, metavar='N', help='stop after N trials without a better one')
    add('--resume', action='store_true', help='go on with the experiment in --out, up to --trials in all')
    add('--groups', choices=GROUPINGS, default='role', help='which layers share their bits (default: role)')
    add('--weight-bits', type=int, nargs='+', default=[3, 4, 5, 6, 7, 8], metavar='N', help='default: 3 to 8')
    add('--act-bits', type=int, nargs='+', metavar='N', help="default: the config's")
    add('--attn-bits', type=int, nargs='+', metavar='N', help="default: the config's")
    add(
        '--observers', nargs='+', metavar='NAME', default=['minmax', 'ema', 'omse', 'percentile'],
        help='of the activations; default: minmax ema omse percentile',
    )  # fmt: skip
    add(
        '--alphas', type=float, nargs='+', default=[0.999, 0.9999, 0.99999], metavar='A',
        help="percentile's quantiles; default: 0.999 0.9999 0.99999",
    )  # fmt: skip
    add('--fix', nargs='+', choices=('ptf', 'lis', 'observer'), default=[], help='leave these as the config says')
    add('--batches', type=int, default=10, metavar='N', help='batches to calibrate on (default: 10)')
    add('--score-batches', type=int, default=10, metavar='N', help='batches to score on (default: 10)')
    add('--seed', type=int, default=0, help="of the images' order and of the tuner (default: 0)")
    add('--device', default='cpu', help='cpu, cuda, cuda:1, ... (default: cpu)')
    add('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='as in mim test')
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Options of get_scheme and the values the search may choose."""
    observers = [n for name in args.observers for n in _with_alphas(name, args.alphas)]
    options: dict[str, list[Any]] = {'observer': observers, 'ptf': [True, False], 'lis': [True, False]}
    options = {k: v for k, v in options.items() if k not in args.fix}
    given = {'act_bits': args.act_bits, 'attn_bits': args.attn_bits}
    return {**options, **{k: v for k, v in given.items() if v}}


def _with_alphas(observer: str, alphas: Sequence[float]) -> list[str]:
    return [f'{observer}:{alpha:.9g}' for alpha in alphas] if observer == 'percentile' else [observer]


def _check_folder(args: argparse.Namespace) -> None:
    if (args.out / 'experiment.json').exists() and not args.resume:
        raise ValueError(f'{args.out} holds an experiment: add --resume to go on with it, or name another --out')
    if args.resume and not (args.out / 'experiment.json').exists():
        raise ValueError(f'{args.out} holds no experiment to resume: start it without --resume')
    args.out.mkdir(parents=True, exist_ok=True)


def search(args: argparse.Namespace) -> None:
    """Do what the command line says; ValueError, RuntimeError or OSError if that cannot be."""
    plan = Plan(args.trials, args.concurrency, args.tuner, args.patience, args.seed)
    setting = Setting(
        str(args.config.resolve()), str(args.checkpoint.resolve()), args.cfg_options, args.device,
        args.batches, args.score_batches, args.seed,
    )  # fmt: skip
    _check_folder(args)
    objective = Objective(setting)
    base = configured_scheme(objective.cfg)
    space = make_space(objective, base, args.budget, args.groups, sorted(set(args.weight_bits)), _options(args))
    count, tested = len(objective.scored_names()), count_test_images(objective)
    _say(f'{len(objective.calibration.indices)} images calibrate, {len(objective.scoring.indices)} others are scored')
    if tested is None:
        _say('warning: the test data is not there, so nobody can tell whether scored images belong to it')
    elif tested:
        _say(f'warning: {tested} of the {count} scored images belong to the test data; its accuracy is no proof then')
    _say('groups: ' + ', '.join(f'{g.name} ({sum(g.sizes):,} weights)' for g in space.groups))
    limit = 'no budget' if space.budget is None else f'budget {space.budget / 1e6:.4f} MB'
    _say(f'{limit}; up to {plan.trials} trials by {plan.tuner}')
    job = Job(setting, space, args.out.resolve() / 'trials')
    if args.resume:
        _check_same(job, Job.load(args.out / 'code' / 'job.json'))
    found = run_experiment(job, plan, args.out, resume=args.resume, say=_say)
    _report(args, objective, space, found + measure_baselines(objective, space, found, _say))


def _check_same(job: Job, before: Job) -> None:
    pairs = [(vars(job.setting), vars(before.setting)), (job.space.to_dict(), before.space.to_dict())]
    # through JSON, which the earlier one came from: tuples are lists there
    different = [k for now, then in pairs for k in now if json.dumps(now[k]) != json.dumps(then[k])]
    if different:
        raise ValueError(f'--resume: {", ".join(different)} differs from what the experiment was started with')


def _report(args: argparse.Namespace, objective: Objective, space: Space, outcomes: list[Outcome]) -> None:
    budget = space.budget
    winner = choose(outcomes, budget)
    facts = dict(
        config=str(args.config), budget=budget, float_top1=objective.float_top1,
        scored_images=[os.path.basename(n) for n in objective.scored_names()],
    )  # fmt: skip
    write_json(args.out / 'results.json', outcomes, winner, facts)
    write_plot(args.out / 'pareto.png', outcomes, winner, objective.float_top1, budget)
    write_config(args.out / 'best.py', objective.setting, winner, space.groups)
    # a pipe has no width: take what the table needs, so that rows stay whole
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(make_table(outcomes, winner, objective.float_top1, space.groups))
    print(f'written: {args.out}/best.py, {args.out}/results.json, {args.out}/pareto.png')


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, search, and turn a user's mistake into one line and exit code 2."""
    args = _parser().parse_args(argv)
    # mmcv-lite says on import that it has no compiled ops; none are used here
    warnings.filterwarnings('ignore', 'Fail to import ``MultiScaleDeformableAttention``')
    return exit_code('search.py', lambda: search(args), 'interrupted; the same command with --resume goes on')


if __name__ == '__main__':
    sys.exit(main())
