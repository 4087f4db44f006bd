"""Projects of MMSegmentation and MMDetection, outside the repository, quantized by their own test command.

Neither package is a dependency: where one is absent, or refuses the installed mmcv, its tests are skipped with the
reason. mmcv's compiled ops are torchvision's where only mmcv-lite is installed (tests/mmcv_ops).
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import re
import subprocess
import sys
import warnings

import calibrate
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from mmpretrain.models import SwinTransformer
from PIL import Image
from torch import nn

import fqvit_plugin as fq
from fqvit_plugin.calibration import CalibrationSet, calibrate_on_
from fqvit_plugin.presets import parse_scheme
from fqvit_plugin.surgery import FAMILIES, check_model

from .mm_projects import ROOT, STANDIN, detection_project, segmentation_project, why_not

PACKAGES = {'mmseg': 'mmsegmentation', 'mmdet': 'mmdet'}
CONFIGS = {
    'mmseg': ROOT / 'configs' / 'mmseg' / 'upernet_swin_t_ade20k_fqvit_w8a8.py',
    'mmdet': ROOT / 'configs' / 'mmdet' / 'cascade_mask_rcnn_swin_s_coco_fqvit_w8a8.py',
}
SWIN = dict(embed_dims=12, depths=[1, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0)


@contextlib.contextmanager
def scope(package):
    """The package imported and the default scope, or the test skipped; the scope before is put back."""
    if reason := why_not(package):
        required = os.environ.get('FQVIT_MM_PROJECTS') == 'required'  # nox -s mm_projects
        (pytest.fail if required else pytest.skip)(reason)
    before = DefaultScope.get_current_instance()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # theirs, on import
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(STANDIN)
            importlib.import_module('mmcv_ext_standin').install()
        importlib.import_module(f'{package}.models')
        init_default_scope(package)
        try:
            yield
        finally:
            if before is not None:
                init_default_scope(before.scope_name)


@pytest.fixture(params=PACKAGES)
def package(request):
    with scope(request.param):
        yield request.param


@pytest.fixture
def mmseg():
    with scope('mmseg'):
        yield


def randomized(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()  # which gives None with their Swin
    return model


def quantized(backbone, images):
    fq.quantize_model_(backbone, fq.get_scheme('fqvit_w8a8'))
    fq.calibrate_(backbone, images)
    fq.quant(backbone)
    return backbone


# ---------------------------------------------------------------- their Swin under our twins


@pytest.mark.parametrize('absolute', [False, True])
def test_their_swin_gives_the_codes_of_mmpretrains(package, absolute):
    """Oracle: MMPretrain's Swin on the same weights, float and quantized, at a size that needs padding."""
    options = dict(out_indices=(0, 1), use_abs_pos_embed=absolute)
    size = (64, 64) if absolute else (57, 86)
    theirs = MODELS.build(
        dict(type=f'{package}.SwinTransformer', **SWIN, **options, strides=(4, 2), pretrain_img_size=64)
    )
    arch = {key: SWIN[key] for key in ('embed_dims', 'depths', 'num_heads')}
    ours = SwinTransformer(arch=arch, img_size=64, window_size=4, drop_path_rate=0.0, **options)
    randomized(theirs)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    # MMPretrain gives a norm to its last stage only
    ours.norm0 = theirs.norm0
    assert {key for key in missing if not key.endswith('attn_mask')} <= {'norm0.weight', 'norm0.bias'}
    ours.eval()
    images = [torch.randn(1, 3, *size) for _ in range(2)]
    with torch.no_grad():
        float_theirs, float_ours = theirs(images[0]), ours(images[0])
        codes_theirs = quantized(theirs, images)(images[0])
        codes_ours = quantized(ours, images)(images[0])
    for a, b, c, d in zip(float_theirs, float_ours, codes_theirs, codes_ours, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert not torch.equal(a, c)


def test_surgery_leaves_their_float_values_and_names_alone(package):
    backbone = randomized(
        MODELS.build(dict(type=f'{package}.SwinTransformer', **SWIN, strides=(4, 2), out_indices=(1,)))
    )
    images, names = torch.randn(2, 3, 64, 64), {name for name, _ in backbone.named_parameters()}
    with torch.no_grad():
        before = backbone(images)
        fq.quantize_model_(backbone, fq.get_scheme('fqvit_w8a8'))
        after = backbone(images)
    assert torch.equal(before[0], after[0])
    assert {name for name, _ in backbone.named_parameters()} == names


def test_images_of_any_size_stream_through_calibration(package):
    """Oracle: the input's range is that of all images together, whatever their sizes."""
    backbone = randomized(
        MODELS.build(dict(type=f'{package}.SwinTransformer', **SWIN, strides=(4, 2), out_indices=(1,)))
    )
    images = [torch.randn(1, 3, 40 + 9 * i, 90 - 13 * i) for i in range(4)]
    quantized(backbone, images)
    steps = backbone.patch_embed.input_act.quantizer.scale * 255
    extent = max(x.max() for x in images) - min(x.min() for x in images)
    torch.testing.assert_close(steps.squeeze(), extent, rtol=1e-5, atol=0)


def test_a_swin_without_patch_norms_is_refused_by_name(package):
    backbone = MODELS.build(
        dict(type=f'{package}.SwinTransformer', **SWIN, strides=(4, 2), out_indices=(1,), patch_norm=False)
    )
    with pytest.raises(ValueError, match=r'stages\.0\.downsample\.norm is a NoneType'):
        fq.quantize_model_(backbone, fq.get_scheme('fqvit_w8a8'))


def test_mmpretrains_swin_inside_a_segmentor(mmseg):
    """The cross-library backbone: only its blocks are quantized, the report has one line for each head."""
    arch = {key: SWIN[key] for key in ('embed_dims', 'depths', 'num_heads')}
    head = dict(
        type='UPerHead', in_channels=[12, 24], in_index=[0, 1], channels=8, num_classes=3, norm_cfg=dict(type='BN')
    )
    backbone = dict(type='mmpretrain.SwinTransformer', arch=arch, img_size=64, window_size=4, out_indices=(0, 1))
    model = randomized(
        MODELS.build(
            dict(type='EncoderDecoder', backbone=backbone, decode_head=head, test_cfg=ConfigDict(mode='whole'))
        )
    )
    report = fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    assert all(entry.path.startswith('backbone.') for entry in report.entries)
    assert [name for name in report.left_float if not name.startswith('backbone.')] == ['decode_head']
    fq.calibrate_(model, [torch.randn(1, 3, 64, 96)] * 2, lambda m, x: m.extract_feat(x))
    fq.quant(model)
    images = torch.randn(1, 3, 64, 96)
    assert model(images, mode='tensor').shape == (1, 3, 16, 24)
    # windows that slide over the image; oracle: a window as large as the image is the image
    meta = [dict(ori_shape=(64, 96), img_shape=(64, 96), pad_shape=(64, 96), padding_size=[0] * 4)]
    whole = model.inference(images, meta)
    for crop, same in (((64, 96), True), ((64, 64), False)):
        model.test_cfg = ConfigDict(mode='slide', crop_size=crop, stride=(32, 32))
        assert torch.equal(model.inference(images, meta), whole) is same


class Dense(BaseModel):
    """A model with a head of its own, as a segmentor is, made of parts that are always installed."""

    def __init__(self):
        super().__init__(ImgDataPreprocessor(mean=[127.5] * 3, std=[127.5] * 3))
        arch = {key: SWIN[key] for key in ('embed_dims', 'depths', 'num_heads')}
        self.backbone = SwinTransformer(arch=arch, img_size=32, window_size=4, out_indices=(0, 1))
        self.decode_head = nn.Sequential(nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def extract_feat(self, inputs):
        return self.backbone(inputs)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.decode_head(self.extract_feat(inputs)[-1])


def test_a_model_with_a_head_of_its_own(tmp_path):
    """Calibration needs the backbone only, one image at a time whatever the sizes; the head is one line."""
    sizes = [(36, 50), (41, 64), (57, 33)]
    for i, (height, width) in enumerate(sizes):
        (tmp_path / 'a').mkdir(exist_ok=True)
        Image.new('RGB', (width, height), (40 * i, 90, 200 - 30 * i)).save(tmp_path / 'a' / f'{i}.png')
    init_default_scope('mmpretrain')
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    dataset = dict(type='CustomDataset', data_root=str(tmp_path), pipeline=pipeline)
    cfg = dict(calib_dataloader=None, train_dataloader=dict(dataset=dataset), test_dataloader=dict(dataset=dataset))
    model, seen = randomized(Dense()), []
    report = fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    model.decode_head.register_forward_pre_hook(lambda *_: pytest.fail('calibration ran the float head'))
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    assert calibrate_on_(model, CalibrationSet.build(cfg, 3), MMLogger.get_current_instance()) == 3
    assert sorted(seen) == sizes
    fq.quant(model)
    assert all(entry.path.startswith('backbone.') for entry in report.entries)
    heads = {name: reason for name, reason in report.left_float.items() if not name.startswith('backbone.')}
    assert heads == {'decode_head': "Sequential's 3 layers: FQ-ViT's blocks are in the backbone"}
    assert "     1 x Sequential's 3 layers" in str(report)


# ---------------------------------------------------------------- configs


def test_our_config_inherits_theirs(package):
    cfg = Config.fromfile(CONFIGS[package])
    assert parse_scheme(cfg.quant_scheme) == fq.get_scheme('fqvit_w8a8')
    assert [hook.type for hook in cfg.custom_hooks] == ['fqvit_plugin.QuantHook']
    assert cfg.calib_dataloader is None
    for part in ('decode_head', 'auxiliary_head'):
        if part in cfg.model:  # SyncBN is built on a GPU only
            cfg.model[part].norm_cfg = dict(type='BN')
    model = MODELS.build(cfg.model)
    check_model(model)
    # published: 60 million (MMSegmentation's UPerNet, Swin-T), 107 million (the Swin authors' detector)
    expected = {'mmseg': 60, 'mmdet': 107}[package]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize('path', sorted(p for family in FAMILIES for p in family.models))
def test_every_class_path_of_an_installed_package_exists(path):
    """A path is a string: a typing error would only show as 'not covered'."""
    package = path.split('.')[0]
    with scope(package) if package in PACKAGES else contextlib.nullcontext():
        module, _, name = path.rpartition('.')
        assert (
            f'{importlib.import_module(module).__name__}.{getattr(importlib.import_module(module), name).__name__}'
            == path
        )


# ---------------------------------------------------------------- their own test command


def mim_test(package, cwd, checkpoint, *options):
    """Run ``mim test`` of the package in ``cwd``; gives its output."""
    path = [str(STANDIN), str(ROOT), os.environ.get('PYTHONPATH', '')]
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'PYTHONPATH': os.pathsep.join(filter(None, path))}
    mim = [sys.executable, '-m', 'mim', 'test', PACKAGES[package], 'mine_quantized.py', '--checkpoint', checkpoint]
    done = subprocess.run(
        [*mim, '--work-dir', 'work', *options], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def save(folder, steps=0):
    """Write the model of ``mine.py`` to ``model.pth``: random, or after some steps of training."""
    cfg = Config.fromfile(folder / 'mine.py')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model) if steps else randomized(MODELS.build(cfg.model))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # theirs
        batches = iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)) if steps else ()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model.train()
        for batch in itertools.islice(batches, steps):
            loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode='loss'))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'model.pth')


def table(output, metric):
    """``(float, quantized)`` of the last table that QuantHook logged."""
    rows = re.findall(rf'^  {metric} +(\S+) +(\S+)$', output, re.MULTILINE)
    return tuple(map(float, rows[-1]))


def test_a_segmentation_project(mmseg, tmp_path, monkeypatch):
    """Three bands of colour: 60 steps of training find them, and 8 bits do not lose them."""
    segmentation_project(tmp_path)
    save(tmp_path, steps=60)
    first = mim_test('mmseg', tmp_path, 'model.pth')
    assert 'calibrated on 3 images in 3 batches' in first
    assert 'calibration images are also scored' not in first
    for line in ('1 x QConv2d        int8', "1 x UPerHead's 25 layers", "1 x FCNHead's 3 layers"):
        assert line in first
    before, after = table(first, 'mIoU')
    print(f'\nmIoU {before:.2f} float, {after:.2f} quantized')
    assert before > 80
    assert after == pytest.approx(before, abs=3)
    assert re.search(rf'Iter\(test\).*mIoU: {after:.2f}', first)
    # the tool calibrates on the same images, without a runner, and its checkpoint says what the hook's does
    monkeypatch.chdir(tmp_path)
    assert calibrate.main(['mine_quantized.py', 'model.pth', '--out', 'q.pth', '--batches', '3']) == 0
    again = mim_test('mmseg', tmp_path, 'q.pth')
    assert 'calibration is skipped' in again
    assert table(again, 'mIoU') == (before, after)


def test_a_detection_project(tmp_path):
    with scope('mmdet'):
        detection_project(tmp_path)
        save(tmp_path)
        output = mim_test('mmdet', tmp_path, 'model.pth')
    assert 'calibrated on 3 images in 3 batches' in output
    for line in ('1 x QConv2d        int8', "1 x FPN's 8 layers", '1 x RPNHead', '1 x CascadeRoIHead'):
        assert line in output
    assert len(table(output, 'coco/bbox_mAP')) == 2  # random weights find nothing: that it is scored is the point
