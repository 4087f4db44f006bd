"""The analysis in MMEngine's visualizer backends, and as a page in a runner's work directory."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from mmengine.visualization import TensorboardVisBackend, Visualizer
from torch import nn

from ..calibration import CalibrationSet
from ..report import Report
from ..surgery import find_classifier
from .collect import analyse_on
from .page import PageInfo, render_page, write_text
from .records import Analysis, TensorRecord

__all__ = ['histogram_image', 'present', 'visualize']

IMAGES = 8  #: histograms that are drawn as images: those of the worst tensors


def present(
    runner: Any,
    model: nn.Module,
    report: Report,
    data: CalibrationSet,
    calibration: str,
    page: str | None,
    plots: bool,
) -> Analysis:
    """Analyse a runner's quantized ``model``; write ``page`` into its work directory, and show plots.

    Args:
        runner: MMEngine's.
        model: calibrated.
        report: of its surgery.
        data: calibration images; a few of them are used.
        calibration: what the page says of where the scales come from.
        page: file name, or ``None``.
        plots: send scales, errors and histograms to the runner's visualizer.
    """
    analysis = analyse_on(model, data)
    if page is not None:
        path = os.path.join(runner.work_dir, page)
        write_text(path, render_page(PageInfo.of(find_classifier(model), runner.cfg, calibration), report, analysis))
        runner.logger.info(f'QuantHook: report written to {path}')
    if plots:
        visualize(runner.visualizer, analysis, runner.iter)
    return analysis


def visualize(visualizer: Visualizer, analysis: Analysis, step: int = 0) -> None:
    """Send every tensor's error and scale as scalars, and histograms, to all backends.

    TensorBoard gets a histogram of every tensor that can be browsed; all backends get those of the worst as images.
    """
    end = analysis.end_to_end
    scalars = {'quant/outputs_sqnr': end.sqnr}
    if end.agreement is not None:
        scalars['quant/agreement'] = end.agreement
    for r in analysis.tensors:
        scalars[f'quant_sqnr/{r.path}'] = r.sqnr
        scalars[f'quant_saturated/{r.path}'] = r.saturated
        if r.total_sqnr is not None:
            scalars[f'quant_total_sqnr/{r.path}'] = r.total_sqnr
        if r.scales is not None:
            scalars[f'quant_scale/{r.path}'] = r.scales.median
    visualizer.add_scalars({k: v for k, v in scalars.items() if math.isfinite(v)}, step=step)
    for r in analysis.worst(IMAGES):
        if r.covered is not None:
            visualizer.add_image(f'quant_histogram.{r.path}', histogram_image(r.value_counts), step=step)
    for backend in visualizer._vis_backends.values():
        if isinstance(backend, TensorboardVisBackend):
            for r in analysis.tensors:
                _add_histogram(backend.experiment, r, step)


def _add_histogram(writer: Any, record: TensorRecord, step: int) -> None:
    """The histogram of all values, which are gone; their sums are those of the middles of the bins."""
    if record.covered is None:
        return
    low, high = record.covered
    limits = np.linspace(low, high, len(record.value_counts) + 1)
    counts, middles = np.array(record.value_counts), (limits[1:] + limits[:-1]) / 2
    writer.add_histogram_raw(
        f'quant_values/{record.path}',
        min=low,
        max=high,
        num=int(counts.sum()),
        sum=float((counts * middles).sum()),
        sum_squares=float((counts * middles**2).sum()),
        bucket_limits=limits[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def histogram_image(counts: tuple[int, ...], bin_width: int = 6, height: int = 160) -> np.ndarray:
    """A histogram as an RGB image, uint8 (height, bins * bin_width, 3); heights are square roots of the counts."""
    roots = np.sqrt(np.array(counts, dtype=np.float64))
    bars = np.round(roots / max(roots.max(), 1.0) * (height - 4)).astype(int)
    filled = np.arange(height)[:, None] >= height - bars[None, :]  # (height, bins)
    image = np.where(filled[..., None], (31, 95, 168), (255, 255, 255)).astype(np.uint8)
    return image.repeat(bin_width, axis=1)
