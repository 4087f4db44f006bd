"""What attentions share: that of the plain ViTs of MMPretrain and timm, and the parts of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QAct
from .common import LayerFactory
from .sums import attended, product, scores

__all__ = ['QAttention', 'QSelfAttention', 'gather_bias', 'joined_bias', 'merged']


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
        self.qkv_act = make.operand()
        self.logits_act = make.act()
        self.probs = make.softmax()
        self.context_act = make.operand()

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
        q_act, k_act = self.query_and_key_acts()
        if q_act.is_exact and k_act.is_exact:
            logits: Any = scores(q, k, q_act, k_act, self.head_dims**-0.5)  # (B, heads, N, N)
        else:
            logits = product(q, k.transpose(-2, -1)).mul_(self.head_dims**-0.5)
        probs = self.probs(logits, self.logits_act)
        if isinstance(probs, Tensor):
            probs = self.attn_drop(probs)
        return self.context_act(attended(probs, v, self.qkv_act, merged))

    def query_and_key_acts(self) -> tuple[QAct, QAct]:
        """The quantizers of queries and keys."""
        return self.qkv_act, self.qkv_act


class QAttention(nn.Module):
    """Multi-head attention (abstract): subclasses make the logits, this makes the rest.

    Args:
        attn: the float module, with ``num_heads``, ``proj``, and perhaps ``attn_drop`` and ``proj_drop``.
        make: builds Q layers.
    """

    def __init__(self, attn: Any, make: LayerFactory) -> None:
        super().__init__()
        self.num_heads: int = attn.num_heads
        dropout = getattr(attn, 'attn_drop', 0.0)
        self.attn_drop = dropout if isinstance(dropout, nn.Module) else nn.Dropout(dropout)
        self.proj, self.proj_drop = make.linear(attn.proj), getattr(attn, 'proj_drop', nn.Identity())
        self.logits_act = make.act()
        self.probs = make.softmax()
        self.context_act = make.operand()
        self.proj_act = make.branch(attn.proj.out_features)

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(…, N, parts C) to ``parts`` tensors (…, heads, N, D)."""
        x = x.reshape(*x.shape[:-1], parts, self.num_heads, -1)
        return x.movedim(-3, 0).transpose(-3, -2).unbind(0)

    def attend(self, logits: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (…, heads, N, M) and values (…, heads, M, D) to (…, N, C), not yet quantized."""
        return merged(product(self.attn_drop(self.probs(logits, self.logits_act, mask)), v))

    def project(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(…, C) to the same; ``scale`` (C,) is layer scale, a factor of the accumulator."""
        x = self.proj(self.context_act(x))
        return self.proj_drop(self.proj_act(x if scale is None else scale * x))


def merged(x: Tensor) -> Tensor:
    """(…, heads, N, D) to (…, N, C)."""
    return x.transpose(-3, -2).flatten(-2)


def joined_bias(attn: Any) -> Tensor | None:
    """The bias (3C,) of query, key and value, where the key has none and the others are parameters of ``attn``."""
    if attn.q_bias is None:
        return None
    return torch.cat((attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias))


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Relative position biases (heads, N, N) from their table (positions, heads) and the index (N, N)."""
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()
