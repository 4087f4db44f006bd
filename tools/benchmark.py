"""Time calibration and the simulated quantized forward pass as multiples of the float model's, and their memory."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import _compare
import _engines_onnx  # noqa: F401 - registers its engines
import torch
from _bench import (
    COMPILED,
    Memory,
    Settings,
    Stopwatch,
    Subject,
    Timing,
    can_measure_memory,
    cores,
    in_processes,
    machine,
    memory_of,
)
from _documents import check_writable, write_json
from _engines import ENGINES
from mmengine.config import DictAction
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fqvit_plugin.scheme import PRESETS

SCHEMA = 1
OBSERVERS = ['minmax', 'ema', 'percentile', 'omse']
PIECES = ['calibrate', 'quant', 'compile']
_EXAMPLES = """\
Every round times each piece once, in an order that changes from round to round; a ratio is the median over rounds
of a piece's seconds by those of its base in the same round, with the smallest and the largest of them.

  float, float/all      the float model on one batch, and on all of them; the first is always timed
  calibrate/OBSERVER    a whole calibration on all batches, strict, with PTF and LIS: multiples of float/all
  quant/PRESET          the config's scheme (8/8/4 if it has none) on one batch: multiples of float
  compiled ...          the same under torch.compile: float as a multiple of float, quantized of compiled float

Images are random: timing does not depend on what they show. So are weights without --checkpoint.

With --engines, instead of all that: float and int8 of every engine on the same network, in the same rounds, each
with --threads threads, as multiples of the fastest float32 engine; with --images, their top-1. It compares the CPU's.

examples:
  python tools/benchmark.py configs/fqvit_deit_t_w8a8_attn4.py configs/fqvit_swin_t_w8a8_attn4.py
  python tools/benchmark.py configs/fqvit_deit_t_w8a8_attn4.py --pieces quant compile --json work_dirs/bench.json
  python tools/benchmark.py configs/fqvit_deit_t_w8a8_attn4.py --baseline work_dirs/bench.json
  python tools/benchmark.py configs/fqvit_vit_b_w8a8.py --memory --profile --batch-size 4
  python tools/benchmark.py configs/fqvit_deit_s_w8a8.py --engines all --batch-sizes 1 8
  python tools/benchmark.py configs/fqvit_deit_t_w8a8.py --engines torch,ort,ort-int8,integer --checkpoint deit.pth \\
      --images ../shared/imagenet --batch-size 20

exit codes: 0 done, 2 something is wrong with what was given (one line on stderr), 130 interrupted (what was finished
is printed and written)
"""


@dataclass
class Result:
    """What is known of one config, as far as it got."""

    subject: Subject
    timings: list[Timing] = field(default_factory=list)
    profile: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(
            scheme=self.subject.scheme_options,
            image_size=self.subject.image_size,
            pieces={timing.piece: timing.to_dict() for timing in self.timings},
            profile=self.profile,
            memory={f'{m.piece} x {m.batches}': m.to_dict() for m in self.memory},
        )


@dataclass(frozen=True)
class Change:
    """A ratio that was measured earlier, too."""

    config: str
    what: str
    earlier: float
    now: float

    @property
    def percent(self) -> float:
        """By how much the ratio rose."""
        return 100 * (self.now / self.earlier - 1)


def ratios_of(document: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Every ratio of a JSON document by config and piece."""
    return {
        (config, prefix + name): values['ratio']
        for config, result in document['configs'].items()
        for prefix, found in (('', result['pieces']), ('memory of ', result['memory']))
        for name, values in found.items()
        if values['ratio'] is not None
    }


def compare_with_baseline(earlier: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The ratios that both documents hold."""
    before = ratios_of(earlier)
    return [Change(*key, before[key], ratio) for key, ratio in ratios_of(now).items() if key in before]


def _conditions(document: dict[str, Any]) -> dict[str, Any]:
    """What two documents must share for their ratios to mean the same."""
    found = {f'{part} {key}': value for part in ('machine', 'settings') for key, value in document[part].items()}
    for config, result in document['configs'].items():
        found.update({f'{config} {key}': result[key] for key in ('scheme', 'image_size')})
    return found


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which machine, versions, settings, schemes and image sizes two documents differ, one line each."""
    before, after = _conditions(earlier), _conditions(now)
    return [f'{k}: {before[k]} then, {after[k]} now' for k in before if k in after and before[k] != after[k]]


def read_baseline(path: Path) -> dict[str, Any]:
    """A document that ``--json`` wrote.

    Raises:
        ValueError: it is none, or of another schema.
    """
    try:
        document = json.loads(path.read_text(encoding='utf-8'))
        schema = document['schema']
        if schema == SCHEMA:
            compare_with_baseline(document, document)
            differences(document, document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'--baseline {path} was not written by --json: {error!r}') from None
    if schema != SCHEMA:
        raise ValueError(f'--baseline {path} has schema {schema!r}, this version writes and reads {SCHEMA}')
    return document


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """What it is about on the left, its numbers on the right."""
    table = Table(columns[0], box=box.SIMPLE_HEAD)
    for name in columns[1:]:
        table.add_column(name, justify='right', no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _timing_row(timing: Timing) -> list[str]:
    values = timing.to_dict()
    cells = [timing.piece, str(timing.batches), f'{values["median"]:.4f}' if timing.seconds else 'failed']
    if timing.base is not None and timing.ratios:
        low, high = values['spread']
        cells += [f'{values["ratio"]:.2f}', f'{low:.2f} - {high:.2f}', timing.base]
    return cells


def _memory_row(memory: Memory) -> list[str]:
    values = memory.to_dict()
    ratio = '' if values['ratio'] is None else f'{values["ratio"]:.2f}'
    return [memory.piece, str(memory.batches), f'{values["growth"] / 1e6:.1f}', ratio, f'{memory.peak / 1e6:.0f}']


def tables(result: Result) -> Iterator[Table]:
    """The numbers of one config for a terminal."""
    columns = ['piece', 'batches', 'seconds', 'ratio', 'min - max', 'to']
    yield _table(columns, (_timing_row(timing) for timing in result.timings))
    for piece, operators in result.profile.items():
        rows = ([o['operator'], str(o['calls']), f'{o["ms"]:.1f}', f'{o["share"]:.0%}'] for o in operators)
        yield _table([f'operators of {piece}', 'calls', 'own ms', 'share'], rows)
    if result.memory:
        columns = ['memory of', 'batches', 'growth MB', 'ratio to float', 'peak MB']
        yield _table(columns, (_memory_row(memory) for memory in result.memory))


def change_table(changes: Sequence[Change]) -> Table:
    """Ratios then and now for a terminal."""
    rows = ([c.config, c.what, f'{c.earlier:.2f}', f'{c.now:.2f}', f'{c.percent:+.0f} %'] for c in changes)
    return _table(['config', 'ratio of', 'earlier', 'now', 'change'], rows)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('configs', metavar='CONFIG', type=Path, nargs='+')
    add('--pieces', nargs='+', choices=PIECES, default=['calibrate', 'quant'], help='default: calibrate quant')
    add('--observers', nargs='+', default=OBSERVERS, metavar='NAME', help=f'default: {" ".join(OBSERVERS)}')
    add('--presets', nargs='+', choices=PRESETS, default=list(PRESETS), help='default: both')
    add('--batch-size', type=_positive, default=16, metavar='N', help='default: 16')
    add('--batches', type=_positive, default=10, metavar='N', help='of calibration (default: 10)')
    add('--image-size', type=_positive, metavar='PIXELS', help="default: the config's, or 224")
    add('--repeats', type=_positive, default=5, metavar='N', help='rounds (default: 5)')
    add('--threads', type=_positive, default=cores(), metavar='N', help='default: all cores')
    add('--device', default='cpu', help='cpu, cuda, cuda:1, ... (default: cpu)')
    add('--checkpoint', metavar='FILE', help='float weights, instead of random ones')
    add('--seed', type=int, default=0, help='of random weights and images (default: 0)')
    add('--compile-backend', default='inductor', metavar='NAME', help="torch.compile's (default: inductor)")
    add('--memory', action='store_true', help='peak memory too, of every piece in a process of its own')
    add('--profile', type=_positive, nargs='?', const=15, metavar='N',
        help='the N (15) operators that take longest, of float and quant/strict where it is timed')  # fmt: skip
    add('--json', type=Path, metavar='FILE', help='write everything there too')
    add('--baseline', type=Path, metavar='FILE', help='compare with what --json wrote earlier')
    add('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='as in mim test')
    add('--engines', metavar='NAME,...', help=f'compare these, or all: {",".join(ENGINES)}')
    add('--batch-sizes', type=_positive, nargs='+', default=[1, 8], metavar='N', help="of --engines' timing (1 8)")
    add(
        '--images',
        type=Path,
        metavar='FOLDER',
        help='with --engines: calib/ and val/ as tools/accuracy.py takes them',
    )
    add('--memory-of', nargs=3, help=argparse.SUPPRESS)  # config, piece, batches: what the processes are called with
    return parser


def pieces_of(args: argparse.Namespace) -> list[str]:
    """What is timed for each config."""
    pieces = ['float']
    if 'calibrate' in args.pieces:
        pieces += ['float/all', *(f'calibrate/{observer}' for observer in args.observers)]
    if 'quant' in args.pieces:
        pieces += [f'quant/{preset}' for preset in args.presets]
    if 'compile' in args.pieces:
        pieces += [f'{COMPILED}float', f'{COMPILED}quant/strict']
    return list(dict.fromkeys(pieces))


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a command line.

    Raises:
        ValueError: a device that cannot be timed, or is not there.
    """
    device = torch.device(args.device)
    if device.type not in ('cpu', 'cuda'):
        raise ValueError(f'--device {args.device}: cannot be timed, only cpu and cuda can')
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {args.device}: this torch sees no GPU')
    torch.set_num_threads(args.threads)
    names = ('batch_size', 'image_size', 'batches', 'repeats', 'threads', 'device', 'seed', 'checkpoint')
    given = {name: getattr(args, name) for name in (*names, 'compile_backend')}
    return Settings(**given, cfg_options=args.cfg_options or {})


def measure(args: argparse.Namespace, argv: Sequence[str], console: Console, results: list[Result]) -> None:
    """Fill ``results`` with one result per config, as it comes.

    Raises:
        ValueError, RuntimeError, OSError: what was given is wrong.
    """
    settings, pieces = settings_of(args), pieces_of(args)
    subjects = [Subject(config, settings) for config in dict.fromkeys(args.configs)]
    for subject, piece in itertools.product(subjects, pieces):
        subject.scheme_of(piece)  # an unknown observer is found before, not after, an hour of float
    for subject in subjects:
        results.append(Result(subject))
        progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        # a disabled one that is entered still ends with an empty line, up to rich 14 at least
        with progress if console.is_terminal else contextlib.nullcontext():
            try:
                measure_one(results[-1], pieces, args, argv, progress)
            finally:
                show(console, args, results[-1])
        subject.model = None  # the next one needs the room


def measure_one(
    result: Result, pieces: Sequence[str], args: argparse.Namespace, argv: Sequence[str], progress: Progress
) -> None:
    """Fill one config's result: time, then profile, then memory."""
    subject = result.subject
    subject.load()
    name = subject.config.stem
    task = progress.add_task(name, total=len(pieces) * (1 + args.repeats))

    def tick(text: str) -> None:
        progress.update(task, advance=1, description=f'{name}: {text}')

    stopwatch = Stopwatch(subject, pieces, tick)
    try:
        stopwatch.run()
    finally:
        result.timings = stopwatch.timings()
    if args.profile:
        profiled = [piece for piece in ('float', 'quant/strict') if piece in pieces]
        result.profile.update({piece: stopwatch.profile(piece, args.profile) for piece in profiled})
    if args.memory and can_measure_memory(args.device):
        for row in in_processes(subject.config, pieces, args.batches, argv):
            progress.update(task, description=f'{name}: {row.piece}, memory done')
            result.memory.append(row)


def show(console: Console, args: argparse.Namespace, result: Result) -> None:
    """Everything about one config that was measured, if anything was."""
    if not result.timings:
        return
    subject = result.subject
    size = f'{args.batch_size} random images of {subject.image_size} x {subject.image_size}'
    weights = f'weights of {args.checkpoint}' if args.checkpoint else 'random weights'
    console.print(f'{subject.config}: {subject.scheme_options["type"]}, batches of {size}, {weights}', soft_wrap=True)
    console.print(*tables(result), sep='')
    for timing in result.timings:
        if timing.piece.startswith(COMPILED):
            outcome = f'failed: {timing.failed}' if timing.failed else 'compiled'
            console.print(f'{timing.piece}: {outcome} after {timing.warm_up:.1f} s', soft_wrap=True)


def report(console: Console, args: argparse.Namespace, results: Sequence[Result], baseline: Any) -> None:
    """Print what all configs share, write JSON, compare."""
    written = dict(
        schema=SCHEMA,
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        machine=machine(args.device),
        settings=asdict(results[0].subject.settings),
        configs={str(result.subject.config): result.to_dict() for result in results},
    )
    document = json.loads(json.dumps(written, default=str))  # as a baseline will be read: no tuples
    about = {**document['machine'], 'threads': args.threads}
    console.print(', '.join(f'{key} {value}' for key, value in about.items() if value), soft_wrap=True)
    if args.memory and not can_measure_memory(args.device):
        console.print('memory cannot be measured on this system: it has no /proc/self/clear_refs')
    if args.json is not None:
        write_json(args.json, document)
    if baseline is not None:
        changes = compare_with_baseline(baseline, document)
        for line in differences(baseline, document):
            console.print(f'not comparable? {line}', soft_wrap=True)
        console.print(change_table(changes) if changes else f'{args.baseline} has none of these ratios')


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; a user's mistake is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    results: list[Result] = []
    # a pipe has no width: take what the tables need, so that rows stay whole
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 118)
    try:
        if args.memory_of is not None:
            config, piece, count = args.memory_of
            subject = Subject(Path(config), settings_of(args))
            subject.load()
            print(json.dumps(memory_of(subject, piece, int(count))))
            return 0
        if args.engines is not None:
            _compare.compare_engines(args, settings_of(args), console)
            return 0
        if args.images is not None:
            raise ValueError('--images goes with --engines')
        baseline = read_baseline(args.baseline) if args.baseline else None
        if args.json is not None:
            check_writable(args.json)
        try:
            measure(args, argv, console, results)
        finally:
            results = [result for result in results if result.timings]
            if results:
                report(console, args, results, baseline)
    except (ValueError, RuntimeError, OSError) as error:
        print(f'benchmark.py: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('benchmark.py: interrupted', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
