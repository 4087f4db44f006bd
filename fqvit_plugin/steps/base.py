"""What a step is, and the streams of activations it works on.

A step runs before ranges are found (it may move difficulty between tensors without changing the float model) or
after them (it may choose codes). To add one, subclass :class:`Step`, decorate it with ``@STEPS.register_module()``,
and name it in ``get_scheme(steps=[...])``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QConv2d, QLinear
from ..lifecycle import set_phase
from ..phase import Phase
from ..weight_quantizer import WeightQuantizer

__all__ = [
    'ArrivedError',
    'Block',
    'Calibration',
    'Step',
    'blocks_of',
    'first_of',
    'in_phase',
    'outputs_of',
    'roundable',
    'walk',
    'weight_layers',
]


@dataclass
class Calibration:
    """The images of a calibration.

    Args:
        model: quantized, in phase float.
        batches: as ``forward`` takes them.
        forward: runs one batch through the model.
        report: told about progress, one line each.
    """

    model: nn.Module
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Any]
    report: Callable[[str], None] = lambda line: None


class Step(ABC):
    """One step (abstract)."""

    #: Whether it runs before ranges are found.
    before_ranges = False

    @abstractmethod
    def run(self, calibration: Calibration) -> None:
        """Do it; the model is in phase float before and after.

        Raises:
            ValueError: the model has no part that it could work on.
        """


class ArrivedError(Exception):
    """The forward pass has come far enough."""


@contextmanager
def in_phase(model: nn.Module, phase: Phase) -> Iterator[None]:
    """``model`` in ``phase``, and in float afterwards."""
    set_phase(model, phase)
    try:
        yield
    finally:
        set_phase(model, Phase.FLOAT)


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of ``model`` that read one residual stream and write the next, in order, with their paths.

    Raises:
        ValueError: there is none.
    """
    owners = [(name, m) for name, m in model.named_modules() if hasattr(m, 'residual_act')]
    found = [
        (name, m)
        for name, m in owners
        if name and weight_layers(m) and not any(other.startswith(f'{name}.') for other, _ in owners)
    ]
    if not found:
        raise ValueError(f'{type(model).__name__} has no quantized blocks for this step to work on')
    return found


def weight_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Layers with a weight in ``module``, with their paths."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, (QConv2d, QLinear))]


def first_of(out: Any) -> Tensor:
    """The first tensor of what a module puts out."""
    while isinstance(out, (tuple, list)):
        out = out[0]
    return out


@contextmanager
def outputs_of(modules: Sequence[nn.Module | None]) -> Iterator[dict[Any, Tensor]]:
    """What ``modules`` put out, those that are given."""
    seen: dict[Any, Tensor] = {}

    def keep(module: nn.Module, _: Any, out: Any) -> None:
        seen[module] = first_of(out)

    handles = [m.register_forward_hook(keep) for m in modules if m is not None]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def roundable(module: nn.Module) -> list[Any]:
    """Layers in ``module`` whose codes can be chosen: matrices of at most 8 bits with a scale for each row."""
    return [m for _, m in weight_layers(module) if m.weight.ndim == 2 and _takes_codes(m.weight_quantizer)]


def _takes_codes(quantizer: Any) -> bool:
    spec = quantizer.spec
    strict = spec.arithmetic == 'strict' and spec.bit_type.signed and spec.axis == 0
    return isinstance(quantizer, WeightQuantizer) and strict and spec.bit_type.bits <= 8


class Block:
    """A block on its own: runs on tokens of its stream, with what else the model hands it.

    Args:
        module: of the model.
        arguments: positional and keyword arguments behind the tokens.
    """

    def __init__(self, module: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.module = module
        self._arguments = arguments

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        args, kwargs = self._arguments
        out = self.module(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @classmethod
    def arriving(cls, calibration: Calibration, module: nn.Module, batches: Sequence[Any] | None = None) -> Any:
        """The block of ``module``, and the tokens that reach it from each batch, in the model's phase."""
        streams: list[Tensor] = []
        rest: list[Any] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            streams.append(args[0].detach().clone())
            rest.append((args[1:], kwargs))
            raise ArrivedError

        handle = module.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in calibration.batches if batches is None else batches:
                try:
                    calibration.forward(calibration.model, batch)
                except ArrivedError:
                    continue
        finally:
            handle.remove()
        return cls(module, rest[0]), streams


def chained(calibration: Calibration, modules: Sequence[nn.Module]) -> list[bool]:
    """For each block, whether it reads exactly what the block before it put out."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    handles = []
    for i, module in enumerate(modules):

        def keep(_: nn.Module, args: tuple[Any, ...], out: Any, i: int = i) -> None:
            inputs[i], outputs[i] = args[0], out[0] if isinstance(out, tuple) else out

        handles.append(module.register_forward_hook(keep))
    try:
        calibration.forward(calibration.model, calibration.batches[0])
    finally:
        for handle in handles:
            handle.remove()
    return [i > 0 and inputs[i].shape == outputs[i - 1].shape and torch.equal(inputs[i], outputs[i - 1])
            for i in range(len(modules))]  # fmt: skip


@torch.no_grad()
def walk(calibration: Calibration) -> Iterator[tuple[str, Block, list[Tensor], list[Tensor], list[Tensor]]]:
    """Block by block: its path, the block, the float and the quantized stream into it, and the float stream out.

    Between two turns the caller may change the block's codes; the quantized stream goes on by what holds then.
    """
    model = calibration.model
    set_phase(model, Phase.FLOAT)
    named = blocks_of(model)
    modules = [module for _, module in named]
    joined = chained(calibration, modules)
    floats: list[Tensor] = []
    quants: list[Tensor] = []
    for (name, module), direct in zip(named, joined, strict=True):
        if not direct:
            block, floats = Block.arriving(calibration, module)
            with in_phase(model, Phase.QUANT):
                _, quants = Block.arriving(calibration, module)
        else:
            block, _ = Block.arriving(calibration, module, calibration.batches[:1])
        out = [block(x) for x in floats]
        yield name, block, floats, quants, out
        with in_phase(model, Phase.QUANT):
            quants = [block(x) for x in quants]
        floats = out
