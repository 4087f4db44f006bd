"""What the twins of timm's ViT and Swin share: patch embedding, MLP, and the refusal of their other variants.

timm calls its parts one by one, so most of a twin is timm's own class around Q layers: ``module.__class__`` becomes a
subclass, and names, parameters and the other methods stay.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from ..exact import Exact
from ..layers import QAct, QConv2d
from .common import LayerFactory, QLinearAct, QNormAct, check_norm, link, linked
from .sums import layer_scaled, summed

__all__ = [
    'QConv2dAct',
    'QTimmMlp',
    'QTimmPatchEmbed',
    'QTimmPreNorm',
    'check_block_parts',
    'check_exactly',
    'check_head',
    'check_optional_norm',
    'check_patch_embed',
    'classifier_twin',
    'grid_after',
    'norm_twin',
    'quantize_block_',
    'quantize_mlp_',
    'quantize_patch_embed_',
]


class QConv2dAct(QConv2d):
    """A convolution whose output is quantized too."""

    out_act: QAct

    @classmethod
    def wrap(cls, conv: nn.Conv2d, make: LayerFactory) -> QConv2dAct:
        """The twin of ``conv`` with a quantizer on its output."""
        twin = cls.from_float(conv, make.scheme.edge_weight)
        twin.out_act = make.act()
        return twin  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W'), quantized."""
        x = super().forward(x)
        if not isinstance(x, Exact):
            x = x.movedim(1, -1)
        return self.out_act(x).movedim(-1, 1)


class QTimmPatchEmbed(PatchEmbed):
    """timm's PatchEmbed after surgery: image, convolution, tokens, and a LayerNorm for Swin."""

    input_act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to tokens, (B, N, C) or (B, H', W', C)."""
        return super().forward(self.input_act(x))


def quantize_patch_embed_(embed: Any, make: LayerFactory) -> QAct:
    """Quantize a PatchEmbed in place; gives the quantizer whose grid its tokens are on."""
    embed.input_act = make.act_of_shared() if make.scheme.input_quant else nn.Identity()
    embed.proj = QConv2dAct.wrap(embed.proj, make)
    if isinstance(embed.input_act, QAct):
        link(embed.proj, embed.input_act)
    embed.norm = norm_twin(embed.norm, embed.proj.out_act, make)
    embed.__class__ = QTimmPatchEmbed
    return embed.norm.out_act if isinstance(embed.norm, QNormAct) else embed.proj.out_act


class QTimmMlp(Mlp):
    """timm's Mlp after surgery; layer scale, which timm's block applies, comes before the last quantizer."""

    hidden_act: QAct  # with the activation before it
    out_act: QAct

    def forward(self, x: Tensor, layer_scale: nn.Module | None = None) -> Tensor:
        """(…, C) to (…, C), on the grid of ``out_act``."""
        x = self.norm(self.drop1(self.hidden_act(self.fc1(x))))  # (…, 4C)
        x = self.fc2(x)
        return self.drop2(self.out_act(x if layer_scale is None else layer_scaled(x, layer_scale)))


def quantize_mlp_(mlp: Any, make: LayerFactory) -> None:
    """Quantize an Mlp in place."""
    mlp.fc1, mlp.fc2 = make.linear(mlp.fc1), make.linear(mlp.fc2)
    after = mlp.fc2 if isinstance(mlp.norm, nn.Identity) else None
    mlp.hidden_act = make.hidden(mlp.act, mlp.fc1, after)
    mlp.out_act = make.branch(mlp.fc2.out_features)
    mlp.norm = norm_twin(mlp.norm, mlp.hidden_act, make)
    link(mlp.fc2, grid_after(mlp.norm, mlp.hidden_act))
    mlp.__class__ = QTimmMlp


class QTimmPreNorm:
    """The forward of a pre-norm block after surgery, for timm's ViT and Swin (abstract: a mixin of their blocks).

    :func:`~fqvit_plugin.blocks.common.link` tells it what quantized its input.
    """

    attn: Any
    norm1: Any
    norm1_act: QAct
    drop_path1: Any
    attn_residual_act: QAct
    norm2: Any
    norm2_act: QAct
    mlp: Any
    drop_path2: Any
    residual_act: QAct

    def attention(self, x: Tensor) -> Tensor:
        """The first branch, on the grid of its last quantizer."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) or (B, H, W, C) to the same, on the grid of ``residual_act``."""
        y = self.norm1(x, linked(self), self.norm1_act)
        y = self.drop_path1(self.attention(y))
        x = self.attn_residual_act(summed(x, linked(self), y, self.attn.proj_act))
        y = self.norm2(x, self.attn_residual_act, self.norm2_act)
        y = self.drop_path2(self.mlp(y, getattr(self, 'ls2', None)))
        return self.residual_act(summed(x, self.attn_residual_act, y, self.mlp.out_act))


def quantize_block_(block: Any, twin: type, attn: nn.Module, previous: QAct, make: LayerFactory) -> QAct:
    """Make ``block`` a ``twin`` with attention ``attn``, in place; gives the quantizer of its output.

    ``previous`` quantized what it reads. Its quantizers are ``norm1_act``, ``attn_residual_act``, ``norm2_act`` and
    ``residual_act``, as in MMPretrain's twins.
    """
    channels = block.norm1.normalized_shape[0]
    block.norm1, block.norm2 = make.norm(block.norm1), make.norm(block.norm2)
    block.attn = attn
    quantize_mlp_(block.mlp, make)
    block.norm1_act, block.norm2_act = make.operand(), make.operand()
    block.attn_residual_act, block.residual_act = make.norm_input(channels), make.norm_input(channels)
    block.__class__ = twin
    link(block, previous)
    link(block.attn.qkv, block.norm1_act)
    link(block.mlp.fc1, block.norm2_act)
    residual: QAct = block.residual_act
    return residual


def norm_twin(norm: nn.Module, input_act: QAct, make: LayerFactory, tile: int = 1) -> nn.Module:
    """The twin of a LayerNorm that reads what ``input_act`` quantized; Identity, timm's absent norm, stays."""
    return QNormAct.wrap(norm, input_act, make, tile) if isinstance(norm, nn.LayerNorm) else norm


def grid_after(norm: nn.Module, act: Any) -> Any:
    """The quantizer after ``norm``, where there is one; ``act``, the one before, where ``norm`` is Identity."""
    return norm.out_act if isinstance(norm, QNormAct) else act


def classifier_twin(head: nn.Module, make: LayerFactory, input_act: QAct | None) -> nn.Module:
    """The twin of a linear classifier that reads what ``input_act`` quantized; Identity, timm's absent one, stays."""
    if not isinstance(head, nn.Linear):
        return head
    twin = QLinearAct.wrap(head, make)
    link(twin, input_act)
    return twin


def check_exactly(module: Any, expected: type, path: str) -> None:
    """Refuse a part of another class: a subclass may compute something else.

    Raises:
        ValueError: names the part and its class.
    """
    if type(module) is not expected:
        raise ValueError(f'{path} is a {type(module).__name__}, not a {expected.__name__}: not covered')


def check_optional_norm(norm: Any, path: str) -> None:
    """Refuse norms other than LayerNorm and none.

    Raises:
        ValueError: names the norm.
    """
    if not isinstance(norm, nn.Identity):
        check_norm(norm, path)


def check_patch_embed(embed: Any) -> None:
    """Refuse patch embeddings other than timm's convolution, with or without a LayerNorm (hybrids, for instance).

    Raises:
        ValueError: names the part that is not covered.
    """
    check_exactly(embed, PatchEmbed, 'patch_embed')
    check_exactly(embed.proj, nn.Conv2d, 'patch_embed.proj')
    check_optional_norm(embed.norm, 'patch_embed.norm')


def check_block_parts(block: Any, path: str) -> None:
    """Refuse blocks whose norms are no LayerNorms or whose MLP is not two linear layers (SwiGLU, convolutions).

    Raises:
        ValueError: names the part that is not covered.
    """
    check_norm(block.norm1, f'{path}.norm1')
    check_norm(block.norm2, f'{path}.norm2')
    check_exactly(block.mlp, Mlp, f'{path}.mlp')
    check_exactly(block.mlp.fc1, nn.Linear, f'{path}.mlp.fc1')
    check_optional_norm(block.mlp.norm, f'{path}.mlp.norm')


def check_head(head: Any, path: str) -> None:
    """Refuse classifiers other than one linear layer, or none.

    Raises:
        ValueError: names the classifier.
    """
    if not isinstance(head, nn.Identity):
        check_exactly(head, nn.Linear, path)
