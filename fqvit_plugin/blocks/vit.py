"""Quantized twins of MMPretrain's plain ViTs: VisionTransformer (CLIP, DINOv2, …), the distilled one, DeiT3.

The twins keep the paths and the call of what they replace: ``backbone.layers[i](x)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmpretrain.models import DeiT3, DistilledVisionTransformer, VisionTransformer
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.backbones.deit3 import DeiT3TransformerEncoderLayer
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor, nn

from ..exact import Exact
from ..layers import QAct
from .attention import QSelfAttention
from .common import (
    QFFN,
    LayerFactory,
    QNormAct,
    QPatchEmbed,
    check_ffn,
    check_norm,
    check_patch_embed,
    link,
    linked,
)
from .family import Family, class_path
from .sums import joined, layer_scaled, mean, on_grid, summed
from .swiglu import QSwiGLU, check_swiglu, is_swiglu

__all__ = [
    'FAMILY',
    'QDeiT3',
    'QDistilledVisionTransformer',
    'QEncoderBlock',
    'QMultiheadAttention',
    'QPlainViT',
    'QVisionTransformer',
    'check_patches_and_norms',
    'quantize_plain_vit_',
]


class QMultiheadAttention(QSelfAttention):
    """MMPretrain's multi-head self-attention, with layer scale."""

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, attn.head_dims, make)
        self.proj = make.linear(attn.proj)
        link(self.proj, self.context_act)
        self.proj_act = make.branch(attn.proj.out_features)
        self.proj_drop, self.out_drop, self.gamma1 = attn.proj_drop, attn.out_drop, attn.gamma1
        self.attn_drop = nn.Dropout(attn.attn_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = self.proj_act(layer_scaled(self.proj(self.context(x)), self.gamma1))
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
        self.ffn = QSwiGLU(block.ffn, make) if is_swiglu(block.ffn) else QFFN(block.ffn, make)
        self.norm1_act = make.operand()
        self.attn_residual_act = make.norm_input(channels)
        self.norm2_act = make.operand()
        self.residual_act = make.norm_input(channels)
        link(self.attn.qkv, self.norm1_act)
        if isinstance(self.ffn, QFFN):
            link(self.ffn.hidden_linear, self.norm2_act)
        self._second_norm = 'ln1' if isinstance(block, DeiT3TransformerEncoderLayer) else 'ln2'

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C), on the grid of ``residual_act``."""
        y = self.ln1(x, linked(self), self.norm1_act)
        x = self.attn_residual_act(summed(x, linked(self), self.attn(y), self.attn.proj_act))
        norm = getattr(self, self._second_norm)
        y = norm(x, self.attn_residual_act, self.norm2_act)
        return self.residual_act(summed(x, self.attn_residual_act, self.ffn(y), self.ffn.out_act))


class QPlainViT(BaseBackbone):
    """The forward of a plain ViT after surgery (abstract): what leaves which block, and how it is normed.

    A twin inherits from this and from its float class, whose ``_format_output`` picks the tokens.
    """

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
        x = self._before_layers(x)
        extras = self._layer_inputs(hw)
        outs = []
        for i, layer in enumerate(self.layers):
            x = layer(x, *extras)
            normed = i == len(self.layers) - 1 and self.final_norm
            if i in self.out_indices:
                outs.append(self._features(x, hw, normed))
        return tuple(outs)

    def _before_layers(self, x: Tensor) -> Tensor:
        return x

    def _layer_inputs(self, hw: tuple[int, int]) -> tuple[Any, ...]:
        """What every block takes besides its tokens."""
        return ()

    def _prefix(self, batch: int) -> list[Tensor]:
        return [] if self.cls_token is None else [self.cls_token.expand(batch, -1, -1)]

    def _position(self, hw: tuple[int, int], extra_tokens: int) -> Tensor:
        position = resize_pos_embed(self.pos_embed, self.patch_resolution, hw, self.interpolate_mode, extra_tokens)
        return self.pos_act(position)

    def _add_position(self, patches: Tensor, hw: tuple[int, int]) -> Tensor | Exact:
        if self.pos_embed is None:  # BEiT: the first quantizer of the class token is residual_act
            return torch.cat((*self._prefix(len(patches)), patches), dim=1)
        tokens = self.embed_act(joined(self._prefix(len(patches)), on_grid(patches, self.patch_embed.last_act)))
        return summed(tokens, self.embed_act, self._position(hw, self.num_extra_tokens), self.pos_act)

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
        token_act = self.token_act if normed else residual
        pooled = self.pooled_act(mean(x[:, self.num_extra_tokens :], token_act, (1,)))
        return self.ln2(pooled, self.pooled_act, self.output_act)


class QVisionTransformer(QPlainViT, VisionTransformer):
    """MMPretrain's VisionTransformer after surgery; made by :func:`quantize_vit_`, not constructed."""

    def _before_layers(self, x: Tensor) -> Tensor:
        return self.pre_norm(x)  # nothing, or CLIP's LayerNorm of the residual stream


class QDistilledVisionTransformer(QPlainViT, DistilledVisionTransformer):
    """MMPretrain's DistilledVisionTransformer after surgery."""

    def _prefix(self, batch: int) -> list[Tensor]:
        return [token.expand(batch, -1, -1) for token in (self.cls_token, self.dist_token)]


class QDeiT3(QPlainViT, DeiT3):
    """MMPretrain's DeiT3 after surgery: the class token joins after the position embedding."""

    def _add_position(self, patches: Tensor, hw: tuple[int, int]) -> Tensor | Exact:
        tokens = self.embed_act(on_grid(patches, self.patch_embed.last_act))
        positioned = summed(tokens, self.embed_act, self._position(hw, 0), self.pos_act)
        return joined(self._prefix(len(patches)), positioned)


#: float backbone -> its class after surgery
TWINS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: QVisionTransformer,
    DistilledVisionTransformer: QDistilledVisionTransformer,
    DeiT3: QDeiT3,
}


def check_patches_and_norms(backbone: Any) -> None:
    """Refuse patch embeddings and norms that :class:`QPlainViT` does not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    check_patch_embed(backbone.patch_embed)
    for i, layer in enumerate(backbone.layers):
        for path in ('ln1', 'ln2') if hasattr(layer, 'ln1') else ('norm1', 'norm2'):
            check_norm(getattr(layer, path), f'layers.{i}.{path}')
    for path in ('ln1', 'ln2', 'pre_norm'):
        if not isinstance(norm := getattr(backbone, path, nn.Identity()), nn.Identity):
            check_norm(norm, path)


def check_vit(backbone: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    pre_norm = getattr(backbone, 'pre_norm', nn.Identity())
    if not isinstance(pre_norm, nn.Identity) and type(backbone) is not VisionTransformer:
        raise ValueError(
            f'{type(backbone).__name__} with pre_norm=True is not covered: MMPretrain builds that norm '
            'and never applies it'
        )
    check_patches_and_norms(backbone)
    for i, layer in enumerate(backbone.layers):
        if is_swiglu(layer.ffn):
            check_swiglu(layer.ffn, f'layers.{i}.ffn')
        else:
            check_ffn(layer.ffn, f'layers.{i}.ffn')
        if getattr(layer.attn, 'v_shortcut', False):
            raise ValueError(f'layers.{i}.attn has a value shortcut, which is not covered')


def quantize_plain_vit_(
    backbone: Any, make: LayerFactory, block_twin: Callable[[Any], nn.Module], twin: type
) -> None:
    """Put quantized twins into a backbone that becomes a :class:`QPlainViT`, in place.

    Args:
        backbone: passed the check of its family.
        make: builds Q layers.
        block_twin: a block's twin, with ``residual_act`` on its output.
        twin: the backbone's class after surgery.
    """
    channels = backbone.embed_dims
    embed = backbone.patch_embed = QPatchEmbed(backbone.patch_embed, make)
    if embed.norm is None:  # a LayerNorm wants scales that are apart by powers of two
        embed.patch_act = make.branch(channels)
    if backbone.pos_embed is not None:
        backbone.embed_act, backbone.pos_act = make.branch(channels), make.branch_of_shared(channels)
    previous = backbone.residual_act = make.norm_input(channels)
    if not isinstance(getattr(backbone, 'pre_norm', nn.Identity()), nn.Identity):
        backbone.pre_norm = QNormAct.wrap(backbone.pre_norm, previous, make)
        previous = backbone.pre_norm.out_act = make.norm_input(channels)  # where the stream begins
    for i, layer in enumerate(backbone.layers):
        backbone.layers[i] = block_twin(layer)
        link(backbone.layers[i], previous)
        previous = backbone.layers[i].residual_act
    _quantize_output_(backbone, make)
    backbone.__class__ = twin


def _quantize_output_(backbone: Any, make: LayerFactory) -> None:
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


def quantize_vit_(backbone: Any, make: LayerFactory) -> None:
    """Put quantized twins into a plain ViT that passed :func:`check_vit`, in place."""
    quantize_plain_vit_(backbone, make, lambda block: QEncoderBlock(block, make), TWINS[type(backbone)])


FAMILY = Family(
    tuple(map(class_path, TWINS)),
    check_vit,
    quantize_vit_,
    covers='ViT, DeiT, MAE, DINO, DINOv2 (SwiGLU) and CLIP (`pre_norm=True`) towers; layer scale; every `out_type`',
)
