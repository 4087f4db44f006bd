"""Integers carried in float32, for OpenVINO. Oracles: Python's integers and fractions, numpy, the integer model."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fqvit_plugin.export import to_onnx
from fqvit_plugin.export.carried_form import write_rounded
from fqvit_plugin.export.carried_norm import write_norm
from fqvit_plugin.export.graph import Graph
from fqvit_plugin.export.pairs import quotient
from fqvit_plugin.export.proof import session
from fqvit_plugin.integer.convert import to_integer

from . import models
from .test_export_onnx import openvino_logits
from .test_integer import MODELS, calibrated

onnx = pytest.importorskip('onnx', reason='the extra export brings it')
pytest.importorskip('onnxruntime', reason='the extra export brings it')


def evaluated(write, values):
    """What onnxruntime makes of ``write(graph, name)`` on float32 ``values``, graph optimization off."""
    graph = Graph()
    name = write(graph, graph.constant(values, np.float32, 'values'))
    proto = graph.model({}, {}, {})
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    (found,) = session(proto, optimized=False).run(None, {})
    return found


SHIFT = 33


@pytest.mark.parametrize('away', [-(2.0**-21), 2.0**-21])
def test_products_next_to_a_tie_are_rounded_to_the_right_side(away):
    """5e-7 beside a half: float32 rounds values near 100 to 8e-6."""
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**18), 2**18, 500)
    gain = int(rng.integers(2**22, 2**23)) | 1
    target = rng.integers(-120, 120, 500) + 0.5 + away
    term = np.array([float(Fraction(t) - Fraction(int(v) * gain, 2**SHIFT)) for v, t in zip(x, target, strict=True)])
    found = evaluated(lambda g, v: write_rounded(g, [(v, gain / 2.0**SHIFT)], term, 2.0**8), x)
    exact = [Fraction(int(v) * gain, 2**SHIFT) + Fraction(t) + Fraction(1, 2) for v, t in zip(x, term, strict=True)]
    assert found.tolist() == [math.floor(e) for e in exact]


def test_sums_of_two_are_rounded_once():
    rng = np.random.default_rng(1)
    a, b = rng.integers(-255, 256, (2, 4000))
    gains = rng.integers(2**28, 2**30, 2)
    ratios = gains / 2.0**29
    graph_b = b.astype(np.float32)

    def write(g, x):
        return write_rounded(g, [(x, ratios[0]), (g.constant(graph_b, np.float32), ratios[1])], 3.25, 2.0**10)

    exact = (
        (Fraction(int(p) * int(gains[0]) + int(q) * int(gains[1]), 2**29) + Fraction(15, 4))
        for p, q in zip(a, b, strict=True)
    )
    assert evaluated(write, a).tolist() == [math.floor(e) for e in exact]


def test_a_pixel_over_its_scale_is_the_quotient():
    """Images of 8 bits, normalized to [-1, 1], are halves of their own scale; numpy divides."""
    x = ((np.arange(256) - 127.5) / 127.5).astype(np.float32)
    for scale in (np.float32(2 / 255), np.float32(0.0123), np.float32(0.5)):
        assert np.array_equal(evaluated(lambda g, v, s=scale: quotient(g, v, float(s)), x), x / scale)


@pytest.mark.parametrize(('spread', 'root_bits'), [(20, 6), (3000, 2), (30000, -1)])
def test_the_norm_is_the_kernels(spread, root_bits):
    channels, guard = 192, 12345
    u = np.random.default_rng(2).integers(-spread, spread + 1, (1, 50, channels)) + spread // 3
    found = evaluated(lambda g, x: write_norm(g, x, channels, guard, root_bits), u)
    expected = []
    for token in u[0].tolist():
        total = sum(token)
        variance = channels * sum(v * v for v in token) - total * total + guard
        shifted = variance << 2 * root_bits if root_bits >= 0 else variance >> -2 * root_bits
        reciprocal = (1 << (45 + root_bits)) // math.isqrt(shifted)
        expected.append([((channels * v - total) * reciprocal + (1 << 28)) >> 29 for v in token])
    gap = np.abs(found[0] - np.array(expected))
    assert gap.max() <= 1  # a unit of 2**-16, where halves are near
    assert (gap > 0).mean() < 0.005


def test_equal_tokens_have_a_norm_of_zero():
    u = np.full((1, 2, 64), 7)
    assert not evaluated(lambda g, x: write_norm(g, x, 64, 0, 4), u).any()


@pytest.mark.parametrize(
    'name', ['vit', 'vit, one channel far out', 'vit, escapes', 'deit3', 'swin', 'swin, padded windows']
)
def test_openvinos_logits_have_the_codes_of_the_integer_models(name, tmp_path):
    build, size = MODELS[name]
    x = models.images(3, size)
    model = to_integer(calibrated(build(), x))
    report = to_onnx(model, tmp_path / 'm.onnx', form='integer', target='openvino', images=x)
    assert report.plain.different <= 1
    gap = (torch.from_numpy(openvino_logits(tmp_path / 'm.onnx', x)) - model(x)).abs().max()
    assert gap < 1e-3 * model.output_scale  # codes are the same; their product with the scale may round otherwise
