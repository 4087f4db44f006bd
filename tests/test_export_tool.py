"""tools/export.py: from a calibrated checkpoint to a file. Oracles: the simulated and the integer model, the disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import calibrate
import export
import pytest
import torch
from mmpretrain.registry import DATASETS, MODELS
from safetensors import safe_open

import fqvit_plugin as fq
from fqvit_plugin.export.proof import session
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


@pytest.fixture(scope='module')
def onnx_package():
    pytest.importorskip('onnxruntime', reason='the extra export brings it')
    return pytest.importorskip('onnx', reason='the extra export brings it')


def top1_of(printed, engine):
    return float(re.search(rf'{re.escape(engine)}:? ([\d.]+)%', printed)[1])


@pytest.mark.parametrize('form', ['integer', 'qdq'])
def test_onnx_from_the_calibrated_checkpoint_reports_top1(job, onnx_package, tmp_path, capsys, form):
    cfg, config, calibrated = job
    out, photos = tmp_path / 'm.onnx', Path(cfg.test_dataloader.dataset.data_root)
    arguments = [config, calibrated, '--format', 'onnx', '--form', form, '--out', str(out), '--images', str(photos)]
    assert export.main([*arguments, '--batch-size', '2']) == 0
    printed = capsys.readouterr().out
    assert f'{out.stat().st_size / 1e6:.2f} MB, form {form} for onnxruntime' in printed
    # the same photographs through MMPretrain's own dataset and the simulated model
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))
    fq.load_quantized_(model, calibrated)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    batch = model.data_preprocessor({'inputs': [dataset[i]['inputs'] for i in range(len(dataset))]})
    with torch.no_grad():
        right = model(batch['inputs']).argmax(1) == torch.tensor(dataset.get_gt_labels())
    assert f'top-1 of {len(dataset)} images' in printed
    expected = 100 * right.float().mean().item()
    assert top1_of(printed, 'integer model') == pytest.approx(expected, abs=0.01)
    assert top1_of(printed, 'onnxruntime, optimization on') == pytest.approx(expected, abs=0.01)
    meta = {p.key: p.value for p in onnx_package.load(out).metadata_props}
    assert json.loads(meta['preprocessor'])['mean'] == cfg.data_preprocessor.mean


def test_onnx_from_the_integer_checkpoint_alone(job, onnx_package, tmp_path, capsys):
    _, config, calibrated = job
    middle, out = tmp_path / 'int.safetensors', tmp_path / 'm.onnx'
    assert export.main([config, calibrated, '--out', str(middle)]) == 0
    assert export.main([config, str(middle), '--format', 'onnx', '--form', 'integer', '--out', str(out)]) == 0
    x = images(3)
    (logits,) = session(out, optimized=False).run(None, {'image': x.numpy()})
    assert torch.equal(torch.from_numpy(logits), load_integer(middle)(x))
    assert export.main([config, str(middle), '--image-size', '32', '32', '--out', str(tmp_path / 'other')]) == 2
    assert 'was made for one size' in capsys.readouterr().err


def test_openvino_is_reported_beside_onnxruntime(job, onnx_package, tmp_path, capsys):
    pytest.importorskip('openvino', reason='the extra export brings it')
    cfg, config, calibrated = job
    flat = tmp_path / 'flat'
    flat.mkdir()
    for file in Path(cfg.test_dataloader.dataset.data_root).rglob('*.png'):
        shutil.copy(file, flat / f'{file.parent.name.removeprefix("class")}_{file.name}')
    arguments = ['--format', 'onnx', '--target', 'openvino', '--out', str(tmp_path / 'm.onnx'), '--images', str(flat)]
    assert export.main([config, calibrated, *arguments]) == 0
    printed = capsys.readouterr().out
    assert top1_of(printed, 'openvino') == top1_of(printed, 'integer model')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--format', 'onnx', '--form', 'integer', '--target', 'tensorrt'], 'no MatMulInteger'),
        (['--format', 'onnx', '--images', 'nowhere'], 'nowhere was given'),
        (['--images', '.'], '--images wants --format onnx'),
        (['--format', 'onnx', '--images', '{empty}'], 'holds no images'),
        (['--format', 'onnx', '--images', '{named}'], 'cat.png is not named'),
    ],
)
def test_mistakes_with_onnx_are_one_line(job, onnx_package, tmp_path, capsys, arguments, message):
    _, config, calibrated = job
    folders = {'empty': tmp_path / 'empty', 'named': tmp_path / 'named'}
    for folder in folders.values():
        folder.mkdir()
    (folders['named'] / 'cat.png').write_bytes(b'')
    arguments = [a.format(**folders) for a in arguments]
    assert export.main([config, calibrated, *arguments, '--out', str(tmp_path / 'm.onnx')]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
