"""Which layers of a block add to the residual stream, and what a layer should put out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..phase import Phase
from .base import ArrivedError, Block, in_phase, outputs_of, roundable

__all__ = ['Part', 'parts_of']


@dataclass(frozen=True)
class Part:
    """One layer of a block, and the residual sum that its output goes into.

    Args:
        layer: with a weight.
        stream: what puts out the stream before the sum; None: it is the block's input.
        total: what puts out the stream behind it; None where the output is not added as it is, or not at once.
    """

    layer: nn.Module
    stream: nn.Module | None = None
    total: nn.Module | None = None

    def pair(self, model: nn.Module, block: Block, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's input in the quantized model, and what it should put out for it.

        Args:
            model: that ``block`` is of; in phase float before and after.
            block: that the layer is of.
            x, y: the float and the quantized stream into it.
        """
        with in_phase(model, Phase.QUANT), outputs_of([self.stream]) as quants:
            given = _run_until_input(self.layer, block, y)
        if self.total is None:
            with _own_output(self.layer, False) as own:
                block(x)
            return given, own[0]
        with outputs_of([self.stream, self.total]) as floats, _own_output(self.layer, True) as own:
            block(x)
        error = floats.get(self.stream, x).detach() - quants.get(self.stream, y)
        return given, own[0].detach() + _carried(floats[self.total], own[0], error)


def parts_of(block: Block, x: Tensor) -> list[Part]:
    """The layers of ``block`` whose codes can be chosen, in the order in which they run.

    Args:
        block: of a model in phase float.
        x: tokens for it.
    """
    layers = roundable(block.module)
    totals = [m for name, m in block.module.named_modules() if name.endswith('residual_act')]
    order: list[Any] = []
    handles = [m.register_forward_hook(lambda m, _, __: order.append(m)) for m in [*layers, *totals]]
    try:
        block(x)
    finally:
        for handle in handles:
            handle.remove()
    found: list[Part] = []
    stream: Any = None
    for module in dict.fromkeys(order):
        if module in layers:
            found.append(Part(module))
            continue
        if found and found[-1].total is None:
            part = Part(found[-1].layer, stream, module)
            if _adds(part, block, x):
                found[-1] = part
        stream = module
    return found


def _adds(part: Part, block: Block, x: Tensor) -> bool:
    """Whether the stream grows by just what the layer puts out, its rows in another order perhaps, some left out."""
    with outputs_of([part.stream, part.total]) as seen, _own_output(part.layer, True) as own:
        block(x)
    total, stream, out = seen[part.total], seen.get(part.stream, x).detach(), own[0]
    if total.shape != stream.shape or not total.requires_grad:
        return False
    grown = (total - stream).detach()
    taken = _carried(total, out, torch.ones_like(total), keep=True)
    if taken is None:
        return False
    close = 1e-3 * float(out.detach().abs().mean()) + 1e-5 * float(stream.abs().max())
    return bool(((taken == 0) | (taken == 1)).all()) and torch.allclose(
        _carried(total, out, grown), taken * out.detach(), rtol=1e-3, atol=close
    )


def _carried(total: Tensor, out: Tensor, x: Tensor, keep: bool = False) -> Any:
    """``x``, like the stream ``total``, row by row where a layer's output ``out`` went: the gradient is that map.

    None where ``total`` does not depend on ``out``.
    """
    return torch.autograd.grad(total, out, x, retain_graph=keep, allow_unused=True)[0]


def _run_until_input(layer: nn.Module, block: Block, x: Tensor) -> Tensor:
    """What ``layer`` is given."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: Any) -> None:
        seen.append(args[0])
        raise ArrivedError

    handle = layer.register_forward_pre_hook(stop)
    try:
        with suppress(ArrivedError):
            block(x)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def _own_output(layer: nn.Module, gradient: bool) -> Iterator[list[Tensor]]:
    """What ``layer`` puts out, as the leaf of a graph if ``gradient`` is asked for."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_(gradient))
        return seen[-1].clone() if gradient else out

    handle = layer.register_forward_hook(keep)
    try:
        with torch.set_grad_enabled(gradient):
            yield seen
    finally:
        handle.remove()
