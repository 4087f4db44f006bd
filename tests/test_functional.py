"""Quantization arithmetic against tables made by hand, numpy, and torch's own fake-quantize operators."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import tensor

from fqvit_plugin.functional import (
    EPS,
    affine_qparams,
    align,
    dequantize,
    fake_quantize,
    flatten_channels,
    log2_codes,
    log2_dequantize,
    quantize,
    symmetric_qparams,
)

TIES = [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]
ARITHMETICS = ('strict', 'reference')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def int32(*values):
    return tensor(values[0] if len(values) == 1 else values, dtype=torch.int32)


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    ('arithmetic', 'zero_point', 'codes'),
    [
        # oracle: by hand. ONNX: round half to even, then add the zero point.
        ('strict', 8, [4, 6, 6, 8, 8, 10, 10, 12]),
        ('strict', 7, [3, 5, 5, 7, 7, 9, 9, 11]),
        # the reference rounds the sum, so an odd zero point turns the ties round
        ('reference', 8, [4, 6, 6, 8, 8, 10, 10, 12]),
        ('reference', 7, [4, 4, 6, 6, 8, 8, 10, 10]),
    ],
)
@pytest.mark.parametrize('scale', [1.0, 0.25, 8.0])
def test_ties(arithmetic, zero_point, codes, scale):
    x = tensor(TIES) * scale
    assert quantize(x, tensor(scale), int32(zero_point), 0, 255, arithmetic).tolist() == codes


@pytest.mark.parametrize('zero_point', [0, 7, 127, 128, 255])
@pytest.mark.parametrize('scale', [0.02, 0.1, 1 / 3, 2.0**-6])
def test_strict_is_the_rule_of_onnx(zero_point, scale):
    # oracle: QuantizeLinear's definition in numpy, saturate(rint(x / s) + z), half-steps included
    half_steps = np.arange(-600, 600, dtype=np.float32) / 2 * np.float32(scale)
    gaussian = np.random.default_rng(0).normal(0, 40 * scale, 20_000).astype(np.float32)
    x = np.concatenate((half_steps, gaussian))
    expected = np.clip(np.rint(x / np.float32(scale)) + zero_point, 0, 255)
    codes = quantize(torch.from_numpy(x), tensor(scale), int32(zero_point), 0, 255)
    assert np.array_equal(codes.numpy(), expected)


@pytest.mark.parametrize('zero_point', [0, 7, 128])
def test_strict_is_torchs_fake_quantize_where_its_reciprocal_is_exact(zero_point):
    # oracle: torch core; it multiplies by 1 / scale, which is the same for a power of two
    scale = 2.0**-5
    x = torch.cat((torch.arange(-600, 600) / 2 * scale, torch.randn(20_000) * 2))
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    assert torch.equal(fake_quantize(x, tensor(scale), int32(zero_point), 0, 255), expected)


@pytest.mark.parametrize('axis', [0, 1, -1])
def test_per_channel_is_torchs_fake_quantize(axis):
    x = torch.randn(3, 5, 4) * 2
    channels = x.shape[axis]
    scale = 2.0 ** -torch.arange(2.0, 2 + channels)
    zero_point = torch.arange(channels, dtype=torch.int32) * 3
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis % 3, 0, 15)
    ours = fake_quantize(x, align(scale, x, axis), align(zero_point, x, axis), 0, 15)
    assert torch.equal(ours, expected)


def test_arithmetics_differ_at_ties_only():
    torch.manual_seed(0)
    scale, zero_point = tensor(2.0**-4), int32(101)  # a power of two: x / scale is exact
    x = torch.randn(10_000) * 3
    near = (x / scale - torch.floor(x / scale) - 0.5).abs()
    strict, reference = (quantize(x, scale, zero_point, 0, 255, a) for a in ARITHMETICS)
    assert torch.equal(strict[near > 1e-4], reference[near > 1e-4])
    ties = (torch.arange(-90, 90) + 0.5) * scale
    strict, reference = (quantize(ties, scale, zero_point, 0, 255, a) for a in ARITHMETICS)
    assert ((strict - reference).abs() == 1).all()  # zero point odd: every tie goes the other way


@pytest.mark.parametrize('arithmetic', ARITHMETICS)
@pytest.mark.parametrize(('qmin', 'qmax'), [(0, 3), (0, 255), (-128, 127), (-8, 7), (0, 65535), (-32768, 32767)])
def test_codes_are_whole_and_saturate(arithmetic, qmin, qmax):
    x = torch.cat((torch.randn(1000) * (qmax - qmin), tensor([-1e30, 1e30, -math.inf, math.inf, 0.0])))
    for zero_point in (qmin, (qmin + qmax) // 2, qmax):
        codes = quantize(x, tensor(0.5), int32(zero_point), qmin, qmax, arithmetic)
        assert torch.equal(codes, codes.round())
        assert codes.min() == qmin
        assert codes.max() == qmax
        assert codes[-5:-1].tolist() == [qmin, qmax, qmin, qmax]
        assert codes[-1] == zero_point


@pytest.mark.parametrize('arithmetic', ARITHMETICS)
def test_inputs_are_not_changed(arithmetic):
    x, scale, zero_point = torch.randn(50), tensor(0.1), int32(3)
    before = x.clone()
    quantize(x, scale, zero_point, 0, 15, arithmetic)
    fake_quantize(x, scale, zero_point, 0, 15, arithmetic)
    log2_codes(x, 4, arithmetic)
    assert torch.equal(x, before)
    k = tensor([0.0, 3.0, 15.0, 16.0])
    log2_dequantize(k, 4, arithmetic)
    assert k.tolist() == [0, 3, 15, 16]


def test_dequantize_undoes_quantize_on_the_grid():
    codes = torch.arange(256.0)
    reals = dequantize(codes, tensor(0.125), int32(100))
    assert reals[[0, 100, 255]].tolist() == [-12.5, 0.0, 19.375]  # by hand
    assert torch.equal(quantize(reals, tensor(0.125), int32(100), 0, 255), codes)


# ---------------------------------------------------------------- scale and zero point


@pytest.mark.parametrize(
    ('lo', 'hi', 'qmin', 'qmax', 'scale', 'zero_point'),
    [
        # by hand: scale = (hi - lo) / (qmax - qmin), zero point = qmin - round(lo / scale)
        (-16.0, 239.0, 0, 255, 1.0, 16),
        (-8.0, 7.0, -8, 7, 1.0, 0),
        (-3.0, 12.0, -8, 7, 1.0, -5),
        (-1.0, 0.5, 0, 3, 0.5, 2),
        (-255.0, 0.0, 0, 255, 1.0, 255),
        (0.0, 510.0, 0, 255, 2.0, 0),
    ],
)
@pytest.mark.parametrize('arithmetic', ARITHMETICS)
def test_affine_table(lo, hi, qmin, qmax, scale, zero_point, arithmetic):
    s, z = affine_qparams(tensor(lo), tensor(hi), qmin, qmax, arithmetic)
    assert (s.item(), z.item()) == (scale, zero_point)
    assert z.dtype == torch.int32


@pytest.mark.parametrize(
    ('lo', 'hi', 'strict', 'reference'),
    [(-1.0, 127.0, 1.0, 127 / 127.5), (-254.0, 10.0, 2.0, 254 / 127.5), (0.0, 63.5, 0.5, 63.5 / 127.5)],
)
def test_symmetric_table(lo, hi, strict, reference):
    for arithmetic, scale in (('strict', strict), ('reference', reference)):
        s, z = symmetric_qparams(tensor(lo), tensor(hi), -128, 127, arithmetic)
        assert s.item() == pytest.approx(scale, rel=1e-7)
        assert z.item() == 0
        assert z.dtype == torch.int32


def test_symmetric_extremes():
    # strict: both extremes are codes; the reference's 127.5 clips the positive one by half a step (field.md B2)
    x = tensor([-127.0, 127.0])
    s, z = symmetric_qparams(x[0], x[1], -128, 127)
    assert torch.equal(fake_quantize(x, s, z, -128, 127), x)
    s, z = symmetric_qparams(x[0], x[1], -128, 127, 'reference')
    error = (fake_quantize(x, s, z, -128, 127, 'reference') - x).abs() / s
    assert error.tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


@pytest.mark.parametrize(('lo', 'hi'), [(3.0, 3.5), (-7.0, -2.0), (0.1, 0.1), (-1.0, 2.0), (0.0, 0.0), (-1e-9, 1e-9)])
@pytest.mark.parametrize('bits', [2, 4, 8, 16])
def test_strict_grid_holds_zero_and_the_range(lo, hi, bits):
    qmax = 2**bits - 1
    s, z = affine_qparams(tensor(lo), tensor(hi), 0, qmax)
    assert 0 <= z <= qmax
    assert fake_quantize(tensor(0.0), s, z, 0, qmax).item() == 0
    x = torch.linspace(lo, hi, 1001)
    # rounding the zero point may cost half a step at one end; one more half for the value itself
    assert (fake_quantize(x, s, z, 0, qmax) - x).abs().max() <= 1.01 * s


def test_all_positive_tensor_saturates_in_the_reference_only():
    # recorded in field.md B3: 3..3.5 has scale .00186 (0.5 / 255 is .00196), zero point 0, error 3.0
    x = torch.linspace(3, 3.5, 100)
    s, z = affine_qparams(x.min(), x.max(), 0, 255, 'reference')
    assert s.item() == pytest.approx(0.5 / 255)
    assert z == 0
    assert (fake_quantize(x, s, z, 0, 255, 'reference') - x).abs().max() == pytest.approx(3.0, abs=1e-2)
    s, z = affine_qparams(x.min(), x.max(), 0, 255)
    assert s.item() == pytest.approx(3.5 / 255)
    assert (fake_quantize(x, s, z, 0, 255) - x).abs().max() <= 0.51 * s


@pytest.mark.parametrize('value', [0.0, 2.5, -2.5])
def test_constant_tensor(value):
    x = torch.full((10,), value)
    for grid, qmin, qmax in ((affine_qparams, 0, 255), (symmetric_qparams, -128, 127)):
        s, z = grid(x.min(), x.max(), qmin, qmax)
        assert s >= EPS
        torch.testing.assert_close(fake_quantize(x, s, z, qmin, qmax), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize('grid', [affine_qparams, symmetric_qparams])
@pytest.mark.parametrize('arithmetic', ARITHMETICS)
def test_channels_are_independent(grid, arithmetic):
    lo, hi = tensor([-1.0, 0.5, -3.0]), tensor([2.0, 0.75, -1.0])
    s, z = grid(lo, hi, -8, 7, arithmetic)
    singly = [grid(a, b, -8, 7, arithmetic) for a, b in zip(lo, hi, strict=True)]
    assert s.tolist() == [one.item() for one, _ in singly]
    assert z.tolist() == [zero.item() for _, zero in singly]


# ---------------------------------------------------------------- shapes


def test_flatten_channels():
    x = torch.arange(24).reshape(2, 3, 4)
    assert flatten_channels(x, None).tolist() == [list(range(24))]
    for axis in (0, 1, 2, -1):
        rows = flatten_channels(x, axis)
        assert rows.shape == (x.shape[axis], 24 // x.shape[axis])
        for c in range(x.shape[axis]):
            assert rows[c].tolist() == x.select(axis, c).flatten().tolist()


def test_align():
    x = torch.zeros(2, 3, 4, 5)
    assert align(torch.ones(()), x, 1).shape == ()
    assert align(torch.ones(3), x, 1).shape == (1, 3, 1, 1)
    assert align(torch.ones(5), x, -1).shape == (1, 1, 1, 5)
    assert align(torch.ones(2), x, 0).shape == (2, 1, 1, 1)


# ---------------------------------------------------------------- log2


@pytest.mark.parametrize(
    ('probability', 'strict', 'reference'),
    [
        # by hand, 4 bits: strict codes 0..14 are powers and 15 is zero; the reference has 0..15 and 16
        (1.0, 0, 0),
        (0.72, 0, 0),  # above 2**-0.5 = .7071
        (0.70, 1, 1),
        (0.5, 1, 1),
        (0.36, 1, 1),  # above 2**-1.5 = .3536
        (0.35, 2, 2),
        (2.0**-14, 14, 14),
        (2.0**-14.4, 14, 14),
        (2.0**-14.6, 15, 15),
        (2.0**-15, 15, 15),
        (2.0**-15.6, 15, 16),
        (2.0**-16, 15, 16),
        (1e-30, 15, 16),
        (0.0, 15, 16),
    ],
)
def test_log2_codes(probability, strict, reference):
    p = tensor(probability)
    for arithmetic, code in (('strict', strict), ('reference', reference)):
        k = log2_codes(p, 4, arithmetic)
        assert k.item() == code
        zero = code == (15 if arithmetic == 'strict' else 16)
        assert log2_dequantize(k, 4, arithmetic).item() == (0.0 if zero else 2.0**-code)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_log2_round_trip(bits):
    p = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    k = log2_codes(p, bits)
    assert k.min() >= 0
    assert k.max() <= 2**bits - 1, 'strict codes fit into their bits'
    back = log2_dequantize(k, bits)
    kept = k < 2**bits - 1
    ratio = back[kept] / p[kept]
    assert ratio.min() >= 2**-0.5 * (1 - 1e-5)
    assert ratio.max() <= 2**0.5 * (1 + 1e-5)
    assert (p[~kept] <= 2 ** -(2**bits - 1.5) * (1 + 1e-5)).all()
    assert torch.equal(log2_codes(back[kept], bits), k[kept])
