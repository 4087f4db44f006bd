"""Self-attention of the plain ViTs, whoever wrote the float one: MMPretrain's and timm's twins share it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .common import LayerFactory, product

__all__ = ['QSelfAttention']


class QSelfAttention(nn.Module):
    """Multi-head self-attention up to its output projection, every product's operands on an integer grid (abstract).

    Args:
        attn: the float module, with ``qkv`` and ``num_heads``.
        head_dims: channels of a head.
        make: builds Q layers.
    """

    attn_drop: nn.Module

    def __init__(self, attn: Any, head_dims: int, make: LayerFactory) -> None:
        super().__init__()
        self.num_heads, self.head_dims = attn.num_heads, head_dims
        self.qkv = make.linear(attn.qkv)
        self.qkv_act = make.act()
        self.logits_act = make.act()
        self.probs = make.softmax()
        self.context_act = make.act()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) to query, key and value, (B, heads, N, D) each."""
        batch, tokens, _ = x.shape
        qkv = self.qkv_act(self.qkv(x))
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, self.head_dims).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def context(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, heads D), on the grid of ``context_act``."""
        q, k, v = self.heads(x)
        logits = product(q, k.transpose(-2, -1)).mul_(self.head_dims**-0.5)  # (B, heads, N, N)
        probs = self.attn_drop(self.probs(logits, self.logits_act))
        return self.context_act(product(probs, v).transpose(1, 2).flatten(2))
