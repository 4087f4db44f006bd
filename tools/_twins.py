"""A timm model and MMPretrain's of the same weights, quantized alike: which quantizers are twins, how far apart."""

from __future__ import annotations

import re

from torch import nn

from fqvit_plugin.lifecycle import named_quantizers

#: pattern of a quantizer's name in timm's twins -> the same role in MMPretrain's; applied one after the other
_ROLES = [
    (r'^patch_embed\.proj\.out_act', 'backbone.patch_embed.patch_act'),
    (r'^patch_embed\.norm\.out_act', 'backbone.patch_embed.norm_act'),
    (r'^patch_embed\.proj\.', 'backbone.patch_embed.projection.'),
    (r'^(patch_embed|embed_act|pos_act|residual_act)\b', r'backbone.\1'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'\.mlp\.', '.ffn.'),
    (r'^blocks\.', 'backbone.layers.'),
    (r'\.downsample\.norm\.out_act', '.downsample.norm_act'),
    (r'\.downsample\.reduction\.out_act', '.downsample.residual_act'),
    (r'^layers\.(\d+)\.blocks\.(\d+)\.attn\.', r'backbone.stages.\1.blocks.\2.attn.w_msa.'),
    (r'^layers\.(\d+)\.blocks', r'backbone.stages.\1.blocks'),
    (r'^head\.global_pool\.', 'neck.'),
]


def role(name: str, last: str = 'backbone.output_act') -> str:
    """The name that MMPretrain's twin gives the quantizer ``name`` of a timm twin.

    Args:
        name: below the timm model.
        last: of the final norm's output: ``backbone.norm3.out_act`` in a Swin of four stages.
    """
    for pattern, replacement in _ROLES:
        name = re.sub(pattern, replacement, name)
    if name.startswith('layers.'):  # timm merges at the start of a stage, MMPretrain at the end of the one before
        stage, rest = name.split('.', 2)[1:]
        name = f'backbone.stages.{int(stage) - 1}.{rest}'
    if name.startswith(('head.', 'head_dist.')) and not name.startswith('head.fc.'):
        name = f'head.layers.{name}'
    return name.replace('norm.out_act', last) if name.startswith('norm.') else name


def scale_difference(timms: nn.Module, theirs: nn.Module, last: str = 'backbone.output_act') -> tuple[int, float]:
    """How many scales the two have, one for one, and the largest relative difference between two of them.

    Args:
        timms: quantized and calibrated timm model.
        theirs: the same weights in MMPretrain's classifier, quantized and calibrated alike.
        last: as in :func:`role`.

    Raises:
        ValueError: a quantizer of one has no twin in the other; says which.
    """
    ours = {role(name, last): q for name, q in named_quantizers(timms)}
    expected = dict(named_quantizers(theirs))
    if ours.keys() != expected.keys():
        raise ValueError(f'quantizers without a twin: {", ".join(sorted(ours.keys() ^ expected.keys()))}')
    pairs = [(q, expected[name]) for name, q in ours.items() if hasattr(q, 'scale')]
    return len(pairs), max(float(((a.scale - b.scale) / b.scale).abs().max()) for a, b in pairs)
