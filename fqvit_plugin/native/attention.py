"""Finds attention in a program: products of queries and keys, logits, Log-Int-Softmax, product with the values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..integer.program import Op
from . import constants as made
from .layout import View, view_through

if TYPE_CHECKING:
    from .planner import Planner

__all__ = ['attention_step']


def attention_step(planner: Planner, matmul: Op) -> bool:
    """Plan the attention that begins with ``matmul``; false where it is not one, or not one that the engine has."""
    parts = _parts(planner, matmul)
    if parts is None:
        return False
    affine, add, attend = parts
    queries, keys, values = matmul.inputs[0], matmul.inputs[1], attend.inputs[1]
    heads = _heads(planner, queries, keys, values)
    if heads is None:
        return False
    groups, count, n, depth = _per_image(planner, queries)
    t, value_depth = planner.shapes[values][2:]
    fields = made.attend_fields(planner.constants(attend), dict(attend.settings), t)
    bound = torch.tensor(2.0**16 * depth, dtype=torch.float64)
    logits = made.requant(1, bound, planner.constants(affine), dict(affine.settings))
    if fields is None or logits is None or any(c.numel() != 1 for c in planner.constants(affine).values()):
        return False
    done = [matmul.output, affine.output, attend.output]
    if add is not None:
        bias = _bias(planner, add, affine.output, (count, n, t))
        if bias is None:
            return False
        fields |= bias
        done.append(add.output)
    output, chain, to = _target(planner, attend.output, groups, count, n, value_depth)
    fields |= heads | to | dict(groups=groups, heads=count, queries=n, keys=t, depth=depth, value_depth=value_depth)
    zeros = dict(zero_q=matmul.settings['zero_a'], zero_k=matmul.settings['zero_b'])
    return planner.emit('attention', output, [*done, *chain], logits=logits, **fields, **zeros)


def _parts(planner: Planner, matmul: Op) -> tuple[Op, Op | None, Op] | None:
    """Affine, sum with a bias if there is one, and attend."""
    affine = planner.only_user(matmul.output)
    if affine is None or affine.kind != 'affine':
        return None
    behind = planner.only_user(affine.output)
    add = behind if behind is not None and behind.kind == 'add' else None
    attend = behind if add is None else planner.only_user(add.output)
    logits = affine.output if add is None else add.output
    if attend is None or attend.kind != 'attend' or attend.inputs[0] != logits or attend.inputs[1] == logits:
        return None
    return affine, add, attend


def _per_image(planner: Planner, name: str) -> tuple[int, int, int, int]:
    groups, heads, rows, columns = planner.shapes[name]
    return groups // 2, heads, rows, columns


def _heads(planner: Planner, queries: str, keys: str, values: str) -> dict[str, Any] | None:
    """Where queries, keys and values stand."""
    fields: dict[str, Any] = {}
    for letter, name in zip('qkv', (queries, keys, values), strict=True):
        if len(planner.shapes[name]) != 4:
            return None
        view = planner.view(name)
        strides = None if view is None else _strides(view, transposed=letter == 'k')
        if view is None or strides is None:
            return None
        first, size, head, row = strides
        fields |= {
            letter: view.base, f'{letter}_first': first, f'{letter}_size': size, f'{letter}_head': head,
            f'{letter}_row': row,
        }  # fmt: skip
    return fields


def _strides(view: View, transposed: bool) -> tuple[int, int, int, int] | None:
    """First element, and what lies between groups, heads and rows; None if the elements are not spaced so."""
    index = view.index.transpose(2, 3) if transposed else view.index  # (groups, heads, rows, depth)
    groups, heads, rows, depth = index.shape
    first = int(index[0, 0, 0, 0])
    size = int(index[1, 0, 0, 0]) - first if groups > 1 else view.size
    head = int(index[0, 1, 0, 0]) - first if heads > 1 else 0
    row = int(index[0, 0, 1, 0]) - first if rows > 1 else 0
    expected: Tensor = first + torch.arange(depth)
    for count, stride in ((rows, row), (heads, head), (groups, size)):
        lead = (torch.arange(count) * stride).view(-1, *[1] * expected.ndim)
        expected = expected + lead
    if not torch.equal(index, expected) or groups * size != view.size:
        return None
    return first, size, head, row


def _bias(planner: Planner, add: Op, scores: str, shape: tuple[int, int, int]) -> dict[str, Any] | None:
    """The constant that is summed onto the scores."""
    swap = add.inputs[1] == scores
    other = planner.maker.get(add.inputs[0] if swap else add.inputs[1])
    constants = planner.constants(add)
    if other is None or other.kind != 'constant' or any(c.numel() != 1 for c in constants.values()):
        return None
    value = planner.constants(other)['value']
    to = made.sum_fields(1, constants, dict(add.settings), swap)
    if (
        to is None
        or value.dtype is not torch.int8
        or torch.Size(shape) != value.shape[-3:]
        or value.numel() != torch.Size(shape).numel()
    ):
        return None
    return dict(bias=(value.to(torch.int16) + 128).to(torch.uint8).contiguous(), sum=to)


def _target(
    planner: Planner, name: str, groups: int, heads: int, rows: int, depth: int
) -> tuple[str, list[str], dict[str, int]]:
    """Where the result goes: heads side by side, if that is what the layouts behind it make of it."""
    _, chain = planner.layout_behind(name)
    side_by_side = torch.arange(groups * heads * rows * depth).view(groups, heads, rows, depth)
    side_by_side = side_by_side.transpose(1, 2).flatten()
    for end in range(len(chain), 0, -1):
        view = view_through([planner.maker[n] for n in chain[:end]], name, planner.shapes[name])
        if view is not None and torch.equal(view.index.flatten(), side_by_side):
            to = dict(y_row=heads * depth, y_head=depth, y_size=rows * heads * depth)
            return chain[end - 1], chain[:end], to
    return name, [], dict(y_row=depth, y_head=rows * depth, y_size=heads * rows * depth)
