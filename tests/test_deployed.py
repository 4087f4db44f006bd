"""tools/accuracy.py's engines. Oracle: the simulation's logits."""

from __future__ import annotations

import pytest
import torch
from _deployed import ENGINES, deploy, same_answers

from . import models


@pytest.fixture(scope='module')
def deployed():
    model = models.quantized(models.vit(), models.batches(2))
    x = models.images(4, seed=5)
    with torch.no_grad():
        return model, x, model(x)


@pytest.mark.parametrize('engine', ENGINES)
def test_engines_answer_as_the_simulation(deployed, engine):
    model, x, logits = deployed
    package = dict(ort='onnxruntime', openvino='openvino').get(engine.split('-')[0])
    if package is not None:
        pytest.importorskip(package, reason='the extra export brings it')
    found = deploy(model, x[:2], engine)(x)
    if engine.endswith('qdq'):
        assert torch.corrcoef(torch.stack((found.flatten(), logits.flatten())))[0, 1] > 0.95
    elif engine == 'openvino-integer':  # the same codes, times their scale in an order of its own
        assert torch.allclose(found, logits, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, logits)


def test_same_answers_counts_the_largest():
    ours = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert same_answers(ours, torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == 50.0
