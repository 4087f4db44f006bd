"""Calibrated checkpoints: float weights, scales and zero points in one MMEngine checkpoint.

The state dict holds everything under the names of the quantized model; ``meta['fqvit']`` says which scheme it is,
which keys are scales and zero points, and which images they were taken on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmengine
import torch
from torch import Tensor, nn

from .convert import recognise_family, unwrap
from .lifecycle import named_quantizers
from .scheme import QuantScheme
from .surgery import find_classifier

__all__ = [
    'CalibratedState',
    'check_weights',
    'load_calibrated_',
    'save_calibrated',
    'stored_scheme',
    'take_calibrated',
    'unwrap_',
]

_KEY = 'fqvit'
#: Buffers of quantizers that are empty until a step or a search fills them.
_ANY_LENGTH = ('.codes', '.bias', '.copies', '.shifts', '.levels', '.factors', '.far')
#: 1: schemes without `branch`, one zero point for a residual stream; 2: without `operand` and copies; 3: one scale of
#: an embedding for all channels; 4: weights without factors; 5: streams without escapes
_FORMAT = 6


@dataclass(frozen=True)
class CalibratedState:
    """Scheme and quantizer buffers of a calibrated checkpoint."""

    scheme: QuantScheme
    buffers: dict[str, Tensor]


def save_calibrated(
    path: str | os.PathLike, model: nn.Module, scheme: QuantScheme, images: Sequence[str] = ()
) -> None:
    """Write the calibrated ``model``; aside first, so an interruption leaves no half-written file.

    Args:
        path: of the checkpoint.
        model: calibrated classifier, also inside a wrapper.
        scheme: the recipe it was calibrated with.
        images: names of the calibration images; only base names are kept.
    """
    classifier = find_classifier(model)
    buffers = list(_quantizer_buffers(classifier))
    meta = dict(
        mmengine_version=mmengine.__version__,
        dataset_meta=getattr(classifier, 'dataset_meta', None),
        **{
            _KEY: dict(
                format=_FORMAT,
                scheme=scheme.to_dict(),
                buffers=buffers,
                images=[os.path.basename(name) for name in images],
            )
        },
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        state = {k: v.detach().cpu() for k, v in classifier.state_dict().items()}
        torch.save({'state_dict': state, 'meta': meta}, aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _quantizer_buffers(classifier: nn.Module) -> dict[str, Tensor]:
    """Scales and zero points under the names of the state dict, which TimmClassifier makes timm's own by a hook."""
    names = {id(tensor): name for name, tensor in classifier.state_dict(keep_vars=True).items()}
    return {names[id(buffer)]: buffer for _, q in named_quantizers(classifier) for buffer in q.buffers()}


def _parameters(classifier: nn.Module) -> dict[str, Tensor]:
    """Parameters under the names of the state dict."""
    return {k: v for k, v in classifier.state_dict(keep_vars=True).items() if isinstance(v, nn.Parameter)}


def stored_scheme(checkpoint: Mapping[str, Any]) -> QuantScheme:
    """The scheme a loaded checkpoint was calibrated with.

    Raises:
        ValueError: it is a float checkpoint, or of another format.
    """
    info = checkpoint.get('meta', {}).get(_KEY)
    if info is None:
        raise ValueError('this is no calibrated checkpoint: calibrate with tools/calibrate.py or the QuantHook')
    if info.get('format') != _FORMAT:
        raise ValueError(
            f'calibrated checkpoint of format {info.get("format")!r}; this version reads {_FORMAT}: calibrate again'
        )
    return QuantScheme.from_dict(info['scheme'])


def take_calibrated(checkpoint: MutableMapping[str, Any], expected: QuantScheme) -> CalibratedState | None:
    """Take scales and zero points out of a loaded ``checkpoint``; ``None`` if it is a float one.

    Raises:
        ValueError: it was calibrated with another scheme than ``expected``, or its parts do not fit together.
    """
    info = checkpoint.get('meta', {}).get(_KEY)
    if info is None:
        return None
    scheme = stored_scheme(checkpoint)
    if different := scheme.differences(expected):
        raise ValueError(
            'the checkpoint was calibrated with another scheme (checkpoint != config): '
            + '; '.join(different)
            + '. Set quant_scheme to the one it was calibrated with, or start from the float checkpoint'
        )
    state_dict = checkpoint['state_dict']
    missing = [key for key in info['buffers'] if key not in state_dict]
    if missing:
        raise ValueError(f'the calibrated checkpoint is incomplete: {missing[0]} and {len(missing) - 1} more missing')
    return CalibratedState(scheme, {key: state_dict.pop(key) for key in info['buffers']})


def load_calibrated_(model: nn.Module, state: CalibratedState) -> None:
    """Put the scales and zero points of ``state`` in force in a quantized ``model``.

    Raises:
        ValueError: they do not fit the model.
    """
    classifier = find_classifier(model)
    own = _quantizer_buffers(classifier)
    if unknown := sorted(set(own) ^ set(state.buffers)):
        raise ValueError(f'the calibrated checkpoint is of another model: {unknown[0]} is only on one side')
    for key, value in state.buffers.items():
        if own[key].shape != value.shape and not (key.endswith(_ANY_LENGTH) and own[key].numel() == 0):
            raise ValueError(
                f'the calibrated checkpoint is of another model: {key} has shape {tuple(value.shape)}, '
                f'the model wants {tuple(own[key].shape)}'
            )
    with torch.no_grad():
        for key, value in state.buffers.items():
            own[key].resize_(value.shape).copy_(value)


#: Parameters that MMPretrain resizes while loading, for another image or window size.
_RESIZED = ('pos_embed', 'relative_position_bias_table')


def unwrap_(checkpoint: MutableMapping[str, Any]) -> None:
    """Give the weights of an official release, ``{'model': ...}``, MMEngine's name ``state_dict``."""
    if 'state_dict' not in checkpoint and isinstance(checkpoint.get('model'), Mapping):
        checkpoint['state_dict'] = unwrap(checkpoint)


def _is_timms(classifier: nn.Module) -> bool:
    return any(type(module).__module__.startswith('timm.models.') for module in classifier.modules())


def check_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that does not fill every parameter of ``model``; MMEngine would only log it.

    Raises:
        ValueError: names what is missing or of another shape, and what to do where that is known.
    """
    classifier = find_classifier(model)
    given = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    timms = _is_timms(classifier)
    parameters = _parameters(classifier)
    missing = [k for k in parameters if k not in given and not _renamed(k, given)]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the model's parameters, {missing[0]} first{_hint(given, timms)}"
        )
    for key, parameter in parameters.items():
        value = given.get(key)
        if value is None or value.shape == parameter.shape or (key.endswith(_RESIZED) and not timms):
            continue
        head = key.startswith('head.') and value.shape[1:] == parameter.shape[1:]
        why = ': it was trained for another number of classes' if head else ''
        raise ValueError(
            f'{key} has shape {tuple(value.shape)} in the checkpoint, the model wants {tuple(parameter.shape)}{why}'
        )


def _renamed(key: str, given: Mapping[str, Tensor]) -> bool:
    """Old Swin checkpoints call the last norm ``norm``; MMPretrain renames it while loading."""
    head, _, tail = key.rpartition('.')
    return head.startswith('backbone.norm') and f'backbone.norm.{tail}' in given


def _hint(given: Mapping[str, Tensor], timms: bool) -> str:
    try:
        family = recognise_family(given)
    except ValueError:
        return f'; it holds {", ".join(list(given)[:3])}, ...' if given else '; it holds no weights'
    if timms:
        return f"; it has the names of {family}, and the model is timm's: load the file that timm publishes"
    if family.lower().startswith('mmpretrain'):
        return ''
    return f'; it has the names of {family}: run tools/convert_checkpoint.py SRC DST first'
