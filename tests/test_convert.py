"""Converted weights give the logits that the model they come from gives.

Oracles: timm's own models and its npz loader, the recorded logits of the reference
implementation, and names of other projects written out by hand here from their releases.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from mmpretrain.models.backbones.deit3 import DeiT3TransformerEncoderLayer
from mmpretrain.registry import MODELS

from fqvit_plugin.convert import convert_state_dict, load_checkpoint_file, recognise_family

from .shared_data import golden

CLASSES = 7
IMAGE = {'img_size': 32, 'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3}
ARCH = {'embed_dims': 48, 'num_layers': 2, 'num_heads': 3, 'feedforward_channels': 192}
SWIN = {'img_size': 112, 'embed_dim': 24, 'depths': (2, 1, 2), 'num_heads': (2, 4, 8)}


def perturbed(model):
    """Evaluation mode and no parameter left at zero or one, where a mistake would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def timm_model(name, **kwargs):
    torch.manual_seed(0)
    return perturbed(timm.create_model(name, pretrained=False, num_classes=CLASSES, **kwargs))


def mmpretrain_vit(backbone='VisionTransformer', head='VisionTransformerClsHead', **kwargs):
    head_kwargs = {'hidden_dim': kwargs.pop('hidden_dim')} if 'hidden_dim' in kwargs else {}
    kwargs = {'arch': ARCH, 'img_size': 32, 'patch_size': 8, **kwargs}
    return MODELS.build(
        {
            '_scope_': 'mmpretrain',
            'type': 'ImageClassifier',
            'backbone': {'type': backbone, **kwargs},
            'head': {'type': head, 'in_channels': 48, 'num_classes': CLASSES, **head_kwargs},
        }
    )


def mmpretrain_swin(arch, img_size, channels, classes=CLASSES, **kwargs):
    return MODELS.build(
        {
            '_scope_': 'mmpretrain',
            'type': 'ImageClassifier',
            'backbone': {
                'type': 'SwinTransformer',
                'arch': arch,
                'img_size': img_size,
                'out_indices': (len(arch['depths']) - 1,),
                **kwargs,
            },
            'neck': {'type': 'GlobalAveragePooling'},
            'head': {'type': 'LinearClsHead', 'in_channels': channels, 'num_classes': classes},
        }
    )


def small_swin():
    arch = {'embed_dims': 24, 'depths': [2, 1, 2], 'num_heads': [2, 4, 8]}
    return mmpretrain_swin(arch, 112, 96)


@torch.no_grad()
def assert_same_logits(model, weights, images, expected):
    """``model`` takes exactly these weights (its index buffers aside) and computes ``expected``."""
    result = model.eval().load_state_dict(weights, strict=False)
    missing = [name for name in result.missing_keys if 'relative_position_index' not in name]
    assert missing == []
    assert result.unexpected_keys == []
    assert torch.as_tensor(expected).std() > 0.01, 'constant logits prove nothing'
    torch.testing.assert_close(model(images), torch.as_tensor(expected), rtol=0, atol=1e-4)


def assert_same_as_timm(source, weights, model):
    size = source.patch_embed.img_size[0]
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert_same_logits(model, weights, images, source(images))


@pytest.fixture(scope='module')
def vit():
    return timm_model('vit_tiny_patch16_224', **IMAGE)


@pytest.fixture(scope='module')
def distilled():
    return timm_model('deit_tiny_distilled_patch16_224', **IMAGE)


@pytest.fixture(scope='module')
def swin():
    return timm_model('swin_tiny_patch4_window7_224', **SWIN)


# ---------------------------------------------------------------- timm and official names


def test_timm_vit(vit):
    assert recognise_family(vit.state_dict()) == 'ViT or DeiT, timm and official names'
    assert_same_as_timm(vit, convert_state_dict(vit.state_dict()), mmpretrain_vit())


def test_vit_without_qkv_bias():
    source = timm_model('vit_tiny_patch16_224', qkv_bias=False, **IMAGE)
    model = mmpretrain_vit(qkv_bias=False)
    assert_same_as_timm(source, convert_state_dict(source.state_dict()), model)


def test_backbone_without_classifier_gives_no_head_keys(vit):
    weights = {k: v for k, v in vit.state_dict().items() if not k.startswith('head.')}
    assert all(name.startswith('backbone.') for name in convert_state_dict(weights))


def test_distilled_deit(distilled):
    model = mmpretrain_vit('DistilledVisionTransformer', 'DeiTClsHead')
    assert_same_as_timm(distilled, convert_state_dict(distilled.state_dict()), model)


def deit3_as_published(weights):
    # the official file calls timm's ls1.gamma gamma_1
    return {re.sub(r'\.ls(\d)\.gamma', r'.gamma_\1', name): w for name, w in weights.items()}


# MMPretrain's DeiT3 passes its own attention an argument that this deprecates
@pytest.mark.filterwarnings('ignore:The `use_layer_scale` in `MultiheadAttention`:UserWarning')
@pytest.mark.parametrize('names', [dict, deit3_as_published], ids=['timm', 'official'])
def test_deit3(names, monkeypatch):
    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return self.ffn(self.ln2(x), identity=x)

    # MMPretrain 1.2.0 normalises twice with ln1 and never with ln2; the names are what we test here
    monkeypatch.setattr(DeiT3TransformerEncoderLayer, 'forward', forward)
    source = timm_model('deit3_small_patch16_224', **IMAGE)
    weights = convert_state_dict(names(source.state_dict()))
    assert_same_as_timm(source, weights, mmpretrain_vit('DeiT3'))


def test_deit3_in_the_vision_transformer_class():
    # MMPretrain untouched: a table with a zero row for the class token is DeiT3's table without one
    source = timm_model('deit3_small_patch16_224', **IMAGE)
    weights = convert_state_dict(source.state_dict())
    weights['backbone.pos_embed'] = F.pad(weights['backbone.pos_embed'], (0, 0, 1, 0))
    assert_same_as_timm(source, weights, mmpretrain_vit(layer_scale_init_value=1e-6))


@torch.no_grad()
def test_pre_logits(vit):
    # timm has dropped this layer: its last lines are done by hand
    w, b = torch.randn(32, 48) * 0.2, torch.randn(32)
    head, bias = torch.randn(CLASSES, 32) * 0.2, torch.randn(CLASSES)
    images = torch.randn(3, 3, 32, 32)
    features = vit.forward_head(vit.forward_features(images), pre_logits=True)
    expected = F.linear(torch.tanh(F.linear(features, w, b)), head, bias)
    weights = vit.state_dict() | {
        'pre_logits.fc.weight': w,
        'pre_logits.fc.bias': b,
        'head.weight': head,
        'head.bias': bias,
    }
    model = mmpretrain_vit(hidden_dim=32)
    assert_same_logits(model, convert_state_dict(weights), images, expected)


def test_timm_swin(swin):
    assert recognise_family(swin.state_dict()) == 'Swin, timm names'
    assert_same_as_timm(swin, convert_state_dict(swin.state_dict()), small_swin())


def swin_as_published(weights):
    """The official release: merging ends its stage, plain head, index and mask buffers."""
    published = {}
    for name, tensor in weights.items():
        if match := re.match(r'layers\.(\d)\.downsample\.(.*)', name):
            name = f'layers.{int(match[1]) - 1}.downsample.{match[2]}'
        published[name.replace('head.fc.', 'head.')] = tensor
    published['layers.0.blocks.1.attn_mask'] = torch.zeros(4, 49, 49)
    published['layers.0.blocks.0.attn.relative_position_index'] = torch.zeros(49, 49).long()
    return published


def test_official_swin(swin):
    weights = swin_as_published(swin.state_dict())
    assert recognise_family(weights) == 'Swin, official names'
    assert_same_as_timm(swin, convert_state_dict(weights), small_swin())


def test_patch_merging_order_by_hand():
    # 4C channels with C = 2, entry = 10 * neighbour + channel, neighbours (0,0), (1,0), (0,1),
    # (1,1); nn.Unfold runs through (0,0), (0,1), (1,0), (1,1) for each channel
    from fqvit_plugin._convert_names import _unfold_order

    x = torch.tensor([0, 1, 10, 11, 20, 21, 30, 31])
    assert _unfold_order(x).tolist() == [0, 20, 10, 30, 1, 21, 11, 31]
    assert _unfold_order(x.expand(3, 8))[2].tolist() == [0, 20, 10, 30, 1, 21, 11, 31]


# ---------------------------------------------------------------- the recorded reference


def reference(name):
    weights = {key: torch.from_numpy(value) for key, value in golden(f'{name}_weights').items()}
    cases = golden(f'{name}_cases')
    return convert_state_dict(weights), torch.from_numpy(cases['test']), cases['logits/float']


def test_reference_vit():
    arch = {'embed_dims': 48, 'num_layers': 3, 'num_heads': 3, 'feedforward_channels': 192}
    weights, images, logits = reference('vit')
    model = mmpretrain_vit(arch=arch)
    model.head.layers.head = torch.nn.Linear(48, 10)
    assert_same_logits(model, weights, images, logits)


def test_reference_swin():
    arch = {'embed_dims': 24, 'depths': [2, 2], 'num_heads': [2, 4]}
    weights, images, logits = reference('swin')
    assert_same_logits(mmpretrain_swin(arch, 56, 48, classes=10), weights, images, logits)


# ---------------------------------------------------------------- AugReg npz


def augreg_arrays(pre_logits=False):
    """Random arrays under the names of Google's ViT release: 2 blocks, 3 heads of 16 channels."""
    rng = np.random.default_rng(0)
    shapes = {
        'cls': (1, 1, 48),
        'embedding/kernel': (8, 8, 3, 48),
        'embedding/bias': (48,),
        'Transformer/posembed_input/pos_embedding': (1, 17, 48),
        'Transformer/encoder_norm/scale': (48,),
        'Transformer/encoder_norm/bias': (48,),
        'head/kernel': (48, CLASSES),
        'head/bias': (CLASSES,),
    }
    if pre_logits:
        shapes |= {'pre_logits/kernel': (48, 32), 'pre_logits/bias': (32,)}
        shapes['head/kernel'] = (32, CLASSES)
    for i in range(2):
        block = f'Transformer/encoderblock_{i}/'
        attention = block + 'MultiHeadDotProductAttention_1/'
        for name in ('query', 'key', 'value'):
            shapes[f'{attention}{name}/kernel'] = (48, 3, 16)
            shapes[f'{attention}{name}/bias'] = (3, 16)
        shapes |= {
            attention + 'out/kernel': (3, 16, 48),
            attention + 'out/bias': (48,),
            block + 'MlpBlock_3/Dense_0/kernel': (48, 192),
            block + 'MlpBlock_3/Dense_0/bias': (192,),
            block + 'MlpBlock_3/Dense_1/kernel': (192, 48),
            block + 'MlpBlock_3/Dense_1/bias': (48,),
        }
        for norm in ('LayerNorm_0', 'LayerNorm_2'):
            shapes |= {f'{block}{norm}/scale': (48,), f'{block}{norm}/bias': (48,)}
    return {k: rng.normal(0, 0.2, shape).astype(np.float32) for k, shape in shapes.items()}


@pytest.mark.parametrize('prefix', ['', 'opt/target/'])
def test_augreg_npz_as_timm_reads_it(tmp_path, prefix):
    arrays = {prefix + name: array for name, array in augreg_arrays().items()}
    if prefix:
        arrays['opt/state/step'] = np.array(3)
    np.savez(tmp_path / 'augreg.npz', **arrays)
    source = timm_model('vit_tiny_patch16_224', **IMAGE)
    source.load_pretrained(str(tmp_path / 'augreg.npz'))
    weights = convert_state_dict(load_checkpoint_file(tmp_path / 'augreg.npz'))
    assert_same_as_timm(source, weights, mmpretrain_vit())


@torch.no_grad()
def test_augreg_npz_with_pre_logits(tmp_path):
    arrays = augreg_arrays(pre_logits=True)
    np.savez(tmp_path / 'augreg.npz', **arrays)
    source = timm_model('vit_tiny_patch16_224', **IMAGE)
    source.reset_classifier(0)
    source.load_pretrained(str(tmp_path / 'augreg.npz'))
    images = torch.randn(3, 3, 32, 32)
    hidden = np.tanh(source(images).numpy() @ arrays['pre_logits/kernel'] + arrays['pre_logits/bias'])
    expected = hidden @ arrays['head/kernel'] + arrays['head/bias']
    weights = convert_state_dict(load_checkpoint_file(tmp_path / 'augreg.npz'))
    assert_same_logits(mmpretrain_vit(hidden_dim=32), weights, images, expected)


# ---------------------------------------------------------------- Hugging Face names


HF_BLOCK = {
    'norm1': 'layernorm_before',
    'attn.proj': 'attention.output.dense',
    'norm2': 'layernorm_after',
    'mlp.fc1': 'intermediate.dense',
    'mlp.fc2': 'output.dense',
}


def hf_block(prefix, name, tensor, attention):
    """A timm block tensor under its Hugging Face names, qkv cut into its thirds."""
    layer, _, kind = name.rpartition('.')
    if layer == 'attn.qkv':
        parts = zip(('query', 'key', 'value'), tensor.chunk(3), strict=True)
        return {f'{prefix}.attention.{attention}.{q}.{kind}': part for q, part in parts}
    if kind == 'relative_position_bias_table':
        return {f'{prefix}.attention.self.{kind}': tensor}
    return {f'{prefix}.{HF_BLOCK[layer]}.{kind}': tensor}


def hf_vit(weights, prefix='vit.', head='classifier'):
    names = {
        'cls_token': f'{prefix}embeddings.cls_token',
        'dist_token': f'{prefix}embeddings.distillation_token',
        'pos_embed': f'{prefix}embeddings.position_embeddings',
    }
    layers = {
        'patch_embed.proj': f'{prefix}embeddings.patch_embeddings.projection',
        'norm': f'{prefix}layernorm',
        'head': head,
        'head_dist': 'distillation_classifier',
    }
    renamed = {}
    for name, tensor in weights.items():
        if match := re.match(r'blocks\.(\d+)\.(.*)', name):
            block = f'{prefix}encoder.layer.{match[1]}'
            renamed |= hf_block(block, match[2], tensor, 'attention')
        elif name in names:
            renamed[names[name]] = tensor
        else:
            layer, _, kind = name.rpartition('.')
            renamed[f'{layers[layer]}.{kind}'] = tensor
    return renamed


def hf_swin(weights):
    layers = {
        'patch_embed.proj': 'swin.embeddings.patch_embeddings.projection',
        'patch_embed.norm': 'swin.embeddings.norm',
        'norm': 'swin.layernorm',
        'head.fc': 'classifier',
    }
    renamed = {}
    for name, tensor in weights.items():
        if match := re.match(r'layers\.(\d)\.downsample\.(.*)', name):
            stage = int(match[1]) - 1
            renamed[f'swin.encoder.layers.{stage}.downsample.{match[2]}'] = tensor
        elif match := re.match(r'layers\.(\d)\.blocks\.(\d)\.(.*)', name):
            block = f'swin.encoder.layers.{match[1]}.blocks.{match[2]}'
            renamed |= hf_block(block, match[3], tensor, 'self')
            index = f'{block}.attention.self.relative_position_index'
            renamed[index] = torch.zeros(49, 49).long()
        else:
            layer, _, kind = name.rpartition('.')
            renamed[f'{layers[layer]}.{kind}'] = tensor
    return renamed


@pytest.mark.parametrize('prefix', ['vit.', 'deit.'])
def test_hugging_face_vit(vit, prefix):
    weights = hf_vit(vit.state_dict(), prefix)
    assert recognise_family(weights) == 'ViT or DeiT, Hugging Face names'
    assert_same_as_timm(vit, convert_state_dict(weights), mmpretrain_vit())


def test_hugging_face_backbone_with_pooler(vit):
    # ViTModel saved by itself: no prefix, and a pooler that classification does not use
    weights = {k: v for k, v in vit.state_dict().items() if not k.startswith('head')}
    named = hf_vit(weights, prefix='') | {'pooler.dense.weight': torch.zeros(48, 48)}
    converted = convert_state_dict(named)
    expected = convert_state_dict(weights)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_hugging_face_distilled_deit(distilled):
    weights = hf_vit(distilled.state_dict(), 'deit.', head='cls_classifier')
    model = mmpretrain_vit('DistilledVisionTransformer', 'DeiTClsHead')
    assert_same_as_timm(distilled, convert_state_dict(weights), model)


def test_hugging_face_swin(swin):
    weights = hf_swin(swin.state_dict())
    assert recognise_family(weights) == 'Swin, Hugging Face names'
    assert_same_as_timm(swin, convert_state_dict(weights), small_swin())


def test_absolute_position_table(swin):
    table = torch.randn(1, 28 * 28, 24)
    converted = convert_state_dict(swin.state_dict() | {'absolute_pos_embed': table})
    arch = {'embed_dims': 24, 'depths': [2, 1, 2], 'num_heads': [2, 4, 8]}
    model = mmpretrain_swin(arch, 112, 96, use_abs_pos_embed=True)
    model.load_state_dict(converted, strict=False)
    assert torch.equal(model.backbone.absolute_pos_embed, table)


# ---------------------------------------------------------------- wrappers and purity


def test_mmpretrain_names_pass_unchanged():
    weights = mmpretrain_vit().state_dict()
    assert recognise_family(weights) == 'MMPretrain names'
    converted = convert_state_dict({'state_dict': weights, 'meta': {}})
    assert list(converted) == list(weights)
    assert all(converted[name] is weights[name] for name in weights)


@pytest.mark.parametrize('wrapper', ['model', 'state_dict', 'state_dict_ema', 'model_ema'])
def test_wrappers_and_module_prefix_come_off(vit, wrapper):
    wrapped = {wrapper: {f'module.{k}': v for k, v in vit.state_dict().items()}, 'epoch': 3}
    converted = convert_state_dict(wrapped)
    expected = convert_state_dict(vit.state_dict())
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_averaged_weights_win_as_in_timm(vit):
    averaged = {name: tensor + 1 for name, tensor in vit.state_dict().items()}
    converted = convert_state_dict({'state_dict': vit.state_dict(), 'state_dict_ema': averaged})
    assert torch.equal(converted['backbone.cls_token'], averaged['cls_token'])


def test_input_is_not_changed(swin):
    weights = swin.state_dict()
    names, copies = list(weights), {name: tensor.clone() for name, tensor in weights.items()}
    convert_state_dict(weights)
    assert list(weights) == names
    assert all(torch.equal(weights[name], copies[name]) for name in names)


# ---------------------------------------------------------------- refusals


def test_missing_block_tensor_is_named(vit):
    weights = dict(vit.state_dict())
    del weights['blocks.1.mlp.fc1.weight']
    with pytest.raises(ValueError, match=r'missing: blocks\.1\.mlp\.fc1\.weight \(truncated'):
        convert_state_dict(weights)


@pytest.mark.parametrize(
    'name',
    ['norm.weight', 'cls_token', 'head.bias', 'head_dist.weight', 'blocks.0.attn.qkv.bias'],
)
def test_missing_single_tensor_is_named(distilled, name):
    weights = dict(distilled.state_dict())
    del weights[name]
    with pytest.raises(ValueError, match=rf'missing: {re.escape(name)} \('):
        convert_state_dict(weights)


def test_missing_block_is_named(vit):
    weights = {k: v for k, v in vit.state_dict().items() if not k.startswith('blocks.0.')}
    with pytest.raises(ValueError, match=r'missing: blocks\.0\.attn.* and 4 more'):
        convert_state_dict(weights)


@pytest.mark.parametrize('layout', [dict, swin_as_published], ids=['timm', 'official'])
def test_missing_patch_merging_is_named(swin, layout):
    weights = layout(swin.state_dict())
    name = 'layers.1.downsample.reduction.weight'
    del weights[name]
    with pytest.raises(ValueError, match=rf'missing: {re.escape(name)} \('):
        convert_state_dict(weights)


def test_missing_key_of_a_fused_qkv_is_named(vit):
    weights = hf_vit(vit.state_dict())
    name = 'vit.encoder.layer.1.attention.attention.key.weight'
    del weights[name]
    with pytest.raises(ValueError, match=rf'missing: {re.escape(name)} \('):
        convert_state_dict(weights)


@pytest.mark.parametrize('name', ['blocks.0.attn.q_norm.weight', 'reg_token', 'blocks.0.norm1.x'])
def test_key_without_a_place_is_named(vit, name):
    weights = vit.state_dict() | {name: torch.zeros(16)}
    with pytest.raises(ValueError, match=rf'no place for: {re.escape(name)}$'):
        convert_state_dict(weights)


def test_absurd_block_number_is_unknown_not_counted(vit):
    weights = vit.state_dict() | {'blocks.999999999.norm1.weight': torch.zeros(48)}
    with pytest.raises(ValueError, match=r'no place for: blocks\.999999999\.norm1\.weight'):
        convert_state_dict(weights)


def test_swin_v2_is_refused(swin):
    weights = swin.state_dict() | {'layers.0.blocks.0.attn.logit_scale': torch.zeros(2, 1, 1)}
    with pytest.raises(ValueError, match=r'Swin.* no place for: .*logit_scale'):
        convert_state_dict(weights)


def test_unknown_family_lists_known_ones_and_shows_keys():
    weights = {'layer1.0.conv1.weight': torch.zeros(1), 'fc.bias': torch.zeros(1)}
    with pytest.raises(ValueError, match=r'fc\.bias, layer1\.0\.conv1\.weight.*AugReg.*Hugging'):
        convert_state_dict(weights)


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        ({}, 'no weights'),
        ({'model': {}}, 'no weights'),
        ({'epoch': 3, 'lr': 0.1}, r'no tensors: epoch \(int\), lr \(float\)'),
        ({0: torch.zeros(1)}, r'no tensors: 0 \(Tensor\)'),
    ],
)
def test_not_a_state_dict(bad, reason):
    with pytest.raises(ValueError, match=reason):
        convert_state_dict(bad)


def test_impossible_shapes_are_named(swin, vit):
    name = 'layers.1.downsample.norm.weight'
    with pytest.raises(ValueError, match=rf'{re.escape(name)} .*shape \(95,\)'):
        convert_state_dict(swin.state_dict() | {name: torch.zeros(95)})
    query = 'vit.encoder.layer.0.attention.attention.query.weight'
    with pytest.raises(ValueError, match=r'query, key and value of backbone\.layers\.0\.attn\.qkv'):
        convert_state_dict(hf_vit(vit.state_dict()) | {query: torch.zeros(16, 47)})
    arrays = {k: torch.from_numpy(v) for k, v in augreg_arrays().items()}
    with pytest.raises(ValueError, match=r'embedding/kernel .*shape \(48,\)'):
        convert_state_dict(arrays | {'embedding/kernel': torch.zeros(48)})


def test_two_names_for_one_weight_are_refused(swin):
    both = {'head.weight': torch.zeros(7, 96), 'head.bias': torch.zeros(7)}
    with pytest.raises(ValueError, match=r'head\.weight and head\.fc\.weight are the same'):
        convert_state_dict(swin.state_dict() | both)


# ---------------------------------------------------------------- files


def save(weights, path):
    if path.suffix == '.safetensors':
        safetensors.torch.save_file(weights, path)
    elif path.suffix == '.npz':
        np.savez(path, **weights)
    else:
        torch.save({'model': weights}, path)
    return path


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin', '.pth.tar', '.npz', '.safetensors'])
def test_file_formats(tmp_path, vit, suffix):
    expected = vit.state_dict()
    loaded = load_checkpoint_file(save(expected, tmp_path / f'vit{suffix}'))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_training_checkpoint_of_timm_keeps_its_weights(tmp_path, vit, caplog):
    from argparse import Namespace

    path = tmp_path / 'last.pth.tar'
    torch.save({'state_dict': vit.state_dict(), 'args': Namespace(lr=0.1), 'epoch': 3}, path)
    assert load_checkpoint_file(path).keys() == vit.state_dict().keys()
    assert 'args (argparse.Namespace)' in caplog.text


@pytest.mark.parametrize('suffix', ['.pth', '.npz', '.safetensors'])
def test_truncated_file(tmp_path, vit, suffix):
    path = save(vit.state_dict(), tmp_path / f'vit{suffix}')
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf'vit\{suffix} is not a.* truncated'):
        load_checkpoint_file(path)


@pytest.mark.parametrize('suffix', ['.pth', '.npz', '.safetensors'])
@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'it is empty'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'git lfs pull'),
        (b'<!DOCTYPE html><html>', 'web page'),
        (b'\x89PNG\r\n\x1a\n' + bytes(200), 'another format'),
    ],
)
def test_foreign_content(tmp_path, suffix, content, reason):
    path = tmp_path / f'weights{suffix}'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf'weights\{suffix} is not a.*{reason}'):
        load_checkpoint_file(path)


def test_npz_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / 'objects.npz', a=np.array([{'x': 1}], dtype=object))
    with pytest.raises(ValueError, match=r'objects\.npz is not an npz file of numeric arrays'):
        load_checkpoint_file(tmp_path / 'objects.npz')


def test_file_that_holds_no_state_dict(tmp_path):
    torch.save({'epoch': 3}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r'a\.pth: not a state dict.*epoch \(int\)'):
        load_checkpoint_file(tmp_path / 'a.pth')


def test_missing_file_folder_and_unknown_suffix(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth can not be found'):
        load_checkpoint_file(tmp_path / 'none.pth')
    with pytest.raises(ValueError, match='is a folder; give the checkpoint file in it'):
        load_checkpoint_file(tmp_path)
    (tmp_path / 'model.onnx').write_bytes(b'x')
    with pytest.raises(ValueError, match=r"unknown kind of file '\.onnx'; give one of \.pth"):
        load_checkpoint_file(tmp_path / 'model.onnx')


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope='module')
def tool():
    path = Path(__file__).resolve().parents[1] / 'tools' / 'convert_checkpoint.py'
    spec = importlib.util.spec_from_file_location('convert_checkpoint', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tool, *args):
    return tool.main([str(arg) for arg in args])


def test_tool_writes_what_mmpretrain_loads(tmp_path, vit, tool, capsys):
    source = save(vit.state_dict(), tmp_path / 'vit.safetensors')
    assert run(tool, source, tmp_path / 'out.pth') == 0
    out = capsys.readouterr().out
    assert 'recognised: ViT or DeiT, timm and official names' in out
    assert '32 tensors read, 32 written (backbone and head)' in out
    assert len(vit.state_dict()) == 32
    checkpoint = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert checkpoint.keys() == {'state_dict', 'meta'}
    assert_same_as_timm(vit, checkpoint['state_dict'], mmpretrain_vit())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.pth', 'vit.safetensors']


def test_tool_overwrites_only_with_force(tmp_path, vit, tool, capsys):
    source, target = save(vit.state_dict(), tmp_path / 'vit.pth'), tmp_path / 'out.pth'
    target.write_bytes(b'precious')
    assert run(tool, source, target) == 2
    assert '--force' in capsys.readouterr().err
    assert target.read_bytes() == b'precious'
    assert run(tool, source, target, '--force') == 0
    assert 'state_dict' in torch.load(target, weights_only=True)


def test_tool_leaves_the_old_file_when_writing_fails(tmp_path, vit, tool, capsys, monkeypatch):
    def broken_save(checkpoint, path):
        Path(path).write_bytes(b'half')
        raise RuntimeError('disk full')

    source, target = save(vit.state_dict(), tmp_path / 'vit.pth'), tmp_path / 'out.pth'
    target.write_bytes(b'precious')
    monkeypatch.setattr(tool.torch, 'save', broken_save)
    assert run(tool, source, target, '--force') == 2
    assert capsys.readouterr().err == 'error: disk full\n'
    assert target.read_bytes() == b'precious'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.pth', 'vit.pth']


@pytest.mark.parametrize(
    ('src', 'dst', 'reason'),
    [
        ('none.pth', 'out.pth', 'can not be found'),
        ('vit.pth', '.', 'is a folder'),
        ('vit.pth', 'nowhere/out.pth', 'does not exist; create it'),
        ('resnet.pth', 'out.pth', 'unknown names'),
    ],
)
def test_tool_refuses_in_one_line(tmp_path, vit, tool, capsys, src, dst, reason):
    save(vit.state_dict(), tmp_path / 'vit.pth')
    save({'layer1.0.conv1.weight': torch.zeros(1)}, tmp_path / 'resnet.pth')
    assert run(tool, tmp_path / src, tmp_path / dst) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.count('\n') == 1
    assert captured.err.startswith('error: ')
    assert reason in captured.err
    assert not (tmp_path / 'out.pth').exists()


def test_tool_help_shows_examples(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(['--help'])
    assert stop.value.code == 0
    assert 'python tools/convert_checkpoint.py deit_tiny' in capsys.readouterr().out
