"""Integer programs of MMPretrain's plain ViTs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..blocks.sums import scale_of
from ..blocks.vit import QDeiT3, QEncoderBlock, QMultiheadAttention
from .builder import Builder, Codes
from .common import add_ffn, add_heads, add_patch_embed, merge_heads

__all__ = ['add_vit']


def add_vit(b: Builder, vit: Any, image_size: tuple[int, int]) -> Codes:
    """The backbone, from the image to the features of its last block.

    Raises:
        ValueError: several outputs, or an output type other than ``cls_token`` and ``avg_featmap``.
    """
    if list(vit.out_indices) != [len(vit.layers) - 1]:
        raise ValueError('the integer model has one output: out_indices must name the last block only')
    plain = all(isinstance(layer, QEncoderBlock) for layer in vit.layers)
    if not plain or not isinstance(getattr(vit, 'pre_norm', nn.Identity()), nn.Identity) or vit.pos_embed is None:
        raise ValueError(
            f'{type(vit).__name__}: the integer model covers plain ViT, DeiT and DeiT3, not BEiT or CLIP'
        )
    x, hw = add_patch_embed(b, vit.patch_embed, image_size)
    x, tokens = _add_position(b, vit, x, hw)
    for layer in vit.layers:
        x = _add_block(b, layer, x, tokens)
    return _add_output(b, vit, x, tokens)


def _add_position(b: Builder, vit: Any, x: Codes, hw: tuple[int, int]) -> tuple[Codes, int]:
    path = b.path(vit)
    prefix = torch.cat([p.detach() for p in vit._prefix(1)], dim=1) if vit._prefix(1) else None
    count = 0 if prefix is None else prefix.shape[1]
    patches = hw[0] * hw[1]
    late = isinstance(vit, QDeiT3)  # its class token joins after the position embedding
    with torch.no_grad():
        position = vit._position(hw, 0 if late else vit.num_extra_tokens)
    x = b.regrid(x, vit.embed_dims, vit.embed_act, f'{path}.patch_tokens')
    if prefix is not None and not late:
        tokens = b.codes_of(prefix, vit.embed_act)[0]
        x = b.same_grid(b.emit('prepend', [x.name], b.path(vit.embed_act), {'tokens': tokens}), x)
    name = b.path(vit.residual_act)
    sum_name = f'{path}.positioned' if late and prefix is not None else name
    x = b.add(x, b.constant(position, vit.pos_act, b.path(vit.pos_act)), vit.residual_act, sum_name)
    if prefix is not None and late:
        tokens = b.codes_of(prefix, vit.residual_act)[0]
        x = b.same_grid(b.emit('prepend', [x.name], name, {'tokens': tokens}), x)
    return x, patches + count


def _add_block(b: Builder, block: QEncoderBlock, x: Codes, tokens: int) -> Codes:
    y = b.layernorm(x, block.ln1, block.norm1_act)
    x = b.add(x, _add_attention(b, block.attn, y, tokens), block.attn_residual_act)
    y = b.layernorm(x, getattr(block, block._second_norm), block.norm2_act)
    return b.add(x, add_ffn(b, block.ffn, y), block.residual_act)


def _add_attention(b: Builder, attn: QMultiheadAttention, x: Codes, tokens: int) -> Codes:
    path = b.path(attn)
    qkv = b.linear(x, attn.qkv, attn.qkv_act)
    q, k, v = add_heads(b, qkv, path, tokens, attn.num_heads, attn.head_dims)
    scores = b.matmul(q, k, f'{path}.scores')
    logits = b.affine(scores, b.grid(attn.logits_act), attn.head_dims**-0.5)
    x = b.attend(logits, v, attn.context_act, attn.probs.spec.bit_type.bits, f'{path}.context')
    x = merge_heads(b, x, attn.context_act, tokens, attn.num_heads * attn.head_dims)
    return b.linear(x, attn.proj, attn.proj_act, scale_of(attn.gamma1))


def _add_output(b: Builder, vit: Any, x: Codes, tokens: int) -> Codes:
    path = b.path(vit)
    if vit.out_type == 'cls_token':
        x = b.layout('select', x, f'{path}.class_token', dim=1, index=0)
        return b.layernorm(x, vit.ln1, vit.output_act) if vit.final_norm else x
    if vit.out_type != 'avg_featmap':
        raise ValueError(f'out_type {vit.out_type!r}: the integer model covers cls_token and avg_featmap')
    if vit.final_norm:
        x = b.layernorm(x, vit.ln1, vit.token_act)
    x = b.layout('crop', x, f'{path}.patches_only', dim=1, start=vit.num_extra_tokens, stop=tokens)
    x = b.mean(x, [1], tokens - vit.num_extra_tokens, vit.pooled_act)
    return b.layernorm(x, vit.ln2, vit.output_act)
