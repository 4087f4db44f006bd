"""An integer program: a list of kernel calls on named tensors. It is run, saved and exported from here.

Three readers, one truth: the executor below, the checkpoint and the ONNX export all walk the same operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import KERNELS

__all__ = ['Grid', 'IntegerModel', 'Op', 'Program']


@dataclass(frozen=True)
class Grid:
    """Where stored codes lie: ``x = (stored - zero) * scale``. Lists hold one entry for each channel.

    Args:
        far: steps that the lowest code of a channel stands for if negative, the highest if positive, 0 for none;
            empty where no channel has any.
    """

    scale: tuple[float, ...]
    zero: tuple[int, ...]
    bits: int
    far: tuple[int, ...] = ()


@dataclass(frozen=True)
class Op:
    """One kernel call.

    Args:
        kind: name in ``KERNELS``.
        inputs: tensors, by name.
        output: name of the result; that of the layer whose quantizer makes it, where there is one.
        constants: keyword of the kernel -> name of a constant.
        settings: keyword of the kernel -> plain value.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    constants: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Operations in order, from ``image`` to ``output``.

    Args:
        ops: each reads what stands before it.
        constants: integer tensors, and the image's scale.
        output: name of the logits' codes.
        grids: of every tensor that holds codes, by name.
        image_size: height and width it was made for.
        groups: name of a weight among the constants -> (I,) int64, the group of each column: those of a group share a
            factor in each row, which makes the weight small in a file.
    """

    ops: tuple[Op, ...]
    constants: dict[str, Tensor]
    output: str
    grids: dict[str, Grid]
    image_size: tuple[int, int]
    groups: Mapping[str, Tensor] = field(default_factory=dict)


class IntegerModel(nn.Module):
    """Runs a program: float images in, float logits out, integers between.

    Every constant is a buffer, so ``to(device)`` and ``state_dict`` work as for any module.
    """

    output_scale: Tensor
    output_zero: Tensor

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.meta: dict[str, str] = {}  #: texts of the checkpoint it came from
        self._buffer_of = {name: f'c{i}' for i, name in enumerate(program.constants)}
        for name, buffer in self._buffer_of.items():
            self.register_buffer(buffer, program.constants[name])
        grid = program.grids[program.output]
        self.register_buffer('output_scale', torch.tensor(grid.scale, dtype=torch.float32))
        self.register_buffer('output_zero', torch.tensor(grid.zero, dtype=torch.int32))
        self._last_use = {name: i for i, op in enumerate(program.ops) for name in op.inputs}

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalized images to (B, classes) logits, float32.

        Raises:
            ValueError: images of another size than the program's.
        """
        if image.shape[2:] != self.program.image_size:
            size, wanted = tuple(image.shape[2:]), self.program.image_size
            raise ValueError(f'this integer model takes images of {wanted}, got {size}: convert it for that size')
        codes = image
        for _, codes in self.steps(image):  # noqa: B007 - the last one counts; kept all, none could be freed
            pass
        return (codes.int() - self.output_zero) * self.output_scale

    def steps(self, image: Tensor) -> Iterator[tuple[Op, Tensor]]:
        """Run, giving every operation with its result."""
        tensors = {'image': image}
        for i, op in enumerate(self.program.ops):
            arguments = {k: getattr(self, self._buffer_of[name]) for k, name in op.constants.items()}
            kernel: Callable[..., Tensor] = KERNELS[op.kind]
            tensors[op.output] = kernel(*(tensors[n] for n in op.inputs), **arguments, **op.settings)
            yield op, tensors[op.output]
            for name in set(op.inputs):
                if self._last_use[name] == i:
                    del tensors[name]
