"""Where the shared oracles lie, and a skip with its reason where they are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / 'shared'


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of ``golden/<name>.npz``; skips the test where the folder is absent."""
    path = SHARED / 'golden' / f'{name}.npz'
    if not path.is_file():
        pytest.skip(f'the recorded reference numbers are not here ({path.name} in shared/golden)')
    return dict(np.load(path))


def imagenet() -> Path:
    """The folder of real photographs and weights; skips the test where it is absent."""
    path = SHARED / 'imagenet'
    if not (path / 'weights').is_dir():
        pytest.skip('the photographs and weights are not here (shared/imagenet)')
    return path
