"""Quantized twin of MMPretrain's SwiGLU MLP, of DINOv2 giant and EVA-02."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.utils import SwiGLUFFN, SwiGLUFFNFused
from torch import Tensor, nn

from .common import LayerFactory, QNormAct, check_norm

__all__ = ['QSwiGLU', 'check_swiglu', 'is_swiglu']


class QSwiGLU(nn.Module):
    """SwiGLU without its residual sum: ``w3(norm(silu(x1) * x2))``, the gate and the value each on a grid."""

    def __init__(self, ffn: Any, make: LayerFactory) -> None:
        super().__init__()
        self.w12, self.w3 = make.linear(ffn.w12), make.linear(ffn.w3)
        self.silu = nn.SiLU()
        self.gamma2, self.dropout_layer = ffn.gamma2, ffn.dropout_layer
        self.gate_act, self.value_act = make.act_of(self.silu), make.act()
        self.norm: nn.Module = ffn.norm
        if isinstance(ffn.norm, nn.Identity):
            self.hidden_act = make.act()
        else:
            self.hidden_act = make.norm_input(ffn.w3.in_features)
            self.norm = QNormAct.wrap(ffn.norm, self.hidden_act, make)
        self.out_act = make.branch(ffn.w3.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = self.w12(x)
        half = x.shape[-1] // 2
        gate, value = x[..., :half], x[..., half:]  # slices: autograd lets nobody write over what chunk gives
        x = self.gate_act(gate.contiguous()) * self.value_act(value)
        x = self.norm(self.hidden_act(x))
        return self.dropout_layer(self.out_act(self.gamma2(self.w3(x))))


def is_swiglu(ffn: Any) -> bool:
    """Whether :class:`QSwiGLU` is the twin of ``ffn``."""
    return type(ffn) in (SwiGLUFFN, SwiGLUFFNFused)


def check_swiglu(ffn: Any, path: str, sums: bool = True) -> None:
    """Refuse SwiGLU with a norm other than LayerNorm, or with the residual sum in the wrong place.

    Raises:
        ValueError: names the MLP.
    """
    if ffn.out_dims != ffn.embed_dims or ffn.add_identity != sums:
        raise ValueError(f'{path} is a SwiGLU with another residual sum than the block expects: not covered')
    if not isinstance(ffn.norm, nn.Identity):
        check_norm(ffn.norm, f'{path}.norm')
