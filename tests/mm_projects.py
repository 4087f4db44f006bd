"""Small MMSegmentation and MMDetection projects outside the repository, as their users have them.

Each writes random images and annotations in the package's own layout, the project's float config (which inherits
the package's and is only made smaller), and beside it the quantized one, which inherits that and our ``_base_``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import mmcv
import numpy as np
from mmengine.utils import digit_version
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
OUR_BASE = ROOT / 'configs' / '_base_' / 'fqvit.py'

#: Before PYTHONPATH's other entries, its sitecustomize.py stands in for what mmcv-lite leaves out.
STANDIN = ROOT / 'tests' / 'mmcv_ops'
_NEEDS = {'mmseg': ('ftfy', 'regex'), 'mmdet': ('pycocotools', 'shapely', 'terminaltables', 'six')}


def why_not(package: str) -> str | None:
    """Why MMSegmentation or MMDetection cannot be imported here, or None."""
    missing = [name for name in (package, *_NEEDS[package]) if importlib.util.find_spec(name) is None]
    if missing:
        return f'{", ".join(missing)} not installed'
    if digit_version(mmcv.__version__) >= digit_version('2.2.0'):
        return f'{package} refuses mmcv {mmcv.__version__}: it wants one below 2.2.0'
    return None


#: A Swin of four stages with 12 to 96 channels.
_BACKBONE = (
    'dict(embed_dims=12, depths=[1, 1, 2, 1], num_heads=[2, 2, 4, 4], window_size=4, '
    'drop_path_rate=0.0, init_cfg=None)'
)

SEG_FLOAT = """\
_base_ = ['mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py']
norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone={backbone},
    decode_head=dict(in_channels=[12, 24, 48, 96], channels=16, num_classes=3, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=48, channels=16, num_classes=3, norm_cfg=norm_cfg),
)
# its own classes, in ADE20K's folders
dataset = dict(
    type='BaseSegDataset', data_root={root!r}, reduce_zero_label=True, metainfo=dict(
        classes=('sky', 'tree', 'road'), palette=[[0, 0, 255], [0, 255, 0], [90, 90, 90]]))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 64), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(128, 64), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(64, 64)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
"""

DET_FLOAT = """\
_base_ = ['mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_ms-3x_coco.py']
model = dict(
    backbone=dict(_delete_=True, type='SwinTransformer', **{backbone}),
    neck=dict(in_channels=[12, 24, 48, 96], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=[
            dict(
                type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=16, roi_feat_size=7, num_classes=2,
                reg_class_agnostic=True,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4,
                    target_stds=[0.1 / k, 0.1 / k, 0.2 / k, 0.2 / k]),
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False), loss_bbox=dict(type='SmoothL1Loss'))
            for k in (1, 2, 3)
        ],
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=2),
    ),
    test_cfg=dict(rpn=dict(nms_pre=30, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
dataset = dict(data_root={root!r}, metainfo=dict(classes=('ball', 'box'), palette=[(220, 20, 60), (0, 0, 142)]))
train_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(dataset=dict(ann_file='train.json', data_prefix=dict(img='train/'), **dataset)))  # RepeatDataset
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(ann_file='val.json', data_prefix=dict(img='val/'), pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={val!r})
test_evaluator = val_evaluator
"""

QUANTIZED = """\
_base_ = ['./mine.py', {base!r}]
calib_dataloader = None  # the training images, in the test pipeline
custom_hooks = [dict(type='fqvit_plugin.QuantHook', num_batches=3, compare_float=True)]
"""


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def _sizes(count: int) -> list[tuple[int, int]]:
    """Heights and widths, no two alike and none a multiple of the windows."""
    return [(50 + 7 * i, 90 - 5 * i) for i in range(count)]


def segmentation_project(folder: Path, train: int = 4, val: int = 2) -> Path:
    """ADE20K's layout and ``mine.py`` in ``folder``; gives the quantized config."""
    rng = np.random.default_rng(0)
    root = folder / 'ade'
    for split, count in (('training', train), ('validation', val)):
        for i, (height, width) in enumerate(_sizes(count)):
            bands = rng.permutation([1, 2, 3])[np.arange(width) * 3 // width]  # three bands, each class one
            bands[:3] = 0  # not labelled
            labels = np.repeat(bands[None], height, axis=0)
            image = 150 * (labels[..., None] == [1, 2, 3]) + rng.integers(0, 100, (height, width, 3))
            _write(root / 'images' / split / f'{i}.jpg', image)
            _write(root / 'annotations' / split / f'{i}.png', labels)
    (folder / 'mine.py').write_text(SEG_FLOAT.format(backbone=_BACKBONE, root=str(root)))
    return _quantized(folder)


def detection_project(folder: Path, train: int = 4, val: int = 2) -> Path:
    """COCO's layout and ``mine.py`` in ``folder``; gives the quantized config."""
    rng = np.random.default_rng(0)
    root = folder / 'coco'
    for split, count in (('train', train), ('val', val)):
        images, annotations = [], []
        for i, (height, width) in enumerate(_sizes(count)):
            _write(root / split / f'{i}.jpg', rng.integers(0, 256, (height, width, 3)))
            images.append(dict(id=i, file_name=f'{i}.jpg', height=height, width=width))
            for category in (1, 2):
                x, y, w, h = 2, 2, width - 4, height - 4
                box = dict(bbox=[x, y, w, h], area=w * h, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
                annotations.append(dict(id=len(annotations), image_id=i, category_id=category, iscrowd=0, **box))
        names = [dict(id=1, name='ball'), dict(id=2, name='box')]
        (root / f'{split}.json').write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=names))
        )
    text = DET_FLOAT.format(backbone=_BACKBONE, root=str(root), val=str(root / 'val.json'))
    (folder / 'mine.py').write_text(text)
    return _quantized(folder)


def _quantized(folder: Path) -> Path:
    path = folder / 'mine_quantized.py'
    path.write_text(QUANTIZED.format(base=str(OUR_BASE)))
    return path
