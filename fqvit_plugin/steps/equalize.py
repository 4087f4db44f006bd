"""Equalize: channels of LayerNorm outputs, and of query, key and value, get alike ranges; the float model stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.attention import QSelfAttention
from ..blocks.common import linked
from ..blocks.swin import QWindowMSA
from ..layers import QIntLayerNorm, QLinear
from ..registry import STEPS
from .base import Calibration, Step

__all__ = ['Equalize']


@STEPS.register_module(name=['equalize', 'Equalize'])
class Equalize(Step):
    """Moves scales and offsets of channels from an activation into the weights beside it.

    A LayerNorm's output with very unlike channels is a bad tensor for one scale. Its own weight and bias can give
    all channels one range around zero, and the linear layer that reads it takes the factors into its columns and the
    offsets into its bias. Queries and keys are divided and multiplied by the same factors, values divided by factors
    that the projection takes back. The float model computes what it computed, up to rounding.

    Where a layer has no bias, or reads zeros beside the LayerNorm's tokens (windows that are padded), offsets stay.

    Args:
        norms: do so between LayerNorm and linear layers.
        attention: do so for queries, keys and values.
        alpha: how far ranges are made alike: 1 wholly, 0 not at all.
        tail: the part of values at either end that the range of a channel does not count.

    Source: Li et al., RepQ-ViT, ICCV 2023 (LayerNorm); the range of values is ours.
    """

    before_ranges = True

    def __init__(
        self, norms: bool = True, attention: bool = True, alpha: float = 1.0, tail: float = 1e-3
    ) -> None:
        if not 0 <= alpha <= 1 or not 0 <= tail < 0.5:
            raise ValueError(f'equalize wants alpha in 0 to 1 and tail in 0 to 0.5, got {alpha} and {tail}')
        self.norms, self.attention, self.alpha, self.tail = norms, attention, alpha, tail

    @torch.no_grad()
    def run(self, calibration: Calibration) -> None:
        """Change weights of the model, which get tensors of their own."""
        norms = list(_norms_and_readers(calibration.model)) if self.norms else []
        attentions: list[Any] = [m for m in calibration.model.modules() if self.attention and _is_plain(m)]
        ends: dict[nn.Module, list[Tensor]] = {}
        rows: dict[nn.Module, int] = {}
        handles = [linear.register_forward_pre_hook(_counter(rows)) for _, readers in norms for linear in readers]
        handles += [norm.register_forward_hook(self._keeper(ends)) for norm, _ in norms]
        handles += [norm.register_forward_pre_hook(_counter(rows)) for norm, _ in norms]
        handles += [attn.qkv.register_forward_hook(self._keeper(ends)) for attn in attentions]
        try:
            for batch in calibration.batches:
                calibration.forward(calibration.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        for norm, readers in norms:
            offset = all(linear.bias is not None and rows[linear] == rows[norm] for linear in readers)
            self._equalize_norm(norm, readers, *self._range(ends[norm]), offset)
        for attn in attentions:
            self._equalize_attention(attn, *self._range(ends[attn.qkv]))

    def _keeper(self, ends: dict[nn.Module, list[Tensor]]) -> Callable[..., None]:
        def keep(module: nn.Module, _: Any, out: Tensor) -> None:
            rows = out.flatten(0, -2)
            skip = int(self.tail * len(rows))
            low = rows.topk(skip + 1, dim=0, largest=False).values[-1]
            high = rows.topk(skip + 1, dim=0).values[-1]
            ends.setdefault(module, []).append(torch.stack((low, high)))

        return keep

    def _range(self, ends: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The widest of the batches' ranges, (C,) each."""
        both = torch.stack(ends)
        return both[:, 0].amin(0), both[:, 1].amax(0)

    def _equalize_norm(
        self, norm: QIntLayerNorm, readers: list[QLinear], low: Tensor, high: Tensor, offset: bool
    ) -> None:
        factor = (high - low).clamp_min(1e-3) ** self.alpha
        factor = factor / factor.mean()
        middle = (high + low) / 2 * offset
        for linear in readers:
            if offset:
                linear.bias = nn.Parameter(linear.bias + linear.weight @ middle)
            linear.weight = nn.Parameter(linear.weight * factor)
        norm.weight, norm.bias = nn.Parameter(norm.weight / factor), nn.Parameter((norm.bias - middle) / factor)

    def _equalize_attention(self, attn: Any, low: Tensor, high: Tensor) -> None:
        query, key, value = torch.maximum(-low, high).clamp_min(1e-3).chunk(3)
        balance = (query / key).sqrt()
        top = torch.maximum(query / balance, key * balance).max()
        spread = value / top  # then the largest value is as large as the largest query and key
        factor = torch.cat((1 / balance, balance, 1 / spread))
        attn.qkv.weight = nn.Parameter(attn.qkv.weight * factor[:, None])
        if attn.qkv.bias is not None:
            attn.qkv.bias = nn.Parameter(attn.qkv.bias * factor)
        attn.proj.weight = nn.Parameter(attn.proj.weight * spread)


def _counter(rows: dict[nn.Module, int]) -> Callable[..., None]:
    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows[module] = rows.get(module, 0) + args[0].numel() // args[0].shape[-1]

    return count


def _is_plain(module: Any) -> bool:
    """Whether nothing stands between projections and products of an attention."""
    between = (getattr(module, name, None) for name in ('q_norm', 'k_norm', 'norm'))
    clear = all(m is None or isinstance(m, nn.Identity) for m in between)
    return isinstance(module, (QSelfAttention, QWindowMSA)) and clear


def _norms_and_readers(model: nn.Module) -> Iterator[tuple[QIntLayerNorm, list[QLinear]]]:
    """LayerNorms of blocks, and the linear layers that alone read each."""
    readers: dict[int, list[QLinear]] = {}
    for module in model.modules():
        if isinstance(module, QLinear) and getattr(module, '_input_act', (None,))[0] is not None:
            readers.setdefault(id(linked(module)), []).append(module)
    for block in model.modules():
        pairs = [(getattr(block, n, None), getattr(block, a, None)) for n, a in _PLACES]
        known = [(n, a) for n, a in pairs if isinstance(n, QIntLayerNorm) and a is not None and id(a) in readers]
        for norm, act in known:
            if norm.weight is not None and norm.bias is not None and getattr(block, '_second_norm', 'ln2') != 'ln1':
                yield norm, readers[id(act)]


#: Where blocks have their LayerNorms and the quantizers of what those put out.
_PLACES = (('ln1', 'norm1_act'), ('ln2', 'norm2_act'), ('norm1', 'norm1_act'), ('norm2', 'norm2_act'))
