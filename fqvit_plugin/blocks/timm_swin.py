"""Quantized twins of timm's Swin: block and pooling; the rest is timm's own code around Q layers.

timm works on (B, H, W, C) and merges patches at the start of a stage; the scales are those of MMPretrain's twins.
"""

from __future__ import annotations

from typing import Any

from timm.layers import ClassifierHead, SelectAdaptivePool2d
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
)
from torch import Tensor, nn

from ..layers import QAct
from .common import LayerFactory, QLinearAct, check_norm, link, linked
from .family import Family, class_path
from .sums import mean
from .swin import QWindowMSA
from .timm_common import (
    QTimmPreNorm,
    check_block_parts,
    check_exactly,
    check_head,
    check_patch_embed,
    classifier_twin,
    grid_after,
    norm_twin,
    quantize_block_,
    quantize_patch_embed_,
)

__all__ = ['FAMILY', 'QTimmPooling', 'QTimmSwinBlock', 'quantize_timm_swin_']


class QTimmSwinBlock(QTimmPreNorm, SwinTransformerBlock):
    """timm's Swin block after surgery; windows, shifts and masks stay timm's."""

    def attention(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return self._attn(x)


class QTimmPooling(SelectAdaptivePool2d):
    """timm's global pooling whose output is quantized."""

    out_act: QAct

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, C)."""
        if self.pool_type == 'avg' and x.ndim == 4 and linked(self).is_exact:
            return self.out_act(mean(x, linked(self), (1, 2)))
        return self.out_act(super().forward(x))


def check_timm_swin(model: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    check_patch_embed(model.patch_embed)
    for s, stage in enumerate(model.layers):
        if not isinstance(stage.downsample, nn.Identity):
            check_exactly(stage.downsample, PatchMerging, f'layers.{s}.downsample')
            check_norm(stage.downsample.norm, f'layers.{s}.downsample.norm')
        for b, block in enumerate(stage.blocks):
            path = f'layers.{s}.blocks.{b}'
            check_exactly(block, SwinTransformerBlock, path)
            check_block_parts(block, path)
            check_exactly(block.attn, WindowAttention, f'{path}.attn')
    check_norm(model.norm, 'norm')
    check_exactly(model.head, ClassifierHead, 'head')
    check_head(model.head.fc, 'head.fc')


def quantize_timm_swin_(model: Any, make: LayerFactory) -> None:
    """Put quantized twins into a Swin that passed :func:`check_timm_swin`, in place."""
    previous = quantize_patch_embed_(model.patch_embed, make)
    for stage in model.layers:
        merging = stage.downsample
        if isinstance(merging, PatchMerging):
            merging.norm = norm_twin(merging.norm, previous, make, tile=4)  # four neighbours, one after the other
            previous = make.norm_input(merging.out_dim)
            merging.reduction = QLinearAct.wrap(merging.reduction, make, previous)
            link(merging.reduction, grid_after(merging.norm, None))
        for block in stage.blocks:
            previous = quantize_block_(block, QTimmSwinBlock, QWindowMSA(block.attn, make), previous, make)
    model.norm = norm_twin(model.norm, previous, make)
    pool = model.head.global_pool
    if pool.pool_type:
        pool.out_act = make.act()
        pool.__class__ = QTimmPooling
        link(pool, grid_after(model.norm, previous))
    model.head.fc = classifier_twin(model.head.fc, make, getattr(pool, 'out_act', None))


FAMILY = Family(
    (class_path(SwinTransformer),),
    check_timm_swin,
    quantize_timm_swin_,
    covers="timm's Swin and Swin-S3, any window and image size: [below](#timm)",
)
