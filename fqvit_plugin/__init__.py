"""FQ-ViT, fully quantized vision transformers, for MMEngine and MMPretrain.

Importing this package registers its layers and its hook with MMPretrain.
"""

from .hooks import QuantHook
from .layers import QAct, QConv2d, QIntLayerNorm, QIntSoftmax, QLinear
from .lifecycle import (
    calibrate_,
    close_calibrate,
    dequant,
    open_calibrate,
    open_last_calibrate,
    quant,
)
from .observers import (
    EmaObserver,
    MinMaxObserver,
    Observer,
    OmseObserver,
    PercentileObserver,
    PtfObserver,
)
from .quantizers import Log2Quantizer, Quantizer, UniformQuantizer
from .registry import OBSERVERS, QUANTIZERS
from .scheme import BitType, QuantScheme, QuantSpec, get_scheme
from .surgery import quantize_model_

__version__ = '0.1.0'

__all__ = [
    'BitType',
    'EmaObserver',
    'Log2Quantizer',
    'MinMaxObserver',
    'OBSERVERS',
    'Observer',
    'OmseObserver',
    'PercentileObserver',
    'PtfObserver',
    'QAct',
    'QConv2d',
    'QIntLayerNorm',
    'QIntSoftmax',
    'QLinear',
    'QUANTIZERS',
    'QuantHook',
    'QuantScheme',
    'QuantSpec',
    'Quantizer',
    'UniformQuantizer',
    'calibrate_',
    'close_calibrate',
    'dequant',
    'get_scheme',
    'open_calibrate',
    'open_last_calibrate',
    'quant',
    'quantize_model_',
]
