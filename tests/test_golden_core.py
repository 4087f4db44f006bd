"""Observers, quantizers and integer layers against numbers recorded from the published implementation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fqvit_plugin.functional import align
from fqvit_plugin.intmath import int_layernorm_reference, log_int_softmax_reference_
from fqvit_plugin.quantizers import Log2Quantizer, UniformQuantizer
from fqvit_plugin.scheme import BitType, QuantSpec

from .shared_data import SHARED, golden

_CASES = SHARED / 'golden' / 'observers.json'
CASES = json.loads(_CASES.read_text()) if _CASES.is_file() else []
AXES = {'activation': -1, 'activation4d': 1, 'linear_weight': 0, 'conv_weight': 0}


@pytest.fixture(scope='module')
def recorded():
    return golden('observers')


@pytest.mark.parametrize('case', [c for c in CASES if not c.startswith('log2')])
def test_observer_and_uniform_quantizer(case, recorded):
    tensor, observer, bits, mode = case.split('/')
    axis = AXES[tensor] if mode == 'channel_wise' else None
    spec = QuantSpec(BitType.parse(bits), observer, axis=axis, arithmetic='reference')
    batches = [torch.from_numpy(v) for k, v in recorded.items() if k.startswith(f'in/{tensor}/')]
    quantizer = UniformQuantizer(spec, batches[0].shape[axis] if axis is not None else None)
    for batch in batches * (3 // len(batches)):
        quantizer.observe(batch)
    quantizer.take_qparams(batch)
    quantizer.commit()
    scale = torch.from_numpy(np.asarray(recorded[f'{case}/scale']))
    zero_point = torch.from_numpy(np.asarray(recorded[f'{case}/zero_point']))
    assert quantizer.scale.shape == scale.shape
    assert quantizer.zero_point.shape == zero_point.shape
    torch.testing.assert_close(quantizer.scale, scale, rtol=1e-5, atol=0)
    assert torch.equal(quantizer.zero_point, zero_point.to(torch.int32))
    expected = torch.from_numpy(recorded[f'{case}/fake_quant'])
    step = align(scale, batch, axis)
    same = ((quantizer(batch) - expected).abs() < 1e-3 * step).float().mean()
    assert same >= 0.999, f'{same:.4%} of fake-quantized values equal'


@pytest.mark.parametrize('case', [c for c in CASES if c.startswith('log2')])
def test_log2_quantizer(case, recorded):
    spec = QuantSpec(BitType.parse(case.split('/')[1]), quantizer='log2', arithmetic='reference')
    probabilities = torch.from_numpy(recorded['in/softmax'])
    keys = [k for k in recorded if k.startswith(case)]
    assert keys, case
    expected = torch.from_numpy(recorded[keys[0]])
    same = (Log2Quantizer(spec)(probabilities) == expected).float().mean()
    assert same >= 0.999


@pytest.mark.parametrize('i', range(4))
def test_integer_layernorm(i):
    r = {
        k.split('/')[2]: torch.from_numpy(np.asarray(v))
        for k, v in golden('integer_layers').items()
        if k.startswith(f'layernorm/{i}/')
    }
    in_scale = r['in_scale'].repeat(int(r['expand']))  # cat([x0, x1, x2, x3], -1) tiles the scales
    y = int_layernorm_reference(r['x'], in_scale, r['out_scale'], r['weight'], r['bias']) * r['out_scale']
    assert (torch.round(y / r['out_scale']) == torch.round(r['y'] / r['out_scale'])).float().mean() >= 0.999


@pytest.mark.parametrize('i', range(4))
def test_log_int_softmax(i):
    r = {
        k.split('/')[2]: torch.from_numpy(np.asarray(v))
        for k, v in golden('integer_layers').items()
        if k.startswith(f'softmax/{i}/')
    }
    y = log_int_softmax_reference_(r['x'].clone(), r['scale'], int(r['bits']))
    assert (y == r['y']).float().mean() >= 0.999
