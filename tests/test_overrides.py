"""Overrides: single layers with other bits or another observer, from the config to the report and back.

Oracles: sizes counted by hand from shapes; scales of a scheme that says the same for all layers.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fqvit_plugin as fq
from fqvit_plugin.layers import QAct
from fqvit_plugin.lifecycle import named_quantizers
from fqvit_plugin.observers import PercentileObserver
from fqvit_plugin.presets import parse_scheme
from fqvit_plugin.scheme import Override
from fqvit_plugin.searching import PtfObserver
from fqvit_plugin.structure import Structure, all_or_nothing

from . import models

FC2 = 'backbone.layers.*.ffn.layers.1'


def surgery(model, *overrides, **scheme):
    return fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8', overrides=overrides, **scheme))


def bits(layer):
    quantizer = layer.quantizer if isinstance(layer, QAct) else layer.weight_quantizer
    return quantizer.spec.bit_type.name


def test_bits_of_matching_layers_and_of_no_other():
    model = models.vit()
    report = surgery(model, dict(layers=FC2, weight_bits=4), dict(layers='*.layers.1.ffn.*', act_bits=6))
    names = {e.path: e.bits for e in report.entries if e.kind in ('QLinear', 'QConv2d', 'QAct')}
    four = {n for n, b in names.items() if b == 'int4'}
    six = {n for n, b in names.items() if b == 'uint6'}
    assert four == {'backbone.layers.0.ffn.layers.1', 'backbone.layers.1.ffn.layers.1'}
    assert six == {'backbone.layers.1.ffn.hidden_act', 'backbone.layers.1.ffn.out_act'}
    assert set(names.values()) == {'int4', 'int8', 'uint6', 'uint8'}
    uniform = surgery(models.vit())
    assert uniform.quantized_bytes - report.quantized_bytes == 2 * (96 * 48) // 2  # two layers, half a byte each


def test_later_overrides_win():
    model = models.vit()
    surgery(model, dict(layers='*', weight_bits=4), dict(layers='head.*', weight_bits=6))
    assert bits(model.head.layers.head) == 'int6'
    assert bits(model.backbone.patch_embed.projection) == 'int4'


def test_observers_change_but_ptf_stays():
    model = models.vit()
    percentile = dict(type='percentile', alpha=0.99)
    surgery(model, dict(layers=['backbone.layers.0.*'], act_bits=6, observer=percentile))
    block = model.backbone.layers[0]
    observer = block.norm1_act.quantizer.observer
    assert isinstance(observer, PercentileObserver)
    assert observer.alpha == 0.99
    branch = block.ffn.out_act.quantizer
    assert (branch.spec.observer, branch.spec.bit_type.name, branch.scale.shape) == ('percentile', 'uint6', (48,))
    residual = block.residual_act.quantizer
    assert isinstance(residual.observer, PtfObserver)
    assert (residual.spec.bit_type.name, residual.scale.shape) == ('uint6', (48,))
    assert not isinstance(model.backbone.layers[1].norm1_act.quantizer.observer, PercentileObserver)


def test_another_observer_leaves_as_many_levels():
    model = models.vit()
    change = dict(layers='backbone.layers.0.norm1_act', observer='percentile')
    fq.quantize_model_(model, fq.get_scheme('fqvit_w4a4', overrides=[change]))
    quantizer = model.backbone.layers[0].norm1_act.quantizer
    assert isinstance(quantizer.observer, PercentileObserver)
    assert quantizer.code_name == 'uint4 of levels'


@pytest.mark.parametrize(
    ('lis', 'attn_bits', 'quantizer'), [(True, 4, None), (False, 4, 'log2'), (False, 10, 'uniform')]
)
def test_attention_bits(lis, attn_bits, quantizer):
    model = models.swin()
    surgery(model, dict(layers='backbone.stages.0.*', attn_bits=attn_bits), lis=lis)
    probs = model.backbone.stages[0].blocks[0].attn.w_msa.probs
    expected = models.swin()
    fq.quantize_model_(expected, fq.get_scheme('fqvit_w8a8', lis=lis, attn_bits=attn_bits))
    assert probs.spec == expected.backbone.stages[0].blocks[0].attn.w_msa.probs.spec
    assert (None if probs.quantizer is None else probs.quantizer.spec.quantizer) == quantizer
    assert model.backbone.stages[1].blocks[0].attn.w_msa.probs.spec.bit_type.bits == 8


@pytest.mark.parametrize(('build', 'size'), [(models.vit, 32), (models.swin, 56)])
def test_overriding_everything_equals_the_scheme_that_says_so(build, size):
    data = models.batches(2, size)
    ours, expected = build(), build()
    everything = dict(layers='*', weight_bits=5, act_bits=6, attn_bits=4, observer='percentile')
    models.quantized(ours, data, name='fqvit_w8a8', overrides=[everything])
    models.quantized(expected, data, name='fqvit_w8a8_attn4', weight_bits=5, act_bits=6, observer='percentile')
    theirs = dict(named_quantizers(expected))
    assert all(torch.equal(q.scale, theirs[n].scale) for n, q in named_quantizers(ours) if hasattr(q, 'scale'))
    with torch.no_grad():
        assert torch.equal(ours(data[0], mode='tensor'), expected(data[0], mode='tensor'))


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        (dict(layers='backbone.blocks.*', weight_bits=4), r"'backbone\.blocks\.\*' matches no layer; there is: \S+"),
        (dict(layers=[FC2, 'nowhere'], weight_bits=4), "'nowhere' matches no layer"),
        (dict(layers='*.hidden_act', weight_bits=4), 'weight_bits is about none .* such as .*hidden_act'),
        (dict(layers='*.residual_act', observer='ema'), 'observer is about none'),
        (dict(layers=FC2, attn_bits=4), 'attn_bits is about none .* it is about .*probs'),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_refused_and_changes_nothing(override, message):
    model = models.vit()
    modules, backbone = dict(model.named_modules()), type(model.backbone)
    with pytest.raises(ValueError, match=message):
        surgery(model, override)
    assert type(model.backbone) is backbone
    assert all(modules[n] is m for n, m in model.named_modules())
    assert surgery(model, dict(layers=FC2, weight_bits=4)).entries  # and it can be quantized after all


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        (dict(weight_bits=4), 'layers of an override must be a glob'),
        (dict(layers='', weight_bits=4), 'layers of an override must be a glob'),
        (dict(layers='*'), 'changes nothing: give weight_bits, act_bits'),
        (dict(layers='*', weight_bits=1), 'from 2 to 16, got 1'),
        (dict(layers='*', bits=4), "unknown field 'bits' of an override"),
        (dict(layers='*', observer='maxmin'), "unknown observer 'maxmin'"),
        (dict(layers='*', observer=dict(type='ema', alpha=0.9)), "'ema' does not take"),
        ('head.*', 'an override must read dict'),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ValueError, match=message):
        fq.get_scheme('fqvit_w8a8', overrides=[override])


def test_overrides_must_be_a_list():
    with pytest.raises(ValueError, match='overrides must be a list'):
        fq.get_scheme('fqvit_w8a8', overrides=dict(layers='*', weight_bits=4))


def test_config_form_checkpoint_form_and_back():
    item = dict(layers=FC2, weight_bits=4, observer=dict(type='percentile', alpha=0.99), _scope_='mmpretrain')
    scheme = parse_scheme(dict(type='fqvit_w8a8', overrides=[item]))
    (override,) = scheme.overrides
    assert override == Override((FC2,), weight_bits=4, observer='percentile', observer_options=(('alpha', 0.99),))
    assert Override.parse(override) is override
    stored = json.loads(json.dumps(scheme.to_dict()))
    assert fq.QuantScheme.from_dict(stored) == scheme
    other = fq.get_scheme('fqvit_w8a8')
    assert 'overrides' in other.differences(scheme)[0]


def test_structure_puts_back_what_surgery_changed():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    linear, weight = model[0], model[0].weight
    with pytest.raises(KeyError), all_or_nothing(model):  # noqa: PT012
        model[0] = nn.Identity()
        linear.weight = nn.Parameter(torch.zeros(1))
        linear.register_buffer('extra', torch.zeros(1))
        model.append(nn.Tanh())
        raise KeyError
    assert [*model] == [linear, model[1]]
    assert linear.weight is weight
    assert [*linear.state_dict()] == ['weight', 'bias']
    before = Structure(model)
    model[1] = nn.GELU()
    before.restore_()
    model[1] = nn.GELU()
    before.restore_()  # as often as one likes
    assert isinstance(model[1], nn.ReLU)
