"""Integer checkpoints: one safetensors file that needs no config, no float weights, no data and no pickle.

Three kinds of tensors: each layer's weights, in int8 or of 4 bits two to a byte, deflated; every other constant, and
the numbers of grids, one after the other in a compressed block; and the program, compressed JSON. ``docs/integer.md``
specifies them.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .packing import apart, fits, pack, unpack
from .program import Grid, IntegerModel, Op, Program

__all__ = ['FORMAT', 'VERSION', 'load_integer', 'save_integer']

FORMAT = 'fqvit_plugin.integer'
VERSION = 5

#: Argument of the ``linear`` kernel: what its constants' names end in, and what is stored under its own name.
_WEIGHT = ':weight'
#: What stands behind a weight's name among the constants: factors of 4-bit weights, and the group of each column.
_FACTORS, _GROUPS = ':factors', ':groups'
#: Numbers of a grid that are stored as ``NAME#scale`` and so on: no name in the program has a ``#``.
_GRID = ('scale', 'zero', 'far')
_DTYPES = {
    str(dtype).removeprefix('torch.'): dtype
    for dtype in (
        torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64
    )
}  # fmt: skip


def save_integer(model: IntegerModel, path: str | os.PathLike, meta: dict[str, str] | None = None) -> int:
    """Write ``model``; gives the size of the file in bytes.

    Args:
        path: replaced only when everything is written.
        meta: texts that travel along, ``classes`` for instance.
    """
    tensors: dict[str, Tensor] = {}
    packed: dict[str, list[int]] = {}
    whole: dict[str, list[int]] = {}
    layout: dict[str, Any] = {}
    block = bytearray()

    def put(name: str, value: Tensor) -> None:
        layout[name] = [str(value.dtype).removeprefix('torch.'), list(value.shape)]
        block.extend(value.numpy().tobytes())

    for name, value in model.program.constants.items():
        groups = model.program.groups.get(name)
        if not name.endswith(_WEIGHT):
            put(name, value)
            continue
        if not fits(value, 4) and groups is not None and (parts := apart(value, groups)) is not None:
            value, factors = parts
            put(name + _FACTORS, pack(factors))
            put(name + _GROUPS, groups)
        shapes, stored = (packed, pack(value)) if fits(value, 4) else (whole, value)
        shapes[name], tensors[name] = list(value.shape), _deflate(stored.numpy().tobytes())
    for name, grid in model.program.grids.items():
        put(f'{name}#scale', _floats(grid.scale))
        put(f'{name}#zero', torch.tensor(grid.zero, dtype=torch.int32))
        if grid.far:
            put(f'{name}#far', torch.tensor(grid.far, dtype=torch.int32))
    program = {
        'ops': [dataclasses.asdict(op) for op in model.program.ops],
        'output': model.program.output,
        'image_size': model.program.image_size,
        'grids': {name: grid.bits for name, grid in model.program.grids.items()},
        'int4': packed,
        'int8': whole,
        'constants': layout,
    }
    tensors['constants'] = _compress(bytes(block))
    tensors['program'] = _compress(json.dumps(program, separators=(',', ':')).encode())
    target = Path(path)
    draft = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    try:
        save_file(tensors, draft, {**(meta or {}), 'format': FORMAT, 'version': str(VERSION)})
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target.stat().st_size


def load_integer(path: str | os.PathLike) -> IntegerModel:
    """The integer model that :func:`save_integer` wrote.

    Raises:
        ValueError: no such file, not an integer checkpoint, one of another version, or a damaged one.
    """
    if not Path(path).is_file():
        raise ValueError(f'there is no integer checkpoint {path}')
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f'{path} is not a safetensors file: {error}') from None
    try:
        program = _program(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f'{path} is a damaged integer checkpoint, export it again: {error!r}') from None
    model = IntegerModel(program).eval()
    model.meta = {k: v for k, v in metadata.items() if k not in ('format', 'version')}
    return model


def _check_version(path: str | os.PathLike, metadata: dict[str, str]) -> None:
    if metadata.get('format') != FORMAT:
        raise ValueError(f'{path} is no integer checkpoint: its header does not say {FORMAT!r}')
    found = metadata.get('version', '')
    if not found.isdigit() or int(found) < VERSION:
        raise ValueError(f'{path} has version {found}, from before the first release: export it again')
    if int(found) > VERSION:
        raise ValueError(f'{path} has version {found}; this fqvit_plugin reads version {VERSION}: update it')


def _program(tensors: dict[str, Tensor]) -> Program:
    stored = json.loads(_decompress(tensors['program']))
    constants = _unpack_block(stored['constants'], _decompress(tensors['constants']))
    groups = {}
    for name, tensor in tensors.items():
        if not name.endswith(_WEIGHT):
            continue
        data = torch.frombuffer(_inflate(tensor), dtype=torch.uint8)
        if name in stored['int4']:
            constants[name] = unpack(data, *stored['int4'][name])
        else:
            constants[name] = data.view(torch.int8).view(stored['int8'][name])
        if name + _GROUPS in constants:
            groups[name] = of_columns = constants.pop(name + _GROUPS)
            factors = unpack(constants.pop(name + _FACTORS), len(constants[name]), int(of_columns.max()) + 1) & 15
            constants[name] *= factors[:, of_columns]
    ops = tuple(Op(**{**op, 'inputs': tuple(op['inputs'])}) for op in stored['ops'])
    names = dict.fromkeys(name for op in ops for name in op.constants.values())
    grids = {
        name: Grid(bits=bits, **{f: tuple(constants[n].tolist()) for f in _GRID if (n := f'{name}#{f}') in constants})
        for name, bits in stored['grids'].items()
    }
    height, width = stored['image_size']
    return Program(ops, {name: constants[name] for name in names}, stored['output'], grids, (height, width), groups)


def _unpack_block(layout: dict[str, Any], block: bytearray) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, (kind, shape) in layout.items():
        dtype, count = _DTYPES[kind], math.prod(shape)
        stop = start + count * dtype.itemsize
        # a copy of its own: numbers in the block lie at any offset, and the block can be freed
        found[name] = torch.frombuffer(block[start:stop], dtype=dtype).view(shape)
        start = stop
    if start != len(block):
        raise ValueError(f'its constants take {start} bytes, and {len(block)} are stored')
    return found


def _floats(values: tuple[float, ...]) -> Tensor:
    """In float32 where that holds them exactly."""
    wide = torch.tensor(values, dtype=torch.float64)
    return narrow if torch.equal((narrow := wide.float()).double(), wide) else wide


def _compress(data: bytes) -> Tensor:
    """For what repeats itself: a sixth smaller than deflated."""
    return torch.frombuffer(bytearray(lzma.compress(data, preset=lzma.PRESET_EXTREME | 6)), dtype=torch.uint8)


def _decompress(stored: Tensor) -> bytearray:
    return bytearray(lzma.decompress(stored.numpy().tobytes()))


def _deflate(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data, 9)), dtype=torch.uint8)


def _inflate(stored: Tensor) -> bytearray:
    return bytearray(zlib.decompress(stored.numpy().tobytes()))
