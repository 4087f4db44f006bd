"""Bit allocation.

Oracles: every combination, tried one after the other; sizes and multiplications by hand; and calibrate.py, which must
make the model that was promised of the config.
"""

from __future__ import annotations

import itertools
import json
import random

import accuracy
import allocate
import analyze
import calibrate
import pytest
import torch

import fqvit_plugin as fq
from fqvit_plugin.apis import load_config
from fqvit_plugin.presets import parse_scheme
from fqvit_plugin.sensitivity.allocation import (
    Allocation,
    LayerCost,
    allocated_scheme,
    costs_of,
    multiplications,
    stored_bytes,
)
from fqvit_plugin.sensitivity.allocation import allocate as solve
from fqvit_plugin.sensitivity.measure import measure_sensitivity
from fqvit_plugin.sensitivity.switches import Switches
from fqvit_plugin.sensitivity.units import units_of

from . import models
from .projects import build, float_checkpoint, project, runner, write_images

BITS, ACT_BITS = (3, 4, 6, 8), (4, 8)


def random_costs(seed, shared=False):
    """Five layers whose divergence falls with the bits, with inputs of their own, or two that share one."""
    rng = random.Random(seed)

    def falling(widths):
        return {b: rng.random() * 4.0**-b * 1000 for b in widths}

    inputs = {f'act{i}': falling(ACT_BITS) for i in range(5)}
    names = ['act0', 'act0', 'act2', 'act3', 'act4'] if shared else list(inputs)
    return [
        LayerCost(f'layer{i}', rng.randint(50, 400), falling(BITS), rng.randint(1, 9) * 1000, name, 8, inputs[name])
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize('seed', range(4))
def test_no_combination_under_the_bytes_is_better(seed):
    costs = random_costs(seed)
    budget = sum(c.weights for c in costs) * 5 // 8

    def size(bits):
        return sum((c.weights * b + 7) // 8 for c, b in zip(costs, bits, strict=True))

    fitting = [bits for bits in itertools.product(BITS, repeat=5) if size(bits) <= budget]
    best = min(sum(c.kl[b] for c, b in zip(costs, bits, strict=True)) for bits in fitting)
    found = solve(costs, BITS, max_bytes=budget)
    assert found.kl == pytest.approx(best, rel=1e-9)
    assert found.num_bytes == size(found.weight_bits.values()) <= budget
    assert found.act_bits == {}


@pytest.mark.parametrize('shared', [False, True])
def test_no_combination_under_the_bit_operations_is_better(shared):
    costs = random_costs(7, shared)
    budget = sum(c.macs for c in costs) * 30
    acts = {c.input_path: c.input_kl for c in costs}
    best = float('inf')
    for act_bits in itertools.product(ACT_BITS, repeat=len(acts)):
        chosen = dict(zip(acts, act_bits, strict=True))
        for bits in itertools.product(BITS, repeat=5):
            if sum(c.macs * b * chosen[c.input_path] for c, b in zip(costs, bits, strict=True)) <= budget:
                kl = sum(c.kl[b] for c, b in zip(costs, bits, strict=True))
                best = min(best, kl + sum(acts[path][b] for path, b in chosen.items()))
    found = solve(costs, BITS, ACT_BITS, max_bit_ops=budget)
    assert found.kl == pytest.approx(best, rel=1e-9)
    assert found.bit_ops <= budget
    assert set(found.act_bits) == set(acts)


def test_bytes_by_hand():
    layer = LayerCost('a', 11, {})
    assert [stored_bytes(layer, b) for b in (3, 4, 6, 8)] == [5, 6, 9, 11]
    assert [stored_bytes(layer, b, as_file=True) for b in (3, 4, 6, 8)] == [6, 6, 9, 11]
    grouped = LayerCost('a', 96, {}, factors=6)  # 4 bits each where codes have less than 7
    assert [stored_bytes(grouped, b) for b in (3, 4, 6, 7, 8)] == [39, 51, 75, 84, 96]
    assert [stored_bytes(grouped, b, as_file=True) for b in (3, 4, 6, 8)] == [51, 51, 75, 96]
    # two layers of 8 weights: a file holds 3 bits as it holds 4
    costs = [LayerCost('a', 8, {3: 9.0, 4: 1.0, 6: 0.2, 8: 0.1}), LayerCost('b', 8, {3: 9.0, 4: 7.0, 6: 0.5, 8: 0.4})]
    assert dict(solve(costs, BITS, max_bytes=7).weight_bits) == {'a': 4, 'b': 3}
    assert dict(solve(costs, BITS, max_bytes=8, as_file=True).weight_bits) == {'a': 4, 'b': 4}
    with pytest.raises(ValueError, match='the fewest bits take 8'):
        solve(costs, BITS, max_bytes=7, as_file=True)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(candidates=BITS), 'nothing to allocate under'),
        (dict(candidates=BITS, max_bytes=10), r'the budget of 10 bytes cannot be met: the fewest bits take [\d,]+'),
        (dict(candidates=[5, 8], max_bytes=10**6), r'layer0 was measured at \[3, 4, 6, 8\] bits, not at 5'),
        (dict(candidates=BITS, act_candidates=[6], max_bit_ops=1e9), r'act0 was measured at \[4, 8\] bits, not at 6'),
        (dict(candidates=[], max_bytes=10**6), 'no candidate'),
    ],
)
def test_what_cannot_be_allocated(options, message):
    with pytest.raises(ValueError, match=message):
        solve(random_costs(0), **options)


def test_schemes():
    found = Allocation({'a': 4, 'b': 8, 'c': 4}, {'x': 6}, 0.0, 0, 0)
    assert allocated_scheme({'type': 'fqvit_w8a8'}, found) == {
        'type': 'fqvit_w8a8',
        'weight_bits': 4,
        'overrides': [{'layers': ['b'], 'weight_bits': 8}, {'layers': ['x'], 'act_bits': 6}],
    }
    # an override of the base that names b must not win
    base = {'type': 'fqvit_w8a8', 'overrides': [{'layers': 'a', 'weight_bits': 2}]}
    assert allocated_scheme(base, found)['overrides'][1:3] == [
        {'layers': ['a', 'c'], 'weight_bits': 4},
        {'layers': ['b'], 'weight_bits': 8},
    ]


def test_costs_and_multiplications_by_hand():
    """A ViT of 32 pixels in 16 patches and a class token, 48 channels and 96 hidden ones, 7 classes."""
    data = models.batches(1)
    model = models.quantized(models.vit(), data)
    layers = Switches(model).layers
    units = [u for u in units_of(layers, ['tensor'], [4], [4]) if u.block != 'backbone.layers.0']
    result = measure_sensitivity(model, data, units, directions=['only'])
    fq.dequant(model)
    macs = multiplications(layers, lambda: model(data[0]), 2)
    costs = {c.path: c for c in costs_of(result, layers, macs)}
    assert costs['backbone.patch_embed.projection'].macs == 16 * (3 * 8 * 8) * 48
    assert costs['backbone.layers.1.attn.qkv'].macs == 17 * 48 * 144
    assert costs['backbone.layers.1.ffn.layers.1'].macs == 17 * 96 * 48
    assert costs['head.layers.head'].macs == 48 * 7
    cost = costs['backbone.layers.1.attn.qkv']
    assert cost.weights == 48 * 144
    assert set(cost.kl) == {4, 8}
    assert (cost.input_path, cost.input_bits, set(cost.input_kl)) == ('backbone.layers.1.norm1_act', 8, {4, 8})
    assert not any('layers.0' in path and 'ffn.layers' not in path for path in costs)  # not measured
    with pytest.raises(ValueError, match='of another model: it has no layer backbone'):
        costs_of(result, {}, {})


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp('allocate')
    images = write_images(root / 'images', {'train': 6, 'val': 1})
    cfg = project(images, root / 'work', 'vit')
    float_checkpoint(cfg, root / 'float.pth')
    cfg.dump(root / 'config.py')
    return str(root / 'config.py'), str(root / 'float.pth')


@pytest.mark.parametrize('options', [[], ['--cfg-options', 'calib_dataloader.batch_size=3']], ids=['base', 'changed'])
def test_the_config_gives_the_model_that_was_promised(job, tmp_path, capsys, options):
    config, weights = job
    out, said = tmp_path / 'new' / 'mixed.py', tmp_path / 's.json'
    measure = ['--batches', '2', '--images', '4', *options]
    bits = ['--weight-bits', '3', '4', '6']
    argv = [config, weights, '--units', 'tensor', '--directions', 'only', *bits, *measure, '--json', str(said)]
    assert analyze.main(argv) == 0
    ask = ['--budget-bits', '4.5', '--sensitivity', str(said), '--check-batches', '1', '--batches', '2', *options]
    assert allocate.main([config, weights, '--out', str(out), *ask]) == 0
    printed = capsys.readouterr().out
    assert ('4 other images' if not options else '3 other images') in printed
    cfg = load_config(out)
    assert ('_base_' in out.read_text()) == (not options)
    model = build(cfg)
    report = fq.quantize_model_(model, parse_scheme(cfg.quant_scheme))
    assert f'{report.quantized_bytes:,} bytes' in printed
    layers = [m for m in model.modules() if isinstance(m, (fq.QLinear, fq.QConv2d))]
    chosen = {m.weight_quantizer.spec.bit_type.bits for m in layers}
    assert len(chosen) > 1
    assert sum(m.weight.numel() * m.weight_quantizer.spec.bit_type.bits for m in layers) / 8 <= (
        sum(m.weight.numel() for m in layers) * 4.5 / 8
    )
    assert calibrate.main([str(out), weights, '--out', str(tmp_path / 'q.pth'), '--batches', '2']) == 0
    stored = torch.load(tmp_path / 'q.pth', weights_only=True)['meta']['fqvit']['scheme']
    assert fq.QuantScheme.from_dict(stored) == parse_scheme(cfg.quant_scheme)
    cfg.merge_from_dict(dict(load_from=weights, work_dir=str(tmp_path / 'work'), experiment_name=tmp_path.name))
    assert 'accuracy/top1' in runner(cfg).test()  # what `mim test` runs
    by_hook = torch.load(tmp_path / 'work' / 'calibrated.pth', weights_only=True)['meta']['fqvit']['scheme']
    assert by_hook == stored


def test_activations_under_bit_operations(job, tmp_path, capsys):
    config, weights = job
    out = tmp_path / 'mixed.py'
    ask = ['--bit-ops', '0.4', '--candidates', '4', '8', '--act-candidates', '4', '8']
    assert allocate.main([config, weights, '--out', str(out), '--batches', '2', '--images', '2', *ask]) == 0
    share = float(capsys.readouterr().out.split(' % of the bit operations')[0].splitlines()[-1])
    assert 25 <= share <= 40
    scheme = parse_scheme(load_config(out).quant_scheme)
    assert {o.act_bits for o in scheme.overrides if o.act_bits} <= {4, 8}
    assert any(o.act_bits for o in scheme.overrides)
    fq.quantize_model_(build(load_config(out)), scheme)  # every override matches a layer


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ([], 'give a budget'),
        (['--budget-bits', '4', '--budget-ratio', '0.5'], 'give one of --budget-bytes'),
        (['--budget-bits', '-1'], '--budget-bits must be above 0, got -1'),
        (['--budget-bytes', '100'], 'all but weights takes'),
        (['--budget-bits', '4', '--act-candidates', '4'], 'cost no bytes'),
        (['--budget-bits', '4', '--batches', '9', '--check-batches', '2'], 'all of them calibrate'),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(job, tmp_path, capsys, options, message):
    config, weights = job
    out = tmp_path / 'mixed.py'
    argv = [config, weights, '--out', str(out), '--images', '1', '--candidates', '8', '--batches', '1']
    assert allocate.main([*argv, *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('allocate.py: ')
    assert message in last
    assert not out.exists()


def test_sensitivities_of_something_else(job, tmp_path, capsys):
    config, weights = job
    other = tmp_path / 's.json'
    other.write_text(json.dumps({'version': 3}))
    argv = [config, weights, '--out', str(tmp_path / 'm.py'), '--batches', '1', '--budget-bits', '4']
    assert allocate.main([*argv, '--sensitivity', str(other)]) == 2
    assert 'not a sensitivity analysis of version 1' in capsys.readouterr().err


def test_accuracy_takes_the_config_as_a_recipe(tmp_path):
    """Against the scheme of the file, and of the name."""
    path = tmp_path / 'mixed.py'
    path.write_text("quant_scheme = dict(type='fqvit_w8a8', overrides=[dict(layers='*.qkv', weight_bits=4)])\n")
    expected = fq.get_scheme('fqvit_w8a8', overrides=[dict(layers='*.qkv', weight_bits=4)])
    assert accuracy.scheme_of(str(path), input_quant=False) == expected
    args = accuracy._parser().parse_args(['images', '--recipes', str(path), 'strict 8/8/8'])
    named = accuracy.scheme_of(args.recipes[1], input_quant=False)
    assert named == fq.get_scheme('fqvit_w8a8', input_quant=False)
    with pytest.raises(SystemExit):
        accuracy._parser().parse_args(['images', '--recipes', str(tmp_path / 'gone.py')])
