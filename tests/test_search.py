"""The search without NNI: space, objective, what is written; and one small experiment with it, resumed.

Oracles: bytes as surgery's report counts them, the accuracy of MMEngine's runner with QuantHook on the same images,
hand-made outcomes.
"""

from __future__ import annotations

import copy
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import search
import torch
from mmengine.config import Config

import fqvit_plugin as fq
from fqvit_plugin.layers import QConv2d, QLinear
from fqvit_plugin.presets import parse_scheme
from fqvit_plugin.search.experiment import Plan, _complaint
from fqvit_plugin.search.nni_compat import loopback_at, reserve_port, wait_for_server
from fqvit_plugin.search.objective import Objective, Outcome, Setting, count_test_images, recipe_key
from fqvit_plugin.search.results import choose, describe, make_table, pareto, write_config, write_json, write_plot
from fqvit_plugin.search.setup import configured_scheme, make_space, measure_baselines, parse_budget
from fqvit_plugin.search.space import Group, Space, derive_groups
from fqvit_plugin.search.trial import Job, run

from . import models
from .projects import float_checkpoint, project, runner, write_images

OPTIONS = {'observer': ['minmax', 'percentile:0.99'], 'ptf': [True, False], 'lis': [True, False]}


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
    """A tiny Swin on 24 training images in batches of 4, and 9 test images."""
    root = tmp_path_factory.mktemp('search')
    images = write_images(root / 'images', {'train': 8, 'val': 3})
    cfg = project(images, root / 'work', 'swin')
    cfg.quant_scheme = dict(type='fqvit_w8a8')
    float_checkpoint(cfg, root / 'float.pth')
    cfg.dump(root / 'config.py')
    return Setting(str(root / 'config.py'), str(root / 'float.pth'), None, 'cpu', 2, 3, 0)


@pytest.fixture(scope='module')
def objective(setting):
    return Objective(setting)


def weights_of(model):
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    return {n: (m.weight.numel(), 0) for n, m in model.named_modules() if isinstance(m, (QConv2d, QLinear))}


@pytest.mark.parametrize(
    ('build', 'grouping', 'names'),
    [
        (models.swin, 'role', ['embed', 'qkv', 'proj', 'fc1', 'fc2', 'merge', 'head']),
        (models.vit, 'role', ['embed', 'qkv', 'proj', 'fc1', 'fc2', 'head']),
        (models.swin, 'stage', ['embed', 'stage0', 'stage1', 'head']),
        (models.vit, 'stage', ['embed', 'block0', 'block1', 'head']),
        (
            models.swin, 'block',
            ['embed', 'stage0.block0', 'stage0.block1', 'stage0.merge', 'stage1.block0', 'stage1.block1', 'head'],
        ),
    ],
)  # fmt: skip
def test_groups_partition_the_weights(build, grouping, names):
    sizes = weights_of(build())
    groups = derive_groups(sizes, grouping)
    assert [g.name for g in groups] == names
    assert sum(sum(g.sizes) for g in groups) == sum(weights for weights, _ in sizes.values())
    for group in groups:  # each pattern is an override that surgery understands, and sets just these layers
        model = build()
        fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8', overrides=[dict(layers=group.layers, weight_bits=4)]))
        four = [
            m
            for m in model.modules()
            if hasattr(m, 'weight_quantizer') and m.weight_quantizer.spec.bit_type.bits == 4
        ]
        assert sorted(m.weight.numel() for m in four) == sorted(group.sizes)


def test_quarters_of_a_deep_vit():
    sizes = {f'backbone.layers.{i}.attn.qkv': (10, 0) for i in range(12)}
    groups = derive_groups(sizes, 'stage')
    assert [(g.name, len(g.sizes)) for g in groups] == [(f'quarter{i}', 3) for i in range(4)]
    assert groups[3].layers == tuple(f'backbone.layers.{i}.attn.qkv' for i in (9, 10, 11))


def test_unknown_grouping():
    with pytest.raises(ValueError, match='grouping must be one of role, stage, block'):
        derive_groups({}, 'layer')


def small_space(budget=None, base=None, **options):
    groups = (Group('a', ('a',), (100,), (0,)), Group('b', ('b.*',), (200, 301), (0, 0)))
    fixed = {Space.fixed_key(dict(ptf=p)): 50 + 10 * p for p in (True, False)}
    return Space(
        base or {'type': 'fqvit_w8a8'}, groups, (2, 4, 8), {**fixed, Space.fixed_key({}): 60}, budget, options
    )


@pytest.mark.parametrize(
    ('budget', 'point', 'expected'),
    [
        (None, (8, 2), (8, 2)),
        (60 + 100 + 501, (8, 8), (8, 8)),
        # 501 weights at 4 bits: 100 + 151 bytes; the wider group shrinks first, of equals the larger one
        (60 + 100 + 251, (8, 8), (8, 4)),
        (60 + 50 + 251, (8, 8), (4, 4)),
        (60 + 49 + 251, (8, 8), (8, 2)),  # 50 + 151 bytes are one too many; then a is raised again
        (60 + 25 + 126, (8, 8), (2, 2)),
        # what is left is filled, the narrowest group first
        (60 + 50 + 251, (2, 2), (4, 4)),
        (60 + 100 + 251, (2, 4), (8, 4)),
        (60 + 100 + 300, (2, 2), (8, 4)),
    ],
)
def test_points_are_fitted_to_the_budget(budget, point, expected):
    space = small_space(budget)
    scheme = parse_scheme(space.recipe(dict(zip(('bits/a', 'bits/b'), point, strict=True))))
    found = {'a': scheme.weight.bit_type.bits, 'b.*': scheme.weight.bit_type.bits}
    found.update({p: o.weight_bits for o in scheme.overrides for p in o.layers})
    assert (found['a'], found['b.*']) == expected
    bits = dict(zip('ab', expected, strict=True))
    assert budget is None or space.num_bytes(bits, {}) <= budget


def test_no_point_is_over_budget_and_bits_are_never_wasted():
    space = small_space(250)
    for point in itertools.product(space.weight_bits, repeat=2):
        recipe = space.recipe(dict(zip(('bits/a', 'bits/b'), point, strict=True)))
        assert recipe == space.build({'a': 4, 'b': 2}, {})  # 236 bytes; one step more anywhere takes 286 or 361


def test_a_budget_below_the_smallest_recipe():
    with pytest.raises(ValueError, match=r'budget of 200 bytes cannot be met: with 2 bits .* takes 211'):
        small_space(200)


def test_bits_must_ascend():
    with pytest.raises(ValueError, match='weight bits must ascend'):
        Space({}, (), (4, 3), {})


def test_options_become_arguments_of_get_scheme():
    space = small_space(None, observer=['minmax', 'percentile:0.99'], lis=[True])
    point = {'bits/a': 4, 'bits/b': 4, 'observer': 'percentile:0.99'}
    recipe = space.recipe(point)
    assert recipe == dict(
        type='fqvit_w8a8', observer=dict(type='percentile', alpha=0.99), lis=True, weight_bits=4
    )  # fmt: skip
    assert parse_scheme(recipe) == fq.get_scheme(
        'fqvit_w8a8', observer=dict(type='percentile', alpha=0.99), weight_bits=4
    )
    assert set(space.to_nni()) == {'bits/a', 'bits/b', 'observer'}  # what has one value is not searched
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))) == space


def test_overrides_of_the_config_stay_without_their_weights():
    base = dict(
        type='fqvit_w8a8', overrides=[dict(layers='c', act_bits=6, weight_bits=4), dict(layers='d', weight_bits=4)]
    )
    assert small_space(base=base).uniform(8)['overrides'] == [dict(layers='c', act_bits=6)]


@pytest.mark.parametrize(
    ('text', 'expected'), [(None, None), ('0.75', 750), ('2MB', 2_000_000), (' 0.5mb', 500_000), ('1', 1000)]
)
def test_budget(text, expected):
    assert parse_budget(text, 1000) == expected


@pytest.mark.parametrize('text', ['much', '0', '-1MB', '2'])
def test_bad_budget(text):
    with pytest.raises(ValueError, match='--budget'):
        parse_budget(text, 1000)


def test_the_space_knows_every_size(objective):
    """Predicted bytes equal those of surgery's report, for all combinations that change the number of scales."""
    space = make_space(objective, {'type': 'fqvit_w8a8'}, '0.7', 'role', [3, 5, 8], {**OPTIONS, 'attn_bits': [4, 8]})
    bits = dict(zip((g.name for g in space.groups), itertools.cycle(space.weight_bits), strict=False))
    for ptf, lis, attn in itertools.product((True, False), (True, False), (4, 8)):
        options = dict(ptf=ptf, lis=lis, attn_bits=attn)
        assert objective.num_bytes(space.build(bits, options)) == space.num_bytes(bits, options)
    assert space.budget == int(0.7 * objective.num_bytes({'type': 'fqvit_w8a8'}))
    with pytest.raises(ValueError, match="unknown observer 'maxmin'"):
        make_space(objective, {'type': 'fqvit_w8a8'}, None, 'role', [8], {'observer': ['maxmin']})


def test_accuracy_is_the_runners(setting, objective, tmp_path):
    """QuantHook in a runner, with the images of the search as test data, gives the same accuracy."""
    recipe = dict(type='fqvit_w8a8', weight_bits=3, overrides=[dict(layers='head.*', weight_bits=8)])
    outcome = objective.measure(recipe)
    cfg = Config.fromfile(setting.config)
    cfg.load_from, cfg.work_dir, cfg.experiment_name = setting.checkpoint, str(tmp_path), 'oracle'
    cfg.quant_scheme = copy.deepcopy(recipe)
    cfg.custom_hooks = [dict(type='fqvit_plugin.QuantHook', num_batches=2)]
    cfg.test_dataloader.dataset = dict(cfg.calib_dataloader.dataset, indices=objective.scoring.indices)
    cfg.test_dataloader.dataset.pipeline = cfg.val_dataloader.dataset.pipeline
    metrics = runner(cfg).test()
    assert outcome.top1 == pytest.approx(metrics['accuracy/top1'])
    assert outcome.images == len(objective.scoring.indices) == 12


def test_measuring_leaves_the_float_model(objective):
    before = {k: v.clone() for k, v in objective.model.state_dict().items()}
    first = objective.measure({'type': 'fqvit_w8a8', 'weight_bits': 2})
    again = objective.measure({'type': 'fqvit_w8a8', 'weight_bits': 2})
    assert first == again
    assert first.divergence > objective.measure({'type': 'fqvit_w8a8', 'weight_bits': 16, 'act_bits': 16}).divergence
    assert before.keys() == objective.model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in objective.model.state_dict().items())
    with pytest.raises(ValueError, match='matches no layer'):
        objective.measure({'type': 'fqvit_w8a8', 'overrides': [dict(layers='x', weight_bits=4)]})
    assert objective.measure({'type': 'fqvit_w8a8', 'weight_bits': 2}) == first


def test_images_are_held_out(setting, objective):
    calibrating, scored = set(objective.calibration.indices), set(objective.scoring.indices)
    assert len(calibrating) == 8
    assert not calibrating & scored
    assert count_test_images(objective) == 0
    too_many = Setting(setting.config, setting.checkpoint, calib_batches=6)
    with pytest.raises(ValueError, match='6 batches and 6 of them calibrate: none is left to score'):
        Objective(too_many)


def test_a_search_dataloader_is_scored(setting, tmp_path):
    cfg = Config.fromfile(setting.config)
    cfg.search_dataloader = copy.deepcopy(cfg.test_dataloader)
    cfg.dump(tmp_path / 'config.py')
    other = Objective(Setting(str(tmp_path / 'config.py'), setting.checkpoint, calib_batches=2))
    assert len(other.scoring.indices) == 9
    assert count_test_images(other) == 9
    cfg.search_dataloader = copy.deepcopy(cfg.calib_dataloader)
    cfg.dump(tmp_path / 'bad.py')
    with pytest.raises(ValueError, match='8 images of search_dataloader are among those that calibrate'):
        Objective(Setting(str(tmp_path / 'bad.py'), setting.checkpoint, calib_batches=2))


def outcome(top1, num_bytes, divergence=0.1, source='search', **recipe):
    return Outcome({'type': 'fqvit_w8a8', **recipe}, source, num_bytes, top1, divergence, 200, f'{top1}-{num_bytes}')


def test_accuracy_counts_before_divergence():
    assert outcome(90.5, 1, 1e9).score > outcome(90.0, 1, 0.0).score  # one image of 200 is half a percent
    assert outcome(90.0, 1, 0.1).score > outcome(90.0, 1, 0.2).score


def test_the_best_under_the_budget_and_the_front():
    few, many, worse, tie = outcome(90, 100), outcome(95, 200), outcome(85, 150), outcome(95, 190)
    assert choose([few, many, worse], 150) is few
    assert choose([few, many, worse], None) is many
    assert choose([few, many, tie], None) is tie
    assert pareto([many, few, worse, tie]) == [few, tie]
    with pytest.raises(ValueError, match='no recipe takes at most 99 bytes'):
        choose([few], 99)


def test_what_is_written(tmp_path):
    uniform = outcome(90, 100, source='uniform W4', weight_bits=4)
    found = outcome(
        95, 120, overrides=[dict(layers='b.*', weight_bits=4)], observer=dict(type='percentile', alpha=0.9)
    )
    groups = (Group('second', ('b.*',), (1,), (0,)),)
    assert describe(found.recipe, groups) == 'W8, second: 4 (A8, attn8, percentile:0.9, ptf, lis)'
    write_json(tmp_path / 'r.json', [uniform, found], found, {'budget': 130})
    data = json.loads((tmp_path / 'r.json').read_text())
    assert Outcome.from_dict(data['best']) == found
    assert [Outcome.from_dict(o) for o in data['measured']] == [uniform, found]
    assert data['budget'] == 130
    write_plot(tmp_path / 'p.png', [uniform, found], found, 96.0, 130)
    assert (tmp_path / 'p.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    table = make_table([uniform, found], found, 96.0, groups)
    assert list(table.columns[0].cells) == ['>', '*']
    assert list(table.columns[1].cells) == ['search', 'uniform W4']


@pytest.mark.parametrize('changes', [None, {'test_dataloader.batch_size': 2}])
def test_the_written_config_means_the_winner(setting, tmp_path, changes):
    recipe = dict(
        type='fqvit_w8a8', ptf=False, overrides=[dict(layers=['head.*', 'backbone.stages.0.*'], weight_bits=4)]
    )
    given = Setting(setting.config, setting.checkpoint, changes, calib_batches=2, seed=3)
    write_config(tmp_path / 'best.py', given, Outcome(recipe, 'search', 1, 90.0, 0.1, 9))
    cfg = Config.fromfile(tmp_path / 'best.py')
    assert parse_scheme(cfg.quant_scheme) == parse_scheme(recipe)
    assert cfg.custom_hooks == [dict(type='fqvit_plugin.QuantHook', num_batches=2, seed=3)]
    assert ('_base_ =' in (tmp_path / 'best.py').read_text()) == (changes is None)
    assert cfg.test_dataloader.batch_size == (4 if changes is None else 2)
    assert cfg.model == Config.fromfile(setting.config).model


def test_other_hooks_and_options_of_ours_are_kept(tmp_path):
    (tmp_path / 'base.py').write_text(
        "custom_hooks = [dict(type='EMAHook', priority='NORMAL'),\n"
        "    dict(type='QuantHook', num_batches=4, compare_float=True, scheme='fqvit_w8a8')]\n"
    )
    write_config(tmp_path / 'best.py', Setting(str(tmp_path / 'base.py'), ''), outcome(90, 1, weight_bits=6))
    hooks = Config.fromfile(tmp_path / 'best.py').custom_hooks
    assert hooks[0] == dict(type='EMAHook', priority='NORMAL')
    assert hooks[1] == dict(type='fqvit_plugin.QuantHook', num_batches=10, compare_float=True, seed=0)


def test_equal_recipes_have_equal_keys():
    assert recipe_key({'type': 'fqvit_w8a8'}) == recipe_key({'type': 'fqvit_w8a8', 'weight_bits': 8, 'ptf': True})
    assert recipe_key({'type': 'fqvit_w8a8'}) != recipe_key({'type': 'fqvit_w8a8', 'weight_bits': 7})


def test_configured_scheme():
    assert configured_scheme({}) == configured_scheme({'quant_scheme': 'fqvit_w8a8'}) == {'type': 'fqvit_w8a8'}
    cfg = Config(dict(quant_scheme=dict(type='fqvit_w8a8', ptf=False, _scope_='mmpretrain')))
    assert configured_scheme(cfg) == {'type': 'fqvit_w8a8', 'ptf': False}


def test_a_trial_takes_what_an_earlier_one_measured(setting, objective, tmp_path):
    space = make_space(objective, {'type': 'fqvit_w8a8'}, '0.6', 'role', [2, 4, 8], {})
    job = Job(setting, space, tmp_path / 'trials')
    job.save(tmp_path / 'job.json')
    assert Job.load(tmp_path / 'job.json') == job
    point = {f'bits/{g.name}': 8 for g in space.groups}
    first = run(job, point, 'one')
    assert first.num_bytes <= space.budget
    assert run(Job(Setting('nowhere', ''), space, job.folder), point, 'two').top1 == first.top1  # it needs no model
    assert [o.trial for o in job.outcomes()] == ['one', 'two']
    baselines = measure_baselines(objective, space, [first], lambda line: None)
    assert [o.source for o in baselines] == ['uniform W2', 'uniform W4', 'uniform W8']
    assert [parse_scheme(o.recipe).weight.bit_type.bits for o in baselines] == [2, 4, 8]


@pytest.mark.parametrize(
    ('scores', 'exhausted'),
    [([1, 2], False), ([3, 1, 2], True), ([1, 1, 1], True), ([1, 2, 3], False), ([3, 1, 4, 2], False)],
)
def test_patience(scores, exhausted):
    assert Plan(patience=2).is_exhausted(scores) is exhausted
    assert not Plan().is_exhausted(scores)


@pytest.mark.parametrize('bad', [dict(trials=0), dict(concurrency=0), dict(patience=0), dict(tuner='best')])
def test_bad_plans(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Plan(**bad)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--budget', '0.1'], 'cannot be met'),
        (['--trials', '0'], 'trials must be at least 1'),
        (['--resume'], 'no experiment to resume'),
        (['--observers', 'minmax', '--fix', 'ptf', 'lis', '--weight-bits', '8'], 'nothing to search'),
        (['--batches', '99'], 'none is left to score'),
    ],
)
def test_mistakes_are_one_line(setting, tmp_path, capsys, options, message):
    code = search.main(
        [setting.config, setting.checkpoint, '--out', str(tmp_path / 'out'), '--batches', '2', *options]
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert last.startswith('search.py: ')
    assert message in last


@pytest.mark.filterwarnings('ignore::ResourceWarning', 'ignore::DeprecationWarning')  # of nni 3.0
def test_an_experiment_runs_and_is_resumed(setting, tmp_path, monkeypatch, capsys):
    """A trial by NNI on loopback, another one after --resume; nothing of NNI's is written outside --out."""
    home, out = tmp_path / 'home', tmp_path / 'out'
    home.mkdir()
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    command = [
        setting.config, setting.checkpoint, '--out', str(out), '--budget', '0.7',
        '--weight-bits', '2', '3', '4', '6', '8', '--batches', '2', '--score-batches', '2', '--tuner', 'random',
        '--observers', 'minmax', '--fix', 'ptf', 'lis',
    ]  # fmt: skip
    listening = set()

    def look(line):  # while NNI runs: a trial has just finished
        if line.startswith('trial'):
            children = psutil.Process().children(recursive=True)
            listening.update(c.laddr.ip for p in children for c in p.net_connections('inet') if c.status == 'LISTEN')
        print(line, file=sys.stderr)

    monkeypatch.setattr(search, '_say', look)
    assert search.main([*command, '--trials', '1']) == 0
    assert 'trial 1/1: top-1' in capsys.readouterr().err
    assert listening == {'127.0.0.1'}
    assert search.main([*command, '--trials', '2']) == 2
    assert 'holds an experiment: add --resume' in capsys.readouterr().err
    assert search.main([*command, '--trials', '2', '--resume', '--seed', '1']) == 2
    assert '--resume: seed differs from what the experiment was started with' in capsys.readouterr().err
    assert search.main([*command, '--trials', '2', '--resume']) == 0
    printed = capsys.readouterr()
    assert 'trial 2/2: top-1' in printed.err
    assert 'trial 1/2' not in printed.err
    assert 'written: ' in printed.out
    data = json.loads((out / 'results.json').read_text())
    recipes = [o['recipe'] for o in data['measured'] if o['source'] == 'search']
    assert len(recipes) == 2
    assert recipes[0] != recipes[1]  # the tuner does not begin anew
    assert {'uniform W3', 'uniform W8'} <= {o['source'] for o in data['measured']}
    assert data['best']['num_bytes'] <= data['budget']
    assert parse_scheme(Config.fromfile(out / 'best.py').quant_scheme) == parse_scheme(data['best']['recipe'])
    assert (out / 'pareto.png').is_file()
    best = Config.fromfile(out / 'best.py')
    best.load_from, best.work_dir, best.experiment_name = setting.checkpoint, str(tmp_path / 'work'), 'best'
    run_best = runner(best)
    assert 'accuracy/top1' in run_best.test()
    hook = next(h for h in run_best.hooks if isinstance(h, fq.QuantHook))
    assert hook.report.quantized_bytes == data['best']['num_bytes']
    assert not [p for p in home.rglob('*') if 'nni' in p.name]


def test_nni_listens_on_loopback_only(tmp_path):
    """What is loaded before NNI's own code turns every way to call ``listen`` into 127.0.0.1."""
    nni_node = pytest.importorskip('nni_node')
    with loopback_at(tmp_path):
        program = (
            "const http = require('http'), os = require('os');"
            "const show = (s) => s.on('listening', () => { console.log(s.address().address); s.close(); });"
            'show(http.createServer().listen(0)); show(http.createServer().listen({ port: 0 }));'
            "show(http.createServer().listen(0, '0.0.0.0')); show(http.createServer().listen(0, () => {}));"
            'console.log(os.homedir());'
        )
        node = Path(nni_node.__path__[0]) / 'node'
        done = subprocess.run([node, '-e', program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [str(tmp_path / 'home')] + ['127.0.0.1'] * 4
    assert 'FQVIT_NNI_HOME' not in os.environ


class Starting(http.server.BaseHTTPRequestHandler):
    """What NNI's server says while it starts: two of these answers, then JSON."""

    answers: ClassVar[list[bytes]] = []

    def do_GET(self):
        answer = self.answers.pop(0) if self.answers else b'{"status": "RUNNING"}'
        self.send_response(200)
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


def test_a_server_that_starts_slowly_is_waited_for():
    """As NNI's own server does, this one refuses at first, then is INITIALIZING for longer than NNI would ask."""
    port, answers = reserve_port(), [b'INITIALIZING'] * 6
    process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])

    def serve():
        time.sleep(0.5)
        with http.server.HTTPServer(('127.0.0.1', port), Starting) as server:
            Starting.answers = answers
            for _ in range(7):
                server.handle_request()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        wait_for_server(process, port, 30)
        assert not answers
        assert process.poll() is None
        thread.join()
        with pytest.raises(RuntimeError, match='its server was not ready after 1 s'):
            wait_for_server(process, port, 1)
        assert process.poll() is not None, 'nothing is left running'
        with pytest.raises(RuntimeError, match='its server ended with exit code -9'):
            wait_for_server(process, port, 30)
    finally:
        process.kill()
        thread.join()


def test_nnis_tuner_has_two_minutes_to_come_up(tmp_path):
    """A timer of ten seconds in NNI's file of that name is longer, any other is as it was; oracle: node's timers."""
    nni_node = Path(pytest.importorskip('nni_node').__path__[0])
    assert '}, 10000);' in (nni_node / 'core' / 'tuner_command_channel.js').read_text(), 'what is worked round'
    program = (
        'for (const ms of [10000, 5000]) { const t = setTimeout(() => {}, ms); console.log(t._idleTimeout);'
        "clearTimeout(t); } require('timers/promises').setTimeout(1).then(() => console.log('promised'));"
        "require('util').promisify(setTimeout)(1).then(() => console.log('promised'));"
    )
    with loopback_at(tmp_path):
        printed = []
        for name in ('tuner_command_channel.js', 'other.js'):
            (tmp_path / name).write_text(program)
            done = subprocess.run(
                [nni_node / 'node', tmp_path / name], capture_output=True, text=True, timeout=60, check=True
            )
            printed.append(done.stdout.split())
    assert printed == [['120000', '5000', 'promised', 'promised'], ['10000', '5000', 'promised', 'promised']]


def test_what_a_failed_trial_said_is_passed_on(tmp_path):
    log = tmp_path / 'environments' / 'local-env' / 'trials' / 'x' / 'trial.stderr'
    log.parent.mkdir(parents=True)
    log.write_text('Traceback\nValueError: no such file\n')
    assert _complaint(tmp_path).startswith('ValueError: no such file (logs: ')
