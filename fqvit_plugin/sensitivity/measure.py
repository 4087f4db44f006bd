"""Measuring what every unit of a calibrated model does to its outputs.

Each pass quantizes one unit and leaves the rest in float, or the other way round. Passes over one batch share what
comes before their unit: the blocks before it give what they gave in the float, or in the quantized, pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.records import Analysis, decibels
from ..layers import QAct, QConv2d, QLinear
from ..lifecycle import forward_images
from .prefix import Prefix
from .records import Effect, Entry, ImageEffect, Sensitivity
from .switches import Switches
from .units import Unit

__all__ = ['DIRECTIONS', 'count_passes', 'measure_sensitivity']

DIRECTIONS = ('only', 'without')


class _Outcome:
    """Adds up one unit's outputs over batches."""

    def __init__(self) -> None:
        self.kl: list[float] = []
        self.expected: list[int] = []
        self.found: list[int] = []
        self.right = 0
        self.labelled = True

    def add(self, expected: Tensor, found: Tensor, labels: Tensor | None) -> None:
        """Logits (N, classes) of the float and of the partly quantized model, and labels (N,)."""
        p, q = expected.double().log_softmax(1), found.double().log_softmax(1)
        # two nearly equal distributions may diverge by less than nothing
        self.kl += (p.exp() * (p - q)).sum(1).clamp_min(0).tolist()
        self.expected += expected.argmax(1).tolist()
        self.found += found.argmax(1).tolist()
        self.labelled &= labels is not None
        if labels is not None:
            self.right += int((found.argmax(1) == labels.to(found.device)).sum())

    def effect(self) -> Effect:
        """The means."""
        images = len(self.kl)
        agreed = sum(a == b for a, b in zip(self.expected, self.found, strict=True))
        top1 = self.right / images if self.labelled else None
        return Effect(sum(self.kl) / images, agreed / images, top1)

    def each_image(self) -> tuple[ImageEffect, ...]:
        """Image by image."""
        rows = zip(self.kl, self.expected, self.found, strict=True)
        return tuple(ImageEffect(i, *row) for i, row in enumerate(rows))


def count_passes(units: Sequence[Unit], directions: Collection[str] = DIRECTIONS) -> int:
    """How many forward passes a batch takes, besides the float and the quantized one."""
    return sum(direction in directions for unit in units for direction in _directions(unit))


def _directions(unit: Unit) -> tuple[str, ...]:
    return ('only',) if unit.instead else DIRECTIONS  # the rest has the bits that it has


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    units: Sequence[Unit],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    labels: Callable[[Any], Tensor | None] = lambda _: None,
    analysis: Analysis | None = None,
    directions: Collection[str] = DIRECTIONS,
    on_pass: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Quantize each unit alone, and everything but it, and compare the class probabilities with the float model's.

    Args:
        model: calibrated; is put in eval mode, and left in the phase it is in, also when something goes wrong.
        batches: streamed, each is kept only while it is measured.
        units: of :func:`~fqvit_plugin.sensitivity.units.units_of`.
        forward: runs one batch and returns logits (N, classes); by default what ``calibrate_`` does.
        labels: classes (N,) of a batch, where they are known.
        analysis: where the SQNR of each tensor is taken from; ``None`` measures that of weights only.
        directions: some of ``'only'`` and ``'without'``.
        on_pass: called after every pass of a unit.

    Raises:
        ValueError: there is no batch or no unit, or the model gives no logits.
        RuntimeError: the model is not calibrated, or is calibrating.
    """
    if not units or not set(directions) <= set(DIRECTIONS) or not directions:
        raise ValueError(f'nothing to measure: give units, and directions out of {", ".join(DIRECTIONS)}')
    run = forward or forward_images
    model.eval()
    prefix, outcomes = Prefix(model), {(i, d): _Outcome() for i, u in enumerate(units) for d in _directions(u)}
    whole, right = _Outcome(), _Outcome()
    with Switches(model) as switches:
        for batch in batches:
            with switches.only(()):
                expected, float_outputs = prefix.record(partial(_logits_of, run, model, batch))
            with switches.without(()):
                found, quant_outputs = prefix.record(partial(_logits_of, run, model, batch))
            known = labels(batch)
            whole.add(expected, found, known)
            right.add(expected, expected, known)
            for (i, direction), outcome in outcomes.items():
                start = _start(units[i], prefix.starts)
                if direction in directions and start is not None:
                    is_only = direction == 'only'
                    paths, instead = units[i].members, units[i].instead
                    outputs = float_outputs if is_only else quant_outputs
                    switched = switches.only(paths, instead) if is_only else switches.without(paths)
                    with switched, prefix.skipping(outputs, start):
                        outcome.add(expected, _logits_of(run, model, batch), known)
                if direction in directions:
                    on_pass()
    if not whole.kl:
        raise ValueError('no batch to measure: give at least one')
    entries = _entries(units, switches.layers, outcomes, analysis)
    name = type(getattr(model, 'backbone', model)).__name__.removeprefix('Q')
    return Sensitivity(name, len(whole.kl), right.effect().top1, whole.effect(), entries, whole.each_image())


def _start(unit: Unit, starts: Mapping[str, int]) -> int | None:
    """How many blocks run before the first layer of ``unit``; ``None`` if the model calls none of them."""
    return min((starts[path] for path in unit.members if path in starts), default=None)


def _logits_of(run: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> Tensor:
    output = run(model, batch)
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ValueError(
            'sensitivity is measured on class probabilities: the model must give one row of logits per image, and '
            f'gives {_described(output)}. Use a classifier'
        )
    return output.detach().float().clone()


def _described(output: Any) -> str:
    return f'a tensor of shape {tuple(output.shape)}' if isinstance(output, Tensor) else f'a {type(output).__name__}'


def _entries(
    units: Sequence[Unit],
    layers: Mapping[str, Any],
    outcomes: Mapping[tuple[int, str], _Outcome],
    analysis: Analysis | None,
) -> tuple[Entry, ...]:
    known = {} if analysis is None else {r.path: r.sqnr for r in analysis.tensors}
    entries = []
    for i, unit in enumerate(units):
        effects: dict[str, Effect | None] = {
            d: o.effect() if (o := outcomes.get((i, d))) is not None and o.kl else None for d in DIRECTIONS
        }
        if effects['only'] is None and effects['without'] is None:
            continue  # a layer that the model never calls
        weights = sum(layers[p].weight.numel() for p in unit.members if isinstance(layers[p], (QConv2d, QLinear)))
        sqnr = _sqnr(unit, layers, known)
        entries.append(
            Entry(
                unit.name, unit.level, unit.kind, unit.block, unit.bits, len(unit.members), weights, sqnr, **effects
            )
        )
    return tuple(entries)


def _sqnr(unit: Unit, layers: Mapping[str, Any], known: Mapping[str, float]) -> float | None:
    if unit.level != 'tensor':
        return None
    layer = layers[unit.name]
    if isinstance(layer, (QConv2d, QLinear)):
        quantizer = unit.instead.get(unit.name, layer.weight_quantizer)
        weight = layer.weight.detach().float()
        noise = (weight - quantizer(weight)).square().sum(dtype=torch.float64)
        value = decibels(float(weight.square().sum(dtype=torch.float64)), float(noise))
    elif isinstance(layer, QAct) and unit.instead:
        return None
    else:
        value = known.get(unit.name, math.nan)
    return value if math.isfinite(value) else None
