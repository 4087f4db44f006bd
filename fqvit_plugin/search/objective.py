"""What a trial measures: top-1 and the divergence from the float model, on images that calibrated nothing."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import Tensor

from ..apis import build_classifier, load_config
from ..calibration import CalibrationSet, calibrate_on_, image_names
from ..layers import QConv2d, QLinear
from ..lifecycle import quant
from ..presets import parse_scheme
from ..structure import Structure
from ..surgery import quantize_model_
from ..weight_quantizer import factors_of

__all__ = ['Objective', 'Outcome', 'Setting', 'count_test_images', 'recipe_key']


@dataclass(frozen=True)
class Setting:
    """Model, data and seed of an experiment: all its trials and baselines share it.

    Args:
        config: path of the float model's config.
        checkpoint: its float weights.
        cfg_options: what ``--cfg-options`` changes.
        device: ``cpu``, ``cuda``, …
        calib_batches: batches of ``calib_dataloader`` to calibrate on.
        score_batches: batches to score on: the following ones, or of ``search_dataloader`` if the config has it.
        seed: of the images' order.
    """

    config: str
    checkpoint: str
    cfg_options: dict[str, Any] | None = None
    device: str = 'cpu'
    calib_batches: int = 10
    score_batches: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """One recipe, measured.

    Args:
        recipe: its ``quant_scheme``.
        source: ``'search'``, or what else it is.
        num_bytes: packed weights, float biases and norms, scales and zero points.
        top1: percent.
        divergence: mean Kullback-Leibler divergence of the class probabilities from the float model's, in nats.
        images: how many images were scored.
        trial: NNI's name of the trial.
    """

    recipe: dict[str, Any]
    source: str
    num_bytes: int
    top1: float
    divergence: float
    images: int
    trial: str = ''

    @property
    def score(self) -> float:
        """Top-1; between recipes that tie, the smaller divergence, which never counts as much as one image."""
        return self.top1 - 100 / self.images * self.divergence / (1 + self.divergence)

    @property
    def key(self) -> str:
        """Equal for equal recipes."""
        return recipe_key(self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the score among them."""
        return {**asdict(self), 'score': self.score}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """What :meth:`to_dict` wrote."""
        return cls(**{k: v for k, v in data.items() if k != 'score'})


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """A short name of a recipe, from the scheme it means."""
    scheme = json.dumps(parse_scheme(recipe).to_dict(), sort_keys=True)
    return hashlib.sha256(scheme.encode()).hexdigest()[:12]


class Objective:
    """The float model with its images, ready to measure one recipe after the other.

    Raises:
        ValueError: config, checkpoint or data cannot be used.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.cfg = load_config(Path(setting.config), setting.cfg_options)
        self.model = build_classifier(self.cfg, setting.checkpoint, setting.device)
        self.calibration, self.scoring = _images(self.cfg, setting)
        self._logger = _quiet_logger()
        self._float_logits, self._labels = self._logits()

    @property
    def float_top1(self) -> float:
        """Percent, on the images that are scored."""
        return _top1(self._float_logits, self._labels)

    def measure(self, recipe: Mapping[str, Any], source: str = 'search', trial: str = '') -> Outcome:
        """Quantize by ``recipe``, calibrate, score, and take the quantization back.

        Raises:
            ValueError: the recipe does not fit the model.
        """
        before = Structure(self.model)
        try:
            report = quantize_model_(self.model, parse_scheme(recipe))
            calibrate_on_(self.model, self.calibration, self._logger)
            quant(self.model)
            logits, labels = self._logits()
        finally:
            before.restore_()
        divergence = F.kl_div(
            logits.log_softmax(1), self._float_logits.log_softmax(1), reduction='batchmean', log_target=True
        )
        # a divergence of two nearly equal distributions may round below zero
        measured = max(0.0, float(divergence))
        return Outcome(
            dict(recipe), source, report.quantized_bytes, _top1(logits, labels), measured, len(labels), trial
        )

    def num_bytes(self, recipe: Mapping[str, Any]) -> int:
        """Bytes of the model quantized by ``recipe``; needs no data."""
        before = Structure(self.model)
        try:
            return quantize_model_(self.model, parse_scheme(recipe)).quantized_bytes
        finally:
            before.restore_()

    def weight_sizes(self, recipe: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Path of every layer with a quantized weight -> number of its weights, and of their factors at few bits."""
        before = Structure(self.model)
        try:
            quantize_model_(self.model, parse_scheme(recipe))
            layers = [(n, m) for n, m in self.model.named_modules() if isinstance(m, (QConv2d, QLinear))]
            return {n: (m.weight.numel(), factors_of(m.weight, m.weight_quantizer.spec)) for n, m in layers}
        finally:
            before.restore_()

    def scored_names(self) -> list[str]:
        """Paths of the images that are scored."""
        return image_names(self.scoring.loader.dataset, self.scoring.indices)

    @torch.no_grad()
    def _logits(self) -> tuple[Tensor, Tensor]:
        """(N, classes) logits and (N,) labels of the scored images, on the CPU."""
        model: Any = self.model
        model.eval()
        logits, labels = [], []
        for batch in self.scoring.load(self.scoring.batches):
            data = model.data_preprocessor(batch, False)
            logits.append(model(**data, mode='tensor').float().cpu())
            labels += [_label(sample) for sample in data['data_samples']]
        return torch.cat(logits), torch.tensor(labels)


def _quiet_logger() -> MMLogger:
    """A logger for calibrations, of which there are many, that says nothing but errors."""
    name = 'fqvit_search'
    options = {} if MMLogger.check_instance_created(name) else {'log_level': 'ERROR'}  # a second time they warn
    return MMLogger.get_instance(name, **options)


def _images(cfg: Config, setting: Setting) -> tuple[CalibrationSet, CalibrationSet]:
    """Images to calibrate on, exactly QuantHook's, and images to score, none of which calibrates."""
    if cfg.get('search_dataloader') is not None:
        calibration = CalibrationSet.build(cfg, setting.calib_batches, setting.seed)
        held_out = copy.deepcopy(cfg)
        held_out.calib_dataloader = cfg.search_dataloader
        scoring = CalibrationSet.build(held_out, setting.score_batches, setting.seed)
    else:
        both = CalibrationSet.build(cfg, setting.calib_batches + setting.score_batches, setting.seed)
        if len(both.batches) <= setting.calib_batches:
            raise ValueError(
                f'calib_dataloader gives {len(both.batches)} batches and {setting.calib_batches} of them calibrate: '
                'none is left to score. Calibrate on fewer, make them smaller, or write a search_dataloader'
            )
        calibration = CalibrationSet(both.loader, both.batches[: setting.calib_batches])
        scoring = CalibrationSet(both.loader, both.batches[setting.calib_batches :])
    calibrating = set(image_names(calibration.loader.dataset, calibration.indices))
    if shared := len(calibrating.intersection(image_names(scoring.loader.dataset, scoring.indices))):
        raise ValueError(f'{shared} images of search_dataloader are among those that calibrate: use others')
    return calibration, scoring


def _label(sample: Any) -> int:
    label = sample.get('gt_label')
    if label is None or label.numel() != 1:
        raise ValueError('the search scores top-1 and needs images with exactly one label each')
    return int(label)


def _top1(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def count_test_images(objective: Objective) -> int | None:
    """How many of the scored images belong to the config's test data; None where that data is not to be found."""
    loader = objective.cfg.get('test_dataloader')
    if loader is None:
        return 0
    try:
        test: Any = Runner.build_dataloader(copy.deepcopy(dict(loader)))
    except (OSError, ValueError, RuntimeError):
        return None
    return len(set(image_names(test.dataset)).intersection(objective.scored_names()))
