"""The command line as users type it: ``mim test mmpretrain CONFIG --checkpoint X``, here and in another project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from PIL import Image

from .projects import project, write_images

ROOT = Path(__file__).resolve().parents[1]
SWIN_T = ROOT / 'configs' / 'fqvit_swin_t_w8a8.py'


def mim_test(config, checkpoint, cwd, *options):
    """Run the command in ``cwd``; gives its output."""
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'PYTHONPATH': str(ROOT)}
    mim = [sys.executable, '-m', 'mim', 'test', 'mmpretrain', str(config), '--checkpoint', str(checkpoint)]
    command = [*mim, '--work-dir', str(cwd / 'work'), '--cfg-options', 'log_level=INFO', *options]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def imagenet_like(tmp_path_factory):
    """ImageNet's layout: a thousand class folders, one small photograph in each of training's, three in val's."""
    root = tmp_path_factory.mktemp('imagenet')
    rng = np.random.default_rng(0)
    for c in range(1000):
        for split, count in (('train', 1), ('val', int(c < 3))):
            folder = root / split / f'n{c:08d}'
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(folder / f'{i}.jpg')
    return root


@pytest.mark.slow
def test_swin_t_config_on_image_folders(imagenet_like, tmp_path):
    cfg = Config.fromfile(SWIN_T)
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict(), 'meta': {}}, tmp_path / 'random.pth')
    options = [f'{k}_dataloader.dataset.data_root={imagenet_like}' for k in ('calib', 'test')]
    options += [f'{k}_dataloader.num_workers=0' for k in ('calib', 'test')]
    options += ['calib_dataloader.batch_size=2', 'test_dataloader.persistent_workers=False']
    first = mim_test(SWIN_T, tmp_path / 'random.pth', tmp_path, *options)
    assert 'calibrated on 20 images in 10 batches' in first
    assert 'scheme fqvit_w8a8, preset strict' in first
    accuracy = re.findall(r'accuracy/top1: ([\d.]+)\s+accuracy/top5: ([\d.]+)', first)
    assert accuracy
    again = mim_test(SWIN_T, tmp_path / 'work' / 'calibrated.pth', tmp_path, *options)
    assert 'calibration is skipped' in again
    assert 'calibrated on' not in again
    assert re.findall(r'accuracy/top1: ([\d.]+)\s+accuracy/top5: ([\d.]+)', again) == accuracy


def test_another_project_inherits_its_own_config_and_our_base(tmp_path):
    """The project lies outside the repository and knows the package by name only."""
    images = write_images(tmp_path / 'images', {'train': 3, 'val': 1})
    mine = project(images, tmp_path, 'swin')
    for key in ('calib_dataloader', 'quant_scheme', 'custom_hooks', 'work_dir'):
        mine.pop(key)
    mine.dump(tmp_path / 'mine.py')
    (tmp_path / 'mine_quantized.py').write_text(
        f"_base_ = ['./mine.py', {str(ROOT / 'configs' / '_base_' / 'fqvit.py')!r}]\n"
        'calib_dataloader = dict(batch_size=3, num_workers=0,\n'
        f"    dataset=dict(_delete_=True, type='CustomDataset', data_root={str(images / 'train')!r}))\n"
    )
    torch.manual_seed(0)
    init_default_scope('mmpretrain')
    torch.save({'state_dict': MODELS.build(mine.model).state_dict(), 'meta': {}}, tmp_path / 'random.pth')
    output = mim_test('mine_quantized.py', 'random.pth', tmp_path)
    assert 'calibrated on 9 images in 3 batches' in output
    assert 'accuracy/top1' in output
