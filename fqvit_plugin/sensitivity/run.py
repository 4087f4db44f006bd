"""The sensitivity analysis of a classifier on its calibration data."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..analysis.collect import first_images
from ..analysis.records import Analysis
from ..calibration import CalibrationSet, forward_of, image_names
from ..surgery import find_classifier
from .channels import ChannelRanges, channel_ranges
from .kinds import PROBABILITIES
from .measure import DIRECTIONS, count_passes, measure_sensitivity
from .page import Photo, thumbnail
from .records import LEVELS, Sensitivity
from .switches import Switches
from .units import units_of

__all__ = ['IMAGES', 'channels_on', 'labels_of', 'sensitivity_on', 'worst_photos']

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
    kinds: Collection[str] | None = None,
    analysis: Analysis | None = None,
    begin: Callable[[int], Callable[[], None]] = lambda _: lambda: None,
) -> Sensitivity:
    """:func:`~fqvit_plugin.sensitivity.measure.measure_sensitivity` on the first ``images`` images of ``data``.

    Args:
        model: a calibrated classifier, also inside a wrapper.
        data: its calibration data; labels are used where they are there.
        images: how many.
        levels, weight_bits, act_bits: as :func:`~fqvit_plugin.sensitivity.units.units_of` takes them.
        kinds: measure only units of these kinds.
        directions, analysis: as :func:`~fqvit_plugin.sensitivity.measure.measure_sensitivity` takes them.
        begin: told the number of passes; gives what is called after each.

    Raises:
        ValueError, RuntimeError: as these.
    """
    classifier = find_classifier(model)
    units = units_of(Switches(classifier).layers, levels, weight_bits, act_bits)
    units = [unit for unit in units if kinds is None or unit.kind in kinds]
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


def channels_on(
    model: Any, data: CalibrationSet, result: Sensitivity, images: int, count: int = 12
) -> tuple[ChannelRanges, ...]:
    """Ranges of the channels of the ``count`` tensors that cost most alone, on the images that were measured."""
    classifier = find_classifier(model)
    ranked = result.ranked('tensor', 'only') or result.ranked('tensor', 'without')
    without_channels = (PROBABILITIES, 'attention logits')
    paths = dict.fromkeys(e.name for e in ranked if e.bits is not None and e.kind not in without_channels)
    batches = data.load(first_images(data.batches, images))
    return channel_ranges(classifier, batches, [*paths][:count], forward_of(classifier))


def worst_photos(
    data: CalibrationSet, result: Sensitivity, images: int, count: int = 8, pictures: bool = True
) -> list[Photo]:
    """The images that quantization changed most.

    Args:
        data, images: as :func:`sensitivity_on` was given them.
        result: what it gave.
        count: how many, at most.
        pictures: show them, small.
    """
    measured = [index for batch in first_images(data.batches, images) for index in batch]
    worst = result.worst_images(count)
    names = image_names(data.loader.dataset, [measured[image.index] for image in worst])
    classes = (getattr(data.loader.dataset, 'metainfo', None) or {}).get('classes') or ()
    batches = data.load([[measured[image.index]] for image in worst])
    photos = []
    for i, image in enumerate(worst):
        picture = next(batches)['inputs'][0]
        shown = thumbnail(picture) if pictures and picture.dtype is torch.uint8 and len(picture) == 3 else ''
        name = os.path.basename(names[i]) if names else f'image {image.index}'
        expected, found = (
            str(classes[c]) if c < len(classes) else f'class {c}' for c in (image.expected, image.found)
        )
        photos.append(Photo(image, name, expected, found, shown))
    return photos


def labels_of(batch: Any) -> Tensor | None:
    """Classes (N,) of a batch as MMPretrain packs it; ``None`` where an image has none, or several."""
    samples = batch.get('data_samples', ()) if isinstance(batch, dict) else ()
    labels = [sample.get('gt_label') for sample in samples]
    if not labels or any(label is None or label.numel() != 1 for label in labels):
        return None
    return torch.stack([label.reshape(()) for label in labels])
