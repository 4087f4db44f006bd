"""Train two small transformers on real digits, quantize them in every way, and print one table.

Everything runs the way a user runs it: config files, MMEngine's runner, MMPretrain's accuracy
metric, and QuantHook in ``custom_hooks``. Nothing is downloaded: the images come with scikit-learn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = {'vit': 'VisionTransformer', 'swin': 'SwinTransformer'}
SCHEMES = ('fqvit_w8a8', 'fqvit_w8a8_attn4')
OBSERVERS = ('minmax', 'ema', 'percentile', 'omse')
EXAMPLES = """\
examples:
  make demo                                        all of it: some minutes the first time
  python tools/demo.py --model vit                 the vision transformer only
  python tools/demo.py --observers minmax omse     fewer rows
  python tools/demo.py --json work_dirs/demo.json  the table for a program, too
  python tools/demo.py --retrain                   forget the trained weights of an earlier run

exit status: 0 done, 2 it could not start (the message says why)
"""


class UsageError(Exception):
    """Something the person who started the program can mend."""


@dataclass(frozen=True)
class Recipe:
    """One way to quantize: the options that the demo varies."""

    scheme: str
    observer: str
    preset: str = 'strict'


@dataclass(frozen=True)
class Row:
    """One line of the table; ``recipe`` is None for the float model."""

    model: str
    recipe: Recipe | None
    top1: float
    num_bytes: int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').strip(),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--model', choices=[*MODELS, 'all'], default='all', help='default: all')
    parser.add_argument(
        '--observers', nargs='+', choices=OBSERVERS, default=list(OBSERVERS), metavar='NAME',
        help=f'which of {", ".join(OBSERVERS)}; default: all of them',
    )  # fmt: skip
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/demo'), metavar='DIR',
        help='where images and trained weights are kept; default: work_dirs/demo',
    )  # fmt: skip
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the table to FILE as well')
    parser.add_argument('--retrain', action='store_true', help='train even if trained before')
    return parser.parse_args(argv)


def recipes(observers: Sequence[str]) -> Iterator[Recipe]:
    """What is compared: both schemes with each observer, the published arithmetic once, and fewer bits."""
    from fqvit_plugin.presets import LOW_BITS

    for scheme in SCHEMES:
        for observer in observers:
            yield Recipe(scheme, observer)
    yield Recipe(SCHEMES[-1], observers[0], preset='reference')
    for scheme in LOW_BITS:
        yield Recipe(scheme, observers[0])


def say(model: str, text: str) -> None:
    """One line of progress; the table alone goes to standard output."""
    print(f'{model:<7s} {text}', file=sys.stderr, flush=True)


def load_config(model: str, work_dir: Path) -> Any:
    """The model's config file, quiet, and with the data and all outputs under ``work_dir``."""
    from mmengine.config import Config

    cfg = Config.fromfile(ROOT / 'configs' / 'digits' / f'digits_{model}.py')
    for name in ('train', 'val', 'test', 'calib'):
        cfg[f'{name}_dataloader'].dataset.data_root = str(work_dir / 'digits')
    cfg.work_dir = str(work_dir / 'runs')
    cfg.log_level = 'WARNING'
    return cfg


def checkpoint_path(model: str, work_dir: Path) -> Path:
    """Where weights trained by this very config and torch lie; another config, another name."""
    import torch
    from mmengine.config import Config

    cfg = Config.fromfile(ROOT / 'configs' / 'digits' / f'digits_{model}.py')
    text = json.dumps([cfg.to_dict(), torch.__version__], sort_keys=True, default=str)
    return work_dir / f'{model}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.pth'


def train(model: str, work_dir: Path, target: Path) -> None:
    """Train by the config file and leave the weights at ``target``."""
    import torch
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    class SayEpochs(Hook):
        def after_train_epoch(self, runner: Runner) -> None:
            if (runner.epoch + 1) % 5 == 0:
                loss = runner.message_hub.get_scalar('train/loss').mean()
                say(model, f'epoch {runner.epoch + 1:2d}/{runner.max_epochs}  loss {loss:.3f}')

    cfg = load_config(model, work_dir)
    cfg.experiment_name = f'train_{model}'
    cfg.default_hooks.checkpoint = None  # one file of weights at the end is all that is needed
    runner = Runner.from_cfg(cfg)
    runner.register_hook(SayEpochs())
    started = time.perf_counter()
    runner.train()
    say(model, f'trained in {time.perf_counter() - started:.0f} s')
    part = target.with_suffix('.part')
    torch.save({'state_dict': runner.model.state_dict(), 'meta': {'model': model}}, part)
    part.replace(target)  # a run that was stopped leaves no half-written weights


def evaluate(model: str, recipe: Recipe | None, work_dir: Path, checkpoint: Path) -> Row:
    """Top-1 on the validation images by ``Runner.test``, float or with QuantHook in the config."""
    from mmengine.runner import Runner

    import fqvit_plugin as fq

    cfg = load_config(model, work_dir)
    cfg.load_from = str(checkpoint)
    cfg.experiment_name = f'test_{model}'
    if recipe is not None:
        cfg.experiment_name += f'_{recipe.scheme}_{recipe.observer}_{recipe.preset}'
        cfg.custom_hooks = [dict(type='fqvit_plugin.QuantHook', num_batches=10, out=None)]
        cfg.quant_scheme = dict(
            type=recipe.scheme, observer=recipe.observer, preset=recipe.preset, ptf=True, lis=True
        )
    runner = Runner.from_cfg(cfg)
    with contextlib.redirect_stdout(io.StringIO()):  # MMEngine prints the file's name each time
        top1 = runner.test()['accuracy/top1']
    if recipe is None:
        return Row(model, None, top1, 4 * sum(p.numel() for p in runner.model.parameters()))
    hook = next(hook for hook in runner.hooks if isinstance(hook, fq.QuantHook))
    return Row(model, recipe, top1, hook.report.quantized_bytes)


def run_model(model: str, observers: Sequence[str], work_dir: Path, retrain: bool) -> list[Row]:
    """Train if need be, then measure the float model and every recipe."""
    checkpoint = checkpoint_path(model, work_dir)
    if retrain or not checkpoint.exists():
        say(model, f'training a small {MODELS[model]}')
        train(model, work_dir, checkpoint)
    else:
        say(model, f'trained before: {checkpoint.name}')
    rows = []
    for recipe in [None, *recipes(observers)]:
        rows.append(evaluate(model, recipe, work_dir, checkpoint))
        what = f'{recipe.scheme} {recipe.observer} {recipe.preset}' if recipe else 'float'
        say(model, f'{what}: top-1 {rows[-1].top1:.2f} %')
    return rows


def print_table(rows: Sequence[Row], images: int) -> None:
    """The table, on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title='FQ-ViT on 8 x 8 digits', title_justify='left')
    for name in ('model', 'scheme', 'observer', 'preset'):
        table.add_column(name, no_wrap=True)
    for name in ('top-1 %', 'vs float', 'bytes', 'of float'):
        table.add_column(name, no_wrap=True, justify='right')
    base = rows[0]
    for before, row in zip([None, *rows], rows, strict=False):
        if row.recipe is None:
            base = row
            if before:
                table.add_section()
        table.add_row(*cells(row, base))
    table.caption = (
        f'top-1: higher is better; {images} images that were not trained or calibrated on, one is '
        f'{100 / images:.2f}.\nbytes: lower is better; weights, biases, norms and scales.\n'
        'Schemes of 8 bits tie where no probability below 2^-14 matters, as with the 16 or 17 tokens here.'
    )
    table.caption_justify = 'left'
    # a pipe has no width: take what the table needs, so that rows stay whole
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)


def cells(row: Row, base: Row) -> list[str]:
    """The text of one line, next to the float model's."""
    top1, size = f'{row.top1:.2f}', f'{row.num_bytes:,}'
    if row.recipe is None:
        return [row.model, 'float', '', '', top1, '', size, '']
    recipe = [row.recipe.scheme, row.recipe.observer, row.recipe.preset]
    difference, share = f'{row.top1 - base.top1:+.2f}', f'{row.num_bytes / base.num_bytes:.1%}'
    return [row.model, *recipe, top1, difference, size, share]


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a list of objects; the float rows have ``"recipe": null``."""
    path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + '\n')


def prepare(args: argparse.Namespace) -> int:
    """Check what the command line asks for, write the images, and return how many are scored.

    Raises:
        UsageError: a folder cannot be written, or a package is missing.
    """
    try:
        from _digits import write_digits

        import fqvit_plugin  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f'{error.name} is not installed; `make demo` installs it') from None
    try:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        counts = write_digits(args.work_dir / 'digits')
    except OSError as error:
        raise UsageError(f'--work-dir: {error.strerror}: {error.filename}') from None
    if args.json and not args.json.resolve().parent.is_dir():
        raise UsageError(f'--json: there is no folder {args.json.parent}')
    if args.json and args.json.is_dir():
        raise UsageError(f'--json: {args.json} is a folder')
    say('digits', f'{counts["train"]} images to train and calibrate on, {counts["val"]} to score')
    return counts['val']


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    args = parse_args(argv)
    # read when torch is imported, below; threads that wait must not keep a busy core from others
    os.environ.setdefault('OMP_NUM_THREADS', '2')
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    # mmcv-lite says on import that it has no compiled ops; none are used here
    warnings.filterwarnings('ignore', 'Fail to import ``MultiScaleDeformableAttention``')
    try:
        images = prepare(args)
        rows: list[Row] = []
        for model in MODELS if args.model == 'all' else [args.model]:
            rows += run_model(model, args.observers, args.work_dir.resolve(), args.retrain)
        if args.json:
            write_json(args.json, rows)
    except UsageError as error:
        print(f'demo.py: {error}', file=sys.stderr)
        return 2
    print_table(rows, images)
    return 0


if __name__ == '__main__':
    sys.exit(main())
