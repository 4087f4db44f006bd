"""What mkdocs calls while it builds the site: pages that are made, and links that lead out of docs/."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'fqvit_plugin'
#: Documents of the repository's root -> their pages.
ROOT_PAGES = {'README.md': 'index.md', 'CHANGELOG.md': 'changelog.md'}
_LINK = re.compile(r'(?P<text>\[[^\]\[]*\])\((?P<path>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)')
#: Sphinx's roles in docstrings, as Markdown has rendered them.
_ROLE = re.compile(r':(?:func|class|meth|mod|data|attr):<code>~?(?:[\w.]+\.)?(\w+)</code>')


def modules(package: Path = PACKAGE) -> Iterator[str]:
    """Dotted names of the public modules, without configs, which are for inheriting."""
    for path in sorted(package.rglob('*.py')):
        parts = path.relative_to(package.parent).with_suffix('').parts
        if parts[-1] == '__init__' and len(parts) > 2:
            continue
        names = parts[:-1] if parts[-1] == '__init__' else parts
        if not any(name.startswith(('_', '.')) for name in names) and 'configs' not in names:
            yield '.'.join(names)


def unnamed(nav: Any, docs: Path) -> list[str]:
    """Documents under ``docs`` that the navigation does not name."""
    named = str(nav)
    found = sorted(path.relative_to(docs).as_posix() for path in docs.rglob('*.md'))
    return [name for name in found if f"'{name}'" not in named]


def on_config(config: Any) -> Any:
    """Complete the navigation: documents nobody named, and the API."""
    for name in unnamed(config.nav, Path(config.docs_dir)):
        section = 'Tutorials' if name.startswith('tutorials/') else 'Guides'
        next(entry[section] for entry in config.nav if section in entry).append(name)
    config.nav.insert(-1, {'API': [{name: f'api/{name}.md'} for name in modules()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    for source, page in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding='utf-8')
        files.append(File.generated(config, page, content=site_links(text, ROOT / source)))
    for name in modules():
        files.append(File.generated(config, f'api/{name}.md', content=f'# {name}\n\n::: {name}\n'))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a document that lead out of docs/."""
    source = page.file.abs_src_path
    return markdown if source is None else site_links(markdown, Path(source))


def on_page_content(html: str, **_: Any) -> str:
    """Names that docstrings mention by a Sphinx role."""
    return _ROLE.sub(r'<code>\1</code>', html)


def site_links(markdown: str, source: Path) -> str:
    """Links as the site needs them: to pages of the root, and none to files the site does not hold."""

    def replace(match: re.Match[str]) -> str:
        target = (source.parent / match['path']).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        name = target.relative_to(ROOT).as_posix()
        page = ROOT_PAGES.get(name, name.removeprefix('docs/') if name.startswith('docs/') else None)
        if page is None:  # code, configs, the licence: there is no public host to link to
            return match['text'][1:-1]
        in_docs = source.is_relative_to(ROOT / 'docs')
        here = source.parent.relative_to(ROOT / 'docs').as_posix() if in_docs else '.'
        return f'{match["text"]}({os.path.relpath(page, here)}{match["anchor"] or ""})'

    return _LINK.sub(replace, markdown)
