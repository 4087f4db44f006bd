"""C++ that is compiled on first use. Oracles: the compiler's own words, and the files of the cache."""

from __future__ import annotations

import shutil

import pytest

from fqvit_plugin import compiled, fused


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv('FQVIT_NATIVE_CACHE', str(tmp_path))
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.raises(RuntimeError, match=r'needs a C\+\+ compiler.*apt install'):
        compiled._build(fused.SOURCE, '-O2')


def test_what_does_not_compile_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv('FQVIT_NATIVE_CACHE', str(tmp_path))
    with pytest.raises(RuntimeError, match=r'did not compile: .*no-such-flag'):
        compiled._build(fused.SOURCE, '--no-such-flag')
    assert list(tmp_path.iterdir()) == []


def test_a_build_is_kept_and_used_again(monkeypatch, tmp_path):
    monkeypatch.setenv('FQVIT_NATIVE_CACHE', str(tmp_path))
    path = compiled._build(fused.SOURCE, '-O0')
    assert [path] == list(tmp_path.iterdir())
    changed = path.stat().st_mtime_ns
    assert compiled._build(fused.SOURCE, '-O0') == path
    assert path.stat().st_mtime_ns == changed
