"""The integer model on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..integer.program import IntegerModel
from .support import interpreted, require

if TYPE_CHECKING:
    from .base import Step

__all__ = ['GpuModel']


class GpuModel(nn.Module):
    """Runs an integer model's program by fused Triton kernels, with equal codes.

    Args:
        integer: the model; its program is read; on which device it lies does not matter.
        cuda_graph: record the kernels of each batch size once and replay them, which spares their launches. The
            first call of a batch size is then slow, and memory for it stays taken.

    Raises:
        RuntimeError: Triton or CUDA is missing; see :func:`fqvit_plugin.gpu.missing`.

    Example::

        model = GpuModel(to_integer(calibrated)).cuda()
        logits = model(images.cuda())
    """

    output_scale: Tensor
    output_zero: Tensor

    def __init__(self, integer: IntegerModel, cuda_graph: bool = False) -> None:
        require()
        from .planner import plan  # it imports Triton

        super().__init__()
        program = integer.program
        self.image_size = program.image_size
        self._steps: list[Step] = plan(program)
        self.fused = nn.ModuleList(self._steps)  # for to(device)
        self.register_buffer('output_scale', integer.output_scale.detach().cpu().clone(), persistent=False)
        self.register_buffer('output_zero', integer.output_zero.detach().cpu().clone(), persistent=False)
        self._last_use = {name: i for i, step in enumerate(self._steps) for name in step.inputs}
        self._cuda_graph = cuda_graph
        self._graphs: dict[tuple[torch.device, torch.Size], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalized images to (B, classes) logits, float32.

        Raises:
            ValueError: images of another size than the program's, or not on a GPU (unless Triton interprets).
        """
        if image.shape[2:] != self.image_size:
            size = tuple(image.shape[2:])
            raise ValueError(f'this integer model takes images of {self.image_size}, got {size}: convert it anew')
        if not image.is_cuda and not interpreted():
            raise ValueError(f'GpuModel takes images on a GPU, got {image.device}: model.cuda()(images.cuda())')
        if image.device != self.output_scale.device:
            where = self.output_scale.device
            raise ValueError(f'the images are on {image.device}, the model on {where}: move one of them by .to()')
        with torch.no_grad(), torch.cuda.device(image.device) if image.is_cuda else nullcontext():
            return self._replay(image) if self._cuda_graph and image.is_cuda else self._run(image)

    def steps(self, image: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Run, giving the name of every tensor that is computed, with its codes."""
        tensors = {'image': image}
        for i, step in enumerate(self._steps):
            results = step(*(tensors[n] for n in step.inputs))
            made = dict(zip(step.outputs, results if isinstance(results, tuple) else (results,), strict=True))
            tensors.update(made)
            yield from made.items()
            for name in set(step.inputs):
                if self._last_use[name] == i:
                    del tensors[name]

    def _run(self, image: Tensor) -> Tensor:
        codes = image
        for _, codes in self.steps(image):  # noqa: B007 - the last one counts; kept all, none could be freed
            pass
        return (codes.int() - self.output_zero) * self.output_scale

    def _replay(self, image: Tensor) -> Tensor:
        key = (image.device, image.shape)
        if key not in self._graphs:
            self._graphs[key] = self._record(image)
        graph, static, logits = self._graphs[key]
        static.copy_(image)
        graph.replay()
        return logits.clone()

    def _record(self, image: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        static = image.float().clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run(static)  # kernels are compiled and timed now: nothing of that can be recorded
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run(static)
        return graph, static, logits
