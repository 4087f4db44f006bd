"""The documentation's site: strict, complete, and without anything fetched from elsewhere.

Oracle: the files of docs/, the package's public modules, and links written by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip('mkdocs', reason='the extra docs brings it')

import _mkdocs
from _mkdocs import ROOT, modules, site_links, unnamed


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    env = {**os.environ, 'NO_MKDOCS_2_WARNING': '1'}
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', str(folder)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'WARNING' not in run.stdout + run.stderr
    return folder


def test_every_document_and_public_module_has_a_page(site):
    pages = {path.relative_to(site).with_suffix('').as_posix() for path in site.rglob('*.html')}
    documents = {path.relative_to(ROOT / 'docs').with_suffix('').as_posix() for path in (ROOT / 'docs').rglob('*.md')}
    assert documents | {'index', 'changelog'} <= pages
    assert {f'api/{name}' for name in modules()} <= pages
    assert not [page for page in pages if page.startswith('api/') and '._' in page]


def test_navigation_reaches_every_page(site):
    home = (site / 'index.html').read_text(encoding='utf-8')
    linked = set(re.findall(r'href="([^"#:]+\.html)"', home))
    pages = {path.relative_to(site).as_posix() for path in site.rglob('*.html')} - {'404.html', 'index.html'}
    assert pages <= linked


def test_docstrings_are_rendered(site):
    page = (site / 'api' / 'fqvit_plugin.surgery.html').read_text(encoding='utf-8')
    assert 'id="fqvit_plugin.surgery.quantize_model_"' in page
    assert 'Swap the blocks of a classifier' in page
    assert '_quantize_head_' not in page
    assert not re.search(r':(func|class|meth|mod):<code>', page)


def test_nothing_is_fetched_when_a_page_is_viewed(site):
    fetched = re.compile(r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//|<link[^>]*rel="(?:stylesheet|preconnect)"'
                         r'[^>]*href="(?:https?:)?//')  # fmt: skip
    pages = list(site.rglob('*.html'))
    assert len(pages) > 30
    assert [page.name for page in pages if fetched.search(page.read_text(encoding='utf-8'))] == []
    styles = list(site.rglob('*.css'))
    assert styles
    assert [p.name for p in styles if re.search(r'url\(["\']?(https?:)?//', p.read_text(encoding='utf-8'))] == []


@pytest.mark.parametrize(
    ('source', 'text', 'expected'),
    [
        ('README.md', '[a](docs/configs.md#x)', '[a](configs.md#x)'),
        ('README.md', '[a](docs/tutorials/new_backbone.md)', '[a](tutorials/new_backbone.md)'),
        ('README.md', '[log](CHANGELOG.md)', '[log](changelog.md)'),
        ('README.md', 'see [licence](LICENSE).', 'see licence.'),
        ('docs/configs.md', '[a](numerics.md)', '[a](numerics.md)'),
        ('docs/configs.md', '[home](../README.md)', '[home](index.md)'),
        ('docs/tutorials/new_backbone.md', '[a](../configs.md)', '[a](../configs.md)'),
        ('docs/tutorials/new_backbone.md', '[home](../../README.md#x)', '[home](../index.md#x)'),
        ('docs/configs.md', '[tool](../tools/demo.py)', 'tool'),
        ('docs/configs.md', '[web](https://example.org/x) [here](#x)', '[web](https://example.org/x) [here](#x)'),
    ],
)
def test_links(source, text, expected):
    assert site_links(text, ROOT / source) == expected


def test_documents_nobody_named_are_found(tmp_path):
    (tmp_path / 'tutorials').mkdir()
    for name in ('old.md', 'new.md', 'tutorials/newer.md'):
        (tmp_path / name).touch()
    assert unnamed([{'Guides': [{'Old': 'old.md'}]}], tmp_path) == ['new.md', 'tutorials/newer.md']


def test_private_modules_and_configs_are_left_out(tmp_path):
    package = tmp_path / 'p'
    for name in ('__init__.py', 'a.py', '_b.py', 'sub/__init__.py', 'sub/c.py', 'configs/x.py', '.mim/tools/d.py'):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert list(modules(package)) == ['p', 'p.a', 'p.sub.c']


def test_roles_of_sphinx_become_code():
    html = 'see :func:<code>~fqvit_plugin.scheme.get_scheme</code> and <code>:x:</code>'
    assert _mkdocs.on_page_content(html) == 'see <code>get_scheme</code> and <code>:x:</code>'
