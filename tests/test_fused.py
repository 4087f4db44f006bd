"""What the simulation does between products. Oracles: Python's integers, and PyTorch's way against the one of C++."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from fqvit_plugin import compiled, fused
from fqvit_plugin.dyadic import add_rule, affine_rule, mean_rule
from fqvit_plugin.intmath import input_range, layernorm_constants

C = 45  # no multiple of a vector's width


def uniform(*shape, low=0.0, high=1.0, seed=0):
    return torch.empty(*shape).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def whole(*shape, low=-(2**20), high=2**20, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def grid(channels=C, scale=None):
    scale = uniform(channels, low=0.01, high=0.1, seed=5) if scale is None else scale
    return fused.ToGrid.of(torch.tensor(-7), torch.tensor(8), scale, channels)


def both_ways(monkeypatch, run):
    """``run()`` by C++, if there is a compiler, and by PyTorch; they must agree."""
    with torch.no_grad():
        native = run()
        monkeypatch.setattr(fused, '_library', lambda: None)
        plain = run()
    for a, b in zip(native, plain, strict=True):
        assert a.dtype is torch.float32
        assert torch.equal(a, b)
    return plain


def affine_constants(seed=1):
    scales = (uniform(C, low=1e-4, high=1e-2, seed=seed), torch.tensor(0.013))
    bias, out = uniform(C, low=-1, high=1, seed=seed + 1), torch.tensor(0.05)
    return affine_rule(scales, 0.125, bias, out)


@pytest.mark.parametrize('shape', [(3, C), (2, 400, C), (5000, C)])
def test_affine_is_a_multiplication_an_addition_and_a_shift(monkeypatch, shape):
    rule, finish, x = affine_constants(), grid(), whole(*shape, high=3000, low=-3000)
    (y,) = both_ways(monkeypatch, lambda: [fused.affine(x.clone(), fused.Affine.of(rule, C), finish)])
    shift = int(rule.shift)
    rows, results = x.reshape(-1, C)[:3], y.reshape(-1, C)[:3]
    for row, out in zip(rows.tolist(), results, strict=True):
        for c, value in enumerate(row):
            total = int(value) * int(rule.gain[c]) + int(rule.offset[c]) + (1 << (shift - 1))
            assert out[c] == max(-7, min(8, total >> shift)) * finish.scale[c]


def test_wide_accumulators_come_in_float64(monkeypatch):
    rule = affine_constants()
    x = whole(4, C).double() * 128 + 1  # of 28 bits, odd
    y = fused.affine(x.clone(), fused.Affine.of(rule, C), grid())
    expected = (x * rule.gain + rule.offset) / 2**rule.shift + 0.5
    assert torch.equal(y, expected.floor().clamp(-7, 8).float() * grid().scale)


def test_table(monkeypatch):
    rule, table = affine_constants(), uniform(501)
    x = whole(700, C, low=-(10**6), high=10**6)
    read = fused.ToTable(table, -250)
    (y,) = both_ways(monkeypatch, lambda: [fused.affine(x.clone(), fused.Affine.of(rule, C), read)])
    index = ((x.double() * rule.gain + rule.offset) / 2**rule.shift + 0.5).floor().clamp(-250, 250) + 250
    assert torch.equal(y, table[index.long()])
    assert len(y.unique()) > 100


@pytest.mark.parametrize('b_shape', [(3, 50, C), (50, C), (1, 50, C), (1, 1, C), (3, 1, C)])
def test_add(monkeypatch, b_shape):
    scale_a, scale_b, out = uniform(C, low=0.01, high=0.1), torch.tensor(0.03), torch.tensor(0.05)
    rule = add_rule(scale_a, scale_b, out)
    a_q, b_q = whole(3, 50, C, low=-128, high=128), whole(*b_shape, low=-128, high=128, seed=1)
    constants = fused.Add.of(rule, scale_a, scale_b, C)
    (y,) = both_ways(monkeypatch, lambda: [fused.add(a_q * scale_a, b_q * scale_b, constants, grid())])
    a_q, b_q = torch.broadcast_tensors(a_q, b_q)
    for i, j, c in [(0, 0, 0), (1, 7, 44), (2, 49, 13), (2, 0, 30)]:
        total = int(a_q[i, j, c]) * int(rule.gain_a[c]) + int(b_q[i, j, c]) * int(rule.gain_b)
        shift = int(rule.shift)
        assert y[i, j, c] == max(-7, min(8, (total + (1 << (shift - 1))) >> shift)) * grid().scale[c]


def test_whole_steps(monkeypatch):
    scale, steps = torch.tensor(0.0173), whole(40, C, low=-255, high=256)
    (y,) = both_ways(monkeypatch, lambda: [fused.whole_steps(steps * scale, scale)])
    assert torch.equal(y, steps)


@pytest.mark.parametrize('bits', [3, 4, 8])
@pytest.mark.parametrize('masked', [False, True])
def test_powers(monkeypatch, bits, masked):
    scale = torch.tensor(0.11)
    steps = whole(4, 3, 2, 9, 9, low=-128, high=128)
    mask = torch.where(uniform(3, 1, 9, 9, seed=3) > 0.7, -100.0, 0.0) if masked else None
    if mask is not None:
        mask.diagonal(dim1=-2, dim2=-1).zero_()
    high, low, total = both_ways(monkeypatch, lambda: fused.powers(steps.clone(), scale, bits, mask))
    zero = min(2**bits - 1, 16)
    for w, h, n in [(0, 0, 0), (1, 1, 4), (2, 0, 8)]:
        allowed = [t for t in range(9) if mask is None or mask[w, 0, n, t] == 0]
        row = steps[1, w, h, n]
        top = max(row[t].item() for t in allowed)
        expected = {}
        for t in allowed:
            k = round((top - row[t].item()) * 0.11 * math.log2(math.e))
            expected[t] = Fraction(1, 2**k) if k < zero else Fraction(0)
        for t in range(9):
            power = expected.get(t, Fraction(0))
            assert Fraction((high + low)[1, w, h, n, t].item()) == power
            assert (high[1, w, h, n, t] > 0) == (power >= Fraction(1, 128))
        assert Fraction(total[1, w, h, n, 0].item()) == sum(expected.values())


def test_weighted_mean(monkeypatch):
    rule = mean_rule(torch.tensor(0.37, dtype=torch.float64))
    tokens = 9
    k = torch.randint(0, 16, (6, tokens), generator=torch.Generator().manual_seed(0))
    k[:, 0] = 0
    p, v = 2.0**-k, whole(tokens, 5, low=-255, high=256)
    high = torch.where(k < 8, p, 0)
    parts = (high @ v, (p - high) @ v, p.sum(1, keepdim=True))
    (y,) = both_ways(
        monkeypatch, lambda: [fused.weighted_mean(*(t.clone() for t in parts), rule, grid(5, torch.tensor(1.0)))]
    )
    for i in range(6):
        total = sum(2 ** (15 - int(e)) for e in k[i])
        for d in range(5):
            sums = sum(2 ** (15 - int(e)) * int(x) for e, x in zip(k[i], v[:, d], strict=True))
            mean = (sums * (2**44 // total) + 2**27) >> 28
            shift = int(rule.shift) + 16
            steps = (mean * int(rule.gain) + (1 << (shift - 1))) >> shift
            assert y[i, d] == max(-7, min(8, steps))


def test_every_pass_may_end_in_a_table(monkeypatch):
    """Oracle: the same pass to whole steps, which the tests above check, and the table's entries for these."""
    one, table = torch.tensor(1.0), uniform(16, seed=8)
    steps, through = fused.ToGrid.of(torch.tensor(-7), torch.tensor(8), one, C), fused.ToTable(table, -7)
    scale = torch.full((C,), 0.02)
    x = whole(50, C, low=-128, high=128) * scale
    added = fused.Add.of(add_rule(scale, scale, torch.tensor(0.3)), scale, scale, C)
    layer = layernorm_constants(C, scale, torch.tensor(128.0), torch.tensor(0.3), torch.ones(C), torch.zeros(C), 1e-6)
    parts = (whole(50, C, low=-3, high=4) / 2**7, torch.zeros(50, C), torch.ones(50, 1))
    rule = mean_rule(torch.tensor(100.0, dtype=torch.float64))

    def run(finish):
        return [
            fused.add(x, x, added, finish),
            fused.layernorm(x.clone(), layer, finish),
            fused.weighted_mean(*(t.clone() for t in parts), rule, finish),
        ]

    expected = [table[y.long() + 7] for y in run(steps)]
    for y, wanted in zip(both_ways(monkeypatch, lambda: run(through)), expected, strict=True):
        assert torch.equal(y, wanted)
        assert len(y.unique()) > 3


@pytest.mark.parametrize('rows', [3, 4000])
@pytest.mark.parametrize('last', [3, 7])
def test_layernorm(monkeypatch, rows, last):
    scale = 0.02 * 2.0 ** torch.randint(0, last + 1, (C,), generator=torch.Generator().manual_seed(0))
    zero = whole(C, low=0, high=256, seed=3)
    x = (whole(rows, C, low=0, high=256) - zero) * scale
    weight, bias = uniform(C, low=-2, high=2), uniform(C, low=-1, high=1, seed=2)
    in_range = input_range(scale, -zero, 255 - zero)
    layer = layernorm_constants(C, scale, in_range, torch.tensor(0.3), weight, bias, 1e-6)
    assert layer.wide == (last == 7)
    (y,) = both_ways(monkeypatch, lambda: [fused.layernorm(x.clone(), layer, grid())])
    exact = torch.nn.functional.layer_norm(x.double(), (C,), weight.double(), bias.double(), 1e-6) / 0.3
    near = (exact - exact.floor() - 0.5).abs() < 1e-3  # a tie: either side is right
    expected = (exact.round().clamp(-7, 8) * grid().scale).float()
    assert (near | torch.isclose(y, expected)).all()
    assert near.float().mean() < 0.01


def test_without_a_compiler_pytorch_does_it(monkeypatch, tmp_path):
    monkeypatch.setenv('FQVIT_NATIVE_CACHE', str(tmp_path))
    monkeypatch.setattr(compiled.shutil, 'which', lambda name: None)
    compiled._load.cache_clear()
    fused._library.cache_clear()
    try:
        steps = torch.tensor([[3.0, -4.0]])
        with torch.no_grad():
            assert torch.equal(fused.whole_steps(steps * 0.5, torch.tensor(0.5)), steps)
        assert fused._library() is None
    finally:
        monkeypatch.undo()
        compiled._load.cache_clear()
        fused._library.cache_clear()


def test_the_environment_switches_it_off(monkeypatch):
    fused._library.cache_clear()
    monkeypatch.setenv('FQVIT_NATIVE', '0')
    try:
        assert fused._library() is None
    finally:
        fused._library.cache_clear()
