"""Quantized twins of MMPretrain's Swin Transformer V2: cosine attention, post-norm blocks, patch merging.

A post-norm block adds the *output* of a LayerNorm to the residual stream and reads the stream by linear layers. So
what a LayerNorm reads, and PTF is for, is the projection's output; the stream itself has one scale per tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models import SwinTransformerV2
from torch import Tensor, nn

from ..layers import QAct
from ..phase import full_precision
from .attention import QAttention, gather_bias, joined_bias
from .common import (
    QFFN,
    LayerFactory,
    QNormAct,
    QPatchEmbed,
    check_ffn,
    check_norm,
    check_patch_embed,
)
from .family import Family, class_path
from .sums import product
from .swin import QPatchMerging, QPositionedDropout

__all__ = ['FAMILY', 'QPostNormMerging', 'QSwinBlockV2', 'QWindowMSAV2', 'UnitLength', 'quantize_swinv2_']

#: exp(logit_scale) is at most 100, as in the paper
_LOG_LIMIT = math.log(100)


class UnitLength(nn.Module):
    """Vectors of length one along the last axis: a float function, like GELU; its output is quantized."""

    why_float = 'normalization is float; its output is quantized'

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to the same."""
        return F.normalize(x, dim=-1)


class QWindowMSAV2(QAttention):
    """Cosine window attention with continuous relative position bias.

    The bias is the output of a small network on fixed coordinates: a constant, of which the table is quantized.
    """

    relative_position_index: Tensor
    relative_coords_table: Tensor

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, make)
        self.window_size = attn.window_size
        self.cpb_mlp, self.logit_scale = attn.cpb_mlp, attn.logit_scale
        self.register_buffer('relative_coords_table', attn.relative_coords_table)
        self.register_buffer('relative_position_index', attn.relative_position_index)
        self.qkv = make.linear(attn.qkv)
        self.q_bias, self.v_bias = attn.q_bias, attn.v_bias
        for layer in self.cpb_mlp:
            layer.why_float = 'makes a constant, the position biases: quantized'
        self.unit_length = UnitLength()
        self.qkv_act = make.operand()
        self.query_act, self.key_act = make.operand(), make.operand()  # of length one
        self.scores_act = make.act()
        self.bias_table_act = make.act_of_shared()
        self.proj_act = make.norm_input(attn.embed_dims)  # norm1 of the block reads it

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(windows B, N, C) to the same; ``mask`` is (windows, N, N), negative across window borders."""
        q, k, v = self.split(self.qkv_act(self.qkv(x, joined_bias(self))), 3)
        q, k = self.query_act(self.unit_length(q)), self.key_act(self.unit_length(k))
        gain = self.logit_scale.clamp(max=_LOG_LIMIT).exp()  # (heads, 1, 1), a factor of the accumulator
        scores = self.scores_act(product(q, k.transpose(-2, -1)) * gain)
        logits = scores + gather_bias(self._bias_table(), self.relative_position_index)
        if mask is None:
            return self.project(self.attend(logits, v))
        logits, v = (t.unflatten(0, (-1, len(mask))) for t in (logits, v))  # (B, windows, heads, …)
        return self.project(self.attend(logits, v, mask[:, None]).flatten(0, 1))

    def _bias_table(self) -> Tensor:
        with full_precision(self.relative_coords_table):
            table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
            return self.bias_table_act(16 * torch.sigmoid(table))


class QSwinBlockV2(nn.Module):
    """Post-norm Swin block: attention, LayerNorm, sum; MLP, LayerNorm, sum; sometimes one LayerNorm more."""

    def __init__(self, block: Any, make: LayerFactory) -> None:
        super().__init__()
        channels = block.norm1.normalized_shape[0]
        self.attn = block.attn  # windows, shifts and masks stay as they are
        self.attn.w_msa = QWindowMSAV2(block.attn.w_msa, make)
        self.norm1, self.norm2 = make.norm(block.norm1), make.norm(block.norm2)
        self.ffn = QFFN(block.ffn, make)
        self.ffn.out_act = make.norm_input(channels)  # norm2 reads it
        self.norm1_act, self.norm2_act = make.operand(), make.operand()
        self.attn_residual_act = make.act()
        self.residual_act = make.act()
        self.norm3 = make.norm(block.norm3) if block.extra_norm else None
        self.sum_act = make.norm_input(channels) if block.extra_norm else None

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H W, C) to (B, H W, C), on the grid of ``residual_act``."""
        y = self.norm1(self.attn(x, hw_shape), self.attn.w_msa.proj_act, self.norm1_act)
        x = self.attn_residual_act(y + x)
        y = self.norm2(self.ffn(x), self.ffn.out_act, self.norm2_act)
        x = y + x
        if self.norm3 is None or self.sum_act is None:
            return self.residual_act(x)
        return self.norm3(self.sum_act(x), self.sum_act, self.residual_act)


class QPostNormMerging(QPatchMerging):
    """Patch merging of Swin V2: unfold, reduction, LayerNorm."""

    def __init__(self, merging: Any, make: LayerFactory) -> None:
        super().__init__(merging, make)
        del self.norm_act
        self.reduction_act = make.norm_input(merging.out_channels)
        self.residual_act = make.act()  # what the norm puts out

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """(B, H W, C) to (B, H/2 W/2, C'), on the grid of ``residual_act``, and the new height and width."""
        x, size = self._unfold(x, input_size)
        return self.norm(self.reduction_act(self.reduction(x)), self.reduction_act, self.residual_act), size


def check_swinv2(backbone: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    check_patch_embed(backbone.patch_embed)
    for s, stage in enumerate(backbone.stages):
        if stage.downsample is not None:
            path = f'stages.{s}.downsample'
            if not stage.downsample.use_post_norm:
                raise ValueError(f'{path} has use_post_norm=False: not covered in SwinTransformerV2')
            check_norm(stage.downsample.norm, f'{path}.norm')
        for b, block in enumerate(stage.blocks):
            for name in ('norm1', 'norm2', 'norm3'):
                if hasattr(block, name):
                    check_norm(getattr(block, name), f'stages.{s}.blocks.{b}.{name}')
            check_ffn(block.ffn, f'stages.{s}.blocks.{b}.ffn', sums=False)
    for s in backbone.out_indices:
        if not isinstance(norm := getattr(backbone, f'norm{s}'), nn.Identity):
            check_norm(norm, f'norm{s}')


def quantize_swinv2_(backbone: Any, make: LayerFactory) -> None:
    """Put quantized twins into a Swin V2 that passed :func:`check_swinv2`, in place."""
    backbone.patch_embed = QPatchEmbed(backbone.patch_embed, make)
    previous: QAct = backbone.patch_embed.last_act
    if backbone.use_abs_pos_embed:
        backbone.drop_after_pos = QPositionedDropout(backbone.drop_after_pos, make.act())
        previous = backbone.drop_after_pos.residual_act
    for s, stage in enumerate(backbone.stages):
        if stage.downsample is not None:
            stage.downsample = QPostNormMerging(stage.downsample, make)
            previous = stage.downsample.residual_act
        for b, block in enumerate(stage.blocks):
            stage.blocks[b] = QSwinBlockV2(block, make)
            previous = stage.blocks[b].residual_act
        if s in backbone.out_indices:
            norm = getattr(backbone, f'norm{s}')
            if not isinstance(norm, nn.Identity):
                setattr(backbone, f'norm{s}', QNormAct.wrap(norm, previous, make))


FAMILY = Family(
    (class_path(SwinTransformerV2),),
    check_swinv2,
    quantize_swinv2_,
    covers='cosine attention, with the norms of query and key taken in float; absolute position embedding, '
    'pretrained window sizes, the extra norms of huge and giant, several `out_indices`',
    refuses='patch merging with `use_post_norm=False`',
)
