"""QIntLayerNorm: LayerNorm on integer codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import Arithmetic
from ..fused import Finish, layernorm
from ..intmath import (
    LayerNormConstants,
    input_range,
    int_layernorm,
    int_layernorm_reference,
    layernorm_constants,
)
from ..phase import Phase, QuantLayer
from .act import QAct
from .common import register

__all__ = ['QIntLayerNorm']


@register
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
            return out_act.quantizer.from_steps_(steps)

        def in_range() -> Tensor:
            return input_range(source.scale, *source.step_range())

        if not (in_act.is_exact and out_act.is_exact):
            steps = int_layernorm(x, in_scale, in_range(), out_act.scale, weight, bias, self.eps)
            return out_act.quantizer.from_steps_(steps)

        def constants() -> tuple[LayerNormConstants, Finish]:
            arguments = (in_scale, in_range(), out_act.scale, weight, bias, self.eps)
            return layernorm_constants(x.shape[-1], *arguments), out_act.to_grid(x.shape[-1])

        parameters = (p for p in (self.weight, self.bias) if p is not None)
        layer, finish = out_act.constants(
            constants, x.shape[-1], *source.buffers(), *parameters, use='norm'
        )
        return layernorm(x.contiguous(), layer, finish)
