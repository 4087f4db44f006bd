"""Families beside ViT, DeiT and Swin V1: surgery, quantized accuracy, grids, and what is refused by name.

Oracles: MMPretrain's own float model; its error falling by sixteen with four bits more; the number of different values
an operand takes; MMPretrain's own list of backbones.
"""

from __future__ import annotations

import copy
import io

import mmpretrain
import pytest
import torch
from mmpretrain.models import backbones

from fqvit_plugin import calibrate_, dequant, get_scheme, quant, quantize_model_
from fqvit_plugin.blocks.refused import CONVOLUTIONAL, REFUSED
from fqvit_plugin.surgery import FAMILIES, check_model, covered_backbones

from .checks import BITS, assert_equal_in_float, assert_operands_on_grids, error, run
from .models import batches, images, quantized
from .zoo import ZOO

EVERY = pytest.mark.parametrize('name', ZOO)
ONE_OF_EACH = pytest.mark.parametrize('name', ['clip', 'dinov2 giant', 'beit', 'eva02', 'swinv2', 'pcpvt', 'svt', 'mvit'])


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
    assert errors[1] <= errors[0] / 8, f'four bits more must leave about a sixteenth: {errors}'


@EVERY
def test_the_papers_bits_are_near_float(name):
    model, x = made(name)
    expected = run(model, x)
    model = quantized(model, [*batches(2, x.shape[2:]), x])
    outputs = run(model, x)
    assert 0 < error(outputs, expected) <= 0.25  # 12 dB; random weights amplify noise
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
@pytest.mark.parametrize('options', [dict(lis=False), dict(ptf=False), dict(observer='omse'), dict(input_quant=False)])
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
def test_copies_compilers_autocast_and_single_images(name):
    model, x = made(name)
    model = quantized(model, [x])
    (expected,) = run(model, x)
    (alone,) = run(model, x[1:2])
    assert error([alone], [expected[1:2]]) < 0.02, 'no statistic of a batch enters'
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(run(model, x)[0], expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert torch.equal(run(compiled, x)[0], expected)
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


@ONE_OF_EACH
def test_only_functions_stay_float(name):
    model, _ = made(name)
    report = quantize_model_(model, get_scheme('fqvit_w8a8'))
    reasons = ('the activation function is float', 'cosine attention', 'reads no image')
    assert all(reason.startswith(reasons) for reason in report.left_float.values()), report.left_float
    assert max(map(len, str(report).splitlines())) <= 120


# ---------------------------------------------------------------- what is covered and what is not


def test_every_backbone_of_mmpretrain_is_covered_or_refused_by_name():
    covered = set(covered_backbones())
    assert covered.isdisjoint(REFUSED)
    assert covered.isdisjoint(CONVOLUTIONAL)
    assert CONVOLUTIONAL.isdisjoint(REFUSED)
    everything = set(backbones.__all__)
    assert everything - covered - set(REFUSED) - CONVOLUTIONAL == set()
    assert (set(REFUSED) | CONVOLUTIONAL) - everything == set(), 'names that MMPretrain does not have'
