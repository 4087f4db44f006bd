"""What tools that measure a calibrated model share: getting one, a progress bar, and checks of what was asked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmpretrain.registry import MODELS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fqvit_plugin as fq
from fqvit_plugin.apis import build_classifier
from fqvit_plugin.calibration import CalibrationSet, calibrate_on_
from fqvit_plugin.checkpoint import stored_scheme
from fqvit_plugin.checkpoint_io import load_checkpoint
from fqvit_plugin.presets import parse_scheme
from fqvit_plugin.report import Report
from fqvit_plugin.search.setup import configured_scheme


def check_outputs(paths: Sequence[Path | None], force: bool) -> None:
    """Refuse now what could not be written after minutes of measuring.

    Raises:
        ValueError: a path is a folder, exists already, or is where one may not write.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f'{path} is a folder: name a file in it')
        if path.exists() and not force:
            raise ValueError(f'{path} exists; add --force to overwrite it')
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f'{path} cannot be written: {folder} is no folder one may write into')


def check_device(device: str) -> None:
    """Refuse a GPU that is not there."""
    if torch.device(device).type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {device}: this torch sees no GPU')


def calibrated_model(cfg: Config, checkpoint: Path, device: str, data: CalibrationSet) -> tuple[Any, Report]:
    """The model of a calibrated checkpoint, or of a float one, calibrated by the config's scheme (W8A8 if none)."""
    if checkpoint.suffix.lower() not in ('.safetensors', '.npz') and _is_calibrated(checkpoint):
        model = MODELS.build({'data_preprocessor': cfg.get('data_preprocessor'), **cfg.model})
        report = fq.load_quantized_(model, checkpoint)
        return model.to(device), report
    model = build_classifier(cfg, checkpoint, device)
    report = fq.quantize_model_(model, parse_scheme(configured_scheme(cfg)))
    logger = MMLogger.get_current_instance()
    logger.setLevel('INFO')
    calibrate_on_(model, data, logger)
    return model, report


def _is_calibrated(checkpoint: Path) -> bool:
    loaded = load_checkpoint(checkpoint)
    with contextlib.suppress(ValueError):
        stored_scheme(loaded)
        return True
    return False


@contextlib.contextmanager
def progress_bar(console: Console) -> Any:
    """What makes a progress bar of a number of passes; nothing is shown where there is no terminal."""
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def begin(total: int) -> Callable[[], None]:
        task = progress.add_task('passes', total=total)
        return lambda: progress.advance(task)

    # a disabled one that is entered still ends with an empty line, up to rich 14 at least
    with progress if console.is_terminal else contextlib.nullcontext():
        yield begin
