"""C++ that is compiled on first use: a compiler and a few seconds, no headers of PyTorch, then a cached library."""

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

__all__ = ['FLAGS', 'compiler', 'load_library']

#: Of the compiler; the environment variable FQVIT_NATIVE_FLAGS replaces them.
FLAGS = '-O3 -march=native -fopenmp'
# No contraction to fused multiply-add and no reordering: results must not depend on the machine.
_FIXED = ('-std=c++17', '-shared', '-fPIC', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math')


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first of g++, clang++ and c++ that there is."""
    names = [os.environ['CXX']] if os.environ.get('CXX') else ['g++', 'clang++', 'c++']
    return next((path for name in names if (path := shutil.which(name))), None)


def load_library(main: Path, flags: str | None = None) -> ctypes.CDLL:
    """The library of a source file, compiled for this CPU unless the cache has it.

    Args:
        main: a .cpp file; whatever else lies in its folder may be included by it.
        flags: replace :data:`FLAGS` and ``$FQVIT_NATIVE_FLAGS``, as ``'-O3 -march=haswell -fopenmp'``.

    Raises:
        RuntimeError: no compiler, or it failed; the message says what to do.
    """
    return _load(main, flags if flags is not None else os.environ.get('FQVIT_NATIVE_FLAGS', FLAGS))


@cache
def _load(main: Path, flags: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(_build(main, flags)))


def _build(main: Path, flags: str) -> Path:
    """Where the library lies; built under another name first, so that several processes may."""
    found = compiler()
    key = hashlib.sha256('\0'.join((flags, found or '', _cpu(), main.name, *_FIXED)).encode())
    for source in sorted(p for p in main.parent.iterdir() if p.suffix in ('.cpp', '.h')):
        key.update(source.read_bytes())
    target = _cache() / f'{main.stem}-{key.hexdigest()[:20]}.so'
    if target.is_file():
        return target
    if found is None:
        raise RuntimeError(
            f'{main.name} needs a C++ compiler, and neither g++ nor clang++ was found: install one '
            '(apt install g++, dnf install gcc-c++, conda install gxx) or name it in CXX'
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        draft = Path(folder) / target.name
        command = [found, *_FIXED, *shlex.split(flags), str(main), '-o', str(draft)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f'{main.name} did not compile: {shlex.join(command)}\n{run.stderr[-2000:]}')
        draft.replace(target)
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
