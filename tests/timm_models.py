"""Small timm models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

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
