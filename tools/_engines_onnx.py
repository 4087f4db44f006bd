"""Engines of onnxruntime and OpenVINO: the float network, their own int8 of it, and ours exported for them.

Each quantizes as its documentation says, on the same calibration images. Imported for what it registers.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
from _engines import Material, Run, engine
from torch import Tensor

from fqvit_plugin.integer.kernels import cpu_support

_ORT = ['onnx', 'onnxruntime']
_OPENVINO = ['onnx', 'openvino']


# ------------------------------------------------------------------------------------------------ onnxruntime


def _session(material: Material, path: Path) -> Run:
    ort = importlib.import_module('onnxruntime')
    options = ort.SessionOptions()
    options.intra_op_num_threads = material.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # its threads wait for work by spinning, which is fast; but not on into the turn of the next engine
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})[0]


@engine('ort', 'float32', needs=_ORT)
def _ort(material: Material) -> Run:
    return _session(material, material.onnx)


@engine('ort-int8', 'int8', needs=_ORT)
def _ort_int8(material: Material) -> Run:
    quantization = importlib.import_module('onnxruntime.quantization')
    pre_process = importlib.import_module('onnxruntime.quantization.shape_inference').quant_pre_process
    prepared, quantized = material.folder / 'prepared.onnx', material.folder / 'ort-int8.onnx'
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)  # it advises to do what is done here
    try:
        pre_process(str(material.onnx), str(prepared), auto_merge=True)
        quantization.quantize_static(
            str(prepared), str(quantized), _Reader(material), quant_format=quantization.QuantFormat.QDQ,
            per_channel=True, activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )  # fmt: skip
    finally:
        root.setLevel(before)
    return _session(material, quantized)


class _Reader:
    """onnxruntime's CalibrationDataReader by its one method."""

    def __init__(self, material: Material) -> None:
        self._batches = iter(material.calibration)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None at the end."""
        images = next(self._batches, None)
        return None if images is None else {'image': images.numpy()}

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if (batch := self.get_next()) is None:
            raise StopIteration
        return batch


@engine('ort-qdq', 'int8', needs=[*_ORT, 'fqvit_plugin.export'])
def _ort_qdq(material: Material) -> Run:
    return _session(material, _exported(material, 'onnxruntime'))


def _exported(material: Material, target: str) -> Path:
    path = material.folder / f'qdq-{target}.onnx'
    to_onnx = importlib.import_module('fqvit_plugin.export').to_onnx
    # without VNNI onnxruntime's products of uint8 and int8 saturate
    weights = 'uint8' if target == 'onnxruntime' and cpu_support() == 'saturating' else 'int8'
    images = material.calibration[0][:2]
    to_onnx(material.integer, path, form='qdq', target=target, images=images, weights=weights)
    return path


# ------------------------------------------------------------------------------------------------ OpenVINO


def _compiled(material: Material, model: Any, **options: Any) -> Run:
    openvino = importlib.import_module('openvino')
    core = openvino.Core()
    options = {'INFERENCE_NUM_THREADS': material.threads, 'PERFORMANCE_HINT': 'LATENCY', **options}
    requests: dict[int, Any] = {}

    def run(images: Tensor) -> np.ndarray:
        count = len(images)
        if count not in requests:  # a shape that is known is faster than one that is open
            fixed = model.clone()
            fixed.reshape([count, *images.shape[1:]])
            requests[count] = core.compile_model(fixed, 'CPU', options).create_infer_request()
        return next(iter(requests[count].infer([images.numpy()]).values()))

    return run


def _read(path: Path) -> Any:
    return importlib.import_module('openvino').Core().read_model(str(path))


@engine('openvino', 'float32', needs=_OPENVINO)
def _openvino(material: Material) -> Run:
    # on a CPU with bfloat16 it would compute in that by default
    return _compiled(material, _read(material.onnx), INFERENCE_PRECISION_HINT='f32')


@engine('openvino-int8', 'int8', needs=[*_OPENVINO, 'nncf'])
def _openvino_int8(material: Material) -> Run:
    nncf = importlib.import_module('nncf')
    # not nncf.set_log_level: it sets every handler there, those of others too, as pytest's
    logging.getLogger('nncf').setLevel(logging.ERROR)
    images = [image[None].numpy() for batch in material.calibration for image in batch]
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        model = nncf.quantize(
            _read(material.onnx), nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images)
        )
    # in bfloat16, its default on CPUs that have it, a small Swin's logits are off by a third of the largest
    return _compiled(material, model, INFERENCE_PRECISION_HINT='f32')


@engine('openvino-qdq', 'int8', needs=[*_OPENVINO, 'fqvit_plugin.export'])
def _openvino_qdq(material: Material) -> Run:
    # its default on CPUs with bfloat16 is that, which is slower here, and rounds what lies between the integers
    return _compiled(material, _read(_exported(material, 'openvino')), INFERENCE_PRECISION_HINT='f32')
