"""Calibrate, quant, dequant: what each transition does, refuses, and leaves behind when it breaks off."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from fqvit_plugin import QAct, QLinear, get_scheme, quantize_model_
from fqvit_plugin.lifecycle import (
    calibrate_,
    close_calibrate,
    dequant,
    named_quantizers,
    open_calibrate,
    open_last_calibrate,
    phase_of,
    quant,
)
from fqvit_plugin.phase import Phase

from . import models


@pytest.fixture
def twin():
    """A small ViT after surgery, in float."""
    model = models.vit()
    quantize_model_(model, get_scheme('fqvit_w8a8_attn4'))
    return model


@pytest.fixture
def data():
    return models.batches(4)


def scales(model):
    return {f'{n}.{key}': b.clone() for n, q in named_quantizers(model) for key, b in q.named_buffers()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def equal_or_unset(one, other):
    return all(torch.equal(torch.nan_to_num(one[k], nan=-1), torch.nan_to_num(other[k], nan=-1)) for k in one)


# ---------------------------------------------------------------- the way it goes


@torch.no_grad()
def test_the_whole_way(twin, data):
    plain = models.vit()
    x = models.images(3)
    assert phase_of(twin) is Phase.FLOAT
    open_calibrate(twin)
    assert phase_of(twin) is Phase.CALIBRATE
    for batch in data[:-1]:
        twin(batch)
    open_last_calibrate(twin)
    assert phase_of(twin) is Phase.LAST_CALIBRATE
    twin(data[-1])
    close_calibrate(twin)
    assert phase_of(twin) is Phase.FLOAT
    torch.testing.assert_close(twin(x), plain(x), rtol=1e-5, atol=1e-6)
    quant(twin)
    assert phase_of(twin) is Phase.QUANT
    assert (twin(x) - plain(x)).abs().max() > 1e-3
    by_hand = scales(twin)
    other = models.vit()
    quantize_model_(other, get_scheme('fqvit_w8a8_attn4'))
    assert calibrate_(other, iter(data)) == 4, 'calibrate_ does the same, from any iterable'
    assert same(scales(other), by_hand)


@torch.no_grad()
def test_dequant_restores_float_bit_for_bit(twin, data):
    # field.md A1, A3 (ii): in the reference LayerNorm and softmax stay integer
    x = models.images(3)
    before = twin(x)
    calibrate_(twin, data)
    assert torch.equal(twin(x), before)
    quant(twin)
    quantized = twin(x)
    assert not torch.equal(quantized, before)
    dequant(twin)
    assert torch.equal(twin(x), before)
    quant(twin)
    assert torch.equal(twin(x), quantized), 'scales are kept'


@pytest.mark.parametrize('lis', [True, False])
@pytest.mark.parametrize(('preset', 'float_to_the_end'), [('strict', True), ('reference', False)])
@torch.no_grad()
def test_calibration_passes_stay_float(preset, float_to_the_end, lis, data):
    model = models.vit()
    quantize_model_(model, get_scheme('fqvit_w8a8_attn4', preset=preset, lis=lis))
    expected = [model(batch) for batch in data]
    seen = []
    calibrate_(model, data, lambda m, batch: seen.append(m(batch)))
    assert all(torch.equal(a, b) for a, b in zip(seen[:-1], expected[:-1], strict=True))
    # field.md A3 (i): the reference's last batch passes through Log-Int-Softmax already
    assert torch.equal(seen[-1], expected[-1]) == (float_to_the_end or not lis)


def test_a_second_calibration_is_a_fresh_one(twin, data):
    # field.md A2: the reference keeps old extremes, and takes scales on its first batch
    calibrate_(twin, [1000 * batch for batch in data])
    calibrate_(twin, data)
    fresh = models.vit()
    quantize_model_(fresh, get_scheme('fqvit_w8a8_attn4'))
    calibrate_(fresh, data)
    assert same(scales(twin), scales(fresh))


def test_what_an_abandoned_calibration_saw_is_forgotten(twin, data):
    open_calibrate(twin)
    twin(1000 * data[0])
    with pytest.raises(RuntimeError, match='cannot close'):
        close_calibrate(twin)
    calibrate_(twin, data)
    fresh = models.vit()
    quantize_model_(fresh, get_scheme('fqvit_w8a8_attn4'))
    calibrate_(fresh, data)
    assert same(scales(twin), scales(fresh))


def test_batches_are_streamed(twin, data):
    log = []

    def source():
        for i, batch in enumerate(data):
            log.append(f'load {i}')
            yield batch

    calibrate_(twin, source(), lambda m, batch: (log.append('run'), m(batch)))
    assert log == ['load 0', 'load 1', 'run', 'load 2', 'run', 'load 3', 'run', 'run'], 'never more than one ahead'


def test_one_batch_is_enough(twin, data):
    assert calibrate_(twin, data[:1]) == 1
    quant(twin)


def test_calibration_takes_eval_mode_and_no_gradient(twin, data):
    twin.train()
    outputs = []
    calibrate_(twin, data[:2], lambda m, batch: outputs.append(m(batch)))
    assert not twin.training
    assert not any(o.requires_grad for o in outputs)


def test_scales_are_in_the_state_dict(twin, data):
    # field.md A4: the reference's are not
    calibrate_(twin, data)
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    other = models.vit()
    quantize_model_(other, get_scheme('fqvit_w8a8_attn4'))
    other.load_state_dict(torch.load(file))  # strict
    for model in (twin, other):
        quant(model)
    assert torch.equal(other(data[0]), twin(data[0]))


def test_zero_images_leave_a_usable_model(twin):
    # tokens of a black image differ only by position; a dead input has a grid all the same
    calibrate_(twin, [torch.zeros(2, 3, 32, 32)])
    quant(twin)
    assert torch.isfinite(twin(torch.zeros(1, 3, 32, 32))).all()


# ---------------------------------------------------------------- what is refused


def test_quant_before_calibration_names_a_layer(twin):
    with pytest.raises(RuntimeError, match=r'not calibrated: backbone\.\S+.* and \d+ more\. Calibrate, or load'):
        quant(twin)
    assert phase_of(twin) is Phase.FLOAT


def test_one_forgotten_scale_is_named(twin, data):
    calibrate_(twin, data)
    twin.backbone.layers[1].ffn.hidden_act.quantizer.scale.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r'not calibrated: backbone\.layers\.1\.ffn\.hidden_act\.quantizer\. '):
        quant(twin)


def test_close_without_last_batch(twin, data):
    open_calibrate(twin)
    twin(data[0])
    with pytest.raises(RuntimeError, match=r"cannot close calibration in phase 'calibrate': .*open_last_calibrate"):
        close_calibrate(twin)
    assert phase_of(twin) is Phase.FLOAT
    with pytest.raises(RuntimeError, match='not calibrated'):
        quant(twin)


def test_close_without_open(twin):
    with pytest.raises(RuntimeError, match="cannot close calibration in phase 'float'"):
        close_calibrate(twin)


def test_close_when_the_last_batch_never_ran(twin, data):
    open_calibrate(twin)
    twin(data[0])
    open_last_calibrate(twin)
    with pytest.raises(RuntimeError, match=r'no last batch passed through backbone\.\S+.* and \d+ more'):
        close_calibrate(twin)
    assert phase_of(twin) is Phase.FLOAT


def test_open_twice(twin):
    open_calibrate(twin)
    with pytest.raises(RuntimeError, match="cannot open calibration of a model in phase 'calibrate'"):
        open_calibrate(twin)


def test_open_while_quantized(twin, data):
    calibrate_(twin, data)
    quant(twin)
    with pytest.raises(RuntimeError, match=r"in phase 'quant': call dequant"):
        open_calibrate(twin)
    with pytest.raises(RuntimeError, match=r"in phase 'quant': call dequant"):
        calibrate_(twin, data)
    assert phase_of(twin) is Phase.QUANT, 'a refused calibration changes nothing'


def test_last_without_open(twin):
    with pytest.raises(RuntimeError, match="in phase 'float': call open_calibrate first"):
        open_last_calibrate(twin)


@pytest.mark.parametrize('verb', [quant, dequant])
def test_quant_and_dequant_while_calibrating(twin, verb):
    open_calibrate(twin)
    with pytest.raises(RuntimeError, match=f'cannot {verb.__name__} a model that is calibrating'):
        verb(twin)
    open_last_calibrate(twin)
    with pytest.raises(RuntimeError, match='that is calibrating'):
        verb(twin)


def test_a_model_without_q_layers():
    for verb in (open_calibrate, open_last_calibrate, close_calibrate, quant, dequant):
        with pytest.raises(ValueError, match='no quantized layer: call quantize_model_'):
            verb(nn.Linear(2, 2))


def test_mixed_phases(twin):
    twin.backbone.layers[0].norm1_act.phase = Phase.QUANT
    with pytest.raises(RuntimeError, match='different phases: float, quant'):
        phase_of(twin)


@pytest.mark.parametrize('batches', [[], iter(())])
def test_no_batches(twin, batches):
    with pytest.raises(ValueError, match='no calibration batch: the calibration data set is empty'):
        calibrate_(twin, batches)
    assert phase_of(twin) is Phase.FLOAT


# ---------------------------------------------------------------- breaking off


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize('when', range(4))
@pytest.mark.parametrize('calibrated_before', [False, True])
def test_a_crash_leaves_what_was_in_force(twin, data, error, when, calibrated_before):
    if calibrated_before:
        calibrate_(twin, data[::-1])
    before = scales(twin)
    turns = iter(range(10))

    def forward(model, batch):
        turn = next(turns)
        if turn == when and when < 2:
            raise error
        model(7 * batch)
        if turn == when:  # after the batch went through: parameters may have been taken already
            raise error

    with pytest.raises(error):
        calibrate_(twin, data, forward)
    assert phase_of(twin) is Phase.FLOAT
    assert equal_or_unset(scales(twin), before)
    assert not any(q.is_taken for _, q in named_quantizers(twin))
    calibrate_(twin, data)  # and nothing of the broken one sticks
    fresh = models.vit()
    quantize_model_(fresh, get_scheme('fqvit_w8a8_attn4'))
    calibrate_(fresh, data)
    assert same(scales(twin), scales(fresh))


def test_a_crash_of_the_data(twin, data):
    def source():
        yield from data[:2]
        raise OSError('disk')

    calibrate_(twin, data)
    before = scales(twin)
    with pytest.raises(OSError, match='disk'):
        calibrate_(twin, source())
    assert phase_of(twin) is Phase.FLOAT
    assert same(scales(twin), before)


# ---------------------------------------------------------------- names in messages


@pytest.mark.parametrize('poison', [float('nan'), float('inf')])
def test_bad_input_names_the_first_quantizer(twin, data, poison):
    data[2][0, 0, 0, 0] = poison
    with pytest.raises(ValueError, match=r'calibration of backbone\.patch_embed\.input_act\.quantizer: .*NaN or inf'):
        calibrate_(twin, data)
    assert phase_of(twin) is Phase.FLOAT


def test_bad_activations_name_the_layer(twin, data):
    with torch.no_grad():
        twin.backbone.layers[1].ffn.layers[0][0].bias[3] = torch.nan
    with pytest.raises(ValueError, match=r'calibration of backbone\.layers\.1\.ffn\.hidden_act\.quantizer: '):
        calibrate_(twin, data)


def test_an_unused_layer_is_named_and_old_parameters_stay():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.act, self.spare = QLinear(3, 3), QAct(), QLinear(3, 3)
            self.use_spare = True

        def forward(self, x):
            return self.spare(self.act(self.used(x))) if self.use_spare else self.act(self.used(x))

    model, x = Partly(), torch.randn(5, 3)
    calibrate_(model, [x])
    before = scales(model)
    model.use_spare = False
    with pytest.raises(RuntimeError, match=r'no last batch passed through spare\.weight_quantizer$'):
        calibrate_(model, [100 * x])
    assert same(scales(model), before), 'not even those of the layers that were used'
    assert phase_of(model) is Phase.FLOAT


def test_a_copy_is_independent(twin, data):
    copied = copy.deepcopy(twin)
    calibrate_(twin, data)
    assert phase_of(copied) is Phase.FLOAT
    assert all(torch.isnan(q.scale).all() for _, q in named_quantizers(copied))
    quant(twin)
    assert phase_of(copied) is Phase.FLOAT
