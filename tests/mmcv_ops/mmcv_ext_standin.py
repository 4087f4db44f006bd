"""Stands in for ``mmcv._ext``, the compiled half of mmcv that mmcv-lite leaves out.

MMSegmentation and MMDetection import ``mmcv.ops`` whole, and mmcv has no wheel for the torch of today. The two ops
that a Cascade Mask R-CNN runs are torchvision's here; all others raise when called. Tests only; with mmcv compiled
it is not used.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def _nms(boxes: Any, scores: Any, iou_threshold: float, offset: int) -> Any:
    from torchvision.ops import nms

    if offset:
        raise ValueError('the stand-in has no offset')
    return nms(boxes, scores, iou_threshold)


def _roi_align_forward(input: Any, rois: Any, output: Any, argmax_y: Any, argmax_x: Any, **options: Any) -> None:
    from torchvision.ops import roi_align

    if options['pool_mode'] != 1:
        raise ValueError('the stand-in averages only')
    size = (options['aligned_height'], options['aligned_width'])
    scale, ratio, aligned = (options[key] for key in ('spatial_scale', 'sampling_ratio', 'aligned'))
    output.copy_(roi_align(input, rois, size, scale, ratio or -1, aligned))


class _Extension(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f'mmcv.ops needs {name}, which mmcv-lite has not compiled')

        return missing


def install() -> None:
    """Let ``import mmcv._ext`` find the stand-in, where no compiled one is installed."""
    mmcv = importlib.util.find_spec('mmcv')
    if mmcv is None or mmcv.submodule_search_locations is None or 'mmcv._ext' in sys.modules:
        return
    if PathFinder.find_spec('mmcv._ext', list(mmcv.submodule_search_locations)) is not None:
        return
    extension: Any = _Extension('mmcv._ext')
    extension.nms, extension.roi_align_forward = _nms, _roi_align_forward
    extension.__spec__ = ModuleSpec('mmcv._ext', None, origin=__file__)  # MMEngine asks for it
    sys.modules['mmcv._ext'] = extension
    transformer: Any = sys.modules.get('mmcv.cnn.bricks.transformer')
    if transformer is not None:  # it was imported before, and went without
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention

        transformer.MultiScaleDeformableAttention = MultiScaleDeformableAttention
