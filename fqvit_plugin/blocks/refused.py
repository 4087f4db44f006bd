"""Backbones of MMPretrain that no family covers, with the reason: what errors and docs/models.md say."""

from __future__ import annotations

from typing import Any

__all__ = ['CONVOLUTIONAL', 'REFUSED', 'REFUSED_OF_TIMM', 'refusal']

_BATCH_NORM = 'its blocks mix convolutions, BatchNorm and attention; PTF and the integer LayerNorm want LayerNorm'
_POOLING = 'it has no attention, and its GroupNorm over a whole map is no LayerNorm over channels'

#: Transformers and what is built like one: class name -> why there is no twin.
REFUSED = {
    'Conformer': f'{_BATCH_NORM}, and its two branches exchange feature maps',
    'EdgeNeXt': 'attention between channels on vectors of length one, next to ConvNeXt blocks',
    'EfficientFormer': _BATCH_NORM,
    'HiViT': 'its first two stages are MLPs on patches of patches, merged by other modules than Swin has',
    'HorNet': 'gated convolutions instead of attention, with its own LayerNorm over feature maps',
    'LeViT': f'{_BATCH_NORM}; LeViT has no LayerNorm at all',
    'MixMIMTransformer': 'its blocks cut windows themselves, and its patch merging is another than Swin has',
    'MlpMixer': 'no attention: a linear layer mixes the tokens, which FQ-ViT says nothing about',
    'MobileViT': _BATCH_NORM,
    'PoolFormer': _POOLING,
    'RIFormer': _POOLING,
    'RevVisionTransformer': 'two residual streams, recomputed in training by an autograd function of its own',
    'T2T_ViT': 'its first stage unfolds tokens through attention with a value shortcut',
    'TIMMBackbone': "MMPretrain's necks and heads cannot read its tokens or maps; `TimmClassifier` is covered",
    'TNT': 'a transformer inside each token of another, on torch attention that has no linear layers to swap',
    'TinyViT': _BATCH_NORM,
    'VAN': 'large convolutions instead of attention, with BatchNorm',
    'ViTSAM': 'windows cut from padded maps inside a ViT, and a convolutional neck with LayerNorm over maps',
    'Vig': 'graph convolutions over nearest neighbours instead of attention, with BatchNorm',
    'PyramidVig': 'graph convolutions over nearest neighbours instead of attention, with BatchNorm',
    'XCiT': 'attention between channels on vectors of length one, and BatchNorm in its local patch interaction',
}

#: Convolutional networks, of which all the same is to be said.
CONVOLUTIONAL = frozenset({
    'AlexNet', 'CSPDarkNet', 'CSPNet', 'CSPResNeXt', 'CSPResNet', 'ConvMixer', 'ConvNeXt', 'DenseNet',
    'EfficientNet', 'EfficientNetV2', 'HRNet', 'InceptionV3', 'LeNet5', 'MobileNetV2', 'MobileNetV3', 'MobileOne',
    'RegNet', 'RepLKNet', 'RepMLPNet', 'RepVGG', 'Res2Net', 'ResNeSt', 'ResNeXt', 'ResNet', 'ResNetV1c', 'ResNetV1d',
    'ResNet_CIFAR', 'SEResNeXt', 'SEResNet', 'ShuffleNetV1', 'ShuffleNetV2', 'SparseConvNeXt', 'SparseResNet', 'VGG',
})  # fmt: skip


#: The same for timm.
REFUSED_OF_TIMM = {
    'SwinTransformerV2': 'no twin is written for timm; MMPretrain has one',
    'Beit': 'its attention adds the bias outside the linear layer and a table of its own: no twin is written yet',
    'Eva': 'rotary positions and SwiGLU: no twin is written for timm; MMPretrain has one (ViTEVA02)',
}


def refusal(backbone: Any) -> str | None:
    """Why ``backbone`` is not covered, where that is known of its class."""
    name = type(backbone).__name__
    if type(backbone).__module__.startswith('timm.'):
        return REFUSED_OF_TIMM.get(name)
    if name in CONVOLUTIONAL:
        return 'it is a convolutional network, and FQ-ViT quantizes vision transformers'
    return REFUSED.get(name)
