"""Compiles the engine on first use and loads it: a C++ compiler and a second or two, no headers of PyTorch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ['FLAGS', 'compiler', 'library', 'native_problem']

SOURCES = Path(__file__).parent / 'src'
#: Of the compiler; the environment variable FQVIT_NATIVE_FLAGS replaces them.
FLAGS = '-O3 -march=native -fopenmp'
_FIXED = ('-std=c++17', '-shared', '-fPIC', '-ffp-contract=off', '-fno-math-errno')


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first of g++, clang++ and c++ that there is."""
    names = [os.environ['CXX']] if os.environ.get('CXX') else ['g++', 'clang++', 'c++']
    return next((path for name in names if (path := shutil.which(name))), None)


def native_problem() -> str | None:
    """Why the engine cannot be built here, with what to do; None if it can or is there already."""
    try:
        library()
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


def library(flags: str | None = None) -> ctypes.CDLL:
    """The engine, compiled for this CPU unless the cache has it.

    Args:
        flags: replace :data:`FLAGS` and ``$FQVIT_NATIVE_FLAGS``, as ``'-O3 -march=haswell -fopenmp'``.

    Raises:
        RuntimeError: no compiler, or it failed; the message says what to do.
    """
    return _load(flags if flags is not None else os.environ.get('FQVIT_NATIVE_FLAGS', FLAGS))


@cache
def _load(flags: str) -> ctypes.CDLL:
    path = _build(flags)
    lib = ctypes.CDLL(str(path))
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


def _build(flags: str) -> Path:
    """Where the compiled engine lies; built under another name first, so that several processes may."""
    found = compiler()
    key = hashlib.sha256('\0'.join((flags, found or '', _cpu(), *_FIXED)).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.read_bytes())
    target = _cache() / f'engine-{key.hexdigest()[:20]}.so'
    if target.is_file():
        return target
    if found is None:
        raise RuntimeError(
            'the native engine needs a C++ compiler, and neither g++ nor clang++ was found: install one '
            '(apt install g++, dnf install gcc-c++, conda install gxx) or name it in CXX'
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        draft = Path(folder) / 'engine.so'
        command = [found, *_FIXED, *shlex.split(flags), str(SOURCES / 'engine.cpp'), '-o', str(draft)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f'the native engine did not compile: {shlex.join(command)}\n{run.stderr[-2000:]}')
        os.replace(draft, target)
    return target


def _cache() -> Path:
    if os.environ.get('FQVIT_NATIVE_CACHE'):
        return Path(os.environ['FQVIT_NATIVE_CACHE'])
    base = os.environ.get('XDG_CACHE_HOME')
    return (Path(base) if base else Path.home() / '.cache') / 'fqvit_plugin'


@cache
def _cpu() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    wanted = ('model name', 'flags', 'Features', 'CPU part')
    return '\n'.join({line.split(':')[0].strip(): line for line in lines if line.startswith(wanted)}.values())
