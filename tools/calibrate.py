"""Calibrate a classifier without running an evaluation, and save the calibrated checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _main import exit_code
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from rich.console import Console

import fqvit_plugin as fq
from fqvit_plugin.analysis.collect import analyse_on
from fqvit_plugin.analysis.page import PageInfo, render_page, write_text
from fqvit_plugin.analysis.terminal import print_report
from fqvit_plugin.apis import build_classifier, load_config
from fqvit_plugin.calibration import CalibrationSet, calibrate_on_, image_names
from fqvit_plugin.checkpoint import save_calibrated
from fqvit_plugin.presets import SCHEMES, parse_scheme
from fqvit_plugin.scheme import PRESETS, QuantScheme

_EXAMPLES = """\
examples:
  python tools/calibrate.py configs/fqvit_swin_t_w8a8.py swin-tiny.pth --out swin-tiny-w8a8.pth
  python tools/calibrate.py configs/fqvit_deit_t_w8a8_attn4.py deit-tiny.pth --out q.pth \\
      --observer omse --batches 20 --device cuda
  python tools/calibrate.py my_config.py my.pth --out q.pth --scheme fqvit_w8a8 --act-bits 6 \\
      --cfg-options calib_dataloader.batch_size=32
  python tools/calibrate.py configs/fqvit_deit_t_w8a8.py deit-tiny.pth --out q.pth --report q.html
  # then, with the same quant_scheme in the config:
  mim test mmpretrain CONFIG --checkpoint q.pth

exit codes: 0 done, 2 something is wrong with what was given (one line on stderr), 130 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG', type=Path)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=Path, help='float weights')
    parser.add_argument('--out', metavar='FILE', type=Path, required=True, help='what to write')
    parser.add_argument('--report', metavar='FILE.html', type=Path, help='write a page on every tensor and its error')
    parser.add_argument('--json', metavar='FILE', type=Path, help='write the same figures for programs')
    parser.add_argument('--scheme', choices=SCHEMES, help="instead of the config's")
    parser.add_argument('--observer', help='minmax, ema, percentile, omse, or a registered one')
    parser.add_argument('--preset', choices=PRESETS)
    for kind in ('weight', 'act', 'attn'):
        parser.add_argument(f'--{kind}-bits', type=int, metavar='N', help='2 to 16')
    parser.add_argument('--batches', type=int, default=10, metavar='N', help='default: 10')
    parser.add_argument('--seed', type=int, default=0, help="of the images' order (default: 0)")
    parser.add_argument('--device', default='cpu', help='cpu, cuda, cuda:1, ... (default: cpu)')
    parser.add_argument('--force', action='store_true', help='overwrite what exists')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='as in mim test')
    return parser


def _scheme(args: argparse.Namespace, configured: dict | str | None) -> QuantScheme:
    """The config's scheme with what the command line changes."""
    options = {'type': configured} if isinstance(configured, str) else dict(configured or {})
    given = {
        'type': args.scheme,
        'observer': args.observer,
        'preset': args.preset,
        'weight_bits': args.weight_bits,
        'act_bits': args.act_bits,
        'attn_bits': args.attn_bits,
    }
    options.update({k: v for k, v in given.items() if v is not None})
    if 'type' not in options:
        raise ValueError('the config has no quant_scheme: name one with --scheme')
    return parse_scheme(options)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse now what could not be written after minutes of calibration."""
    given = [path for path in (args.out, args.report, args.json) if path is not None]
    if len({path.absolute() for path in given}) < len(given):
        raise ValueError('--out, --report and --json must be different files')
    if args.report is not None and args.report.suffix.lower() not in ('.html', '.htm'):
        raise ValueError(f'--report writes a web page: call it {args.report.name}.html, for instance')
    for path in given:
        if path.is_dir():
            raise ValueError(f'{path} is a folder: name a file in it')
        if path.exists() and not args.force:
            raise ValueError(f'{path} exists; add --force to overwrite it')
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f'{path} cannot be written: {folder} is no folder one may write into')


def calibrate(args: argparse.Namespace) -> None:
    """Do what the command line says; ValueError, RuntimeError or OSError if that cannot be."""
    _check_outputs(args)
    cfg = load_config(args.config, args.cfg_options)
    scheme = _scheme(args, cfg.get('quant_scheme'))
    device = torch.device(args.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError('--device cuda: this torch sees no GPU')
    logger = MMLogger.get_current_instance()
    logger.setLevel('INFO')
    data = CalibrationSet.build(cfg, args.batches, args.seed)
    model = build_classifier(cfg, args.checkpoint, args.device)
    report = fq.quantize_model_(model, scheme)
    calibrate_on_(model, data, logger)
    analysis = analyse_on(model, data)  # before anything is written, so that an interruption leaves nothing
    model.dataset_meta = getattr(data.loader.dataset, 'metainfo', None)
    save_calibrated(args.out, model, scheme, image_names(data.loader.dataset, data.indices))
    console = Console(highlight=False)
    print_report(console, report, analysis)
    if args.report is not None:
        info = PageInfo.of(model, cfg, f'{len(data.indices)} images in {len(data.batches)} batches')
        write_text(args.report, render_page(info, report, analysis))
    if args.json is not None:
        figures = {'scheme': scheme.to_dict(), **report.to_dict(), **analysis.to_dict()}
        write_text(args.json, json.dumps(figures, allow_nan=False))
    written = ', '.join(str(path) for path in (args.out, args.report, args.json) if path is not None)
    console.print(f'calibrated on {len(data.indices)} images; saved to {written}', soft_wrap=True, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, calibrate, and turn a user's mistake into one line and exit code 2."""
    args = _parser().parse_args(argv)
    return exit_code('calibrate.py', lambda: calibrate(args))


if __name__ == '__main__':
    sys.exit(main())
