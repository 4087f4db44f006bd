"""Every config builds the network its name says, with the paper's preprocessing; inheritance of both styles works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS

import fqvit_plugin as fq
from fqvit_plugin.presets import parse_scheme
from fqvit_plugin.surgery import check_model

from .projects import project, runner, write_images

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
#: name -> backbone, parameters in millions (published), short side, ImageNet's mean or 127.5, input quantization
EXPECTED = {
    'deit_t': ('VisionTransformer', 5.7, 256, 123.675, True),
    'deit_s': ('VisionTransformer', 22.1, 256, 123.675, True),
    'deit_b': ('VisionTransformer', 86.6, 256, 123.675, True),
    'vit_t': ('VisionTransformer', 5.7, 248, 127.5, False),
    'vit_b': ('VisionTransformer', 86.6, 248, 127.5, False),
    'vit_l': ('VisionTransformer', 304.3, 248, 127.5, False),
    'swin_t': ('SwinTransformer', 28.3, 248, 123.675, True),
    'swin_s': ('SwinTransformer', 49.6, 248, 123.675, True),
    'swin_b': ('SwinTransformer', 87.8, 248, 123.675, True),
}
SCHEMES = {bits: f'fqvit_{bits}' for bits in ('w8a8', 'w8a8_attn4', 'w6a6', 'w4a8', 'w4a4')}


def test_the_folder_holds_exactly_these_configs():
    expected = {f'fqvit_{name}_{scheme}.py' for name in EXPECTED for scheme in SCHEMES}
    assert {path.name for path in CONFIGS.glob('*.py')} == expected


def test_every_network_has_a_config_for_its_integer_checkpoint():
    assert {path.name for path in (CONFIGS / 'integer').glob('*.py')} == {f'fqvit_{name}_int.py' for name in EXPECTED}
    for name in EXPECTED:
        calibrated = Config.fromfile(CONFIGS / f'fqvit_{name}_w8a8.py')
        cfg = Config.fromfile(CONFIGS / 'integer' / f'fqvit_{name}_int.py')
        assert cfg.model == dict(type='fqvit_plugin.IntegerClassifier')
        assert cfg.custom_hooks == []
        for key in ('data_preprocessor', 'test_dataloader', 'val_dataloader', 'test_evaluator'):
            assert cfg[key] == calibrated[key]


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('name', EXPECTED)
def test_config(name, scheme):
    cfg = Config.fromfile(CONFIGS / f'fqvit_{name}_{scheme}.py')
    backbone, millions, short_side, mean, input_quant = EXPECTED[name]
    assert cfg.model.backbone.type == backbone
    assert parse_scheme(cfg.quant_scheme) == fq.get_scheme(SCHEMES[scheme], input_quant=input_quant)
    assert cfg.data_preprocessor['mean'][0] == mean
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        steps = {step.type.split('.')[-1]: step for step in loader.dataset.pipeline}
        assert steps['ResizeEdge'].scale == short_side
        assert steps['ResizeEdge'].interpolation == 'bicubic'
        assert steps['CenterCrop'].crop_size == 224
    assert cfg.calib_dataloader.dataset.split == 'train'
    assert 'pipeline' not in cfg.calib_dataloader.dataset
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert hooks == (['EMAHook'] if name == 'deit_b' else []) + ['fqvit_plugin.QuantHook']
    init_default_scope('mmpretrain')
    # Swin asks a tensor for its value while it is built, which a meta tensor has not
    with torch.device('cpu' if name.startswith('swin') else 'meta'):
        model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    check_model(model)


@pytest.mark.parametrize(
    ('option', 'expected'),
    [
        ({'quant_scheme.observer': 'omse'}, dict(observer='omse')),
        ({'quant_scheme.ptf': False}, dict(ptf=False)),
        ({'quant_scheme.lis': False}, dict(lis=False)),
        ({'quant_scheme.input_quant': False}, dict(input_quant=False)),
        ({'quant_scheme.preset': 'reference'}, dict(preset='reference')),
    ],
)
def test_recipe_is_one_cfg_option_away(option, expected):
    cfg = Config.fromfile(CONFIGS / 'fqvit_swin_t_w8a8.py')
    cfg.merge_from_dict(option)
    assert parse_scheme(cfg.quant_scheme) == fq.get_scheme('fqvit_w8a8', **expected)


def test_new_style_base_says_what_the_text_base_says():
    text = Config.fromfile(CONFIGS / '_base_' / 'fqvit.py')
    new = Config.fromfile(Path(fq.__file__).parent / 'configs' / 'fqvit.py')
    assert new.quant_scheme == text.quant_scheme
    assert new.custom_hooks[0].type.__name__ == text.custom_hooks[0].type.split('.')[-1]
    assert new.custom_hooks[0].num_batches == text.custom_hooks[0].num_batches
    ours, theirs = (dict(c.calib_dataloader, dataset=None, sampler=None) for c in (new, text))
    assert ours == theirs
    assert new.calib_dataloader.dataset.type.__name__ == text.calib_dataloader.dataset.type.split('.')[-1]
    assert new.calib_dataloader.dataset.split == text.calib_dataloader.dataset.split


NEW_STYLE = """
from mmengine.config import read_base
from mmpretrain.datasets import CustomDataset, LoadImageFromFile, PackInputs, Resize
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead, SwinTransformer

with read_base():
    from .fqvit import *

default_scope = 'mmpretrain'
model = dict(
    type=ImageClassifier,
    backbone=dict(type=SwinTransformer, arch=dict(embed_dims=12, depths=[2, 2], num_heads=[2, 4]), img_size=32,
                  window_size=4, out_indices=(1,)),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=3, in_channels=24))
data_preprocessor = dict(num_classes=3, mean=[127.5] * 3, std=[127.5] * 3)
test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=CustomDataset, data_root='{images}/val',
                 pipeline=[dict(type=LoadImageFromFile), dict(type=Resize, scale=32), dict(type=PackInputs)]))
test_evaluator = dict(type=Accuracy, topk=(1,))
test_cfg = dict()
quant_scheme.update(observer='ema')
calib_dataloader.update(batch_size=2, num_workers=0)
calib_dataloader['dataset'] = dict(type=CustomDataset, data_root='{images}/train')
work_dir = '{work_dir}'
experiment_name = 'new_style'
"""


def test_new_style_inheritance_runs(tmp_path):
    images = write_images(tmp_path / 'images', {'train': 2, 'val': 1})
    # mmengine resolves an absolute read_base only in a normal install; a relative one works in every install
    shutil.copy(Path(fq.__file__).parent / 'configs' / 'fqvit.py', tmp_path / 'fqvit.py')
    config = tmp_path / 'mine.py'
    config.write_text(NEW_STYLE.format(images=images, work_dir=tmp_path))
    made = runner(Config.fromfile(config))
    assert 'accuracy/top1' in made.test()
    saved = torch.load(tmp_path / 'calibrated.pth', weights_only=True)
    assert saved['meta']['fqvit']['scheme']['act']['observer'] == 'ema'


def test_text_base_is_inherited_by_another_project(tmp_path):
    images = write_images(tmp_path / 'images', {'train': 2, 'val': 1})
    mine = project(images, tmp_path)
    for key in ('calib_dataloader', 'quant_scheme', 'custom_hooks'):
        mine.pop(key)
    mine.dump(tmp_path / 'mine.py')
    child = tmp_path / 'child.py'
    child.write_text(
        f"_base_ = ['./mine.py', {str(CONFIGS / '_base_' / 'fqvit.py')!r}]\n"
        'calib_dataloader = dict(batch_size=2, num_workers=0,\n'
        f"    dataset=dict(_delete_=True, type='CustomDataset', data_root={str(images / 'train')!r}))\n"
    )
    made = runner(Config.fromfile(child))
    made.test()
    assert len(torch.load(tmp_path / 'calibrated.pth', weights_only=True)['meta']['fqvit']['images']) == 6
