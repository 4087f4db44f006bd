"""What the ViT and the Swin family share on the way to an integer program: patches, attention, MLP, heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..blocks.common import QFFN, QLinearAct, QPatchEmbed
from ..blocks.sums import scale_of
from ..layers import QAct
from .builder import Builder, Codes

__all__ = ['add_ffn', 'add_head', 'add_heads', 'add_patch_embed', 'merge_heads']


def add_patch_embed(b: Builder, embed: QPatchEmbed, image_size: tuple[int, int]) -> tuple[Codes, tuple[int, int]]:
    """Image to (B, N, C) tokens and the grid they came from.

    Raises:
        ValueError: the scheme does not quantize the image, or the convolution is grouped or dilated.
    """
    if not isinstance(embed.input_act, QAct):
        raise ValueError('the integer model needs a quantized image: calibrate with input_quant=True')
    conv = embed.projection
    if conv.groups != 1 or conv.dilation != (1, 1) or isinstance(conv.padding, str):
        raise ValueError(f'{b.path(conv)} is grouped, dilated or padded by name: not covered by the integer model')
    x = b.quantize(embed.input_act)
    left, right, top, bottom = _padding(embed.adaptive_padding, image_size)
    vertical, horizontal = conv.padding
    padding = (left + horizontal, right + horizontal, top + vertical, bottom + vertical)
    height = (image_size[0] + padding[2] + padding[3] - conv.kernel_size[0]) // conv.stride[0] + 1
    width = (image_size[1] + padding[0] + padding[1] - conv.kernel_size[1]) // conv.stride[1] + 1
    settings = dict(kernel=list(conv.kernel_size), stride=list(conv.stride), padding=list(padding))
    x = b.layout('patches', x, f'{b.path(embed)}.patches', **settings, value=x.single[1])
    x = b.linear(x, conv, embed.patch_act)
    if embed.norm is not None and embed.norm_act is not None:
        x = b.layernorm(x, embed.norm, embed.norm_act)
    return x, (height, width)


def _padding(adaptive: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, right, top and bottom of mmcv's AdaptivePadding."""
    if adaptive is None:
        return 0, 0, 0, 0
    height, width = adaptive.get_pad_shape(size)
    if adaptive.padding == 'corner':
        return 0, width, 0, height
    return width // 2, width - width // 2, height // 2, height - height // 2


def add_heads(b: Builder, qkv: Codes, path: str, tokens: int, heads: int, dims: int) -> tuple[Codes, Codes, Codes]:
    """(B, N, 3C) to queries (B, heads, N, D), transposed keys (B, heads, D, N) and values (B, heads, N, D)."""
    x = b.layout('reshape', qkv, f'{path}.split', shape=[-1, tokens, 3, heads, dims])
    x = b.layout('permute', x, f'{path}.heads', dims=[2, 0, 3, 1, 4])
    q, k, v = (b.layout('select', x, f'{path}.{n}', dim=0, index=i) for i, n in enumerate(('query', 'key', 'value')))
    return q, b.layout('permute', k, f'{path}.key_transposed', dims=[0, 1, 3, 2]), v


def merge_heads(b: Builder, x: Codes, act: QAct, tokens: int, channels: int) -> Codes:
    """(B, heads, N, D) to (B, N, C), under the name of ``act``."""
    x = b.layout('permute', x, f'{x.name}.transposed', dims=[0, 2, 1, 3])
    return b.layout('reshape', x, b.path(act), shape=[-1, tokens, channels])


def add_ffn(b: Builder, ffn: Any, x: Codes) -> Codes:
    """The MLP, without its residual sum.

    Raises:
        ValueError: SwiGLU.
    """
    if not isinstance(ffn, QFFN):
        raise ValueError(f'{b.path(ffn)} is a {type(ffn).__name__}: not covered by the integer model')
    hidden: Any = ffn.layers[0]
    hidden_codes = b.function(b.linear_sums(x, hidden[0]), ffn.hidden_act)
    return b.linear(hidden_codes, ffn.layers[1], ffn.out_act, scale_of(ffn.gamma2))


def add_head(b: Builder, head: Any, x: Codes) -> Codes:
    """The classifier: ``fc``, or the ``layers`` of the ViT heads.

    Raises:
        ValueError: another kind of head.
    """
    if type(head).__name__ in ('LinearClsHead', 'MultiLabelLinearClsHead'):
        return b.linear(x, head.fc, head.fc.out_act)
    layers = getattr(head, 'layers', None)
    if not isinstance(layers, nn.Sequential) or type(head).__name__ != 'VisionTransformerClsHead':
        raise ValueError(f'the head {type(head).__name__} is not covered by the integer model')
    for layer in layers:
        if isinstance(layer, QLinearAct):
            x = b.linear(x, layer, layer.out_act)
        elif isinstance(layer, nn.Sequential):  # the activation after pre_logits, and its quantizer
            act: Any = layer[1]
            x = b.lookup(x, layer[0], act)
        else:
            raise ValueError(f'{b.path(layer)} in the head is not covered by the integer model')
    return x
