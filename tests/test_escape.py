"""Escapes: channels whose outermost code stands for what a few tokens hold far out. Oracles: arithmetic by hand, the
grid without escapes, and the equality of simulation, integer model and native engine."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fqvit_plugin.analysis.measure import uniform_grid
from fqvit_plugin.checkpoint import load_calibrated_, save_calibrated, stored_scheme, take_calibrated
from fqvit_plugin.escape import EscapeQuantizer, escaped_steps, far_of, limits
from fqvit_plugin.integer.checkpoint import load_integer, save_integer
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.layers import QAct
from fqvit_plugin.lifecycle import calibrate_, dequant, quant
from fqvit_plugin.native.model import NativeModel
from fqvit_plugin.phase import Phase
from fqvit_plugin.presets import get_scheme
from fqvit_plugin.quantizers import UniformQuantizer
from fqvit_plugin.scheme import BitType, QuantSpec
from fqvit_plugin.sensitivity.switches import Switches, fine, narrowed
from fqvit_plugin.surgery import quantize_model_

from . import models

UINT8 = BitType(8, False)
PTF = QuantSpec(UINT8, 'ptf', axis=-1, quantizer='escape')
MINMAX = QuantSpec(UINT8, 'minmax', axis=-1, quantizer='escape')


def tokens(value: float, channel: int = 2, count: int = 3, seed: int = 0) -> torch.Tensor:
    """(2, 50, 6) near zero; in the first ``count`` tokens of each image one channel holds about ``value``."""
    x = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(seed))
    if count:
        x[:, :count, channel] = value * (1 + torch.linspace(-0.1, 0.1, count))
    return x


def calibrated(spec: QuantSpec, *batches: torch.Tensor, kind: type = EscapeQuantizer) -> UniformQuantizer:
    quantizer = kind(spec, batches[0].shape[-1])
    for x in batches:
        quantizer.observe(x)
    quantizer.take_qparams(batches[-1])
    quantizer.commit()
    return quantizer


def test_far_is_taken_from_an_eighth_of_the_way_on_and_on_its_own_side():
    low, high, far = torch.tensor([-101]), torch.tensor([154]), torch.tensor([-901])
    low, high = limits(low, high, far)
    assert (int(low), int(high)) == (-100, 154)
    steps = torch.tensor([0, -100, -200, -201, -900, -5000, 154, 155, 90000])[:, None]
    # 7 * 100 < 701 and 7 * 101 > 700
    assert escaped_steps(steps, low, high, far)[:, 0].tolist() == [0, -100, -100, -901, -901, -901, 154, 154, 154]
    none = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(escaped_steps(steps, low, high, none), steps.clamp(-100, 154))


@pytest.mark.parametrize('spec', [PTF, MINMAX], ids=['ptf', 'minmax'])
@pytest.mark.parametrize('value', [-300.0, 300.0])
def test_one_channel_far_out_leaves_the_others_their_steps(spec, value):
    x = tokens(value)
    ours, plain = calibrated(spec, x), calibrated(spec, x, kind=UniformQuantizer)
    assert ours.far.nonzero()[:, 0].tolist() == [2]
    assert plain.scale[2] > 20 * ours.scale[2]
    assert float(ours.far[2] * ours.scale[2]) == pytest.approx(value, rel=0.02)
    y = ours(x)
    assert (y[:, 3:, 2] - x[:, 3:, 2]).abs().max() <= ours.scale[2]
    assert (y[:, :3, 2] == ours.far[2] * ours.scale[2]).all()
    codes = ours.quantize(x)
    assert (codes[:, :3, 2] == (0 if value < 0 else 255)).all()  # a code that nothing else has
    assert not (codes[:, 3:, 2] == codes[0, 0, 2]).any()
    assert codes.min() >= 0
    assert codes.max() <= 255
    assert torch.equal(ours.from_steps_(ours.steps(x)), y)


def test_no_escape_without_a_token_far_out():
    for x in (tokens(0, count=0), tokens(9), tokens(-300, count=50)):  # none, not far, all of them
        for spec in (PTF, MINMAX):
            ours, plain = calibrated(spec, x), calibrated(spec, x, kind=UniformQuantizer)
            assert ours.far.shape == (0,)
            assert torch.equal(ours.scale, plain.scale)
            assert torch.equal(ours(x), plain(x))
    both = tokens(300)
    both[:, 0, 2] = -300  # one code is left for one side only
    assert calibrated(PTF, both).far.shape == (0,)


def test_what_is_far_out_may_be_missing_in_the_last_batch():
    quantizer = calibrated(PTF, tokens(-300), tokens(0, count=0, seed=1))
    assert float(quantizer.far[2] * quantizer.scale[2]) == pytest.approx(-330, rel=0.01)  # the end of the range
    alone = calibrated(PTF, tokens(-300, seed=1))
    assert 0.4 < quantizer.scale[2] / alone.scale[2] < 2.5


@pytest.mark.parametrize('spec', [PTF, MINMAX], ids=['ptf', 'minmax'])
def test_far_values_keep_16_bits(spec):
    x = tokens(-1e6)
    quantizer = calibrated(spec, x)
    finest = quantizer.scale.min() if spec is PTF else quantizer.scale[2]
    assert 2**14 < float(quantizer.far[2].abs() * quantizer.scale[2] / finest) < 2**15
    assert (quantizer(x)[:, 3:, 2] - x[:, 3:, 2]).abs().max() <= quantizer.scale[2]


def test_no_escape_with_a_shared_zero_point():
    spec = dataclasses.replace(PTF, observer_options=(('shared_zero_point', True),))
    assert calibrated(spec, tokens(-300)).far.shape == (0,)


def test_what_is_far_out_counts_as_covered():
    x = tokens(-300)
    assert uniform_grid(calibrated(PTF, x)).count_saturated(x) == 2  # of six, those beyond their mean


def test_only_strict_streams_and_branches_have_escapes():
    scheme = get_scheme('fqvit_w8a8')
    assert (scheme.norm_input.quantizer, scheme.branch.quantizer) == ('escape', 'escape')
    assert get_scheme('fqvit_w8a8', observer='ema').branch.quantizer == 'uniform'  # its range is no minimum
    assert get_scheme('fqvit_w8a8', ptf=False).norm_input.quantizer == 'uniform'
    scheme = get_scheme('fqvit_w8a8', preset='reference')
    assert {scheme.norm_input.quantizer, scheme.branch.quantizer} == {'uniform'}


# ---------------------------------------------------------------- whole models


@pytest.fixture(scope='module')
def model():
    model = models.vit_with_escapes()
    quantize_model_(model, get_scheme('fqvit_w8a8'))
    calibrate_(model, models.batches(3), lambda m, x: m(x, mode='tensor'))
    with_far = {name for name, m in model.named_modules() if isinstance(m, QAct) and far_of(m.quantizer) is not None}
    assert with_far >= {'backbone.layers.0.ffn.out_act', 'backbone.layers.1.residual_act'}
    quant(model)
    return model


@torch.no_grad()
def test_integer_models_and_the_native_engine_have_the_simulations_codes(model, tmp_path):
    x = models.images(4)
    integer = to_integer(model)
    assert torch.equal(integer(x), model(x, mode='tensor'))
    assert torch.equal(NativeModel(integer)(x), integer(x))
    far = {name for name, grid in integer.program.grids.items() if grid.far}
    assert any(bool(((codes == -128) | (codes == 127)).any()) for op, codes in integer.steps(x) if op.output in far)
    save_integer(integer, tmp_path / 'm.safetensors')
    again = load_integer(tmp_path / 'm.safetensors')
    assert again.program.grids == integer.program.grids
    assert torch.equal(again(x), integer(x))


@torch.no_grad()
def test_a_calibrated_checkpoint_keeps_them(model, tmp_path):
    scheme = get_scheme('fqvit_w8a8')
    save_calibrated(tmp_path / 'm.pth', model, scheme)
    stored = torch.load(tmp_path / 'm.pth', weights_only=False)
    assert stored_scheme(stored) == scheme
    state = take_calibrated(stored, scheme)
    twin = models.vit_with_escapes()
    quantize_model_(twin, scheme)
    load_calibrated_(twin, state)
    twin.load_state_dict(model.state_dict())
    x = models.images(2)
    quant(twin)
    assert torch.equal(twin(x, mode='tensor'), model(x, mode='tensor'))


@torch.no_grad()
def test_pytorchs_way_gives_the_same_bits(model, monkeypatch):
    x = models.images(4)
    fast = model(x, mode='tensor')
    monkeypatch.setattr('fqvit_plugin.fused._library', lambda: None)
    assert torch.equal(model(x, mode='tensor'), fast)


@torch.no_grad()
def test_finer_and_coarser_grids_keep_what_is_far_out(model):
    quantizer = model.backbone.layers[1].residual_act.quantizer
    channel = int(quantizer.far.nonzero()[0])
    value = float(quantizer.far[channel] * quantizer.scale[channel])
    x = torch.zeros(1, 1, len(quantizer.scale))
    x[..., channel] = value
    for twin in (fine(quantizer), narrowed(quantizer, 4)):
        assert float(twin(x)[0, 0, channel]) == pytest.approx(value, rel=0.01)


@torch.no_grad()
def test_measuring_layernorm_alone_keeps_them(model):
    x = models.images(2)
    quantized = model(x, mode='tensor')
    dequant(model)
    expected = model(x, mode='tensor')
    with Switches(model) as switches:
        norms = [name for name in switches.layers if name.endswith(('ln1', 'ln2'))]
        with switches.only(norms):
            alone = model(x, mode='tensor')
    quant(model)
    assert 0 < (alone - expected).abs().max() < (quantized - expected).abs().max()


def test_a_tuned_stream_passes_gradients_and_keeps_far_values(model):
    act = model.backbone.layers[1].residual_act
    channel = int(act.quantizer.far.nonzero()[0])
    x = torch.zeros(1, 2, len(act.scale), requires_grad=True)
    with torch.no_grad():
        x[0, 0, channel] = float(act.quantizer.far[channel] * act.scale[channel])
    phase, act.phase = act.phase, Phase.TUNE
    try:
        y = act(x)
    finally:
        act.phase = phase
    y.sum().backward()
    assert y[0, 0, channel] == x[0, 0, channel]
    assert x.grad[0, 1].eq(1).all()
