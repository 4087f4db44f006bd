"""Check what README.md, CHANGELOG.md and docs/ say: links, files, Python examples and commands.

- a relative link resolves, and so does its anchor;
- a path in backticks exists (``*`` may stand in it);
- a ``python`` block runs, the blocks of one document in one namespace and one folder; one that starts with ``_base_``
  is read as a config, its scheme parsed and its QuantHook built;
- a command in a ``bash`` block, or in backticks, is one its program takes: make's targets, nox's sessions, a tool's
  own argparse parser, the test and train options of an OpenMMLab package, a config that exists and can be read with
  these ``--cfg-options``.

A block is left out only by a comment on the line before it: ``<!-- docs-check: skip: REASON -->``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.util
import io
import os
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]

_FENCE = re.compile(r'^(?P<indent> *)```(?P<language>[\w+-]*)\s*$')
_SKIP = re.compile(r'^<!--\s*docs-check:\s*skip\b:?\s*(?P<reason>.*?)\s*-->$')
_LINK = re.compile(r'\[[^\]\[]*\]\((?P<target>[^)\s]+)(?:\s+"[^"]*")?\)')
_CODE = re.compile(r'`([^`\n]+)`')
_PATH = re.compile(r'(?:\./)?[\w.*-]+(?:/[\w.*-]+)+/?')
_HEADING = re.compile(r'^#{1,6}\s+(?P<title>.+?)\s*$', re.MULTILINE)
#: Folders that programs write: what documents say about them cannot be looked up.
_WRITTEN = {'work_dirs', '.venv', 'data'}
_SUFFIXES = {'.md', '.py', '.sh', '.toml', '.txt'}
#: Commands of which nothing here is the authority.
_FOREIGN = {'cd', 'git', 'mkdir', 'pip', 'source'}
#: What mim calls a package -> how Python imports it.
_MIM = {'mmpretrain': 'mmpretrain', 'mmsegmentation': 'mmseg', 'mmdet': 'mmdet'}
_COMMAND = re.compile(rf'(?:make|nox|fqvit|python3?|mim \w+ (?:fqvit_plugin|{"|".join(_MIM)})) +\S')


@dataclass(frozen=True)
class Block:
    """A fenced block; ``skip`` is the reason it is left out, ``None`` when it is not."""

    language: str
    text: str
    line: int
    skip: str | None


@dataclass(frozen=True)
class Document:
    """A Markdown file: its blocks, and everything else with the blocks blanked out."""

    path: Path
    blocks: tuple[Block, ...]
    prose: str

    @classmethod
    def read(cls, path: Path) -> Document:
        """Parse the file.

        Raises:
            ValueError: a fence is not closed.
        """
        blocks: list[Block] = []
        prose: list[str] = []
        lines = path.read_text(encoding='utf-8').splitlines()
        rows = iter(enumerate(lines, start=1))
        for number, line in rows:
            fence = _FENCE.match(line)
            if fence is None:
                prose.append(line)
                continue
            body = list(_until_fence(rows, path, number, len(fence['indent'])))
            before = next((row for row in reversed(prose) if row.strip()), '').strip()
            skip = _SKIP.match(before)
            blocks.append(Block(fence['language'], '\n'.join(body), number, skip['reason'] if skip else None))
            prose += [''] * (len(body) + 2)
        return cls(path, tuple(blocks), '\n'.join(prose))

    def spans(self) -> Iterator[tuple[int, str]]:
        """Line and text of everything in backticks outside the blocks."""
        for number, line in enumerate(self.prose.splitlines(), start=1):
            for span in _CODE.findall(line):
                yield number, span

    def anchors(self) -> set[str]:
        """What ``#...`` may point at, as GitHub makes it of the headings."""
        titles = (match['title'].lower().replace('`', '') for match in _HEADING.finditer(self.prose))
        return {re.sub(r'[^\w\- ]', '', title).replace(' ', '-') for title in titles}


def _until_fence(rows: Iterator[tuple[int, str]], path: Path, opened: int, indent: int) -> Iterator[str]:
    for _, line in rows:
        if line.strip() == '```':
            return
        yield line[indent:] if not line[:indent].strip() else line
    raise ValueError(f'{path}:{opened}: this block is never closed')


class Checker:
    """Collects findings, one line each.

    Args:
        root: the repository; tools, configs and the Makefile are looked up there.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.findings: list[str] = []
        self.counts = {'links': 0, 'paths': 0, 'snippets': 0, 'commands': 0}

    def check(self, path: Path) -> None:
        """Check one document."""
        document = Document.read(path)
        self._check_links(document)
        for line, span in document.spans():
            if _COMMAND.match(span):
                self._check_commands(document, line, span)
            elif _PATH.fullmatch(span):
                self._note(document, line, self._path_problem(span), 'paths')
        self._check_blocks(document)

    def _note(self, document: Document, line: int, problem: str | None, kind: str) -> None:
        self.counts[kind] += 1
        if problem:
            self.findings.append(f'{os.path.relpath(document.path, self.root)}:{line}: {problem}')

    def _check_links(self, document: Document) -> None:
        for number, line in enumerate(document.prose.splitlines(), start=1):
            for match in _LINK.finditer(_CODE.sub('', line)):
                target = match['target']
                if not re.match(r'[a-z][a-z0-9+.-]*:', target):
                    self._note(document, number, self._link_problem(document, target), 'links')

    def _link_problem(self, document: Document, target: str) -> str | None:
        name, _, anchor = target.partition('#')
        path = document.path.parent / name if name else document.path
        if not path.exists():
            return f'broken link {target}'
        if anchor and path.suffix == '.md' and anchor not in Document.read(path).anchors():
            return f'broken link {target}: no such heading'
        return None

    def _path_problem(self, span: str) -> str | None:
        first = span.removeprefix('./').split('/')[0]
        is_ours = (self.root / first).exists() or Path(span).suffix in _SUFFIXES
        if first in _WRITTEN or not is_ours or any(self.root.glob(span.strip('./') if '*' in span else span)):
            return None
        return f'there is no {span}'

    def _check_blocks(self, document: Document) -> None:
        namespace: dict[str, Any] = {'__name__': 'docs'}
        with playground(self.root) as folder:
            for block in document.blocks:
                if block.skip is not None:
                    if not block.skip:
                        self._note(document, block.line, 'a skipped block needs a reason', 'snippets')
                elif block.language == 'python':
                    self._note(document, block.line, run_snippet(block.text, namespace, folder), 'snippets')
                elif block.language == 'bash':
                    self._check_commands(document, block.line + 1, block.text)

    def _check_commands(self, document: Document, line: int, text: str) -> None:
        for offset, words in split_commands(text):
            self._note(document, line + offset, command_problem(words, self.root), 'commands')


@contextlib.contextmanager
def playground(root: Path = ROOT) -> Iterator[Path]:
    """A folder that is empty but for ``configs`` and ``tools``, which are the repository's."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ('configs', 'tools'):
            (Path(folder) / name).symlink_to(root / name)
        yield Path(folder)


def run_snippet(text: str, namespace: dict[str, Any], folder: Path) -> str | None:
    """Run a Python example in ``folder``, or read it as a config; what went wrong, or None."""
    is_config = text.lstrip().startswith('_base_')
    here = Path.cwd()
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            if is_config:
                Path('snippet.py').write_text(text, encoding='utf-8')
                return config_problem(Path('snippet.py'), None)
            exec(compile(text, '<example>', 'exec'), namespace)
        except Exception as error:
            at = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == '<example>'
            ]
            where = f'line {at[-1]} of the example: ' if at else ''
            return f'{where}{type(error).__name__}: {error}'
        finally:
            os.chdir(here)
    return None


def split_commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """The commands of a shell block, each with its line; ``\\`` continues a line, ``&&`` and ``|`` split one."""
    pending, start = '', 0
    for number, line in enumerate(text.splitlines()):
        start = start if pending else number
        pending += line.removesuffix('\\')
        if line.endswith('\\'):
            continue
        words: list[str] = []
        for word in [*shlex.split(pending, comments=True), ';']:
            if word not in ('&&', '||', '|', ';'):
                words.append(word)
                continue
            while words and re.match(r'[A-Z_]+=', words[0]):
                words.pop(0)
            if words:
                yield start, words
            words = []
        pending = ''


def command_problem(words: Sequence[str], root: Path = ROOT) -> str | None:
    """Why this command would not run, or None."""
    missing = [w for w in words if re.match(r'(configs|tools)/', w) and not (root / w).exists()]
    if missing:
        return f'there is no {missing[0]}'
    program, *arguments = words
    if program == 'make':
        return _make_problem(arguments, root)
    if program == 'fqvit':
        return _fqvit_problem(arguments, root)
    if program == 'nox':
        return _nox_problem(arguments, root)
    if program == 'mim':
        return _mim_problem(arguments, root)
    if Path(program).name in ('python', 'python3'):
        return _python_problem(arguments, root)
    return None if program in _FOREIGN else f'cannot check {program!r}: teach tools/_docs_check.py about it'


def _make_problem(arguments: Sequence[str], root: Path) -> str | None:
    targets = set(re.findall(r'^([a-z][\w-]*):', (root / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE))
    unknown = [word for word in arguments if '=' not in word and word not in targets]
    return f'make has no target {unknown[0]}' if unknown else None


def _fqvit_problem(arguments: Sequence[str], root: Path) -> str | None:
    """``fqvit COMMAND``: what the tool of that name takes."""
    import fqvit_cli

    name, *rest = arguments or ['']
    if name in fqvit_cli.BUILT_IN or name.startswith('-'):
        return None
    try:
        tool = fqvit_cli.choose(name, list(fqvit_cli.tools(root / 'tools')), 'command')
    except fqvit_cli.UsageError as error:
        return str(error)
    return _python_problem([f'tools/{tool}.py', *rest], root)


def _nox_problem(arguments: Sequence[str], root: Path) -> str | None:
    """``nox -l``, or ``nox -s`` with one of the sessions that the noxfile makes of its environments."""
    options = list(arguments)
    ours = options[: options.index('--')] if '--' in options else options
    nox = argparse.ArgumentParser(prog='nox', add_help=False, allow_abbrev=False)
    nox.add_argument('-l', '--list', action='store_true')
    nox.add_argument('-s', '--sessions', nargs='+', default=[])
    nox.add_argument('-R', action='store_true')
    nox.add_argument('--install-only', action='store_true')
    nox.add_argument('--envdir')
    args, problem = _parse(nox.parse_args, ours)
    if problem is not None:
        return problem
    known = nox_sessions(root / 'noxfile.py')
    unknown = [name for name in args.sessions if name not in known]
    return f'nox has no session {unknown[0]}; there are {", ".join(known)}' if unknown else None


def nox_sessions(noxfile: Path) -> list[str]:
    """The sessions of the noxfile, read without nox, which need not be installed: ``tests(NAME)`` for every
    environment, and each function that is a session by itself.
    """
    tree = ast.parse(noxfile.read_text(encoding='utf-8'))
    alone = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name != 'tests' and 'nox.session' in _decorators(node)
    ]
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'ENVIRONMENTS':
            return [*(f'tests({name})' for name in ast.literal_eval(node.value)), *alone]
    raise ValueError(f'{noxfile} has no ENVIRONMENTS')


def _decorators(function: ast.FunctionDef) -> list[str]:
    return [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list]


def _python_problem(arguments: Sequence[str], root: Path) -> str | None:
    script = Path(arguments[0])
    if script.parts[0] != 'tools':
        return None if list(arguments[:2]) == ['-m', 'pip'] else f'cannot check python {arguments[0]}'
    tool = _import_file(root / script)
    parse = tool._parser().parse_args if hasattr(tool, '_parser') else tool.parse_args
    args, problem = _parse(parse, arguments[1:])
    if problem is None and 'config' in vars(args) and (root / args.config).is_file():
        return config_problem(root / args.config, args.cfg_options)
    return problem


def _mim_problem(arguments: Sequence[str], root: Path) -> str | None:
    """``mim test`` and ``mim train``: mim's own options, then those of the package's script.

    MMSegmentation and MMDetection are no dependencies of ours: without them, mim's part is checked.
    """
    if list(arguments[:2]) == ['run', 'fqvit_plugin']:
        return _fqvit_problem(arguments[2:], root)
    mim = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    mim.add_argument('verb', choices=('test', 'train'))
    mim.add_argument('package', choices=tuple(_MIM))
    mim.add_argument('config')
    for short, name in (('-C', '--checkpoint'), ('-l', '--launcher'), ('-G', '--gpus'), ('-g', '--gpus-per-node')):
        mim.add_argument(short, name)
    parsed, problem = _parse(mim.parse_known_args, arguments)
    if problem is not None:
        return problem
    known, rest = parsed
    if known.verb == 'test' and known.checkpoint is None:
        return 'mim test needs --checkpoint'
    package = _MIM[known.package]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return f'{package} is not installed' if package == 'mmpretrain' else None
    try:
        script = _import_file(Path(spec.origin).parent / '.mim' / 'tools' / f'{known.verb}.py')
    except (ImportError, AssertionError):  # it refuses the installed mmcv, or lacks its compiled ops
        if package == 'mmpretrain':
            raise
        return None
    positional = [known.config, known.checkpoint] if known.verb == 'test' else [known.config]
    with mock.patch.object(sys, 'argv', [known.verb, *positional, *rest]), mock.patch.dict(os.environ):
        args, problem = _parse(lambda _: script.parse_args(), ())
    if problem is None and (root / known.config).is_file():
        return config_problem(root / known.config, args.cfg_options)
    return problem


def _parse(parse: Any, arguments: Sequence[str]) -> tuple[Any, str | None]:
    """What argparse makes of ``arguments``, or the last line it says about them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parse(list(arguments)), None
    except SystemExit:
        return None, said.getvalue().strip().splitlines()[-1]


def config_problem(path: Path, options: dict[str, Any] | None) -> str | None:
    """Why a config cannot be read, or its quant_scheme or QuantHook not be built; None if they can."""
    from fqvit_plugin.presets import parse_scheme
    from fqvit_plugin.registry import HOOKS

    base = path.parent.name  # configs/mmseg and configs/mmdet inherit from packages that need not be here
    if base in _MIM.values() and importlib.util.find_spec(base) is None:
        return None
    try:
        cfg = copy.deepcopy(_read_config(path.resolve()))
        cfg.merge_from_dict(options or {})
        if cfg.get('quant_scheme') is not None:
            parse_scheme(cfg.quant_scheme)
        for hook in cfg.get('custom_hooks', []):
            if getattr(hook['type'], '__name__', hook['type']).endswith('QuantHook'):
                HOOKS.build(dict(hook))
    except Exception as error:  # a config is a program: anything can go wrong in it
        return f'{path.name}: {error}'
    return None


@cache
def _read_config(path: Path) -> Any:
    from mmengine.config import Config

    return Config.fromfile(path)


@cache
def _import_file(path: Path) -> Any:
    """The module in this file, with its neighbours importable."""
    name = f'docs_check_{path.stem}'
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f'{path} is no Python file')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    with mock.patch.object(sys, 'path', [str(path.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None) -> int:
    """Check the documents; 1 and one line per finding when something does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument(
        'files', nargs='*', type=Path, metavar='FILE', help='default: README.md, CHANGELOG.md and all of docs/'
    )
    args = parser.parse_args(argv)
    if str(ROOT) not in sys.path:  # also without an installation
        sys.path.insert(0, str(ROOT))
    files = args.files or [ROOT / 'README.md', ROOT / 'CHANGELOG.md', *sorted((ROOT / 'docs').rglob('*.md'))]
    checker = Checker()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # other packages' deprecations are not the documents' concern
        for path in files:
            checker.check(path.resolve())
    counted = ', '.join(f'{count} {kind}' for kind, count in checker.counts.items())
    print(*checker.findings, f'docs-check: {len(files)} documents, {counted}', sep='\n')
    return 1 if checker.findings else 0


if __name__ == '__main__':
    sys.exit(main())
