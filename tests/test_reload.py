"""A calibrated checkpoint in a new process, without data. Oracle: the logits of the process that calibrated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fqvit_plugin as fq
from fqvit_plugin.checkpoint import _FORMAT, save_calibrated

from .projects import build, project

ROOT = Path(__file__).resolve().parents[1]
RELOAD = """
import sys, torch
from pathlib import Path
import fqvit_plugin as fq
from tests.projects import build, project
kind, checkpoint, images, out = sys.argv[1:]
model = build(project(Path(), Path(), kind))
report = fq.load_quantized_(model, checkpoint)
with torch.no_grad():
    torch.save(model(torch.load(images), mode='tensor'), out)
print(report)
"""


@pytest.mark.parametrize(('kind', 'preset'), [('vit', 'strict'), ('swin', 'reference')])
def test_equal_logits_in_a_new_process(tmp_path, kind, preset):
    torch.manual_seed(1)
    images = torch.randn(4, 3, 32, 32)
    model = build(project(tmp_path, tmp_path, kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # other weights than the new process starts from
    scheme = fq.get_scheme('fqvit_w8a8_attn4', preset=preset)
    fq.quantize_model_(model, scheme)
    fq.calibrate_(model, images.split(2), lambda m, x: m(x, mode='tensor'))
    fq.quant(model)
    with torch.no_grad():
        expected = model(images, mode='tensor')
    save_calibrated(tmp_path / 'q.pth', model, scheme)
    torch.save(images, tmp_path / 'images.pt')
    arguments = [kind, *(str(tmp_path / name) for name in ('q.pth', 'images.pt', 'logits.pt'))]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore'}
    command = [sys.executable, '-c', RELOAD, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / 'logits.pt'), expected)
    assert scheme.name in done.stdout


def test_a_float_checkpoint_is_refused(tmp_path):
    model = build(project(tmp_path, tmp_path))
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, tmp_path / 'float.pth')
    with pytest.raises(ValueError, match='no calibrated checkpoint'):
        fq.load_quantized_(model, tmp_path / 'float.pth')


def test_another_model_is_refused(tmp_path):
    model = build(project(tmp_path, tmp_path))
    scheme = fq.get_scheme('fqvit_w8a8')
    fq.quantize_model_(model, scheme)
    fq.calibrate_(model, [torch.randn(1, 3, 32, 32)], lambda m, x: m(x, mode='tensor'))
    save_calibrated(tmp_path / 'q.pth', model, scheme)
    with pytest.raises(ValueError, match='lacks'):
        fq.load_quantized_(build(project(tmp_path, tmp_path, 'swin')), tmp_path / 'q.pth')
    state = torch.load(tmp_path / 'q.pth', weights_only=True)
    for version in (5, 99):  # 5: before streams had escapes
        state['meta']['fqvit']['format'] = version
        torch.save(state, tmp_path / 'other.pth')
        with pytest.raises(ValueError, match=f'format {version}; this version reads {_FORMAT}: calibrate again'):
            fq.load_quantized_(build(project(tmp_path, tmp_path)), tmp_path / 'other.pth')
