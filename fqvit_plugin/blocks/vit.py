"""Quantized twins of MMPretrain's plain ViTs: VisionTransformer, DistilledVisionTransformer, DeiT3.

The twins keep the paths and the call of what they replace: ``backbone.layers[i](x)``.
"""

from __future__ import annotations

from typing import Any

import torch
from mmpretrain.models import DeiT3, DistilledVisionTransformer, VisionTransformer
from mmpretrain.models.backbones.deit3 import DeiT3TransformerEncoderLayer
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor, nn

from ..layers import QAct
from .attention import QSelfAttention
from .common import (
    QFFN,
    LayerFactory,
    QPatchEmbed,
    check_ffn,
    check_norm,
    check_patch_embed,
    link,
    linked,
)
from .family import Family, class_path

__all__ = [
    'FAMILY',
    'QDeiT3',
    'QDistilledVisionTransformer',
    'QEncoderBlock',
    'QMultiheadAttention',
    'QVisionTransformer',
]


class QMultiheadAttention(QSelfAttention):
    """MMPretrain's multi-head self-attention, with layer scale."""

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, attn.head_dims, make)
        self.proj = make.linear(attn.proj)
        self.proj_act = make.act()
        self.proj_drop, self.out_drop, self.gamma1 = attn.proj_drop, attn.out_drop, attn.gamma1
        self.attn_drop = nn.Dropout(attn.attn_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = self.proj_act(self.gamma1(self.proj(self.context(x))))
        return self.out_drop(self.proj_drop(x))


class QEncoderBlock(nn.Module):
    """Pre-norm encoder block; :func:`~fqvit_plugin.blocks.common.link` tells it what quantized its input.

    MMPretrain 1.2.0's DeiT3 block normalizes twice with ``ln1`` and never uses ``ln2``; the twin does as it does.
    """

    def __init__(self, block: Any, make: LayerFactory) -> None:
        super().__init__()
        channels = block.ln1.normalized_shape[0]
        self.ln1, self.ln2 = make.norm(block.ln1), make.norm(block.ln2)
        self.attn = QMultiheadAttention(block.attn, make)
        self.ffn = QFFN(block.ffn, make)
        self.norm1_act = make.act()
        self.attn_residual_act = make.norm_input(channels)
        self.norm2_act = make.act()
        self.residual_act = make.norm_input(channels)
        self._second_norm = 'ln1' if isinstance(block, DeiT3TransformerEncoderLayer) else 'ln2'

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C), on the grid of ``residual_act``."""
        y = self.ln1(x, linked(self), self.norm1_act)
        x = self.attn_residual_act(x + self.attn(y))
        norm = getattr(self, self._second_norm)
        y = norm(x, self.attn_residual_act, self.norm2_act)
        return self.residual_act(x + self.ffn(y))


class QVisionTransformer(VisionTransformer):
    """MMPretrain's VisionTransformer after surgery; made by :func:`quantize_vit_`, not constructed."""

    embed_act: QAct  # class token and patches
    pos_act: QAct  # position embedding
    residual_act: QAct  # their sum
    token_act: QAct  # final norm, where the mean of the patches is taken after it
    pooled_act: QAct  # mean of the patches, where the model takes it
    output_act: QAct  # what leaves the backbone

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """(B, 3, H, W) to the features of ``out_indices``, as the float backbone gives them."""
        x, hw = self.patch_embed(x)
        x = self.drop_after_pos(self.residual_act(self._add_position(x, hw)))
        outs = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            normed = i == len(self.layers) - 1 and self.final_norm
            if i in self.out_indices:
                outs.append(self._features(x, hw, normed))
        return tuple(outs)

    def _prefix(self, batch: int) -> list[Tensor]:
        return [] if self.cls_token is None else [self.cls_token.expand(batch, -1, -1)]

    def _position(self, hw: tuple[int, int], extra_tokens: int) -> Tensor:
        position = resize_pos_embed(self.pos_embed, self.patch_resolution, hw, self.interpolate_mode, extra_tokens)
        return self.pos_act(position)

    def _add_position(self, patches: Tensor, hw: tuple[int, int]) -> Tensor:
        tokens = self.embed_act(torch.cat((*self._prefix(len(patches)), patches), dim=1))
        return tokens + self._position(hw, self.num_extra_tokens)

    def _features(self, x: Tensor, hw: tuple[int, int], normed: bool) -> Tensor | tuple[Tensor, ...]:
        residual = self.layers[-1].residual_act
        if self.out_type == 'avg_featmap':
            return self._mean_features(x, residual, normed)
        # Picked before the norm, so that the range observed is that of the tokens the head will see.
        features = self._format_output(x, hw)
        if not normed:
            return features
        if isinstance(features, tuple):
            return self.ln1(torch.stack(features), residual, self.output_act).unbind(0)
        if self.out_type == 'featmap':  # (B, C, H, W)
            return self.ln1(features.movedim(1, -1), residual, self.output_act).movedim(-1, 1)
        return self.ln1(features, residual, self.output_act)

    def _mean_features(self, x: Tensor, residual: QAct, normed: bool) -> Tensor:
        if normed:
            x = self.ln1(x, residual, self.token_act)
        pooled = self.pooled_act(x[:, self.num_extra_tokens :].mean(dim=1))
        return self.ln2(pooled, self.pooled_act, self.output_act)


class QDistilledVisionTransformer(QVisionTransformer, DistilledVisionTransformer):
    """MMPretrain's DistilledVisionTransformer after surgery."""

    def _prefix(self, batch: int) -> list[Tensor]:
        return [token.expand(batch, -1, -1) for token in (self.cls_token, self.dist_token)]


class QDeiT3(QVisionTransformer, DeiT3):
    """MMPretrain's DeiT3 after surgery: the class token joins after the position embedding."""

    def _add_position(self, patches: Tensor, hw: tuple[int, int]) -> Tensor:
        tokens = self.embed_act(patches) + self._position(hw, 0)
        return torch.cat((*self._prefix(len(patches)), tokens), dim=1)


#: float backbone -> its class after surgery
TWINS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: QVisionTransformer,
    DistilledVisionTransformer: QDistilledVisionTransformer,
    DeiT3: QDeiT3,
}


def check_vit(backbone: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    if not isinstance(getattr(backbone, 'pre_norm', nn.Identity()), nn.Identity):
        raise ValueError(f'{type(backbone).__name__} with pre_norm=True (CLIP) is not covered')
    check_patch_embed(backbone.patch_embed)
    for i, layer in enumerate(backbone.layers):
        for path in ('ln1', 'ln2'):
            check_norm(getattr(layer, path), f'layers.{i}.{path}')
        check_ffn(layer.ffn, f'layers.{i}.ffn')
        if getattr(layer.attn, 'v_shortcut', False):
            raise ValueError(f'layers.{i}.attn has a value shortcut, which is not covered')


def quantize_vit_(backbone: Any, make: LayerFactory) -> None:
    """Put quantized twins into a plain ViT that passed :func:`check_vit`, in place."""
    backbone.patch_embed = QPatchEmbed(backbone.patch_embed, make)
    channels = backbone.embed_dims
    backbone.embed_act, backbone.pos_act = make.act(), make.act_of_shared()
    backbone.residual_act = make.norm_input(channels)
    previous = backbone.residual_act
    for i, layer in enumerate(backbone.layers):
        backbone.layers[i] = QEncoderBlock(layer, make)
        link(backbone.layers[i], previous)
        previous = backbone.layers[i].residual_act
    if backbone.final_norm:
        backbone.ln1 = make.norm(backbone.ln1)
    norms_output = backbone.final_norm and len(backbone.layers) - 1 in backbone.out_indices
    if backbone.out_type == 'avg_featmap':
        backbone.ln2 = make.norm(backbone.ln2)
        backbone.pooled_act = make.act()  # one sample per image and channel: too few to choose a factor by
        if norms_output:
            backbone.token_act = make.act()
    if norms_output or backbone.out_type == 'avg_featmap':
        backbone.output_act = make.act()
    backbone.__class__ = TWINS[type(backbone)]


FAMILY = Family(tuple(map(class_path, TWINS)), check_vit, quantize_vit_)
