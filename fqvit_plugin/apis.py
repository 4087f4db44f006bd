"""Building and loading a classifier without a runner: float from a config, quantized from a calibrated checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import nn

from .checkpoint import check_weights, load_calibrated_, stored_scheme, take_calibrated
from .checkpoint_io import load_checkpoint
from .convert import load_checkpoint_file, unwrap
from .lifecycle import quant
from .report import Report
from .surgery import quantize_model_

__all__ = ['build_classifier', 'load_config', 'load_quantized_']


def load_config(path: str | os.PathLike, options: dict | None = None) -> Config:
    """Read a config file, apply ``--cfg-options`` and enter its default scope.

    Raises:
        ValueError: no such file, or it cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f'there is no config {path}')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise ValueError(f'config {path} cannot be read: {error}') from error
    if options:
        cfg.merge_from_dict(options)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    return cfg


def build_classifier(cfg: Config, checkpoint: str | os.PathLike, device: str = 'cpu') -> nn.Module:
    """The model of ``cfg`` with the float weights of ``checkpoint``, in eval mode.

    Raises:
        ValueError: the file is no checkpoint, or not of this model; see :func:`check_weights`.
    """
    model_cfg = cfg.model.copy()
    if cfg.get('data_preprocessor') is not None:
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(model_cfg)
    if Path(checkpoint).suffix.lower() in ('.safetensors', '.npz'):
        state_dict = load_checkpoint_file(checkpoint)
    else:
        state_dict = unwrap(load_checkpoint(checkpoint))
    check_weights(model, state_dict)
    model.load_state_dict(state_dict, strict=False)  # check_weights was the strict part
    return model.to(device).eval()


def load_quantized_(model: nn.Module, checkpoint: str | os.PathLike) -> Report:
    """Turn a freshly built float ``model`` into the quantized one of a calibrated checkpoint, without data.

    Does the surgery of the checkpoint's own scheme, loads weights, scales and zero points, and calls ``quant``.

    Raises:
        ValueError: the file is no calibrated checkpoint, or of another model.
    """
    loaded = load_checkpoint(checkpoint)
    scheme = stored_scheme(loaded)
    state = take_calibrated(loaded, scheme)
    assert state is not None
    check_weights(model, loaded['state_dict'])
    model.load_state_dict(loaded['state_dict'], strict=False)  # check_weights was the strict part
    report = quantize_model_(model, scheme)
    load_calibrated_(model, state)
    quant(model.eval())
    return report
