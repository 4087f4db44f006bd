"""An integer checkpoint under MMEngine's runner and ``mim test``. Oracle: the executor on the same images."""

from __future__ import annotations

import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path

import calibrate
import export
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS, MODELS
from PIL import Image

import fqvit_plugin as fq
from fqvit_plugin.apis import load_config
from fqvit_plugin.compiled import compiler
from fqvit_plugin.integer import classifier
from fqvit_plugin.integer.checkpoint import load_integer, save_integer
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.integer.program import IntegerModel

from .projects import float_checkpoint, project, runner, write_images
from .test_mim import mim_test

ROOT = Path(__file__).resolve().parents[1]
INTEGER = dict(type='fqvit_plugin.IntegerClassifier')
_names = itertools.count()


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    """A small project, and its float, calibrated and integer checkpoints."""
    root = tmp_path_factory.mktemp('integer')
    cfg = project(write_images(root / 'images', {'train': 4, 'val': 3}), root / 'work', 'vit')
    float_checkpoint(cfg, root / 'float.pth')
    cfg.dump(root / 'float.py')
    float_files = [str(root / 'float.py'), str(root / 'float.pth')]
    assert calibrate.main([*float_files, '--out', str(root / 'q.pth'), '--batches', '2']) == 0
    out = str(root / 'int.safetensors')
    assert export.main([str(root / 'float.py'), str(root / 'q.pth'), '--out', out]) == 0
    return root, cfg


def integer_config(cfg: Config, checkpoint: Path | str | None, **changes) -> Config:
    changed = cfg.copy()
    changed.model, changed.custom_hooks, changed.load_from = dict(INTEGER), [], checkpoint and str(checkpoint)
    changed.experiment_name = f'{cfg.experiment_name}-int{next(_names)}'  # MMEngine wants another for each runner
    changed.merge_from_dict(changes)
    return changed


def executor_logits(integer, cfg):
    """Logits of the test images, read and normalized as the config says, without a runner; and their classes."""
    init_default_scope('mmpretrain')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    preprocessor = MODELS.build(dict(cfg.data_preprocessor, type='ClsDataPreprocessor'))
    batch = preprocessor(pseudo_collate([dataset[i] for i in range(len(dataset))]), False)
    return integer(batch['inputs']), torch.cat([sample.gt_label for sample in batch['data_samples']])


def test_a_runner_tests_it_like_the_executor(job):
    root, cfg = job
    logits, labels = executor_logits(load_integer(root / 'int.safetensors'), cfg)
    running = runner(integer_config(cfg, root / 'int.safetensors'))
    metrics = running.test()
    assert metrics['accuracy/top1'] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert torch.equal(running.model(**_inputs(running, cfg)), logits)


@pytest.mark.parametrize('engine', ['torch', 'native', 'auto'])
def test_every_engine_gives_the_executors_logits(job, engine):
    if engine == 'native' and compiler() is None:
        pytest.skip('no C++ compiler for the native engine')
    root, cfg = job
    running = runner(integer_config(cfg, root / 'int.safetensors', **{'model.engine': engine}))
    assert running.test().keys() == {'accuracy/top1'}
    logits, _ = executor_logits(load_integer(root / 'int.safetensors'), cfg)
    assert torch.equal(running.model(**_inputs(running, cfg)), logits)
    assert isinstance(running.model.executor, IntegerModel) == (engine == 'torch' or compiler() is None)


def test_auto_is_torch_without_a_compiler(monkeypatch):
    def fails(*args):
        raise RuntimeError('no compiler')

    monkeypatch.setattr(classifier, 'library', fails)
    assert classifier._fastest(torch.device('cpu')) == 'torch'


def _inputs(running, cfg):
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    batch = pseudo_collate([dataset[i] for i in range(len(dataset))])
    return running.model.data_preprocessor(batch, False)


@pytest.mark.parametrize('name', ['float.pth', 'q.pth'])
def test_it_refuses_float_and_calibrated_checkpoints(job, name):
    root, cfg = job
    with pytest.raises(ValueError, match=r'takes an integer checkpoint.*tools/export\.py'):
        runner(integer_config(cfg, root / name)).test()


HALF = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner
import fqvit_plugin
cfg = Config.fromfile(sys.argv[1])
cfg.load_from = sys.argv[2]
if sys.argv[3] == 'plain':
    cfg.custom_hooks = []
Runner.from_cfg(cfg).test()
"""


@pytest.mark.slow
@pytest.mark.parametrize('hooks', ['QuantHook', 'plain'])
def test_a_float_config_refuses_it(job, hooks):
    """In a process of its own: as under mim, where no integer model was built before."""
    root, _ = job
    command = [
        sys.executable,
        '-W',
        'ignore',
        '-c',
        HALF,
        str(root / 'float.py'),
        str(root / 'int.safetensors'),
        hooks,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert re.search(r'ValueError: .*int\.safetensors is not a readable checkpoint: it is a safetensors', run.stderr)
    assert 'fqvit_plugin.IntegerClassifier' in run.stderr


def test_a_float_config_refuses_it_in_the_same_process(job):
    root, cfg = job
    MODELS.build(dict(INTEGER, _scope_='mmpretrain'))
    changed = cfg.copy()
    changed.load_from, changed.experiment_name = str(root / 'int.safetensors'), 'float-meets-integer'
    with pytest.raises(ValueError, match=r"lacks .* of the model's parameters"):
        runner(changed).test()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data_preprocessor.mean': [1.0, 2.0, 3.0]}, r'calibrated with mean=\[127.5.*has \[1.0, 2.0, 3.0\]'),
        ({'data_preprocessor.to_rgb': False}, 'calibrated with to_rgb=True'),
        ({'data_preprocessor.mean': None, 'data_preprocessor.std': None}, 'has None'),
        ({'model.engine': 'warp'}, "unknown engine 'warp' of IntegerClassifier; there is: auto, torch, native"),
    ],
)
def test_what_does_not_fit_is_named(job, changes, message):
    root, cfg = job
    with pytest.raises(ValueError, match=message):
        runner(integer_config(cfg, root / 'int.safetensors', **changes)).test()


def test_without_a_checkpoint_and_for_training_it_says_no(job):
    root, cfg = job
    with pytest.raises(ValueError, match='no integer checkpoint is loaded'):
        runner(integer_config(cfg, None)).test()
    with pytest.raises(ValueError, match='cannot be trained'):
        runner(integer_config(cfg, root / 'int.safetensors')).train()
    model = MODELS.build(dict(INTEGER, _scope_='mmpretrain'))
    with pytest.raises(ValueError, match='no features'):
        model.extract_feat(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="unknown mode 'tensors'"):
        model(torch.zeros(1, 3, 32, 32), mode='tensors')


@pytest.mark.slow
def test_mim_test_on_image_folders(tmp_path):
    """The shipped config, ImageNet's layout, and nothing but the integer file. Softmax of the executor's logits."""
    rng = np.random.default_rng(0)
    for c in range(1000):
        folder = tmp_path / 'imagenet' / 'val' / f'n{c:08d}'
        folder.mkdir(parents=True)
        for i in range(int(c < 3)):
            Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(folder / f'{i}.jpg')
    integer = small_deit_file(tmp_path / 'deit-int.safetensors')
    config = ROOT / 'configs' / 'integer' / 'fqvit_deit_t_int.py'
    changes = {'data_root': tmp_path / 'imagenet', 'split': 'val'}
    options = [f'test_dataloader.dataset.{key}={value}' for key, value in changes.items()]
    options += ['test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False']
    out = tmp_path / 'predictions.pkl'
    said = mim_test(config, tmp_path / 'deit-int.safetensors', tmp_path, *options, '--out', str(out))
    cfg = Config.fromfile(config)
    cfg.test_dataloader.dataset.data_root = str(tmp_path / 'imagenet')
    logits, labels = executor_logits(integer, cfg)
    scores = torch.stack([sample['pred_score'] for sample in pickle.loads(out.read_bytes())])
    assert torch.equal(scores, logits.softmax(1))
    top1 = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert float(re.findall(r'accuracy/top1: ([\d.]+)', said)[-1]) == pytest.approx(top1, abs=1e-3)


def small_deit_file(path):
    """The shipped network with random weights, calibrated on noise and written to ``path``."""
    torch.manual_seed(0)
    cfg = load_config(ROOT / 'configs' / 'fqvit_deit_t_w8a8.py')
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor)).eval()
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    fq.calibrate_(model, [torch.randn(2, 3, 224, 224)])
    fq.quant(model)
    integer = to_integer(model)
    save_integer(integer, path)
    return integer
