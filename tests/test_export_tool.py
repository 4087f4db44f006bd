"""tools/export.py: from a calibrated checkpoint to an integer file. Oracle: the simulated model, and the disk."""

from __future__ import annotations

import json

import calibrate
import export
import pytest
import torch
from mmpretrain.registry import MODELS
from safetensors import safe_open

import fqvit_plugin as fq
from fqvit_plugin.integer.checkpoint import load_integer

from .models import images
from .projects import float_checkpoint, project, write_images


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp('export')
    cfg = project(write_images(root / 'images', {'train': 4, 'val': 1}), root / 'work', 'swin')
    cfg.model.backbone.out_indices = (1,)
    float_checkpoint(cfg, root / 'float.pth')
    cfg.dump(root / 'config.py')
    config, calibrated = str(root / 'config.py'), str(root / 'q.pth')
    assert calibrate.main([config, str(root / 'float.pth'), '--out', calibrated, '--batches', '2']) == 0
    return cfg, config, calibrated


def test_the_file_answers_like_the_simulation(job, tmp_path, capsys):
    cfg, config, calibrated = job
    out = tmp_path / 'int.safetensors'
    assert export.main([config, calibrated, '--format', 'int', '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    assert f'{out.stat().st_size / 1e6:.2f} MB' in printed
    model = MODELS.build(cfg.model)
    fq.load_quantized_(model, calibrated)
    x = images(6)
    with torch.no_grad():
        assert torch.equal(load_integer(out)(x).argmax(1), model(x).argmax(1))
    with safe_open(out, 'pt') as file:
        assert json.loads(file.metadata()['preprocessor'])['mean'] == cfg.data_preprocessor.mean


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(config='nowhere.py'), 'there is no config nowhere.py'),
        (dict(calibrated='nowhere.pth'), 'nowhere.pth'),
        (dict(out='missing/folder/int.safetensors'), 'there is no folder'),
        (dict(out='exists'), 'add --force'),
    ],
)
def test_mistakes_are_one_line(job, tmp_path, capsys, change, message):
    _, config, calibrated = job
    (tmp_path / 'exists').write_text('mine')
    out = tmp_path / change.get('out', 'int.safetensors')
    arguments = [change.get('config', config), change.get('calibrated', calibrated), '--out', str(out)]
    assert export.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / 'exists').read_text() == 'mine'
