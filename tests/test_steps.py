"""Steps of calibration: equalize, round, tune, and a user's own.

Oracles: the float model; nearest rounding; the squared error of a product, computed here.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fqvit_plugin as fq
from fqvit_plugin.blocks.common import linked
from fqvit_plugin.layers import QAct, QIntLayerNorm, QLinear
from fqvit_plugin.lifecycle import dequant, forward_images, phase_of, quant, set_phase
from fqvit_plugin.phase import Phase, QuantLayer
from fqvit_plugin.registry import STEPS
from fqvit_plugin.scheme import StepSpec
from fqvit_plugin.steps.base import Calibration, Step, blocks_of, walk, weight_layers
from fqvit_plugin.steps.equalize import Equalize
from fqvit_plugin.steps.rounding import Round, round_with_feedback
from fqvit_plugin.steps.tuning import Tune, _Tuned
from fqvit_plugin.weight_quantizer import least_error

from . import models, timm_models
from .zoo import ZOO

MODELS = {'vit': (models.vit, 32), 'swin': (models.swin, 56)}


@torch.no_grad()
def logits(model, data):
    return torch.cat([models.features(model(x))[-1] for x in data])


def mse(a, b):
    return float((a - b).square().mean())


def calibration_of(model, data):
    return Calibration(model, data, forward_images)


def recalibrated(make, data, name, steps, **options):
    """A model of recipe ``name`` with ``steps``, in phase float."""
    model = make()
    fq.quantize_model_(model, fq.get_scheme(name, steps=steps, **options))
    fq.calibrate_(model, data)
    return model


# ---------------------------------------------------------------- equalize


EQUALIZED = {
    **MODELS,
    'deit3': (lambda: models.vit('DeiT3'), 32),
    'vit without qkv bias': (lambda: models.vit(qkv_bias=False), 32),
    'swin, padded windows': (lambda: models.swin(img_size=60), 60),
    'timm vit': (timm_models.vit, 32),
    'timm swin, padded windows': (lambda: timm_models.swin(img_size=60), 60),
    **{name: ZOO[name] for name in ('clip', 'dinov2 giant', 'beit', 'eva02', 'swinv2', 'pcpvt', 'svt', 'mvit')},
    'davit, another size, padded maps': ZOO['davit, another size, padded maps'],
}


@pytest.mark.parametrize('name', EQUALIZED)
def test_equalize_leaves_the_float_model_and_its_parameters(name):
    make, size = EQUALIZED[name]
    model, data = make(), models.batches(2, size)
    before = logits(model, data)
    parameters = {key: (p, p.detach().clone()) for key, p in model.named_parameters()}
    fq.quantize_model_(model, fq.get_scheme('fqvit_w4a4'))
    Equalize().run(calibration_of(model, data))
    after = logits(model, data)
    assert (after - before).abs().max() < 3e-6 * before.abs().max()
    assert all(torch.equal(p, clone) for p, clone in parameters.values()), "the runner's model was written to"
    names = {key for key, _ in model.named_parameters()}
    assert names == set(parameters), 'no parameter that a checkpoint of the model would not have'
    if name in MODELS:
        replaced = {key for key, p in model.named_parameters() if p is not parameters[key][0]}
        assert any('qkv.weight' in key for key in replaced)
        assert any('ffn.layers.0.0.weight' in key for key in replaced)


def unlike_channels(make):
    """A model whose LayerNorms put out channels of very unlike range, off zero."""
    model = make()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(torch.exp(1.5 * torch.randn(module.weight.shape, generator=generator)))
                module.bias.add_(5 * torch.randn(module.bias.shape, generator=generator))
    return model


@torch.no_grad()
def norm_ranges(model, data):
    """Low and high of every channel, of each LayerNorm that a block's linear layer reads."""
    read = {id(linked(m)) for m in model.modules() if isinstance(m, QLinear)}
    found = {}

    def keep(norm):
        def hook(_, args, out):
            rows = out.flatten(0, -2)
            low, high = found.get(norm, (torch.inf, -torch.inf))
            found[norm] = (rows.amin(0).clamp_max(low), rows.amax(0).clamp_min(high))

        return hook

    acts = dict(model.named_modules())
    norms = [n for n, m in model.named_modules() if isinstance(m, QIntLayerNorm)]
    places = {n: (n.replace('ln', 'norm') if n.rpartition('.')[2].startswith('ln') else n) + '_act' for n in norms}
    chosen = [n for n in norms if places[n] in acts and id(acts[places[n]]) in read and 'downsample' not in n]
    handles = [acts[n].register_forward_hook(keep(n)) for n in chosen]
    logits(model, data)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize('name', MODELS)
def test_equalize_makes_channels_of_layernorm_outputs_alike(name):
    make, size = MODELS[name]
    model, data = unlike_channels(make), models.batches(2, size)
    fq.quantize_model_(model, fq.get_scheme('fqvit_w4a4'))
    wide = norm_ranges(model, data)
    assert len(wide) == 2 * sum(hasattr(m, 'norm2_act') for m in model.modules())
    assert all((high - low).max() > 5 * (high - low).min() for low, high in wide.values())
    Equalize(tail=0).run(calibration_of(model, data))
    for low, high in norm_ranges(model, data).values():
        torch.testing.assert_close(high, high.mean().expand_as(high), rtol=1e-3, atol=0)
        torch.testing.assert_close(low, -high, rtol=1e-3, atol=0)


def test_equalize_makes_values_as_far_as_queries_and_keys():
    model, data = models.vit(), models.batches(2)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.attn.qkv.weight[48:96] *= 20
    fq.quantize_model_(model, fq.get_scheme('fqvit_w4a4'))
    Equalize(norms=False, tail=0).run(calibration_of(model, data))
    seen = []
    handle = model.backbone.layers[0].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    logits(model, data)
    handle.remove()
    query, key, value = torch.cat(seen).flatten(0, -2).abs().amax(0).chunk(3)
    torch.testing.assert_close(query, key, rtol=1e-3, atol=0)
    torch.testing.assert_close(value, value.mean().expand_as(value), rtol=1e-3, atol=0)
    torch.testing.assert_close(value.max(), query.max(), rtol=1e-3, atol=0)


def test_switched_off_equalize_changes_nothing():
    model, data = models.vit(), models.batches(1)
    fq.quantize_model_(model, fq.get_scheme('fqvit_w4a4'))
    before = {key: id(p) for key, p in model.named_parameters()}
    Equalize(norms=False, attention=False).run(calibration_of(model, data))
    assert before == {key: id(p) for key, p in model.named_parameters()}


@pytest.mark.parametrize('name', MODELS)
def test_equalize_helps_few_bits(name):
    make, size = MODELS[name]
    data = models.batches(3, size)
    wanted = logits(unlike_channels(make), data)
    errors = []
    for steps in ([], ['equalize']):
        model = recalibrated(lambda: unlike_channels(make), data, 'fqvit_w4a4', steps, weight_bits=8)
        quant(model)
        errors.append(mse(logits(model, data), wanted))
    assert errors[1] < 0.8 * errors[0]


# ---------------------------------------------------------------- round: by hand


def problem(seed=0, rows=20, columns=96):
    """Weight, correlated inputs, their covariance, and the scale of 4 bits."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, columns, generator=generator)
    x = x + 0.3 * torch.randn(500, columns, generator=generator)
    return weight, x, (x.T @ x / len(x)).double(), weight.abs().amax(1) / 7.4


def product_error(weight, codes, scale, x):
    """``||(W - W_q) X||``, squared."""
    return float(((weight - codes.float() * scale[:, None]) @ x.T).square().sum())


@pytest.mark.parametrize('seed', range(3))
def test_feedback_beats_nearest_rounding_on_correlated_inputs(seed):
    weight, x, covariance, scale = problem(seed)
    nearest = torch.round(weight / scale[:, None]).clamp(-8, 7)
    codes = round_with_feedback(weight, scale[:, None], covariance, 8, 0.01)
    assert codes.dtype is torch.int8
    assert int(codes.min()) >= -8
    assert int(codes.max()) <= 7
    assert product_error(weight, codes, scale, x) < 0.5 * product_error(weight, nearest, scale, x)


def test_feedback_is_nearest_rounding_on_white_inputs():
    weight, _, _, scale = problem()
    codes = round_with_feedback(weight, scale[:, None], torch.eye(96, dtype=torch.float64), 8, 0.01)
    assert torch.equal(codes.float(), torch.round(weight / scale[:, None]).clamp(-8, 7))


def test_columns_that_never_vary_do_no_harm():
    weight, x, _, scale = problem()
    x[:, 30:40] = 0
    codes = round_with_feedback(weight, scale[:, None], (x.T @ x / len(x)).double(), 8, 0.01)
    nearest = torch.round(weight / scale[:, None]).clamp(-8, 7)
    assert product_error(weight, codes, scale, x) < 0.5 * product_error(weight, nearest, scale, x)
    zero = round_with_feedback(weight, scale[:, None], torch.zeros(96, 96, dtype=torch.float64), 8, 0.01)
    assert torch.equal(zero.float(), nearest)


@pytest.mark.parametrize('limit', [2, 8, 32])
def test_the_searched_scale_is_never_worse_than_the_plain_one(limit):
    weight, x, _, _ = problem()
    weight[3], weight[4, 7] = 0, 30  # a row of zeros, and one with a value far out
    importance = x.square().mean(0)

    def errors(scale):
        codes = torch.round(weight / scale[:, None]).clamp(-limit, limit - 1)
        return ((codes * scale[:, None] - weight).square() * importance).sum(1)

    scale = least_error(weight, importance, limit, 0.3)
    plain = weight.abs().amax(1).clamp_min(1e-8) / (limit - 0.5)
    assert bool((errors(scale) <= errors(plain) * (1 + 1e-6)).all())
    assert int((errors(scale) < 0.99 * errors(plain)).sum()) > 5
    assert bool((scale >= 0.299 * plain).all())
    assert bool((scale <= 1.001 * plain).all())


# ---------------------------------------------------------------- round: in models


@pytest.mark.parametrize('name', MODELS)
def test_round_beats_nearest_rounding_at_4_bits(name):
    make, size = MODELS[name]
    data, others = models.batches(4, size, per_batch=8), [models.images(16, size, seed=99 + i) for i in range(4)]
    results = {}
    for steps in ((), ('round',)):
        model = recalibrated(make, data, 'fqvit_w4a8', list(steps))
        floats = [logits(model, images) for images in (data, others)]
        quant(model)
        results[steps] = [mse(logits(model, x), f) for x, f in zip((data, others), floats, strict=True)]
        dequant(model)
        assert torch.equal(logits(model, data), floats[0]), 'float again, bit by bit'
        chosen = [n for n, m in weight_layers(model) if m.weight_quantizer.is_chosen]
        assert bool(chosen) is bool(steps)
        assert all('layers' in n or 'stages' in n for n in chosen)
    fresh = make()
    fq.quantize_model_(fresh, fq.get_scheme('fqvit_w4a8'))
    assert torch.equal(logits(fresh, data), floats[0]), 'round does not touch the float weights'
    seen, unseen = (after / before for before, after in zip(results[()], results['round',], strict=True))
    assert seen < 0.7
    assert unseen < 0.8


@pytest.mark.parametrize('name', MODELS)
def test_round_makes_up_for_what_comes_first(name):
    """The stream behind each block has the float one's mean, although the blocks before are quantized."""
    make, size = MODELS[name]
    data = models.batches(3, size, per_batch=8)
    model = recalibrated(make, data, 'fqvit_w4a8', [dict(type='round', share=0)])
    acts = [m.residual_act for _, m in blocks_of(model) if hasattr(m, 'attn')]
    streams = []
    for phase in (Phase.FLOAT, Phase.QUANT):
        set_phase(model, phase)
        seen = {act: [] for act in acts}
        handles = [a.register_forward_hook(lambda m, _, out, seen=seen: seen[m].append(out)) for a in acts]
        logits(model, data)
        for handle in handles:
            handle.remove()
        streams.append([torch.cat(seen[act]).flatten(0, -2) for act in acts])
    for floats, quants in zip(*streams, strict=True):
        assert (floats.mean(0) - quants.mean(0)).abs().max() < 0.02 * floats.std()


@pytest.mark.parametrize('name', MODELS)
def test_regression_brings_unseen_images_nearer_to_float(name):
    make, size = MODELS[name]
    data, others = models.batches(4, size, per_batch=8), [models.images(16, size, seed=99 + i) for i in range(4)]
    errors = []
    for options in (dict(ridge=None, share=0), {}):
        model = recalibrated(make, data, 'fqvit_w4a4', ['equalize', dict(type='round', **options)])
        floats = logits(model, others)
        quant(model)
        errors.append(mse(logits(model, others), floats))
    assert errors[1] < 0.9 * errors[0]


def test_weights_that_cannot_be_chosen_stay_at_the_nearest():
    data = models.batches(2)
    plain, rounded = (recalibrated(models.vit, data, 'fqvit_w4a8', s, weight_bits=10) for s in ([], ['round']))
    for model in (plain, rounded):
        quant(model)
    assert torch.equal(logits(plain, data), logits(rounded, data))


@pytest.mark.parametrize(
    'options', [dict(damp=0), dict(damp=2), dict(shrink=0), dict(shrink=1.5), dict(ridge=0), dict(share=2)]
)
def test_bad_options_of_round_are_refused(options):
    with pytest.raises(ValueError, match='round wants damp and shrink between 0 and 1, ridge above 0'):
        Round(**options)


# ---------------------------------------------------------------- tune


TUNE = dict(type='tune', block_steps=15, model_steps=15, batch_size=8)


def watch_gradients(monkeypatch):
    """What Adam was given, step by step."""
    adam, seen = torch.optim.Adam.step, []

    def step(self, *args, **kwargs):
        parameters = [p for group in self.param_groups for p in group['params']]
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)
        seen.append(sum(float(p.grad.abs().sum()) for p in parameters))
        return adam(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, 'step', step)
    return seen


def assert_at_rest(model):
    """In float, and nothing of tuning left."""
    assert phase_of(model) is Phase.FLOAT
    assert all(getattr(m, 'tuned', None) is None for m in model.modules())
    assert not any('tuned' in key for key in model.state_dict())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(('name', 'steps'), [('vit', ['equalize']), ('swin', [])])
def test_tune_brings_the_logits_nearer_to_float(name, steps, monkeypatch):
    # from nearest rounding: behind `round`, activations make most of a random model's error, and chance decides
    make, size = MODELS[name]
    data = models.batches(3, size, per_batch=8)
    model = recalibrated(make, data, 'fqvit_w4a4', steps)
    floats = logits(model, data)
    quant(model)
    before = mse(logits(model, data), floats)
    dequant(model)
    gradients = watch_gradients(monkeypatch)
    options = {k: v for k, v in TUNE.items() if k != 'type'}
    with torch.no_grad():  # as calibration does
        Tune(**options).run(calibration_of(model, data))
    assert len(gradients) == 15 * (len(blocks_of(model)) + 1)
    assert min(gradients) > 0
    set_phase(model, Phase.FLOAT)
    assert_at_rest(model)
    assert torch.equal(logits(model, data), floats)
    quant(model)
    assert mse(logits(model, data), floats) < 0.95 * before


def test_tune_is_reproducible_and_alone_is_a_recipe():
    data = models.batches(2, per_batch=4)
    runs = []
    for _ in range(2):
        model = recalibrated(models.vit, data, 'fqvit_w4a4', [dict(TUNE, block_steps=3, model_steps=3)])
        assert_at_rest(model)
        quant(model)
        runs.append(logits(model, data))
    assert torch.equal(*runs)


def test_the_float_stream_of_a_walk_is_the_float_models_whatever_phase_it_finds():
    data = models.batches(2, per_batch=4)
    model = recalibrated(models.vit, data, 'fqvit_w4a4', [])
    expected = [floats for _, _, floats, _, _ in walk(calibration_of(model, data))]
    quant(model)
    for (_, _, floats, quants, _), first in zip(walk(calibration_of(model, data)), expected, strict=True):
        assert torch.equal(torch.cat(floats), torch.cat(first))
        assert not torch.equal(torch.cat(floats), torch.cat(quants))


def test_tuning_starts_from_the_codes_that_were_chosen_and_can_change_them():
    data = models.batches(2, per_batch=4)
    model = recalibrated(models.vit, data, 'fqvit_w4a4', ['round'])
    quant(model)
    layers = [m for _, m in weight_layers(model) if m.weight_quantizer.is_chosen]
    chosen = [m.weight_quantizer.codes.clone() for m in layers]
    for layer, codes in zip(layers, chosen, strict=True):
        tuned = _Tuned(layer)
        assert torch.equal(tuned.steps().to(torch.int8), codes)
        off = (tuned.start - codes / layer.multiples()).abs()
        assert 0.4 < float(off.max()) < 0.5, 'a weight that was moved may go back, none has gone yet'
    dequant(model)
    Tune(block_steps=3, model_steps=0, batch_size=4, rounding_rate=0.05).run(calibration_of(model, data))
    changes = [(m.weight_quantizer.codes.int() - c) / m.multiples() for m, c in zip(layers, chosen, strict=True)]
    assert all(0 < int((change != 0).sum()) < change.numel() / 2 for change in changes)
    assert max(int(change.abs().max()) for change in changes) == 1


class StoppedError(Exception):
    pass


@pytest.mark.parametrize('steps', [dict(block_steps=0), dict(model_steps=0)], ids=['model', 'block'])
def test_an_exception_leaves_the_model_in_float(steps):
    data = models.batches(2, per_batch=4)
    model = recalibrated(models.vit, data, 'fqvit_w4a4', ['round'])
    codes = {n: m.weight_quantizer.codes.clone() for n, m in weight_layers(model)}
    act = model.backbone.layers[1].ffn.hidden_act

    def stop(module, args):
        if module.phase is Phase.TUNE:
            raise StoppedError

    handle = act.register_forward_pre_hook(stop)
    with pytest.raises(StoppedError):
        Tune(**dict(dict(block_steps=2, model_steps=2, batch_size=4), **steps)).run(calibration_of(model, data))
    handle.remove()
    assert_at_rest(model)
    if steps == dict(block_steps=0):
        assert all(torch.equal(codes[n], m.weight_quantizer.codes) for n, m in weight_layers(model))
    quant(model)
    logits(model, data)


@pytest.mark.parametrize(
    'options',
    [dict(block_steps=-1), dict(batch_size=0), dict(crop=0), dict(mix=1.5), dict(model_steps=-2), dict(views=-1)],
)
def test_bad_options_of_tune_are_refused(options):
    with pytest.raises(ValueError, match='tune wants block_steps, model_steps and views from 0'):
        Tune(**options)


@pytest.mark.parametrize('options', [dict(alpha=2), dict(alpha=-1), dict(tail=0.5), dict(tail=-0.1)])
def test_bad_options_of_equalize_are_refused(options):
    with pytest.raises(ValueError, match=r'equalize wants alpha in 0 to 1 and tail in 0 to 0\.5'):
        Equalize(**options)


# ---------------------------------------------------------------- recipes


@pytest.fixture
def recorder():
    """A user's step, registered while the test runs; what its instances did."""
    done = []

    class Recorder(Step):
        def __init__(self, early=False, value=1):
            self.before_ranges, self.value = early, value

        def run(self, calibration):
            phases = {m.phase for m in calibration.model.modules() if isinstance(m, QuantLayer)}
            scale = calibration.model.backbone.layers[0].norm1_act.scale
            done.append((self.value, phases, len(calibration.batches), bool(scale.isfinite())))

    STEPS.register_module(name='Recorder', module=Recorder)
    yield done
    STEPS.module_dict.pop('Recorder')


def test_a_users_own_step_runs_where_it_says(recorder):
    steps = [dict(type='Recorder', value=2), dict(type='Recorder', early=True), 'Recorder']
    model = models.vit()
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8', steps=steps))
    assert fq.calibrate_(model, iter(models.batches(3))) == 3
    assert recorder == [(1, {Phase.FLOAT}, 3, False), (2, {Phase.FLOAT}, 3, True), (1, {Phase.FLOAT}, 3, True)]


def test_recipes_name_their_steps():
    def names(scheme):
        return [s.name for s in scheme.steps]

    assert names(fq.get_scheme('fqvit_w8a8')) == []
    assert names(fq.get_scheme('fqvit_w4a8')) == ['round']
    assert names(fq.get_scheme('fqvit_w4a4')) == names(fq.get_scheme('fqvit_w6a6')) == ['equalize', 'round']
    assert names(fq.get_scheme('fqvit_w4a4', steps=[])) == []
    assert names(fq.get_scheme('fqvit_w4a4', preset='reference')) == []
    three = fq.get_scheme('fqvit_w4a4', steps=['equalize', dict(type='round', damp=0.1), StepSpec('tune')])
    assert three.steps[1] == StepSpec('round', (('damp', 0.1),))
    assert type(three).from_dict(copy.deepcopy(three.to_dict())) == three
    assert fq.get_scheme('fqvit_w4a4').differences(three)


@pytest.mark.parametrize(
    ('steps', 'message'),
    [
        (['rund'], "unknown step 'rund'; there is: .*round"),
        ([dict(type='round', dampp=1)], "step 'round' does not take {'dampp': 1}"),
        ([dict(type='round', damp=7)], 'round wants damp and shrink between 0 and 1'),
        ([dict(damp=0.1)], r"a step must be a name or dict\(type='round', ...\)"),
        ([3], r"a step must be a name or dict\(type='round', ...\), got 3"),
        ('round', r"steps must be a list such as \['equalize', 'round'\], got 'round'"),
        (dict(type='round'), 'steps must be a list such as'),
    ],
)
def test_bad_steps_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        fq.get_scheme('fqvit_w4a4', steps=steps)


def test_steps_in_the_reference_are_refused():
    with pytest.raises(ValueError, match="steps need preset='strict'; the reference has none, got \\['round'\\]"):
        fq.get_scheme('fqvit_w4a4', preset='reference', steps=['round'])


@pytest.mark.parametrize('name', ['beit', 'eva02', 'swinv2', 'mvit', 'davit'])
def test_other_families_take_all_steps(name):
    make, size = ZOO[name]
    data = models.batches(2, size)
    tune = dict(TUNE, block_steps=1, model_steps=1, batch_size=2)
    model = recalibrated(make, data, 'fqvit_w4a4', ['equalize', 'round', tune])
    assert_at_rest(model)
    floats = logits(model, data)
    original = logits(make(), data)
    assert (floats - original).abs().max() < 3e-6 * original.abs().max()
    quant(model)
    assert mse(logits(model, data), floats) < 0.3 * float(floats.var())


def test_several_processes_are_refused():
    model = models.vit()
    fq.quantize_model_(model, fq.get_scheme('fqvit_w4a4'))
    with pytest.raises(ValueError, match=r'steps \(equalize, round\) run in one process: calibrate with one'):
        fq.calibrate_(model, models.batches(2), sync=object())
    assert phase_of(model) is Phase.FLOAT


def test_no_batch_is_said_with_steps_too():
    model = models.vit()
    fq.quantize_model_(model, fq.get_scheme('fqvit_w4a4'))
    with pytest.raises(ValueError, match='no calibration batch'):
        fq.calibrate_(model, [])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match='Sequential has no quantized blocks for this step to work on'):
        blocks_of(nn.Sequential(nn.Linear(2, 2), QAct()))
