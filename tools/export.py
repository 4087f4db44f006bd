"""Export a calibrated classifier: as an integer checkpoint, which needs neither config nor float weights nor data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction
from mmpretrain.registry import MODELS

import fqvit_plugin as fq
from fqvit_plugin.apis import load_config
from fqvit_plugin.integer.checkpoint import save_integer
from fqvit_plugin.integer.convert import to_integer

_EXAMPLES = """\
examples:
  python tools/export.py configs/fqvit_swin_t_w8a8.py swin-tiny-w8a8.pth --format int --out swin-tiny-int.safetensors
  # in Python, then:
  #   from fqvit_plugin.integer.checkpoint import load_integer
  #   logits = load_integer('swin-tiny-int.safetensors')(normalized_images)

exit codes: 0 done, 2 something is wrong with what was given (one line on stderr)
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG', type=Path)
    parser.add_argument('checkpoint', metavar='CALIBRATED', type=Path, help='what tools/calibrate.py wrote')
    parser.add_argument('--format', choices=['int'], default='int', help='int: packed safetensors (default)')
    parser.add_argument('--out', metavar='FILE', type=Path, required=True, help='what to write')
    parser.add_argument('--image-size', type=int, nargs=2, metavar=('H', 'W'), help="default: the backbone's")
    parser.add_argument('--force', action='store_true', help='overwrite FILE if it exists')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='as in mim test')
    return parser


def export(args: argparse.Namespace) -> None:
    """Do what the command line says; ValueError, RuntimeError or OSError if that cannot be."""
    if args.out.exists() and not args.force:
        raise ValueError(f'{args.out} exists; add --force to overwrite it')
    if not args.out.parent.is_dir():
        raise ValueError(f'--out: there is no folder {args.out.parent}')
    cfg = load_config(args.config, args.cfg_options)
    model = MODELS.build(cfg.model)
    report = fq.load_quantized_(model, args.checkpoint)
    integer = to_integer(model, None if args.image_size is None else tuple(args.image_size))
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    meta = {'preprocessor': json.dumps({k: preprocessor.get(k) for k in ('mean', 'std', 'to_rgb')})}
    size = save_integer(integer, args.out, meta)
    print(
        f'{args.out}: {size / 1e6:.2f} MB, {size / report.float_bytes:.1%} of the {report.float_bytes / 1e6:.2f} MB '
        f'of the float parameters; {len(integer.program.ops)} operations, images of {integer.program.image_size}'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export, and turn a user's mistake into one line and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        export(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f'export.py: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
