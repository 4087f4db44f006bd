"""tools/_docs_check.py against planted mistakes, each written by hand, and against our own documents."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import _docs_check
import pytest
from _docs_check import ROOT, Checker, command_problem, split_commands

import fqvit_plugin as fq

from . import models, zoo

CONFIG = 'configs/digits/digits_vit.py'
CALIBRATE = 'python tools/calibrate.py c.py x.pth'
MIM = f'mim test mmpretrain {CONFIG}'
BASE = f"_base_ = './{CONFIG}'"


@pytest.fixture
def findings(tmp_path):
    """What the checker says about a document with this text, looking things up in the real repository."""

    def check(text: str) -> list[str]:
        path = tmp_path / 'page.md'
        path.write_text(text, encoding='utf-8')
        checker = Checker(ROOT)
        checker.check(path)
        return checker.findings

    return check


def fence(language: str, *lines: str) -> str:
    return '\n'.join([f'```{language}', *lines, '```', ''])


@pytest.mark.slow
def test_our_documents_hold():
    run = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / '_docs_check.py')],
        capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    count = 2 + sum(1 for _ in (ROOT / 'docs').rglob('*.md'))  # and README.md, CHANGELOG.md
    assert f'docs-check: {count} documents' in run.stdout


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('[a](nowhere.md)', 'broken link nowhere.md'),
        ('# Here\n\n[a](#there)', 'broken link #there: no such heading'),
        ('[a](page.md#elsewhere)', 'no such heading'),
        ('see `tools/nothing.py`', 'there is no tools/nothing.py'),
        ('see `configs/none_*.py`', 'there is no configs/none_*.py'),
        ('say `make coffee`', 'make has no target coffee'),
        (fence('bash', 'make teest'), 'make has no target teest'),
        (fence('bash', f'{CALIBRATE} --outt q.pth'), 'required: --out'),
        (fence('bash', f'{CALIBRATE} --out q.pth --quick'), 'unrecognized arguments: --quick'),
        (fence('bash', f'{CALIBRATE} --out q --preset fast'), "invalid choice: 'fast'"),
        (fence('bash', 'python tools/gone.py'), 'there is no tools/gone.py'),
        (fence('bash', MIM), 'mim test needs --checkpoint'),
        (fence('bash', 'mim test mmpretrain configs/gone.py -C x.pth'), 'there is no configs/gone.py'),
        (
            fence('bash', 'mim test mmsegmentation configs/mmseg/gone.py -C x.pth'),
            'there is no configs/mmseg/gone.py',
        ),
        (fence('bash', 'mim test mmdet CONFIG'), 'mim test needs --checkpoint'),
        (fence('bash', 'mim test mmyolo CONFIG -C x.pth'), "invalid choice: 'mmyolo'"),
        (fence('bash', f'{MIM} -C x.pth --ampp'), 'unrecognized arguments: --ampp'),
        (
            fence('bash', f'{MIM} -C x \\', '  --cfg-options quant_scheme=fqvit'),
            "unknown scheme 'fqvit'",
        ),
        (fence('bash', 'fqvit calibate c.py x.pth'), "no command 'calibate'; did you mean calibrate"),
        (fence('bash', 'fqvit calibrate c.py x.pth --out q.pth --quick'), 'unrecognized arguments: --quick'),
        (fence('bash', 'mim run fqvit_plugin calibrate c.py x.pth'), 'required: --out'),
        ('say `nox -s "tests(oldst)"`', 'nox has no session tests(oldst)'),
        (fence('bash', 'nox --sesions x'), 'unrecognized arguments: --sesions'),
        (fence('bash', 'curl -O file'), "cannot check 'curl'"),
        (fence('python', 'a = 1', '', '1 / 0'), 'line 3 of the example: ZeroDivisionError'),
        (fence('python', 'a = ('), 'SyntaxError'),
        (fence('python', "_base_ = './configs/none.py'"), 'snippet.py'),
        (
            fence('python', BASE, "custom_hooks = [dict(type='fqvit_plugin.QuantHook', sheme='x')]"),
            'sheme',
        ),
        ('<!-- docs-check: skip: -->\n' + fence('python', '1 / 0'), 'a skipped block needs a reason'),
        ('A reason elsewhere.\n\n<!-- docs-check: skip -->\n' + fence('bash', 'make coffee'), 'needs a reason'),
    ],
)
def test_a_planted_mistake_is_found(findings, text, said):
    found = findings(text)
    assert len(found) == 1, found
    assert said in found[0]


@pytest.mark.parametrize(
    'text',
    [
        '[web](https://example.org/x) and [heading](#a-heading-in-code)\n\n## A heading, in `code`',
        f'`{CONFIG}`, `configs/digits/*.py`, `8/8/4`, `work_dirs/any/thing.pth`, `models/elsewhere` and `mim test`',
        '<!-- docs-check: skip: needs a machine with a printer -->\n' + fence('python', '1 / 0'),
        'see `nox -l`' + '\n\n' + fence('bash', 'nox -s "tests(oldest)" mm_projects -- -m "" --any'),
        fence('text', 'make coffee') + fence('', 'python tools/none.py'),
        fence('bash', '# make coffee', 'OMP_NUM_THREADS=1 make test ARGS="-k x" && cd .. | pip install -e .'),
        fence('bash', f'{MIM} --checkpoint X --tta --gpus 2 --cfg-options train_cfg.max_epochs=1'),
        fence('python', BASE, "custom_hooks = [dict(type='fqvit_plugin.QuantHook', scheme='fqvit_w8a8')]"),
        fence('bash', 'fqvit doctor', 'fqvit convert a.pth b.pth', 'mim run fqvit_plugin calibrate c x --out q'),
        '- in a list\n\n  ' + fence('python', '  value = 1').replace('\n```', '\n  ```'),
    ],
)
def test_what_is_right_passes(findings, text):
    assert findings(text) == []


def test_blocks_of_one_document_share_names_and_files_and_leave_none(findings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = fence('python', 'from pathlib import Path', "Path('left.txt').write_text('x')", 'value = 2')
    second = fence('python', 'assert value == 2', "assert Path('left.txt').read_text() == 'x'")
    assert findings(first + 'and then\n' + second) == []
    assert 'FileNotFoundError' in findings(fence('python', "open('left.txt')"))[0]
    assert Path.cwd() == tmp_path
    assert not (tmp_path / 'left.txt').exists()


def test_a_finding_names_file_and_line(findings):
    (found,) = findings('# Page\n\n' + fence('bash', 'make test', 'make coffee'))
    assert found.endswith('page.md:5: make has no target coffee')


def test_an_open_fence_is_an_error(findings):
    with pytest.raises(ValueError, match=r'page\.md:3: this block is never closed'):
        findings('# Page\n\n```bash\nmake test\n')


def test_continued_and_joined_commands():
    text = 'A=1 B=2 python x.py \\\n  --flag "two words"  # why\n\nmake a && make b'
    assert list(split_commands(text)) == [
        (0, ['python', 'x.py', '--flag', 'two words']),
        (3, ['make', 'a']),
        (3, ['make', 'b']),
    ]


def test_python_is_checked_for_tools_only():
    assert command_problem(['python', 'elsewhere.py']) == 'cannot check python elsewhere.py'
    assert command_problem(['.venv/bin/python', 'tools/demo.py', '--model', 'vit']) is None
    assert 'invalid choice' in str(command_problem(['python', 'tools/demo.py', '--model', 'cnn']))


def test_the_tool_exits_with_one(tmp_path, capsys, monkeypatch):
    page = tmp_path / 'page.md'
    page.write_text('[a](nowhere.md)', encoding='utf-8')
    assert _docs_check.main([str(page)]) == 1
    assert 'broken link nowhere.md' in capsys.readouterr().out
    page.write_text('nothing', encoding='utf-8')
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p != str(ROOT)])
    assert _docs_check.main([str(page)]) == 0


def _documented(section: str) -> set[str]:
    """The quantizers that a table of docs/how_it_works.md names, with # for the numbers of blocks."""
    text = (ROOT / 'docs' / 'how_it_works.md').read_text(encoding='utf-8')
    text = text.split(f'\n## {section}\n')[1].split('\n## ')[0]
    cells = [row.split('|')[2] for row in text.splitlines() if row.startswith('|')]
    return {re.sub(r'\{\w\}', '#', name) for cell in cells for name in re.findall(r'`([^`]+)`', cell)}


@pytest.mark.parametrize(
    ('section', 'model'),
    [
        ('ViT', models.vit_backbone(out_type='avg_featmap', pre_norm=True, layer_cfgs=dict(ffn_type='swiglu_fused'))),
        ('Swin', models.swin_backbone(use_abs_pos_embed=True)),
        ('BEiT', dict(zoo.BEIT, use_abs_pos_emb=True, final_norm=True)),
        ('EVA-02', dict(zoo.EVA02, out_type='avg_featmap', sub_ln=True)),
        (
            'Swin V2',
            dict(zoo.SWINV2, use_abs_pos_embed=True, arch=dict(zoo.SWINV2_ARCH, extra_norm_every_n_blocks=2)),
        ),
        ('Twins', zoo.SVT),
        ('MViT', dict(zoo.MVIT, use_abs_pos_embed=True)),
        ('DaViT', zoo.DAVIT),
    ],
)
def test_tables_name_every_quantizer_of_the_backbone(section, model):
    backbone = models.build(model)
    fq.quantize_model_(backbone, fq.get_scheme('fqvit_w8a8'))
    acts = (name for name, module in backbone.named_modules() if isinstance(module, (fq.QAct, fq.QIntSoftmax)))
    found = {re.sub(r'(?<=\.)\d+(?=\.)|((?<=^norm)|(?<=^norm_after_stage))\d(?=\.)', '#', name) for name in acts}
    elsewhere = {'neck.out_act', 'head.fc.out_act', 'rel_pos_bias.bias_table_act'}  # below the classifier; or shared
    assert found == _documented(f'Where each quantizer sits: {section}') - elsewhere
