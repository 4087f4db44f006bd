"""What closed-form steps know of a layer: whether it adds to the stream, what it should put out, which rows matter.

Oracles: the float block with that output put in its place; derivatives and weighted moments computed here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fqvit_plugin as fq
from fqvit_plugin.lifecycle import forward_images, phase_of, set_phase
from fqvit_plugin.phase import Phase
from fqvit_plugin.steps.base import Block, Calibration, blocks_of, roundable
from fqvit_plugin.steps.parts import parts_of
from fqvit_plugin.steps.statistics import Moments, row_weights

from . import models, timm_models
from .zoo import ZOO

ADDING = {
    'vit': (models.vit, 32, True),
    'swin': (models.swin, 56, True),
    'swin, padded windows': (lambda: models.swin(img_size=60), 60, True),
    'timm swin, padded windows': (lambda: timm_models.swin(img_size=60), 60, True),
    **{name: (*ZOO[name], True) for name in ('svt', 'pcpvt', 'eva02', 'beit, no layer scale')},
    **{name: (*ZOO[name], False) for name in ('beit', 'dinov2 giant', 'swinv2')},  # scaled, or normalized behind
}


def calibrated(make, data):
    model = make()
    fq.quantize_model_(model, fq.get_scheme('fqvit_w4a8', steps=[]))
    fq.calibrate_(model, data)
    return Calibration(model, data, forward_images)


@pytest.mark.parametrize('name', ADDING)
@torch.no_grad()
def test_what_is_wanted_of_a_layer_mends_the_stream(name):
    make, size, adds = ADDING[name]
    data = models.batches(1, size)
    calibration = calibrated(make, data)
    _, module = next(pair for pair in blocks_of(calibration.model) if len(roundable(pair[1])) > 1)
    block, (x,) = Block.arriving(calibration, module)
    names = {m: n for n, m in module.named_modules()}
    parts = parts_of(block, x)
    assert {part.layer for part in parts} == set(roundable(module))
    summed = [names[part.layer] for part in parts if part.total is not None]
    assert len(summed) == (2 if adds else 0)
    if not adds:
        return
    assert summed[0].endswith('proj')
    off = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    first = next(part for part in parts if part.total is not None)
    streams = []
    for wanted in (None, first.pair(calibration.model, block, x, x - off)[1]):
        hooks = [first.total.register_forward_hook(lambda _, __, out: streams.append(out))]
        if wanted is not None:
            hooks.append(first.layer.register_forward_hook(lambda _, __, out, wanted=wanted: wanted))
        block(x)
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(streams[1] - streams[0], off, rtol=0, atol=1e-5)
    assert phase_of(calibration.model) is Phase.FLOAT


@torch.no_grad()
def test_a_layer_inside_is_wanted_to_do_what_it_does_in_float():
    calibration = calibrated(models.vit, models.batches(1))
    _, module = blocks_of(calibration.model)[1]
    block, (x,) = Block.arriving(calibration, module)
    part = parts_of(block, x)[0]
    assert part.total is None
    inputs, outputs = [], []

    def keep(_, args, out):
        inputs.append(args[0])
        outputs.append(out)

    hook = part.layer.register_forward_hook(keep)
    given, wanted = part.pair(calibration.model, block, x, x + 0.1)
    block(x)
    set_phase(calibration.model, Phase.QUANT)
    block(x + 0.1)
    set_phase(calibration.model, Phase.FLOAT)
    hook.remove()
    assert torch.equal(wanted, outputs[-2])
    assert torch.equal(given, inputs[-1])
    assert not torch.equal(given, inputs[-2])


@torch.no_grad()
def test_rows_that_the_answer_does_not_depend_on_weigh_least():
    calibration = calibrated(models.vit, models.batches(2))
    blocks = [module for _, module in blocks_of(calibration.model)]
    first, last = (roundable(block)[-1] for block in (blocks[0], blocks[-1]))
    weights = row_weights(calibration, [first, last], 0.8)
    assert all(bool((w > 0).all()) and abs(float(w.mean()) - 1) < 1e-5 for w in weights.values())
    tokens = len(weights[last])
    expected = torch.full((tokens,), 0.2)
    expected[0] = 0.2 + 0.8 * tokens  # only the class token is read
    torch.testing.assert_close(weights[last], expected)
    assert float(weights[first].min()) > 0.2
    assert float(weights[first].max()) < expected[0]
    again = row_weights(calibration, [first, last], 0.8)
    assert all(torch.equal(weights[layer], again[layer]) for layer in (first, last))
    assert all(torch.equal(w, torch.ones(1)) for w in row_weights(calibration, [first, last], 0.0).values())
    assert all(p.grad is None for p in calibration.model.parameters())


@torch.no_grad()
def test_rows_of_windows_have_weights_of_their_own():
    calibration = calibrated(models.swin, models.batches(2, 56))
    layers = [layer for _, module in blocks_of(calibration.model) for layer in roundable(module)]
    rows = {}
    hooks = [m.register_forward_hook(lambda m, _, out: rows.update({m: out.flatten(0, -2)})) for m in layers]
    forward_images(calibration.model, calibration.batches[0])
    for hook in hooks:
        hook.remove()
    weights = row_weights(calibration, layers, 0.5)
    assert {m: len(w) for m, w in weights.items()} == {
        m: len(out) // len(calibration.batches[0]) for m, out in rows.items()
    }


@torch.no_grad()
def test_all_rows_weigh_alike_where_their_number_differs_or_no_graph_is_kept():
    make = ZOO['pcpvt'][0]
    sizes = [models.images(2, 32), models.images(2, 64)]
    calibration = calibrated(make, sizes)
    layers = [layer for _, module in blocks_of(calibration.model) for layer in roundable(module)]
    assert all(torch.equal(w, torch.ones(1)) for w in row_weights(calibration, layers, 0.5).values())
    calibration = Calibration(calibration.model, sizes[:1], torch.no_grad()(forward_images))
    assert all(torch.equal(w, torch.ones(1)) for w in row_weights(calibration, layers, 0.5).values())


def test_moments_are_those_of_weighted_rows_far_from_zero():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(6, 5, 4)) @ generator.normal(size=(4, 4)) + 300
    y = x @ generator.normal(size=(4, 3)) - 1000 + generator.normal(size=(6, 5, 3))
    weights = generator.uniform(0.1, 3, size=5)
    moments = Moments(torch.tensor(weights))
    for part in (slice(0, 2), slice(2, 6)):
        moments.add(torch.tensor(x[part]).float(), torch.tensor(y[part]).float())
    rows = np.concatenate((x.reshape(-1, 4), y.reshape(-1, 3)), 1)
    expected = np.cov(rows.T, aweights=np.tile(weights, 6), ddof=0)
    means = np.average(rows, axis=0, weights=np.tile(weights, 6))
    for got, wanted in zip(
        (*moments.means, *moments.covariances),
        (means[:4], means[4:], expected[:4, :4], expected[4:, :4]),
        strict=True,
    ):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-4, atol=2e-3)
