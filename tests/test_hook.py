"""QuantHook around MMEngine's loops, on image folders. Oracle: the public functions applied by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

import fqvit_plugin as fq

from .projects import build, float_checkpoint, project, runner, write_images


@HOOKS.register_module(force=True)
class _Spy(Hook):
    """Keeps the logits of every evaluated batch and the model that gave them."""

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []
        self.model = None

    def _after(self, runner, outputs) -> None:
        self.model = runner.model
        self.scores += [sample.pred_score for sample in outputs]

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self._after(runner, outputs)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self._after(runner, outputs)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), {'train': 5, 'val': 3, 'empty': 0})


@pytest.fixture
def spied():
    """Attach a spy to a config's hooks and find it again in the runner."""

    def attach(cfg):
        cfg.custom_hooks.append(dict(type='_Spy'))
        made = runner(cfg)
        spy = next(h for h in made.hooks if isinstance(h, _Spy))
        hook = next(h for h in made.hooks if isinstance(h, fq.QuantHook))
        return made, spy, hook

    return attach


def by_hand(cfg, made, num_batches=3):
    """Scores of the quantized model, calibrated by the public functions on the hook's images."""
    model = build(cfg)
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8_attn4'))
    loader_cfg = copy.deepcopy(cfg.calib_dataloader)
    loader_cfg.dataset.pipeline = cfg.test_dataloader.dataset.pipeline
    batches = list(made.build_dataloader(loader_cfg))[:num_batches]
    fq.calibrate_(model, batches, lambda m, b: m(**m.data_preprocessor(b, False), mode='tensor'))
    fq.quant(model)
    with torch.no_grad():
        return [s.pred_score for batch in made.test_dataloader for s in model.test_step(batch)]


@pytest.mark.parametrize('kind', ['vit', 'swin', 'beit', 'swinv2'])
def test_test_loop_scores_the_quantized_model(images, tmp_path, spied, kind):
    cfg = project(images, tmp_path, kind)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    made, spy, hook = spied(cfg)
    float_model = made.model
    metrics = made.test()
    assert 'accuracy/top1' in metrics
    assert torch.equal(torch.stack(spy.scores), torch.stack(by_hand(cfg, made)))
    assert made.model is float_model
    assert spy.model is not float_model
    assert not any(isinstance(m, fq.QAct) for m in made.model.modules())
    assert hook.report.quantized_bytes < hook.report.float_bytes
    assert (tmp_path / 'calibrated.pth').is_file()


def test_calibrated_checkpoint_is_reloaded_without_data_bit_for_bit(images, tmp_path, spied):
    cfg = project(images, tmp_path)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    made, first, _ = spied(cfg)
    made.test()
    again = project(images, tmp_path / 'again', load_from=str(tmp_path / 'calibrated.pth'))
    again.calib_dataloader = None
    again.train_dataloader = again.train_cfg = again.optim_wrapper = None
    made, second, _ = spied(again)
    made.test()
    assert torch.equal(torch.stack(first.scores), torch.stack(second.scores))
    log = (tmp_path / 'again').rglob('*.log')
    assert any('calibration is skipped' in f.read_text() for f in log)


def test_another_scheme_than_the_checkpoints_is_refused(images, tmp_path, spied):
    cfg = project(images, tmp_path)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    spied(cfg)[0].test()
    other = project(images, tmp_path / 'b', load_from=str(tmp_path / 'calibrated.pth'), quant_scheme__observer='ema')
    with pytest.raises(ValueError, match=r"another scheme.*act.observer: 'minmax' != 'ema'"):
        spied(other)[0].test()


def test_compare_float_reports_both(images, tmp_path, spied):
    cfg = project(images, tmp_path, custom_hooks__0__compare_float=True)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    made, _, _ = spied(cfg)
    metrics = made.test()
    assert {'accuracy/top1', 'float/accuracy/top1'} <= set(metrics)
    model = build(cfg)
    with torch.no_grad():
        right = [s.pred_label.item() == s.gt_label.item() for b in made.test_dataloader for s in model.test_step(b)]
    assert metrics['float/accuracy/top1'] == pytest.approx(100 * sum(right) / len(right), abs=1e-3)


def weights_after_training(cfg):
    made = runner(cfg)
    made.train()
    return {k: v.clone() for k, v in made.model.state_dict().items()}


@pytest.mark.parametrize('ema', [None, False, True], ids=['plain', 'ema', 'ema with buffers'])
def test_training_is_untouched_by_the_hook(images, tmp_path, ema):
    """The oracle is the same training without the hook: equal weights, bit for bit."""
    hooks = [] if ema is None else [dict(type='EMAHook', momentum=0.1, update_buffers=ema)]
    results = []
    for name, extra in (('without', []), ('with', [dict(type='fqvit_plugin.QuantHook', num_batches=2)])):
        cfg = project(images, tmp_path / name)
        cfg.custom_hooks = [*hooks, *extra]
        weights = weights_after_training(cfg)
        saved = torch.load(tmp_path / name / 'epoch_2.pth', weights_only=False)
        results.append((weights, saved['state_dict']))
    (plain, plain_saved), (hooked, hooked_saved) = results
    assert plain.keys() == hooked.keys()
    assert all(torch.equal(plain[k], hooked[k]) for k in plain)
    assert plain_saved.keys() == hooked_saved.keys()
    assert all(torch.equal(plain_saved[k], hooked_saved[k]) for k in plain_saved)
    assert not (tmp_path / 'with' / 'calibrated.pth').exists()


def test_ema_weights_are_the_ones_that_are_quantized(images, tmp_path, spied):
    cfg = project(images, tmp_path)
    cfg.custom_hooks.insert(0, dict(type='EMAHook', momentum=0.3))
    weights_after_training(cfg)
    trained = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)  # state_dict holds the averaged weights
    test = project(images, tmp_path / 'test', load_from=str(tmp_path / 'epoch_2.pth'))
    test.custom_hooks.insert(0, dict(type='EMAHook', momentum=0.3))
    spied(test)[0].test()
    calibrated = torch.load(tmp_path / 'test' / 'calibrated.pth', weights_only=True)['state_dict']
    assert all(torch.equal(v, calibrated[k]) for k, v in trained['state_dict'].items())


def test_scales_of_a_checkpoint_are_dropped_under_training(images, tmp_path, spied):
    cfg = project(images, tmp_path)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    spied(cfg)[0].test()
    train = project(images, tmp_path / 't', load_from=str(tmp_path / 'calibrated.pth'))
    made, spy, _ = spied(train)
    made.train()
    assert len(spy.scores) == 2 * 9
    log = next((tmp_path / 't').rglob('*.log')).read_text()
    assert 'scales of the checkpoint are dropped' in log
    assert 'calibrated on' in log


def test_amp_is_off_for_the_quantized_model_and_comes_back(images, tmp_path, spied):
    cfg = project(images, tmp_path, test_cfg__fp16=True)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    made, spy, _ = spied(cfg)
    made.test()
    assert made.test_loop.fp16 is True
    assert torch.equal(torch.stack(spy.scores), torch.stack(by_hand(cfg, made)))


def test_tta_averages_the_quantized_model(images, tmp_path, spied):
    cfg = project(images, tmp_path)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    plain = copy.deepcopy(cfg.test_dataloader.dataset.pipeline)
    flips = [[dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)], [plain[-1]]]
    hand_model = copy.deepcopy(cfg.model)
    cfg.model = dict(type='AverageClsScoreTTA', module=dict(**hand_model, data_preprocessor=cfg.data_preprocessor))
    cfg.test_dataloader.dataset.pipeline = [*plain[:-1], dict(type='TestTimeAug', transforms=flips)]
    made, spy, _ = spied(cfg)
    assert 'accuracy/top1' in made.test()
    assert type(spy.model).__name__ == 'AverageClsScoreTTA'
    assert any(isinstance(m, fq.QAct) for m in spy.model.module.modules())
    saved = torch.load(tmp_path / 'calibrated.pth', weights_only=True)['state_dict']
    assert all(not k.startswith('module.') for k in saved)


def log_of(work_dir):
    return '\n'.join(f.read_text() for f in work_dir.rglob('*.log'))


def test_fewer_batches_than_asked_are_used_and_said(images, tmp_path, spied):
    cfg = project(images, tmp_path, custom_hooks__0__num_batches=50)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    spied(cfg)[0].test()
    assert '50 batches were asked for, the images give 4' in log_of(tmp_path)


def test_scored_images_in_calibration_are_warned_about(images, tmp_path, spied):
    cfg = project(images, tmp_path)
    cfg.calib_dataloader.dataset.data_root = str(images / 'val')
    float_checkpoint(cfg, tmp_path / 'float.pth')
    spied(cfg)[0].test()
    assert '9 of 9 calibration images are also scored' in log_of(tmp_path)


def test_training_images_serve_where_there_is_no_calib_dataloader(images, tmp_path, spied):
    cfg = project(images, tmp_path)
    cfg.pop('calib_dataloader')
    float_checkpoint(cfg, tmp_path / 'float.pth')
    spied(cfg)[0].test()
    meta = torch.load(tmp_path / 'calibrated.pth', weights_only=True)['meta']['fqvit']
    assert len(meta['images']) == 12
    assert 'also scored' not in log_of(tmp_path)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(quant_scheme__observer='maxmin'), "unknown observer 'maxmin'.*minmax"),
        (dict(quant_scheme__preset='loose'), "unknown preset 'loose'"),
        (dict(quant_scheme__act_bits=1), 'bits must be a whole number from 2 to 16, got 1'),
        (dict(quant_scheme__type='fqvit'), "unknown scheme 'fqvit'"),
        (dict(custom_hooks__0__num_batches=0), 'num_batches must be at least 1'),
        (
            dict(model__backbone=dict(_delete_=True, type='ResNet', depth=18)),
            'ResNet is not covered.*SwinTransformer',
        ),
        (
            dict(model__backbone=dict(_delete_=True, type='PoolFormer', arch='s12')),
            'PoolFormer is not covered.*no attention',
        ),
        (dict(calib_dataloader__dataset__data_root='nowhere'), 'calib_dataloader cannot be built'),
    ],
)
def test_what_cannot_work_is_refused(images, tmp_path, spied, changes, message):
    cfg = project(images, tmp_path)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    cfg.merge_from_dict({k.replace('__', '.'): v for k, v in changes.items()})
    with pytest.raises(ValueError, match=message):
        spied(cfg)[0].test()
    assert not (tmp_path / 'calibrated.pth').exists()


def test_no_scheme_and_no_images_are_errors(images, tmp_path, spied):
    cfg = project(images, tmp_path)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    without = copy.deepcopy(cfg)
    without.pop('quant_scheme')
    without.experiment_name += '_without'  # two runners of one name in one second are one to MMEngine
    with pytest.raises(ValueError, match='no scheme: set quant_scheme'):
        spied(without)[0].test()
    cfg.calib_dataloader = None
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = None
    with pytest.raises(ValueError, match='no calibration images'):
        spied(cfg)[0].test()


def spoil(state, how):
    if how == 'truncated':
        state.pop('backbone.layers.1.ffn.layers.1.weight')
    elif how == 'classes':
        state['head.layers.head.weight'] = torch.zeros(7, 24)
        state['head.layers.head.bias'] = torch.zeros(7)
    elif how == 'nan':
        state['backbone.layers.1.attn.qkv.weight'][0, 0] = torch.nan
    elif how == 'timm':
        renamed = {k.replace('backbone.', '').replace('layers.', 'blocks.'): v for k, v in state.items()}
        state.clear()
        state.update(renamed)


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('truncated', r'lacks 1 of the model.s parameters, backbone.layers.1.ffn.layers.1.weight'),
        ('classes', 'another number of classes'),
        ('nan', r'layers.1.attn.qkv_act.*NaN'),
        ('timm', r'lacks \d+ of the model.s parameters'),
    ],
)
def test_spoiled_checkpoints_are_refused(images, tmp_path, spied, how, message):
    cfg = project(images, tmp_path)
    state = build(cfg).state_dict()
    spoil(state, how)
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'spoiled.pth')
    cfg.load_from = str(tmp_path / 'spoiled.pth')
    with pytest.raises(ValueError, match=message):
        spied(cfg)[0].test()
    assert not (tmp_path / 'calibrated.pth').exists()


def test_ctrl_c_during_calibration_leaves_no_file(images, tmp_path, spied, monkeypatch):
    cfg = project(images, tmp_path)
    float_checkpoint(cfg, tmp_path / 'float.pth')
    made, _, _ = spied(cfg)
    calls = []

    def interrupt(self, x, weight, bias):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.nn.Conv2d._conv_forward(self, x, weight, bias)

    monkeypatch.setattr(fq.QConv2d, '_conv_forward', interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.test()
    assert [p.name for p in tmp_path.iterdir() if 'calibrated' in p.name] == []


def test_name_with_scope_needs_no_import_and_plain_name_works_after_it(images, tmp_path, spied):
    cfg = project(images, tmp_path)
    cfg.custom_hooks = [dict(type='QuantHook', scheme='fqvit_w8a8', num_batches=1)]
    cfg.custom_imports = dict(imports=['fqvit_plugin'])
    float_checkpoint(cfg, tmp_path / 'float.pth')
    made, _, hook = spied(cfg)
    made.test()
    assert hook.scheme == fq.get_scheme('fqvit_w8a8')
