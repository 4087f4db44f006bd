"""Surgery: swap the blocks of a float model for quantized twins that share its weights, and report it.

To cover a new backbone, write its twins and their ``FAMILY`` under ``blocks/`` and name it in ``FAMILIES``; outside
this package, call ``register_family``.
"""

from __future__ import annotations

from typing import Any

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmpretrain.models import SwinTransformer
from mmpretrain.models.utils import QuickGELU
from torch import nn

from .blocks import beit, davit, eva02, mvit, swin, swin_dense, swinv2, timm_swin, timm_vit, twins, vit
from .blocks.common import LayerFactory, QLinearAct, QNormAct, QPooling, is_quantized, link
from .blocks.family import Family, class_path, short_name
from .blocks.refused import refusal
from .layers import QAct, QConv2d, QIntLayerNorm, QIntSoftmax, QLinear
from .overrides import apply_overrides_
from .report import LayerEntry, Report, count_bytes
from .scheme import QuantScheme
from .structure import all_or_nothing, note_scheme

__all__ = ['check_model', 'covered_backbones', 'find_classifier', 'quantize_model_', 'register_family']

#: What can be quantized; the first that names the model's class treats it.
FAMILIES: tuple[Family, ...] = (
    vit.FAMILY,
    swin.FAMILY,
    swin_dense.FAMILY,
    beit.FAMILY,
    eva02.FAMILY,
    swinv2.FAMILY,
    twins.FAMILY,
    mvit.FAMILY,
    davit.FAMILY,
    timm_vit.FAMILY,
    timm_swin.FAMILY,
)

#: What users added.
_ADDED: list[Family] = []

#: Wrappers of MMPretrain -> where they keep the model that timm built.
_TIMM_WRAPPERS = {
    'mmpretrain.models.classifiers.timm.TimmClassifier': 'model',
    'mmpretrain.models.backbones.timm_backbone.TIMMBackbone': 'timm_model',
}


def covered_backbones() -> list[str]:
    """Names of the backbones that can be quantized; those of other packages than MMPretrain bear the package's."""
    return [short_name(path) for family in (*FAMILIES, *_ADDED) for path in family.models]


def register_family(family: Family) -> Family:
    """Let surgery treat the models of ``family``; registered again, it takes the place of what was there.

    Raises:
        ValueError: the package covers one of these models itself.
    """
    ours = {path for known in FAMILIES for path in known.models}
    taken = sorted(ours.intersection(family.models))
    if taken:
        raise ValueError(f'{", ".join(taken)}: covered by the package already; subclass it to treat it another way')
    _ADDED[:] = [known for known in _ADDED if not set(known.models).intersection(family.models)]
    _ADDED.append(family)
    return family


def _family_of(backbone: nn.Module) -> Family | None:
    path = class_path(type(backbone))
    return next((family for family in (*FAMILIES, *_ADDED) if path in family.models), None)


def find_classifier(model: Any) -> Any:
    """The classifier inside distributed and test-time-augmentation wrappers."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _find_backbone(classifier: Any) -> Any:
    """What is quantized block by block: a classifier's backbone, or the model inside a wrapper around timm's.

    Raises:
        ValueError: a TIMMBackbone with a neck and head that cannot read it.
    """
    backbone = getattr(classifier, 'backbone', classifier)
    inside = _TIMM_WRAPPERS.get(class_path(type(backbone)))
    if inside is None:
        return backbone
    neck = type(getattr(classifier, 'neck', None)).__name__
    if backbone is not classifier and neck in ('NoneType', 'GlobalAveragePooling'):
        raise ValueError(
            'TIMMBackbone gives all tokens (B, N, C), or maps (B, H, W, C), which this neck and the heads of '
            "MMPretrain cannot read: write model = dict(type='TimmClassifier', model_name=...) instead"
        )
    return getattr(backbone, inside)


def check_model(model: nn.Module) -> Any:
    """The backbone of ``model`` if it can be quantized; changes nothing.

    Raises:
        ValueError: the backbone or a part of it is not covered, or surgery was already done.
    """
    model = find_classifier(model)
    if is_quantized(model):
        raise ValueError('the model is quantized already: build it anew to quantize it another way')
    backbone = _find_backbone(model)
    family = _family_of(backbone)
    if family is None:
        name = short_name(class_path(type(backbone)))
        reason = refusal(backbone)
        why = f': {reason}' if reason else ''
        raise ValueError(f'backbone {name} is not covered{why}. Covered are {", ".join(covered_backbones())}')
    family.check(backbone)
    return backbone


def quantize_model_(model: nn.Module, scheme: QuantScheme) -> Report:
    """Swap the blocks of a classifier, segmentor, detector, backbone or timm model for quantized twins, in place.

    The twins share the float model's parameters. In phase float, where the model is left, it computes what it
    computed before; calibrate it and call ``quant`` to see it quantized.

    Args:
        model: one with a covered ``backbone`` (also inside a wrapper), a covered backbone, or ``TimmClassifier``; a
            timm model is a whole classifier, and its head is quantized too.
        scheme: from :func:`~fqvit_plugin.scheme.get_scheme`.

    Returns:
        What was quantized, and what stays float and why.

    Raises:
        ValueError: the backbone or a part of it is not covered, or an override matches nothing; nothing was
            changed then.
    """
    if not isinstance(scheme, QuantScheme):
        raise ValueError(f'scheme must come from get_scheme(...), got {scheme!r}')
    backbone = check_model(model)
    family = _family_of(backbone)
    assert family is not None
    classifier = find_classifier(model)
    float_bytes = count_bytes(classifier)
    make = LayerFactory(scheme, next(backbone.parameters()).device)
    with all_or_nothing(classifier):
        family.quantize_(backbone, make)
        for module in backbone.modules():
            # NumPy's numbers, from linspace over the depth, would break torch.compile's graphs at every block.
            if hasattr(module, 'drop_prob'):
                module.drop_prob = float(module.drop_prob)
        if classifier is not backbone:
            feature_act = _quantize_neck_(classifier, _output_act(backbone), make)
            _quantize_head_(classifier, feature_act, make)
        apply_overrides_(classifier, scheme)
        note_scheme(classifier, scheme)
    return _report(classifier, scheme, float_bytes)


def _output_act(backbone: Any) -> QAct | None:
    """The quantizer of a backbone's last output, where it is known."""
    if isinstance(backbone, vit.QPlainViT):
        return getattr(backbone, 'output_act', None)
    if isinstance(backbone, SwinTransformer):
        norm = getattr(backbone, f'norm{len(backbone.stages) - 1}', None)
        return norm.out_act if isinstance(norm, QNormAct) else None
    return None


def _quantize_neck_(classifier: Any, feature_act: QAct | None, make: LayerFactory) -> QAct | None:
    """Quantize a pooling; gives the quantizer of what the head will see, where it is known."""
    neck: Any = getattr(classifier, 'neck', None)
    if type(neck).__name__ == 'GlobalAveragePooling':
        classifier.neck = QPooling(neck, make, feature_act)
        return classifier.neck.out_act
    return feature_act if neck is None else None


def _quantize_head_(classifier: Any, feature_act: QAct | None, make: LayerFactory) -> None:
    """Quantize the linear layers of the heads we know: ``fc``, or ``layers`` of the ViT heads."""
    head: Any = getattr(classifier, 'head', None)
    fc, layers = getattr(head, 'fc', None), getattr(head, 'layers', None)
    if isinstance(fc, nn.Linear):
        head.fc = QLinearAct.wrap(fc, make)
        link(head.fc, feature_act)
    elif isinstance(layers, nn.Sequential):
        for name, layer in layers.named_children():
            if isinstance(layer, nn.Linear):
                twin = QLinearAct.wrap(layer, make)
                link(twin, feature_act)
                feature_act = twin.out_act
                setattr(layers, name, twin)
            elif name == 'act':  # after pre_logits: its output is the classifier's input
                feature_act = make.act()
                setattr(layers, name, nn.Sequential(layer, feature_act))


#: Float layers worth a line in the report.
_COMPUTES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
_KINDS = (QConv2d, QLinear, QAct, QIntLayerNorm, QIntSoftmax)


def _report(model: nn.Module, scheme: QuantScheme, float_bytes: int) -> Report:
    entries = []
    left_float = _float_parts(model)
    parts = tuple(left_float)
    for name, module in model.named_modules():
        if name.startswith(tuple(f'{part}.' for part in parts)) or name in parts:
            continue
        kind = next((k for k in _KINDS if isinstance(module, k)), None)
        if kind is not None:
            entries.append(LayerEntry(name, kind.__name__, _bits(module, scheme)))
        reason = _why_float(module, kind, scheme)
        if reason:
            left_float[name] = reason
    return Report(scheme, tuple(entries), left_float, float_bytes, count_bytes(model))


def _float_parts(model: nn.Module) -> dict[str, str]:
    """Parts beside the backbone without a Q layer, such as a decode head: one reason each, not one for each layer."""
    reasons = {}
    for name, part in model.named_children():
        count = sum(isinstance(m, _COMPUTES) for m in part.modules())
        if name != 'backbone' and count > 1 and not is_quantized(part) and hasattr(model, 'backbone'):
            reasons[name] = f"{type(part).__name__}'s {count} layers: FQ-ViT's blocks are in the backbone"
    return reasons


def _bits(module: Any, scheme: QuantScheme) -> str:
    if isinstance(module, QIntLayerNorm):
        return 'integer' if module.integer else 'float'
    if isinstance(module, QIntSoftmax):
        return module.spec.bit_type.name
    quantizer = module.quantizer if isinstance(module, QAct) else module.weight_quantizer
    return str(quantizer.code_name)


def _why_float(module: Any, kind: type | None, scheme: QuantScheme) -> str | None:
    """Why a module computes in float, or None when it does not or computes nothing."""
    if kind is QIntLayerNorm and not module.integer:
        return 'LayerNorm is float without PTF in the reference preset; its output is quantized'
    if kind is QIntSoftmax and not module.log_int:
        return 'softmax is float without LIS; its output is quantized'
    if kind is not None:
        return None
    if reason := getattr(module, 'why_float', None):
        return str(reason)
    if isinstance(module, (nn.GELU, nn.Tanh, nn.ReLU, nn.SiLU, QuickGELU)):
        return 'the activation function is float; its output is quantized'
    if isinstance(module, _COMPUTES):
        return f'{type(module).__name__} outside the blocks that are covered'
    return None
