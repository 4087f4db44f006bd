"""Calibration with the steps of the model's recipe: before ranges are found, and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import lifecycle
from .scheme import QuantScheme
from .steps.base import Calibration
from .structure import scheme_of

if TYPE_CHECKING:
    from .distributed import RankSync

__all__ = ['calibrate_']


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    sync: RankSync | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> int:
    """Find ranges by :func:`~fqvit_plugin.lifecycle.calibrate_`, with the steps of the scheme around it.

    A scheme without steps streams its batches; steps keep all of them in memory, since they pass over them again.

    Args:
        model: from ``quantize_model_``, in phase float; is put in eval mode and stays there.
        batches: any iterable.
        forward: runs one batch; as for the lifecycle's.
        sync: exchanges measurements between processes.
        report: is told what is being done.

    Returns:
        How many batches there were.

    Raises:
        ValueError: as the lifecycle's; or steps over several processes.
    """
    scheme: QuantScheme | None = scheme_of(model)
    steps = [] if scheme is None else [spec.build() for spec in scheme.steps]
    if not steps:
        return lifecycle.calibrate_(model, batches, forward, sync=sync)
    if sync is not None:
        raise ValueError(
            f'steps ({", ".join(s.name for s in scheme.steps)}) run in one process: calibrate with one, and hand its '  # type: ignore[union-attr]
            'checkpoint to the others'
        )
    kept = list(batches)
    if not kept:
        raise ValueError('no calibration batch: the calibration data set is empty')
    run = forward or lifecycle.forward_images
    model.eval()
    calibration = Calibration(model, kept, run, report)
    for step in steps:
        if step.before_ranges:
            report(type(step).__name__.lower())
            step.run(calibration)
    count = lifecycle.calibrate_(model, kept, run)
    for step in steps:
        if not step.before_ranges:
            step.run(calibration)
    lifecycle.dequant(model)
    return count
