"""The analysis of a quantized model. Oracles: the definitions applied by hand, textbook ratios."""

from __future__ import annotations

import json
import math

import pytest
import torch

import fqvit_plugin as fq
from fqvit_plugin.analysis.collect import analyse
from fqvit_plugin.analysis.measure import Tally, histogram
from fqvit_plugin.analysis.records import decibels
from fqvit_plugin.intmath import log_int_softmax_
from fqvit_plugin.lifecycle import phase_of
from fqvit_plugin.phase import Phase

from . import models

RECIPES = [
    dict(),
    dict(lis=False),
    dict(preset='reference'),
    dict(preset='reference', lis=False, ptf=False),
    dict(act_bits=10),
]


def uniform(bits: int, scale: float, zero_point: int, signed: bool = False) -> fq.UniformQuantizer:
    quantizer = fq.UniformQuantizer(fq.QuantSpec(fq.BitType(bits, signed)))
    quantizer.scale.fill_(scale)
    quantizer.zero_point.fill_(zero_point)
    return quantizer


def run(model, batch):
    return model(batch, mode='tensor')


def test_a_table_by_hand():
    """Two bits, scale 1, zero point 1: the grid is -1, 0, 1, 2; 2.6 and -1.6 lie beyond half a step."""
    quantizer = uniform(2, 1.0, 1)
    tally = Tally(quantizer.spec, quantizer)
    tally.add(torch.tensor([0.0, 0.25, 1.0]))
    tally.add(torch.tensor([2.6, -1.6, 2.4]))
    record = tally.record('layer', 'QAct', None)
    assert record.covered == (-1.0, 2.0)
    assert record.seen == pytest.approx((-1.6, 2.6))
    assert record.saturated == pytest.approx(2 / 6)
    assert record.code_counts == (1, 2, 1, 2)
    assert (record.codes_used, record.codes) == (4, 4)
    assert sum(record.value_counts) == 3  # those within the covered range
    signal = 0.25**2 + 1 + 2.6**2 + 1.6**2 + 2.4**2
    noise = 0.25**2 + 0.6**2 + 0.6**2 + 0.4**2
    assert record.sqnr == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)


def test_uniform_values_have_the_textbook_ratio():
    """Evenly spread values over a grid of b bits: 6.02 b dB."""
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    quantizer = uniform(8, 1 / 255, 0)
    tally = Tally(quantizer.spec, quantizer)
    tally.add(x)
    assert tally.record('', 'QAct', None).sqnr == pytest.approx(10 * math.log10(4 * 255**2), abs=0.1)


def test_the_log2_grid_gives_14_decibels():
    """Octaves evenly filled: E[x^2] / E[(x - 1)^2] for x = 2**u, u even in [-1/2, 1/2]."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 - 0.5
    x = 2.0 ** (u - 3)
    spec = fq.QuantSpec(fq.BitType(4, False), quantizer='log2')
    tally = Tally(spec, fq.Log2Quantizer(spec))
    tally.add(x)
    record = tally.record('', 'QIntSoftmax', None)
    square, mean = (2 - 0.5) / (2 * math.log(2)), (2**0.5 - 2**-0.5) / math.log(2)
    assert record.sqnr == pytest.approx(10 * math.log10(square / (square - 2 * mean + 1)), abs=0.01)
    assert record.sqnr == pytest.approx(14.1, abs=0.05)
    assert record.observer == 'log2'
    assert record.codes_used == 1


def test_a_histogram_in_pieces_is_one_histogram(monkeypatch):
    """Oracle: counting in Python."""
    x = torch.tensor([-1.0, 0.0, 0.1, 0.5, 0.9, 1.0, 3.0])
    by_hand = [sum(1 for v in x.tolist() if lo <= v < lo + 0.5 or v == lo + 0.5 == 1.0) for lo in (0.0, 0.5)]
    monkeypatch.setattr('fqvit_plugin.analysis.measure._PIECE', 2)
    assert histogram(x, 2, 0.0, 1.0).tolist() == by_hand
    assert histogram(torch.zeros(3), 4, 0.0, 0.0).sum() == 3


@pytest.mark.parametrize(('signal', 'noise', 'expected'), [(100, 1, 20), (1, 0, math.inf), (0, 1, -math.inf)])
def test_decibels(signal, noise, expected):
    assert decibels(signal, noise) == expected


@pytest.mark.parametrize('recipe', RECIPES, ids=str)
@pytest.mark.parametrize(('build', 'size'), [(models.vit, 32), (models.swin, 56)])
def test_every_tensor_is_measured_once_and_the_model_is_left_as_it_was(build, size, recipe):
    model = models.quantized(build(), models.batches(2, size), **recipe)
    data = models.batches(2, size)
    with torch.no_grad():
        before = [run(model, b) for b in data]
    analysis = analyse(model, data, run)
    expected = [
        name for name, m in model.named_modules() if isinstance(m, (fq.QAct, fq.QIntSoftmax, fq.QLinear, fq.QConv2d))
    ]
    assert sorted(r.path for r in analysis.tensors) == sorted(expected)
    assert all(r.total_sqnr is not None for r in analysis.tensors if not r.is_weight)
    assert phase_of(model) is Phase.QUANT
    with torch.no_grad():
        assert all(torch.equal(run(model, b), y) for b, y in zip(data, before, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for r in analysis.tensors:
        assert sum(r.code_counts) == r.count
        assert len(r.code_counts) <= 256
    json.dumps(analysis.to_dict(), allow_nan=False)


def test_a_weight_and_an_activation_by_hand():
    model = models.quantized(models.vit(), models.batches(2))
    data = models.batches(2)
    analysis = analyse(model, data, run)
    found = {r.path: r for r in analysis.tensors}
    path = 'backbone.layers.1.attn.qkv'
    weight, quantizer = model.get_submodule(path).weight.detach().double(), model.get_submodule(path).weight_quantizer
    error = weight - quantizer(weight.float()).double()
    by_hand = 10 * torch.log10(weight.square().sum() / error.square().sum())
    assert found[path].sqnr == pytest.approx(float(by_hand), abs=1e-3)
    path = 'backbone.layers.1.ffn.hidden_act'
    seen = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    fq.dequant(model)
    with torch.no_grad():
        for batch in data:
            run(model, batch)
    hook.remove()
    x = torch.cat(seen).double()
    error = x - model.get_submodule(path).quantizer(x.float()).double()
    assert found[path].sqnr == pytest.approx(
        float(10 * torch.log10(x.square().sum() / error.square().sum())), abs=1e-3
    )
    assert found[path].seen == pytest.approx((float(x.min()), float(x.max())))


def test_log_int_softmax_by_hand():
    """Against the float softmax of logits that lie on their grid already, so that their own error is not in it."""
    model = models.quantized(models.vit(), models.batches(2))
    (batch,) = models.batches(1)
    found = {r.path: r for r in analyse(model, [batch], run).tensors}
    path = 'backbone.layers.1.attn'
    seen = []
    act = model.get_submodule(f'{path}.logits_act')
    hook = act.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    fq.dequant(model)
    with torch.no_grad():
        run(model, batch)
    hook.remove()
    steps = act.quantizer.steps(seen[0])
    expected = torch.softmax((steps * act.scale).double(), -1)
    error = expected - log_int_softmax_(steps.clone(), act.scale, 4).double()
    by_hand = 10 * torch.log10(expected.square().sum() / error.square().sum())
    assert found[f'{path}.probs'].sqnr == pytest.approx(float(by_hand), abs=1e-3)


def test_end_to_end_by_hand():
    model = models.quantized(models.vit(), models.batches(2))
    data = models.batches(3)
    with torch.no_grad():
        found = torch.cat([run(model, b) for b in data])
        fq.dequant(model)
        expected = torch.cat([run(model, b) for b in data])
    analysis = analyse(model, data, run)
    end = analysis.end_to_end
    assert end.images == len(expected)
    assert end.agreement == (found.argmax(1) == expected.argmax(1)).double().mean()
    by_hand = 10 * torch.log10(expected.square().sum() / (found - expected).square().sum())
    assert end.sqnr == pytest.approx(float(by_hand), abs=1e-3)
    # the classifier's own quantizer is the last tensor of the model, and small enough to be compared whole
    assert analysis.tensors[-1].path == 'head.layers.head.out_act'
    assert analysis.tensors[-1].total_sqnr == pytest.approx(end.sqnr, abs=1e-6)
    assert phase_of(model) is Phase.FLOAT


def test_a_bare_backbone_has_no_agreement():
    backbone = models.quantized(models.build(models.swin_backbone(out_indices=(0, 1))), models.batches(2, 56))
    assert analyse(backbone, models.batches(1, 56)).end_to_end.agreement is None


def test_fewer_bits_are_worse_where_they_are_fewer():
    """Six bits instead of eight cost about 12 dB; weights, which keep theirs, do not change."""
    data = models.batches(2)
    eight, six = (
        {r.path: r for r in analyse(models.quantized(models.vit(), data, act_bits=n), data, run).tensors}
        for n in (8, 6)
    )
    path = 'backbone.layers.0.ffn.out_act'
    assert eight[path].sqnr - six[path].sqnr == pytest.approx(12, abs=2)
    assert eight['backbone.layers.0.attn.qkv'] == six['backbone.layers.0.attn.qkv']


def test_ptf_factors_are_counted():
    model = models.quantized(models.vit(), models.batches(2))
    record = next(r for r in analyse(model, models.batches(1), run).tensors if r.path == 'backbone.residual_act')
    scale = model.get_submodule(record.path).quantizer.scale
    assert record.scales is not None
    assert sum(record.scales.shifts) == record.scales.channels == len(scale)
    assert record.scales.shifts[0] == int((scale == scale.min()).sum())


def test_roles_and_blocks():
    model = models.quantized(models.swin(), models.batches(1, 56))
    found = {r.path: r for r in analyse(model, models.batches(1, 56), run).tensors}
    record = found['backbone.stages.1.blocks.0.ffn.layers.0.0']
    assert (record.role, record.block) == ('backbone.stages.#.blocks.#.ffn.layers.0.0', 'backbone.stages.1.blocks.0')
    assert found['backbone.patch_embed.input_act'].block == 'backbone'


def test_what_cannot_be_analysed():
    model = models.vit()
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    with pytest.raises(RuntimeError, match='not calibrated'):
        analyse(model, models.batches(1), run)
    fq.calibrate_(model, models.batches(1))
    with pytest.raises(ValueError, match='no batch to analyse'):
        analyse(model, [], run)
    assert phase_of(model) is Phase.FLOAT


def test_a_failing_batch_leaves_the_phase(monkeypatch):
    model = models.quantized(models.vit(), models.batches(1))

    def fail(model, batch):
        raise RuntimeError('broken image')

    with pytest.raises(RuntimeError, match='broken image'):
        analyse(model, models.batches(1), fail)
    assert phase_of(model) is Phase.QUANT
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
