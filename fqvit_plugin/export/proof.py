"""Whether an exported graph computes the program's codes: run in onnxruntime, next to the integer model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..integer.program import IntegerModel
from .packages import need

__all__ = ['Agreement', 'codes_of', 'compare_codes', 'session']


@dataclass(frozen=True)
class Agreement:
    """How an engine's codes agree with the integer model's.

    Args:
        tensors: compared.
        codes: in all of them.
        different: codes that are not the same.
        largest: the largest difference, in codes.
        where: the tensor that has it.
    """

    tensors: int
    codes: int
    different: int
    largest: int
    where: str

    @property
    def exact(self) -> bool:
        """Whether every code is the same."""
        return self.different == 0

    def __str__(self) -> str:
        if self.exact:
            return f'all {self.codes} codes of {self.tensors} tensors equal'
        share = self.different / self.codes
        return (
            f'{self.different} of {self.codes} codes in {self.tensors} tensors differ ({share:.1e}), by at most '
            f'{self.largest} ({self.where})'
        )


def session(model: Any, optimized: bool) -> Any:
    """An onnxruntime session on the CPU, of a ModelProto or of a file.

    Raises:
        ValueError: onnxruntime is not installed.
    """
    ort = need('onnxruntime')
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = str(model) if isinstance(model, (str, os.PathLike)) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=['CPUExecutionProvider'])


def codes_of(integer: IntegerModel, images: Tensor) -> dict[str, np.ndarray]:
    """Stored codes of every tensor that has some, by name."""
    images = images.to(integer.output_scale.device)
    with torch.no_grad():
        steps = integer.steps(images)
        return {op.output: x.numpy(force=True) for op, x in steps if op.output in integer.program.grids}


def compare_codes(
    model: Any, expected: dict[str, np.ndarray], images: Tensor, layerwise: bool, optimized: bool
) -> Agreement:
    """Codes of every tensor that has codes in ``model``, against ``expected``.

    Args:
        model: a ModelProto whose values bear the program's names.
        expected: of :func:`codes_of`.
        images: the same.
        layerwise: every layer reads the expected codes, so that differences are the layer's own; else the images go
            through the whole graph.
        optimized: with onnxruntime's graph optimization.
    """
    opened, kinds = _open(model, {n: v.ndim for n, v in expected.items()}, layerwise)
    feed = {'image': images.numpy(force=True).astype(np.float32)}
    if layerwise:
        feed.update({n: _held(expected[n], kinds[n]) for n in kinds})
    running = session(opened, optimized)
    wanted = {v.name for v in running.get_inputs()}
    names = [v.name for v in running.get_outputs() if v.name != 'logits']
    results = running.run(names, {k: v for k, v in feed.items() if k in wanted})
    count = different = largest = 0
    where = ''
    for made, result in zip(names, results, strict=True):
        name = made.removesuffix(_MADE)
        gap = np.abs(result.astype(np.int64) - _held(expected[name], kinds[name]).astype(np.int64))
        count, different = count + gap.size, different + int(np.count_nonzero(gap))
        if gap.max() > largest:
            largest, where = int(gap.max()), name
    return Agreement(len(names), count, different, largest, where)


#: Behind the name of a tensor that is computed beside the one that is fed.
_MADE = '@made'


def _held(stored: np.ndarray, kind: Any) -> np.ndarray:
    """Stored codes as a graph holds them in ``kind``."""
    offset = {np.dtype(np.int8): 0, np.dtype(np.uint8): 2**7}.get(np.dtype(kind), 2**15)
    return (stored.astype(np.int64) + offset).astype(kind)


def _open(model: Any, ranks: dict[str, int], cut: bool) -> tuple[Any, dict[str, Any]]:
    """A copy of ``model`` that puts out the tensors named in ``ranks``, where it has them, and their types.

    With ``cut`` the tensors also become inputs, which are what later layers read.
    """
    onnx = need('onnx')
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    types.update({v.name: v.type.tensor_type.elem_type for v in model.graph.output})
    kinds: dict[str, Any] = {}
    made = {node.output[0]: node for node in opened.graph.node}
    for name, rank in ranks.items():
        if name not in made or types[name] == onnx.TensorProto.FLOAT:
            continue
        kinds[name] = onnx.helper.tensor_dtype_to_np_dtype(types[name])
        result = name + _MADE if cut else name
        made[name].output[0] = result
        opened.graph.output.append(onnx.helper.make_tensor_value_info(result, types[name], [None] * rank))
        if cut:
            opened.graph.input.append(onnx.helper.make_tensor_value_info(name, types[name], [None] * rank))
    return opened, kinds
