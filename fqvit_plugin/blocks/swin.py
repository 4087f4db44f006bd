"""Quantized twins of MMPretrain's Swin: window attention, block, patch merging.

The twins keep the paths and the calls of what they replace: ``stages[s].blocks[b](x, hw_shape)`` and
``stages[s].downsample(x, hw_shape)``.
"""

from __future__ import annotations

from typing import Any

from mmpretrain.models import SwinTransformer
from torch import Tensor, nn

from ..exact import Powers
from ..layers import QAct
from .attention import merged
from .common import (
    QFFN,
    LayerFactory,
    QNormAct,
    QPatchEmbed,
    adaptive_padding_of,
    check_ffn,
    check_norm,
    check_patch_embed,
    link,
    linked,
)
from .family import Family, class_path
from .sums import attended, product, scores, summed

__all__ = ['FAMILY', 'QPatchMerging', 'QPositionedDropout', 'QSwinBlock', 'QWindowMSA', 'quantize_swin_']


class QWindowMSA(nn.Module):
    """Window attention with relative position bias, every product's operands on an integer grid."""

    relative_position_index: Tensor

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.scale = attn.num_heads, attn.window_size, attn.scale
        self.relative_position_bias_table = attn.relative_position_bias_table
        # saved where the float module saves it: MMPretrain's does, timm's does not
        persistent = 'relative_position_index' in attn.state_dict()
        self.register_buffer('relative_position_index', attn.relative_position_index, persistent)
        self.qkv = make.linear(attn.qkv)
        self.attn_drop, self.proj_drop = attn.attn_drop, attn.proj_drop
        self.proj = make.linear(attn.proj)
        self.qkv_act = make.operand()
        self.scores_act = make.act()  # q k^T
        self.bias_table_act = make.act_of_shared()
        self.logits_act = make.act()  # scores and bias
        self.probs = make.softmax()
        self.context_act = make.operand()
        self.proj_act = make.branch(attn.proj.out_features)
        link(self.proj, self.context_act)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(windows B, N, C) to the same; ``mask`` is (windows, N, N), negative across window borders."""
        windows, tokens, _ = x.shape
        qkv = self.qkv_act(self.qkv(x))
        qkv = qkv.reshape(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (windows B, heads, N, D) each
        if self.qkv_act.is_exact:
            products = self.scores_act(scores(q, k, self.qkv_act, self.qkv_act, self.scale))
        else:
            products = self.scores_act(product(q * self.scale, k.transpose(-2, -1)))
        if mask is not None:
            products = products.view(-1, mask.shape[0], *products.shape[1:])  # (B, windows, heads, N, N)
            mask = mask[:, None]
        logits = summed(products, self.scores_act, self._position_bias(tokens), self.bias_table_act)
        probs = self.probs(logits, self.logits_act, mask)
        if isinstance(probs, Powers):
            probs = probs.view(windows, self.num_heads, tokens)
        else:
            probs = self.attn_drop(probs.view(windows, self.num_heads, tokens, tokens))
        x = self.context_act(attended(probs, v, self.qkv_act, merged))
        return self.proj_drop(self.proj_act(self.proj(x)))

    def _position_bias(self, tokens: int) -> Tensor:
        table = self.bias_table_act(self.relative_position_bias_table)
        bias = table[self.relative_position_index.view(-1)].view(tokens, tokens, -1)
        return bias.permute(2, 0, 1).contiguous()  # (heads, N, N)


class QSwinBlock(nn.Module):
    """Swin block; :func:`~fqvit_plugin.blocks.common.link` tells it what quantized its input."""

    def __init__(self, block: Any, make: LayerFactory) -> None:
        super().__init__()
        channels = block.norm1.normalized_shape[0]
        self.norm1, self.norm2 = make.norm(block.norm1), make.norm(block.norm2)
        self.attn = block.attn  # windows, shifts and masks stay as they are
        self.attn.w_msa = QWindowMSA(block.attn.w_msa, make)
        self.ffn = QFFN(block.ffn, make)
        self.norm1_act = make.operand()
        self.attn_residual_act = make.norm_input(channels)
        self.norm2_act = make.operand()
        self.residual_act = make.norm_input(channels)
        link(self.attn.w_msa.qkv, self.norm1_act)
        link(self.ffn.hidden_linear, self.norm2_act)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H W, C) to (B, H W, C), on the grid of ``residual_act``."""
        y = self.norm1(x, linked(self), self.norm1_act)
        x = self.attn_residual_act(summed(x, linked(self), self.attn(y, hw_shape), self.attn.w_msa.proj_act))
        y = self.norm2(x, self.attn_residual_act, self.norm2_act)
        return self.residual_act(summed(x, self.attn_residual_act, self.ffn(y), self.ffn.out_act))


class QPatchMerging(nn.Module):
    """mmcv's patch merging: unfold, LayerNorm, reduction."""

    def __init__(self, merging: Any, make: LayerFactory) -> None:
        super().__init__()
        self.in_channels, self.out_channels = merging.in_channels, merging.out_channels
        self.adaptive_padding, self.sampler = adaptive_padding_of(merging), merging.sampler
        self.norm = make.norm(merging.norm)
        self.reduction = make.linear(merging.reduction)
        self.norm_act = make.operand()
        self.residual_act = make.norm_input(merging.out_channels)
        link(self.reduction, self.norm_act)

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """(B, H W, C) to (B, H/2 W/2, C'), on the grid of ``residual_act``, and the new height and width."""
        x, size = self._unfold(x, input_size)
        repeat = self.sampler.kernel_size[0] * self.sampler.kernel_size[1]
        x = self.norm(x, linked(self), self.norm_act, repeat=repeat)
        return self.residual_act(self.reduction(x)), size

    def _unfold(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        batch, _, channels = x.shape
        x = x.view(batch, *input_size, channels).permute(0, 3, 1, 2)  # (B, C, H, W)
        if self.adaptive_padding is not None:
            x = self.adaptive_padding(x)
        kernel, stride, dilation = (getattr(self.sampler, k) for k in ('kernel_size', 'stride', 'dilation'))
        height, width = (
            (x.shape[2 + i] + 2 * self.sampler.padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in range(2)
        )
        # (B, H/2 W/2, 4C), the four neighbours of a channel side by side
        return self.sampler(x).transpose(1, 2), (height, width)


class QPositionedDropout(nn.Module):
    """Quantizes the sum of patches and absolute position embedding, then drops as the float model does."""

    def __init__(self, dropout: Any, residual_act: QAct) -> None:
        super().__init__()
        self.dropout = dropout
        self.residual_act = residual_act

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        return self.dropout(self.residual_act(x))


def check_swin(backbone: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    check_patch_embed(backbone.patch_embed)
    for s, stage in enumerate(backbone.stages):
        if stage.downsample is not None:
            check_norm(stage.downsample.norm, f'stages.{s}.downsample.norm')
        for b, block in enumerate(stage.blocks):
            for path in ('norm1', 'norm2'):
                check_norm(getattr(block, path), f'stages.{s}.blocks.{b}.{path}')
            check_ffn(block.ffn, f'stages.{s}.blocks.{b}.ffn')
    for s in backbone.out_indices:
        if not isinstance(norm := getattr(backbone, f'norm{s}'), nn.Identity):
            check_norm(norm, f'norm{s}')


def quantize_swin_(backbone: Any, make: LayerFactory) -> None:
    """Put quantized twins into a Swin that passed :func:`check_swin`, in place."""
    backbone.patch_embed = QPatchEmbed(backbone.patch_embed, make)
    previous: QAct = backbone.patch_embed.last_act
    if backbone.use_abs_pos_embed:
        channels = backbone.absolute_pos_embed.shape[-1]
        backbone.drop_after_pos = QPositionedDropout(backbone.drop_after_pos, make.norm_input(channels))
        previous = backbone.drop_after_pos.residual_act
    for s, stage in enumerate(backbone.stages):
        for b, block in enumerate(stage.blocks):
            stage.blocks[b] = QSwinBlock(block, make)
            link(stage.blocks[b], previous)
            previous = stage.blocks[b].residual_act
        feature_act = previous
        if stage.downsample is not None:
            stage.downsample = QPatchMerging(stage.downsample, make)
            link(stage.downsample, previous)
            previous = stage.downsample.residual_act
        if s in backbone.out_indices:
            read = previous if getattr(backbone, 'out_after_downsample', False) else feature_act
            norm = getattr(backbone, f'norm{s}')
            if not isinstance(norm, nn.Identity):  # norm_cfg=None: the feature leaves on the grid of `read`
                setattr(backbone, f'norm{s}', QNormAct.wrap(norm, read, make))


FAMILY = Family(
    (class_path(SwinTransformer),),
    check_swin,
    quantize_swin_,
    covers='absolute position embedding, several `out_indices`, `out_after_downsample`, `pad_small_map`',
)
