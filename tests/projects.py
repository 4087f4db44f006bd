"""A small MMPretrain project on image folders, as a user would have it, for tests that run a Runner."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from PIL import Image

CLASSES = 3
_names = itertools.count()

MODEL = {
    'vit': dict(
        backbone=dict(
            type='VisionTransformer',
            arch=dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48),
            img_size=32,
            patch_size=8,
        ),
        neck=None,
        head=dict(type='VisionTransformerClsHead', num_classes=CLASSES, in_channels=24),
    ),
    'swin': dict(
        backbone=dict(
            type='SwinTransformer',
            arch=dict(embed_dims=12, depths=[2, 2], num_heads=[2, 4]),
            img_size=32,
            patch_size=4,
            window_size=4,
            out_indices=(1,),
        ),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=24),
    ),
}
MODEL['beit'] = dict(
    backbone=dict(MODEL['vit']['backbone'], type='BEiTViT'),
    neck=None,
    head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=24),
)
MODEL['swinv2'] = dict(
    MODEL['swin'],
    backbone=dict(
        MODEL['swin']['backbone'],
        type='SwinTransformerV2',
        arch=dict(embed_dims=12, depths=[2, 2], num_heads=[2, 4], extra_norm_every_n_blocks=0),
    ),
)


def write_images(root: Path, counts: dict[str, int]) -> Path:
    """Write ``root/<split>/<class>/<i>.png``, each class of a colour of its own, with noise."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for c in range(CLASSES):
            folder = root / split / f'class{c}'
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (36, 32, 3))
                pixels[..., c] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    return root


def _loader(root: Path, split: str, batch_size: int, pipeline: list[dict] | None, shuffle: bool) -> dict:
    dataset = dict(type='CustomDataset', data_root=str(root / split))
    if pipeline is not None:
        dataset['pipeline'] = pipeline
    sampler = dict(type='DefaultSampler', shuffle=shuffle)
    return dict(batch_size=batch_size, num_workers=0, dataset=dataset, sampler=sampler)


def project(root: Path, work_dir: Path, model: str = 'vit', **changes: Any) -> Config:
    """The config of the project; ``changes`` are merged in by dotted key (``__`` for a dot)."""
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs')]
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(type='ImageClassifier', **MODEL[model]),
            data_preprocessor=dict(num_classes=CLASSES, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
            train_dataloader=_loader(root, 'train', 4, pipeline, True),
            val_dataloader=_loader(root, 'val', 4, pipeline, False),
            test_dataloader=_loader(root, 'val', 4, pipeline, False),
            calib_dataloader=_loader(root, 'train', 4, None, False),
            val_evaluator=dict(type='Accuracy', topk=(1,)),
            test_evaluator=dict(type='Accuracy', topk=(1,)),
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
            val_cfg=dict(),
            test_cfg=dict(),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9)),
            quant_scheme=dict(type='fqvit_w8a8_attn4'),
            custom_hooks=[dict(type='fqvit_plugin.QuantHook', num_batches=3)],
            work_dir=str(work_dir),
            experiment_name=f'project{next(_names)}',
            randomness=dict(seed=0),
            log_level='INFO',
        )
    )
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return cfg


def build(cfg: Config) -> torch.nn.Module:
    """The model of ``cfg`` with weights that are nowhere zero, in eval mode."""
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(dict(**cfg.model, data_preprocessor=cfg.data_preprocessor))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def float_checkpoint(cfg: Config, path: Path) -> Path:
    """Save the weights of :func:`build`, and let ``cfg`` load them."""
    torch.save({'state_dict': build(cfg).state_dict(), 'meta': {}}, path)
    cfg.load_from = str(path)
    return path


def runner(cfg: Config) -> Runner:
    """A runner for ``cfg``."""
    return Runner.from_cfg(cfg)
