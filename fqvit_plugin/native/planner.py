"""Turns an integer program into fused steps. What belongs together is found by pattern; the rest stays with torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..integer.program import Op, Program
from . import constants as made
from .attention import attention_step
from .layout import LAYOUT, Shape, View, shape_after, view_through
from .structs import NativeStep

__all__ = ['Plan', 'Planner', 'TorchStep']


@dataclass(frozen=True)
class TorchStep:
    """An operation that has no native form: the kernel runs it.

    Args:
        reads: of its inputs, those that lie in buffers: name -> buffer, and shape for two images.
        stored: whether its codes go into a buffer too.
    """

    op: Op
    reads: dict[str, tuple[str, Shape]]
    stored: bool

    @property
    def output(self) -> str:
        """The name of its result."""
        return self.op.output

    @property
    def inputs(self) -> list[str]:
        """The buffers that it reads."""
        return [buffer for buffer, _ in self.reads.values()]


@dataclass
class Plan:
    """Steps in order.

    Args:
        steps: of the engine and of torch.
        shapes: of every tensor of codes that lies in a buffer, for two images.
        values: constants that torch's steps read.
        output: the buffer, or the value of a torch step, with the logits' codes.
        hidden: buffers that are no tensors of the program.
    """

    steps: list[NativeStep | TorchStep] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    output: str = ''
    hidden: set[str] = field(default_factory=set)


class Planner:
    """Makes the plan of one program.

    Args:
        program: to run.
        library: the compiled engine, which packs weights.
    """

    def __init__(self, program: Program, library: Any) -> None:
        self.program = program
        self.library = library
        self._plan = Plan()
        self.maker = {op.output: op for op in program.ops}
        self.users: dict[str, list[Op]] = {}
        for op in program.ops:
            for name in op.inputs:
                self.users.setdefault(name, []).append(op)
        self.shapes: dict[str, Shape] = {'image': (2, 3, *program.image_size)}
        for op in program.ops:
            sizes = {k: tuple(program.constants[name].shape) for k, name in op.constants.items()}
            self.shapes[op.output] = shape_after(op, [self.shapes[n] for n in op.inputs], sizes)
        self._done: set[str] = set()
        # tensors whose channels lie in another order: the buffer, and where each channel comes from
        self._reordered: dict[str, tuple[str, Tensor]] = {}

    def plan(self) -> Plan:
        """The steps."""
        known: dict[str, Callable[[Op], bool]] = {
            'quantize': self._quantize,
            'constant': self._constant,
            'linear': self._linear,
            'matmul': self._matmul,
            'layernorm': self._layernorm,
            'add': self._add,
            'lookup': self._lookup,
            'prepend': self._prepend,
            'mean_sums': self._mean,
            **dict.fromkeys(LAYOUT, self._layout),
        }
        for op in self.program.ops:
            if op.output not in self._done and not known.get(op.kind, lambda op: False)(op):
                self._with_torch(op)
        output = self.program.output
        self._plan.output = output if output in self._plan.values else self.place(output) or output
        return self._plan

    # ---------------------------------------------------------------- tensors

    def constants(self, op: Op) -> dict[str, Tensor]:
        """The constants of an operation, by the kernel's keyword."""
        return {k: self.program.constants[name].cpu() for k, name in op.constants.items()}

    def size(self, name: str) -> int:
        """Elements for one image."""
        return torch.Size(self.shapes[name]).numel() // 2

    def only_user(self, name: str) -> Op | None:
        """The operation that alone reads ``name``."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name != self.program.output else None

    def emit(self, kind: str, output: str, done: list[str], **fields: Any) -> bool:
        """Add a step that writes ``output`` and stands for the operations named ``done``; true."""
        self._plan.steps.append(NativeStep(kind, {'y': output, **fields}))
        self._plan.shapes[output] = self.shapes[output]
        self._done.update(done)
        return True

    def view(self, name: str) -> View | None:
        """Where the elements of ``name`` stand in a buffer; None if they are in none."""
        ops: list[Op] = []
        base = name
        while base not in self._plan.shapes:
            op = self.maker.get(base)
            if op is None or op.kind not in LAYOUT:
                return None
            ops.insert(0, op)
            base = op.inputs[0]
        return view_through(ops, base, self.shapes[base])

    def place(self, name: str) -> str | None:
        """A buffer with the elements of ``name`` in order, made if need be; None if there can be none."""
        if name in self._plan.shapes:
            return name
        view = self.view(name)
        if view is None:
            return None
        if view.identity:
            return view.base
        run, index = view.runs()
        self.emit(
            'gather', name, [name], x=view.base, in_size=view.size, runs=len(index), run=run,
            index=index.int(), fill=(view.fill + 128) % 256,
        )  # fmt: skip
        return name

    def layout_behind(self, name: str) -> tuple[str, list[str]]:
        """The end of the chain of layout operations that alone read ``name``, and all of the chain."""
        chain: list[str] = []
        user = self.only_user(name)
        while user is not None and user.kind in LAYOUT:
            name = user.output
            chain.append(name)
            user = self.only_user(name)
        return name, chain

    # ---------------------------------------------------------------- steps

    def _with_torch(self, op: Op) -> None:
        reads: dict[str, tuple[str, Shape]] = {}
        for name in op.inputs:
            if name == 'image' or name in self._plan.values:
                continue
            buffer = self.place(name)
            if buffer is None:
                self._with_torch(self.maker[name])  # a layout that mixes images, or one of accumulators
            else:
                reads[name] = buffer, self.shapes[name]
        coded = op.output in self.program.grids and self.shapes[op.output][0] % 2 == 0
        coded = coded and self.program.grids[op.output].bits <= 8
        self._plan.steps.append(TorchStep(op, reads, coded))
        self._plan.values[op.output] = torch.empty(0)
        if coded:
            self._plan.shapes[op.output] = self.shapes[op.output]
        self._done.add(op.output)

    def _layout(self, op: Op) -> bool:
        """Codes are moved where they are read; accumulators, which lie in no buffer, by torch."""
        name = op.output
        while name not in self._plan.shapes:
            maker = self.maker.get(name)
            if maker is None or maker.kind not in LAYOUT or name in self._plan.values:
                return False
            name = maker.inputs[0]
        return True

    def _constant(self, op: Op) -> bool:
        self._plan.values[op.output] = self.constants(op)['value']
        return True

    def _quantize(self, op: Op) -> bool:
        settings, scale = op.settings, self.constants(op)['scale']
        if scale.ndim or op.inputs != ('image',):
            return False
        limit = 2 ** (settings['bits'] - 1)
        zero = settings['zero']
        return self.emit(
            'quantize', op.output, [op.output], size=self.size(op.output), scale=float(scale),
            low=-limit - zero, high=limit - 1 - zero, zero=zero + 128,
        )  # fmt: skip

    def _linear(self, op: Op) -> bool:
        affine = self.only_user(op.output)
        x, order = self._reordered.get(op.inputs[0], (op.inputs[0], None))
        if affine is None or affine.kind != 'affine' or self.view(x) is None:
            return False
        weight, zero = self.constants(op)['weight'], op.settings['zero']
        weight = weight if order is None else weight[:, order]
        columns, depth = weight.shape
        lookup = self.only_user(affine.output)
        table = self.constants(lookup)['table'] if lookup is not None and lookup.kind == 'lookup' else None
        bound = made.sum_bound(weight, zero)
        to = made.requant(columns, bound, self.constants(affine), dict(affine.settings), table)
        if to is None:
            return False
        done = [op.output, affine.output]
        output = affine.output
        if table is not None and lookup is not None:
            output = lookup.output
            done.append(output)
        fields: dict[str, Any] = dict(
            x=self.place(x), rows=self.size(op.output) // columns, columns=columns, depth=depth,
            weight=made.packed(self.library, weight), start=made.zero_start(weight, zero), requant=to,
        )  # fmt: skip
        if table is None:
            added = self._residual(output, columns)
            if added is not None:
                output, more, chain = added
                fields |= more
                done += chain
        fields.setdefault('out_rows', fields['rows'])
        return self.emit('gemm', output, done, **fields)

    def _residual(self, name: str, columns: int) -> tuple[str, dict[str, Any], list[str]] | None:
        """The residual sum that ``name`` goes into, by way of layouts that move whole rows."""
        end, chain = self.layout_behind(name)
        add = self.only_user(end)
        if add is None or add.kind != 'add' or add.inputs[0] == add.inputs[1]:
            return None
        other = add.inputs[1] if add.inputs[0] == end else add.inputs[0]
        same = self.shapes[end] == self.shapes[other] == self.shapes[add.output]
        if other not in self._plan.shapes or not same or self.shapes[end][-1] != columns:
            return None
        to = made.sum_fields(columns, self.constants(add), dict(add.settings), swap=add.inputs[1] == end)
        if to is None:
            return None
        fields: dict[str, Any] = dict(residual=other, sum=to, out_rows=self.size(end) // columns)
        if chain:
            view = view_through([self.maker[n] for n in chain], name, self.shapes[name])
            rows = None if view is None else view.rows(columns)
            if rows is None or bool((rows < 0).any()):
                return None
            target = torch.full((self.size(name) // columns,), -1, dtype=torch.int32)
            target[rows] = torch.arange(len(rows), dtype=torch.int32)
            if int((target >= 0).sum()) != len(rows):  # a row that is wanted twice
                return None
            if not torch.equal(target, torch.arange(len(target), dtype=torch.int32)):
                fields['map'] = target
        return add.output, fields, [*chain, add.output]

    def _matmul(self, op: Op) -> bool:
        return attention_step(self, op)

    def _layernorm(self, op: Op) -> bool:
        view, channels = self.view(op.inputs[0]), self.shapes[op.output][-1]
        grid = self.program.grids.get(op.inputs[0])
        bits = grid.bits if grid else 8
        to = made.norm_fields(channels, bits, self.constants(op), dict(op.settings))
        if view is None or to is None:
            return False
        if self._merging(op, view, channels, bits):
            return True
        source = None if self.shapes[view.base][-1] != channels else view.rows(channels)
        if source is None or bool((source < 0).any()):
            self.place(op.inputs[0])
            source = torch.arange(self.size(op.inputs[0]) // channels)
            base = self.place(op.inputs[0])
        else:
            base = view.base
        in_rows = self.size(str(base)) // channels
        output, chain, rows, fill = self._rows_behind(op.output, channels)
        mapped = source if rows is None else torch.where(rows < 0, -1, source[rows.clamp(min=0)])
        if not torch.equal(mapped, torch.arange(in_rows)):
            to['map'] = mapped.int()
        return self.emit(
            'norm', output, [op.output, *chain], x=base, rows=len(mapped), in_rows=in_rows, pieces=1, fill=fill, **to
        )

    def _merging(self, op: Op, view: View, channels: int, bits: int) -> bool:
        """Rows that hold several others channel by channel (patch merging), for a linear layer: side by side instead.

        LayerNorm and linear layer take channels in any order, so theirs is changed, and nothing need be moved.
        """
        user, narrow = self.only_user(op.output), self.shapes[view.base][-1]
        pieces = channels // narrow
        if user is None or user.kind != 'linear' or pieces < 2 or channels % narrow:
            return False
        index = view.index.reshape(-1, narrow, pieces).transpose(1, 2)  # (rows, pieces, channels of a piece)
        sources = View(view.base, index, view.size, view.fill).rows(narrow)
        if sources is None or bool((sources < 0).any()):
            return False
        order = torch.arange(channels).view(narrow, pieces).t().flatten()
        constants = {k: c[order] if c.ndim else c for k, c in self.constants(op).items()}
        to = made.norm_fields(channels, bits, constants, dict(op.settings))
        if to is None:
            return False
        name = f'{op.output}, channels reordered'
        self.shapes[name] = self.shapes[op.output]
        self._plan.hidden.add(name)
        self._reordered[op.output] = name, order
        rows = dict(rows=len(sources) // pieces, in_rows=view.size // narrow, pieces=pieces, map=sources.int())
        return self.emit('norm', name, [op.output], x=view.base, **rows, **to)

    def _rows_behind(self, name: str, channels: int) -> tuple[str, list[str], Tensor | None, int]:
        """The last tensor that layouts alone make of ``name`` by moving rows: it, the way, the rows, the padding."""
        _, chain = self.layout_behind(name)
        for end in range(len(chain), 0, -1):
            view = view_through([self.maker[n] for n in chain[:end]], name, self.shapes[name])
            rows = None if view is None else view.rows(channels)
            if view is not None and rows is not None:
                return chain[end - 1], chain[:end], rows, (view.fill + 128) % 256
        return name, [], None, 0

    def _add(self, op: Op) -> bool:
        columns = self.shapes[op.output][-1]
        a, b = op.inputs
        constant = None
        swap = a in self._plan.values and a not in self._plan.shapes
        if swap:
            a, b = b, a
        to = made.sum_fields(columns, self.constants(op), dict(op.settings), swap)
        if to is None or self.view(a) is None or self.shapes[a] != self.shapes[op.output]:
            return False
        if b in self._plan.values and b not in self._plan.shapes:
            constant = self._plan.values[b]
            shape = (self.shapes[op.output][0] // 2, *self.shapes[op.output][1:])
            if constant.dtype is not torch.int8 or torch.broadcast_shapes(constant.shape, shape) != shape:
                return False
            constant = constant.expand(shape)
            constant = (constant.to(torch.int16) + 128).to(torch.uint8).contiguous()
        elif self.view(b) is None or self.shapes[b] != self.shapes[op.output]:
            return False
        fields: dict[str, Any] = dict(b=self.place(b)) if constant is None else dict(constant=constant)
        rows = self.size(op.output) // columns
        return self.emit('add', op.output, [op.output], a=self.place(a), rows=rows, columns=columns, sum=to, **fields)

    def _lookup(self, op: Op) -> bool:
        table = self.constants(op)['table']
        if self.view(op.inputs[0]) is None or len(table) > 256:
            return False
        around = (256 - len(table)) // 2  # codes of fewer bits lie in the middle of the bytes
        whole = torch.zeros(256, dtype=torch.uint8)
        whole[around : 256 - around] = made.table_of(table)[: len(table)]
        x = self.place(op.inputs[0])
        return self.emit('lookup', op.output, [op.output], x=x, size=self.size(op.output), table=whole)

    def _prepend(self, op: Op) -> bool:
        tokens = self.constants(op)['tokens']
        if self.view(op.inputs[0]) is None:
            return False
        tokens = (tokens.to(torch.int16) + 128).to(torch.uint8).contiguous()
        sizes = dict(in_size=self.size(op.inputs[0]), size=self.size(op.output))
        return self.emit('prepend', op.output, [op.output], x=self.place(op.inputs[0]), tokens=tokens, **sizes)

    def _mean(self, op: Op) -> bool:
        affine, shape, zero = self.only_user(op.output), self.shapes[op.inputs[0]], op.settings['zero']
        tokens = len(shape) == 3 and [d % 3 for d in op.settings['dims']] == [1]
        if affine is None or affine.kind != 'affine' or not tokens or self.view(op.inputs[0]) is None:
            return False
        bound = torch.tensor(255.0 * shape[1], dtype=torch.float64)
        to = made.requant(shape[2], bound, self.constants(affine), dict(affine.settings))
        if to is None:
            return False
        start = -(zero + 128) * shape[1]
        return self.emit(
            'mean', affine.output, [op.output, affine.output], x=self.place(op.inputs[0]), rows=shape[1],
            columns=shape[2], start=start, requant=to,
        )  # fmt: skip
