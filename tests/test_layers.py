"""The Q layers against the float layers they stand for, and against products of codes written out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import nn, tensor

from fqvit_plugin import QAct, QConv2d, QIntLayerNorm, QIntSoftmax, QLinear
from fqvit_plugin.intmath import (
    input_range,
    int_layernorm,
    int_layernorm_reference,
    log_int_softmax_,
    log_int_softmax_reference_,
)
from fqvit_plugin.lifecycle import calibrate_, close_calibrate, dequant, open_calibrate, open_last_calibrate, quant
from fqvit_plugin.phase import Phase, QuantLayer
from fqvit_plugin.scheme import BitType, QuantSpec

WEIGHT = QuantSpec(BitType(8, True), axis=0)
ACT = QuantSpec(BitType(8, False))
PTF = QuantSpec(BitType(8, False), 'ptf', axis=-1)

LINEARS = [nn.Linear(6, 5), nn.Linear(6, 5, bias=False)]
CONVS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
    nn.Conv2d(4, 8, 3, groups=2, dilation=2),
    nn.Conv2d(4, 4, 3, padding='same', padding_mode='reflect'),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def twin_of(layer):
    return (QLinear if isinstance(layer, nn.Linear) else QConv2d).from_float(layer, WEIGHT)


def input_of(layer):
    return torch.randn(3, 7, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9, 8)


def calibrated_act(x, spec=ACT):
    act = QAct(spec, None if spec.axis is None else x.shape[spec.axis])
    calibrate_(act, [x])
    quant(act)
    return act


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize('layer', [*LINEARS, *CONVS], ids=str)
def test_float_phase_is_the_float_layer(layer):
    x, twin = input_of(layer), twin_of(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.extra_repr() == layer.extra_repr()


@pytest.mark.parametrize('layer', [*LINEARS, *CONVS], ids=str)
def test_from_float_shares_parameters(layer):
    twin = twin_of(layer)
    assert twin.weight is layer.weight
    assert twin.bias is layer.bias
    assert dict(twin.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    assert twin_of(layer.train()).training
    assert not twin_of(layer.eval()).training


@pytest.mark.parametrize('layer', [*LINEARS, *CONVS], ids=str)
def test_gradients_flow_in_float(layer):
    x, twin = input_of(layer), twin_of(layer)
    layer.zero_grad()
    (twin(x) ** 2).sum().backward()
    from_twin = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    (layer(x) ** 2).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(from_twin, layer.parameters(), strict=True))


@pytest.mark.parametrize('layer', [*LINEARS, *CONVS], ids=str)
@torch.no_grad()
def test_quantized_weight_by_its_definition(layer):
    # oracle: max |w| / 127 of every output channel, rounded codes, then the float layer on the product
    x, twin = input_of(layer), twin_of(layer)
    calibrate_(twin, [x])
    quant(twin)
    weight = layer.weight.clone()
    for channel in weight:
        scale = channel.abs().max() / 127
        channel.copy_((channel / scale).round().clamp(-128, 127) * scale)
    assert not torch.equal(weight, layer.weight)
    if isinstance(layer, nn.Linear):
        expected = F.linear(x, weight, layer.bias)
    else:
        expected = layer._conv_forward(x, weight, layer.bias)
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)


def test_the_weight_is_observed_once_and_late():
    # field.md A5: the reference observes weights at every batch
    twin = twin_of(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    open_calibrate(twin)
    twin(x)
    assert not twin.weight_quantizer.is_taken
    open_last_calibrate(twin)
    twin(x)
    assert twin.weight_quantizer.is_taken
    taken = twin.weight_quantizer.latest_scale
    twin(x)  # a layer that is called twice in a pass
    assert twin.weight_quantizer.latest_scale is taken
    close_calibrate(twin)


def test_one_scale_for_the_whole_weight():
    layer = nn.Linear(6, 5)
    twin = QLinear.from_float(layer, QuantSpec(BitType(4, True)))
    calibrate_(twin, [torch.randn(2, 6)])
    assert twin.weight_quantizer.scale.item() == pytest.approx(layer.weight.abs().max().item() / 7)


def test_observer_of_weights_sees_the_weight():
    # field.md A5: with OMSE the reference searches on the layer's input and fails
    layer = nn.Linear(6, 5)
    twin = QLinear.from_float(layer, QuantSpec(BitType(4, True), 'omse', axis=0))
    calibrate_(twin, [torch.randn(2, 6)])
    assert (twin.weight_quantizer.scale <= layer.weight.abs().amax(1) / 7 + 1e-7).all()


@pytest.mark.parametrize(('bits', 'dtype'), [(4, torch.int8), (8, torch.int8), (9, torch.int16), (16, torch.int16)])
@torch.no_grad()
def test_the_weight_is_quantized_once_and_kept_as_integers(bits, dtype):
    twin = QLinear.from_float(nn.Linear(6, 5), QuantSpec(BitType(bits, True), axis=0))
    calibrate_(twin, [torch.randn(2, 6)])
    assert twin.weight_steps is None
    quant(twin)
    assert twin.weight_steps.dtype == dtype
    kept = twin.weight_steps
    expected = twin.weight_quantizer(twin.weight)
    assert torch.equal(twin.in_phase(torch.zeros(1, twin.weight.shape[1]))[0], expected)
    assert twin.weight_steps is kept, 'quantized once'
    assert 'weight_steps' not in twin.state_dict()
    dequant(twin)
    assert twin.weight_steps is None


@torch.no_grad()
def test_a_weight_off_center_is_kept_wider():
    layer = nn.Linear(6, 5)
    layer.weight.abs_()
    twin = QLinear.from_float(layer, QuantSpec(BitType(8, False), axis=0))
    calibrate_(twin, [torch.randn(2, 6)])
    quant(twin)
    assert twin.weight_steps.dtype == torch.int16
    assert torch.equal(twin.in_phase(torch.zeros(1, twin.weight.shape[1]))[0], twin.weight_quantizer(layer.weight))


@pytest.mark.parametrize(
    'change',
    [
        lambda twin: twin.weight.mul_(0.5),
        lambda twin: twin.weight_quantizer.scale.mul_(2),
        lambda twin: twin.load_state_dict({**twin.state_dict(), 'weight': torch.ones(5, 6)}),
        lambda twin: setattr(twin, 'weight', nn.Parameter(torch.ones(5, 6))),
        lambda twin: setattr(twin.weight, 'data', torch.ones(5, 6)),
    ],
    ids=['weight', 'scale', 'load', 'parameter', 'data'],
)
@torch.no_grad()
def test_a_changed_weight_is_quantized_anew(change):
    twin = QLinear.from_float(nn.Linear(6, 5), QuantSpec(BitType(8, True), axis=0))
    calibrate_(twin, [torch.randn(2, 6)])
    quant(twin)
    before = twin.in_phase(torch.zeros(1, twin.weight.shape[1]))[0]
    change(twin)
    assert torch.equal(twin.in_phase(torch.zeros(1, twin.weight.shape[1]))[0], twin.weight_quantizer(twin.weight))
    assert not torch.equal(twin.in_phase(torch.zeros(1, twin.weight.shape[1]))[0], before)


def test_a_frozen_weight_works_under_inference_mode():
    twin = QLinear.from_float(nn.Linear(6, 5), QuantSpec(BitType(8, True), axis=0))
    with torch.inference_mode():
        calibrate_(twin, [torch.randn(2, 6)])
        quant(twin)
        inside = twin(torch.ones(1, 6))
    assert torch.equal(inside, twin(torch.ones(1, 6)).detach())


# ---------------------------------------------------------------- QAct


@torch.no_grad()
def test_only_an_act_that_says_so_writes_over_its_input():
    x = torch.randn(20)
    for inplace in (False, True):
        act, mine = QAct(ACT, inplace=inplace), x.clone()
        calibrate_(act, [mine])
        assert torch.equal(mine, x), 'never while it observes'
        quant(act)
        y = act(mine)
        assert (y is mine) == inplace
        assert torch.equal(mine, x) != inplace


def test_act_by_phase():
    act, x = QAct(ACT), tensor([0.0, 254.6, 255.0])
    assert act(x) is x
    open_calibrate(act)
    assert act(x) is x
    open_last_calibrate(act)
    assert act(x) is x
    close_calibrate(act)
    quant(act)
    assert act(x).tolist() == [0, 255, 255]
    assert act.scale.item() == 1


def test_act_with_channels():
    assert QAct(PTF, 5).scale.shape == (5,)
    with pytest.raises(ValueError, match='number of channels'):
        QAct(PTF)


# ---------------------------------------------------------------- LayerNorm


@pytest.mark.parametrize('norm', [nn.LayerNorm(8, eps=1e-3), nn.LayerNorm(8, elementwise_affine=False)], ids=str)
def test_layernorm_in_float(norm):
    twin, x = QIntLayerNorm.from_float(norm, True, 'strict'), torch.randn(2, 3, 8)
    for phase in (Phase.FLOAT, Phase.CALIBRATE, Phase.LAST_CALIBRATE):
        twin.phase = phase
        assert torch.equal(twin(x), norm(x))
    assert twin.weight is norm.weight
    assert twin.bias is norm.bias
    assert twin.state_dict().keys() == norm.state_dict().keys()
    assert twin.training == norm.training
    assert twin.extra_repr() == norm.extra_repr()


def test_layernorm_that_stays_float():
    norm = nn.LayerNorm(8)
    twin, x = QIntLayerNorm.from_float(norm, False, 'reference'), torch.randn(2, 8)
    quant(twin)
    assert torch.equal(twin(x), norm(x))


def test_integer_layernorm_reads_both_grids():
    x = torch.randn(20, 8) * 2.0 ** torch.arange(-3.0, 5)
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    in_act, out_act = calibrated_act(x, PTF), calibrated_act(norm(x))
    assert in_act.scale.unique().numel() > 1
    y = in_act(x)
    for arithmetic in ('strict', 'reference'):
        twin = QIntLayerNorm.from_float(norm, True, arithmetic)
        quant(twin)
        if arithmetic == 'strict':
            zero = in_act.quantizer.zero_point
            in_range = input_range(in_act.scale, -zero, 255 - zero)
            steps = int_layernorm(y, in_act.scale, in_range, out_act.scale, norm.weight, norm.bias, norm.eps)
        else:
            steps = int_layernorm_reference(y, in_act.scale, out_act.scale, norm.weight, norm.bias)
        assert torch.equal(twin(y, in_act, out_act), out_act(steps * out_act.scale))


def test_layernorm_without_affine_has_gain_one():
    x = torch.randn(20, 8)
    in_act = calibrated_act(x)
    y = in_act(x)
    out_act = calibrated_act(F.layer_norm(y, (8,)))
    twin = QIntLayerNorm(8, elementwise_affine=False)
    quant(twin)
    error = (twin(y, in_act, out_act) - F.layer_norm(y, (8,))).abs().max()
    assert error <= 1.01 * out_act.scale  # rounding, and the zero point's at the ends


def test_layernorm_after_unfold_repeats_every_channels_scale():
    # patch merging: channel c of the input stands at 4c .. 4c + 3
    x = torch.randn(20, 3) * tensor([0.25, 1.0, 4.0])
    in_act = calibrated_act(x, PTF)
    unfolded = in_act(x).repeat_interleave(4, dim=-1) * tensor([1.0, -1.0, 1.0, -1.0]).repeat(3)
    norm = QIntLayerNorm(12)
    out_act = calibrated_act(norm(unfolded))
    expected = F.layer_norm(unfolded, (12,))
    quant(norm)
    steps = (norm(unfolded, in_act, out_act, repeat=4) - expected).abs() / out_act.scale
    assert steps.max() <= 1.01  # rounding, and the zero point's at the ends
    norm = QIntLayerNorm(12, arithmetic='reference')  # it divides every channel by its own scale
    quant(norm)
    by_channel = tensor([s for s in in_act.scale.tolist() for _ in range(4)])
    steps = int_layernorm_reference(unfolded, by_channel, out_act.scale, norm.weight, norm.bias)
    assert torch.equal(norm(unfolded, in_act, out_act, repeat=4), out_act(steps * out_act.scale))


def test_layernorm_errors():
    norm = QIntLayerNorm(8)
    quant(norm)
    x, act = torch.zeros(2, 8), calibrated_act(torch.ones(3))
    for acts in ((), (act,), (None, act)):
        with pytest.raises(ValueError, match='integer LayerNorm needs in_act and out_act'):
            norm(x, *acts)
    with pytest.raises(ValueError, match=r'normalized_shape must be a whole number of channels, got \(4, 8\)'):
        QIntLayerNorm((4, 8))


# ---------------------------------------------------------------- softmax


def test_softmax_in_float():
    x = torch.randn(2, 3, 5)
    mask = torch.where(torch.rand(3, 5) < 0.3, -100.0, 0.0)
    for log_int in (True, False):
        softmax = QIntSoftmax(ACT, log_int)
        for phase in (Phase.FLOAT, Phase.CALIBRATE):
            softmax.phase = phase
            assert torch.equal(softmax(x), torch.softmax(x, -1))
            assert torch.equal(softmax(x, mask=mask), torch.softmax(x + mask, -1))


@pytest.mark.parametrize('arithmetic', ['strict', 'reference'])
def test_log_int_softmax_layer(arithmetic):
    spec = QuantSpec(BitType(4, False), arithmetic=arithmetic)
    softmax, x = QIntSoftmax(spec, log_int=True), torch.randn(4, 6, 6)
    mask = torch.zeros(6, 6)
    mask[0, 3:] = -100.0
    act = calibrated_act(x)
    y = act(x)
    quant(softmax)
    if arithmetic == 'strict':
        expected = log_int_softmax_(act.quantizer.steps(x), act.scale, 4)
    else:
        expected = log_int_softmax_reference_(y, act.scale, 4)
    before = x.clone()
    assert torch.equal(softmax(x, act), expected)
    assert (softmax(x, act, mask)[:, 0, 3:] == 0).all()
    assert torch.equal(x, before), 'only an act that says so overwrites its input'
    assert list(softmax.quantizers()) == [], 'its grid is the logits, and it has none of its own'
    with pytest.raises(ValueError, match='Log-Int-Softmax needs in_act'):
        softmax(y)


@pytest.mark.parametrize(('arithmetic', 'integer'), [('strict', False), ('reference', True)])
def test_only_the_reference_is_integer_on_the_last_batch(arithmetic, integer):
    # field.md A3 (i): the published scales were taken that way
    model = nn.ModuleDict(
        dict(act=QAct(ACT), softmax=QIntSoftmax(QuantSpec(BitType(4, False), arithmetic=arithmetic), log_int=True))
    )
    x = torch.randn(4, 6)
    open_calibrate(model)
    assert torch.equal(model.softmax(x, model.act), torch.softmax(x, -1))
    open_last_calibrate(model)
    p = model.softmax(x, model.act)
    assert torch.equal(p, torch.softmax(x, -1)) != integer


@pytest.mark.parametrize('quantizer', ['uniform', 'log2'])
def test_float_softmax_with_quantized_output(quantizer):
    softmax = QIntSoftmax(QuantSpec(BitType(8, False), quantizer=quantizer))
    x = torch.randn(9, 5)
    calibrate_(softmax, [x])
    quant(softmax)
    p = torch.softmax(x, -1)
    if quantizer == 'uniform':
        assert (softmax(x) - p).abs().max() <= 0.51 * p.max() / 255
    else:
        assert torch.equal(softmax(x), 2 ** -(-p.log2()).round())


# ---------------------------------------------------------------- registries


@pytest.mark.parametrize(
    'registry', [(MMPRETRAIN_MODELS, ''), (MMENGINE_MODELS, 'fqvit_plugin.')], ids=['plain', 'scope']
)
@pytest.mark.parametrize(
    ('cls', 'options'),
    [
        (QLinear, dict(in_features=3, out_features=4)),
        (QConv2d, dict(in_channels=3, out_channels=4, kernel_size=2, bias=False)),
        (QAct, dict()),
        (QIntLayerNorm, dict(normalized_shape=8, eps=1e-6)),
        (QIntSoftmax, dict(log_int=True)),
    ],
)
def test_registries_build_every_layer(registry, cls, options):
    models, scope = registry
    layer = models.build(dict(type=scope + cls.__name__, **options))
    assert type(layer) is cls
    assert isinstance(layer, QuantLayer)
    assert layer.phase is Phase.FLOAT


def test_mmengine_finds_the_scope_with_no_import():
    code = (
        'from mmengine.registry import MODELS\n'
        "print(type(MODELS.build(dict(type='fqvit_plugin.QLinear', in_features=2, out_features=3))).__name__)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == 'QLinear', done.stderr


@pytest.mark.parametrize(
    ('spec', 'name', 'observer'),
    [
        (dict(bit_type='int4', axis=0), 'int4', 'minmax'),
        (dict(bit_type='int6', observer='omse'), 'int6', 'omse'),
        (dict(observer='percentile', observer_options=(('alpha', 0.9),)), 'uint8', 'percentile'),
    ],
)
def test_spec_dicts(spec, name, observer):
    layer = MMPRETRAIN_MODELS.build(dict(type='QLinear', in_features=3, out_features=4, spec=spec))
    recipe = layer.weight_quantizer.spec
    assert (recipe.bit_type.name, recipe.observer) == (name, observer)
    calibrate_(layer, [torch.randn(5, 3)])
    quant(layer)
    assert torch.isfinite(layer(torch.randn(5, 3))).all()
    assert QAct(dict(bit_type='uint4')).quantizer.spec.bit_type == BitType(4, False)
    assert QIntSoftmax(dict(bit_type='uint4')).spec.bit_type == BitType(4, False)


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        (dict(bit_type='int1'), 'bits must be a whole number from 2 to 16, got 1'),
        (dict(bit_type='float8'), "bit type must read like int8 or uint4, got 'float8'"),
        (dict(observer='medium'), "unknown observer 'medium'"),
        (dict(quantizer='cubic'), "unknown quantizer 'cubic'"),
        (dict(bits=8), "not a tensor recipe: .*'bits'"),
        (dict(arithmetic='sloppy'), "got 'sloppy'"),
    ],
)
@pytest.mark.parametrize('layer', [dict(type='QLinear', in_features=3, out_features=4), dict(type='QAct')])
def test_wrong_spec_dicts(layer, spec, message):
    with pytest.raises(ValueError, match=message):
        MMPRETRAIN_MODELS.build(dict(layer, spec=spec))


def test_a_spec_dict_is_not_changed():
    spec = dict(bit_type='int4')
    QAct(spec)
    assert spec == dict(bit_type='int4')


def test_layers_own_their_quantizers():
    owned = {
        QLinear(3, 4): ['weight_quantizer'],
        QConv2d(3, 4, 1): ['weight_quantizer'],
        QAct(): ['quantizer'],
        QIntSoftmax(): ['quantizer'],
        QIntLayerNorm(4): [],
    }
    for layer, names in owned.items():
        assert list(layer.quantizers()) == [getattr(layer, name) for name in names]
