"""``NativeModel``: an integer model on the compiled engine."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..integer.kernels import KERNELS
from ..integer.program import IntegerModel
from .build import library
from .memory import Layout, Segment
from .planner import Planner, TorchStep
from .structs import NativeStep, check_sizes

__all__ = ['NativeModel', 'Timing']

_ALIGN = 64


@dataclass(frozen=True)
class Timing:
    """What a step took.

    Args:
        kind: of the step; ``torch`` for what has no native form.
        output: the tensor that it writes.
        seconds: mean of the runs.
        products: multiplications of one image in matrix products.
    """

    kind: str
    output: str
    seconds: float
    products: int


class NativeModel(nn.Module):
    """Computes the codes of an :class:`IntegerModel`, all of them equal, with fused steps of C++.

    Activations lie as bytes in one block of memory that is kept from call to call; threads are
    ``torch.get_num_threads()``. On the CPU only, without gradients.

    Args:
        model: from ``to_integer`` or ``load_integer``.
        flags: of the compiler, see :func:`fqvit_plugin.native.build.library`.

    Raises:
        RuntimeError: the engine cannot be compiled; the message says what to install.
        ValueError: a kernel that the engine does not know.
    """

    def __init__(self, model: IntegerModel, flags: str | None = None) -> None:
        super().__init__()
        self._library = library(flags)
        check_sizes(self._library)
        self.integer = model
        self._plan = Planner(model.program, self._library).plan()
        self._layouts = {keep: Layout(self._plan, keep) for keep in (False, True)}
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    @property
    def isa(self) -> str:
        """The instruction set that the engine uses here: amx-int8, avx512-vnni, avx512, avx-vnni, avx2 or generic."""
        return str(self._library.fq_isa().decode())

    @property
    def fallbacks(self) -> list[str]:
        """Operations that torch's kernels compute, because the engine has no step for them."""
        return [step.output for step in self._plan.steps if isinstance(step, TorchStep)]

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalized images to (B, classes) logits, float32.

        Raises:
            ValueError: images of another size than the program's, or not on the CPU.
        """
        codes = self._run(image, keep=False, seconds=None)[self._plan.output]
        return (codes.int() - self.integer.output_zero) * self.integer.output_scale

    def codes(self, image: Tensor) -> dict[str, Tensor]:
        """Stored codes of every tensor that is materialized, by name: int8, shaped as the integer model's.

        Fused steps keep what lies within them to themselves; each name is that of an operation of the program.
        """
        return self._run(image, keep=True, seconds=None)

    def timings(self, image: Tensor, repeats: int = 10) -> list[Timing]:
        """What each step takes: the time of the first thread until all are done with it."""
        self._run(image, keep=False, seconds=None)
        seconds = torch.zeros(len(self._plan.steps), dtype=torch.float64)
        for _ in range(repeats):
            self._run(image, keep=False, seconds=seconds)
        rows = zip(self._plan.steps, (seconds / repeats).tolist(), strict=True)
        return [Timing(getattr(step, 'kind', 'torch'), step.output, took, _products(step)) for step, took in rows]

    def _run(self, image: Tensor, keep: bool, seconds: Tensor | None) -> dict[str, Tensor]:
        size = self.integer.program.image_size
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, *size) or image.device.type != 'cpu' or not len(image):
            given = f'{tuple(image.shape)} on {image.device}'
            raise ValueError(f'this model takes images of (B, 3, {size[0]}, {size[1]}) on the CPU, got {given}')
        image = image.detach().float().contiguous()
        layout, batch = self._layouts[keep], len(image)
        with self._lock:
            arena = self._memory(layout.size * batch + 2 * _ALIGN)
            found = self._steps(image, layout, arena, seconds)
            wanted = [n for n in self._plan.shapes if n not in self._plan.hidden] if keep else [self._plan.output]
            return {n: found[n] if n in found else layout.codes(n, arena, batch) for n in wanted}

    def _memory(self, size: int) -> Tensor:
        if len(self._arena) < size:
            self._arena = torch.zeros(size + _ALIGN, dtype=torch.uint8)
        start = -self._arena.data_ptr() % _ALIGN
        return self._arena[start:]

    def _steps(self, image: Tensor, layout: Layout, arena: Tensor, seconds: Tensor | None) -> dict[str, Tensor]:
        """Run; gives what torch's steps computed."""
        values = {'image': image, **self._plan.values}
        batch, threads = len(image), torch.get_num_threads()
        for item in layout.items:
            if isinstance(item, Segment):
                clock = None if seconds is None else seconds.data_ptr() + 8 * item.first
                data = arena.data_ptr(), image.data_ptr()
                self._library.fq_run(item.steps, len(item.steps), *data, batch, threads, clock)
                continue
            op = item.op
            buffers = {n: layout.codes(b, arena, batch, shape) for n, (b, shape) in item.reads.items()}
            constants = {k: self.integer.program.constants[name].cpu() for k, name in op.constants.items()}
            inputs = (buffers[n] if n in buffers else values[n] for n in op.inputs)
            values[op.output] = KERNELS[op.kind](*inputs, **constants, **op.settings)
            if item.stored:
                codes = values[op.output].contiguous().view(torch.uint8) ^ 128
                layout.bytes(op.output, arena, batch).copy_(codes.flatten())
        return values


def _products(step: NativeStep | TorchStep) -> int:
    if isinstance(step, TorchStep):
        return 0
    f = step.fields
    if step.kind == 'gemm':
        return int(f['rows'] * f['columns'] * f['depth'])
    if step.kind == 'attention':
        return int(f['groups'] * f['heads'] * f['queries'] * f['keys'] * (f['depth'] + 2 * f['value_depth']))
    return 0
