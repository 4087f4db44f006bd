"""Rewrite a checkpoint of another project under MMPretrain's names."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fqvit_plugin.convert import convert_state_dict, load_checkpoint_file, recognise_family

_EXAMPLES = """\
examples:
  # an official release or anything saved by torch.save
  python tools/convert_checkpoint.py deit_tiny_patch16_224-a1311bcf.pth deit-tiny.pth
  python tools/convert_checkpoint.py swin_tiny_patch4_window7_224.pth swin-tiny.pth
  # AugReg's npz, a Hub download
  python tools/convert_checkpoint.py Ti_16-i21k-300ep--imagenet2012-res_224.npz vit-tiny.pth
  python tools/convert_checkpoint.py model.safetensors vit-base.pth --force
  # for a TimmClassifier: timm's names stay, the file becomes one that MMEngine loads
  python tools/convert_checkpoint.py model.safetensors vit-base-timm.pth --keep-names
  # then
  mim test mmpretrain CONFIG --checkpoint deit-tiny.pth

exit codes: 0 done, 2 something is wrong with what was given (one line on stderr)
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Rewrite a ViT, DeiT or Swin checkpoint of timm, the official releases, AugReg '
        'or Hugging Face under MMPretrain names.',
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('src', metavar='SRC', type=Path, help='.pth, .pt, .bin, .npz or .safetensors file')
    parser.add_argument('dst', metavar='DST', type=Path, help='the MMPretrain checkpoint to write')
    parser.add_argument('--force', action='store_true', help='overwrite DST if it exists')
    parser.add_argument('--keep-names', action='store_true', help='for a TimmClassifier: rename nothing')
    return parser


def convert(src: Path, dst: Path, force: bool = False, keep_names: bool = False) -> str:
    """Convert file ``src`` to file ``dst`` and say what was done; ValueError or OSError if not."""
    if dst.is_dir():
        raise ValueError(f'{dst} is a folder; give the name of the file to write')
    if dst.exists() and not force:
        raise ValueError(f'{dst} exists; add --force to overwrite it')
    if not dst.parent.is_dir():
        raise ValueError(f'the folder {dst.parent} does not exist; create it first')
    source = load_checkpoint_file(src)
    try:
        family = recognise_family(source)
        weights = source if keep_names else convert_state_dict(source)
    except ValueError as error:
        raise ValueError(f'{src}: {error}') from error
    meta = {'converted_from': src.name, 'family': family}
    _write_aside({'state_dict': weights, 'meta': meta}, dst)
    used_for = 'backbone and head' if any(name.startswith('head.') for name in weights) else 'backbone only'
    counts = f'{len(source)} tensors read, {len(weights)} written ({used_for})'
    return f'recognised: {family}\n{counts}: {dst}'


def _write_aside(checkpoint: dict[str, object], dst: Path) -> None:
    """Save next to ``dst`` and rename, so that no half-written file ever carries its name."""
    aside = dst.with_name(f'.{dst.name}.{os.getpid()}.part')
    try:
        torch.save(checkpoint, aside)
        aside.replace(dst)
    finally:
        aside.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        report = convert(args.src, args.dst, args.force, args.keep_names)
    # torch.save reports a full disk or a read-only folder as RuntimeError
    except (ValueError, OSError, RuntimeError, pickle.PicklingError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    print(report)
    return 0


if __name__ == '__main__':
    sys.exit(main())
