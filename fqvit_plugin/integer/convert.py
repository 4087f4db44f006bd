"""``to_integer(model)``: a calibrated model as an integer program."""

from __future__ import annotations

from typing import Any

from mmpretrain.models import SwinTransformer
from torch import nn

from ..blocks.common import QPooling
from ..blocks.vit import QPlainViT
from ..layers import QIntLayerNorm, QIntSoftmax
from ..lifecycle import phase_of
from ..phase import Phase
from ..surgery import find_classifier
from .builder import Builder
from .common import add_head
from .program import IntegerModel
from .swin import add_swin
from .vit import add_vit

__all__ = ['to_integer']


def to_integer(model: nn.Module, image_size: tuple[int, int] | None = None) -> IntegerModel:
    """An integer model that computes what ``model`` simulates.

    Args:
        model: a calibrated classifier, of preset ``strict`` with LIS and a quantized image.
        image_size: height and width of its images; the backbone's own by default.

    Returns:
        A module on the CPU; it shares nothing with ``model``.

    Raises:
        ValueError: not calibrated, or a part of it has no integer form yet; the message names it.
    """
    classifier: Any = find_classifier(model)
    _check_strict(classifier)
    backbone, head = getattr(classifier, 'backbone', None), getattr(classifier, 'head', None)
    if backbone is None:
        raise ValueError(f'{type(classifier).__name__} is no classifier of MMPretrain, with backbone and head')
    b = Builder(classifier)
    image_size = None if image_size is None else _pair(image_size)
    if isinstance(backbone, QPlainViT):
        if getattr(classifier, 'neck', None) is not None:
            raise ValueError(f'the neck {type(classifier.neck).__name__} has no integer form behind a ViT')
        x = add_vit(b, backbone, image_size or _pair(backbone.img_size))
    elif isinstance(backbone, SwinTransformer):
        image_size = image_size or _pair(backbone.patch_embed.init_input_size)
        x, hw = add_swin(b, backbone, image_size)
        if not isinstance(classifier.neck, QPooling):
            raise ValueError('the integer model takes Swin with GlobalAveragePooling only')
        x = b.mean(x, [1], hw[0] * hw[1], classifier.neck.out_act)
    else:
        raise ValueError(f'{type(backbone).__name__} has no integer form yet; ViT, DeiT and Swin of MMPretrain have')
    image_size = image_size or _pair(backbone.img_size)
    return IntegerModel(b.program(add_head(b, head, x), image_size)).eval()


def _check_strict(model: nn.Module) -> None:
    if phase_of(model) is not Phase.QUANT:
        raise ValueError('call quant(model) first: the integer model computes what the quantized model simulates')
    for name, module in model.named_modules():
        if isinstance(module, QIntSoftmax) and not (module.log_int and module.spec.arithmetic == 'strict'):
            raise ValueError(f'{name} is no strict Log-Int-Softmax: calibrate with preset strict and lis=True')
        if isinstance(module, QIntLayerNorm) and not (module.integer and module.arithmetic == 'strict'):
            raise ValueError(f'{name} is no strict integer LayerNorm: calibrate with preset strict')


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
