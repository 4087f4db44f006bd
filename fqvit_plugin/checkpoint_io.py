"""Reading checkpoints without running code in them, MMEngine's training checkpoints included.

Since torch 2.6 ``torch.load`` refuses every class that is not on its short list. MMEngine's
CheckpointHook stores ``HistoryBuffer`` objects (with functions inside) in ``message_hub``, so no
checkpoint it writes loads again, neither for a test nor for resuming. Here such a file is read a
second time by an unpickler that rebuilds plain data only: it never imports or calls what the file
names, a class it does not know becomes an inert placeholder, and the histories are built anew
from their arrays.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version

__all__ = ['accept_suffix', 'damage_hint', 'install_mmengine_loader', 'load_checkpoint']

_LOG = logging.getLogger(__name__)

#: Entries that hold weights: losing a tensor of these must not pass with a warning.
WEIGHT_ENTRIES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')


class _Placeholder:
    """Stands in for an object of a class we do not import; accepts all that pickle does to it."""

    origin = 'an unnamed class'

    def __new__(cls, *args: object, **kwargs: object) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> _Placeholder:
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None: ...

    def add(self, item: object) -> None: ...


class _HistoryRecord(_Placeholder):
    """The fields of a pickled ``HistoryBuffer``, without its statistics functions."""

    origin = 'mmengine.logging.history_buffer.HistoryBuffer'
    fields: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        self.fields = state if isinstance(state, dict) else {}

    def rebuild(self) -> HistoryBuffer | None:
        """The buffer with these numbers; None if the fields are not two equally long arrays."""
        fields = getattr(self, 'fields', {})
        log, count = fields.get('_log_history'), fields.get('_count_history')
        limit = fields.get('max_length', 1_000_000)
        if not isinstance(log, np.ndarray) or not isinstance(count, np.ndarray):
            return None
        if not isinstance(limit, int) or log.shape != count.shape or log.ndim != 1:
            return None
        return HistoryBuffer(log[-limit:], count[-limit:], limit)


def _encode(text: str, encoding: str = 'latin1') -> bytes:
    # protocol 2 writes bytes as a call of codecs.encode, which knows other codecs too
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'bytes in encoding {encoding!r}')
    return text.encode('latin1')


# ndarray.__reduce__ and scalar.__reduce__ name the two private functions that pickled arrays are
# made of; asking an array for them works for every numpy, whatever the module is called
_NUMPY = {'_reconstruct': np.empty(0).__reduce__()[0], 'scalar': np.float64(0).__reduce__()[0]}
_FUNCTIONS: dict[str, Any] = {
    '_codecs.encode': _encode,
    # MultiStepLR keeps its milestones in one
    'collections.Counter': Counter,
    **{f'numpy.{core}.multiarray.{k}': v for core in ('core', '_core') for k, v in _NUMPY.items()},
    **{
        f'torch._utils.{name}': getattr(torch._utils, name)
        for name in (
            '_rebuild_parameter',
            '_rebuild_parameter_with_state',
            '_rebuild_tensor',
            '_rebuild_tensor_v2',
            '_rebuild_tensor_v3',
        )
        if hasattr(torch._utils, name)
    },
}
#: Types in C: nothing in a file can write attributes onto them.
_TYPES: dict[str, type] = {
    'collections.OrderedDict': OrderedDict,
    'numpy.dtype': np.dtype,
    'numpy.ndarray': np.ndarray,
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    **{
        f'{module}.{kind.__name__}': kind
        for module in ('builtins', '__builtin__')
        for kind in (set, frozenset, complex, bytearray)
    },
}


class _DataUnpickler(pickle.Unpickler):
    """Rebuilds plain data; anything not listed above becomes a placeholder, never an import."""

    def find_class(self, module: str, name: str) -> Any:
        origin = f'{module}.{name}'
        if origin in _TYPES:
            return _TYPES[origin]
        if origin in _FUNCTIONS:
            # wrapped anew, since pickle's BUILD could write attributes onto the function itself
            return partial(_FUNCTIONS[origin])
        if module == 'torch' and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if origin == 'torch.storage.UntypedStorage':
            return torch.UntypedStorage
        base = _HistoryRecord if origin == _HistoryRecord.origin else _Placeholder
        return type('Placeholder', (base,), {'origin': origin})


def _load_data(file: IO[bytes], **kwargs: Any) -> Any:
    return _DataUnpickler(file, **kwargs).load()


# torch.load takes a module-like object; it handles tensors and storages itself
_DATA_PICKLE = SimpleNamespace(__name__=__name__, Unpickler=_DataUnpickler, load=_load_data)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a checkpoint written by ``torch.save`` without running any code that the file names.

    ``torch.load(weights_only=True)`` is tried first. What it refuses is read by the unpickler of
    this module: ``message_hub`` comes back with real ``HistoryBuffer`` objects, entries of other
    classes are left out and named in a log warning.

    Args:
        path: a ``.pth`` file: a state dict, or a dict that holds one.
        map_location: as for ``torch.load``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, is no checkpoint, or among its weights are objects that
            are no tensors.

    Source: MMEngine 0.10.7 ``Runner.save_checkpoint`` for the layout; ours is the reading.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f'{file} can not be found' if not file.exists() else f'{file} is a folder')
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        checkpoint = _load_as_data(file, map_location)
    # a damaged file raises one of a dozen types, depending on where it broke
    except Exception as error:
        raise _unreadable(file, error) from error
    if isinstance(checkpoint, _Placeholder):
        raise ValueError(f'{file} is a pickled {checkpoint.origin}; save and give its state_dict()')
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{file} holds a {type(checkpoint).__name__}; give a saved state dict')
    return checkpoint


def _load_as_data(file: Path, map_location: Any) -> Any:
    try:
        checkpoint = torch.load(file, map_location=map_location, pickle_module=_DATA_PICKLE, weights_only=False)
    except Exception as error:  # as above
        raise _unreadable(file, error) from error
    if not isinstance(checkpoint, dict):
        return checkpoint
    _restore_histories(checkpoint)
    dropped = _prune(checkpoint)
    if broken := [entry for entry in dropped if re.split('[. ]', entry)[0] in WEIGHT_ENTRIES]:
        raise ValueError(f'{file}: among the weights are objects that are no tensors: {"; ".join(broken[:5])}')
    if dropped:
        _LOG.warning('%s: left out what is no plain data: %s', file, '; '.join(dropped[:8]))
    return checkpoint


def _restore_histories(checkpoint: dict[str, Any]) -> None:
    hub = checkpoint.get('message_hub')
    scalars = hub.get('log_scalars') if isinstance(hub, dict) else None
    if not isinstance(scalars, dict):
        return
    for name, value in scalars.items():
        if isinstance(value, _HistoryRecord) and (buffer := value.rebuild()) is not None:
            scalars[name] = buffer


def _prune(node: Any, path: str = '') -> list[str]:
    """Delete placeholders from nested dicts in place; the ``path (class)`` of each one deleted."""
    dropped: list[str] = []
    if isinstance(node, dict):
        for key in list(node):
            where = f'{path}.{key}' if path else str(key)
            if origin := _origin(node[key]):
                del node[key]
                dropped.append(f'{where} ({origin})')
            else:
                dropped += _prune(node[key], where)
    elif isinstance(node, list | tuple):
        for i, item in enumerate(node):
            dropped += _prune(item, f'{path}.{i}')
    return dropped


def _origin(value: Any) -> str | None:
    """The class a placeholder stands for; a list goes as a whole if one of its items has to."""
    if isinstance(value, _Placeholder):
        return value.origin
    if isinstance(value, type) and issubclass(value, _Placeholder):
        return value.origin
    if isinstance(value, list | tuple | set | frozenset):
        return next((origin for item in value if (origin := _origin(item))), None)
    return None


def _unreadable(file: Path, error: Exception) -> ValueError:
    said = (str(error).strip() or 'no message').splitlines()[0][:120]
    hint = _SAFETENSORS if _is_safetensors(file) else damage_hint(file)
    return ValueError(f'{file} is not a readable checkpoint{hint} ({type(error).__name__}: {said})')


_SAFETENSORS = (
    ': it is a safetensors file. An integer checkpoint goes with a config of configs/integer/, of model '
    "dict(type='fqvit_plugin.IntegerClassifier'); float weights, through tools/convert_checkpoint.py first"
)


def _is_safetensors(file: Path) -> bool:
    with file.open('rb') as stream:
        return stream.read(9)[8:] == b'{'  # the header's length in eight bytes, then JSON


def damage_hint(file: Path) -> str:
    """What an unreadable file probably is, from its first bytes: the end of an error message."""
    with file.open('rb') as stream:
        start = stream.read(64)
    if not start:
        return ': it is empty'
    if start.startswith(b'version https://git-lfs'):
        return ': it is a Git LFS pointer, run `git lfs pull` to get the file itself'
    if start.lstrip()[:1] == b'<':
        return ': it looks like a saved web page, download the file itself'
    return ': it is truncated or of another format, download or save it again'


#: File suffix -> who reads such a file instead of :func:`load_checkpoint`.
_READERS: dict[str, Callable[[str], dict[str, Any]]] = {}


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """MMEngine's loader for local paths, by :func:`load_checkpoint`; raises what that raises."""
    reader = _READERS.get(Path(filename).suffix.lower())
    return load_checkpoint(filename, map_location) if reader is None else reader(filename)


def accept_suffix(suffix: str, reader: Callable[[str], dict[str, Any]]) -> None:
    """Let MMEngine load local files that end in ``suffix`` by ``reader``.

    Called by a model that can take what ``reader`` gives, when one is built: until then such a file is refused, and
    no other model comes to hold half of it.
    """
    _READERS[suffix] = reader
    CheckpointLoader.register_scheme('', loader=load_from_local, force=True)


def install_mmengine_loader() -> None:
    """Let MMEngine's runner load and resume its own checkpoints under torch 2.6 and later.

    Replaces MMEngine's loader for local paths. Under an older torch MMEngine can read its
    checkpoints, and nothing is changed. May be called any number of times.
    """
    if digit_version(torch.__version__) >= digit_version('2.6.0'):
        CheckpointLoader.register_scheme('', loader=load_from_local, force=True)
