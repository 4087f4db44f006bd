"""Quantized twins of MMPretrain's MViTv2: pooled attention with decomposed relative position, multi-scale blocks."""

from __future__ import annotations

from typing import Any

import torch
from mmpretrain.models import MViT
from mmpretrain.models.backbones.mvit import resize_decomposed_rel_pos
from torch import Tensor, nn

from ..layers import QAct
from ..phase import full_precision
from .attention import QAttention, merged
from .common import (
    LayerFactory,
    QNormAct,
    QPatchEmbed,
    check_norm,
    check_patch_embed,
    link,
    linked,
)
from .family import Family, class_path
from .sums import product

__all__ = ['FAMILY', 'QMultiScaleAttention', 'QMultiScaleBlock', 'quantize_mvit_']

Size = tuple[int, int]


class QMultiScaleAttention(QAttention):
    """Attention whose query, key and value are pooled: convolution, then LayerNorm of each head."""

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, make)
        self.scale, self.residual_pooling = attn.scale, attn.residual_pooling
        self.qkv = make.linear(attn.qkv)
        self.qkv_act = make.operand()
        for part in 'qkv':
            pool, norm = getattr(attn, f'pool_{part}'), getattr(attn, f'norm_{part}')
            pool_act = make.norm_input(pool.out_channels)
            setattr(self, f'pool_{part}', make.conv(pool))
            setattr(self, f'pool_{part}_act', pool_act)
            setattr(self, f'norm_{part}', QNormAct.wrap(norm, pool_act, make))
        self.rel_pos_spatial = attn.rel_pos_spatial
        if self.rel_pos_spatial:
            self.rel_pos_h, self.rel_pos_w = attn.rel_pos_h, attn.rel_pos_w
            self.rel_pos_h_act, self.rel_pos_w_act = make.act_of_shared(), make.act_of_shared()
            self.scores_act, self.bias_h_act, self.bias_w_act = make.act(), make.act(), make.act()

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """(B, H W, C) to (B, H' W', C'), and the new height and width."""
        q, k, v = self.split(self.qkv_act(self.qkv(x)), 3)
        q, q_size = self._pooled(q, size, 'q')
        k, k_size = self._pooled(k, size, 'k')
        v, _ = self._pooled(v, size, 'v')
        logits = product(q * self.scale, k.transpose(-2, -1))
        if self.rel_pos_spatial:
            logits = self._add_position(self.scores_act(logits), q, q_size, k_size)
        x = self.attend(logits, v)
        if self.residual_pooling:
            x = x + merged(q)
        return self.project(x), q_size

    def _pooled(self, x: Tensor, size: Size, part: str) -> tuple[Tensor, Size]:
        """(B, heads, H W, D) to (B, heads, H' W', D)."""
        pool, act, norm = (getattr(self, name) for name in (f'pool_{part}', f'pool_{part}_act', f'norm_{part}'))
        y = pool(x.flatten(0, 1).transpose(1, 2).unflatten(2, size).contiguous())  # (B heads, D, H', W')
        tokens = y.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
        return norm(act(tokens)), (y.shape[2], y.shape[3])

    def _add_position(self, scores: Tensor, q: Tensor, q_size: Size, k_size: Size) -> Tensor:
        """Scores (B, heads, N, M) plus the query times the embedding of row and of column distance."""
        rows = self.rel_pos_h_act(resize_decomposed_rel_pos(self.rel_pos_h, q_size[0], k_size[0]))  # (h, h', D)
        columns = self.rel_pos_w_act(resize_decomposed_rel_pos(self.rel_pos_w, q_size[1], k_size[1]))
        q = q.unflatten(2, q_size)  # (B, heads, h, w, D)
        with full_precision(q, rows):
            by_row = self.bias_h_act(torch.einsum('byhwc,hkc->byhwk', q, rows))
            by_column = self.bias_w_act(torch.einsum('byhwc,wkc->byhwk', q, columns))
        bias = by_row.unsqueeze(-1) + by_column.unsqueeze(-2)  # (B, heads, h, w, h', w')
        return scores + bias.flatten(4).flatten(2, 3)


class QMLP(nn.Module):
    """MViT's MLP, which may change the number of channels."""

    def __init__(self, mlp: Any, make: LayerFactory) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = make.linear(mlp.fc1), mlp.act, make.linear(mlp.fc2)
        self.hidden_act, self.out_act = make.act_of(self.act), make.branch(mlp.fc2.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C')."""
        return self.out_act(self.fc2(self.hidden_act(self.fc1(x))))


class QMultiScaleBlock(nn.Module):
    """MViT block, which may halve the grid in its attention and widen the channels in attention or MLP.

    :func:`~fqvit_plugin.blocks.common.link` tells it what quantized its input.
    """

    def __init__(self, block: Any, make: LayerFactory) -> None:
        super().__init__()
        self.norm1, self.norm2 = make.norm(block.norm1), make.norm(block.norm2)
        self.attn = QMultiScaleAttention(block.attn, make)
        self.mlp = QMLP(block.mlp, make)
        self.drop_path, self.pool_skip = block.drop_path, block.pool_skip
        self.dim_mul_in_attention = block.dim_mul_in_attention
        self.proj = None if block.proj is None else make.linear(block.proj)
        self.skip_act = None if block.proj is None else make.act()
        self.input_act: nn.Module = nn.Identity()
        self.norm1_act, self.norm2_act = make.operand(), make.operand()
        self.attn_residual_act = make.norm_input(block.norm2.normalized_shape[0])
        self.residual_act = make.norm_input(block.out_dims)

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """(B, H W, C) to (B, H' W', C'), on the grid of ``residual_act``, and the new height and width."""
        x = self.input_act(x)
        y = self.norm1(x, linked(self), self.norm1_act)
        attended, new_size = self.attn(y, size)
        skip = self._widened(y) if self.dim_mul_in_attention else None
        skip = x if skip is None else skip
        if self.pool_skip is not None:  # the largest of points of a grid is one of them
            skip = self.pool_skip(skip.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        x = self.attn_residual_act(skip + self.drop_path(attended))
        y = self.norm2(x, self.attn_residual_act, self.norm2_act)
        skip = None if self.dim_mul_in_attention else self._widened(y)
        skip = x if skip is None else skip
        return self.residual_act(skip + self.drop_path(self.mlp(y))), new_size

    def _widened(self, normed: Tensor) -> Tensor | None:
        """The shortcut where the number of channels changes, ``None`` where it does not."""
        if self.proj is None or self.skip_act is None:
            return None
        return self.skip_act(self.proj(normed))


def check_mvit(backbone: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    check_patch_embed(backbone.patch_embed)
    for i, block in enumerate(backbone.blocks):
        for path in ('norm1', 'norm2', 'attn.norm_q', 'attn.norm_k', 'attn.norm_v'):
            check_norm(block.get_submodule(path), f'blocks.{i}.{path}')
    for s in backbone.out_scales:
        check_norm(getattr(backbone, f'norm{s}'), f'norm{s}')


def quantize_mvit_(backbone: Any, make: LayerFactory) -> None:
    """Put quantized twins into an MViT that passed :func:`check_mvit`, in place."""
    embed = backbone.patch_embed = QPatchEmbed(backbone.patch_embed, make)
    positioned = backbone.use_abs_pos_embed
    if embed.norm is None:  # without positions it begins the residual stream
        embed.patch_act = (make.branch if positioned else make.norm_input)(backbone.embed_dims)
    previous: QAct = embed.last_act
    for i, block in enumerate(backbone.blocks):
        twin = backbone.blocks[i] = QMultiScaleBlock(block, make)
        if i == 0 and positioned:
            previous = twin.input_act = make.norm_input(backbone.embed_dims)  # patches and positions
        link(twin, previous)
        previous = twin.residual_act
        name = f'norm{backbone.stage_indices.get(i)}'
        if i in backbone.stage_indices and backbone.stage_indices[i] in backbone.out_scales:
            norm = QNormAct.wrap(getattr(backbone, name), previous, make)
            setattr(backbone, name, norm)
            previous = norm.out_act  # MMPretrain's next block reads the normed feature


FAMILY = Family(
    (class_path(MViT),),
    check_mvit,
    quantize_mvit_,
    covers='MViTv2: pooled query, key and value, decomposed relative position, absolute position, residual pooling, '
    'several `out_scales`',
)
