"""The Q layers: QConv2d, QLinear, QAct, QIntLayerNorm, QIntSoftmax.

In phase ``FLOAT`` each computes exactly what the float layer it stands for computes. ``from_float`` shares the
float layer's parameters, it never copies them.
"""

from .act import QAct, QActOf
from .norm import QIntLayerNorm
from .softmax import QIntSoftmax
from .weights import QConv2d, QLinear

__all__ = ['QAct', 'QActOf', 'QConv2d', 'QIntLayerNorm', 'QIntSoftmax', 'QLinear']
