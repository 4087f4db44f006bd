"""Quantized twins of timm's plain ViTs: VisionTransformer (ViT, DeiT, DeiT3, AugReg) and VisionTransformerDistilled.

Roles and order of the quantizers are those of MMPretrain's twins, so both give the same scales.
"""

from __future__ import annotations

from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from ..exact import Exact
from ..layers import QAct
from .attention import QSelfAttention
from .common import LayerFactory, QNormAct, link, linked
from .family import Family, class_path
from .sums import joined, layer_scaled, mean, on_grid, summed
from .timm_common import (
    QTimmPreNorm,
    check_block_parts,
    check_exactly,
    check_head,
    check_optional_norm,
    check_patch_embed,
    classifier_twin,
    grid_after,
    norm_twin,
    quantize_block_,
    quantize_patch_embed_,
)

__all__ = ['FAMILY', 'QTimmAttention', 'QTimmBlock', 'QTimmVisionTransformer', 'QTimmVisionTransformerDistilled']


class QTimmAttention(QSelfAttention):
    """timm's self-attention, with the norms of query, key and context where the model has them."""

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, attn.head_dim, make)
        self.attn_drop, self.proj_drop = attn.attn_drop, attn.proj_drop
        self.q_norm = norm_twin(attn.q_norm, self.qkv_act, make)
        self.k_norm = norm_twin(attn.k_norm, self.qkv_act, make)
        self.norm = norm_twin(_context_norm(attn), self.context_act, make)
        self.proj = make.linear(attn.proj)
        self.proj_act = make.branch(attn.proj.out_features)
        link(self.proj, grid_after(self.norm, self.context_act))

    def query_and_key_acts(self) -> tuple[QAct, QAct]:
        """The quantizers of queries and keys."""
        return grid_after(self.q_norm, self.qkv_act), grid_after(self.k_norm, self.qkv_act)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) to query, key and value, (B, heads, N, D) each."""
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, layer_scale: nn.Module) -> Tensor:
        """(B, N, C) to (B, N, C); layer scale, which timm's block applies, comes before the last quantizer."""
        x = self.proj(self.norm(self.context(x)))
        return self.proj_drop(self.proj_act(layer_scaled(x, layer_scale)))


def _context_norm(attn: Any) -> nn.Module:
    """The norm before ``proj``, which timm 0.9 does not know."""
    norm: nn.Module = getattr(attn, 'norm', nn.Identity())
    return norm


class QTimmBlock(QTimmPreNorm, Block):
    """timm's block after surgery, with layer scale where the model has it."""

    def attention(self, x: Tensor) -> Tensor:
        """(B, N, C) to the same."""
        return self.attn(x, self.ls1)


#: ``global_pool`` -> what it makes of tokens (B, N, C)
_POOLINGS = {
    'avg': lambda x: x.mean(dim=1),
    'max': lambda x: x.amax(dim=1),
    'avgmax': lambda x: 0.5 * (x.amax(dim=1) + x.mean(dim=1)),
}


class QTimmVisionTransformer(VisionTransformer):
    """timm's VisionTransformer after surgery, a whole classifier; made by :func:`quantize_timm_vit_`.

    The ranges are those of ``forward``: with ``global_pool='token'`` the final norm is calibrated on the class token,
    so that ``forward_features`` clips the other tokens to its range.
    """

    embed_act: QAct  # prefix tokens (class, registers) and patches; with no_embed_class the patches
    pos_act: QAct  # position embedding
    residual_act: QAct  # their sum
    pooled_act: nn.Module  # what the pooling computes; Identity where it only picks
    head_tokens = 1  #: first tokens, which the head reads under ``global_pool='token'``

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits."""
        x = self.blocks(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        if self.global_pool == 'token':
            # Picked before the norm, so that the range observed is that of the tokens the head will see.
            x = x[:, : self.head_tokens]
        return self.forward_head(self.norm(x))

    def _prefix(self, batch: int) -> list[Tensor]:
        tokens = (self.cls_token, self.reg_token)
        return [token.expand(batch, -1, -1) for token in tokens if token is not None]

    def _position(self, patches: Tensor) -> Tensor:
        if not self.dynamic_img_size:
            return self.pos_act(self.pos_embed)
        resampled = resample_abs_pos_embed(
            self.pos_embed,
            new_size=list(patches.shape[1:3]),
            old_size=list(self.patch_embed.grid_size),
            num_prefix_tokens=0 if self.no_embed_class else self.num_prefix_tokens,
        )
        return self.pos_act(resampled)

    def _pos_embed(self, x: Tensor) -> Tensor:
        position, prefix = self._position(x), self._prefix(len(x))
        x = x.flatten(1, -2)  # (B, H', W', C) of a dynamic image size to (B, N, C)
        if self.no_embed_class:
            tokens = self.embed_act(on_grid(x, linked(self.embed_act)))
            positioned = joined(prefix, summed(tokens, self.embed_act, position, self.pos_act))
        else:
            tokens = self.embed_act(joined(prefix, on_grid(x, linked(self.embed_act))))
            positioned = summed(tokens, self.embed_act, position, self.pos_act)
        return self.pos_drop(self.residual_act(positioned))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to logits, or to what the classifier reads."""
        x = self.head_drop(self.fc_norm(self.pooled_act(self._pool(x))))
        return x if pre_logits else self.head(x)

    def _pool(self, x: Tensor) -> Tensor | Exact:
        if self.global_pool == 'token':
            return x[:, 0]
        if not self.global_pool:
            return x
        first = 0 if getattr(self, 'pool_include_prefix', False) else self.num_prefix_tokens
        if self.global_pool == 'avg':
            return mean(x[:, first:], grid_after(self.norm, None), (1,))
        return _POOLINGS[self.global_pool](x[:, first:])


class QTimmVisionTransformerDistilled(QTimmVisionTransformer, VisionTransformerDistilled):
    """timm's distilled DeiT after surgery: two tokens, two classifiers."""

    head_tokens = 2

    def _prefix(self, batch: int) -> list[Tensor]:
        return [token.expand(batch, -1, -1) for token in (self.cls_token, self.dist_token)]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Tokens (B, N, C) to the mean of the logits of both classifiers."""
        return VisionTransformerDistilled.forward_head(self, x, pre_logits)


#: float model -> its class after surgery
TWINS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: QTimmVisionTransformer,
    VisionTransformerDistilled: QTimmVisionTransformerDistilled,
}


def check_timm_vit(model: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    name = type(model).__name__
    if not isinstance(model.norm_pre, nn.Identity):
        raise ValueError(f'{name} with pre_norm=True (CLIP) is not covered')
    if model.pos_embed is None:
        raise ValueError(f"{name} without a position embedding (pos_embed='none') is not covered")
    if model.attn_pool is not None or model.global_pool not in ('', 'token', *_POOLINGS):
        raise ValueError(f'{name} with global_pool={model.global_pool!r}, attention pooling, is not covered')
    check_patch_embed(model.patch_embed)
    for i, block in enumerate(model.blocks):
        check_exactly(block, Block, f'blocks.{i}')
        check_block_parts(block, f'blocks.{i}')
        _check_attention(block.attn, f'blocks.{i}.attn')
    check_optional_norm(model.norm, 'norm')
    check_optional_norm(model.fc_norm, 'fc_norm')
    check_head(model.head, 'head')
    if isinstance(model, VisionTransformerDistilled):
        check_exactly(model.head_dist, nn.Linear, 'head_dist')
        check_norm_before_heads(model)


def check_norm_before_heads(model: Any) -> None:
    """The distilled model's heads read the final norm; without one they would read no grid.

    Raises:
        ValueError: there is none.
    """
    if isinstance(model.norm, nn.Identity):
        raise ValueError(f'{type(model).__name__} without a final norm before its heads is not covered')


def _check_attention(attn: Any, path: str) -> None:
    check_exactly(attn, Attention, path)
    if getattr(attn, 'gate', None) is not None:
        raise ValueError(f'{path} gates its output, which is not covered: a product of two activations in float')
    for norm, value in (('q_norm', attn.q_norm), ('k_norm', attn.k_norm), ('norm', _context_norm(attn))):
        check_optional_norm(value, f'{path}.{norm}')


def quantize_timm_vit_(model: Any, make: LayerFactory) -> None:
    """Put quantized twins into a ViT that passed :func:`check_timm_vit`, in place."""
    patch_act = quantize_patch_embed_(model.patch_embed, make)
    if patch_act is model.patch_embed.proj.out_act:  # no LayerNorm reads it
        patch_act = model.patch_embed.proj.out_act = make.branch(model.embed_dim)
    model.embed_act, model.pos_act = make.branch(model.embed_dim), make.branch_of_shared(model.embed_dim)
    link(model.embed_act, patch_act)
    model.residual_act = make.norm_input(model.embed_dim)
    previous = model.residual_act
    for block in model.blocks:
        previous = quantize_block_(block, QTimmBlock, QTimmAttention(block.attn, make), previous, make)
    model.norm = norm_twin(model.norm, previous, make)
    normed = isinstance(model.norm, QNormAct) or isinstance(model.fc_norm, nn.LayerNorm)
    model.pooled_act = make.act() if model.global_pool in _POOLINGS or not normed else nn.Identity()
    pooled = model.pooled_act if isinstance(model.pooled_act, QAct) else previous
    model.fc_norm = norm_twin(model.fc_norm, pooled, make)
    feature_act = grid_after(model.norm, None) if isinstance(model.pooled_act, nn.Identity) else pooled
    feature_act = grid_after(model.fc_norm, feature_act)
    for head in ('head', 'head_dist'):
        if hasattr(model, head):
            setattr(model, head, classifier_twin(getattr(model, head), make, feature_act))
    model.__class__ = TWINS[type(model)]


FAMILY = Family(
    tuple(map(class_path, TWINS)),
    check_timm_vit,
    quantize_timm_vit_,
    covers="timm's ViT, AugReg, DeiT, DeiT3, DINOv2: [below](#timm)",
    refuses='CLIP, SigLIP, SwiGLU, hybrids: [below](#timm)',
)
