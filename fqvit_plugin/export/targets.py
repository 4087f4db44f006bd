"""What the engines want differently."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ['TARGETS', 'Target']


@dataclass(frozen=True)
class Target:
    """How a graph of form ``qdq`` is written for one engine.

    Args:
        symmetric: codes are int8 with zero point 0 instead of uint8 with any; what a zero point would say is added
            to the values, in the biases wherever possible.
        layout_on_codes: reshapes and transposes stand between QuantizeLinear and DequantizeLinear, so that they move
            a quarter of the bytes; else behind the pair, which stays together.
        gemm: linear layers are Gemm with an int32 bias, which onnxruntime makes one kernel with its requantization;
            else MatMul and Add with a float bias.
    """

    symmetric: bool
    layout_on_codes: bool
    gemm: bool


TARGETS = {
    'onnxruntime': Target(symmetric=False, layout_on_codes=True, gemm=True),
    'openvino': Target(symmetric=False, layout_on_codes=False, gemm=False),
    'tensorrt': Target(symmetric=True, layout_on_codes=False, gemm=False),
}
