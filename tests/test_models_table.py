"""docs/models.md against the code. Oracle: MMPretrain's and the families' own names, and a document planted wrong."""

from __future__ import annotations

import _models_table as models_table
import pytest
from mmpretrain.models import backbones

from fqvit_plugin.surgery import FAMILIES


def test_the_document_has_the_tables_of_the_code():
    assert models_table.main(['--check']) == 0


def test_every_family_says_what_it_covers():
    for family in FAMILIES:
        assert family.covers, f'the family of {family.models[0]} has no covers='


def test_the_tables_name_every_backbone_of_mmpretrain_once():
    rows = [row for row in models_table.covered_table().splitlines() if '| mmpretrain |' in row]
    tables = '\n'.join(row.split('|')[1] for row in rows) + models_table.refused_table()
    for name in backbones.__all__:
        assert tables.count(f'`{name}`') == 1, name


def test_a_stale_document_is_found_and_written(tmp_path, capsys):
    page = tmp_path / 'models.md'
    marks = ''.join(f'<!-- table: {name} -->\nstale rows\n<!-- end: {name} -->\n' for name in models_table.TABLES)
    page.write_text(f'before\n{marks}after\n', encoding='utf-8')
    assert models_table.main(['--check', '--document', str(page)]) == 1
    assert 'run python tools/_models_table.py --write' in capsys.readouterr().out
    assert models_table.main(['--document', str(page)]) == 0
    printed = capsys.readouterr().out
    assert 'stale rows' in page.read_text(encoding='utf-8')
    assert models_table.main(['--write', '--document', str(page)]) == 0
    written = page.read_text(encoding='utf-8')
    assert printed == written + '\n'
    assert 'stale rows' not in written
    assert '`BEiTViT`' in written
    assert written.startswith('before\n')
    assert written.endswith('after\n')
    assert models_table.main(['--check', '--document', str(page)]) == 0


def test_a_document_without_marks_is_refused():
    with pytest.raises(ValueError, match='lacks <!-- table: covered -->'):
        models_table.with_tables('nothing')
