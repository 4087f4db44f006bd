"""The Swin backbones that MMSegmentation and MMDetection bring along, under the twins of MMPretrain's.

Both compute what MMPretrain's does and keep its paths. What differs: their patch layers call the padding
``adap_padding``, a stage returns its feature beside the downsampled one, and every output has a norm of its own.
The classes are named by path, so that neither package need be installed.
"""

from __future__ import annotations

from .family import Family
from .swin import check_swin, quantize_swin_

__all__ = ['FAMILY']

FAMILY = Family(
    (
        'mmseg.models.backbones.swin.SwinTransformer',
        'mmdet.models.backbones.swin.SwinTransformer',
    ),
    check_swin,
    quantize_swin_,
    covers='Swin in [segmentors and detectors](mm_projects.md), whose heads stay float',
)
