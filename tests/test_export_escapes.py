"""Escapes in ONNX graphs. Oracles: the integer executor's kernels and Python's fractions.

Whole models with escapes are among those of test_integer.py, which all tests of the exports run on.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fqvit_plugin.export import to_onnx
from fqvit_plugin.export.carried_form import write_rounded
from fqvit_plugin.export.escapes import decoded, encoded
from fqvit_plugin.export.graph import Graph
from fqvit_plugin.export.proof import session
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.integer.kernels import _steps, _store
from fqvit_plugin.integer.program import Grid

from . import models
from .test_integer import calibrated

onnx = pytest.importorskip('onnx', reason='the extra export brings it')
pytest.importorskip('onnxruntime', reason='the extra export brings it')


@pytest.fixture(scope='module')
def escaping():
    """A calibrated ViT with escapes, its integer model and images."""
    x = models.images(3)
    model = calibrated(models.vit_with_escapes(), x)
    return model, to_integer(model), x


def ends(model, x):
    """How many codes of every tensor are an end that stands for a far value, by kernel and tensor."""
    found = {}
    for op, codes in model.steps(x):
        if (grid := model.program.grids.get(op.output)) and grid.far:
            far = torch.tensor(grid.far)
            end = torch.where(far < 0, -128, 127)
            found[op.kind, op.output] = int(((far != 0) & (codes == end)).sum())
    return found


def test_the_model_has_escapes_of_the_stream_and_of_a_branch(escaping):
    simulated, model, x = escaping
    stream = simulated.backbone.layers[0].attn_residual_act.quantizer
    assert stream.far.any()
    assert stream.far.min() < 0 < stream.far.max()
    assert simulated.backbone.layers[0].ffn.out_act.quantizer.far.any()
    found = ends(model, x)
    assert {kind for kind, _ in found} >= {'constant', 'add', 'affine', 'select'}
    assert all(count >= 2 for (kind, _), count in found.items() if kind != 'select')  # of far tokens only
    assert torch.equal(simulated(x, mode='tensor'), model(x))


# far out above and below, none, on the other side of zero than most codes, and one that an ordinary code has too
FAR, ZERO = (2549, -1776, 0, 300, -32767, 40), (-67, 100, 5, 126, -127, -20)
GRIDS = [Grid((1.0,) * len(ZERO), ZERO, 8, tuple(f * (f * sign >= 0) for f in FAR)) for sign in (0, 1, -1)]
WAYS = pytest.mark.parametrize(('dtype', 'half'), [(np.int64, 0), (np.float32, 0.5)])


@pytest.fixture(params=GRIDS, ids=['both sides', 'above', 'below'])
def grid(request):
    """A grid with escapes, with its far values and zero points as tensors."""
    return request.param, *(torch.tensor(v, dtype=torch.int32) for v in (request.param.far, request.param.zero))


def evaluated(write, values, dtype):
    """What onnxruntime makes of ``write(graph, name)``, graph optimization off."""
    graph = Graph()
    name = write(graph, graph.constant(values, dtype, 'values'))
    proto = graph.model({}, {}, {})
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return session(proto, optimized=False).run(None, {})[0]


@WAYS
def test_codes_are_the_kernels(grid, dtype, half):
    plain, far, zero = grid
    steps = torch.cat((torch.arange(-7000, 7000), torch.arange(-33000, 33000, 77))).int()[:, None].expand(-1, 6)
    places = (steps + zero).numpy()
    found = evaluated(lambda g, x: encoded(g, x, plain, lambda at: g.constant(at, dtype), half), places, dtype)
    assert np.array_equal(found.clip(-128, 127), _store(steps, zero, 8, far).numpy())


@WAYS
def test_what_codes_stand_for_is_the_kernels(grid, dtype, half):
    plain, far, zero = grid
    codes = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(-1, 6)
    found = evaluated(lambda g, x: decoded(g, x, plain, lambda at: g.constant(at, dtype), half), codes, dtype)
    assert np.array_equal(found, (_steps(codes, zero, far) + zero).numpy())


def test_sums_with_far_values_are_rounded_like_the_others():
    """One channel reaches 2**15 steps, the other 2**8."""
    rng = np.random.default_rng(3)
    x = np.stack((rng.integers(-(2**15), 2**15, 3000), rng.integers(-255, 256, 3000)), 1)
    gain, term = int(rng.integers(2**28, 2**29)) | 1, 0.25
    reach = np.array([2.0**15, 2.0**8])
    ratio = np.full(2, gain / 2.0**29)
    found = evaluated(lambda g, v: write_rounded(g, [(v, ratio)], term, reach), x, np.float32)
    exact = [[math.floor(Fraction(int(v) * gain, 2**29) + Fraction(3, 4)) for v in row] for row in x]
    assert found.tolist() == exact


def test_tensorrts_rules_hold_and_the_file_says_what_codes_stand_for(escaping, tmp_path):
    _, model, x = escaping
    to_onnx(model, tmp_path / 'm.onnx', target='tensorrt', images=x)  # which checks the rules
    grids = json.loads({p.key: p.value for p in onnx.load(tmp_path / 'm.onnx').metadata_props}['grids'])
    assert {n for n, g in grids.items() if 'far' in g} == {n for n, g in model.program.grids.items() if g.far}
