"""What NNI's ``config_list`` means for FQ-ViT: its entries become overrides of a scheme, or a clear refusal."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..blocks.common import linked
from ..layers import QAct, QConv2d, QIntLayerNorm, QIntSoftmax, QLinear
from ..scheme import BitType, Override, QuantScheme
from ..structure import Structure
from ..surgery import quantize_model_
from .nni_compat import import_compression

__all__ = ['scheme_of', 'tensors_of']

_INPUT, _OUTPUT = '_input_', '_output_'
_PER_TARGET = ('quant_dtype', 'quant_scheme', 'granularity', 'apply_method', 'fuse_names')

#: end of a layer's path in the float model -> its input's and its output's quantizer, from the block's path on.
#: The first linear layer of an MLP writes into GELU: what is quantized is GELU's output.
_TENSORS: tuple[tuple[str, str | None, str | None], ...] = (
    (r'patch_embed\.projection', 'patch_embed.input_act', 'patch_embed.patch_act'),
    (r'patch_embed\.norm', 'patch_embed.patch_act', 'patch_embed.norm_act'),
    (r'attn\.w_msa\.qkv', 'norm1_act', 'attn.w_msa.qkv_act'),
    (r'attn\.w_msa\.softmax', 'attn.w_msa.logits_act', 'attn.w_msa.probs'),
    (r'attn\.w_msa\.proj', 'attn.w_msa.context_act', 'attn.w_msa.proj_act'),
    (r'attn\.qkv', 'norm1_act', 'attn.qkv_act'),
    (r'attn\.proj', 'attn.context_act', 'attn.proj_act'),
    (r'ffn\.layers\.0\.0', 'norm2_act', 'ffn.hidden_act'),
    (r'ffn\.layers\.0\.1', None, 'ffn.hidden_act'),
    (r'ffn\.layers\.1', 'ffn.hidden_act', 'ffn.out_act'),
    (r'(?:norm|ln)1', None, 'norm1_act'),
    (r'(?:norm|ln)2', 'attn_residual_act', 'norm2_act'),
    (r'downsample\.norm', None, 'downsample.norm_act'),
    (r'downsample\.reduction', 'downsample.norm_act', 'downsample.residual_act'),
    (r'neck', None, 'neck.out_act'),
    (r'head\.fc', 'neck.out_act', None),
    (r'head\.layers\.pre_logits', 'backbone.output_act', None),
    (r'head\.layers\.head(?:_dist)?', 'backbone.output_act', None),
)


def scheme_of(model: nn.Module, config_list: Sequence[Mapping[str, Any]], scheme: QuantScheme) -> QuantScheme:
    """``scheme`` with the bits that NNI's ``config_list`` gives single layers.

    Args:
        model: the float model; it is looked at, and left as it was.
        config_list: NNI's; of two entries that name the same tensor the first holds, as in NNI.
        scheme: everything an NNI config cannot say.

    Raises:
        ValueError: an entry that NNI's schema refuses, selects nothing, or asks for what FQ-ViT does not do.
    """
    nni_config = import_compression().config
    entries = nni_config.trans_legacy_config_list(copy.deepcopy([dict(e) for e in config_list]))
    schema = nni_config.default_config_schema('quantization')
    places = tensors_of(model, scheme)
    chosen: dict[tuple[str, str], int] = {}
    for number, entry in enumerate(entries):
        try:
            schema.validate(entry)
        except Exception as error:  # the schema package's own errors, which derive from Exception alone
            raise ValueError(f'config_list[{number}] is not in the form of NNI: {error}') from None
        try:
            _read_entry(model, entry, places, chosen)
        except ValueError as error:
            raise ValueError(f'config_list[{number}]: {error}') from None
    return dataclasses.replace(scheme, overrides=(*scheme.overrides, *_overrides(chosen)))


def _read_entry(
    model: nn.Module,
    entry: dict[str, Any],
    places: Mapping[str, Mapping[str, str]],
    chosen: dict[tuple[str, str], int],
) -> None:
    """Put the bits of one entry into ``chosen``: (field of an override, path) -> bits."""
    modules, settings, fused = import_compression().config.select_modules_by_config(model, entry)
    if fused:
        raise ValueError('fuse_names: there is nothing to fuse, MMPretrain transformers have no batch norm')
    if not modules:
        raise ValueError('selects no layer of this model')
    for name in [n for n, _ in model.named_modules() if n in modules]:
        known = places.get(name)
        if known is None:
            kind = type(modules[name]).__name__
            raise ValueError(f'{name} ({kind}) is no layer whose tensors FQ-ViT quantizes; such are {_some(places)}')
        explicit = settings.get('target_names')
        for target in explicit or known:
            path = known.get(_first(target))
            if path is None:
                raise ValueError(_no_target(name, target, known))
            own = (settings.get('target_settings') or {}).get(target, {})
            bits = _bits(name, target, {**{k: settings[k] for k in _PER_TARGET if k in settings}, **own}, own)
            if bits is not None:
                chosen.setdefault((_field(path, target), path), bits)


def _first(target: str) -> str:
    """``_input_`` means the first input, as in NNI."""
    return target[:-1] if target in (f'{_INPUT}0', f'{_OUTPUT}0') else target


def _no_target(name: str, target: str, known: Mapping[str, str]) -> str:
    if target == 'bias':
        return f'bias of {name}: FQ-ViT keeps biases in float; leave it out of target_names'
    return f'target {target!r} of {name} is not quantized; FQ-ViT quantizes its {", ".join(known)}'


def _field(path: str, target: str) -> str:
    if target == 'weight':
        return 'weight_bits'
    return 'attn_bits' if path.endswith('.probs') else 'act_bits'


def _bits(name: str, target: str, setting: Mapping[str, Any], own: Mapping[str, Any]) -> int | None:
    """The bits a setting asks for, or None for the scheme's; refuses grids that FQ-ViT does not have.

    Args:
        name: of the layer, for messages.
        target: weight, input or output.
        setting: the entry's keys with the target's own.
        own: the target's own keys alone.
    """
    where = f'{target} of {name}'
    scheme, granularity = setting.get('quant_scheme'), setting.get('granularity', 'default')
    if setting.get('apply_method', 'clamp_round') != 'clamp_round':
        raise ValueError(f'{where}: apply_method {setting["apply_method"]!r}; FQ-ViT has clamp_round only')
    if setting.get('fuse_names'):
        raise ValueError(f'{where}: fuse_names: there is nothing to fuse')
    if target == 'weight':
        if own.get('quant_scheme') == 'affine':  # for a whole entry it is meant for activations
            raise ValueError(f'{where}: weights are symmetric, with zero point 0; leave quant_scheme out')
        if granularity not in ('default', 'out_channel'):
            raise ValueError(f'{where}: weights keep a scale per output channel: granularity out_channel or default')
    else:
        if scheme == 'symmetric':
            raise ValueError(f"{where}: activations have a zero point; write quant_scheme='affine', or leave it out")
        if granularity != 'default':
            raise ValueError(f"{where}: activations keep the scheme's scales, mostly one: granularity default")
    if setting.get('quant_dtype') is None:
        return None
    dtype = BitType.parse(setting['quant_dtype'])
    if target == 'weight' and not dtype.signed:
        raise ValueError(f'{where}: weights are signed: int{dtype.bits}, not {dtype.name}')
    return dtype.bits  # an affine grid of n bits is the same grid whether its codes count from 0 or from -2^(n-1)


def _overrides(chosen: Mapping[tuple[str, str], int]) -> tuple[Override, ...]:
    """One override per field and width; paths are literal."""
    grouped: dict[tuple[str, int], list[str]] = {}
    for (field, path), bits in chosen.items():
        grouped.setdefault((field, bits), []).append(re.sub(r'([\[\]*?])', r'[\1]', path))
    return tuple(Override.parse({'layers': paths, field: bits}) for (field, bits), paths in grouped.items())


def tensors_of(model: nn.Module, scheme: QuantScheme) -> dict[str, dict[str, str]]:
    """Layer of the float model -> its targets -> path of what quantizes each, in the quantized model."""
    floats = [name for name, _ in model.named_modules()]
    before = Structure(model)
    try:
        quantize_model_(model, scheme)
        named = dict(model.named_modules())
        return {name: found for name in floats if (found := _targets(name, named))}
    finally:
        before.restore_()


def _targets(name: str, named: Mapping[str, nn.Module]) -> dict[str, str]:
    """Where the input, the weight and the output of a float layer are quantized, as far as they are."""
    found = {}
    for pattern, source, result in _TENSORS:
        if match := re.fullmatch(rf'(.*?\.)?({pattern})', name):
            prefix = match[1] or ''
            found = {_INPUT: _beside(prefix, source), _OUTPUT: _beside(prefix, result)}
            break
    if f'{name}.out_act' in named:  # classifiers, Swin's output norms
        found[_OUTPUT] = f'{name}.out_act'
    if 'head.layers.pre_logits' in named and name == 'head.layers.head':
        found[_INPUT] = 'head.layers.act.1'
    found.update(_norm_targets(name, named, found))
    if isinstance(named.get(name), (QConv2d, QLinear)):
        found['weight'] = name
    return {
        t: path for t, path in found.items() if isinstance(named.get(path), (QAct, QIntSoftmax, QConv2d, QLinear))
    }


def _beside(prefix: str, path: str | None) -> str:
    """``path`` within the block at ``prefix``; paths of the classifier's own parts are whole already."""
    if path is None or path.startswith(('backbone.', 'head.', 'neck.')):
        return path or ''
    return prefix + path


def _norm_targets(name: str, named: Mapping[str, nn.Module], found: Mapping[str, str]) -> dict[str, str]:
    """A LayerNorm's input is the quantizer that surgery linked it, or its block, to."""
    if not isinstance(named.get(name), QIntLayerNorm):
        return {}
    paths = {id(module): path for path, module in named.items()}
    owner = named[name.rpartition('.')[0]] if name.endswith(('norm', '1', '2')) else named[name]
    linked_module = named[name] if hasattr(named[name], '_input_act') else owner
    targets = {}
    if hasattr(linked_module, '_input_act') and not found.get(_INPUT):
        targets[_INPUT] = paths[id(linked(linked_module))]
    if name == 'backbone.ln1':
        last = max(
            (p for p in named if re.fullmatch(r'backbone\.layers\.\d+', p)), key=lambda p: int(p.split('.')[2])
        )
        out = 'backbone.token_act' if 'backbone.token_act' in named else 'backbone.output_act'
        targets.update({_INPUT: f'{last}.residual_act', _OUTPUT: out})
    elif name == 'backbone.ln2':
        targets.update({_INPUT: 'backbone.pooled_act', _OUTPUT: 'backbone.output_act'})
    return targets


def _some(names: Mapping[str, Any]) -> str:
    return ', '.join([*names][:: max(1, len(names) // 3)][:3])
