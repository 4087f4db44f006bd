"""Checkpoints of timm, DeiT, Swin, AugReg and Hugging Face under MMPretrain's names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fqvit_plugin._convert_names import FAMILIES, Family, Row
from fqvit_plugin.checkpoint_io import WEIGHT_ENTRIES, damage_hint, load_checkpoint

__all__ = ['convert_state_dict', 'load_checkpoint_file', 'recognise_family', 'unwrap']

_MMPRETRAIN = 'MMPretrain names'
_TORCH_SUFFIXES = ('.pth', '.pt', '.bin', '.tar', '.ckpt')


@dataclass(frozen=True)
class _Plan:
    """What one family makes of a set of keys."""

    family: Family
    moves: dict[str, tuple[str, Row]]  # source name -> MMPretrain name and the row that says how
    missing: list[str]
    unknown: list[str]

    @property
    def problems(self) -> int:
        return len(self.missing) + len(self.unknown)


def convert_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename, and where needed reorder, the weights of a ViT, DeiT, DeiT3 or Swin for MMPretrain.

    Recognised: timm and official DeiT names, official and timm Swin names, AugReg's npz names,
    Hugging Face's ViT, DeiT and Swin names; MMPretrain's own names come back as they are.
    Wrappers (``{'model': ...}``, ``{'state_dict': ...}``, averaged weights first, as timm does)
    and a ``module.`` prefix are taken off.

    Args:
        state_dict: names to tensors, or a checkpoint dict around them; it is not changed. Tensors
            that need no reordering are shared with the result, not copied.

    Returns:
        Names of an ``ImageClassifier``: ``backbone.*`` and, if the file has a classifier,
        ``head.*``. Distilled DeiT needs ``DistilledVisionTransformer`` and ``DeiTClsHead``. For
        DeiT3 beware that the block of MMPretrain 1.2.0's ``DeiT3`` applies ``ln1`` where the
        paper has ``ln2``.

    Raises:
        ValueError: no known family; a key that is neither a weight of that family nor on its
            short list of buffers; a missing weight; a value that is no tensor; a tensor of an
            impossible shape.

    Source: the names and layouts of timm 1.0, the DeiT and Swin releases, Google's ViT,
    transformers.
    """
    weights = unwrap(state_dict)
    plan = _recognise(weights)
    if plan is None:
        return weights
    if plan.problems:
        raise ValueError(_complaint(plan))
    return _carry_out(plan, weights)


def recognise_family(state_dict: Mapping[str, Any]) -> str:
    """The naming in which :func:`convert_state_dict` reads a checkpoint; ValueError if none."""
    plan = _recognise(unwrap(state_dict))
    return _MMPRETRAIN if plan is None else plan.family.name


def load_checkpoint_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a ``.pth``, ``.pt``, ``.bin``, ``.npz`` or ``.safetensors`` file.

    No code in the file is run: no pickle in npz,
    :func:`~fqvit_plugin.checkpoint_io.load_checkpoint` for the torch formats. Wrappers and a
    ``module.`` prefix are taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a damaged one, or one that holds no state dict.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f'{file} can not be found')
    if file.is_dir():
        raise ValueError(f'{file} is a folder; give the checkpoint file in it')
    suffix = file.suffix.lower()
    if suffix in _TORCH_SUFFIXES:
        weights: Mapping[str, Any] = load_checkpoint(file)
    elif suffix == '.npz':
        weights = _load_npz(file)
    elif suffix == '.safetensors':
        weights = _load_safetensors(file)
    else:
        known = ', '.join([*_TORCH_SUFFIXES, '.npz', '.safetensors'])
        raise ValueError(f'{file}: unknown kind of file {suffix!r}; give one of {known}')
    try:
        return unwrap(weights)
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from error


def _load_npz(file: Path) -> dict[str, Tensor]:
    try:
        # our own stream: np.load leaves the file open when it fails
        with file.open('rb') as stream, np.load(stream, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    # zipfile, numpy and torch raise types of their own for damaged or foreign arrays
    except Exception as error:
        raise ValueError(f'{file} is not an npz file of numeric arrays{damage_hint(file)}') from error


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    # SafetensorError derives from Exception, and damage raises others too
    except Exception as error:
        raise ValueError(f'{file} is not a readable safetensors file{damage_hint(file)}') from error


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without ``module.`` in front of its names.

    Raises:
        ValueError: there is none.
    """
    inner = (checkpoint.get(name) for name in WEIGHT_ENTRIES)
    weights = next((entry for entry in inner if isinstance(entry, Mapping)), checkpoint)
    if not weights:
        raise ValueError('no weights in it; give a state dict')
    odd = [
        f'{name} ({type(value).__name__})'
        for name, value in weights.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if odd:
        raise ValueError(f'not a state dict, these are no tensors: {_some(odd)}')
    if all(name.startswith('module.') for name in weights):
        return {name.removeprefix('module.'): tensor for name, tensor in weights.items()}
    return dict(weights)


def _recognise(weights: Mapping[str, Tensor]) -> _Plan | None:
    """The family that explains the keys best; None for MMPretrain's own names."""
    if any(name.startswith('backbone.') for name in weights):
        return None
    plans = []
    for family in FAMILIES:
        match = next(filter(None, map(family.recognise.match, weights)), None)
        if match is not None:
            plans.append(_plan(family, (match.groups()[0] or '') if match.groups() else '', weights))
    if not plans:
        names = '; '.join([*(family.name for family in FAMILIES), _MMPRETRAIN])
        raise ValueError(f'unknown names: {_some(weights)}. Recognised are: {names}')
    return min(plans, key=lambda plan: plan.problems)


def _plan(family: Family, prefix: str, weights: Mapping[str, Tensor]) -> _Plan:
    depths = _count_blocks(family, prefix, weights)
    moves: dict[str, tuple[str, Row]] = {}
    groups: dict[str, list[str]] = {}
    for row in family.rows:
        for source, target in _expand(row, depths, prefix):
            moves[source] = (target, row)
            groups.setdefault(row.group, []).append(source)
    missing: list[str] = []
    for group, sources in groups.items():
        absent = [source for source in sources if source not in weights]
        if group == '' or len(absent) < len(sources):
            missing += absent
    unknown = [name for name in weights if name not in moves and not family.ignored.match(name)]
    present = {source: move for source, move in moves.items() if source in weights}
    return _Plan(family, present, missing, unknown)


def _count_blocks(family: Family, prefix: str, weights: Iterable[str]) -> list[int]:
    """Blocks per stage (a ViT is one stage), by the largest index: gaps come out as missing."""
    depths: dict[int, int] = {}
    names = list(weights)
    for name in names:
        if match := family.block.match(name.removeprefix(prefix)):
            numbers = [int(number) for number in match.groups()]
            stage, block = numbers if len(numbers) == 2 else (0, numbers[0])
            # more blocks or stages than keys can only be nonsense: leave such a key to be called
            # unknown
            if max(stage, block) < len(names):
                depths[stage] = max(depths.get(stage, 0), block + 1)
    return [depths.get(stage, 1) for stage in range(max(depths, default=0) + 1)]


def _expand(row: Row, depths: list[int], prefix: str) -> Iterator[tuple[str, str]]:
    """Every (source, target) that a row stands for in a model with these blocks per stage."""
    last = len(depths) - 1
    indices: list[dict[str, int]] = [{}]
    if '{i}' in row.source:
        indices = [{'i': i} for i in range(depths[0])]
    elif '{b}' in row.source:
        indices = [{'s': s, 'b': b} for s, depth in enumerate(depths) for b in range(depth)]
    elif '{s}' in row.target:  # patch merging, between stages
        indices = [{'s': s, 'n': s + 1} for s in range(last)]
    for index in indices:
        for p in ('weight', 'bias') if '{p}' in row.source else ('',):
            values = {'x': prefix, 'p': p, 'last': last, **index}
            yield row.source.format(**values), row.target.format(**values)


def _carry_out(plan: _Plan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    origin: dict[str, str] = {}
    for source, (target, row) in plan.moves.items():
        tensor = _changed(source, weights[source], row)
        if row.part is not None:
            parts.setdefault(target, []).append(tensor)  # the rows stand in the order q, k, v
        elif target in converted:
            raise ValueError(f'{origin[target]} and {source} are the same weight; remove one of them')
        converted[target] = tensor
        origin[target] = source
    for target, thirds in parts.items():
        try:
            converted[target] = torch.cat(thirds)
        except RuntimeError as error:
            shapes = [tuple(third.shape) for third in thirds]
            raise ValueError(f'query, key and value of {target} differ in shape: {shapes}') from error
    return converted


def _changed(source: str, tensor: Tensor, row: Row) -> Tensor:
    if row.change is None:
        return tensor
    try:
        return row.change(tensor)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f'{source} has the impossible shape {tuple(tensor.shape)}') from error


def _complaint(plan: _Plan) -> str:
    sentences = [f'this looks like {plan.family.name}, but does not fit']
    if plan.missing:
        sentences.append(f'missing: {_some(plan.missing)} (truncated file, or another architecture)')
    if plan.unknown:
        sentences.append(f'no place for: {_some(plan.unknown)}')
    return '; '.join(sentences)


def _some(names: Iterable[str], limit: int = 8) -> str:
    """A few names in reading order (block 2 before block 10), and how many more there are."""

    def reading_order(name: str) -> list[int | str]:
        return [int(t) if t.isdecimal() else t for t in re.split(r'(\d+)', name)]

    listed = sorted(names, key=reading_order)
    more = f' and {len(listed) - limit} more' if len(listed) > limit else ''
    return ', '.join(listed[:limit]) + more
