"""Ranges of every channel of a tensor: of the float model, of the quantized one, and of the grid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.measure import uniform_grid
from ..exact import reals
from ..layers import QAct, QConv2d, QIntLayerNorm, QLinear
from ..lifecycle import forward_images
from ..quantizers import UniformQuantizer
from .switches import Switches

__all__ = ['ChannelRanges', 'channel_ranges']

Ends = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class ChannelRanges:
    """Low and high ends of each channel, as two rows of (C,) numbers.

    Args:
        path: of the Q layer.
        before: in the float model.
        after: in the quantized model.
        grid: what the grid covers.
    """

    path: str
    before: Ends
    after: Ends
    grid: Ends


@torch.no_grad()
def channel_ranges(
    model: nn.Module,
    batches: Iterable[Any],
    paths: Collection[str],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[ChannelRanges, ...]:
    """Run each batch in float and quantized, and note the ranges of the tensors at ``paths``.

    Args:
        model: calibrated; its phase is kept.
        batches: streamed.
        paths: of weight layers, whose channels are the outputs, and of activations on uniform grids, whose channels
            are the last axis. Others are left out, and so are tensors whose last axis changes between the batches.
        forward: as :func:`~fqvit_plugin.lifecycle.calibrate_` takes it.
    """
    run = forward or forward_images
    with Switches(model) as switches:
        chosen = {path: switches.layers[path] for path in paths if _uniform(switches.layers[path]) is not None}
        seen: dict[str, dict[bool, Tensor]] = {path: {} for path in chosen}
        acts = {layer: path for path, layer in chosen.items() if isinstance(layer, QAct)}
        for batch in batches:
            for quantized, switched in ((False, switches.only(())), (True, switches.without(()))):
                with switched, _watching(model, acts, seen, quantized):
                    run(model, batch)
    return tuple(_ranges(path, layer, seen[path]) for path, layer in chosen.items() if _is_known(layer, seen[path]))


def _uniform(layer: Any) -> UniformQuantizer | None:
    quantizer = getattr(layer, 'weight_quantizer', getattr(layer, 'quantizer', None))
    return quantizer if isinstance(quantizer, UniformQuantizer) else None


def _is_known(layer: Any, seen: dict[bool, Tensor]) -> bool:
    return isinstance(layer, (QConv2d, QLinear)) or len(seen) == 2


@contextmanager
def _watching(
    model: nn.Module, acts: dict[Any, str], seen: dict[str, dict[bool, Tensor]], quantized: bool
) -> Iterator[None]:
    def note(act: Any, x: Any) -> None:
        if act in acts:
            x = reals(x).detach().float().flatten(0, -2)
            ends = torch.stack(torch.aminmax(x, dim=0))
            before = seen[acts[act]].get(quantized)
            if before is not None and before.shape == ends.shape:
                ends = torch.stack((torch.minimum(before[0], ends[0]), torch.maximum(before[1], ends[1])))
            seen[acts[act]][quantized] = ends

    def of_act(act: Any, _args: Any, output: Any) -> None:
        note(act, output)

    def of_norm(norm: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Integer LayerNorm lays its result on the grid of ``out_act`` without calling it."""
        note(args[2] if len(args) > 2 else kwargs.get('out_act', getattr(norm, 'out_act', None)), output)

    with ExitStack() as hooks:
        for act in acts:
            hooks.enter_context(act.register_forward_hook(of_act))
        for module in model.modules():
            if isinstance(module, QIntLayerNorm) and module.integer and quantized:
                hooks.enter_context(module.register_forward_hook(of_norm, with_kwargs=True))
        yield


def _ranges(path: str, layer: Any, seen: dict[bool, Tensor]) -> ChannelRanges:
    quantizer = _uniform(layer)
    assert quantizer is not None
    if isinstance(layer, (QConv2d, QLinear)):
        weight = layer.weight.detach().float()
        seen = {
            q: torch.stack(torch.aminmax(w.flatten(1), dim=1))
            for q, w in ((False, weight), (True, quantizer(weight)))
        }
    grid = uniform_grid(quantizer)
    covered = torch.stack([end.expand(seen[False].shape[1]) for end in (grid.low, grid.high)])
    return ChannelRanges(path, _ends(seen[False]), _ends(seen[True]), _ends(covered))


def _ends(rows: Tensor) -> Ends:
    low, high = rows.cpu().tolist()
    return tuple(low), tuple(high)
