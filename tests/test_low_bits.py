"""Recipes of few bits as whole networks. Oracles: the simulated model, tensor by tensor, and the saved tensors."""

from __future__ import annotations

import pytest
import torch

import fqvit_plugin as fq
from fqvit_plugin import compiled
from fqvit_plugin.blocks.common import QFFN
from fqvit_plugin.checkpoint import save_calibrated, stored_scheme, take_calibrated
from fqvit_plugin.integer.checkpoint import load_integer, save_integer
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.lifecycle import dequant, named_quantizers, quant

from . import models
from .test_integer import assert_codes_and_logits_are_the_simulations

FAR = 17  #: the hidden channel far out
TUNE = dict(type='tune', block_steps=2, model_steps=2, batch_size=4)
TUNED = ['equalize', 'round', TUNE]


def far_out(model, at=-1):
    """``model`` with one hidden channel of one MLP at 100 to 200, where the others reach about 2."""
    ffn = [m for m in model.modules() if type(m).__name__ == 'FFN'][at].layers
    with torch.no_grad():
        ffn[0][0].weight[FAR] *= 10
        ffn[0][0].bias[FAR] = 150
        ffn[1].weight[:, FAR] *= 0.02
    return model


def vit():
    return far_out(models.vit(arch=dict(models.VIT_ARCH, feedforward_channels=192)), 0)


def swin():
    return far_out(models.swin())  # in the second stage: 192 hidden channels


CASES = {
    'vit w4a4': (vit, 32, 'fqvit_w4a4', None),
    'vit w6a6': (vit, 32, 'fqvit_w6a6', None),
    'vit w4a8': (vit, 32, 'fqvit_w4a8', None),
    'vit w4a4 tuned': (vit, 32, 'fqvit_w4a4', TUNED),
    'swin w4a4': (swin, 56, 'fqvit_w4a4', None),
    'swin w6a6': (swin, 56, 'fqvit_w6a6', None),
}


def calibrated(case):
    """Quantized model and its scheme, images."""
    make, size, name, steps = CASES[case]
    model, scheme, x = make(), fq.get_scheme(name, steps=steps), models.images(4, size)
    fq.quantize_model_(model, scheme)
    fq.calibrate_(model, [x, models.images(4, size, seed=2)])
    quant(model)
    return model, scheme, x


@pytest.fixture(scope='module', params=CASES)
def triple(request):
    """A simulated model, its integer twin, and images."""
    make, size, _, _ = CASES[request.param]
    model, scheme, x = calibrated(request.param)
    return model, scheme, to_integer(model, (size, size)), x, make


def test_there_are_copies_levels_and_chosen_codes(triple):
    model, scheme, _, _, _ = triple
    hidden = [m.hidden_act.quantizer for m in model.modules() if isinstance(m, QFFN)]
    assert sorted(set(torch.cat([q.copies for q in hidden]).tolist())) == [FAR]
    bits = scheme.operand.bit_type.bits
    assert {len(q.levels) for q in hidden} == {2**bits if bits < 8 else 0}
    weights = [m.weight_quantizer for m in model.modules() if isinstance(m, fq.QLinear)]
    chosen = [q for q in weights if q.is_chosen]
    assert len(chosen) >= 8
    low = scheme.weight.bit_type
    for layer in (m for m in model.modules() if isinstance(m, fq.QLinear) and m.weight_quantizer.is_chosen):
        multiples, steps = layer.multiples(), layer.weight_quantizer.codes
        codes = steps // multiples
        assert torch.equal(codes * multiples, steps)
        assert low.qmin <= int(codes.min())
        assert int(codes.max()) <= low.qmax
        if scheme.weight.group_size:
            assert len(multiples.unique()) > 4, 'groups of columns have factors of their own'
            assert multiples.shape == steps.shape, 'copies have the factors of their channel'


def test_codes_and_logits_of_the_integer_model_are_the_simulations(triple):
    model, _, integer, x, _ = triple
    assert_codes_and_logits_are_the_simulations(model, integer, x)


@pytest.mark.skipif(compiled.compiler() is None, reason='no C++ compiler for the native engine')
def test_the_native_engine_has_the_codes_of_the_integer_model(triple):
    from fqvit_plugin.native.model import NativeModel

    _, _, integer, x, _ = triple
    native = NativeModel(integer)
    expected = {op.output: tensor for op, tensor in integer.steps(x)}
    for name, codes in native.codes(x).items():
        assert torch.equal(codes, expected[name]), name
    assert torch.equal(native(x), integer(x))
    assert native.fallbacks == []


def test_an_integer_checkpoint_keeps_them(triple, tmp_path):
    _, _, integer, x, _ = triple
    save_integer(integer, tmp_path / 'm.safetensors')
    assert torch.equal(load_integer(tmp_path / 'm.safetensors')(x), integer(x))


def test_a_calibrated_checkpoint_is_the_model_bit_by_bit(triple, tmp_path):
    model, scheme, _, x, make = triple
    with torch.no_grad():
        expected = model(x)
    save_calibrated(tmp_path / 'q.pth', model, scheme)
    fresh = make()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.1)  # equalized weights come from the checkpoint
    fq.load_quantized_(fresh, tmp_path / 'q.pth')
    with torch.no_grad():
        assert torch.equal(fresh(x), expected)
    ours = {f'{n}.{b}': t for n, q in named_quantizers(model) for b, t in q.named_buffers()}
    theirs = {f'{n}.{b}': t for n, q in named_quantizers(fresh) for b, t in q.named_buffers()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[k]) and t.dtype is theirs[k].dtype for k, t in ours.items())
    dequant(model)
    dequant(fresh)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    quant(model)


def test_a_checkpoint_of_another_scheme_is_refused(tmp_path):
    model, scheme, _ = calibrated('vit w4a4')
    save_calibrated(tmp_path / 'q.pth', model, scheme)
    loaded = torch.load(tmp_path / 'q.pth', weights_only=True)
    assert stored_scheme(loaded) == scheme
    for other, field in (
        (fq.get_scheme('fqvit_w6a6'), 'weight.bit_type.bits: 4 != 6'),
        (fq.get_scheme('fqvit_w4a4', steps=TUNED), 'steps: '),
        (fq.get_scheme('fqvit_w4a4', steps=['equalize', dict(type='round', damp=0.1)]), 'steps: '),
    ):
        with pytest.raises(ValueError, match='another scheme') as error:
            take_calibrated(loaded, other)
        assert field in str(error.value)


def test_a_second_model_takes_a_checkpoint_with_other_copies(tmp_path):
    """A model that holds copies and codes of its own loads those of a checkpoint, or says why it does not."""
    model, scheme, x = calibrated('vit w4a4')
    save_calibrated(tmp_path / 'q.pth', model, scheme)
    with torch.no_grad():
        expected = model(x)
    twice = vit()
    fq.load_quantized_(twice, tmp_path / 'q.pth')
    dequant(twice)
    fq.calibrate_(twice, [models.images(4, seed=8)])
    quant(twice)
    with torch.no_grad():
        assert not torch.equal(twice(x), expected)
        again = vit()
        fq.load_quantized_(again, tmp_path / 'q.pth')
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize('case', ['vit w4a4', 'swin w4a4'])
def test_the_integer_form_of_onnx_is_exact_and_levels_have_no_qdq_form(case, tmp_path):
    pytest.importorskip('onnx', reason='the extra export brings it')
    pytest.importorskip('onnxruntime', reason='the extra export brings it')
    from fqvit_plugin.export import to_onnx

    model, _, x = calibrated(case)
    integer = to_integer(model, CASES[case][1])
    assert to_onnx(integer, tmp_path / 'm.onnx', form='integer', images=x).plain.exact
    with pytest.raises(ValueError, match="form='integer' has"):
        to_onnx(integer, tmp_path / 'q.onnx', images=x)


def test_copies_alone_have_a_qdq_form_too(tmp_path):
    pytest.importorskip('onnx', reason='the extra export brings it')
    pytest.importorskip('onnxruntime', reason='the extra export brings it')
    from fqvit_plugin.export import to_onnx

    model, _, x = calibrated('vit w4a8')
    assert to_onnx(to_integer(model), tmp_path / 'q.onnx', images=x).plain.largest <= 1
