"""Integer checkpoints: one safetensors file that needs no config, no float weights, no data and no pickle.

The header's metadata hold the program as JSON; the tensors are its constants. Two encodings save space: ``int4``
packs two weights into a byte, ``runs`` keeps where a table changes and to what. ``docs/integer.md`` specifies both.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .program import Grid, IntegerModel, Op, Program

__all__ = ['FORMAT', 'VERSION', 'load_integer', 'save_integer']

FORMAT = 'fqvit_plugin.integer'
VERSION = 1


def save_integer(model: IntegerModel, path: str | os.PathLike, meta: dict[str, str] | None = None) -> int:
    """Write ``model``; gives the size of the file in bytes.

    Args:
        path: replaced only when everything is written.
        meta: texts that travel along, ``classes`` for instance.
    """
    tensors: dict[str, Tensor] = {}
    encodings: dict[str, Any] = {}
    for name, value in model.program.constants.items():
        stored, encoding = _encode(value)
        tensors.update({name if not part else f'{name}/{part}': t for part, t in stored.items()})
        if encoding:
            encodings[name] = encoding
    grids: dict[str, Any] = {}
    for name, grid in model.program.grids.items():
        grids[name] = {'zero': grid.zero, 'bits': grid.bits}
        if len(grid.scale) == 1:
            grids[name]['scale'] = grid.scale
        else:
            tensors[f'{name}/scale'] = torch.tensor(grid.scale, dtype=torch.float32)
    program = {
        'ops': [dataclasses.asdict(op) for op in model.program.ops],
        'output': model.program.output,
        'image_size': model.program.image_size,
        'grids': grids,
        'encodings': encodings,
    }
    metadata = {'format': FORMAT, 'version': str(VERSION), 'program': json.dumps(program, separators=(',', ':'))}
    target = Path(path)
    draft = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    try:
        save_file(tensors, draft, {**(meta or {}), **metadata})
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target.stat().st_size


def load_integer(path: str | os.PathLike) -> IntegerModel:
    """The integer model that :func:`save_integer` wrote.

    Raises:
        ValueError: no such file, not an integer checkpoint, or one of a newer version.
    """
    if not Path(path).is_file():
        raise ValueError(f'there is no integer checkpoint {path}')
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f'{path} is not a safetensors file: {error}') from None
    if metadata.get('format') != FORMAT:
        raise ValueError(f'{path} is no integer checkpoint: its header does not say {FORMAT!r}')
    if int(metadata['version']) > VERSION:
        found = metadata['version']
        raise ValueError(f'{path} has version {found}; this fqvit_plugin reads up to {VERSION}: update it')
    model = IntegerModel(_program(json.loads(metadata['program']), tensors)).eval()
    model.meta = {k: v for k, v in metadata.items() if k not in ('format', 'version', 'program')}
    return model


def _program(stored: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    ops = tuple(Op(**{**op, 'inputs': tuple(op['inputs'])}) for op in stored['ops'])
    names = [name for op in ops for name in op.constants.values()]
    constants = {name: _decode(name, stored['encodings'].get(name), tensors) for name in names}
    grids = {}
    for name, grid in stored['grids'].items():
        scale = grid.get('scale') or tensors[f'{name}/scale'].double().tolist()
        grids[name] = Grid(tuple(scale), tuple(grid['zero']), grid['bits'])
    height, width = stored['image_size']
    return Program(ops, constants, stored['output'], grids, (height, width))


def _encode(value: Tensor) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by the suffix of their names, and how to read them; None for a tensor stored as it is."""
    if value.dtype is torch.int8 and value.ndim == 1 and len(value) > 2**12:
        starts = torch.cat((torch.ones(1, dtype=torch.bool), value.diff() != 0)).nonzero().flatten()
        if len(starts) * 5 < len(value):
            runs = {'starts': starts.to(torch.int32), 'values': value[starts]}
            return runs, {'kind': 'runs', 'length': len(value)}
    if value.dtype is torch.int8 and value.ndim == 2 and value.min() >= -8 and value.max() <= 7:
        flat = torch.nn.functional.pad(value.flatten(), (0, value.numel() % 2)).to(torch.uint8) & 15
        return {'int4': flat[0::2] | (flat[1::2] << 4)}, {'kind': 'int4', 'shape': list(value.shape)}
    return {'': value}, None


def _decode(name: str, encoding: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Tensor:
    if encoding is None:
        return tensors[name]
    if encoding['kind'] == 'runs':
        starts = tensors[f'{name}/starts'].to(torch.int64)
        lengths = torch.cat((starts, torch.tensor([encoding['length']]))).diff()
        return tensors[f'{name}/values'].repeat_interleave(lengths)
    packed = tensors[f'{name}/int4']
    pairs = torch.stack((packed & 15, packed >> 4), dim=1).flatten().to(torch.int8)
    rows, columns = encoding['shape']
    return ((pairs ^ 8) - 8)[: rows * columns].view(rows, columns)
