"""What a quantized tensor is in a transformer, by its Q layer and its place."""

from __future__ import annotations

import re
from typing import Any

from ..analysis.records import block_of
from ..layers import QConv2d, QIntLayerNorm, QIntSoftmax, QLinear

__all__ = ['KINDS', 'NORM_ARITHMETIC', 'PROBABILITIES', 'WEIGHTS', 'kind_of', 'layer_of']

WEIGHTS = 'weights'
PROBABILITIES = 'probabilities'
NORM_ARITHMETIC = 'LayerNorm arithmetic'

#: End of an activation's path -> its kind; the first that fits.
_ACTIVATIONS = (
    (r'\w*residual_act', 'residual stream'),
    (r'(?:logits|scores|bias_table|bias_[hw]|rel_pos_[hw])_act', 'attention logits'),
    (r'(?:qkv|kv|query|key|cos|sin|pool_[qkv])_act', 'query, key, value'),
    (r'context_act', 'attention context'),
    (r'proj_act', 'attention output'),
    (r'(?:ffn|mlp)\.(?:hidden|gate|value)_act', 'MLP hidden'),
    (r'(?:ffn|mlp)\.out_act', 'MLP output'),
    (r'(?:patch_embeds?(?:\.\d+)?\.)(?:input|patch)_act', 'embedding'),
    (r'(?:embed|pos|position)_act', 'embedding'),
    (r'norm\w*\.out_act|norm\w*_act|token_act|output_act', 'LayerNorm output'),
    (r'(?:head|neck|fc)\..*|pooled_act', 'pooling and head'),
)
_PATTERNS = tuple((re.compile(rf'(?:^|.*\.)(?:{pattern})$'), kind) for pattern, kind in _ACTIVATIONS)
OTHER = 'other activations'

#: Every kind, in the order in which they are told.
KINDS = tuple(dict.fromkeys((WEIGHTS, *(kind for _, kind in _ACTIVATIONS), PROBABILITIES, NORM_ARITHMETIC, OTHER)))


def kind_of(path: str, layer: Any) -> str:
    """The kind of what ``layer`` quantizes: ``'weights'``, ``'residual stream'``, ``'MLP output'``, …"""
    if isinstance(layer, (QConv2d, QLinear)):
        return WEIGHTS
    if isinstance(layer, QIntSoftmax):
        return PROBABILITIES
    if isinstance(layer, QIntLayerNorm):
        return NORM_ARITHMETIC
    return next((kind for pattern, kind in _PATTERNS if pattern.match(path)), OTHER)


def layer_of(path: str) -> str:
    """The part of its block that a tensor belongs to, its attention or its MLP for instance."""
    block = block_of(path)
    inside = path[len(block) + 1 :].split('.')
    return f'{block}.{inside[0]}'
