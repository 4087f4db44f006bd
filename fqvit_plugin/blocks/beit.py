"""Quantized twins of MMPretrain's BEiT: a plain ViT with relative position bias, own or shared, and layer scale."""

from __future__ import annotations

from typing import Any

from mmpretrain.models import BEiTViT
from torch import Tensor, nn

from .attention import QAttention, gather_bias, joined_bias
from .common import QFFN, LayerFactory, check_ffn, linked
from .family import Family, class_path
from .sums import product
from .vit import QPlainViT, check_patches_and_norms, quantize_plain_vit_

__all__ = ['FAMILY', 'QBEiTAttention', 'QBEiTBlock', 'QBEiTViT', 'QRelativePositionBias', 'quantize_beit_']


class QRelativePositionBias(nn.Module):
    """The table of position biases that all blocks share, quantized once."""

    relative_position_index: Tensor

    def __init__(self, bias: Any, make: LayerFactory) -> None:
        super().__init__()
        self.relative_position_bias_table = bias.relative_position_bias_table
        self.register_buffer('relative_position_index', bias.relative_position_index)
        self.bias_table_act = make.act_of_shared()

    def forward(self) -> Tensor:
        """The biases (heads, N, N)."""
        return gather_bias(self.bias_table_act(self.relative_position_bias_table), self.relative_position_index)


class QBEiTAttention(QAttention):
    """BEiT's attention: biases of query and value alone, and relative position biases on the logits.

    Args:
        attn: the float module.
        make: builds Q layers.
        shared_bias: the backbone's own biases, or ``None``.
    """

    relative_position_index: Tensor

    def __init__(self, attn: Any, make: LayerFactory, shared_bias: Any) -> None:
        super().__init__(attn, make)
        self.scale = attn.scale
        self.qkv = make.linear(attn.qkv)
        if attn.bias == 'qv_bias':
            self.q_bias, self.v_bias = attn.q_bias, attn.v_bias
        else:
            self.q_bias = None  # qkv has a bias itself, or none
        self.relative_position_bias_table = attn.relative_position_bias_table
        self.register_buffer('relative_position_index', attn.relative_position_index)
        self.qkv_act = make.operand()
        if attn.relative_position_bias_table is not None:
            self.bias_table_act = make.act_of_shared()
        biased = attn.relative_position_bias_table is not None or shared_bias is not None
        self.scores_act = make.act() if biased else nn.Identity()  # q k^T, before biases are added

    def forward(self, x: Tensor, shared_bias: Tensor | None, layer_scale: Tensor | None) -> Tensor:
        """(B, N, C) to (B, N, C); ``shared_bias`` is (heads, N, N), ``layer_scale`` (C,)."""
        q, k, v = self.split(self.qkv_act(self.qkv(x, joined_bias(self))), 3)
        logits = self.scores_act(product(q * self.scale, k.transpose(-2, -1)))
        if self.relative_position_bias_table is not None:
            table = self.bias_table_act(self.relative_position_bias_table)
            logits = logits + gather_bias(table, self.relative_position_index)
        if shared_bias is not None:
            logits = logits + shared_bias
        return self.project(self.attend(logits, v), layer_scale)


class QBEiTBlock(nn.Module):
    """BEiT's encoder block; :func:`~fqvit_plugin.blocks.common.link` tells it what quantized its input."""

    def __init__(self, block: Any, make: LayerFactory, shared_bias: Any) -> None:
        super().__init__()
        channels = block.ln1.normalized_shape[0]
        self.ln1, self.ln2 = make.norm(block.ln1), make.norm(block.ln2)
        self.attn = QBEiTAttention(block.attn, make, shared_bias)
        self.ffn = QFFN(block.ffn, make)
        self.drop_path = block.drop_path
        self.gamma_1, self.gamma_2 = block.gamma_1, block.gamma_2
        self.norm1_act = make.operand()
        self.attn_residual_act = make.norm_input(channels)
        self.norm2_act = make.operand()
        self.residual_act = make.norm_input(channels)

    def forward(self, x: Tensor, shared_bias: Tensor | None) -> Tensor:
        """(B, N, C) to (B, N, C), on the grid of ``residual_act``."""
        y = self.ln1(x, linked(self), self.norm1_act)
        x = self.attn_residual_act(x + self.drop_path(self.attn(y, shared_bias, self.gamma_1)))
        y = self.ln2(x, self.attn_residual_act, self.norm2_act)
        return self.residual_act(x + self.drop_path(self.ffn(y, self.gamma_2)))


class QBEiTViT(QPlainViT, BEiTViT):
    """MMPretrain's BEiTViT after surgery; made by :func:`quantize_beit_`, not constructed."""

    def _layer_inputs(self, hw: tuple[int, int]) -> tuple[Tensor | None]:
        return (None if self.rel_pos_bias is None else self.rel_pos_bias(),)


def check_beit(backbone: Any) -> None:
    """Refuse the variants these twins do not cover.

    Raises:
        ValueError: names the part that is not covered.
    """
    check_patches_and_norms(backbone)
    for i, layer in enumerate(backbone.layers):
        check_ffn(layer.ffn, f'layers.{i}.ffn', sums=False)


def quantize_beit_(backbone: Any, make: LayerFactory) -> None:
    """Put quantized twins into a BEiT that passed :func:`check_beit`, in place."""
    if backbone.rel_pos_bias is not None:
        backbone.rel_pos_bias = QRelativePositionBias(backbone.rel_pos_bias, make)
    shared_bias = backbone.rel_pos_bias
    quantize_plain_vit_(backbone, make, lambda block: QBEiTBlock(block, make, shared_bias), QBEiTViT)


FAMILY = Family(
    (class_path(BEiTViT),),
    check_beit,
    quantize_beit_,
    covers='BEiT, BEiTv2, CAE and EVA: relative position bias of each block or shared, absolute positions, '
    'layer scale, every `out_type`',
    refuses='MLPs with the residual sum inside (`add_identity=True`)',
)
