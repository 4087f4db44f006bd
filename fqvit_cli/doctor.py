"""``fqvit doctor``: versions, and what in this environment cannot work, each with what to type."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

__all__ = ['main', 'problems', 'satisfies']

#: Distributions that are shown although the package does not ask for them.
SHOWN = ('openmim', 'mmcv', 'mmsegmentation', 'mmdet')

Lookup = Callable[[str], 'str | None']


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[str]:
    """What the installed package asks for, without extras; empty when it is only on the path."""
    try:
        asked = metadata.requires('fqvit_plugin') or []
    except metadata.PackageNotFoundError:
        return []
    return [line for line in asked if 'extra ==' not in line]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r'\d+', re.split(r'[+a-z]', text.strip())[0]))


def satisfies(version: str, bounds: str) -> bool:
    """Whether ``2.8.0+cpu`` lies in ``>=2.1,<3``: released versions, and the comparisons pyproject.toml uses."""
    found = _numbers(version)
    for bound in filter(None, bounds.split(',')):
        match = re.fullmatch(r'\s*(==|!=|>=|<=|<|>)\s*([\w.]+)\s*', bound)
        if match is None:
            raise ValueError(f'cannot read the bound {bound!r} of {bounds!r}')
        limit = _numbers(match[2])
        length = max(len(found), len(limit))
        a, b = (t + (0,) * (length - len(t)) for t in (found, limit))
        kept = {'==': a == b, '!=': a != b, '>=': a >= b, '<=': a <= b, '<': a < b, '>': a > b}
        if not kept[match[1]]:
            return False
    return True


def split_requirement(line: str) -> tuple[str, str]:
    """``('mmcv-lite', '>=2.0.0,<2.4')`` of ``mmcv-lite<2.4,>=2.0.0; marker``."""
    match = re.match(r'([\w.-]+)(?:\[[^]]*\])?\s*\(?([^;)]*)', line)
    assert match
    return match[1], match[2].strip()


def problems(
    asked: Sequence[str], version_of: Lookup = installed, has_pkg_resources: bool = True
) -> list[tuple[str, str]]:
    """What cannot work, and what to type.

    Args:
        asked: requirement lines such as ``torch>=2.1``.
        version_of: version of a distribution, or None when it is not installed.
        has_pkg_resources: whether ``import pkg_resources`` would work.
    """
    found = []
    lite, full = version_of('mmcv-lite'), version_of('mmcv')
    for name, bounds in map(split_requirement, asked):
        version = version_of(name)
        if name == 'mmcv-lite' and version is None and full is not None:
            version = full  # the full package holds all of the lite one
        if version is None:
            found.append((f'{name} is not installed', f"pip install '{name}{bounds}'"))
        elif not satisfies(version, bounds):
            found.append((f'{name} {version} is outside {bounds}', f"pip install '{name}{bounds}'"))
    if lite and full:
        found.append(
            (
                f'mmcv {full} and mmcv-lite {lite} write into the same folder',
                'pip uninstall -y mmcv mmcv-lite, then install one of them',
            )
        )
    if not has_pkg_resources:
        found.append(
            (
                f'setuptools {version_of("setuptools")} has no pkg_resources, which mim and '
                "`_base_ = 'mmpretrain::...'` import",
                "pip install 'setuptools>=66.1,<82'",
            )
        )
    torch, numpy = version_of('torch'), version_of('numpy')
    if torch and numpy and not satisfies(torch, '>=2.3') and not satisfies(numpy, '<2'):
        found.append((f'torch {torch} was built for NumPy 1, and NumPy is {numpy}', "pip install 'numpy<2'"))
    return found


def import_problem(module: str) -> str | None:
    """The last line Python says when it cannot import ``module``, in a process of its own; None if it can."""
    command = [sys.executable, '-W', 'ignore', '-c', f'import {module}']
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    return (run.stderr.strip().splitlines() or [f'ended with status {run.returncode}'])[-1]


def native_engine() -> str:
    """Whether the engine of ``NativeModel`` compiles here, or did. The package works without: never a problem."""
    package = importlib.util.find_spec('fqvit_plugin')
    folders = [] if package is None else package.submodule_search_locations or []
    source = next((path for folder in folders if (path := Path(folder, 'compiled.py')).is_file()), None)
    spec = None if source is None else importlib.util.spec_from_file_location('fqvit_compiled', source)
    if source is None or spec is None or spec.loader is None:
        return 'not there'
    compiled = importlib.util.module_from_spec(spec)  # alone: the package would import torch
    spec.loader.exec_module(compiled)
    try:
        lib = compiled.load_library(source.parent / 'native' / 'src' / 'engine.cpp')
    except (RuntimeError, OSError) as error:
        return str(error)
    lib.fq_isa.restype = ctypes.c_char_p
    return f'{lib.fq_isa().decode()}, compiled by {compiled.compiler()}'


def main(argv: Sequence[str] | None = None) -> int:
    """Print versions and problems; 1 if there are any."""
    parser = argparse.ArgumentParser(
        prog='fqvit doctor',
        description='Print versions, and what in this environment cannot work.',
        epilog='exit codes: 0 all is well, 1 something cannot work',
    )
    parser.parse_args(argv)
    asked = requirements()
    names = [split_requirement(line)[0] for line in asked]
    versions = {'Python': sys.version.split()[0], 'fqvit_plugin': installed('fqvit_plugin') or 'not installed'}
    versions |= {name: installed(name) or '-' for name in dict.fromkeys([*names, *SHOWN])}
    width = max(map(len, versions))
    print(*(f'{name:<{width}}  {version}' for name, version in versions.items()), sep='\n')
    found = problems(asked, has_pkg_resources=importlib.util.find_spec('pkg_resources') is not None)
    if not asked:
        print('\nfqvit_plugin runs from a folder and is not installed: the versions it needs are not checked')
    print(f'\nnative engine: {native_engine()}')
    if installed('openmim') is None:
        print("\nmim is not installed; `mim test mmpretrain ...` needs it: pip install 'openmim>=0.3.9'")
    said = import_problem('fqvit_plugin')
    if said is not None:
        found.append((f'import fqvit_plugin fails: {said}', 'mend what stands above first' if found else 'see above'))
    for what, remedy in found:
        print(f'\nproblem: {what}\n    try: {remedy}')
    print('\nall is well' if not found else f'\n{len(found)} to mend')
    return 1 if found else 0
