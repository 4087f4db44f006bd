"""The sensitivity analysis.

Oracles: one tensor quantized by hand in a hook on the float model; the fully quantized and the float model, which
switching everything on and off must give; injected damage, whose unit must come first; every block's real output.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import fqvit_plugin as fq
from fqvit_plugin.analysis.collect import analyse
from fqvit_plugin.blocks.sums import attended
from fqvit_plugin.exact import Powers
from fqvit_plugin.lifecycle import named_quantizers, phase_of
from fqvit_plugin.phase import Phase, QuantLayer
from fqvit_plugin.sensitivity.kinds import KINDS, OTHER, kind_of
from fqvit_plugin.sensitivity.measure import count_passes, measure_sensitivity
from fqvit_plugin.sensitivity.prefix import Prefix
from fqvit_plugin.sensitivity.records import Sensitivity
from fqvit_plugin.sensitivity.switches import Switches, fine, narrowed, weight_at
from fqvit_plugin.sensitivity.units import units_of

from . import models, timm_models, zoo

BUILD = {'vit': (models.vit, 32), 'swin': (models.swin, 56)}


def run(model, batch):
    return model(batch, mode='tensor')


@pytest.fixture
def vit():
    return models.quantized(models.vit(), models.batches(2))


@torch.no_grad()
def logits(model, batch):
    return run(model, batch).clone()


def divergence(expected, found):
    """Mean KL, the obvious way."""
    p, q = F.softmax(expected.double(), 1), F.softmax(found.double(), 1)
    return float((p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize('recipe', [{}, dict(preset='reference'), dict(lis=False), dict(name='fqvit_w8a8')], ids=str)
@pytest.mark.parametrize('name', BUILD)
def test_all_switches_on_are_the_quantized_and_all_off_the_float_model(name, recipe):
    build, size = BUILD[name]
    model = models.quantized(build(), models.batches(2, size), **recipe)
    (batch,) = models.batches(1, size)
    quantized = logits(model, batch)
    fq.dequant(model)
    expected = logits(model, batch)
    with Switches(model) as switches:
        with switches.without(()):
            assert torch.equal(logits(model, batch), quantized)
        with switches.only(()):
            assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize('preset', ['strict', 'reference'])
@pytest.mark.parametrize('name', BUILD)
def test_every_switch_alone_and_every_one_left_out_stays_near(name, preset):
    """No path between two layers breaks for lack of a neighbour: 8 bits of one, or of all but one, cost little.

    The bounds are those of the whole quantized model, doubled.
    """
    build, size = BUILD[name]
    model = models.quantized(build(), models.batches(2, size), name='fqvit_w8a8', preset=preset)
    (batch,) = models.batches(1, size)
    with Switches(model) as switches:
        with switches.only(()):
            expected = logits(model, batch)
        with switches.without(()):
            bound = 2 * float((logits(model, batch) - expected).norm())
        for path in switches.layers:
            for switched in (switches.only((path,)), switches.without((path,))):
                with switched:
                    assert float((logits(model, batch) - expected).norm()) < bound, path


def test_one_activation_by_hand(vit):
    """In float, with a hook that lays one tensor on its grid."""
    path, (batch,) = 'backbone.layers.0.ffn.out_act', models.batches(1)
    act = vit.get_submodule(path)
    with Switches(vit) as switches, switches.only((path,)):
        found = logits(vit, batch)
    fq.dequant(vit)
    expected = logits(vit, batch)
    hook = act.register_forward_hook(lambda module, args, out: module.quantizer(out))
    by_hand = logits(vit, batch)
    hook.remove()
    assert torch.equal(found, by_hand)
    (unit,) = units_of({path: act}, ['tensor'])
    (entry,) = measure_sensitivity(vit, [batch], [unit], run).entries
    assert entry.only is not None
    assert entry.only.kl == pytest.approx(divergence(expected, by_hand), rel=1e-6)
    assert entry.only.agree == float((expected.argmax(1) == by_hand.argmax(1)).float().mean())


def test_one_weight_at_three_bits_by_hand(vit):
    path, (batch,) = 'backbone.layers.1.attn.qkv', models.batches(1)
    layer = vit.get_submodule(path)
    units = units_of({path: layer}, ['tensor'], weight_bits=[3])
    assert [u.bits for u in units] == [8, 3]
    found = measure_sensitivity(vit, [batch], units, run).entries[1]
    fq.dequant(vit)
    expected = logits(vit, batch)
    weight = layer.weight.detach().clone()
    rows = weight.abs().amax(1, keepdim=True)
    with torch.no_grad():
        # symmetric, one scale for each row: what the weight observer does
        scale = rows / 3
        steps = (weight / scale).round().clamp(-4, 3)
        layer.weight.copy_(steps * scale)
    by_hand = logits(vit, batch)
    noise = weight - layer.weight.detach()
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert found.without is None
    assert found.only is not None
    assert found.only.kl == pytest.approx(divergence(expected, by_hand), rel=1e-5)
    sqnr = float(10 * torch.log10(weight.square().sum() / noise.square().sum()))
    assert found.sqnr_db == pytest.approx(sqnr, abs=1e-3)
    assert found.weights == weight.numel()


def state_of(model):
    """Everything a switch touches: phases, quantizers and forwards by identity, and the parameters of all grids."""
    return (
        [(m.phase, id(getattr(m, 'quantizer', None)), id(getattr(m, 'weight_quantizer', None)))
         for m in model.modules() if isinstance(m, QuantLayer)],
        [(name, [b.clone().tolist() for b in q.buffers()]) for name, q in named_quantizers(model)],
        [set(m.__dict__) for m in model.modules()],
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )  # fmt: skip


@pytest.mark.parametrize('phase', ['float', 'quant'])
@pytest.mark.parametrize('breaks_at', [None, 1, 2, 3, 20])
def test_the_model_is_left_as_it_was(vit, phase, breaks_at):
    """Also when a pass fails: the first ones, which record, and a later one, which skips blocks."""
    (fq.quant if phase == 'quant' else fq.dequant)(vit)
    (batch,) = models.batches(1)
    output, before, calls = logits(vit, batch), state_of(vit), []

    def forward(model, x):
        calls.append(1)
        if len(calls) == breaks_at:
            raise RuntimeError('broken image')
        return run(model, x)

    units = units_of(Switches(vit).layers, weight_bits=[4], act_bits=[6])
    if breaks_at is None:
        measure_sensitivity(vit, [batch], units, forward)
    else:
        with pytest.raises(RuntimeError, match='broken image'):
            measure_sensitivity(vit, [batch], units, forward)
    assert phase_of(vit) is (Phase.QUANT if phase == 'quant' else Phase.FLOAT)
    assert state_of(vit) == before
    assert torch.equal(logits(vit, batch), output)


def test_injected_damage_comes_first():
    """One tensor's grid is made 200 times too coarse: it, its MLP, its block and its kind must lead their tables."""
    data = models.batches(2)
    model = models.quantized(models.vit(), data)
    path = 'backbone.layers.1.ffn.out_act'
    model.get_submodule(path).quantizer.scale.mul_(200)
    result = measure_sensitivity(model, data, units_of(Switches(model).layers), run)
    leaders = {'tensor': path, 'layer': 'backbone.layers.1.ffn', 'block': 'backbone.layers.1', 'group': 'MLP output'}
    for level, name in leaders.items():
        assert result.ranked(level, 'only')[0].name == name
        best = result.ranked(level, 'without')[0]
        assert best.name == name
        assert best.without is not None
        assert best.without.kl < 0.2 * result.quantized.kl


@pytest.mark.parametrize('name', BUILD)
def test_starting_behind_blocks_changes_nothing(name, monkeypatch):
    """Against passes that all start from the image."""
    build, size = BUILD[name]
    data = models.batches(1, size)
    model = models.quantized(build(), data)
    units = units_of(Switches(model).layers)
    quick = measure_sensitivity(model, data, units, run)
    skipped = []
    plain = Prefix.skipping
    monkeypatch.setattr(
        Prefix, 'skipping', lambda self, outputs, count: skipped.append(count) or plain(self, outputs, 0)
    )
    assert measure_sensitivity(model, data, units, run) == quick
    assert max(skipped) == len(Prefix(model)._blocks)  # the classifier comes after all of them
    assert len({u.name for u in units}) <= len(quick.entries) == len(units)


@pytest.mark.parametrize(
    'backbone', [zoo.BEIT, zoo.EVA02, zoo.SWINV2, zoo.SVT, zoo.MVIT, zoo.DAVIT], ids=lambda c: c['type']
)
def test_other_families_switch_too(backbone):
    """Each activation alone gives what its quantizer gives in a hook on the float model."""
    size = backbone.get('img_size', 64)
    model = models.quantized(models.build(backbone), models.batches(1, size))
    (batch,) = models.batches(1, size)
    with Switches(model) as switches, torch.no_grad():
        paths = [p for p, layer in switches.layers.items() if type(layer) is fq.QAct]
        for path in paths[:: max(1, len(paths) // 12)]:
            with switches.only((path,)):
                found = [t.clone() for t in models.features(model(batch))]
            hook = model.get_submodule(path).register_forward_hook(lambda module, args, out: module.quantizer(out))
            with switches.only(()):
                by_hand = models.features(model(batch))
            hook.remove()
            assert all(torch.equal(a, b) for a, b in zip(found, by_hand, strict=True)), path


def test_timm_models_are_measured():
    model = models.quantized(timm_models.vit(), models.batches(1))
    result = measure_sensitivity(model, models.batches(1), units_of(Switches(model).layers, ['group']))
    assert {e.name for e in result.entries} >= {'weights', 'MLP output', 'residual stream', 'LayerNorm output'}


def test_probabilities_meet_values_that_are_on_no_grid():
    """Against the product in float: exact probabilities times values as they are."""
    act = fq.QAct()
    act.quantizer.scale.fill_(0.5)
    powers = Powers(torch.tensor([[0.5, 1.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.5]]))
    v = torch.tensor([[0.3], [0.7]])
    assert float(attended(powers, v, act, lambda x: x)) == pytest.approx((0.5 * 0.3 + 0.7) / 1.5)


def test_kinds_of_every_family():
    """By their names in docs/how_it_works.md; what has no kind of its own is written here."""
    other = set()
    for backbone in (zoo.BEIT, zoo.EVA02, zoo.SWINV2, zoo.SVT, zoo.MVIT, zoo.DAVIT, models.swin_backbone()):
        model = models.build(backbone)
        fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
        kinds = {name: kind_of(name, m) for name, m in model.named_modules() if isinstance(m, QuantLayer)}
        assert set(kinds.values()) <= set(KINDS)
        other |= {name.rpartition('.')[2] for name, kind in kinds.items() if kind == OTHER}
    assert other <= {'input_act', 'skip_act', 'sr_act', 'reduction_act', 'sum_act'}
    model = models.vit()
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    named = {name: kind_of(name, m) for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    assert named['backbone.layers.0.attn_residual_act'] == named['backbone.residual_act'] == 'residual stream'
    assert named['backbone.layers.0.ffn.hidden_act'] == 'MLP hidden'
    assert named['backbone.layers.0.ffn.out_act'] == 'MLP output'
    assert named['backbone.layers.0.norm1_act'] == named['backbone.output_act'] == 'LayerNorm output'
    assert named['head.layers.head.out_act'] == 'pooling and head'
    assert OTHER not in named.values()


def test_labels_give_top1(vit):
    data = models.batches(2)
    fq.dequant(vit)
    truth = [logits(vit, b).argmax(1) for b in data]
    truth[0][0] = (truth[0][0] + 1) % models.CLASSES  # one of four that float gets wrong
    known = iter(truth)
    result = measure_sensitivity(
        vit, data, units_of(Switches(vit).layers, ['group']), run, labels=lambda _: next(known)
    )
    assert result.float_top1 == 0.75
    assert result.quantized.top1 is not None
    unlabelled = measure_sensitivity(vit, data, units_of(Switches(vit).layers, ['group']), run)
    assert unlabelled.quantized.top1 is unlabelled.float_top1 is None
    assert unlabelled.images == 4
    assert [i.index for i in unlabelled.each_image] == [0, 1, 2, 3]
    assert sum(i.kl for i in unlabelled.each_image) / 4 == pytest.approx(unlabelled.quantized.kl)
    assert unlabelled.worst_images(1)[0].kl == max(i.kl for i in unlabelled.each_image)


def test_json_and_back(vit):
    data = models.batches(1)
    analysis = analyse(vit, data, run)
    units = units_of(Switches(vit).layers, weight_bits=[4])
    result = measure_sensitivity(vit, data, units, run, analysis=analysis, directions=['only'])
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert Sensitivity.from_dict(json.loads(text)) == result
    entry = json.loads(text)['entries'][0]
    assert entry['without'] is None
    assert set(entry['only']) == {'kl', 'agree', 'top1'}
    sqnr = {r.path: r.sqnr for r in analysis.tensors}
    assert all(
        e.sqnr_db == pytest.approx(sqnr[e.name], abs=1e-3) for e in result.entries if e.sqnr_db and e.bits == 8
    )
    for wrong, said in (({'version': 2}, 'version 1: found 2'), ([], 'found .list'), ({'version': 1}, 'damaged')):
        with pytest.raises(ValueError, match=said):
            Sensitivity.from_dict(wrong)


def test_what_cannot_be_measured(vit):
    units, data = units_of(Switches(vit).layers, ['group']), models.batches(1)
    with pytest.raises(ValueError, match='no batch to measure'):
        measure_sensitivity(vit, [], units, run)
    with pytest.raises(ValueError, match='nothing to measure'):
        measure_sensitivity(vit, data, [], run)
    with pytest.raises(ValueError, match='nothing to measure'):
        measure_sensitivity(vit, data, units, run, directions=['both'])
    with pytest.raises(ValueError, match=r'one row of logits per image, and gives a tuple'):
        measure_sensitivity(vit, data, units, lambda m, x: m.extract_feat(x, stage='backbone'))
    with pytest.raises(ValueError, match="unknown level 'stage'"):
        units_of(Switches(vit).layers, ['stage'])
    with (
        Switches(vit) as switches,
        pytest.raises(ValueError, match="'nowhere' is no layer that can be switched; back"),
    ):
        switches.only(('nowhere',)).__enter__()
    model = models.vit()
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    with pytest.raises(RuntimeError, match='not calibrated'):
        measure_sensitivity(model, data, units_of(Switches(model).layers, ['group']), run)


def test_grids_of_other_widths():
    """A range of -1 to 3 by hand; the fine grid holds every point of the coarse one, and four times its range."""
    q = fq.QAct(fq.QuantSpec(fq.BitType(8, False))).quantizer
    q.scale.fill_(4 / 255)
    q.zero_point.fill_(64)
    ends = torch.tensor([-100.0, 100.0])
    coarse, wide, four = q(ends), fine(q)(ends), narrowed(q, 4)
    assert float(four.scale) == pytest.approx(4 / 15)
    assert int(four.zero_point) == 4
    assert float(wide[1] - wide[0]) == pytest.approx(4 * float(coarse[1] - coarse[0]), rel=1e-3)
    assert wide.mean() == pytest.approx(float(coarse.mean()), abs=1e-2)
    x = torch.linspace(-1, 3, 1001)
    assert (fine(q)(x) - x).abs().max() <= float(q.scale) / 64 / 2 * 1.1


def test_passes_are_counted(vit):
    units = units_of(Switches(vit).layers, ['tensor'], weight_bits=[3, 8])
    done = []
    measure_sensitivity(vit, models.batches(1), units, run, on_pass=lambda: done.append(1))
    assert len(done) == count_passes(units)
    weights = sum(u.kind == 'weights' for u in units if u.bits == 8)
    assert count_passes(units) == 2 * (len(units) - weights) + weights
    assert count_passes(units, ['without']) == len(units) - weights


def test_a_weight_keeps_its_own_quantizer(vit):
    layer = vit.get_submodule('backbone.layers.0.attn.qkv')
    before = layer.weight_quantizer
    assert torch.equal(weight_at(layer, 8).scale, before.scale)
    assert layer.weight_quantizer is before
