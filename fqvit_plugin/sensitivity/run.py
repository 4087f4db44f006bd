"""The sensitivity analysis of a classifier on its calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..analysis.collect import first_images
from ..analysis.records import Analysis
from ..calibration import CalibrationSet, forward_of
from ..surgery import find_classifier
from .measure import DIRECTIONS, count_passes, measure_sensitivity
from .records import LEVELS, Sensitivity
from .switches import Switches
from .units import units_of

__all__ = ['IMAGES', 'labels_of', 'sensitivity_on']

IMAGES = 32  #: of the calibration images, what is measured


def sensitivity_on(
    model: Any,
    data: CalibrationSet,
    images: int = IMAGES,
    *,
    levels: Collection[str] = LEVELS,
    directions: Collection[str] = DIRECTIONS,
    weight_bits: Sequence[int] = (),
    act_bits: Sequence[int] = (),
    analysis: Analysis | None = None,
    begin: Callable[[int], Callable[[], None]] = lambda _: lambda: None,
) -> Sensitivity:
    """:func:`~fqvit_plugin.sensitivity.measure.measure_sensitivity` on the first ``images`` images of ``data``.

    Args:
        model: a calibrated classifier, also inside a wrapper.
        data: its calibration data; labels are used where they are there.
        images: how many.
        levels, weight_bits, act_bits: as :func:`~fqvit_plugin.sensitivity.units.units_of` takes them.
        directions, analysis: as :func:`~fqvit_plugin.sensitivity.measure.measure_sensitivity` takes them.
        begin: told the number of passes; gives what is called after each.

    Raises:
        ValueError, RuntimeError: as these.
    """
    classifier = find_classifier(model)
    units = units_of(Switches(classifier).layers, levels, weight_bits, act_bits)
    batches = first_images(data.batches, images)
    on_pass = begin(len(batches) * count_passes(units, directions))
    return measure_sensitivity(
        classifier,
        data.load(batches),
        units,
        forward_of(classifier),
        labels=labels_of,
        analysis=analysis,
        directions=directions,
        on_pass=on_pass,
    )


def labels_of(batch: Any) -> Tensor | None:
    """Classes (N,) of a batch as MMPretrain packs it; ``None`` where an image has none, or several."""
    samples = batch.get('data_samples', ()) if isinstance(batch, dict) else ()
    labels = [sample.get('gt_label') for sample in samples]
    if not labels or any(label is None or label.numel() != 1 for label in labels):
        return None
    return torch.stack([label.reshape(()) for label in labels])
