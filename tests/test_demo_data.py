"""The demo's images: all of scikit-learn's digits, each once, in the folder of its digit.

Oracles: the data set itself (its row number is each file's name, so every file can be compared with
the array it came from) and its published description: 1797 images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _digits import split_indices, write_digits
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, written once for all tests that only read them."""
    root = tmp_path_factory.mktemp('digits')
    write_digits(root)
    return root


def rows_in(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.rglob('*.png')]


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def test_counts(tmp_path: Path) -> None:
    counts = write_digits(tmp_path)
    assert counts == {part: len(rows_in(tmp_path / part)) for part in ('train', 'val')}
    assert counts['train'] + counts['val'] == 1797
    assert counts['val'] == 360  # a fifth of 1797, rounded up


def test_every_image_is_in_exactly_one_part(folder: Path) -> None:
    assert sorted(rows_in(folder / 'train') + rows_in(folder / 'val')) == list(range(1797))


def test_folder_is_the_digit(folder: Path) -> None:
    labels = load_digits().target
    for path in folder.rglob('*.png'):
        assert path.parent.name == str(labels[int(path.stem)]), path


def test_both_parts_have_the_same_mix_of_digits() -> None:
    labels = load_digits().target
    whole = np.bincount(labels)
    val = np.bincount(labels[split_indices(labels)['val']], minlength=10)
    assert np.abs(val - whole / 5).max() < 1  # each digit's share to within one image


def test_pixels_are_the_digit_enlarged(folder: Path) -> None:
    images = load_digits().images
    for path in sorted(folder.joinpath('val').rglob('*.png'))[::20]:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ('L', (32, 32))
            blocks = np.asarray(image, dtype=float).reshape(8, 4, 8, 4).mean(axis=(1, 3))
        # bicubic enlarging smooths a little; another digit's image correlates far less
        correlation = np.corrcoef(blocks.ravel(), images[int(path.stem)].ravel())[0, 1]
        assert correlation > 0.97, path


def test_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    write_digits(tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_complete_folder_is_left_alone(tmp_path: Path) -> None:
    write_digits(tmp_path)
    some = next(tmp_path.rglob('*.png'))
    before = some.stat().st_mtime_ns
    write_digits(tmp_path)
    assert some.stat().st_mtime_ns == before


def test_interrupted_writing_is_done_again(tmp_path: Path) -> None:
    write_digits(tmp_path)
    complete = contents(tmp_path)
    next(tmp_path.rglob('*.png')).unlink()
    tmp_path.joinpath('train', '0', 'stray.png').write_bytes(b'')
    tmp_path.joinpath('written.json').unlink()  # written last, so an interrupted run has none
    write_digits(tmp_path)
    assert contents(tmp_path) == complete
