"""Scikit-learn's handwritten digits, written once as the image folders that MMPretrain reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

__all__ = ['split_indices', 'write_digits']

SIZE = 32
VAL_SHARE = 0.2
SEED = 0
_STAMP = 'written.json'


def split_indices(labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Row numbers of the training and of the validation part, each with the same mix of digits.

    Args:
        labels: one digit per row, shape ``(N,)``.
    """
    train, val = train_test_split(np.arange(len(labels)), test_size=VAL_SHARE, stratify=labels, random_state=SEED)
    return {'train': np.sort(train), 'val': np.sort(val)}


def write_digits(root: Path) -> dict[str, int]:
    """Write ``root/{train,val}/{digit}/{row}.png`` and return how many images each part has.

    The 1797 images of 8 x 8 pixels in 17 greys come with scikit-learn (nothing is downloaded) and
    are enlarged to 32 x 32. ``row`` is the image's row in ``load_digits()``. A folder that is
    complete is left alone: a stamp with these settings, written last, says so.
    """
    settings = {'size': SIZE, 'val_share': VAL_SHARE, 'seed': SEED}
    digits = load_digits()
    parts = split_indices(digits.target)
    if _read_stamp(root) != settings:
        shutil.rmtree(root, ignore_errors=True)
        for path, image in _images(root, digits.images, digits.target, parts):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        (root / _STAMP).write_text(json.dumps(settings), encoding='utf-8')
    return {part: len(rows) for part, rows in parts.items()}


def _images(
    root: Path,
    pixels: NDArray[np.float64],
    labels: NDArray[np.int64],
    parts: dict[str, NDArray[np.int64]],
) -> Iterator[tuple[Path, Image.Image]]:
    """Each image with the path it belongs to."""
    grey = np.round(pixels * (255 / 16)).astype(np.uint8)  # (N, 8, 8), 0..16 -> 0..255
    for part, rows in parts.items():
        for row in rows:
            path = root / part / str(labels[row]) / f'{row:04d}.png'
            yield path, Image.fromarray(grey[row]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _read_stamp(root: Path) -> object:
    """What the folder says it was written with; None when it is not there or not complete."""
    try:
        return json.loads((root / _STAMP).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
