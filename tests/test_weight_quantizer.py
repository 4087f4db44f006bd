"""Factors of groups of columns. Oracles: errors by hand, and every pair of factor and code tried out."""

from __future__ import annotations

import pytest
import torch

from fqvit_plugin.integer.packing import apart, fits, pack, unpack
from fqvit_plugin.layers import QConv2d, QLinear
from fqvit_plugin.lifecycle import calibrate_, quant
from fqvit_plugin.presets import get_scheme
from fqvit_plugin.report import count_bytes
from fqvit_plugin.scheme import BitType, QuantSpec
from fqvit_plugin.weight_quantizer import WeightQuantizer, largest_factor, least_error


def spec(bits=4, size=16):
    return QuantSpec(BitType(bits, True), axis=0, group_size=size)


def uneven(rows=12, columns=40, seed=0):
    """A weight whose groups of 8 columns have unlike ranges."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * torch.rand(rows, columns // 8, generator=generator).add(0.05).repeat_interleave(8, 1)


def taken(weight, bits=4, size=8):
    quantizer = WeightQuantizer(spec(bits, size), len(weight))
    quantizer.observe(weight)
    quantizer.take_qparams(weight)
    quantizer.commit()
    return quantizer


@pytest.mark.parametrize(('bits', 'largest'), [(2, 15), (3, 15), (4, 15), (5, 7), (6, 3), (7, 1), (8, 1)])
def test_the_largest_factor_leaves_int8(bits, largest):
    assert largest_factor(bits) == largest
    assert largest * 2 ** (bits - 1) <= 128
    weight = uneven()
    quantizer = taken(weight, bits)
    assert quantizer.has_groups is (bits < 7)
    steps = quantizer.steps(weight)
    assert int(steps.min()) >= -127 or bits == 8
    assert int(steps.max()) <= 127
    if largest == 1:
        plain = WeightQuantizer(QuantSpec(BitType(bits, True), axis=0), len(weight))
        plain.observe(weight)
        plain.take_qparams(weight)
        plain.commit()
        assert torch.equal(quantizer(weight), plain(weight))


@pytest.mark.parametrize('size', [4, 8, 16, 64])
@pytest.mark.parametrize('shape', [(12, 40), (12, 10, 2, 2)])
def test_weights_lie_on_codes_times_factors_times_scale(shape, size):
    weight = uneven().view(shape)
    quantizer = taken(weight, size=size)
    factors = quantizer.factors
    assert factors.shape == (12, -(-40 // size))
    per_column = factors.repeat_interleave(size, 1)[:, :40].view(shape)
    scale = quantizer.scale.view(-1, *[1] * (len(shape) - 1))
    codes = (weight / (scale * per_column)).round().clamp(-8, 7)
    assert torch.equal(quantizer.quantize(weight), codes)
    assert torch.equal(quantizer.steps(weight), codes * per_column)
    assert torch.equal(quantizer(weight), codes * per_column * scale)
    off = (quantizer(weight) - weight).abs() / (scale * per_column)
    assert float(off.max()) <= 0.5001, 'every group is covered'
    assert bool((factors.amax(1) == largest_factor(4)).all()), 'the widest group of a row has the largest factor'


@pytest.mark.parametrize(('bits', 'most'), [(3, 0.75), (4, 0.5), (6, 0.9)])
def test_searched_factors_beat_one_scale_for_a_row(bits, most):
    weight, importance = uneven(), torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.1
    quantizer = taken(weight, bits)
    covering = ((quantizer(weight) - weight).square() * importance).sum()
    quantizer.search_(weight, importance, 0.3)
    searched = ((quantizer(weight) - weight).square() * importance).sum()
    scale = least_error(weight, importance, 2 ** (bits - 1), 0.3)[:, None]
    one = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    assert searched <= covering
    assert searched < most * ((one - weight).square() * importance).sum()


def test_no_other_factor_of_a_group_is_better():
    weight, importance = uneven(), torch.ones(40)
    quantizer = taken(weight)
    quantizer.search_(weight, importance, 0.3)
    errors = []
    for factor in range(1, 16):
        step = (quantizer.scale * factor)[:, None]
        off = (weight / step).round().clamp(-8, 7) * step - weight
        errors.append(off.square().view(12, 5, 8).sum(-1))
    chosen = torch.stack(errors).gather(0, quantizer.factors[None].long() - 1)[0]
    assert torch.allclose(chosen, torch.stack(errors).amin(0))


def test_what_groups_are_not_for():
    with pytest.raises(ValueError, match='whole number from 2, got 1'):
        spec(size=1)
    for wrong in (dict(axis=None), dict(arithmetic='reference'), dict(bit_type=BitType(4, False))):
        with pytest.raises(ValueError, match='signed weights with a scale for each row'):
            QuantSpec(**{**dict(bit_type=BitType(4, True), axis=0, group_size=16), **wrong})
    assert get_scheme('fqvit_w4a4').weight.group_size == 16
    assert get_scheme('fqvit_w4a4').edge_weight.group_size is None
    assert get_scheme('fqvit_w4a4', group_size=0).weight.group_size is None
    assert get_scheme('fqvit_w8a8', weight_bits=4).weight.group_size is None
    assert get_scheme('fqvit_w4a8', preset='reference', steps=[]).weight.group_size is None


LAYERS = [QLinear(40, 12, spec=spec()), QConv2d(10, 12, 2, spec=spec())]


@pytest.mark.parametrize('layer', LAYERS, ids=['linear', 'conv'])
def test_a_layer_multiplies_what_its_integers_say(layer):
    assert count_bytes(layer) == (40 * 12 * 4 + 12 * 3 * 4) // 8 + 12 * 4 + 12 * 8
    x = torch.randn(3, 40) if layer.weight.ndim == 2 else torch.randn(3, 10, 5, 5)
    with torch.no_grad():
        calibrate_(layer, [x])
        quant(layer)
        steps, scale, bias = layer.integers()
        weight = steps * scale.view(-1, *[1] * (layer.weight.ndim - 1))
        function = torch.nn.functional.linear if layer.weight.ndim == 2 else torch.nn.functional.conv2d
        assert torch.allclose(layer(x), function(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.column_groups(), torch.arange(40) // 16)


# ---------------------------------------------------------------- packing


def test_packing_gives_every_weight_back():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (7, 43), generator=generator).to(torch.int8)
    assert fits(codes, 4)
    assert torch.equal(unpack(pack(codes), 7, 43), codes)
    groups = torch.cat((torch.arange(40) // 16, torch.tensor([2, 0, 0])))  # copies of three columns stand behind
    factors = torch.randint(1, 16, (7, 3), generator=generator).to(torch.int8)
    weight = codes * factors[:, groups]
    assert not fits(weight, 4)
    found, smallest = apart(weight, groups)
    assert fits(found, 4)
    assert torch.equal(found * smallest[:, groups], weight)
    assert bool((smallest <= factors).all())


def test_what_has_no_factors_is_not_taken_apart():
    weight = torch.tensor([[16, 9], [1, 1]], dtype=torch.int8)
    assert apart(weight, torch.tensor([0, 0])) is None
    codes, factors = apart(weight, torch.tensor([0, 1]))
    assert factors.tolist() == [[4, 3], [1, 1]]
    assert torch.equal(codes * factors, weight)
