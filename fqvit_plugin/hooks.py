"""QuantHook: FQ-ViT around MMEngine's val and test loops. It orders the steps and computes nothing."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import mmengine.dist as dist
import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.runner import BaseLoop, Runner, autocast
from mmpretrain.registry import HOOKS as MMPRETRAIN_HOOKS
from torch import nn

from .analysis.visualize import present
from .calibration import CalibrationSet, calibrate_on_, image_names
from .checkpoint import (
    CalibratedState,
    check_weights,
    load_calibrated_,
    save_calibrated,
    take_calibrated,
    unwrap_,
)
from .lifecycle import quant
from .presets import parse_scheme
from .registry import HOOKS
from .report import Report
from .scheme import QuantScheme
from .surgery import check_model, find_classifier, quantize_model_

__all__ = ['QuantHook']


@MMPRETRAIN_HOOKS.register_module(force=True)
@HOOKS.register_module()
class QuantHook(Hook):
    """Evaluates the quantized twin of the runner's model wherever the runner validates or tests.

    Before an evaluation the hook makes a twin that shares the model's parameters, calibrates it on the images of
    ``calib_dataloader`` (or takes the scales of a calibrated checkpoint, and says so), and lets the loop run on it.
    Afterwards the runner has its float model back, which was never touched: training goes on as without the hook.

    Args:
        scheme: name, ``dict(type=name, ...)`` or QuantScheme; by default the config's ``quant_scheme``.
        num_batches: calibration batches.
        compare_float: run the float model over the same loop too, and report both.
        out: file name of the calibrated checkpoint in the work directory; ``None`` saves none. Under training
            none is saved, because the scales are stale at the next step.
        seed: of the calibration images' order.
        report: file name of an HTML page in the work directory on every tensor's error; ``None`` writes none.
        visualize: send scales, errors and histograms to the runner's visualizer.

    Raises:
        ValueError: bad scheme; a backbone that is not covered; no calibration images; a calibrated checkpoint of
            another scheme; a model wrapper other than MMDistributedDataParallel.
    """

    priority = 'LOW'  # after EMAHook (NORMAL) has put the averaged weights in

    def __init__(
        self,
        scheme: str | Mapping[str, Any] | QuantScheme | None = None,
        num_batches: int = 10,
        compare_float: bool = False,
        out: str | None = 'calibrated.pth',
        seed: int = 0,
        report: str | None = None,
        visualize: bool = False,
    ) -> None:
        if report is not None and not report.endswith(('.html', '.htm')):
            raise ValueError(f'report is the file name of a web page, such as report.html, got {report!r}')
        self.page, self.visualize = report, visualize
        self.num_batches = num_batches
        self.compare_float = compare_float
        self.out = out
        self.seed = seed
        self.scheme: QuantScheme | None = None if scheme is None else parse_scheme(scheme)
        self.report: Report | None = None
        self._stored: CalibratedState | None = None
        self._float_model: nn.Module | None = None
        self._float_metrics: dict[str, float] = {}
        self._fp16 = False
        self._training = False

    def before_run(self, runner: Runner) -> None:
        """Refuse early what cannot work."""
        if self.scheme is None:
            configured = runner.cfg.get('quant_scheme')
            if configured is None:
                raise ValueError("no scheme: set quant_scheme = dict(type='fqvit_w8a8') in the config")
            self.scheme = parse_scheme(configured)
        model = runner.model
        if is_model_wrapper(model) and not isinstance(model, MMDistributedDataParallel):
            raise ValueError(
                f'QuantHook works on a plain model or MMDistributedDataParallel, not {type(model).__name__}'
            )
        check_model(model)

    def before_train(self, runner: Runner) -> None:
        """Under training, stored scales are stale."""
        self._training = True
        if self._stored is not None:
            runner.logger.info('QuantHook: training changes the weights; the scales of the checkpoint are dropped')
            self._stored = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the scales out of a calibrated checkpoint before the weights enter the float model."""
        assert self.scheme is not None
        unwrap_(checkpoint)
        self._stored = take_calibrated(checkpoint, self.scheme)
        if not isinstance(runner._train_loop, BaseLoop):  # fine-tuning may start from another head
            check_weights(runner.model, checkpoint.get('state_dict', checkpoint))

    def before_val_epoch(self, runner: Runner) -> None:
        """Hand the quantized twin to the loop."""
        self._enter(runner, runner.val_loop)

    def before_test_epoch(self, runner: Runner) -> None:
        """Hand the quantized twin to the loop."""
        self._enter(runner, runner.test_loop)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Give the float model back."""
        self._leave(runner, runner.val_loop, metrics)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Give the float model back."""
        self._leave(runner, runner.test_loop, metrics)

    def _enter(self, runner: Runner, loop: Any) -> None:
        assert self.scheme is not None
        if self.compare_float:
            runner.logger.info('QuantHook: evaluating the float model first')
            self._float_metrics = _evaluate(runner.model, loop)
        twin = _twin(runner.model)
        self.report = quantize_model_(twin, self.scheme)
        data: CalibrationSet | None = None
        if self._stored is not None:
            load_calibrated_(twin, self._stored)
            runner.logger.info('QuantHook: scales come from the calibrated checkpoint; calibration is skipped')
        else:
            data = self._calibrate(runner, loop, twin)
        quant(twin)
        runner.logger.info(f'QuantHook\n{self.report}')
        if self.visualize or self.page is not None:
            source = 'scales from a calibrated checkpoint' if data is None else _count(data)
            data = data or CalibrationSet.build(runner.cfg, self.num_batches, self.seed)  # on every rank: it may wait
            if dist.is_main_process():
                present(runner, twin, self.report, data, source, self.page, self.visualize)
        self._float_model, runner.model = runner.model, twin
        self._fp16, loop.fp16 = loop.fp16, False
        if self._fp16:
            runner.logger.warning('QuantHook: integer codes need float32; AMP is off for the quantized model')

    def _calibrate(self, runner: Runner, loop: Any, twin: nn.Module) -> CalibrationSet:
        assert self.scheme is not None
        data = CalibrationSet.build(runner.cfg, self.num_batches, self.seed)
        names = image_names(data.loader.dataset, data.indices)
        scored = set(image_names(loop.dataloader.dataset))
        if shared := len(scored.intersection(names)):
            runner.logger.warning(
                f'QuantHook: {shared} of {len(names)} calibration images are also scored; '
                'calibrate on training images, or the accuracy is too good'
            )
        count = calibrate_on_(twin, data, runner.logger)
        runner.logger.info(f'QuantHook: calibrated on {count} images in {len(data.batches)} batches')
        if self.out is not None and not self._training and dist.is_main_process():
            path = os.path.join(runner.work_dir, self.out)
            classifier = find_classifier(twin)
            classifier.dataset_meta = getattr(loop.dataloader.dataset, 'metainfo', None)
            save_calibrated(path, classifier, self.scheme, names)
            runner.logger.info(f'QuantHook: calibrated checkpoint saved to {path}')
        return data

    def _leave(self, runner: Runner, loop: Any, metrics: dict[str, float] | None) -> None:
        if self._float_model is None:
            return
        runner.model, self._float_model = self._float_model, None
        loop.fp16 = self._fp16
        if self._float_metrics and metrics is not None:
            lines = [f'  {k:<24s} {v:>10.4g} {metrics[k]:>10.4g}' for k, v in self._float_metrics.items()]
            table = '\n'.join([f'  {"metric":<24s} {"float":>10s} {"quantized":>10s}', *lines])
            runner.logger.info(f'QuantHook: float and quantized, same images\n{table}')
            metrics.update({f'float/{k}': v for k, v in self._float_metrics.items()})


def _count(data: CalibrationSet) -> str:
    return f'{len(data.indices)} images in {len(data.batches)} batches'


def _twin(model: Any) -> nn.Module:
    """A copy of the module structure on the same parameters and buffers, out of its distributed wrapper."""
    if is_model_wrapper(model):
        model = model.module
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, memo={id(t): t for t in tensors})
    for step in ('val_step', 'test_step'):  # a compiled step is bound to the float model
        twin.__dict__.pop(step, None)
    return twin


@torch.no_grad()
def _evaluate(model: Any, loop: Any) -> dict[str, float]:
    """Metrics of ``model`` over the loop's data, by the loop's own evaluator."""
    was_training = model.training
    model.eval()
    for batch in loop.dataloader:
        with autocast(enabled=loop.fp16):
            outputs = model.test_step(batch)
        loop.evaluator.process(data_samples=outputs, data_batch=batch)
    model.train(was_training)
    return loop.evaluator.evaluate(len(loop.dataloader.dataset))
