"""Families beside ViT, DeiT and Swin V1: surgery, quantized accuracy, grids, and what is refused by name.

Oracles: MMPretrain's own float model; its error falling by sixteen with four bits more; the number of different
values an operand takes; MMPretrain's own list of backbones.
"""

from __future__ import annotations

import copy
import io
from functools import partial

import mmpretrain
import pytest
import torch
from mmengine.utils import digit_version
from mmpretrain.models import backbones

from fqvit_plugin import calibrate_, dequant, get_scheme, load_quantized_, quant, quantize_model_
from fqvit_plugin.blocks.refused import CONVOLUTIONAL, REFUSED
from fqvit_plugin.checkpoint import save_calibrated
from fqvit_plugin.surgery import FAMILIES

from .checks import BITS, assert_equal_in_float, assert_operands_on_grids, error, run
from .models import batches, build, images, quantized
from .zoo import BEIT, DAVIT, EVA02, MVIT, PCPVT, SWINV2, ZOO, backbone

EVERY = pytest.mark.parametrize('name', ZOO)
ONE_OF_EACH = pytest.mark.parametrize(
    'name', ['clip', 'dinov2 giant', 'beit', 'eva02', 'swinv2', 'pcpvt', 'svt', 'mvit', 'davit']
)


def made(name):
    build_model, size = ZOO[name]
    return build_model(), images(4, size)


@EVERY
def test_in_float_the_twin_computes_what_the_model_did(name):
    assert_equal_in_float(*made(name))


@EVERY
def test_with_many_bits_the_quantized_model_is_the_float_one(name):
    errors = []
    for bits in (12, 16):
        model, x = made(name)
        expected = run(model, x)
        scheme = dict(lis=False, weight_bits=bits, act_bits=bits, attn_bits=bits)
        errors.append(error(run(quantized(model, [x], **scheme), x), expected))
    assert errors[0] <= 0.03
    assert errors[1] <= errors[0] / 6, f'four bits more must leave about a sixteenth: {errors}'


@EVERY
def test_the_papers_bits_are_near_float(name):
    model, x = made(name)
    expected = run(model, x)
    model = quantized(model, [*batches(2, x.shape[2:]), x], name='fqvit_w8a8')
    outputs = run(model, x)
    assert 0 < error(outputs, expected) <= 0.3  # an SQNR of 10 dB; random weights amplify noise
    dequant(model)
    assert error(run(model, x), expected) < 1e-5


@ONE_OF_EACH
@pytest.mark.parametrize(('lis', 'ptf'), [(True, True), (False, False)])
def test_the_reference_preset(name, lis, ptf):
    model, x = made(name)
    expected = run(model, x)
    outputs = run(quantized(model, [x], preset='reference', lis=lis, ptf=ptf), x)
    # Swin V2's norms stand in the residual branches: the reference's floored 8-bit multipliers add up
    assert 0 < error(outputs, expected) <= 0.45


@ONE_OF_EACH
@pytest.mark.parametrize(
    'options', [dict(lis=False), dict(ptf=False), dict(observer='omse'), dict(input_quant=False)]
)
def test_options_of_the_scheme(name, options):
    model, x = made(name)
    expected = run(model, x)
    assert 0 < error(run(quantized(model, [x], **options), x), expected) <= 0.25


@EVERY
def test_every_operand_is_on_a_grid(name):
    model, x = made(name)
    model = quantized(model, [x], act_bits=BITS, attn_bits=BITS)
    assert_operands_on_grids(model, x)


@ONE_OF_EACH
def test_gradients_in_float_are_the_models(name):
    model, x = made(name)
    (model(x) ** 2).mean().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    quantize_model_(model, get_scheme('fqvit_w8a8'))
    (model(x) ** 2).mean().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f'{k}: {m}')


@ONE_OF_EACH
def test_copies_autocast_and_single_images(name):
    model, x = made(name)
    model = quantized(model, [x])
    (expected,) = run(model, x)
    (alone,) = run(model, x[1:2])
    assert error([alone], [expected[1:2]]) < 0.02, 'no statistic of a batch enters'
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(run(model, x)[0], expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), x)[0], expected)
    copied = copy.deepcopy(model)
    dequant(copied)
    calibrate_(copied, [3 * x])
    quant(copied)
    assert torch.equal(run(copied, x)[0], run(quantized(made(name)[0], [3 * x]), x)[0])
    assert torch.equal(run(model, x)[0], expected), 'the original did not change'


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.5.0'), reason='Dynamo of torch 2.1 traces only plain ViTs'
)
@ONE_OF_EACH
def test_compilers_find_one_graph(name):
    model, x = made(name)
    model = quantized(model, [x])
    (expected,) = run(model, x)
    torch._dynamo.reset()
    assert torch.equal(run(torch.compile(model, fullgraph=True, backend='eager'), x)[0], expected)


@ONE_OF_EACH
def test_only_functions_stay_float(name):
    model, _ = made(name)
    report = quantize_model_(model, get_scheme('fqvit_w8a8'))
    reasons = ('the activation function is float', 'normalization is float', 'makes a constant')
    assert all(reason.startswith(reasons) for reason in report.left_float.values()), report.left_float
    assert max(map(len, str(report).splitlines())) <= 130


@pytest.mark.parametrize('name', ['beit', 'eva02', 'swinv2', 'svt'])
def test_a_calibrated_checkpoint_becomes_the_model_again(name, tmp_path):
    model, x = made(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # other weights than the model that reads them starts from
    scheme = get_scheme('fqvit_w8a8_attn4')
    expected = run(quantized(model, [x]), x)
    save_calibrated(tmp_path / 'q.pth', model, scheme)
    fresh, _ = made(name)
    load_quantized_(fresh, tmp_path / 'q.pth')
    assert torch.equal(run(fresh, x)[0], expected[0])


@pytest.mark.parametrize(
    ('name', 'linears'),
    [
        ('beit-base-p16_beit-in21k-pre_3rdparty_in1k', 12 * 4 + 1),
        ('beit-g-p14_eva-30m-in21k-pre_3rdparty_in1k-336px', 40 * 4 + 1),
        ('vit-base-p16_mae-1600e-pre_8xb128-coslr-100e_in1k', 12 * 4 + 1),
        ('vit-base-p16_clip-openai-pre_3rdparty_in1k', 12 * 4 + 1),
        ('vit-giant-p14_dinov2-pre_3rdparty', 40 * 4),
        ('vit-tiny-p14_eva02-in21k-pre_3rdparty_in1k-336px', 12 * 4 + 1),
        ('swinv2-tiny-w8_3rdparty_in1k-256px', 12 * 4 + 3 + 1),
        ('swinv2-base-w24_in21k-pre_3rdparty_in1k-384px', 24 * 4 + 3 + 1),
        ('twins-pcpvt-small_3rdparty_8xb128_in1k', 16 * 5 + 1),
        ('twins-svt-small_3rdparty_8xb128_in1k', 9 * 4 + 9 * 5 + 1),
        ('mvitv2-tiny_3rdparty_in1k', 10 * 4 + 3 + 1),
        ('davit-tiny_3rdparty_in1k', 6 * 2 * 4 + 1),
    ],
)
def test_mmpretrains_own_configs(name, linears, monkeypatch):
    # linear layers by hand: four in a block, five where query and key are apart; what merges and classifies
    monkeypatch.setattr(torch, 'linspace', partial(torch.linspace, device='cpu'))  # of the depth, which is read
    with torch.device('meta'):
        model = mmpretrain.get_model(name, pretrained=False)
    report = quantize_model_(model, get_scheme('fqvit_w8a8_attn4'))
    assert sum(entry.kind == 'QLinear' for entry in report.entries) == linears
    assert report.quantized_bytes < 0.4 * report.float_bytes


# ---------------------------------------------------------------- what is covered and what is not


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda: backbone(BEIT, layer_cfgs=dict(ffn_cfg=dict(add_identity=True))),
            r'layers\.0\.ffn has add_identity=True',
        ),
        (lambda: backbone(BEIT, norm_cfg=dict(type='BN')), r'layers\.0\.ln1 is a BatchNorm2d, not a LayerNorm'),
        (lambda: backbone(EVA02, norm_cfg=dict(type='BN')), r'layers\.0\.norm1 is a BatchNorm2d, not a LayerNorm'),
        (
            lambda: backbone(SWINV2, stage_cfgs=dict(downsample_cfg=dict(use_post_norm=False))),
            r'stages\.1\.downsample has use_post_norm=False',
        ),
        (
            lambda: backbone(SWINV2, stage_cfgs=dict(block_cfgs=dict(norm_cfg=dict(type='BN1d')))),
            r'stages\.0\.blocks\.0\.norm1 is a BatchNorm1d',
        ),
        (lambda: backbone(PCPVT, norm_cfg=dict(type='BN1d')), r'stages\.0\.0\.norm1 is a BatchNorm1d'),
        (
            lambda: backbone(DAVIT, stage_cfgs=dict(downsample_cfg=dict(norm_cfg=None))),
            r'stages\.0\.downsample\.norm is a',
        ),
        (
            lambda: backbone(DAVIT, stage_cfgs=dict(block_cfgs=dict(attn_cfgs=dict(shift_size=1)))),
            r'stages\.0\.blocks\.0\.spatial_block\.attn is not plain',
        ),
        (lambda: backbone(MVIT, norm_cfg=dict(type='BN1d')), r'blocks\.0\.norm1 is a BatchNorm1d'),
        (lambda: build(dict(type='T2T_ViT')), 'T2T_ViT is not covered: its first stage unfolds tokens'),
    ],
)
def test_refusals_name_the_part_and_change_nothing(make, message):
    model = make()
    before = [(name, id(module), type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        quantize_model_(model, get_scheme('fqvit_w8a8'))
    assert [(name, id(module), type(module)) for name, module in model.named_modules()] == before


def test_every_backbone_of_mmpretrain_is_covered_or_refused_by_name():
    paths = [path for family in FAMILIES for path in family.models]
    covered = {path.rpartition('.')[2] for path in paths if path.startswith('mmpretrain.')}
    assert covered.isdisjoint(REFUSED)
    assert covered.isdisjoint(CONVOLUTIONAL)
    assert CONVOLUTIONAL.isdisjoint(REFUSED)
    everything = set(backbones.__all__)
    assert everything - covered - set(REFUSED) - CONVOLUTIONAL == set()
    assert (set(REFUSED) | CONVOLUTIONAL) - everything == set(), 'names that MMPretrain does not have'
