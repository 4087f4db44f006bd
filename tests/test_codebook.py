"""Hidden activations of an MLP: copies of channels far out, and levels of few bits.

Oracles: every choice of levels, tried one after the other; copies counted by hand; the float MLP.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import fqvit_plugin as fq
from fqvit_plugin.codebook import HiddenQuantizer, best_levels
from fqvit_plugin.lifecycle import dequant, named_quantizers, quant
from fqvit_plugin.observers import OBSERVERS
from fqvit_plugin.quantizers import build_quantizer
from fqvit_plugin.scheme import BitType, QuantSpec

from . import models

UINT8 = BitType(8, False)
ARCH = dict(models.VIT_ARCH, feedforward_channels=192)  # 192 / 24: eight copies at most
FAR = 17  #: the channel far out


# ---------------------------------------------------------------- levels


def squared_error(counts, levels):
    """Of every code to its nearest level, summed."""
    return sum(int(n) * min((code - level) ** 2 for level in levels) for code, n in enumerate(counts))


@pytest.mark.parametrize('number', [1, 2, 3, 5])
@pytest.mark.parametrize('seed', range(4))
def test_levels_are_the_best_of_all_choices(number, seed):
    counts = torch.randint(0, 40, (11,), generator=torch.Generator().manual_seed(seed))
    if seed == 3:
        counts[2:8] = 0  # codes that never occur
    levels = best_levels(counts, number)
    assert levels.dtype is torch.int64
    assert levels.tolist() == sorted(set(levels.tolist()))
    best = min(squared_error(counts, choice) for choice in itertools.combinations(range(11), number))
    assert squared_error(counts, levels.tolist()) == best


def test_as_many_levels_as_codes_are_all_codes():
    assert best_levels(torch.tensor([5, 0, 0, 1]), 4).tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- copies


def split(high, **options):
    """Copies and limit of channels that reach from -0.2 to ``high``, seen in two batches."""
    observer = OBSERVERS.get('split')(UINT8, **options)
    observer.update(torch.stack((torch.full_like(high, -0.2), high))[None])
    observer.update(torch.stack((high / 2, high * 0))[None])
    low, limit = observer.bounds()
    assert float(low) == pytest.approx(-0.2)
    return observer.copies, float(limit)


def test_a_channel_far_out_gets_copies_up_to_the_budget():
    high = torch.ones(192)
    high[FAR] = 100
    copies, limit = split(high)
    assert copies.tolist() == [FAR] * 8  # 192 / 24
    assert limit == pytest.approx(100 / 9, rel=1e-3)


def test_the_limit_comes_down_no_further_than_to_the_other_channels():
    high = torch.ones(2400)
    high[FAR] = 49.5
    copies, limit = split(high)
    assert limit == pytest.approx(1, rel=1e-3)
    assert copies.tolist() == [FAR] * 49  # of the 100 that there might be: below 1 all channels would need one


def test_two_channels_share_the_budget():
    high = torch.ones(480)
    high[3], high[FAR] = 100, 50
    copies, limit = split(high)
    assert len(copies) <= 20
    assert set(copies.tolist()) == {3, FAR}
    for channel in (3, FAR):
        stretches = 1 + int((copies == channel).sum())
        assert (stretches - 1) * limit < high[channel] <= stretches * limit * 1.001, 'enough of them, and none idle'


@pytest.mark.parametrize(
    ('channels', 'far', 'options'),
    [
        (192, 1.0, {}),  # all alike
        (192, 7.0, {}),  # not far enough: 8 is the least gain
        (96, 100.0, {}),  # four copies, a fifth of the range
        (192, 100.0, dict(share=0)),
        (192, 100.0, dict(gain=20)),
        (192, -0.1, {}),  # nothing above zero
    ],
)
def test_no_limit_where_it_does_not_pay(channels, far, options):
    high = torch.ones(channels) if far > 0 else torch.full((channels,), far)
    high[FAR] = far
    copies, limit = split(high, **options)
    assert len(copies) == 0
    assert limit == pytest.approx(far if far > 0 else 0.0, abs=0.11)


@pytest.mark.parametrize('options', [dict(axis=-1), dict(share=-0.1), dict(share=1.5), dict(gain=0.5)])
def test_bad_options_of_split_are_refused(options):
    with pytest.raises(ValueError, match='split takes no axis, share in 0 to 1 and gain from 1'):
        OBSERVERS.get('split')(UINT8, **options)


# ---------------------------------------------------------------- the quantizer


def hidden(bits, x, observer='split'):
    quantizer = build_quantizer(QuantSpec(BitType(bits, False), observer, quantizer='hidden'))
    quantizer.observe(x)
    quantizer.take_qparams(x)
    quantizer.commit()
    return quantizer


def after_gelu(*shape):
    return torch.nn.functional.gelu(torch.randn(shape, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize('bits', [2, 4, 6])
def test_few_bits_are_levels_of_an_8_bit_grid(bits):
    x = after_gelu(4, 50, 96)
    quantizer = hidden(bits, x)
    assert quantizer.code_name == f'uint{bits} of levels'
    assert len(quantizer.levels) == 2**bits
    y = quantizer(x)
    codes = y / quantizer.scale + quantizer.zero_point
    assert set(codes.round().long().unique().tolist()) <= set(quantizer.levels.tolist())
    assert torch.equal(quantizer.quantize(x), codes.round())
    assert torch.equal(quantizer(y), y)
    nearest = min_distance(codes, quantizer, x)
    assert torch.equal((quantizer.quantize(x) - on_grid(quantizer, x)).abs(), nearest)
    uniform = build_quantizer(QuantSpec(BitType(bits, False), 'minmax'))
    uniform.observe(x)
    uniform.take_qparams(x)
    uniform.commit()
    assert (y - x).square().mean() < 0.7 * (uniform(x) - x).square().mean()


def on_grid(quantizer, x):
    return (torch.round(x / quantizer.scale) + quantizer.zero_point).clamp(0, 255)


def min_distance(codes, quantizer, x):
    return (on_grid(quantizer, x)[..., None] - quantizer.levels).abs().min(-1).values


def test_eight_bits_have_no_levels():
    quantizer = hidden(8, after_gelu(4, 50, 96))
    assert quantizer.code_name == 'uint8'
    assert len(quantizer.levels) == len(quantizer.copies) == 0


@pytest.mark.parametrize('bits', [4, 8])
def test_copies_and_the_channel_sum_to_the_whole(bits):
    x = after_gelu(4, 50, 192)
    x[..., FAR] = torch.linspace(0, 300, 200).view(4, 50)
    quantizer = hidden(bits, x)
    assert set(quantizer.copies.tolist()) == {FAR}
    whole = torch.cat((x, x[..., quantizer.copies] - quantizer.shifts), -1)
    parts = quantizer(whole.clamp_min(float(x.min())))
    copied = parts[..., 192:].clamp_min(0)  # before its stretch a copy is what GELU leaves of a negative value: 0
    step = float(quantizer.scale) * (1 if bits == 8 else float(quantizer.levels.diff().max()))
    assert (parts[..., FAR] + copied.sum(-1) - x[..., FAR]).abs().max() <= step * 1.01
    assert float(parts.max()) < 100


def test_levels_of_an_operand_lose_less_than_the_best_even_grid():
    """Oracle: the mse observer's grid, of all those with 16 even steps."""
    x = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0)) ** 3

    def on_grid(**spec):
        quantizer = build_quantizer(QuantSpec(BitType(4, False), **spec))
        quantizer.observe(x)
        quantizer.take_qparams(x)
        quantizer.commit()
        return quantizer(x)

    levels, even = on_grid(quantizer='levels'), on_grid(observer='mse', observer_options=(('norm', 2.0),))
    assert len(levels.unique()) == 16
    assert (levels - x).square().mean() < 0.8 * (even - x).square().mean()


@pytest.mark.parametrize('spec', [dict(bit_type=BitType(8, True)), dict(bit_type=UINT8, observer='minmax', axis=-1)])
def test_signed_types_and_axes_are_refused(spec):
    with pytest.raises(ValueError, match='HiddenQuantizer takes unsigned types and one scale'):
        HiddenQuantizer(QuantSpec(**spec), 4)


# ---------------------------------------------------------------- in an MLP


def with_channel_far_out():
    """A ViT in whose first MLP one hidden channel is at 120 to 180, where the others reach about 2."""
    model = models.vit(arch=ARCH)
    ffn = model.backbone.layers[0].ffn.layers
    with torch.no_grad():
        ffn[0][0].weight[FAR] *= 10
        ffn[0][0].bias[FAR] = 150
        ffn[1].weight[:, FAR] *= 0.02
    return model


def without_splits(scheme):
    return dataclasses.replace(scheme, hidden=dataclasses.replace(scheme.hidden, observer='minmax'))


def mlp_of(scheme, data):
    """Quantized model, its first MLP, that MLP's float input and output."""
    model = with_channel_far_out()
    seen = []
    fq.quantize_model_(model, scheme)
    ffn = model.backbone.layers[0].ffn
    fq.calibrate_(model, data)
    dequant(model)
    handle = ffn.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(data[0])
    handle.remove()
    return model, ffn, *seen[0]


@pytest.mark.parametrize(('name', 'factor'), [('fqvit_w8a8', 4), ('fqvit_w4a4', 2)])  # levels adapt to outliers too
def test_copies_bring_an_mlp_nearer_to_float(name, factor):
    data = models.batches(3)
    scheme = fq.get_scheme(name, steps=[], weight_bits=8, ptf=False)
    errors = {}
    for kind, recipe in (('with', scheme), ('without', without_splits(scheme))):
        model, ffn, x, wanted = mlp_of(recipe, data)
        quant(model)
        copies = ffn.hidden_act.quantizer.copies
        assert set(copies.tolist()) == ({FAR} if kind == 'with' else set())
        assert len(copies) <= 8
        with torch.no_grad():
            errors[kind] = float((ffn(x.clone()) - wanted).square().mean())
    assert errors['with'] < errors['without'] / factor


def test_float_is_bit_by_bit_the_models_with_copies_and_without():
    data = models.batches(2)
    model = with_channel_far_out()
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    with torch.no_grad():
        expected = model(data[0])
    for recipe in (fq.get_scheme('fqvit_w8a8'), without_splits(fq.get_scheme('fqvit_w8a8'))):
        model, _, _, _ = mlp_of(recipe, data)
        with torch.no_grad():
            assert torch.equal(model(data[0]), expected)
            quant(model)
            assert not torch.equal(model(data[0]), expected)
            dequant(model)
            assert torch.equal(model(data[0]), expected)


def test_a_second_calibration_starts_from_the_layers_own_channels():
    data = models.batches(2)
    model, _, _, _ = mlp_of(fq.get_scheme('fqvit_w8a8'), data)
    before = {f'{n}.{b}': t.clone() for n, q in named_quantizers(model) for b, t in q.named_buffers()}
    fq.calibrate_(model, data)
    after = {f'{n}.{b}': t for n, q in named_quantizers(model) for b, t in q.named_buffers()}
    assert all(torch.equal(before[k], after[k]) for k in before)
