"""Preprocessing of a timm model, from timm's own data config, for MMPretrain's configs.

Without MMPretrain, timm's ``create_transform(**resolve_model_data_config(model))`` is the same preprocessing.
"""

from __future__ import annotations

import math
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

__all__ = ['data_settings']


def data_settings(model: nn.Module) -> dict[str, Any]:
    """``pipeline`` and ``data_preprocessor`` of a config that feed ``model`` what timm's evaluation feeds it.

    The short side is resized to ``floor(size / crop_pct)``, then the centre is cropped. Images are decoded by Pillow
    and not turned by their EXIF entry, as in timm.

    Args:
        model: made by ``timm.create_model``, or a ``TimmClassifier``.

    Raises:
        ValueError: timm prepares its images in a way for which MMPretrain has no transform.
    """
    config = resolve_model_data_config(getattr(model, 'model', model))
    height, width = config['input_size'][1:]
    mode, crop = config.get('crop_mode', 'center'), config['crop_pct']
    how = dict(backend='pillow', interpolation=config['interpolation'])
    if mode == 'squash':
        resize = dict(type='mmpretrain.Resize', scale=(math.floor(width / crop), math.floor(height / crop)), **how)
    elif mode == 'center' and height == width:
        resize = dict(type='mmpretrain.ResizeEdge', scale=math.floor(height / crop), edge='short', **how)
    else:
        raise ValueError(
            f'crop_mode={mode!r} at {height} by {width} pixels has no counterpart: write the pipeline out'
        )
    load = dict(
        type='mmpretrain.LoadImageFromFile',
        color_type='color_ignore_orientation',
        imdecode_backend='pillow',
    )
    size = dict(type='mmpretrain.CenterCrop', crop_size=(width, height))
    return dict(
        pipeline=[load, resize, size, dict(type='mmpretrain.PackInputs')],
        data_preprocessor=dict(
            mean=[255 * v for v in config['mean']], std=[255 * v for v in config['std']], to_rgb=True
        ),
    )
