"""Places for a plan's tensors in one block of memory, and its steps with pointers instead of names."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .planner import Plan, TorchStep
from .structs import KINDS, NativeStep, Step, linked

__all__ = ['Layout', 'Segment']

_ALIGN = 64


@dataclass(frozen=True)
class Segment:
    """Steps that the engine runs in one go.

    Args:
        steps: as the engine takes them.
        arguments: what they point to.
        first: number of the first in the plan.
    """

    steps: ctypes.Array[Step]
    arguments: list[ctypes.Structure]
    first: int


class Layout:
    """A plan with places. Offsets are for one image: a batch multiplies them.

    Args:
        plan: to place.
        keep: give every tensor a place of its own, so that all can be read afterwards; else places are used again.
    """

    def __init__(self, plan: Plan, keep: bool) -> None:
        self._plan = plan
        self._offsets: dict[str, int] = {}
        self.size = 0  #: bytes for one image
        self._place(keep)
        self.items: list[Segment | TorchStep] = []
        waiting: list[NativeStep] = []
        for i, step in enumerate([*plan.steps, None]):
            if isinstance(step, NativeStep):
                waiting.append(step)
                continue
            if waiting:
                self.items.append(self._segment(waiting, i - len(waiting)))
                waiting = []
            if step is not None:
                self.items.append(step)

    def bytes(self, name: str, arena: Tensor, batch: int) -> Tensor:
        """The bytes of a buffer, flat."""
        start = self._offsets[name] * batch
        return arena[start : start + _elements(self._plan, name) * batch]

    def codes(self, name: str, arena: Tensor, batch: int, shape: tuple[int, ...] | None = None) -> Tensor:
        """The stored codes of a buffer, int8: a copy, in ``shape`` (for two images) or its own."""
        shape = shape or self._plan.shapes[name]
        codes = (self.bytes(name, arena, batch) ^ 128).view(torch.int8)
        return codes.view(shape[0] // 2 * batch, *shape[1:])

    def _place(self, keep: bool) -> None:
        last = {name: i for i, step in enumerate(self._plan.steps) for name in [*step.inputs, step.output]}
        last[self._plan.output] = len(self._plan.steps)
        busy: list[tuple[int, int, str]] = []  # begin, end, name
        for i, step in enumerate(self._plan.steps):
            if step.output in self._plan.shapes and step.output not in self._offsets:
                size = -(-_elements(self._plan, step.output) // _ALIGN) * _ALIGN
                begin = 0
                for low, high, _ in sorted(busy):
                    if low - begin >= size:
                        break
                    begin = max(begin, high)
                self._offsets[step.output] = begin
                busy.append((begin, begin + size, step.output))
                self.size = max(self.size, begin + size)
            if not keep:
                busy = [entry for entry in busy if last[entry[2]] > i]

    def _segment(self, steps: list[NativeStep], first: int) -> Segment:
        arguments = [linked(step, self._offsets) for step in steps]
        kinds = list(KINDS)
        array = (Step * len(steps))(
            *(Step(kinds.index(s.kind), ctypes.addressof(a)) for s, a in zip(steps, arguments, strict=True))
        )
        return Segment(array, arguments, first)


def _elements(plan: Plan, name: str) -> int:
    return torch.Size(plan.shapes[name]).numel() // 2
