"""Integer programs of MMPretrain's Swin."""

from __future__ import annotations

from typing import Any

import torch
from mmpretrain.models.utils import ShiftWindowMSA
from torch import Tensor

from ..blocks.common import QNormAct
from ..blocks.swin import QPatchMerging, QSwinBlock
from .builder import Builder, Codes
from .common import add_ffn, add_heads, add_patch_embed, merge_heads

__all__ = ['add_swin']


def add_swin(b: Builder, swin: Any, image_size: tuple[int, int]) -> tuple[Codes, tuple[int, int]]:
    """The backbone, from the image to the (B, H W, C) features of its last stage, with H and W.

    Raises:
        ValueError: several outputs, or an absolute position embedding.
    """
    last = len(swin.stages) - 1
    if list(swin.out_indices) != [last]:
        raise ValueError('the integer model has one output: out_indices must name the last stage only')
    x, hw = add_patch_embed(b, swin.patch_embed, image_size)
    if swin.use_abs_pos_embed:
        raise ValueError('an absolute position embedding in Swin is not covered by the integer model')
    for stage in swin.stages:
        for block in stage.blocks:
            x = _add_block(b, block, x, hw)
        if stage.downsample is not None:
            x, hw = _add_merging(b, stage.downsample, x, hw)
    norm = getattr(swin, f'norm{last}')
    if isinstance(norm, QNormAct):
        x = b.layernorm(x, norm, norm.out_act)
    return x, hw


def _add_block(b: Builder, block: QSwinBlock, x: Codes, hw: tuple[int, int]) -> Codes:
    y = b.layernorm(x, block.norm1, block.norm1_act)
    x = b.add(_add_windows(b, block.attn, y, hw), x, block.attn_residual_act)
    y = b.layernorm(x, block.norm2, block.norm2_act)
    return b.add(x, add_ffn(b, block.ffn, y), block.residual_act)


def _add_windows(b: Builder, attn: Any, x: Codes, hw: tuple[int, int]) -> Codes:
    """Shift, cut into windows, attend, put together again: ShiftWindowMSA's forward."""
    path, (height, width), window = b.path(attn), hw, attn.window_size
    channels = attn.w_msa.qkv.in_features
    shift = attn.shift_size
    if min(hw) == window and not attn.pad_small_map:
        shift = 0
    bottom, right = -height % window, -width % window
    padded = (height + bottom, width + right)
    x = b.layout('reshape', x, f'{path}.map', shape=[-1, height, width, channels])
    if bottom or right:
        x = b.layout('pad_map', x, f'{path}.padded', bottom=bottom, right=right, value=x.single[1])
    if shift:
        x = b.layout('roll', x, f'{path}.shifted', shifts=[-shift, -shift], dims=[1, 2])
    rows, columns = padded[0] // window, padded[1] // window
    x = b.layout('reshape', x, f'{path}.cut', shape=[-1, rows, window, columns, window, channels])
    x = b.layout('permute', x, f'{path}.cut_sorted', dims=[0, 1, 3, 2, 4, 5])
    x = b.layout('reshape', x, f'{path}.windows', shape=[-1, window * window, channels])
    mask = ShiftWindowMSA.get_attn_mask(padded, window, shift)
    x = _add_attention(b, attn.w_msa, x, window * window, mask)
    x = b.layout('reshape', x, f'{path}.out_windows', shape=[-1, rows, columns, window, window, channels])
    x = b.layout('permute', x, f'{path}.out_sorted', dims=[0, 1, 3, 2, 4, 5])
    x = b.layout('reshape', x, f'{path}.out_map', shape=[-1, *padded, channels])
    if attn.shift_size:
        x = b.layout('roll', x, f'{path}.out_shifted', shifts=[shift, shift], dims=[1, 2])
    for dim, stop in ((1, height), (2, width)):
        if stop != padded[dim - 1]:
            x = b.layout('crop', x, f'{path}.cropped{dim}', dim=dim, start=0, stop=stop)
    return b.layout('reshape', x, f'{path}.out', shape=[-1, height * width, channels])


def _add_attention(b: Builder, attn: Any, x: Codes, tokens: int, mask: Tensor | None) -> Codes:
    path, heads = b.path(attn), attn.num_heads
    qkv = b.linear(x, attn.qkv, attn.qkv_act)
    dims = attn.qkv.out_features // 3 // heads
    q, k, v = add_heads(b, qkv, path, tokens, heads, dims)
    scores = b.affine(b.matmul(q, k, f'{path}.products'), b.grid(attn.scores_act), attn.scale)
    with torch.no_grad():
        table = attn.relative_position_bias_table
        bias = table[attn.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
    logits = b.add(scores, b.constant(bias, attn.bias_table_act, f'{path}.position_bias'), attn.logits_act)
    x = b.attend(logits, v, attn.context_act, attn.probs.spec.bit_type.bits, f'{path}.context', mask)
    x = merge_heads(b, x, attn.context_act, tokens, heads * dims)
    return b.linear(x, attn.proj, attn.proj_act)


def _add_merging(b: Builder, merging: QPatchMerging, x: Codes, hw: tuple[int, int]) -> tuple[Codes, tuple[int, int]]:
    """mmcv's patch merging: the 2 x 2 neighbours of a channel side by side, LayerNorm, reduction.

    Raises:
        ValueError: a kernel other than 2 x 2 with stride 2.
    """
    sampler, path = merging.sampler, b.path(merging)
    pairs = [tuple(v) if isinstance(v, (tuple, list)) else (v, v) for v in (sampler.kernel_size, sampler.stride)]
    if pairs != [(2, 2), (2, 2)] or any(_pair(sampler.padding)) or _pair(sampler.dilation) != (1, 1):
        raise ValueError(f'{path} does not merge 2 x 2 patches: not covered by the integer model')
    (height, width), channels = hw, merging.in_channels
    bottom, right = height % 2, width % 2  # AdaptivePadding('corner')
    x = b.layout('reshape', x, f'{path}.map', shape=[-1, height, width, channels])
    if (bottom or right) and merging.adaptive_padding is None:
        raise ValueError(f'{path}: odd maps of {hw} are not covered by the integer model')
    if bottom:
        x = _append_row(b, x, f'{path}.padded1', (height, width, channels))
    if right:
        x = b.layout('permute', x, f'{path}.padded2.turned', dims=[0, 2, 1, 3])
        x = _append_row(b, x, f'{path}.padded2', (width, height + bottom, channels))
        x = b.layout('permute', x, f'{path}.padded', dims=[0, 2, 1, 3])
    height, width = (height + bottom) // 2, (width + right) // 2
    x = b.layout('reshape', x, f'{path}.cut', shape=[-1, height, 2, width, 2, channels])
    x = b.layout('permute', x, f'{path}.cut_sorted', dims=[0, 1, 3, 5, 2, 4])
    x = b.merged(b.emit('reshape', [x.name], f'{path}.merged', shape=[-1, height * width, 4 * channels]), x, 4)
    x = b.layernorm(x, merging.norm, merging.norm_act)
    return b.linear(x, merging.reduction, merging.residual_act), (height, width)


def _append_row(b: Builder, x: Codes, path: str, shape: tuple[int, int, int]) -> Codes:
    """(B, H, W, C) with a row of zeros below, each channel's own: put before the others, then all is rolled."""
    height, width, channels = shape
    x = b.layout('reshape', x, f'{path}.tokens', shape=[-1, height * width, channels])
    zeros = {'tokens': x.zero.expand(width, channels).to(torch.int8)}
    x = b.same_grid(b.emit('prepend', [x.name], f'{path}.prepended', zeros), x)
    x = b.layout('roll', x, f'{path}.rolled', shifts=[-width], dims=[1])
    return b.layout('reshape', x, path, shape=[-1, height + 1, width, channels])


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, value)
