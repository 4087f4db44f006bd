"""The command ``fqvit``: the scripts of tools/ as sub-commands, in a checkout and in an installed package.

A package of its own, on the standard library alone: ``fqvit doctor`` must start where ``import fqvit_plugin`` fails,
and ``fqvit --help`` need not wait for torch.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

from . import doctor

__all__ = ['UsageError', 'choose', 'find_folder', 'main', 'package_folder', 'tools', 'version']

NO_PKG_RESOURCES = (
    "this environment has no pkg_resources, so mim and `_base_ = 'mmpretrain::...'` do not work: "
    "pip install 'setuptools>=66.1,<82'"
)


class UsageError(Exception):
    """Something the person who typed the command can mend."""


def package_folder() -> Path:
    """Where fqvit_plugin lies, without importing it.

    Raises:
        UsageError: it is nowhere.
    """
    spec = importlib.util.find_spec('fqvit_plugin')
    if spec is None or spec.origin is None:
        raise UsageError('the package fqvit_plugin is not installed here')
    return Path(spec.origin).parent


def find_folder(name: str, package: Path | None = None) -> Path:
    """The folder ``configs`` or ``tools``: in ``.mim`` of an installed package, beside the package in a checkout.

    Raises:
        UsageError: it is in neither place.
    """
    package = package or package_folder()
    installed, checkout = package / '.mim' / name, package.parent / name
    if installed.is_dir():
        return installed
    if checkout.is_dir() and (package.parent / 'pyproject.toml').is_file():
        return checkout
    raise UsageError(f'found no {name}: neither {installed} nor {checkout} is there; install the wheel again')


def version() -> str:
    """``__version__`` of the package, read from its file."""
    text = (package_folder() / '__init__.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = '(.+)'$", text, re.MULTILINE)
    assert match, 'the package states its version on one line'
    return match[1]


def tools(folder: Path | None = None) -> dict[str, Path]:
    """Name of each sub-command, and its script; what begins with an underscore is none."""
    found = sorted((folder or find_folder('tools')).glob('*.py'))
    return {path.stem: path for path in found if not path.stem.startswith('_')}


def summary(script: Path) -> str:
    """First line of the script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding='utf-8'))) or '').partition('\n')[0]


def list_configs(argv: Sequence[str]) -> int:
    """``fqvit configs``: the configs that come with the package; with a name, where that one lies."""
    parser = argparse.ArgumentParser(
        prog='fqvit configs',
        description='List the configs that come with the package, or print where one of them lies.',
        epilog='example: mim test mmpretrain $(fqvit configs fqvit_swin_t_w8a8) --checkpoint X',
    )
    parser.add_argument('name', nargs='?', metavar='NAME', help='such as fqvit_swin_t_w8a8 or _base_/fqvit')
    args = parser.parse_args(argv)
    root = find_folder('configs')
    paths = {p.relative_to(root).with_suffix('').as_posix(): p for p in sorted(root.rglob('*.py'))}
    if args.name is None:
        print(*paths, sep='\n')
        return 0
    # a file's own name will do, but for those that are only there to be inherited
    short = {path.stem: path for name, path in paths.items() if '_base_' not in name}
    paths |= short
    print(paths[choose(args.name.removesuffix('.py'), list(paths), 'config')])
    return 0


#: Sub-commands that are no scripts.
BUILT_IN: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    'configs': ('List the configs that come with the package, or print where one of them lies.', list_configs),
    'doctor': ('Print versions, and what in this environment cannot work.', doctor.main),
}


def choose(name: str, known: Sequence[str], kind: str) -> str:
    """The known name that is meant: itself, or the only one that begins so; ``-`` and ``_`` are the same.

    Raises:
        UsageError: none or several; the message names the nearest.
    """
    wanted = name.replace('-', '_')
    if wanted in known:
        return wanted
    begun = [other for other in known if other.startswith(wanted)]
    if len(begun) == 1:
        return begun[0]
    near = begun or difflib.get_close_matches(wanted, known, n=3)
    hint = f'did you mean {" or ".join(near)}?' if near else f'there is: {", ".join(known)}'
    raise UsageError(f'no {kind} {name!r}; {hint}')


def _help() -> str:
    lines = {name: text for name, (text, _) in BUILT_IN.items()}
    lines |= {name: summary(path) for name, path in tools().items()}
    width = max(map(len, lines))
    listed = '\n'.join(f'  {name:<{width}}  {lines[name]}' for name in sorted(lines))
    return (
        'usage: fqvit [-h] [--version] COMMAND ...\n\nFQ-ViT for MMEngine and MMPretrain.\n\n'
        f'commands (fqvit COMMAND --help tells more; a beginning that is clear will do):\n{listed}\n'
    )


@contextmanager
def _as_module(name: str, module: ModuleType) -> Iterator[None]:
    """``module`` in ``sys.modules``; what it imports stays there afterwards, as torch must."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def _run(script: Path, prog: str, argv: Sequence[str]) -> int:
    """Call ``main(argv)`` of a script, in this process; its exit status.

    Raises:
        UsageError: the script needs a package that is not there.
    """
    if importlib.util.find_spec('pkg_resources') is None:
        print(f'fqvit: {NO_PKG_RESOURCES}', file=sys.stderr)
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # its neighbours are found by file name; argparse takes the program's name from argv; pickle and dataclasses
    # look a module up by its name
    with (
        mock.patch.object(sys, 'path', [str(script.parent), *sys.path]),
        mock.patch.object(sys, 'argv', [prog, *argv]),
        _as_module(script.stem, module),
    ):
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            raise UsageError(f'{script.stem} cannot start: {error}; `fqvit doctor` says what to install') from error
        return int(module.main(list(argv)) or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Find the sub-command and hand it the rest; its exit status, or 2 when there is no such command."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ('-h', '--help', 'help'):
            print(_help(), end='')
            return 0 if argv else 2
        if argv[0] == '--version':
            print(f'fqvit_plugin {version()}')
            return 0
        name, *rest = argv
        scripts = {} if name in BUILT_IN else tools()
        name = choose(name, [*BUILT_IN, *scripts], 'command')
        return BUILT_IN[name][1](rest) if name in BUILT_IN else _run(scripts[name], f'fqvit {name}', rest)
    except UsageError as error:
        print(f'fqvit: {error}', file=sys.stderr)
        return 2
