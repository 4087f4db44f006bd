"""From a program to the steps that run on the GPU: which operations become one kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..integer.program import Op, Program
from .steps import Attention, FusedLinear, FusedNorm, PlainKernel, ResidualAdd, Step

__all__ = ['plan']


def plan(program: Program) -> list[Step]:
    """The steps of ``program``, in order.

    Fused: linear + affine [+ lookup], and matmul + affine [+ add] + attend, where nothing else reads what stands
    between. LayerNorm and residual sums have a kernel each; everything else runs as in the integer model.
    """
    return list(_Planner(program).steps())


class _Planner:
    def __init__(self, program: Program) -> None:
        self._program = program
        uses = Counter(name for op in program.ops for name in op.inputs)
        uses[program.output] += 1
        self._reader = {n: op for op in program.ops for n in op.inputs if uses[n] == 1}
        self._maker = {op.output: op for op in program.ops}

    def steps(self) -> Iterator[Step]:
        late: dict[str, Step] = {}  # a fused step runs where its last operation stood: its inputs are there by then
        fused: set[str] = set()
        for op in self._program.ops:
            found = self._fuse(op)
            if found is not None:
                ops, step = found
                fused.update(o.output for o in ops)
                late[ops[-1].output] = step
            if op.output in late:
                yield late.pop(op.output)
            elif op.output not in fused:
                yield self._single(op)

    def _fuse(self, op: Op) -> tuple[list[Op], Step] | None:
        if op.kind == 'linear':
            return self._linear(op)
        return self._attention(op) if op.kind == 'matmul' else None

    def _single(self, op: Op) -> Step:
        if op.kind == 'layernorm':
            return FusedNorm(op.inputs, op.output, self._arguments(op))
        if op.kind == 'add':
            return ResidualAdd(op.inputs, op.output, self._arguments(op))
        return PlainKernel(op, self._program.constants)

    def _arguments(self, op: Op) -> dict[str, Any]:
        return {**{k: self._program.constants[name] for k, name in op.constants.items()}, **op.settings}

    def _next(self, op: Op, kind: str) -> Op | None:
        """The only reader of ``op``'s result, if it is of this kind."""
        reader = self._reader.get(op.output)
        return reader if reader is not None and reader.kind == kind else None

    def _linear(self, op: Op) -> tuple[list[Op], Step] | None:
        affine = self._next(op, 'affine')
        if affine is None or self._arguments(affine)['offset'].ndim > 1:
            return None
        ops, table = [op, affine], None
        lookup = self._next(affine, 'lookup')
        if lookup is not None:
            ops.append(lookup)
            table = self._arguments(lookup)['table']
        step = FusedLinear(op.inputs, ops[-1].output, self._arguments(op), self._arguments(affine), table)
        return ops, step

    def _attention(self, op: Op) -> tuple[list[Op], Step] | None:
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
