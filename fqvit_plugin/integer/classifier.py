"""An integer checkpoint as a model of MMPretrain, so that ``mim test`` evaluates it without float weights or data."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from mmpretrain.models.classifiers import BaseClassifier
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ..checkpoint_io import accept_suffix
from ..native.build import library
from ..native.model import NativeModel
from ..registry import LAYERS
from .checkpoint import load_integer
from .program import IntegerModel

__all__ = ['ENGINES', 'IntegerClassifier']


#: Name -> what makes a module (images to logits) of an integer model.
ENGINES: dict[str, Callable[[IntegerModel], nn.Module]] = {'torch': lambda model: model, 'native': NativeModel}


def _fastest(device: torch.device) -> str:
    """The engine that ``auto`` stands for."""
    if device.type != 'cpu':
        return 'torch'
    try:
        library()
    except (RuntimeError, OSError):  # no compiler, or none that can
        return 'torch'
    return 'native'


_STATE = 'integer_model'


def _read(filename: str) -> dict[str, Any]:
    return {'state_dict': {_STATE: load_integer(filename)}, 'meta': {}}


@MODELS.register_module(force=True)
@LAYERS.register_module()
class IntegerClassifier(BaseClassifier):
    """Evaluates an integer checkpoint in MMEngine's val and test loops.

    It is empty until a checkpoint is loaded (``--checkpoint FILE.safetensors``), which brings everything: structure,
    weights and image size. Building one lets MMEngine read such files.

    Args:
        engine: who computes, a name in ``ENGINES``; ``auto``: ``native`` on a CPU where it compiles, else ``torch``.
        head: of MMPretrain, makes predictions of logits; ``MultiLabelClsHead`` for several labels an image.
        data_preprocessor: the config's; mean, standard deviation and channel order must be those of the calibration.

    Raises:
        ValueError: unknown engine; another checkpoint than an integer one, or of other preprocessing; no checkpoint;
            a loss, for training.
    """

    executor: nn.Module | None

    def __init__(
        self,
        engine: str = 'auto',
        head: dict[str, Any] | None = None,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        if engine not in ENGINES and engine != 'auto':
            raise ValueError(f'unknown engine {engine!r} of IntegerClassifier; there is: auto, {", ".join(ENGINES)}')
        if data_preprocessor is None or isinstance(data_preprocessor, dict):
            data_preprocessor = MODELS.build({'type': 'ClsDataPreprocessor', **(data_preprocessor or {})})
        super().__init__(init_cfg=init_cfg, data_preprocessor=data_preprocessor)
        self.engine = engine
        self.executor = None
        self.head = MODELS.build(head or dict(type='ClsHead'))
        # torch's distributed wrapper and MMEngine's optimizer refuse a model that has no parameter
        self.register_parameter('no_parameters', nn.Parameter(torch.zeros(1)))
        accept_suffix('.safetensors', _read)

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor') -> Any:
        """Logits (B, classes), or predictions as data samples.

        Args:
            inputs: (B, 3, H, W) normalized images.
            data_samples: to put the predictions in.
            mode: ``tensor`` or ``predict``.
        """
        if mode == 'tensor':
            return self._logits(inputs)
        if mode == 'predict':
            return self.head.predict((self._logits(inputs),), data_samples)
        if mode == 'loss':
            raise ValueError(
                'an integer model cannot be trained: train the float model, calibrate and export it anew'
            )
        raise ValueError(f'unknown mode {mode!r}: tensor or predict')

    def extract_feat(self, inputs: Tensor) -> Tensor:
        """Refused: the program of an integer model gives logits only."""
        raise ValueError('an integer model has no features to extract, its program ends in logits')

    @torch.no_grad()
    def _logits(self, inputs: Tensor) -> Tensor:
        if self.executor is None:
            raise ValueError('no integer checkpoint is loaded: give --checkpoint FILE.safetensors')
        return self.executor(inputs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # what MMEngine and torch call on each module; a missing key would only be logged
        model = state_dict.get(prefix + _STATE)
        if not isinstance(model, IntegerModel):
            raise ValueError(
                'IntegerClassifier takes an integer checkpoint (.safetensors), and this is another. Calibrate and '
                'convert it: tools/calibrate.py, then tools/export.py --format int; or test it with its own config'
            )
        _check_preprocessor(self.data_preprocessor, json.loads(model.meta.get('preprocessor', '{}')))
        device = self.data_preprocessor.device
        engine = _fastest(device) if self.engine == 'auto' else self.engine
        self.executor = ENGINES[engine](model).to(device)
        # the loading goes on with the submodules, the new one among them: what it looks for are its own buffers
        state_dict.update({f'{prefix}executor.{name}': value for name, value in self.executor.state_dict().items()})


def _check_preprocessor(preprocessor: Any, expected: dict[str, Any]) -> None:
    """Refuse images that are normalized in another way than those of the calibration."""
    for key, value in expected.items():
        own = getattr(preprocessor, key, None)
        found = own.flatten().tolist() if isinstance(own, Tensor) else own
        if torch.allclose(_numbers(found), _numbers(value), rtol=1e-5):
            continue
        raise ValueError(
            f'the checkpoint was calibrated with {key}={value} in data_preprocessor, the config has {found}: take '
            f'the config of the same model, or set data_preprocessor.{key}'
        )


def _numbers(value: Any) -> Tensor:
    """Nothing, a flag or a list, as numbers that can be compared."""
    return torch.tensor([float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value or 0)])
