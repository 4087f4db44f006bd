"""From a program to the steps that run on the GPU: which operations become one kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..integer.program import Op, Program
from ..native.layout import LAYOUT, Shape, View, shape_after, view_through
from .base import PlainKernel, Step
from .packing import pack_table
from .steps import Attention, FusedLinear, FusedNorm, ImagePatches, ResidualAdd, RowMap

__all__ = ['plan']

#: The operations that a step stands for, and the step.
_Found = tuple[list[Op], Step]


def plan(program: Program) -> list[Step]:
    """The steps of ``program``, in order.

    Fused, where nothing else reads what stands between: quantize + patches; linear + affine [+ lookup]; matmul +
    affine [+ add] + attend; [layouts of a + add a, b +] layernorm [+ layouts that move whole rows]. Other residual
    sums have a kernel too; everything else runs as in the integer model.
    """
    return list(_Planner(program).steps())


class _Planner:
    def __init__(self, program: Program) -> None:
        self._program = program
        uses = Counter(name for op in program.ops for name in op.inputs)
        uses[program.output] += 1
        self._reader = {n: op for op in program.ops for n in op.inputs if uses[n] == 1}
        self._maker = {op.output: op for op in program.ops}
        self._shapes: dict[str, Shape] = {'image': (2, 3, *program.image_size)}
        for op in program.ops:
            sizes = {k: tuple(program.constants[name].shape) for k, name in op.constants.items()}
            self._shapes[op.output] = shape_after(op, [self._shapes[n] for n in op.inputs], sizes)

    def steps(self) -> Iterator[Step]:
        late: dict[str, Step] = {}  # a fused step runs where its last operation stood: its inputs are there by then
        fused: set[str] = set()
        for i, op in enumerate(self._program.ops):
            found = None if op.output in fused else self._fuse(op, self._program.ops[i + 1 : i + 2])
            if found is not None:
                ops, step = found
                fused.update(o.output for o in ops)
                late[ops[-1].output] = step
        for op in self._program.ops:
            if op.output in late:
                yield late[op.output]
            elif op.output not in fused:
                yield self._single(op)

    def _fuse(self, op: Op, following: Sequence[Op]) -> _Found | None:
        if op.kind == 'quantize':
            return self._patches(op)
        if op.kind == 'linear':
            return self._linear(op)
        if op.kind == 'matmul':
            return self._attention(op)
        if op.kind == 'layernorm':
            return self._norm(op)
        normalized = following and following[0].kind == 'layernorm' and following[0].inputs == (op.output,)
        return self._added_norm(op, following[0]) if op.kind == 'add' and normalized else None

    def _single(self, op: Op) -> Step:
        if op.kind == 'add':
            return ResidualAdd(op.inputs, op.output, self._arguments(op))
        return PlainKernel(op, self._program.constants)

    def _arguments(self, op: Op) -> dict[str, Any]:
        return {**{k: self._program.constants[name] for k, name in op.constants.items()}, **op.settings}

    def _next(self, op: Op, kind: str) -> Op | None:
        """The only reader of ``op``'s result, if it is of this kind."""
        reader = self._reader.get(op.output)
        return reader if reader is not None and reader.kind == kind else None

    def _patches(self, op: Op) -> _Found | None:
        patches, numbers = self._next(op, 'patches'), self._arguments(op)
        if patches is None or numbers['scale'].numel() > 1 or op.inputs != ('image',):
            return None
        return [op, patches], ImagePatches(op.inputs, patches.output, numbers, patches.settings)

    def _linear(self, op: Op) -> _Found | None:
        affine = self._next(op, 'affine')
        if affine is None or self._arguments(affine)['offset'].ndim > 1:
            return None
        ops, table = [op, affine], None
        lookup = self._next(affine, 'lookup')
        if lookup is not None:
            table = self._arguments(lookup)['table']
            if len(table) > 256 and pack_table(table) is None:
                table = None
            else:
                ops.append(lookup)
        step = FusedLinear(op.inputs, ops[-1].output, self._arguments(op), self._arguments(affine), table)
        return ops, step

    # ---------------------------------------------------------------- LayerNorm

    def _norm(self, op: Op) -> _Found:
        before, base = self._layouts_before(op.inputs[0])
        view = view_through(before, base, self._shapes[base]) if before else None
        source = None if view is None else _source(view, self._shapes[op.output][-1])
        if source is None:
            before, base = [], op.inputs[0]
        behind, target = self._rows_behind(op)
        ops = [*before, op, *behind]
        shape = self._shapes[ops[-1].output][1:]
        step = FusedNorm((base,), [ops[-1].output], self._arguments(op), None, source, target, shape)
        return ops, step

    def _added_norm(self, add: Op, norm: Op) -> _Found | None:
        channels = self._shapes[add.output][-1]
        numbers = self._arguments(add)
        if add.inputs[0] == add.inputs[1] or any(self._shapes[n] != self._shapes[add.output] for n in add.inputs):
            return None
        a, b = add.inputs
        before, base, source = self._moved_rows(a, channels)
        if not before and self._moved_rows(b, channels)[0]:
            a, b = b, a
            before, base, source = self._moved_rows(a, channels)
            swapped = {f'{k}_{x}': f'{k}_{y}' for k in ('gain', 'zero', 'far') for x, y in ('ab', 'ba')}
            numbers = {swapped.get(k, k): v for k, v in numbers.items()}
        behind, target = self._rows_behind(norm)
        ops = [*before, add, norm, *behind]
        shape = self._shapes[ops[-1].output][1:]
        outputs = [add.output, ops[-1].output]
        return ops, FusedNorm((base, b), outputs, self._arguments(norm), numbers, source, target, shape)

    def _layouts_before(self, name: str) -> tuple[list[Op], str]:
        """The layout operations that ``name`` comes from and that serve it alone, and what they start from."""
        chain: list[Op] = []
        while name in self._maker and self._maker[name].kind in LAYOUT and name in self._reader:
            chain.insert(0, self._maker[name])
            name = chain[0].inputs[0]
        return chain, name

    def _moved_rows(self, name: str, channels: int) -> tuple[list[Op], str, RowMap | None]:
        """Layouts before ``name`` that only change the order of its rows, what they start from, and the rows."""
        chain, base = self._layouts_before(name)
        rows = self._order(chain, base, channels)
        return ([], name, None) if rows is None else (chain, base, RowMap(rows, len(rows)))

    def _rows_behind(self, op: Op) -> tuple[list[Op], Tensor | None]:
        """Layouts behind ``op`` that only change the order of its rows, and where each row goes."""
        chain: list[Op] = []
        name = op.output
        while name in self._reader and self._reader[name].kind in LAYOUT:
            chain.append(self._reader[name])
            name = chain[-1].output
        for end in range(len(chain), 0, -1):
            rows = self._order(chain[:end], op.output, self._shapes[op.output][-1])
            if rows is not None:
                return chain[:end], torch.argsort(rows)
        return [], None

    def _order(self, chain: Sequence[Op], base: str, channels: int) -> Tensor | None:
        """The order that layouts bring the rows of ``base`` into; None unless each row is there once."""
        if not chain or self._shapes[base][-1] != channels:
            return None
        view = view_through(chain, base, self._shapes[base])
        rows = None if view is None else view.rows(channels)
        if view is None or rows is None or not torch.equal(rows.sort()[0], torch.arange(view.size // channels)):
            return None
        return rows

    # ---------------------------------------------------------------- attention

    def _attention(self, op: Op) -> _Found | None:
        affine = self._next(op, 'affine')
        if affine is None or not _single_numbers(self._arguments(affine)):
            return None
        ops, last, bias, sum_arguments = [op, affine], affine, None, None
        add = self._next(affine, 'add')
        if add is not None:
            sum_arguments, bias = self._arguments(add), self._bias(add, affine)
            if bias is None or not _single_numbers(sum_arguments):
                return None
            ops.append(add)
            last = add
        attend = self._next(last, 'attend')
        if attend is None or attend.inputs[0] != last.output:
            return None
        ops.append(attend)
        inputs = (*op.inputs, attend.inputs[1])
        matmul, rescale, mean = (self._arguments(o) for o in (op, affine, attend))
        return ops, Attention(inputs, attend.output, matmul, rescale, sum_arguments, bias, mean)

    def _bias(self, add: Op, affine: Op) -> Tensor | None:
        """The constant that ``add`` adds to the scores."""
        if add.inputs[0] != affine.output or add.inputs[1] not in self._maker:
            return None
        constant = self._maker[add.inputs[1]]
        if constant.kind != 'constant':
            return None
        value: Tensor = self._arguments(constant)['value']
        return value if value.ndim == 3 else None


def _single_numbers(arguments: dict[str, Any]) -> bool:
    return all(v.numel() == 1 for v in arguments.values() if isinstance(v, Tensor))


def _source(view: View, channels: int) -> RowMap | None:
    """Rows of the base if whole ones move, else its elements; None if there is padding."""
    if bool((view.index < 0).any()):
        return None
    rows = view.rows(channels)
    if rows is not None:
        return RowMap(rows, view.size // channels)
    return RowMap(view.index.reshape(-1, channels), view.size)
