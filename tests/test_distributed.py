"""Two gloo processes against one. The oracle is the single process on the same images."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .projects import build, float_checkpoint, project, runner, write_images

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name('ddp_worker.py')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), {'train': 7, 'val': 2})


def write_config(cfg, path):
    """``cfg`` as a file for two gloo processes."""
    cfg.launcher = 'pytorch'
    cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    cfg.dump(str(path))
    return str(path)


def run_two_ranks(*configs):
    """Test every config on two processes; gives the finished torchrun."""
    root = str(WORKER.parents[1])
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': root, 'PYTHONWARNINGS': 'ignore'}
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command = [*torchrun, str(WORKER), *configs]
    # mmengine gathers results through files in the current folder
    folder = Path(configs[0]).parent
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def scales(work_dir):
    saved = torch.load(work_dir / 'calibrated.pth', weights_only=True)
    return {k: saved['state_dict'][k] for k in saved['meta']['fqvit']['buffers']}


RECIPES = list(itertools.product(['strict', 'reference'], ['minmax', 'ema', 'percentile', 'omse']))


@pytest.fixture(scope='module')
def runs(images, tmp_path_factory):
    """Work directories of every recipe on one process and on two.

    21 images in batches of 4: five whole ones and a rest, so a round has an empty turn.
    """
    root = tmp_path_factory.mktemp('runs')
    configs = []
    for preset, observer in RECIPES:
        changes = dict(
            quant_scheme__observer=observer,
            quant_scheme__preset=preset,
            calib_dataloader__sampler__shuffle=True,
            custom_hooks__0__num_batches=6,
            load_from=str(root / 'float.pth'),
        )
        one = project(images, root / f'one-{preset}-{observer}', 'swin', **changes)
        if not configs:
            float_checkpoint(one, root / 'float.pth')
        runner(one).test()
        two = project(images, root / f'two-{preset}-{observer}', 'swin', **changes)
        configs.append(write_config(two, root / f'{preset}_{observer}.py'))
    done = run_two_ranks(*configs)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize(('preset', 'observer'), RECIPES)
def test_two_processes_give_the_scales_of_one(runs, preset, observer):
    expected, got = scales(runs / f'one-{preset}-{observer}'), scales(runs / f'two-{preset}-{observer}')
    assert expected.keys() == got.keys()
    assert [k for k in expected if not torch.equal(expected[k], got[k])] == []


def test_an_error_on_one_rank_ends_all_and_names_the_layer(images, tmp_path):
    cfg = project(images, tmp_path)
    state = build(cfg).state_dict()
    state['backbone.layers.1.attn.qkv.weight'][0, 0] = torch.nan
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'nan.pth')
    cfg.load_from = str(tmp_path / 'nan.pth')
    done = run_two_ranks(write_config(cfg, tmp_path / 'cfg.py'))
    assert done.returncode != 0
    assert 'layers.1.attn.qkv_act' in done.stderr
    assert not (tmp_path / 'calibrated.pth').exists()
