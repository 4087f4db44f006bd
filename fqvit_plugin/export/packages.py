"""The packages that only an export needs, imported when one is asked for."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ['EXTRA', 'need']

#: What brings them.
EXTRA = "pip install 'fqvit_plugin[export]'"


def need(name: str) -> Any:
    """The module ``name``.

    Raises:
        ValueError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'the ONNX export needs {name.split(".")[0]} ({error}): {EXTRA}') from None
