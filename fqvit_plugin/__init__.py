"""FQ-ViT, fully quantized vision transformers, for MMEngine and MMPretrain.

Importing this package registers its layers and its hook with MMPretrain, and lets MMEngine load its own training
checkpoints under torch 2.6 and later.
"""

from .apis import load_quantized_
from .checkpoint_io import install_mmengine_loader
from .convert import convert_state_dict
from .hooks import QuantHook
from .layers import QAct, QConv2d, QIntLayerNorm, QIntSoftmax, QLinear
from .lifecycle import (
    close_calibrate,
    dequant,
    open_calibrate,
    open_last_calibrate,
    quant,
)
from .observers import EmaObserver, MinMaxObserver, Observer, PercentileObserver
from .presets import get_scheme
from .quantizers import Log2Quantizer, Quantizer, UniformQuantizer
from .recipe import calibrate_
from .registry import OBSERVERS, QUANTIZERS, STEPS
from .scheme import BitType, QuantScheme, QuantSpec
from .searching import MseObserver, OmseObserver, PtfObserver, SplitObserver
from .surgery import quantize_model_, register_family

__version__ = '0.1.0'

__all__ = [
    'OBSERVERS',
    'QUANTIZERS',
    'STEPS',
    'BitType',
    'EmaObserver',
    'Log2Quantizer',
    'MinMaxObserver',
    'MseObserver',
    'Observer',
    'OmseObserver',
    'PercentileObserver',
    'PtfObserver',
    'QAct',
    'QConv2d',
    'QIntLayerNorm',
    'QIntSoftmax',
    'QLinear',
    'QuantHook',
    'QuantScheme',
    'QuantSpec',
    'Quantizer',
    'SplitObserver',
    'UniformQuantizer',
    'calibrate_',
    'close_calibrate',
    'convert_state_dict',
    'dequant',
    'get_scheme',
    'load_quantized_',
    'open_calibrate',
    'open_last_calibrate',
    'quant',
    'quantize_model_',
    'register_family',
]

install_mmengine_loader()
