"""Quantized twins of MMPretrain's EVA-02: a plain ViT with rotary position embedding and SwiGLU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from mmpretrain.models import ViTEVA02
from mmpretrain.models.utils import RotaryEmbeddingFast
from torch import Tensor, nn

from .attention import QAttention
from .common import LayerFactory, linked
from .family import Family, class_path
from .sums import product
from .swiglu import QSwiGLU, check_swiglu, is_swiglu
from .vit import QVisionTransformer, check_patches_and_norms, quantize_plain_vit_

__all__ = ['FAMILY', 'QEVA02Block', 'QRotaryAttention', 'QRotaryEmbedding', 'QViTEVA02', 'quantize_eva02_']


class QRotaryEmbedding(nn.Module):
    """Rotates pairs of channels by the patch's position; cosines and sines are constants on a grid of their own."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, rope: Any, make: LayerFactory) -> None:
        super().__init__()
        self.register_buffer('freqs_cos', rope.freqs_cos)
        self.register_buffer('freqs_sin', rope.freqs_sin)
        self.half_dim, self.theta, self.patch_resolution = rope.half_dim, rope.theta, tuple(rope.patch_resolution)
        self.cos_act, self.sin_act = make.act_of_shared(), make.act_of_shared()

    def tables(self, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, D) of every patch, computed anew for another size than the model's."""
        cos, sin = self.freqs_cos, self.freqs_sin
        if tuple(hw) != self.patch_resolution:
            size = SimpleNamespace(half_dim=self.half_dim, theta=self.theta, patch_resolution=hw)
            cos, sin = (t.to(cos) for t in RotaryEmbeddingFast.compute_position_embedding(size))
        return self.cos_act(cos), self.sin_act(sin)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, heads, N, D) to the same: ``x cos + i x sin``, with the pairs of channels as complex numbers."""
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin


class QRotaryAttention(QAttention):
    """Attention whose queries and keys are rotated by their position; the class token's stay as they are."""

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__(attn, make)
        self.scale, self.extra_tokens = attn.scale, int(attn.with_cls_token)
        self.qkv = make.linear(attn.qkv)
        self.rope = QRotaryEmbedding(attn.rope, make)
        self.qkv_act = make.operand()
        self.query_act, self.key_act = make.operand(), make.operand()  # rotated

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        q, k, v = self.split(self.qkv_act(self.qkv(x)), 3)
        cos, sin = self.rope.tables(hw)
        q, k = self.query_act(self._rotated(q, cos, sin)), self.key_act(self._rotated(k, cos, sin))
        return self.project(self.attend(product(q * self.scale, k.transpose(-2, -1)), v))

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        token, patches = x[..., : self.extra_tokens, :], x[..., self.extra_tokens :, :]
        return torch.cat((token, self.rope.rotate(patches, cos, sin)), dim=-2)


class QEVA02Block(nn.Module):
    """Pre-norm block of EVA-02; :func:`~fqvit_plugin.blocks.common.link` tells it what quantized its input."""

    def __init__(self, block: Any, make: LayerFactory) -> None:
        super().__init__()
        channels = block.norm1.normalized_shape[0]
        self.norm1, self.norm2 = make.norm(block.norm1), make.norm(block.norm2)
        self.attn = QRotaryAttention(block.attn, make)
        self.mlp = QSwiGLU(block.mlp, make)
        self.drop_path = block.drop_path
        self.norm1_act, self.norm2_act = make.operand(), make.operand()
        self.attn_residual_act = make.norm_input(channels)
        self.residual_act = make.norm_input(channels)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) to (B, N, C), on the grid of ``residual_act``."""
        y = self.norm1(x, linked(self), self.norm1_act)
        x = self.attn_residual_act(x + self.drop_path(self.attn(y, hw)))
        y = self.norm2(x, self.attn_residual_act, self.norm2_act)
        return self.residual_act(x + self.drop_path(self.mlp(y)))


class QViTEVA02(QVisionTransformer, ViTEVA02):
    """MMPretrain's ViTEVA02 after surgery; made by :func:`quantize_eva02_`, not constructed."""

    def _layer_inputs(self, hw: tuple[int, int]) -> tuple[tuple[int, int]]:
        return (hw,)


def check_eva02(backbone: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    check_patches_and_norms(backbone)
    for i, layer in enumerate(backbone.layers):
        if not is_swiglu(layer.mlp):
            raise ValueError(f'layers.{i}.mlp is a {type(layer.mlp).__name__}, not a SwiGLU: not covered')
        check_swiglu(layer.mlp, f'layers.{i}.mlp', sums=False)
        if not isinstance(layer.attn.rope, RotaryEmbeddingFast):
            raise ValueError(f'layers.{i}.attn has no rotary position embedding: not covered')


def quantize_eva02_(backbone: Any, make: LayerFactory) -> None:
    """Put quantized twins into an EVA-02 that passed :func:`check_eva02`, in place."""
    quantize_plain_vit_(backbone, make, lambda block: QEVA02Block(block, make), QViTEVA02)


FAMILY = Family(
    (class_path(ViTEVA02),),
    check_eva02,
    quantize_eva02_,
    covers='EVA-02: rotary embedding, its tables on a grid too; SwiGLU with or without its norm; every `out_type`',
)
