"""JSON files that tools write at the end of long work."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def check_writable(path: Path) -> None:
    """Find out before hours of measuring, not after.

    Raises:
        ValueError: ``path`` is a folder, or there is no such folder.
        OSError: the folder cannot be written to.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f'--json: there is no folder {folder}')
    if path.is_dir():
        raise ValueError(f'--json: {path} is a folder')
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_json(path: Path, document: dict[str, Any] | list[Any]) -> None:
    """Write ``document``, or leave what was there."""
    aside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        aside.write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
