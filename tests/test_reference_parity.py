"""The ``reference`` preset on MMPretrain's models against the published implementation.

Oracle: scales, zero points, block outputs and logits recorded from its run (shared/golden/README.md, which also says
how far it agrees with itself when its weights are perturbed by 1e-7; the bounds here are a little below that).
"""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest
import torch
from mmpretrain.registry import MODELS

from fqvit_plugin import convert_state_dict
from fqvit_plugin.functional import align
from fqvit_plugin.lifecycle import calibrate_, named_quantizers, quant
from fqvit_plugin.presets import get_scheme
from fqvit_plugin.quantizers import UniformQuantizer
from fqvit_plugin.surgery import quantize_model_

from .shared_data import SHARED, golden

#: The first match turns the start of a recorded module's name into ours ...
PREFIXES = {
    'vit': {r'blocks\.(\d+)\.': r'backbone.layers.\1.', '': ''},
    'swin': {
        r'layers\.(\d+)\.blocks\.(\d+)\.': r'backbone.stages.\1.blocks.\2.',
        r'layers\.(\d+)\.': r'backbone.stages.\1.',
        '': '',
    },
}
_MLP = {
    'mlp.fc1': 'ffn.layers.0.0',
    'mlp.qact1': 'ffn.hidden_act',
    'mlp.fc2': 'ffn.layers.1',
    'mlp.qact2': 'ffn.out_act',
}
#: ... and this the rest, inside a block or, where no prefix matched, in the whole model.
BLOCK_ROLES = {
    'vit': {
        'qact1': 'norm1_act',
        'attn.qkv': 'attn.qkv',
        'attn.qact1': 'attn.qkv_act',
        'attn.qact_attn1': 'attn.logits_act',
        'attn.log_int_softmax': 'attn.probs',
        'attn.qact2': 'attn.context_act',
        'attn.proj': 'attn.proj',
        'attn.qact3': 'attn.proj_act',
        'qact2': 'attn_residual_act',
        'qact3': 'norm2_act',
        **_MLP,
        'qact4': 'residual_act',
    },
    'swin': {
        'qact1': 'norm1_act',
        'attn.qkv': 'attn.w_msa.qkv',
        'attn.qact1': 'attn.w_msa.qkv_act',
        'attn.qact_attn1': 'attn.w_msa.scores_act',
        'attn.qact_table': 'attn.w_msa.bias_table_act',
        'attn.qact2': 'attn.w_msa.logits_act',
        'attn.log_int_softmax': 'attn.w_msa.probs',
        'attn.qact3': 'attn.w_msa.context_act',
        'attn.proj': 'attn.w_msa.proj',
        'attn.qact4': 'attn.w_msa.proj_act',
        'qact2': 'attn_residual_act',
        'qact3': 'norm2_act',
        **_MLP,
        'qact4': 'residual_act',
        'downsample.qact1': 'downsample.norm_act',
        'downsample.reduction': 'downsample.reduction',
        'downsample.qact2': 'downsample.residual_act',
    },
}
MODEL_ROLES = {
    'vit': {
        'qact_input': 'backbone.patch_embed.input_act',
        'patch_embed.proj': 'backbone.patch_embed.projection',
        'patch_embed.qact': 'backbone.patch_embed.patch_act',
        'qact_embed': 'backbone.embed_act',
        'qact_pos': 'backbone.pos_act',
        'qact1': 'backbone.residual_act',
        'qact2': 'backbone.output_act',
        'head': 'head.layers.head',
        'act_out': 'head.layers.head.out_act',
    },
    'swin': {
        'qact_input': 'backbone.patch_embed.input_act',
        'patch_embed.proj': 'backbone.patch_embed.projection',
        'patch_embed.qact_before_norm': 'backbone.patch_embed.patch_act',
        'patch_embed.qact': 'backbone.patch_embed.norm_act',
        'qact2': 'backbone.norm1.out_act',
        'qact3': 'neck.out_act',
        'head': 'head.fc',
        'act_out': 'head.fc.out_act',
    },
}
FAMILIES = ('vit', 'swin')
CASES = [
    (family, case)
    for family in FAMILIES
    if (SHARED / 'golden' / f'{family}_cases.json').is_file()
    for case in json.loads((SHARED / 'golden' / f'{family}_cases.json').read_text())
]
BLOCK_CASES = ('minmax/ptf/lis', 'omse/ptf/lis', 'percentile/ptf/nolis', 'ema/noptf/nolis')

VIT = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=48, num_layers=3, num_heads=3, feedforward_channels=192),
        img_size=32,
        patch_size=8,
    ),
    head=dict(type='VisionTransformerClsHead', num_classes=10, in_channels=48),
)
SWIN = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=24, depths=(2, 2), num_heads=(2, 4)),
        img_size=56,
        out_indices=(1,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=48),
)

recorded = functools.cache(lambda family: golden(f'{family}_cases'))


def tensor(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(value))


def float_model(family: str) -> torch.nn.Module:
    model = MODELS.build(dict({'vit': VIT, 'swin': SWIN}[family], _scope_='mmpretrain'))
    weights = convert_state_dict({k: tensor(v) for k, v in golden(f'{family}_weights').items()})
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all('relative_position_index' in key for key in result.missing_keys)
    return model.eval()


@functools.cache
def quantized(family: str, case: str) -> torch.nn.Module:
    observer, ptf, lis = case.split('/')
    name = 'fqvit_w8a8_attn4' if lis == 'lis' else 'fqvit_w8a8'
    scheme = get_scheme(name, observer=observer, ptf=ptf == 'ptf', lis=lis == 'lis', preset='reference')
    model = float_model(family)
    quantize_model_(model, scheme)
    calibrate_(model, [tensor(recorded(family)[f'calib/{i}']) for i in range(4)])
    quant(model)
    return model


def our_path(family: str, module: str) -> str:
    """Where the layer that was recorded as ``module`` is in our model."""
    pattern, prefix = next((p, to) for p, to in PREFIXES[family].items() if re.match(p, module))
    match = re.match(pattern, module)
    roles = BLOCK_ROLES if pattern else MODEL_ROLES
    return match.expand(prefix) + roles[family][module[match.end() :]]


def our_quantizers(model: torch.nn.Module) -> dict[str, UniformQuantizer]:
    """Uniform quantizers by the path of the layer that owns them."""
    return {n.rpartition('.')[0]: q for n, q in named_quantizers(model) if isinstance(q, UniformQuantizer)}


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_the_float_model_is_the_recorded_one(family):
    logits = float_model(family)(tensor(recorded(family)['test']))
    torch.testing.assert_close(logits, tensor(recorded(family)['logits/float']), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('family', 'case'), CASES)
def test_every_scale_and_zero_point(family, case):
    values = recorded(family)
    ours = our_quantizers(quantized(family, case))
    modules = [k.removeprefix(f'{case}/scale/') for k in values if k.startswith(f'{case}/scale/')]
    paths = {module: our_path(family, module) for module in modules}
    assert set(paths.values()) == set(ours), 'a quantizer that the other side does not have'
    channels = moved = 0
    for module, path in paths.items():
        scale, zero_point = (tensor(values[f'{case}/{kind}/{module}']) for kind in ('scale', 'zero_point'))
        quantizer = ours[path]
        assert torch.equal(quantizer.zero_point, zero_point.to(torch.int32)), module
        ratio = quantizer.scale / scale
        if quantizer.spec.observer == 'ptf':
            factor = ratio.log2().round()
            assert factor.abs().max() <= 1, f'{module}: a factor more than one step away'
            moved, channels = moved + int((factor != 0).sum()), channels + factor.numel()
            ratio = ratio / factor.exp2()
        assert ((ratio - 1).abs() <= 1e-5).all(), f'{module}: scales off by up to {(ratio - 1).abs().max():.1e}'
    assert moved <= 0.005 * channels, f'{moved} of {channels} channels took another power-of-two factor'


def block_call(model, family, module, x):
    """The block's twin on recorded input ``x``, and the quantizer of its output."""
    numbers = [int(n) for n in re.findall(r'\d+', module)]
    backbone = model.backbone
    if family == 'vit':
        block = backbone.layers[numbers[0]]
        return block(x), block.residual_act.quantizer
    side = round(x.shape[1] ** 0.5)
    stage = backbone.stages[numbers[0]]
    if module.endswith('downsample'):
        return stage.downsample(x, (side, side))[0], stage.downsample.residual_act.quantizer
    block = stage.blocks[numbers[1]]
    return block(x, (side, side)), block.residual_act.quantizer


@pytest.mark.parametrize('case', BLOCK_CASES)
@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_block_by_block_on_recorded_inputs(family, case):
    values = recorded(family)
    modules = [k.split('/')[-2] for k in values if k.startswith(f'{case}/block/') and k.endswith('/in')]
    assert len(modules) == {'vit': 3, 'swin': 5}[family]
    for module in modules:
        x, expected = (tensor(values[f'{case}/block/{module}/{end}']) for end in ('in', 'out'))
        y, quantizer = block_call(quantized(family, case), family, module, x)
        steps = ((y - expected) / align(quantizer.scale, y, quantizer.spec.axis)).abs()
        equal, near = (float((steps <= limit).double().mean()) for limit in (0.01, 1.01))
        assert equal >= 0.95, f'{module}: {equal:.2%} of codes equal'
        assert near >= 0.985, f'{module}: {near:.2%} of codes within one step'


@pytest.mark.parametrize(('family', 'case'), CASES)
@torch.no_grad()
def test_logits_are_as_far_from_float_as_the_references(family, case):
    values = recorded(family)
    expected = tensor(values['logits/float'])
    ours = (quantized(family, case)(tensor(values['test'])) - expected).abs().mean()
    theirs = (tensor(values[f'{case}/logits']) - expected).abs().mean()
    assert abs(ours / theirs - 1) <= 0.2, f'mean logit error {ours:.4f}, the reference has {theirs:.4f}'
