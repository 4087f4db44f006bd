"""Export a calibrated classifier: as an integer checkpoint, which needs no config and no data, or as an ONNX file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from _onnx import read_labelled, top1
from mmengine.config import Config, DictAction
from mmpretrain.registry import MODELS

import fqvit_plugin as fq
from fqvit_plugin.apis import load_config
from fqvit_plugin.export import FORMS, TARGETS, to_onnx
from fqvit_plugin.integer.checkpoint import load_integer, save_integer
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.integer.program import IntegerModel

_EXAMPLES = """\
examples:
  python tools/export.py configs/fqvit_swin_t_w8a8.py swin-tiny-w8a8.pth --format int --out swin-tiny-int.safetensors
  python tools/export.py configs/fqvit_deit_t_w8a8_attn4.py deit-int.safetensors --format onnx --out deit.onnx
  python tools/export.py CONFIG q.pth --format onnx --target openvino --images val --out model.onnx
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
    parser.add_argument(
        'checkpoint', metavar='CALIBRATED', type=Path, help='of tools/calibrate.py, or of --format int'
    )
    parser.add_argument('--format', choices=['int', 'onnx'], default='int', help='int: packed safetensors (default)')
    parser.add_argument('--form', choices=FORMS, default='qdq', help='of ONNX: for int8 kernels (default), or exact')
    parser.add_argument('--target', choices=TARGETS, default='onnxruntime', help='engine of the ONNX file')
    parser.add_argument('--weights', choices=['int8', 'uint8'], default='int8', help='uint8: safe without VNNI')
    parser.add_argument('--images', metavar='FOLDER', type=Path, help='report top-1 of the ONNX file on these')
    parser.add_argument('--batch-size', type=int, default=20, metavar='N', help='of --images (default: 20)')
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
    if args.images is not None and (args.format != 'onnx' or not args.images.is_dir()):
        raise ValueError(f'--images wants --format onnx and a folder; {args.images} was given')
    cfg = load_config(args.config, args.cfg_options)
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    meta = {'preprocessor': json.dumps({k: preprocessor.get(k) for k in ('mean', 'std', 'to_rgb')})}
    integer, float_bytes = _integer(args, cfg)
    if args.format == 'onnx':
        print(to_onnx(integer, args.out, args.form, args.target, weights=args.weights, meta=meta))
        if args.images is not None:
            print(top1(args.out, integer, read_labelled(args.images, cfg), args.target, args.batch_size))
        return
    size = save_integer(integer, args.out, meta)
    share = (
        f', {size / float_bytes:.1%} of the {float_bytes / 1e6:.2f} MB of the float parameters' if float_bytes else ''
    )
    print(
        f'{args.out}: {size / 1e6:.2f} MB{share}; {len(integer.program.ops)} operations, '
        f'images of {integer.program.image_size}'
    )


def _integer(args: argparse.Namespace, cfg: Config) -> tuple[IntegerModel, int]:
    """The integer model, and the bytes of the float parameters where these are known."""
    if args.checkpoint.suffix == '.safetensors':
        if args.image_size is not None:
            raise ValueError(f'--image-size: {args.checkpoint} was made for one size already')
        return load_integer(args.checkpoint), 0
    model = MODELS.build(cfg.model)
    report = fq.load_quantized_(model, args.checkpoint)
    size = None if args.image_size is None else tuple(args.image_size)
    return to_integer(model, size), report.float_bytes


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
