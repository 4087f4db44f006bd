"""The Q layers: QConv2d, QLinear, QAct, QIntLayerNorm, QIntSoftmax.

In phase ``FLOAT`` each computes exactly what the float layer it stands for computes. ``from_float`` shares the
float layer's parameters, it never copies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from ._torch import is_compiling
from .functional import Arithmetic, align
from .intmath import (
    int_layernorm,
    int_layernorm_reference,
    log_int_softmax_,
    log_int_softmax_reference_,
)
from .phase import Phase, QuantLayer, full_precision
from .quantizers import UniformQuantizer, build_quantizer
from .registry import LAYERS
from .scheme import BitType, QuantSpec
from .tables import input_grid

__all__ = ['QAct', 'QActOf', 'QConv2d', 'QIntLayerNorm', 'QIntSoftmax', 'QLinear']

WEIGHT_SPEC = QuantSpec(BitType(8, signed=True), axis=0)
ACT_SPEC = QuantSpec(BitType(8, signed=False))


def _register(cls: type) -> type:
    """Found as ``type='fqvit_plugin.QLinear'`` anywhere, and as ``type='QLinear'`` in MMPretrain."""
    LAYERS.register_module(module=cls)
    MMPRETRAIN_MODELS.register_module(module=cls, force=True)
    return cls


def _parse_spec(spec: QuantSpec | Mapping[str, Any]) -> QuantSpec:
    """A QuantSpec, also from a config's ``dict(bit_type='int8', observer='minmax', …)``."""
    if isinstance(spec, QuantSpec):
        return spec
    values = dict(spec)
    values['bit_type'] = BitType.parse(values.get('bit_type', 'uint8'))
    try:
        return QuantSpec(**values)
    except TypeError as error:
        raise ValueError(f'not a tensor recipe: {error}') from None


def versions(*tensors: Tensor) -> tuple[int, ...]:
    """Numbers that change when a tensor is replaced or written to."""
    return tuple(n for t in tensors for n in (t.data_ptr(), 0 if t.is_inference() else t._version))


class _QWeightLayer(QuantLayer):
    """A layer whose weight is quantized (abstract); the bias stays float, as in the paper.

    Under quant the weight is quantized once and kept as integers, a quarter of its size at 8 bits.
    """

    weight: Any  # declared by the float layer
    weight_quantizer: Any
    weight_steps: Tensor | None  #: the frozen weight in whole steps of its scale

    def _init_weight_quantizer(self, spec: QuantSpec | Mapping[str, Any]) -> None:
        parsed = _parse_spec(spec)
        channels = None if parsed.axis is None else self.weight.shape[parsed.axis]
        self.weight_quantizer = build_quantizer(parsed, channels)
        self.weight_quantizer.to(self.weight.device)
        self.register_buffer('weight_steps', None, persistent=False)
        self._frozen_at: tuple[int, ...] = ()

    def freeze(self) -> None:
        """Quantize the weight now, for all forward passes under quant until weight or scale change."""
        if not isinstance(self.weight_quantizer, UniformQuantizer):
            return  # a quantizer of somebody else's, which may have no integers
        with torch.no_grad():
            steps = self.weight_quantizer.steps(self.weight)
        largest = steps.abs().max()
        narrowest = next(t for t in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(t).max)
        self.weight_steps = steps.to(narrowest)
        self._frozen_at = self._state_of_weight()

    def thaw(self) -> None:
        """Forget the frozen weight."""
        self.weight_steps, self._frozen_at = None, ()

    def _state_of_weight(self) -> tuple[int, ...]:
        return versions(self.weight, self.weight_quantizer.scale, self.weight_quantizer.zero_point)

    def _quantized_weight(self) -> Tensor:
        # Compiled code cannot ask for versions; whoever changes weights of a compiled model calls quant again.
        if not is_compiling() and self._frozen_at != self._state_of_weight():
            self.freeze()
        if self.weight_steps is None:
            return self.weight_quantizer(self.weight)
        scale = align(self.weight_quantizer.scale, self.weight, self.weight_quantizer.spec.axis)
        return self.weight_steps.to(scale.dtype).mul_(scale)

    def _precision(self, x: Tensor) -> AbstractContextManager:
        return full_precision(x) if self.phase is Phase.QUANT else nullcontext()

    def weight_in_phase(self) -> Tensor:
        """The weight as this phase wants it; the one and only observation happens in the last calibration pass."""
        if self.phase is Phase.QUANT:
            return self._quantized_weight()
        if self.phase is Phase.LAST_CALIBRATE and not self.weight_quantizer.is_taken:
            self.weight_quantizer.observe(self.weight)
            self.weight_quantizer.take_qparams(self.weight)
        return self.weight


@_register
class QConv2d(_QWeightLayer, nn.Conv2d):
    """2-D convolution with a quantized weight; arguments as ``nn.Conv2d``'s, and ``spec`` for the weight."""

    def __init__(self, *args: Any, spec: QuantSpec | Mapping[str, Any] = WEIGHT_SPEC, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._init_weight_quantizer(spec)

    @classmethod
    def from_float(cls, conv: nn.Conv2d, spec: QuantSpec) -> QConv2d:
        """The quantized twin of ``conv``, on the same parameters."""
        twin = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, device='meta', spec=spec,
        )  # fmt: skip
        return _adopt(twin, conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        with self._precision(x):
            return self._conv_forward(x, self.weight_in_phase(), self.bias)


@_register
class QLinear(_QWeightLayer, nn.Linear):
    """Linear layer with a quantized weight; arguments as ``nn.Linear``'s, and ``spec`` for the weight."""

    def __init__(self, *args: Any, spec: QuantSpec | Mapping[str, Any] = WEIGHT_SPEC, **kwargs: Any) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        self._init_weight_quantizer(spec)

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: QuantSpec) -> QLinear:
        """The quantized twin of ``linear``, on the same parameters."""
        bias = linear.bias is not None
        twin = cls(linear.in_features, linear.out_features, bias, device='meta', spec=spec)
        return _adopt(twin, linear)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(…, C_in) to (…, C_out); ``bias`` stands in for the layer's own, where it is a parameter of the block."""
        with self._precision(x):
            return F.linear(x, self.weight_in_phase(), self.bias if bias is None else bias)


def _adopt(twin: Any, original: nn.Module) -> Any:
    """Give ``twin`` the parameters and the mode of ``original``; its quantizer moves to their device."""
    twin.weight, twin.bias = original.weight, original.bias
    twin._init_weight_quantizer(twin.weight_quantizer.spec)
    return twin.train(original.training)


@_register
class QAct(QuantLayer):
    """A tensor's quantizer as a layer: the identity in float, the nearest grid point under quant.

    Args:
        spec: recipe of the tensor.
        channels: length of ``spec.axis``, when it keeps its own scales.
        inplace: write over the input under quant; for tensors that nobody else reads.
    """

    def __init__(
        self,
        spec: QuantSpec | Mapping[str, Any] = ACT_SPEC,
        channels: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.inplace = inplace
        self.quantizer: Any = build_quantizer(_parse_spec(spec), channels)

    @property
    def scale(self) -> Tensor:
        """The scale in force."""
        return self.quantizer.scale

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out as in."""
        return self.quantized(x, self.quantizer, self.inplace)


class QActOf(QAct):
    """A function of one value and the quantizer of its result, as one layer.

    Under strict quant the function reads a 16-bit grid, because integer arithmetic has it as a table; see
    :mod:`fqvit_plugin.tables`.

    Args:
        function: GELU, for instance; it belongs to somebody else.
    """

    def __init__(self, function: nn.Module, spec: QuantSpec | Mapping[str, Any] = ACT_SPEC) -> None:
        super().__init__(spec, inplace=True)
        self._function = (function,)  # in a tuple: no submodule, it keeps its place in the float model
        self.input_grid: tuple[float, int] | None = None
        self._frozen_at: tuple[int, ...] = ()

    @property
    def function(self) -> nn.Module:
        """What is quantized by this layer."""
        return self._function[0]

    def freeze(self) -> None:
        """Find the grid that the function reads."""
        self.thaw()
        spec = self.quantizer.spec
        if spec.arithmetic == 'strict' and isinstance(self.quantizer, UniformQuantizer) and spec.axis is None:
            with suppress(ValueError):  # a function that has no table; the integer model refuses it
                self.input_grid = input_grid(self.function, self.quantizer)
        self._frozen_at = versions(*self.quantizer.buffers())

    def thaw(self) -> None:
        """Forget it."""
        self.input_grid, self._frozen_at = None, ()

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out as in; overwrites ``x`` under quant."""
        if (
            self.phase is Phase.QUANT
            and not is_compiling()
            and self._frozen_at != versions(*self.quantizer.buffers())
        ):
            self.freeze()
        if self.phase is Phase.QUANT and self.input_grid is not None:
            step, _ = self.input_grid  # not saturated: beyond the grid the result's code is constant
            x = x.float().div_(step).round_().mul_(step)
        return self.quantized(self.function(x), self.quantizer, self.inplace)


@_register
class QIntLayerNorm(QuantLayer, nn.LayerNorm):
    """LayerNorm over the last axis that runs on integer codes under quant.

    Args:
        normalized_shape: number of channels C.
        eps: as LayerNorm's.
        elementwise_affine: as LayerNorm's.
        integer: integer arithmetic under quant; ``False`` keeps it float.
        arithmetic: ``'strict'`` or ``'reference'``.

    Source: FQ-ViT, section 4.1 (Power-of-Two Factor).
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        integer: bool = True,
        arithmetic: Arithmetic = 'strict',
    ) -> None:
        if not isinstance(normalized_shape, int):
            raise ValueError(f'normalized_shape must be a whole number of channels, got {normalized_shape!r}')
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine)
        self.integer = integer
        self.arithmetic = arithmetic

    @classmethod
    def from_float(cls, norm: nn.LayerNorm, integer: bool, arithmetic: Arithmetic) -> QIntLayerNorm:
        """The quantized twin of ``norm``, on the same parameters."""
        (channels,) = norm.normalized_shape
        twin = cls(channels, norm.eps, False, integer, arithmetic)
        twin.elementwise_affine = norm.elementwise_affine
        twin.weight, twin.bias = norm.weight, norm.bias
        return twin.train(norm.training)

    def forward(
        self,
        x: Tensor,
        in_act: QAct | None = None,
        out_act: QAct | None = None,
        repeat: int = 1,
        tile: int = 1,
    ) -> Tensor:
        """Normalize the last axis, and quantize the result.

        Args:
            x: (…, C); under quant on the grid of ``in_act``.
            in_act: the layer that quantized ``x``.
            out_act: the quantizer of the result.
            repeat: each channel of ``in_act`` stands ``repeat`` times in a row in ``x`` (merging in MMPretrain: 4).
            tile: all channels of ``in_act`` stand ``tile`` times one after the other (merging in timm: 4).

        Raises:
            ValueError: integer arithmetic without ``in_act`` and ``out_act``.
        """
        if self.phase is not Phase.QUANT or not self.integer:
            y = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return y if out_act is None else out_act(y)
        if in_act is None or out_act is None:
            raise ValueError('the integer LayerNorm needs in_act and out_act: the grids it reads and writes')
        source = in_act.quantizer
        in_scale = source.scale if source.scale.ndim == 0 else source.scale.repeat_interleave(repeat).repeat(tile)
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        if self.arithmetic == 'reference':
            steps = int_layernorm_reference(x, in_scale, out_act.scale, weight, bias)
        else:
            span = source.spec.bit_type.qmax - source.spec.bit_type.qmin
            in_range = span * (1 if in_scale.ndim == 0 else 8)  # 8: PTF's largest factor
            steps = int_layernorm(x, in_scale, in_range, out_act.scale, weight, bias, self.eps)
        return out_act.quantizer.from_steps_(steps)


@_register
class QIntSoftmax(QuantLayer):
    """Softmax over the last axis with quantized probabilities.

    Args:
        spec: recipe of the probabilities; its quantizer (``'uniform'`` or ``'log2'``) serves the float softmax.
        log_int: Log-Int-Softmax, integer from the logits' codes on, instead of a float softmax.

    Source: FQ-ViT, section 4.2.
    """

    def __init__(self, spec: QuantSpec | Mapping[str, Any] = ACT_SPEC, log_int: bool = False) -> None:
        super().__init__()
        self.log_int = log_int
        self.spec = _parse_spec(spec)
        self.quantizer: Any = None if log_int else build_quantizer(self.spec)

    def forward(self, logits: Tensor, in_act: QAct | None = None, mask: Tensor | None = None) -> Tensor:
        """Probabilities of the last axis.

        Args:
            logits: (…, N).
            in_act: quantizes the logits first.
            mask: additive, broadcasts to ``logits``; negative where attention is forbidden.

        Raises:
            ValueError: Log-Int-Softmax without ``in_act``.
        """
        if self.log_int and self._integer_now():
            if in_act is None:
                raise ValueError('Log-Int-Softmax needs in_act: the grid of the logits')
            return self._log_int(logits, in_act, mask)
        if in_act is not None:
            logits = in_act(logits)
        x = logits if mask is None else logits + mask
        # Saves a tensor as large as the logits during calibration; autograd and compilers need the copy.
        own = mask is not None or (in_act is not None and in_act.inplace)
        copies = not own or torch.is_grad_enabled() or is_compiling()
        probabilities = torch.softmax(x, dim=-1) if copies else torch.softmax(x, dim=-1, out=x)
        return probabilities if self.quantizer is None else self.quantized(probabilities, self.quantizer)

    def _integer_now(self) -> bool:
        # The published scales were taken on a last batch that had already passed through Log-Int-Softmax.
        reference_quirk = self.spec.arithmetic == 'reference' and self.phase is Phase.LAST_CALIBRATE
        return self.phase is Phase.QUANT or reference_quirk

    def _log_int(self, logits: Tensor, in_act: QAct, mask: Tensor | None) -> Tensor:
        bits = self.spec.bit_type.bits
        if self.spec.arithmetic == 'strict':
            return log_int_softmax_(in_act.quantizer.steps(logits, in_act.inplace), in_act.scale, bits, mask)
        x = in_act(logits)
        if mask is not None:
            x = x + mask
        elif x is logits and not in_act.inplace:
            x = x.clone()
        return log_int_softmax_reference_(x, in_act.quantizer.latest_scale, bits)
