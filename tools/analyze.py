"""Say where a quantized classifier loses: the effect of every tensor alone, and of everything but it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from _main import exit_code
from _measuring import calibrated_model, check_device, check_outputs, progress_bar
from mmengine.config import DictAction
from rich.console import Console

from fqvit_plugin.analysis.collect import analyse_on
from fqvit_plugin.analysis.page import PageInfo, render_page, write_text
from fqvit_plugin.apis import load_config
from fqvit_plugin.calibration import CalibrationSet
from fqvit_plugin.sensitivity.measure import DIRECTIONS
from fqvit_plugin.sensitivity.page import sensitivity_sections
from fqvit_plugin.sensitivity.records import LEVELS
from fqvit_plugin.sensitivity.run import IMAGES, channels_on, sensitivity_on, worst_photos
from fqvit_plugin.sensitivity.terminal import print_sensitivity

_EXAMPLES = """\
Images are those of the config's calib_dataloader; labels are used where it has some, and are not needed.

examples:
  python tools/analyze.py configs/fqvit_vit_t_w8a8_attn4.py vit-tiny.pth
  python tools/analyze.py configs/fqvit_vit_t_w8a8_attn4.py q.pth --json s.json --html s.html --images 64
  python tools/analyze.py CONFIG q.pth --units group block --directions only
  # what every layer's weights cost at other bits, for tools/allocate.py:
  python tools/analyze.py CONFIG q.pth --units tensor --directions only --weight-bits 3 4 6 8 --json s.json

exit codes: 0 done, 2 something is wrong with what was given (one line on stderr), 130 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', metavar='CONFIG', type=Path)
    add('checkpoint', metavar='CHECKPOINT', type=Path, help='calibrated, or float weights that are calibrated first')
    add('--images', type=int, default=IMAGES, metavar='N', help=f'how many to measure on (default: {IMAGES})')
    add('--units', nargs='+', choices=LEVELS, default=list(LEVELS), help='what is switched as one (default: all)')
    add('--directions', nargs='+', choices=DIRECTIONS, default=list(DIRECTIONS), help='default: both')
    add('--weight-bits', type=int, nargs='+', default=[], metavar='N', help='measure weights at these bits too')
    add('--act-bits', type=int, nargs='+', default=[], metavar='N', help='activations too, in the range they have')
    add('--sort', choices=DIRECTIONS, help='of the tables (default: the first of --directions)')
    add('--top', type=int, default=20, metavar='N', help='rows of a table (default: 20)')
    add('--json', metavar='FILE', type=Path, help='write all figures for programs')
    add('--html', metavar='FILE.html', type=Path, help='write the page of calibrate.py --report, and plots of this')
    add('--no-pictures', action='store_true', help='name the worst images in the page, and do not show them')
    add('--batches', type=int, default=10, metavar='N', help='to calibrate float weights on (default: 10)')
    add('--seed', type=int, default=0, help="of the images' order (default: 0)")
    add('--device', default='cpu', help='cpu, cuda, cuda:1, ... (default: cpu)')
    add('--force', action='store_true', help='overwrite what exists')
    add('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='as in mim test')
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuse now what could not be written, or would show nothing, after minutes of measuring."""
    if args.html is not None and args.html.suffix.lower() not in ('.html', '.htm'):
        raise ValueError(f'--html writes a web page: call it {args.html.name}.html, for instance')
    check_outputs([args.json, args.html], args.force)
    for option, value in (('--images', args.images), ('--top', args.top)):
        if value < 1:
            raise ValueError(f'{option} must be at least 1, got {value}')
    if args.sort is not None and args.sort not in args.directions:
        raise ValueError(f'--sort {args.sort}: that direction is not measured; add it to --directions')
    check_device(args.device)


def analyze(args: argparse.Namespace) -> None:
    """Do what the command line says; ValueError, RuntimeError or OSError if that cannot be."""
    _check(args)
    cfg = load_config(args.config, args.cfg_options)
    data = CalibrationSet.build(cfg, args.batches, args.seed)
    model, report = calibrated_model(cfg, args.checkpoint, args.device, data)
    analysis = analyse_on(model, data, args.images)
    with progress_bar(Console(stderr=True)) as begin:
        result = sensitivity_on(
            model, data, args.images, levels=args.units, directions=args.directions, weight_bits=args.weight_bits,
            act_bits=args.act_bits, analysis=analysis, begin=begin,
        )  # fmt: skip
    # a pipe has no width: take what the tables need, so that rows stay whole
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    print_sensitivity(console, result, args.sort or args.directions[0], args.top)
    if args.json is not None:
        figures = {**result.to_dict(), 'scheme': report.scheme.to_dict()}
        write_text(args.json, json.dumps(figures, allow_nan=False))
    if args.html is not None:
        info = PageInfo.of(model, cfg, f'{len(data.indices)} images in {len(data.batches)} batches')
        channels = channels_on(model, data, result, args.images)
        photos = worst_photos(data, result, args.images, pictures=not args.no_pictures)
        added = sensitivity_sections(result, analysis, channels, photos)
        write_text(args.html, render_page(info, report, analysis, added))
    for path in (args.json, args.html):
        if path is not None:
            console.print(f'written: {path}', soft_wrap=True, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, analyze, and turn a user's mistake into one line and exit code 2."""
    args = _parser().parse_args(argv)
    return exit_code('analyze.py', lambda: analyze(args))


if __name__ == '__main__':
    sys.exit(main())
