"""QLinear and QConv2d: layers with a quantized weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import is_compiling
from ..codebook import copies_of
from ..exact import Sums
from ..functional import align
from ..fused import whole_steps
from ..phase import Phase, QuantLayer, full_precision
from ..quantizers import UniformQuantizer, build_quantizer
from ..scheme import QuantSpec
from ..weight_quantizer import WeightQuantizer
from .act import QAct
from .common import WEIGHT_SPEC, parse_spec, register, versions

__all__ = ['QConv2d', 'QLinear']


class _QWeightLayer(QuantLayer):
    """A layer whose weight is quantized (abstract); the bias stays float, as in the paper.

    Under quant the weight is quantized once and kept as integers, a quarter of its size at 8 bits.
    """

    weight: Any  # declared by the float layer, as is the next
    bias: Any
    weight_quantizer: Any
    weight_steps: Tensor | None  #: the frozen weight in whole steps of its scale
    tuned: Any = None  #: what stands in for weight and bias while rounding is tuned

    def _init_weight_quantizer(self, spec: QuantSpec | Mapping[str, Any]) -> None:
        parsed = parse_spec(spec)
        channels = None if parsed.axis is None else self.weight.shape[parsed.axis]
        plain = parsed.quantizer == 'uniform'
        self.weight_quantizer = WeightQuantizer(parsed, channels) if plain else build_quantizer(parsed, channels)
        self.weight_quantizer.to(self.weight.device)
        self.register_buffer('weight_steps', None, persistent=False)
        self._frozen_at: tuple[int, ...] = ()
        self._beside: tuple[Any, ...] = ()  #: scale and bias of the frozen weight
        self._pieces = 1  #: parts of a row of the weight whose exact products float32 holds

    def freeze(self) -> None:
        """Quantize the weight now, for all forward passes under quant until weight or scale change."""
        if not isinstance(self.weight_quantizer, UniformQuantizer):
            return  # a quantizer of somebody else's, which may have no integers
        steps, *rest = self.integers()
        self._beside = tuple(rest)  # in a tuple: a bias is a parameter, and this no second one
        largest = steps.abs().max()
        narrowest = next(t for t in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(t).max)
        self.weight_steps = steps.to(narrowest)
        self._pieces = _pieces(steps.flatten(1))
        self._frozen_at = self._state_of_weight()

    def thaw(self) -> None:
        """Forget the frozen weight."""
        self.weight_steps, self._frozen_at = None, ()

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weight in whole steps, (O, …), their scale, (O,) or (), and the bias, (O,) or None.

        Codes that were chosen are taken; copies of channels (:class:`~fqvit_plugin.codebook.HiddenQuantizer`) are
        rows or columns behind the layer's own.
        """
        quantizer = self.weight_quantizer
        rows, columns = self.copies
        scale = quantizer.scale
        if rows is not None and scale.ndim:
            scale = torch.cat((scale, scale[rows[0]]))
        if getattr(quantizer, 'is_chosen', False):
            # another quantizer without copies may stand in for the one beside, to see what it does
            codes = quantizer.codes if rows is not None else quantizer.codes[: len(self.weight)]
            codes = codes if columns is not None else codes[:, : self.weight.shape[1]]
            return codes, scale, quantizer.bias[: len(codes)]
        _, bias = self.expanded()
        with torch.no_grad():
            steps = quantizer.steps(self.weight)
            if rows is not None:
                steps = torch.cat((steps, steps[rows[0]]))
            if columns is not None:
                steps = torch.cat((steps, steps[:, columns[0]]), 1)
        return steps, scale, bias

    def expanded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in float, with copies of channels."""
        rows, columns = self.copies
        weight, bias = self.weight, self.bias
        with torch.no_grad():
            if rows is not None:
                weight = torch.cat((weight, weight[rows[0]]))
                bias = weight.new_zeros(len(self.weight)) if bias is None else bias
                bias = torch.cat((bias, bias[rows[0]] - rows[1]))
            if columns is not None:
                weight = torch.cat((weight, weight[:, columns[0]]), 1)
        return weight, bias

    def multiples(self) -> Tensor:
        """(O, I), or (O, 1) without groups, int8: how many steps of a row's scale a code stands for, with copies."""
        rows, groups = self.copies[0], self.column_groups()
        if groups is None:
            multiples = torch.ones(len(self.weight), 1, dtype=torch.int8, device=self.weight.device)
        else:
            multiples = self.weight_quantizer.factors[:, groups.to(self.weight.device)]
        return multiples if rows is None else torch.cat((multiples, multiples[rows[0]]))

    def column_groups(self) -> Tensor | None:
        """(I,) int64 on the CPU, the group of each column, with copies; None where columns share no factors."""
        if not getattr(self.weight_quantizer, 'has_groups', False):
            return None
        groups = torch.arange(self.weight[0].numel()) // self.weight_quantizer.spec.group_size
        columns = self.copies[1]
        return groups if columns is None else torch.cat((groups, groups[columns[0].cpu()]))

    @property
    def copies(self) -> tuple[Any, Any]:
        """Copies of output and of input channels with their shifts, (n,) each; None where there is none."""
        return copies_of(self._act('_output_act')), copies_of(self._act('_input_act'))

    def _act(self, name: str) -> Any:
        return getattr(self, name, (None,))[0]

    def _state_of_weight(self) -> tuple[int, ...]:
        copies = [t for pair in self.copies if pair is not None for t in pair]
        bias = [] if self.bias is None else [self.bias]
        return versions(self.weight, *bias, *self.weight_quantizer.buffers(), *copies)

    def _refreeze(self) -> None:
        # Compiled code cannot ask for versions; whoever changes weights of a compiled model calls quant again.
        if not is_compiling() and self._frozen_at != self._state_of_weight():
            self.freeze()

    def _exact_input(self) -> QAct | None:
        """What quantized the input, where the layer was told and its accumulators can be whole numbers."""
        act: QAct | None = self._act('_input_act')
        exact = self.phase is Phase.QUANT and act is not None and act.is_exact and act.scale.ndim == 0
        quantizer = self.weight_quantizer
        if not exact or not isinstance(quantizer, UniformQuantizer) or quantizer.spec.bit_type.bits > 8:
            return None
        return act if quantizer.spec.arithmetic == 'strict' and quantizer.spec.bit_type.signed else None

    def _sums(self, x: Tensor, act: QAct, product: Callable[[Tensor, Tensor], Tensor], bias: Tensor | None) -> Sums:
        """The accumulators of ``product(steps of x, steps of the weight)``."""
        self._refreeze()
        assert self.weight_steps is not None
        steps, scale, own = self._fitting(x, self.weight_steps, *self._beside)
        with full_precision(x):
            sums = product(whole_steps(x, act.scale), steps.float())
        return Sums(sums, (scale, act.scale), bias=own if bias is None else bias)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a product in float32."""
        self._refreeze()
        if self.weight_steps is None:
            return self.weight_quantizer(self.weight), self.bias
        steps, scale, bias = self._fitting(x, self.weight_steps, *self._beside)
        scale = align(scale, steps, self.weight_quantizer.spec.axis)
        return steps.to(scale.dtype).mul_(scale), bias

    def _fitting(self, x: Tensor, weight: Tensor, *of_rows: Any) -> tuple[Any, ...]:
        """Weight, and what goes with its rows, without copies that the layer before or behind does not have.

        Those are in float then: one tensor at a time is quantized, to see what it does.
        """
        rows, columns = self.copies
        if columns is not None and weight.shape[1] > x.shape[-1]:
            weight = weight[:, : x.shape[-1]]
        if rows is not None and self._act('_output_act').phase not in (Phase.QUANT, Phase.TUNE):
            own = len(self.weight)
            weight, of_rows = weight[:own], tuple(t[:own] if t is not None and t.ndim else t for t in of_rows)
        return (weight, *of_rows)

    def _precision(self, x: Tensor) -> AbstractContextManager:
        return full_precision(x) if self.phase is Phase.QUANT else nullcontext()

    def in_phase(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as this phase wants them for ``x``.

        The one and only observation happens in the last calibration pass.
        """
        if self.phase is Phase.QUANT:
            return self._quantized(x)
        if self.phase is Phase.TUNE:
            return self.tuned() if self.tuned is not None else self._quantized(x)
        if self.phase is Phase.LAST_CALIBRATE and not self.weight_quantizer.is_taken:
            self.weight_quantizer.observe(self.weight)
            self.weight_quantizer.take_qparams(self.weight)
        if self.copies == (None, None):
            return self.weight, self.bias
        weight, bias = self._fitting(x, *self.expanded())
        return weight, bias


@register
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

    def forward(self, x: Tensor) -> Any:
        """(B, C_in, H, W) to (B, C_out, H', W').

        Under strict quant a layer that was linked to the quantizer of its input gives accumulators
        (:class:`~fqvit_plugin.exact.Sums`) of (B, H', W', C_out), for the quantizer that follows.
        """
        if (act := self._exact_input()) is not None:
            return self._sums(x, act, self._products, None).view(lambda sums: sums.movedim(1, -1))
        with self._precision(x):
            return self._conv_forward(x, *self.in_phase(x))

    def _products(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._pieces > 1:
            return self._conv_forward(x.double(), weight.double(), None)
        return self._conv_forward(x, weight, None)


@register
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

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Any:
        """(…, C_in) to (…, C_out); ``bias`` stands in for the layer's own, where it is a parameter of the block.

        Under strict quant a layer that was linked to the quantizer of its input gives accumulators
        (:class:`~fqvit_plugin.exact.Sums`), for the quantizer that follows.
        """
        if (act := self._exact_input()) is not None:
            return self._sums(x, act, self._products, bias)
        with self._precision(x):
            weight, own = self.in_phase(x)
            return F.linear(x, weight, own if bias is None else bias)

    def _products(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._pieces == 1:
            return F.linear(x, weight)
        size = -(-weight.shape[1] // self._pieces)
        parts = zip(x.split(size, -1), weight.split(size, -1), strict=True)
        return torch.stack([F.linear(*part).double() for part in parts]).sum(0)


def _pieces(weight: Tensor) -> int:
    """Into how many parts to cut rows of whole steps (O, I), so that no sum of a part's products reaches 2**24.

    The other operand has 8 bits and a zero point: up to 255 steps.
    """
    limit, pieces = 2.0**24 / 255, 1
    while pieces < weight.shape[1]:
        size = -(-weight.shape[1] // pieces)
        if all(part.abs().sum(1).max() < limit for part in weight.split(size, 1)):
            break
        pieces += 1
    return pieces


def _adopt(twin: Any, original: nn.Module) -> Any:
    """Give ``twin`` the parameters and the mode of ``original``; its quantizer moves to their device."""
    twin.weight, twin.bias = original.weight, original.bias
    twin._init_weight_quantizer(twin.weight_quantizer.spec)
    return twin.train(original.training)
