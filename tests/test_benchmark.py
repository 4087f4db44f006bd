"""tools/benchmark.py: ratios of rounds done by hand, real runs on the digits models, and a user's mistakes."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import _bench
import benchmark
import pytest
import torch

import fqvit_plugin as fq

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'digits'
VIT, SWIN = str(CONFIGS / 'digits_vit.py'), str(CONFIGS / 'digits_swin.py')
SMALL = ['--batch-size', '2', '--batches', '3', '--repeats', '2']
SETTINGS = dict(
    batch_size=2,
    image_size=None,
    batches=3,
    repeats=2,
    threads=1,
    device='cpu',
    seed=0,
    checkpoint=None,
    compile_backend='eager',
    cfg_options={},
)


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def subject(config: str = VIT, **changes) -> _bench.Subject:
    return _bench.Subject(Path(config), _bench.Settings(**{**SETTINGS, **changes}))


@pytest.fixture(scope='module')
def vit():
    loaded = subject()
    loaded.load()
    return loaded


@pytest.fixture(scope='module')
def document(tmp_path_factory):
    """What one run writes; with it, the path."""
    path = tmp_path_factory.mktemp('bench') / 'a.json'
    options = ['--observers', 'minmax', 'omse', '--profile', '3', '--json', str(path)]
    assert benchmark.main([VIT, SWIN, *SMALL, *options]) == 0
    return json.loads(path.read_text()), path


# --- by hand


@pytest.mark.parametrize(
    ('piece', 'base', 'batches'),
    [
        ('float', None, 1),
        ('float/all', None, 10),
        ('calibrate/omse', 'float/all', 10),
        ('quant/reference', 'float', 1),
        ('compiled float', 'float', 1),
        ('compiled quant/strict', 'compiled float', 1),
    ],
)
def test_what_a_piece_is_compared_with(piece, base, batches):
    assert _bench.base_of(piece) == base
    assert _bench.batches_of(piece, 10) == batches


def test_ratios_are_of_the_same_round():
    rounds = [{'float': 1.0, 'quant/strict': 3.0}, {'float': 2.0, 'quant/strict': 4.0}]
    assert _bench.ratios(rounds, 'quant/strict') == (3.0, 2.0)
    assert _bench.ratios(rounds, 'float') == ()
    without_base = [{'compiled quant/strict': 1.0}]
    assert _bench.ratios(without_base, 'compiled quant/strict') == ()


def test_a_timing_shows_medians_and_the_spread_over_rounds():
    timing = _bench.Timing('quant/strict', 1, 'float', 9.0, (3.0, 8.0, 4.0), (3.0, 2.0, 8.0))
    shown = timing.to_dict()
    assert (shown['median'], shown['ratio'], shown['spread']) == (4.0, 3.0, (2.0, 8.0))


def test_memory_is_growth_over_the_growth_of_float():
    shown = _bench.Memory('quant/strict', 1, start=100, peak=160, float_growth=20).to_dict()
    assert (shown['growth'], shown['ratio']) == (60, 3.0)
    assert _bench.Memory('float', 1, start=100, peak=120, float_growth=None).to_dict()['ratio'] is None


def test_every_piece_takes_every_place():
    orders = [_bench.rotated(['a', 'b', 'c'], number) for number in range(4)]
    assert orders == [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b'], ['a', 'b', 'c']]


def test_a_short_piece_is_repeated_and_averaged_a_long_one_is_not():
    runs = []
    mean = _bench.timed(lambda: runs.append(None), lambda: None, shortest=0.05)
    assert len(runs) > 1
    assert mean * len(runs) == pytest.approx(0.05, rel=0.5)
    runs.clear()
    assert _bench.timed(lambda: runs.append(time.sleep(0.01)), lambda: None, shortest=0.005) >= 0.01
    assert len(runs) == 1


def written(ratio: float, config: str = 'c.py', **settings) -> dict:
    pieces = {'float': {'ratio': None}, 'quant/strict': {'ratio': ratio}}
    memory = {'calibrate/ema x 2': {'ratio': 2 * ratio}}
    result = dict(scheme={'type': 'fqvit_w8a8'}, image_size=32, pieces=pieces, memory=memory)
    return dict(schema=1, machine={'torch': '2.8'}, settings=settings, configs={config: result})


def test_comparison_with_a_baseline():
    changes = benchmark.compare_with_baseline(written(4.0), written(5.0))
    assert [(c.config, c.what, c.earlier, c.now, c.percent) for c in changes] == [
        ('c.py', 'quant/strict', 4.0, 5.0, 25.0),
        ('c.py', 'memory of calibrate/ema x 2', 8.0, 10.0, 25.0),
    ]
    assert benchmark.compare_with_baseline(written(4.0), written(5.0, config='d.py')) == []


def test_what_makes_documents_incomparable():
    earlier, now = written(4.0, threads=2, seed=0), written(4.0, threads=1, seed=0)
    now['machine'] = {'torch': '2.9'}
    now['configs']['c.py']['image_size'] = 64
    assert benchmark.differences(earlier, now) == [
        'machine torch: 2.8 then, 2.9 now',
        'settings threads: 2 then, 1 now',
        'c.py image_size: 32 then, 64 now',
    ]
    assert benchmark.differences(earlier, earlier) == []


# --- what is measured


def test_schemes_of_the_pieces():
    configured = dict(type='fqvit_w8a8', preset='reference', ptf=False, lis=False, observer='ema', act_bits=6)
    made = subject(cfg_options={'quant_scheme': configured})
    assert made.scheme_of('float') is made.scheme_of('compiled float') is None
    assert made.scheme_of('calibrate/omse') == fq.get_scheme('fqvit_w8a8', observer='omse', act_bits=6)
    strict = fq.get_scheme(
        **{('name' if k == 'type' else k): v for k, v in configured.items()} | {'preset': 'strict'}
    )
    assert made.scheme_of('quant/strict') == made.scheme_of('compiled quant/strict') == strict
    assert subject().scheme_of('quant/strict') == fq.get_scheme('fqvit_w8a8_attn4')


@pytest.mark.parametrize(
    ('options', 'image_size', 'expected'),
    [({}, None, 32), ({}, 64, 64), ({'model.backbone.img_size': (32, 32)}, None, 224)],
)
def test_image_size(options, image_size, expected):
    made = subject(cfg_options=options, image_size=image_size)
    assert made.image_size == expected
    assert next(made.images(1)).shape == (2, 3, expected, expected)


def test_images_come_one_by_one_and_again_the_same():
    batches = subject().images(10**9)  # all of them would not fit
    first, second = next(batches), next(batches)
    assert not torch.equal(first, second)
    assert torch.equal(first, next(subject().images(1)))


def test_twins_share_weights_and_leave_the_float_model_alone(vit):
    images = list(vit.images(2))
    before = _bench.forward(vit.model, images[0])
    work = vit.prepare('quant/strict', images[:1])
    twin = work.args[0]
    assert fq.lifecycle.phase_of(twin) is fq.phase.Phase.QUANT
    assert {id(p) for p in twin.parameters()} == {id(p) for p in vit.model.parameters()}
    assert not torch.equal(_bench.forward(twin, images[0]), before)
    vit.prepare('calibrate/minmax', images[:1])(images)
    assert torch.equal(_bench.forward(vit.model, images[0]), before)


def test_a_calibration_goes_through_every_batch(vit):
    work = vit.prepare('calibrate/percentile', list(vit.images(1)))
    assert work(vit.images(3)) == 3


def test_finished_rounds_survive_an_interruption(vit):
    def tick(text: str) -> None:
        if text == 'float, round 2':
            raise KeyboardInterrupt

    stopwatch = _bench.Stopwatch(vit, ['float', 'quant/strict'], tick)
    with pytest.raises(KeyboardInterrupt):
        stopwatch.run()
    assert [len(timing.seconds) for timing in stopwatch.timings()] == [1, 1]


@pytest.mark.slow
@pytest.mark.skipif(not _bench.can_measure_memory('cpu'), reason='no /proc/self/clear_refs')
def test_memory_in_processes_of_their_own():
    argv = [VIT, '--batch-size', '64', '--batches', '2', '--threads', '1']
    first, second = _bench.in_processes(Path(VIT), ['float', 'float/all', 'calibrate/minmax'], 2, argv)
    batch = 64 * 3 * 32 * 32 * 4
    assert (first.piece, first.batches, first.float_growth) == ('float', 1, None)
    assert (second.piece, second.batches, second.float_growth) == ('calibrate/minmax', 2, first.peak - first.start)
    for row in (first, second):
        assert batch < row.peak - row.start < 100 * batch


# --- the tool


def test_json_holds_raw_times_and_what_follows_from_them(document):
    data, _ = document
    assert data['schema'] == benchmark.SCHEMA
    assert data['date'].endswith('+00:00')
    assert data['settings']['batch_size'] == 2
    assert data['machine']['torch'] == torch.__version__
    assert data['machine']['fqvit_plugin'] == fq.__version__
    assert list(data['configs']) == [VIT, SWIN]
    for result in data['configs'].values():
        pieces = result['pieces']
        expected = ['float', 'float/all', 'calibrate/minmax', 'calibrate/omse', 'quant/strict', 'quant/reference']
        assert list(pieces) == expected
        for values in pieces.values():
            assert len(values['seconds']) == 2
            assert values['median'] == statistics.median(values['seconds'])
        for name, base in (('calibrate/omse', 'float/all'), ('quant/strict', 'float')):
            by_hand = [a / b for a, b in zip(pieces[name]['seconds'], pieces[base]['seconds'], strict=True)]
            assert pieces[name]['ratios'] == by_hand
            assert pieces[name]['ratio'] == statistics.median(by_hand)
            assert pieces[name]['spread'] == [min(by_hand), max(by_hand)]
        assert [len(operators) for operators in result['profile'].values()] == [3, 3]
        assert set(result['profile']) == {'float', 'quant/strict'}


def test_tables_and_the_comparison_with_an_earlier_run(document, tmp_path, capsys):
    _, path = document
    options = ['--pieces', 'quant', '--presets', 'strict', '--repeats', '1', '--baseline', str(path)]
    assert benchmark.main([VIT, *SMALL, *options]) == 0
    out = capsys.readouterr().out
    assert '\x1b' not in out
    assert 'batches of 2 random images of 32 x 32, random weights' in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if len(line.split()) > 1}
    assert rows['quant/strict'][1] == '1'
    assert rows['quant/strict'][-1] == 'float'
    assert 'calibrate/minmax' not in rows
    assert rows[VIT][1] == 'quant/strict'
    assert rows[VIT][-1] == '%'
    assert 'not comparable? settings repeats: 2 then, 1 now' in out
    assert 'settings threads' not in out


def test_compiled_pieces(capsys):
    options = ['--pieces', 'compile', '--compile-backend', 'eager', '--repeats', '1']
    assert benchmark.main([VIT, *SMALL, *options]) == 0
    out = capsys.readouterr().out
    assert 'compiled quant/strict: compiled after' in out
    assert [line.split()[-2:] for line in out.splitlines() if line.startswith('  compiled quant')] == [
        ['compiled', 'float']
    ]


def test_a_compiler_that_fails_leaves_the_rest(tmp_path, capsys):
    options = ['--pieces', 'compile', 'quant', '--presets', 'strict', '--compile-backend', 'nothing']
    assert benchmark.main([VIT, *SMALL, *options, '--json', str(tmp_path / 'a.json')]) == 0
    assert "compiled float: failed: Invalid backend: 'nothing'" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / 'a.json').read_text())['configs'].values()
    assert 'nothing' in result['pieces']['compiled float']['failed']
    assert result['pieces']['quant/strict']['ratio'] > 0


def test_ctrl_c_prints_and_writes_what_was_finished(tmp_path, monkeypatch, capsys):
    def interrupt(pieces, number):
        if number == 2:
            raise KeyboardInterrupt
        return pieces

    monkeypatch.setattr(_bench, 'rotated', interrupt)
    out = tmp_path / 'a.json'
    argv = [VIT, *SMALL, '--repeats', '5', '--pieces', 'quant', '--presets', 'strict', '--json', str(out)]
    assert benchmark.main(argv) == 130
    said = capsys.readouterr()
    assert 'interrupted' in said.err
    assert 'quant/strict' in said.out
    (result,) = json.loads(out.read_text())['configs'].values()
    assert len(result['pieces']['quant/strict']['seconds']) == 2
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['nowhere.py'], 'there is no config nowhere.py'),
        ([VIT, 'nowhere.py'], 'there is no config nowhere.py'),
        ([str(CONFIGS / '_base_' / 'data.py')], 'has no model'),
        ([VIT, '--observers', 'minmax', 'maxmin'], "unknown observer 'maxmin'"),
        ([VIT, '--device', 'meta'], 'only cpu and cuda'),
        ([VIT, '--checkpoint', 'nowhere.pth'], 'nowhere.pth'),
        ([VIT, '--json', 'no/such/folder/a.json'], 'there is no folder'),
        ([VIT, '--json', str(CONFIGS)], 'is a folder'),
        ([VIT, '--baseline', 'nowhere.json'], 'nowhere.json'),
        ([VIT, '--baseline', VIT], 'was not written by --json'),
        ([SWIN, '--image-size', '8'], 'images of 8 x 8 do not pass'),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(argv, message, capsys):
    assert benchmark.main([*argv, *SMALL]) == 2
    said = capsys.readouterr()
    assert said.out == ''
    (line,) = said.err.strip().splitlines()
    assert line.startswith('benchmark.py: ')
    assert message in line


@pytest.mark.parametrize(
    ('text', 'message'),
    [('[]', 'was not written'), ('{"schema": 0}', 'has schema 0'), ('{"schema": 1}', 'was not written')],
)
def test_baselines_that_are_none(text, message, tmp_path, capsys):
    path = tmp_path / 'a.json'
    path.write_text(text)
    assert benchmark.main([VIT, '--baseline', str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is here')
def test_a_gpu_that_is_not_there(capsys):
    assert benchmark.main([VIT, '--device', 'cuda']) == 2
    assert 'sees no GPU' in capsys.readouterr().err


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.json'
    path.write_text('precious')

    def full(*_):
        raise OSError('no space left')

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='no space left'):
        benchmark.write_json(path, {})
    assert path.read_text() == 'precious'
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']


@pytest.mark.parametrize('option', ['--batches', '--repeats', '--threads'])
def test_counts_are_at_least_one(option, capsys):
    with pytest.raises(SystemExit) as done:
        benchmark.main([VIT, option, '0'])
    assert done.value.code == 2
    assert 'must be at least 1, got 0' in capsys.readouterr().err


def test_help_has_examples_and_hides_what_is_not_for_people(capsys):
    with pytest.raises(SystemExit) as done:
        benchmark.main(['--help'])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert 'examples:' in out
    assert '--memory-of' not in out
