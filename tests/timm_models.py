"""Small timm models with random weights, and MMPretrain's of the same weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fqvit_plugin.lifecycle import named_quantizers

CLASSES = 7
VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=CLASSES)
SWIN = dict(img_size=56, patch_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=CLASSES)


def shaken(model: nn.Module) -> nn.Module:
    """``model`` in eval mode with no parameter left at zero or one, where a mistake would not show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _made(cls: type, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return shaken(cls(**options))


def vit(**options: Any) -> nn.Module:
    """32 pixels, 16 patches, two blocks of 48 channels."""
    return _made(VisionTransformer, dict(VIT, **options))


def distilled(**options: Any) -> nn.Module:
    """The same with two tokens and two classifiers."""
    return _made(VisionTransformerDistilled, dict(VIT, **options))


def swin(**options: Any) -> nn.Module:
    """56 pixels, windows of 7, two stages of two blocks with 24 and 48 channels."""
    return _made(SwinTransformer, dict(SWIN, **options))


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
    """How many quantizers the two have, one for one, and the largest relative difference between two scales."""
    ours = {role(name, last): q for name, q in named_quantizers(timms)}
    expected = dict(named_quantizers(theirs))
    assert ours.keys() == expected.keys(), sorted(ours.keys() ^ expected.keys())
    pairs = [(q, expected[name]) for name, q in ours.items() if hasattr(q, 'scale')]
    return len(pairs), max(float(((a.scale - b.scale) / b.scale).abs().max()) for a, b in pairs)
