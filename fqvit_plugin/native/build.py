"""The engine's library, with the types of its functions."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from ..compiled import load_library

__all__ = ['library']

ENGINE = Path(__file__).parent / 'src' / 'engine.cpp'


@cache
def library(flags: str | None = None) -> ctypes.CDLL:
    """The engine, compiled for this CPU unless the cache has it.

    Args:
        flags: of the compiler, see :func:`~fqvit_plugin.compiled.load_library`.

    Raises:
        RuntimeError: no compiler, or it failed; the message says what to do.
    """
    lib = load_library(ENGINE, flags)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ('fq_isa', ctypes.c_char_p, []),
        ('fq_size', number, [number]),
        ('fq_pack', number, [pointer, number, number, pointer]),
        ('fq_packed_size', number, [number, number]),
        ('fq_run', None, [pointer, number, pointer, pointer, number, ctypes.c_int, pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
