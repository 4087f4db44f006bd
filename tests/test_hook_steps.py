"""QuantHook and the tool, with recipes that have steps. Oracles: the run without the hook; the first run's scores."""

from __future__ import annotations

import calibrate
import pytest
import torch

import fqvit_plugin as fq

from .projects import build, float_checkpoint, project, runner, write_images
from .test_hook import spied, weights_after_training  # noqa: F401

TUNE = dict(type='tune', block_steps=1, model_steps=2, batch_size=4)
LOW = dict(quant_scheme=dict(_delete_=True, type='fqvit_w4a4', steps=['equalize', 'round', TUNE]))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), {'train': 5, 'val': 3})


@pytest.mark.parametrize('kind', ['vit', 'swin'])
def test_a_reloaded_checkpoint_has_the_first_runs_scores(images, tmp_path, spied, kind):  # noqa: F811
    cfg = project(images, tmp_path, kind, **LOW)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    made, first, _ = spied(cfg)
    made.test()
    assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), build(cfg).parameters(), strict=True))
    again = project(images, tmp_path / 'again', kind, load_from=str(tmp_path / 'calibrated.pth'), **LOW)
    made, second, _ = spied(again)
    made.test()
    assert torch.equal(torch.stack(first.scores), torch.stack(second.scores))
    assert any('calibration is skipped' in f.read_text() for f in (tmp_path / 'again').rglob('*.log'))
    other = project(images, tmp_path / 'b', kind, load_from=str(tmp_path / 'calibrated.pth'))
    other.quant_scheme = dict(type='fqvit_w4a4')
    with pytest.raises(ValueError, match=r'another scheme.*steps'):
        runner(other).test()


def test_training_is_untouched_by_steps(images, tmp_path):
    """Parameters, gradients and random numbers: equal weights, bit for bit."""
    results = []
    for name in ('without', 'with'):
        cfg = project(images, tmp_path / name, **LOW)
        if name == 'without':
            cfg.custom_hooks = []
        results.append(weights_after_training(cfg))
    plain, hooked = results
    assert plain.keys() == hooked.keys()
    assert all(torch.equal(plain[k], hooked[k]) for k in plain)


def test_the_tool_writes_what_the_hook_writes(images, tmp_path):
    cfg = project(images, tmp_path / 'work', quant_scheme__type='fqvit_w4a4')
    float_checkpoint(cfg, tmp_path / 'float.pth')
    cfg.dump(tmp_path / 'config.py')
    arguments = [str(tmp_path / n) for n in ('config.py', 'float.pth')]
    assert calibrate.main([*arguments, '--out', str(tmp_path / 'q.pth'), '--batches', '3']) == 0
    runner(cfg).test()
    ours, hooks = (torch.load(tmp_path / n, weights_only=True) for n in ('q.pth', 'work/calibrated.pth'))
    assert ours['meta']['fqvit'] == hooks['meta']['fqvit']
    assert ours['state_dict'].keys() == hooks['state_dict'].keys()
    assert all(torch.equal(v, hooks['state_dict'][k]) for k, v in ours['state_dict'].items())
    assert fq.QuantScheme.from_dict(ours['meta']['fqvit']['scheme']) == fq.get_scheme('fqvit_w4a4')
