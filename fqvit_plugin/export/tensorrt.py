"""TensorRT's documented rules for graphs with Q and DQ, checked in the graph: none was ever built by TensorRT here.

Source: NVIDIA TensorRT documentation, "Working with Quantized Types" and the operator pages Quantize and Dequantize.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .packages import need

__all__ = ['check_tensorrt']

#: Operators of TensorRT's ONNX parser that the export writes for it.
# fmt: off
_OPERATORS = frozenset({
    'Add', 'And', 'Clip', 'Concat', 'Conv', 'DequantizeLinear', 'Div', 'Erf', 'Exp', 'Expand', 'Gather', 'Greater',
    'Identity', 'LayerNormalization', 'Less', 'MatMul', 'Max', 'Min', 'Mul', 'Pad', 'QuantizeLinear', 'ReduceMax',
    'ReduceMean', 'ReduceSum', 'Relu', 'Reshape', 'Round', 'Shape', 'Sigmoid', 'Slice', 'Sub', 'Tanh',
    'ThresholdedRelu', 'Transpose', 'Where',
})
# fmt: on


def check_tensorrt(model: Any) -> None:
    """Check a ModelProto.

    Raises:
        ValueError: names the first node that breaks a rule, and the rule.
    """
    onnx = need('onnx')
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in model.graph.node:
        if node.op_type not in _OPERATORS:
            raise ValueError(f'{node.name}: TensorRT is not known to read {node.op_type}')
        if node.op_type in ('QuantizeLinear', 'DequantizeLinear'):
            _check_scale(node, constants)
        if node.op_type == 'QuantizeLinear':
            _check_activation(node, constants, readers)
        if node.op_type == 'DequantizeLinear' and node.input[0] in constants:
            _check_weight(node, constants, readers, onnx)
        elif node.op_type == 'DequantizeLinear' and makers[node.input[0]].op_type != 'QuantizeLinear':
            raise ValueError(f'{node.name}: what is dequantized must come straight from QuantizeLinear')


def _check_scale(node: Any, constants: dict[str, np.ndarray]) -> None:
    scale, zero = (constants.get(name) for name in node.input[1:3])
    if scale is None or zero is None:
        raise ValueError(f'{node.name}: scale and zero point must be constants when the engine is built')
    if not np.all(scale > 0):
        raise ValueError(f'{node.name}: scales must be positive')
    if zero.dtype != np.int8 or np.any(zero):
        raise ValueError(f'{node.name}: quantization must be symmetric: int8 with zero point 0')


def _check_activation(node: Any, constants: dict[str, np.ndarray], readers: dict[str, list[Any]]) -> None:
    if constants[node.input[1]].size != 1:
        raise ValueError(f'{node.name}: an activation must have one scale for the whole tensor')
    if any(reader.op_type != 'DequantizeLinear' for reader in readers.get(node.output[0], [])):
        raise ValueError(f'{node.name}: only DequantizeLinear may read codes')


def _check_weight(node: Any, constants: dict[str, np.ndarray], readers: dict[str, list[Any]], onnx: Any) -> None:
    weight, scale = constants[node.input[0]], constants[node.input[1]]
    if weight.min() < -127:
        raise ValueError(f'{node.name}: weights must lie within -127 and 127')
    axes = [onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == 'axis']
    for reader in readers[node.output[0]]:
        expected = {'Conv': 0, 'MatMul': weight.ndim - 1}.get(reader.op_type)
        if expected is None or (scale.size > 1 and axes != [expected]):
            raise ValueError(f'{node.name}: weights must feed Conv or MatMul, with scales along the output channels')
