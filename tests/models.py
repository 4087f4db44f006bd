"""Small MMPretrain models with random weights, images for them, and the ways tests quantize them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from fqvit_plugin.lifecycle import calibrate_, quant
from fqvit_plugin.presets import get_scheme
from fqvit_plugin.surgery import quantize_model_

CLASSES = 7
VIT_ARCH = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96)
SWIN_ARCH = dict(embed_dims=24, depths=(2, 2), num_heads=(2, 4))


def build(cfg: dict[str, Any]) -> nn.Module:
    """The model of ``cfg`` in eval mode, with no parameter left at zero or one, where a mistake would not show."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # DeiT3 of mmpretrain 1.2.0 sets an argument that its own attention deprecates
        warnings.filterwarnings('ignore', 'The `use_layer_scale` in `MultiheadAttention`', UserWarning)
        # BEiT's shared position bias calls meshgrid the old way
        warnings.filterwarnings('ignore', 'torch.meshgrid: in an upcoming release', UserWarning)
        model = MODELS.build(dict(cfg, _scope_='mmpretrain'))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()  # a backbone's eval() returns None
    return model


def vit_backbone(kind: str = 'VisionTransformer', **options: Any) -> dict[str, Any]:
    """Config of a ViT backbone: 32 pixels, 16 patches, two blocks of 48 channels."""
    return dict(dict(type=kind, arch=VIT_ARCH, img_size=32, patch_size=8), **options)


def vit(kind: str = 'VisionTransformer', head: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """A ViT classifier."""
    head = dict(dict(type='VisionTransformerClsHead', num_classes=CLASSES, in_channels=48), **(head or {}))
    return build(dict(type='ImageClassifier', backbone=vit_backbone(kind, **options), head=head))


def vit_with_outlier() -> nn.Module:
    """A ViT whose residual stream has a channel far out and one off zero: its factors reach 128."""
    model: Any = vit()
    with torch.no_grad():
        model.backbone.pos_embed[..., 5] *= 3000
        model.backbone.pos_embed[..., 7] += 20
    return model


def vit_with_escapes() -> nn.Module:
    """A ViT of which two tokens hold a channel of the stream far out, up and down, and one that of a branch."""
    model: Any = vit()
    with torch.no_grad():
        model.backbone.pos_embed[:, 2, 5] += 100
        model.backbone.pos_embed[:, 4, 7] -= 70
        hidden, out = model.backbone.layers[0].ffn.layers[0][0], model.backbone.layers[0].ffn.layers[1]
        hidden.weight[3] = 0  # LayerNorm gives the first one sqrt(48) there
        hidden.weight[3, 5], hidden.bias[3] = 4, -12
        out.weight[:, 3] = 0
        out.weight[9, 3] = 30
    return model


def swin_backbone(**options: Any) -> dict[str, Any]:
    """Config of a Swin backbone: 56 pixels, windows of 7, two stages of two blocks with 24 and 48 channels."""
    return dict(dict(type='SwinTransformer', arch=SWIN_ARCH, img_size=56, out_indices=(1,)), **options)


def swin(**options: Any) -> nn.Module:
    """A Swin classifier."""
    neck, head = dict(type='GlobalAveragePooling'), dict(type='LinearClsHead', num_classes=CLASSES, in_channels=48)
    return build(dict(type='ImageClassifier', backbone=swin_backbone(**options), neck=neck, head=head))


def images(count: int, size: int | tuple[int, int] = 32, seed: int = 1) -> Tensor:
    """``count`` random images of three channels."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def batches(count: int, size: int | tuple[int, int] = 32, per_batch: int = 2) -> list[Tensor]:
    """``count`` different batches of random images."""
    return [images(per_batch, size, seed=10 + i) for i in range(count)]


def quantized(model: nn.Module, data: list[Tensor], **scheme: Any) -> nn.Module:
    """``model`` after surgery and calibration on ``data``, in phase quant."""
    quantize_model_(model, get_scheme(scheme.pop('name', 'fqvit_w8a8_attn4'), **scheme))
    calibrate_(model, data)
    quant(model)
    return model


def features(output: Any) -> list[Tensor]:
    """Every tensor in what a classifier or backbone returned, in order."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for item in output for tensor in features(item)]
