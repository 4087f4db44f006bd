"""DeiT-Tiny's real weights and photographs through every engine. Oracle: the integer model's answers."""

from __future__ import annotations

import accuracy
import pytest
import torch

import fqvit_plugin as fq
from fqvit_plugin.export import to_onnx
from fqvit_plugin.export.proof import session
from fqvit_plugin.integer.convert import to_integer

from .shared_data import imagenet
from .test_export_onnx import openvino_logits

pytestmark = pytest.mark.slow
pytest.importorskip('onnxruntime', reason='the extra export brings it')


@pytest.fixture(scope='module')
def deit():
    """The integer model, four photographs and its logits for them."""
    folder = imagenet()
    cfg, model = accuracy.load_model('deit_t', folder / 'weights')
    photos = accuracy.read_photos(folder / 'calib', cfg.test_dataloader.dataset.pipeline)
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8_attn4', input_quant=True))
    batch = model.data_preprocessor({'inputs': photos.images[:12]}, False)['inputs']
    fq.calibrate_(model, [batch[4:8], batch[8:]])
    fq.quant(model)
    integer = to_integer(model)
    return integer, batch[:4], integer(batch[:4])


def test_the_integer_form_is_exact(deit, tmp_path):
    integer, x, logits = deit
    to_onnx(integer, tmp_path / 'm.onnx', form='integer', images=x[:1])
    (found,) = session(tmp_path / 'm.onnx', optimized=True).run(None, {'image': x.numpy()})
    assert torch.equal(torch.from_numpy(found), logits)


@pytest.mark.parametrize('target', ['onnxruntime', 'openvino'])
def test_int8_engines_answer_alike(deit, tmp_path, target):
    integer, x, logits = deit
    report = to_onnx(integer, tmp_path / 'm.onnx', target=target, images=x[:1])
    assert report.plain.different <= 5e-4 * report.plain.codes
    if target == 'openvino':
        found = torch.from_numpy(openvino_logits(tmp_path / 'm.onnx', x))
    else:
        (found,) = map(torch.from_numpy, session(tmp_path / 'm.onnx', optimized=True).run(None, {'image': x.numpy()}))
    assert int((found.argmax(1) == logits.argmax(1)).sum()) >= 3
    # a step here and there spreads; a wrong layer would leave nothing in common
    assert torch.corrcoef(torch.stack((found.flatten(), logits.flatten())))[0, 1] > 0.95
