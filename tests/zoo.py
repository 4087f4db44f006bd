"""Tiny models of the families beside ViT, DeiT and Swin, and the variants their configs allow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from .models import CLASSES, SWIN_ARCH, VIT_ARCH, build, vit, vit_backbone

BOTH = dict(out_indices=[0, 1])
SWINV2_ARCH = dict(SWIN_ARCH, extra_norm_every_n_blocks=0)
TWINS_ARCH = dict(
    embed_dims=[24, 48], depths=[2, 3], num_heads=[2, 4], patch_sizes=[4, 2], strides=[4, 2], mlp_ratios=[2, 2],
    sr_ratios=[2, 1],
)  # fmt: skip
MVIT_ARCH = dict(embed_dims=24, num_layers=3, num_heads=1, downscale_indices=[1])


def backbone(base: dict[str, Any], **options: Any) -> nn.Module:
    """A backbone alone; MMPretrain writes into its options, so they are copied."""
    return build(copy.deepcopy(dict(base, **options)))


def pooled(base: dict[str, Any], channels: int, **options: Any) -> nn.Module:
    """A classifier whose backbone gives maps."""
    neck, head = (
        dict(type='GlobalAveragePooling'),
        dict(type='LinearClsHead', num_classes=CLASSES, in_channels=channels),
    )
    return build(copy.deepcopy(dict(type='ImageClassifier', backbone=dict(base, **options), neck=neck, head=head)))


def flat(base: dict[str, Any], **options: Any) -> nn.Module:
    """A classifier whose backbone gives vectors."""
    head = dict(type='LinearClsHead', num_classes=CLASSES, in_channels=48)
    return build(copy.deepcopy(dict(type='ImageClassifier', backbone=dict(base, **options), head=head)))


BEIT = dict(type='BEiTViT', arch=VIT_ARCH, img_size=32, patch_size=8)
EVA02 = dict(type='ViTEVA02', arch=VIT_ARCH, img_size=32, patch_size=8)
SWINV2 = dict(type='SwinTransformerV2', arch=SWINV2_ARCH, img_size=32, window_size=4, out_indices=(1,))
PCPVT = dict(type='PCPVT', arch=TWINS_ARCH, out_indices=(1,), norm_after_stage=[False, True])
SVT = dict(PCPVT, type='SVT', arch=dict(TWINS_ARCH, window_sizes=[3, 3]))
MVIT = dict(type='MViT', arch=MVIT_ARCH, img_size=32)
NO_ABSOLUTE = dict(use_abs_pos_emb=True, use_rel_pos_bias=False)

DAVIT = dict(type='DaViT', arch=dict(SWIN_ARCH, depths=(1, 1)), window_size=4, out_indices=(1,))

#: name -> (how to build it, image size)
ZOO: dict[str, tuple[Callable[[], nn.Module], int | tuple[int, int]]] = {
    'clip': (lambda: vit(pre_norm=True), 32),
    'clip, QuickGELU': (lambda: vit(pre_norm=True, layer_cfgs=dict(act_cfg=dict(type='QuickGELU'))), 32),
    'clip, avg_featmap, another size': (
        lambda: build(vit_backbone(pre_norm=True, out_type='avg_featmap', out_indices=[0, 1])),
        (40, 56),
    ),
    'dinov2 giant': (lambda: vit(layer_scale_init_value=0.5, layer_cfgs=dict(ffn_type='swiglu_fused')), 32),
    'beit': (lambda: flat(BEIT), 32),
    'beit, cls_token': (lambda: backbone(BEIT, out_type='cls_token', **BOTH), 32),
    'beit, cls_token, final norm': (lambda: backbone(BEIT, out_type='cls_token', final_norm=True, **BOTH), 32),
    'beit, avg_featmap, final norm': (lambda: backbone(BEIT, final_norm=True, **BOTH), 32),
    'beit, featmap': (lambda: backbone(BEIT, out_type='featmap', final_norm=True, **BOTH), 32),
    'beit, raw': (lambda: backbone(BEIT, out_type='raw', **BOTH), 32),
    'beit, shared bias': (lambda: flat(BEIT, use_rel_pos_bias=False, use_shared_rel_pos_bias=True), 32),
    'beit, absolute position': (lambda: flat(BEIT, **NO_ABSOLUTE), 32),
    'beit, absolute position, another size': (lambda: flat(BEIT, **NO_ABSOLUTE), (40, 56)),
    'beit, both positions': (lambda: flat(BEIT, use_abs_pos_emb=True), 32),
    'beit, no class token': (lambda: flat(BEIT, with_cls_token=False, **NO_ABSOLUTE), 32),
    'beit, no layer scale': (lambda: flat(BEIT, layer_scale_init_value=0), 32),
    'beit, whole bias': (lambda: flat(BEIT, bias=True), 32),
    'beit, no bias': (lambda: flat(BEIT, bias=False), 32),
    'eva02': (lambda: flat(EVA02, out_type='avg_featmap', final_norm=False), 32),
    'eva02, cls_token': (lambda: backbone(EVA02, **BOTH), 32),
    'eva02, norm in the MLP': (lambda: flat(EVA02, out_type='avg_featmap', sub_ln=True), 32),
    'eva02, featmap': (lambda: backbone(EVA02, out_type='featmap', **BOTH), 32),
    'eva02, raw, no class token': (lambda: backbone(EVA02, out_type='raw', with_cls_token=False, **BOTH), 32),
    'eva02, another size, not square': (lambda: flat(EVA02, out_type='avg_featmap'), (40, 56)),
    'eva02, pre norm': (lambda: flat(EVA02, out_type='avg_featmap', pre_norm=True), 32),
    'swinv2': (lambda: pooled(SWINV2, 48), 32),
    'swinv2, several stages': (lambda: backbone(SWINV2, out_indices=(0, 1)), 32),
    'swinv2, no norm on features': (lambda: backbone(SWINV2, out_indices=(0, 1), norm_cfg=None), 32),
    'swinv2, position embedding, another size': (lambda: pooled(SWINV2, 48, use_abs_pos_embed=True), (40, 56)),
    'swinv2, padded small maps': (lambda: pooled(SWINV2, 48, pad_small_map=True, window_size=5), (40, 36)),
    'swinv2, extra norm': (lambda: pooled(SWINV2, 48, arch=dict(SWINV2_ARCH, extra_norm_every_n_blocks=2)), 32),
    'swinv2, pretrained windows': (lambda: pooled(SWINV2, 48, pretrained_window_sizes=[6, 6]), 32),
    'swinv2, no qkv bias': (
        lambda: pooled(SWINV2, 48, stage_cfgs=dict(block_cfgs=dict(attn_cfgs=dict(qkv_bias=False)))),
        32,
    ),
    'pcpvt': (lambda: pooled(PCPVT, 48), 32),
    'pcpvt, several stages': (lambda: backbone(PCPVT, out_indices=(0, 1), norm_after_stage=True), 32),
    'pcpvt, no norms on features': (lambda: backbone(PCPVT, out_indices=(0, 1), norm_after_stage=False), 32),
    'pcpvt, one block each, qkv bias': (
        lambda: pooled(PCPVT, 48, arch=dict(TWINS_ARCH, depths=[1, 1]), qkv_bias=True),
        32,
    ),
    'pcpvt, a size that needs padding': (lambda: pooled(PCPVT, 48), (38, 50)),
    'svt': (lambda: pooled(SVT, 48), 32),
    'svt, no padding of the windows': (lambda: pooled(SVT, 48), 48),
    'svt, windows padded one way': (lambda: pooled(SVT, 48), (48, 32)),
    'svt, a size that needs padding': (lambda: backbone(SVT, out_indices=(0, 1), norm_after_stage=True), (38, 50)),
    'mvit': (lambda: pooled(MVIT, 48), 32),
    'mvit, several scales': (lambda: backbone(MVIT, out_scales=[0, 1]), 32),
    'mvit, wider in the MLP': (lambda: pooled(MVIT, 48, dim_mul_in_attention=False), 32),
    'mvit, position embedding': (lambda: pooled(MVIT, 48, use_abs_pos_embed=True), 32),
    'mvit, no residual pooling': (lambda: pooled(MVIT, 48, residual_pooling=False, qkv_bias=False), 32),
    'mvit, another size, not square': (lambda: pooled(MVIT, 48), (48, 40)),
    'davit': (lambda: pooled(DAVIT, 48), 32),
    'davit, several stages': (lambda: backbone(DAVIT, arch=SWIN_ARCH, out_indices=(0, 1)), 32),
    'davit, no norm on features': (lambda: backbone(DAVIT, out_indices=(0, 1), norm_cfg=None), 32),
    'davit, another size, padded maps': (lambda: pooled(DAVIT, 48, pad_small_map=True, qkv_bias=False), (24, 40)),
    'davit, out after downsample': (lambda: pooled(DAVIT, 48, out_after_downsample=True), 32),
    'mvit, norm in the patch embedding': (
        lambda: pooled(MVIT, 48, patch_cfg=dict(kernel_size=7, stride=4, padding=3, norm_cfg=dict(type='LN'))),
        32,
    ),
}
