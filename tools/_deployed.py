"""Calibrated models in the engines that deploy them, for tools/accuracy.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqvit_plugin.export import to_onnx
from fqvit_plugin.export.proof import session
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.native.model import NativeModel

__all__ = ['ENGINES', 'deploy', 'same_answers']

#: what runs a model of integers, and what runs its ONNX files: those that keep its codes, and quantize-dequantize
ENGINES = ('native', 'ort-integer', 'ort-qdq', 'openvino-integer', 'openvino-qdq')


def deploy(model: Any, images: Tensor, engine: str) -> Callable[[Tensor], Tensor]:
    """``model``, quantized, in ``engine``: images (B, 3, H, W) to logits.

    Args:
        images: some, for which an export proves itself.

    Raises:
        ValueError: the model has no integer form.
    """
    integer = to_integer(model)
    if engine == 'native':
        return NativeModel(integer)
    runtime, form = engine.split('-')
    target = dict(ort='onnxruntime', openvino='openvino')[runtime]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        to_onnx(integer, path, form=form, target=target, images=images)
        return _onnxruntime(path) if runtime == 'ort' else _openvino(path)


def _onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    running = session(path, True)
    return lambda x: torch.from_numpy(running.run(None, {'image': x.numpy()})[0])


def _openvino(path: Path) -> Callable[[Tensor], Tensor]:
    import openvino

    # float32 between integers, and for integers that it carries: some CPUs would take bfloat16 unasked
    compiled = openvino.Core().compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())


def same_answers(ours: Tensor, theirs: Tensor) -> float:
    """Per cent of (N, classes) logits with the same first answer."""
    return 100 * (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
