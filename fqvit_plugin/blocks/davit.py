"""Quantized twins of MMPretrain's DaViT: attention inside windows and between channels, in turns.

Before each attention and each MLP stands a depthwise convolution that adds the position. It reads the residual sum,
which therefore has one scale for the whole tensor; a LayerNorm reads what it puts out, which has PTF's scales.
"""

from __future__ import annotations

from typing import Any

from mmpretrain.models import DaViT
from mmpretrain.models.backbones.davit import ChannelAttention, DaViTWindowMSA
from torch import Tensor, nn

from ..layers import QAct
from .attention import QAttention, merged
from .common import (
    QFFN,
    LayerFactory,
    QNormAct,
    QPatchEmbed,
    QPositionEncoding,
    check_ffn,
    check_norm,
    check_patch_embed,
)
from .family import Family, class_path
from .sums import product

__all__ = ['FAMILY', 'QChannelAttention', 'QDaViTBlock', 'QDownsample', 'QPlainWindowMSA', 'quantize_davit_']


class QPlainWindowMSA(QAttention):
    """Window attention without position bias."""

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, make)
        self.scale = attn.scale
        self.qkv = make.linear(attn.qkv)
        self.qkv_act = make.operand()

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        """(windows B, N, C) to the same; windows do not shift, so there is no mask."""
        q, k, v = self.split(self.qkv_act(self.qkv(x)), 3)
        return self.project(self.attend(product(q * self.scale, k.transpose(-2, -1)), v))


class QChannelAttention(QAttention):
    """Attention between the channels of a head: a softmax over channels, of a product over tokens."""

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, make)
        self.scale = attn.scale
        self.qkv = make.linear(attn.qkv)
        self.qkv_act = make.operand()

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        q, k, v = self.split(self.qkv_act(self.qkv(x)), 3)  # (B, heads, N, D) each
        logits = product((k * self.scale).transpose(-2, -1), v)  # (B, heads, D, D)
        x = product(self.probs(logits, self.logits_act), q.transpose(-2, -1))
        return self.project(merged(x.transpose(-2, -1)))


class QDaViTBlock(nn.Module):
    """Position, attention, position, MLP: DaViT's spatial block and its channel block.

    Args:
        block: the float module.
        make: builds Q layers.
        residual_act: the quantizer of its output, which depends on the reader.
    """

    def __init__(self, block: Any, make: LayerFactory, residual_act: QAct) -> None:
        super().__init__()
        channels = block.norm1.normalized_shape[0]
        self.cpe1 = QPositionEncoding(block.cpe1, make, make.norm_input(channels))
        self.norm1 = make.norm(block.norm1)
        self.attn: Any
        if isinstance(block.attn, ChannelAttention):
            self.attn = QChannelAttention(block.attn, make)
        else:
            self.attn = block.attn  # windows stay as they are
            self.attn.w_msa = QPlainWindowMSA(block.attn.w_msa, make)
        self.cpe2 = QPositionEncoding(block.cpe2, make, make.norm_input(channels))
        self.norm2 = make.norm(block.norm2)
        self.ffn = QFFN(block.ffn, make)
        self.norm1_act, self.norm2_act = make.operand(), make.operand()
        self.attn_residual_act = make.act()  # cpe2 reads it
        self.residual_act = residual_act

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H W, C) to (B, H W, C), on the grid of ``residual_act``."""
        x = self.cpe1(x, hw_shape)
        y = self.norm1(x, self.cpe1.residual_act, self.norm1_act)
        x = self.cpe2(self.attn_residual_act(self.attn(y, hw_shape) + x), hw_shape)
        y = self.norm2(x, self.cpe2.residual_act, self.norm2_act)
        return self.residual_act(x + self.ffn(y))


class QDownsample(nn.Module):
    """LayerNorm and a strided convolution between two stages.

    Args:
        downsample: the float module.
        make: builds Q layers.
        input_act: what quantized its input.
    """

    def __init__(self, downsample: Any, make: LayerFactory, input_act: QAct) -> None:
        super().__init__()
        self.out_channels, self.adaptive_padding = downsample.out_channels, downsample.adaptive_padding
        self.norm = QNormAct.wrap(downsample.norm, input_act, make)
        self.projection = make.conv(downsample.projection)
        self.residual_act = make.act()  # the next stage's convolution reads it

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """(B, H W, C) to (B, H/2 W/2, C'), on the grid of ``residual_act``, and the new height and width.

        Raises:
            ValueError: an odd number of tokens, which the float model refuses too.
        """
        if x.shape[1] % 2:
            raise ValueError(f'DaViT cannot halve a map of {input_size[0]} x {input_size[1]}: use another image size')
        x = self.projection(self.norm(x).transpose(1, 2).unflatten(2, input_size).contiguous())
        return self.residual_act(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


def check_davit(backbone: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    check_patch_embed(backbone.patch_embed)
    for s, stage in enumerate(backbone.stages):
        for b, pair in enumerate(stage.blocks):
            for name in ('spatial_block', 'channel_block'):
                block, path = getattr(pair, name), f'stages.{s}.blocks.{b}.{name}'
                check_norm(block.norm1, f'{path}.norm1')
                check_norm(block.norm2, f'{path}.norm2')
                check_ffn(block.ffn, f'{path}.ffn')
            attn = pair.spatial_block.attn
            if attn.shift_size > 0 or type(attn.w_msa) is not DaViTWindowMSA:
                raise ValueError(
                    f'stages.{s}.blocks.{b}.spatial_block.attn is not plain window attention: not covered'
                )
        if stage.downsample is not None:
            check_norm(stage.downsample.norm, f'stages.{s}.downsample.norm')
    for s in backbone.out_indices:
        if not isinstance(norm := getattr(backbone, f'norm{s}'), nn.Identity):
            check_norm(norm, f'norm{s}')


def quantize_davit_(backbone: Any, make: LayerFactory) -> None:
    """Put quantized twins into a DaViT that passed :func:`check_davit`, in place."""
    backbone.patch_embed = QPatchEmbed(backbone.patch_embed, make)
    for s, stage in enumerate(backbone.stages):
        previous: QAct = make.norm_input(stage.embed_dims)  # at its end: the downsampling's norm reads it, or norm{s}
        for pair in stage.blocks:
            pair.spatial_block = QDaViTBlock(pair.spatial_block, make, make.act())
            last_act = previous if pair is stage.blocks[-1] else make.act()
            pair.channel_block = QDaViTBlock(pair.channel_block, make, last_act)
        if stage.downsample is not None:
            stage.downsample = QDownsample(stage.downsample, make, previous)
            if backbone.out_after_downsample:
                previous = stage.downsample.residual_act
        norm = getattr(backbone, f'norm{s}', nn.Identity())
        if not isinstance(norm, nn.Identity):
            setattr(backbone, f'norm{s}', QNormAct.wrap(norm, previous, make))


FAMILY = Family(
    (class_path(DaViT),),
    check_davit,
    quantize_davit_,
    covers='window and channel attention, convolutional positions, several `out_indices`, `pad_small_map`',
    refuses='spatial blocks with shifted windows',
)
