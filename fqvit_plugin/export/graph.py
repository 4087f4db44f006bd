"""Writes an ONNX graph node by node; every operator is a standard one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .packages import need

__all__ = ['OPSET', 'Graph']

#: Of the ONNX standard: the first with LayerNormalization.
OPSET = 17
#: Of the file format; every reader of opset 17 knows it.
_IR_VERSION = 8


class Graph:
    """Nodes and constants in order. A value is known by its name."""

    def __init__(self) -> None:
        self._onnx = need('onnx')
        self._nodes: list[Any] = []
        self._constants: dict[str, np.ndarray] = {}
        self._shared: dict[tuple[Any, ...], str] = {}
        self._made: set[str] = set()

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add an operator with one output; gives the output's name, by default one after its first input."""
        name = self._fresh(f'{inputs[0] if inputs else "constant"}:{kind}') if output is None else output
        if name in self._made:
            raise ValueError(f'{name} is computed twice')
        self._made.add(name)
        self._nodes.append(self._onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any, name: str | None = None) -> str:
        """An initializer; equal unnamed ones are stored once."""
        array = np.asarray(value, dtype=dtype)
        array = np.ascontiguousarray(array).reshape(array.shape)
        if name is None:
            key = (array.dtype.str, array.shape, array.tobytes())
            if key in self._shared:
                return self._shared[key]
            name = self._shared[key] = f'c{len(self._shared)}'
        self._constants[name] = array
        return name

    def _fresh(self, name: str) -> str:
        count, candidate = 1, name
        while candidate in self._made:
            count += 1
            candidate = f'{name}{count}'
        return candidate

    # ---------------------------------------------------------------- often used

    def cast(self, x: str, dtype: Any, output: str | None = None) -> str:
        """``x`` as another type."""
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.node('Cast', x, output=output, to=kind)

    def shape(self, x: str, shape: Sequence[int], output: str | None = None) -> str:
        """``x`` reshaped; one entry may be -1."""
        return self.node('Reshape', x, self.constant(shape, np.int64), output=output)

    def model(
        self, inputs: Mapping[str, Sequence[Any]], outputs: Mapping[str, Sequence[Any]], meta: Mapping[str, str]
    ) -> Any:
        """The checked ModelProto; float tensors by name, with the shape of each (names are free dimensions)."""
        helper, float32 = self._onnx.helper, self._onnx.TensorProto.FLOAT
        values = [
            [helper.make_tensor_value_info(name, float32, list(shape)) for name, shape in group.items()]
            for group in (inputs, outputs)
        ]
        used = {name for node in self._nodes for name in node.input}
        tensors = [self._onnx.numpy_helper.from_array(v, k) for k, v in self._constants.items() if k in used]
        graph = helper.make_graph(self._nodes, 'fqvit', *values, initializer=tensors)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid('', OPSET)],
            ir_version=_IR_VERSION,
            producer_name='fqvit_plugin',
        )
        helper.set_model_props(model, dict(meta))
        self._onnx.checker.check_model(model, full_check=True)
        return model
