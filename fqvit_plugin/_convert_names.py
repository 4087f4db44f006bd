"""What other projects call the tensors of a vision transformer, and what MMPretrain calls them.

A row is written once for all layers: ``{i}`` counts ViT blocks, ``{s}`` Swin stages, ``{n}`` the
stage after ``{s}``, ``{b}`` blocks in a stage, ``{last}`` is the last stage, ``{p}`` is
``weight`` and ``bias``, and ``{x}`` the prefix under which a file puts its backbone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ['FAMILIES', 'Family', 'Row']


@dataclass(frozen=True)
class Row:
    """One source name (or one per layer) and the MMPretrain name it gets."""

    source: str
    target: str
    change: Callable[[Tensor], Tensor] | None = None
    #: Empty: every file must have it. Otherwise all rows of the group are there, or none.
    group: str = ''
    #: Which third of the fused qkv tensor this is.
    part: int | None = None


@dataclass(frozen=True)
class Family:
    """One naming: how to recognise it, how to count its blocks, its rows, and what is no weight."""

    name: str
    #: Matches the start of at least one key; its group 1, if any, is the prefix ``{x}``.
    recognise: re.Pattern[str]
    #: Matches every block key after the prefix: groups are (block,) for ViT, (stage, block) for
    #: Swin.
    block: re.Pattern[str]
    rows: tuple[Row, ...]
    #: Matches keys that carry no weight of the classifier.
    ignored: re.Pattern[str]


def _unfold_order(x: Tensor) -> Tensor:
    """Patch merging's 4C input channels, last axis: from neighbour blocks to ``nn.Unfold``'s order.

    The official Swin concatenates the neighbours (row, column) = (0,0), (1,0), (0,1), (1,1), C
    channels each. timm (``permute(0, 1, 3, 4, 2, 5)``: column before row) and Hugging Face
    (``[0::2, 0::2]``, ``[1::2, 0::2]``, ``[0::2, 1::2]``, ``[1::2, 1::2]``) keep that order.
    MMPretrain unfolds: for each channel the neighbours row by row, (0,0), (0,1), (1,0), (1,1).
    """
    blocks = x.reshape(*x.shape[:-1], 4, -1)  # (..., 4 neighbours, C)
    return blocks[..., [0, 2, 1, 3], :].transpose(-1, -2).reshape(x.shape)


def _transpose(kernel: Tensor) -> Tensor:
    """A JAX dense kernel (in, out) as a torch weight (out, in)."""
    return kernel.reshape(kernel.shape[0], -1).t().contiguous()


def _jax_conv(kernel: Tensor) -> Tensor:
    """A JAX convolution kernel (H, W, in, out) as a torch weight (out, in, H, W)."""
    return kernel.permute(3, 2, 0, 1).contiguous()


def _jax_attention_out(kernel: Tensor) -> Tensor:
    """JAX's output projection (heads, head_dim, out) as a torch weight (out, heads * head_dim)."""
    return kernel.flatten(0, 1).t().contiguous()


_VIT = 'backbone.layers.{i}.'
_SWIN = 'backbone.stages.{s}.blocks.{b}.'
_QKV = ('query', 'key', 'value')

_VIT_TIMM = (
    Row('cls_token', 'backbone.cls_token'),
    Row('pos_embed', 'backbone.pos_embed'),
    Row('patch_embed.proj.{p}', 'backbone.patch_embed.projection.{p}'),
    Row('blocks.{i}.norm1.{p}', _VIT + 'ln1.{p}'),
    Row('blocks.{i}.attn.qkv.weight', _VIT + 'attn.qkv.weight'),
    Row('blocks.{i}.attn.qkv.bias', _VIT + 'attn.qkv.bias', group='qkv bias'),
    Row('blocks.{i}.attn.proj.{p}', _VIT + 'attn.proj.{p}'),
    Row('blocks.{i}.norm2.{p}', _VIT + 'ln2.{p}'),
    Row('blocks.{i}.mlp.fc1.{p}', _VIT + 'ffn.layers.0.0.{p}'),
    Row('blocks.{i}.mlp.fc2.{p}', _VIT + 'ffn.layers.1.{p}'),
    Row('norm.{p}', 'backbone.ln1.{p}'),
    Row('pre_logits.fc.{p}', 'head.layers.pre_logits.{p}', group='pre_logits'),
    Row('head.{p}', 'head.layers.head.{p}', group='head'),
    # DeiT, distilled
    Row('dist_token', 'backbone.dist_token', group='distillation'),
    Row('head_dist.{p}', 'head.layers.head_dist.{p}', group='distillation'),
    # DeiT3: timm's names, then the official ones
    Row('blocks.{i}.ls1.gamma', _VIT + 'attn.gamma1.weight', group='layer scale'),
    Row('blocks.{i}.ls2.gamma', _VIT + 'ffn.gamma2.weight', group='layer scale'),
    Row('blocks.{i}.gamma_1', _VIT + 'attn.gamma1.weight', group='official layer scale'),
    Row('blocks.{i}.gamma_2', _VIT + 'ffn.gamma2.weight', group='official layer scale'),
)

_SWIN_BLOCKS = (
    Row('absolute_pos_embed', 'backbone.absolute_pos_embed', group='absolute position'),
    Row('patch_embed.proj.{p}', 'backbone.patch_embed.projection.{p}'),
    Row('patch_embed.norm.{p}', 'backbone.patch_embed.norm.{p}'),
    Row('layers.{s}.blocks.{b}.norm1.{p}', _SWIN + 'norm1.{p}'),
    Row(
        'layers.{s}.blocks.{b}.attn.relative_position_bias_table',
        _SWIN + 'attn.w_msa.relative_position_bias_table',
    ),
    Row('layers.{s}.blocks.{b}.attn.qkv.weight', _SWIN + 'attn.w_msa.qkv.weight'),
    Row('layers.{s}.blocks.{b}.attn.qkv.bias', _SWIN + 'attn.w_msa.qkv.bias', group='qkv bias'),
    Row('layers.{s}.blocks.{b}.attn.proj.{p}', _SWIN + 'attn.w_msa.proj.{p}'),
    Row('layers.{s}.blocks.{b}.norm2.{p}', _SWIN + 'norm2.{p}'),
    Row('layers.{s}.blocks.{b}.mlp.fc1.{p}', _SWIN + 'ffn.layers.0.0.{p}'),
    Row('layers.{s}.blocks.{b}.mlp.fc2.{p}', _SWIN + 'ffn.layers.1.{p}'),
    Row('norm.{p}', 'backbone.norm{last}.{p}'),
    Row('head.{p}', 'head.fc.{p}', group='head'),
    Row('head.fc.{p}', 'head.fc.{p}', group='timm head'),
)


def _merging(source: str) -> tuple[Row, ...]:
    target = 'backbone.stages.{s}.downsample.'
    return (
        Row(f'{source}.norm.{{p}}', target + 'norm.{p}', _unfold_order),
        Row(f'{source}.reduction.weight', target + 'reduction.weight', _unfold_order),
    )


_JAX_BLOCK = '{x}Transformer/encoderblock_{i}/'
_JAX_ATTENTION = _JAX_BLOCK + 'MultiHeadDotProductAttention_1/'
_VIT_JAX = (
    Row('{x}cls', 'backbone.cls_token'),
    Row('{x}Transformer/posembed_input/pos_embedding', 'backbone.pos_embed'),
    Row('{x}embedding/kernel', 'backbone.patch_embed.projection.weight', _jax_conv),
    Row('{x}embedding/bias', 'backbone.patch_embed.projection.bias'),
    Row(_JAX_BLOCK + 'LayerNorm_0/scale', _VIT + 'ln1.weight'),
    Row(_JAX_BLOCK + 'LayerNorm_0/bias', _VIT + 'ln1.bias'),
    # (in, heads, head_dim) and (heads, head_dim)
    *(
        Row(_JAX_ATTENTION + f'{name}/kernel', _VIT + 'attn.qkv.weight', _transpose, part=k)
        for k, name in enumerate(_QKV)
    ),
    *(
        Row(_JAX_ATTENTION + f'{name}/bias', _VIT + 'attn.qkv.bias', Tensor.flatten, part=k)
        for k, name in enumerate(_QKV)
    ),
    Row(_JAX_ATTENTION + 'out/kernel', _VIT + 'attn.proj.weight', _jax_attention_out),
    Row(_JAX_ATTENTION + 'out/bias', _VIT + 'attn.proj.bias'),
    Row(_JAX_BLOCK + 'LayerNorm_2/scale', _VIT + 'ln2.weight'),
    Row(_JAX_BLOCK + 'LayerNorm_2/bias', _VIT + 'ln2.bias'),
    Row(_JAX_BLOCK + 'MlpBlock_3/Dense_0/kernel', _VIT + 'ffn.layers.0.0.weight', _transpose),
    Row(_JAX_BLOCK + 'MlpBlock_3/Dense_0/bias', _VIT + 'ffn.layers.0.0.bias'),
    Row(_JAX_BLOCK + 'MlpBlock_3/Dense_1/kernel', _VIT + 'ffn.layers.1.weight', _transpose),
    Row(_JAX_BLOCK + 'MlpBlock_3/Dense_1/bias', _VIT + 'ffn.layers.1.bias'),
    Row('{x}Transformer/encoder_norm/scale', 'backbone.ln1.weight'),
    Row('{x}Transformer/encoder_norm/bias', 'backbone.ln1.bias'),
    Row('{x}pre_logits/kernel', 'head.layers.pre_logits.weight', _transpose, group='pre_logits'),
    Row('{x}pre_logits/bias', 'head.layers.pre_logits.bias', group='pre_logits'),
    Row('{x}head/kernel', 'head.layers.head.weight', _transpose, group='head'),
    Row('{x}head/bias', 'head.layers.head.bias', group='head'),
)


def _hf_block(block: str, attention: str, target: str, msa: str, norms: str) -> tuple[Row, ...]:
    """The rows that Hugging Face's ViT, DeiT and Swin blocks share; ``norms`` is ln or norm."""
    return (
        Row(block + 'layernorm_before.{p}', f'{target}{norms}1.{{p}}'),
        *(
            Row(f'{block}attention.{attention}.{name}.weight', f'{target}{msa}.qkv.weight', part=k)
            for k, name in enumerate(_QKV)
        ),
        *(
            Row(
                f'{block}attention.{attention}.{name}.bias',
                f'{target}{msa}.qkv.bias',
                group='qkv bias',
                part=k,
            )
            for k, name in enumerate(_QKV)
        ),
        Row(block + 'attention.output.dense.{p}', f'{target}{msa}.proj.{{p}}'),
        Row(block + 'layernorm_after.{p}', f'{target}{norms}2.{{p}}'),
        Row(block + 'intermediate.dense.{p}', target + 'ffn.layers.0.0.{p}'),
        Row(block + 'output.dense.{p}', target + 'ffn.layers.1.{p}'),
    )


_VIT_HF = (
    Row('{x}embeddings.cls_token', 'backbone.cls_token'),
    Row('{x}embeddings.position_embeddings', 'backbone.pos_embed'),
    Row('{x}embeddings.patch_embeddings.projection.{p}', 'backbone.patch_embed.projection.{p}'),
    *_hf_block('{x}encoder.layer.{i}.', 'attention', _VIT, 'attn', 'ln'),
    Row('{x}layernorm.{p}', 'backbone.ln1.{p}'),
    Row('classifier.{p}', 'head.layers.head.{p}', group='head'),
    Row('{x}embeddings.distillation_token', 'backbone.dist_token', group='distillation'),
    Row('cls_classifier.{p}', 'head.layers.head.{p}', group='distillation'),
    Row('distillation_classifier.{p}', 'head.layers.head_dist.{p}', group='distillation'),
)

_SWIN_HF = (
    Row(
        '{x}embeddings.position_embeddings',
        'backbone.absolute_pos_embed',
        group='absolute position',
    ),
    Row('{x}embeddings.patch_embeddings.projection.{p}', 'backbone.patch_embed.projection.{p}'),
    Row('{x}embeddings.norm.{p}', 'backbone.patch_embed.norm.{p}'),
    *_hf_block('{x}encoder.layers.{s}.blocks.{b}.', 'self', _SWIN, 'attn.w_msa', 'norm'),
    Row(
        '{x}encoder.layers.{s}.blocks.{b}.attention.self.relative_position_bias_table',
        _SWIN + 'attn.w_msa.relative_position_bias_table',
    ),
    *_merging('{x}encoder.layers.{s}.downsample'),
    Row('{x}layernorm.{p}', 'backbone.norm{last}.{p}'),
    Row('classifier.{p}', 'head.fc.{p}', group='head'),
)

# attn_mask and relative_position_index are computed from sizes; a pooler and a mask token belong to
# other tasks than classification; opt/state is JAX's optimizer
_SWIN_BUFFERS = re.compile(r'.*\.(attn_mask|relative_position_index)$')

#: Where two namings match, the one that explains more keys is taken (official and timm Swin).
FAMILIES: tuple[Family, ...] = (
    Family(
        'ViT or DeiT, timm and official names',
        re.compile(r'blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)\.'),
        re.compile(r'blocks\.(\d+)\.'),
        _VIT_TIMM,
        re.compile(r'(?!)'),
    ),
    Family(
        'Swin, official names',
        re.compile(r'layers\.\d+\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)\.'),
        re.compile(r'layers\.(\d+)\.blocks\.(\d+)\.'),
        _SWIN_BLOCKS + _merging('layers.{s}.downsample'),
        _SWIN_BUFFERS,
    ),
    Family(
        'Swin, timm names',
        re.compile(r'layers\.\d+\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)\.'),
        re.compile(r'layers\.(\d+)\.blocks\.(\d+)\.'),
        # timm puts the merging at the start of the next stage
        _SWIN_BLOCKS + _merging('layers.{n}.downsample'),
        _SWIN_BUFFERS,
    ),
    Family(
        'ViT, AugReg npz names (JAX)',
        re.compile(r'(opt/target/)?Transformer/encoderblock_\d+/'),
        re.compile(r'Transformer/encoderblock_(\d+)/'),
        _VIT_JAX,
        re.compile(r'opt/state/'),
    ),
    Family(
        'ViT or DeiT, Hugging Face names',
        re.compile(r'(vit\.|deit\.)?encoder\.layer\.\d+\.attention\.attention\.'),
        re.compile(r'encoder\.layer\.(\d+)\.'),
        _VIT_HF,
        re.compile(r'((vit|deit)\.)?(pooler\.|embeddings\.mask_token$)'),
    ),
    Family(
        'Swin, Hugging Face names',
        re.compile(r'(swin\.)?encoder\.layers\.\d+\.blocks\.\d+\.'),
        re.compile(r'encoder\.layers\.(\d+)\.blocks\.(\d+)\.'),
        _SWIN_HF,
        re.compile(r'.*\.relative_position_index$|(swin\.)?(pooler\.|embeddings\.mask_token$)'),
    ),
)
