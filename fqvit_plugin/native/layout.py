"""Where the elements of a tensor stand in another: layout operations, run once on a tensor of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..integer.kernels import KERNELS
from ..integer.program import Op

__all__ = ['LAYOUT', 'Shape', 'View', 'shape_after', 'view_through']

Shape = tuple[int, ...]

#: Operations that only move codes.
LAYOUT = frozenset({'reshape', 'permute', 'select', 'crop', 'roll', 'pad_map', 'patches'})


@dataclass(frozen=True)
class View:
    """A tensor whose elements are those of another, for each image.

    Args:
        base: name of the other tensor.
        index: shaped as the tensor for one image (its first axis may hold several groups); an element of ``base``, or
            -1 for padding.
        size: elements of ``base`` for one image.
        fill: what padding holds, stored; 0 where there is none.
    """

    base: str
    index: Tensor
    size: int
    fill: int

    @cached_property
    def identity(self) -> bool:
        """Whether nothing moves."""
        flat = self.index.flatten()
        return len(flat) == self.size and torch.equal(flat, torch.arange(self.size))

    def rows(self, channels: int) -> Tensor | None:
        """(rows,) the row of ``base`` that each row is, -1 for padding; None unless whole rows move.

        Args:
            channels: of a row of ``base``.
        """
        if self.index.shape[-1] != channels:
            return None
        rows = self.index.reshape(-1, channels)
        first = rows[:, 0]
        inside = (rows == first[:, None] + torch.arange(channels)).all(1) & (first >= 0) & (first % channels == 0)
        padding = (rows == -1).all(1)
        if not bool((inside | padding).all()):
            return None
        return torch.where(padding, -1, first // channels)

    def runs(self) -> tuple[int, Tensor]:
        """The longest runs of neighbours that all of it is made of, and where each begins (-1: padding)."""
        flat = self.index.flatten()
        padding = flat < 0
        follows = (flat[1:] == flat[:-1] + 1) & ~padding[1:] & ~padding[:-1] | padding[1:] & padding[:-1]
        breaks = (~follows).nonzero().flatten() + 1
        run = int(torch.gcd(breaks, torch.full_like(breaks, len(flat))).min()) if len(breaks) else len(flat)
        while len(breaks) and bool((breaks % run).any()):  # the smallest gcd need not divide the others
            run = int(torch.gcd(breaks, torch.full_like(breaks, run)).min())
        return run, flat[::run].clone()


def shape_after(op: Op, shapes: Sequence[Shape], constants: dict[str, Shape]) -> Shape:
    """The shape of an operation's result.

    Args:
        shapes: of its inputs.
        constants: of its constants, by the kernel's keyword.

    Raises:
        ValueError: an operation that is not known here.
    """
    if op.kind in LAYOUT:
        return tuple(KERNELS[op.kind](torch.empty(shapes[0], device='meta'), **op.settings).shape)
    if op.kind == 'linear':
        return (*shapes[0][:-1], constants['weight'][0])
    if op.kind == 'matmul':
        return (*shapes[0][:-1], shapes[1][-1])
    if op.kind == 'attend':
        return (*shapes[0][:-1], shapes[1][-1])
    if op.kind == 'add':
        return tuple(torch.broadcast_shapes(*shapes))
    if op.kind == 'constant':
        return constants['value']
    if op.kind == 'prepend':
        return (shapes[0][0], shapes[0][1] + constants['tokens'][0], shapes[0][2])
    if op.kind == 'mean_sums':
        dims = {d % len(shapes[0]) for d in op.settings['dims']}
        return tuple(s for d, s in enumerate(shapes[0]) if d not in dims)
    if op.kind in ('affine', 'lookup', 'quantize', 'layernorm'):
        return shapes[0]
    raise ValueError(f'{op.output}: the native engine does not know the kernel {op.kind}')


def view_through(ops: Sequence[Op], base: str, shape: Shape) -> View | None:
    """What ``ops``, layout operations in order, make of ``base``; None where images would mix.

    Args:
        shape: of ``base``, for two images.
    """
    size = 1
    for s in shape:
        size *= s
    index = torch.arange(size).view(shape)
    fill: int | None = None
    for op in ops:
        settings = dict(op.settings)
        if op.kind in ('pad_map', 'patches'):
            if fill not in (None, settings['value']):
                return None
            fill, settings['value'] = settings['value'], -1
        index = KERNELS[op.kind](index, **settings)
    if index.ndim == 0 or index.shape[0] % 2:
        return None
    first, second = index.chunk(2)
    if int(first.max()) >= size // 2 or not torch.equal(second, torch.where(first < 0, -1, first + size // 2)):
        return None
    return View(base, first, size // 2, fill or 0)
