"""Quantized twins of MMPretrain's Twins: PCPVT and SVT, with global sub-sampled and locally grouped attention.

A block's residual sum is read by a LayerNorm, and then has PTF's scales, or by a convolution (the position encoding
behind the first block, the next stage's patch embedding), which wants one scale for the whole tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models import PCPVT, SVT
from mmpretrain.models.backbones.twins import GlobalSubsampledAttention
from torch import Tensor, nn

from ..layers import QAct
from .attention import QAttention
from .common import (
    QFFN,
    LayerFactory,
    QNormAct,
    QPatchEmbed,
    QPositionEncoding,
    check_ffn,
    check_norm,
    check_patch_embed,
    link,
    linked,
)
from .family import Family, class_path
from .sums import product

__all__ = ['FAMILY', 'QGlobalAttention', 'QLocalAttention', 'QTwinsBlock', 'quantize_twins_']

#: What the float model adds to logits of tokens that must not see each other.
_FORBIDDEN = -1000.0


class QGlobalAttention(QAttention):
    """Every token looks at tokens that a strided convolution has summed up."""

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, make)
        self.head_dims, self.out_drop = attn.head_dims, attn.out_drop
        self.q, self.kv = make.linear(attn.q), make.linear(attn.kv)
        self.query_act, self.kv_act = make.operand(), make.operand()
        self.sr_ratio = attn.sr_ratio
        if self.sr_ratio > 1:
            self.sr = make.conv(attn.sr)
            self.sr_act = make.norm_input(attn.embed_dims)
            self.norm = QNormAct.wrap(attn.norm, self.sr_act, make)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H W, C) to (B, H W, C)."""
        (q,) = self.split(self.query_act(self.q(x)), 1)
        if self.sr_ratio > 1:
            x = self.sr(x.transpose(1, 2).unflatten(2, hw_shape))  # (B, C, H', W')
            x = self.norm(self.sr_act(x.flatten(2).transpose(1, 2)))
        k, v = self.split(self.kv_act(self.kv(x)), 2)
        logits = product(q, k.transpose(-2, -1)) * self.head_dims**-0.5
        return self.out_drop(self.project(self.attend(logits, v)))


class QLocalAttention(QAttention):
    """Attention inside windows that neither shift nor overlap."""

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, make)
        self.window_size, self.scale = attn.window_size, attn.scale
        self.qkv = make.linear(attn.qkv)
        self.qkv_act = make.operand()

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H W, C) to (B, H W, C)."""
        height, width = hw_shape
        below, right = (-height % self.window_size, -width % self.window_size)
        x = F.pad(x.unflatten(1, hw_shape), (0, 0, 0, right, 0, below))  # (B, H', W', C)
        grid = (x.shape[1] // self.window_size, x.shape[2] // self.window_size)
        q, k, v = self.split(self.qkv_act(self.qkv(self._windows(x))), 3)  # (B, windows, heads, N, D)
        logits = product(q, k.transpose(-2, -1)) * self.scale
        x = self.attend(logits, v, self._mask(x, below, right))  # (B, windows, N, C)
        x = x.unflatten(2, (self.window_size, -1)).unflatten(1, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.project(x[:, :height, :width].flatten(1, 2))

    def _windows(self, x: Tensor) -> Tensor:
        """(B, H', W', C) to (B, windows, N, C)."""
        size = self.window_size
        x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, rows, size, columns, size, C)
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _mask(self, x: Tensor, below: int, right: int) -> Tensor | None:
        """(1, windows, 1, N, N): the image must not see the padding."""
        if not (below and right):
            return None  # MMPretrain 1.2.0 marks the last 0 rows as [-0:], which is all of them, and so masks nothing
        padding = torch.zeros_like(x[:1, ..., :1])
        padding[:, -below:] = 1
        padding[:, :, -right:] = 1
        padding = self._windows(padding)  # (1, windows, N, 1)
        return ((padding != padding.transpose(-2, -1)) * _FORBIDDEN).unsqueeze(2)


class QTwinsBlock(nn.Module):
    """Pre-norm block of either attention; :func:`~fqvit_plugin.blocks.common.link` tells what quantized its input.

    Args:
        block: the float module.
        make: builds Q layers.
        residual_act: the quantizer of its output, which depends on the reader.
    """

    def __init__(self, block: Any, make: LayerFactory, residual_act: QAct) -> None:
        super().__init__()
        twin = QGlobalAttention if isinstance(block.attn, GlobalSubsampledAttention) else QLocalAttention
        self.norm1, self.norm2 = make.norm(block.norm1), make.norm(block.norm2)
        self.attn = twin(block.attn, make)
        self.ffn = QFFN(block.ffn, make)
        self.drop_path = block.drop_path
        self.norm1_act, self.norm2_act = make.operand(), make.operand()
        self.attn_residual_act = make.norm_input(block.norm1.normalized_shape[0])
        self.residual_act = residual_act

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H W, C) to (B, H W, C), on the grid of ``residual_act``."""
        y = self.norm1(x, linked(self), self.norm1_act)
        x = self.attn_residual_act(x + self.drop_path(self.attn(y, hw_shape)))
        y = self.norm2(x, self.attn_residual_act, self.norm2_act)
        return self.residual_act(x + self.drop_path(self.ffn(y)))


def check_twins(backbone: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    for s, (embed, stage) in enumerate(zip(backbone.patch_embeds, backbone.stages, strict=True)):
        check_patch_embed(embed)
        for b, block in enumerate(stage):
            path = f'stages.{s}.{b}'
            for name in ('norm1', 'norm2'):
                check_norm(getattr(block, name), f'{path}.{name}')
            if getattr(block.attn, 'sr_ratio', 1) > 1:
                check_norm(block.attn.norm, f'{path}.attn.norm')
            check_ffn(block.ffn, f'{path}.ffn', sums=False)
        if not isinstance(norm := getattr(backbone, f'norm_after_stage{s}'), nn.Identity):
            check_norm(norm, f'norm_after_stage{s}')


def quantize_twins_(backbone: Any, make: LayerFactory) -> None:
    """Put quantized twins into a Twins that passed :func:`check_twins`, in place."""
    for s, stage in enumerate(backbone.stages):
        embed = QPatchEmbed(backbone.patch_embeds[s], make)
        if s > 0:
            embed.input_act = nn.Identity()  # it reads what the stage before has quantized
        backbone.patch_embeds[s] = embed
        channels = backbone.embed_dims[s]
        last_norm = getattr(backbone, f'norm_after_stage{s}')

        def sum_act(read_by_norm: bool, channels: int = channels) -> QAct:
            return make.norm_input(channels) if read_by_norm else make.act()

        previous: QAct = embed.last_act
        for b, block in enumerate(stage):
            # Behind the first block stands the position encoding; behind the last, a norm or the next convolution.
            is_last, has_norm = b == len(stage) - 1, not isinstance(last_norm, nn.Identity)
            read_by_norm = has_norm if is_last else True
            stage[b] = QTwinsBlock(block, make, sum_act(b > 0 and read_by_norm))
            link(stage[b], previous)
            previous = stage[b].residual_act
            if b == 0:
                encoding = QPositionEncoding(backbone.position_encodings[s], make, sum_act(read_by_norm))
                backbone.position_encodings[s] = encoding
                previous = encoding.residual_act
        if not isinstance(last_norm, nn.Identity):
            setattr(backbone, f'norm_after_stage{s}', QNormAct.wrap(last_norm, previous, make))


FAMILY = Family(
    (class_path(PCPVT), class_path(SVT)),
    check_twins,
    quantize_twins_,
    covers='Twins-PCPVT and Twins-SVT: `norm_after_stage`, several `out_indices`, sizes that need padding',
)
