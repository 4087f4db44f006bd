"""Calibration data of a runner: which images, in which batches, and running a model over them."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mmengine.dist as dist
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .blocks.common import is_quantized
from .distributed import RankSync, deal
from .recipe import calibrate_
from .surgery import find_classifier

__all__ = ['CalibrationSet', 'calibrate_on_', 'image_names']


@dataclass(frozen=True)
class CalibrationSet:
    """The first batches of a data loader's order, the same on every rank.

    Args:
        loader: built from the config; its data set, workers and collate function are used.
        batches: indices into the data set, one sequence per batch.
    """

    loader: DataLoader
    batches: tuple[tuple[int, ...], ...]

    @classmethod
    def build(cls, cfg: Mapping[str, Any], num_batches: int, seed: int = 0) -> CalibrationSet:
        """Take ``num_batches`` batches of ``calib_dataloader`` of a runner's ``cfg``; fewer where it has no more.

        Raises:
            ValueError: there is no such loader, it cannot be built, or its data set is empty.
        """
        if num_batches < 1:
            raise ValueError(f'num_batches must be at least 1, got {num_batches}')
        try:
            loader = Runner.build_dataloader(_loader_cfg(cfg), seed=seed)
        except (TypeError, KeyError, ValueError, FileNotFoundError) as error:
            raise ValueError(f'calib_dataloader cannot be built: {error}') from error
        _undeal(loader.sampler)
        batches = tuple(tuple(b) for b in itertools.islice(loader.batch_sampler, num_batches))
        if not batches or not batches[0]:
            raise ValueError('no calibration images: the data set of calib_dataloader is empty')
        if len(batches) < num_batches:
            MMLogger.get_current_instance().warning(
                f'calibration: {num_batches} batches were asked for, the images give {len(batches)}; using those'
            )
        return cls(loader, batches)

    @property
    def indices(self) -> list[int]:
        """Every image's index in the data set, in calibration order."""
        return list(itertools.chain.from_iterable(self.batches))

    def load(self, batches: Sequence[Sequence[int] | None]) -> Iterator[Any]:
        """Load batches lazily; ``None`` stays ``None``."""
        loader = DataLoader(
            self.loader.dataset,
            batch_sampler=[list(b) for b in batches if b is not None],
            num_workers=self.loader.num_workers,
            collate_fn=self.loader.collate_fn,
            worker_init_fn=self.loader.worker_init_fn,
        )
        loaded = iter(loader)
        return (None if b is None else next(loaded) for b in batches)


def _loader_cfg(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """``calib_dataloader``, or one over the training images; with the test pipeline where it has none of its own."""
    test = cfg.get('test_dataloader') or {}
    if cfg.get('calib_dataloader') is not None:
        loader = copy.deepcopy(dict(cfg['calib_dataloader']))
    elif cfg.get('train_dataloader') is not None:
        train = copy.deepcopy(dict(cfg['train_dataloader']))
        for dataset in _innermost(train['dataset']):
            dataset.pop('pipeline', None)
        loader = dict(
            dataset=train['dataset'],
            batch_size=test.get('batch_size', train.get('batch_size', 1)),
            num_workers=train.get('num_workers', 0),
            sampler=dict(type='DefaultSampler', shuffle=True),
        )
    else:
        raise ValueError(
            'no calibration images: the config has neither calib_dataloader nor train_dataloader. Write '
            'calib_dataloader beside test_dataloader, over training images'
        )
    for dataset in _innermost(loader.get('dataset')):
        if 'pipeline' not in dataset:
            dataset['pipeline'] = _evaluation_pipeline(cfg)
    loader.setdefault('sampler', dict(type='DefaultSampler', shuffle=True))
    return loader


def _innermost(dataset: Any) -> Iterator[dict[str, Any]]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset: they own the pipelines."""
    if not isinstance(dataset, Mapping):
        return
    wrapped = dataset.get('datasets', [dataset['dataset']] if 'dataset' in dataset else None)
    if wrapped is None:
        yield dataset  # type: ignore[misc]
    else:
        for inner in wrapped:
            yield from _innermost(inner)


def _evaluation_pipeline(cfg: Mapping[str, Any]) -> Any:
    """The test pipeline; the val pipeline where the test one augments (TTA)."""
    for key in ('test_dataloader', 'val_dataloader'):
        pipeline = ((cfg.get(key) or {}).get('dataset') or {}).get('pipeline')
        if pipeline is not None and not any('TestTimeAug' in str(step.get('type')) for step in pipeline):
            return copy.deepcopy(pipeline)
    raise ValueError('calib_dataloader.dataset has no pipeline, and there is no test or val pipeline to take')


def _undeal(sampler: Any) -> None:
    """Let a distributed sampler walk the whole data set: every rank must know the order of all images."""
    if dist.get_world_size() == 1:
        return
    if not all(hasattr(sampler, k) for k in ('rank', 'world_size', 'num_samples', 'total_size')):
        raise ValueError(
            f'calib_dataloader has a {type(sampler).__name__}, whose order over several processes is unknown; '
            "use sampler=dict(type='DefaultSampler', shuffle=...)"
        )
    sampler.rank, sampler.world_size = 0, 1
    sampler.num_samples = sampler.total_size = len(sampler.dataset)


def image_names(dataset: Dataset, indices: Sequence[int] | None = None) -> list[str]:
    """Paths of the images, empty where the data set has none to tell."""
    if not hasattr(dataset, 'get_data_info'):
        return []
    chosen = range(len(dataset)) if indices is None else indices  # type: ignore[arg-type]
    names = [dataset.get_data_info(i).get('img_path') for i in chosen]
    return [os.path.realpath(name) for name in names if isinstance(name, str)]


def _quantized_beside_backbone(model: nn.Module) -> bool:
    """Whether calibration has to pass through more of ``model`` than its backbone."""
    return any(is_quantized(part) for name, part in model.named_children() if name != 'backbone')


def forward_of(model: nn.Module) -> Callable[[Any, Any], Any]:
    """How a batch of a data loader passes through ``model``: as far as there are quantized layers."""
    whole = _quantized_beside_backbone(model)

    def forward(model: Any, batch: Any) -> Any:
        data = model.data_preprocessor(batch, False)
        if whole:
            return model(**data, mode='tensor')
        # a detector's heads, for instance: they stay float, and would sort boxes for nothing
        return model.extract_feat(data['inputs'])

    return forward


def calibrate_on_(model: nn.Module, data: CalibrationSet, logger: MMLogger) -> int:
    """Calibrate a quantized twin over ``data``, shared between the ranks; returns the number of images."""
    classifier = find_classifier(model)
    total = len(data.batches)
    turns = itertools.count(1)

    run = forward_of(classifier)

    def forward(model: Any, batch: Any) -> Any:
        out = run(model, batch)
        done = next(turns) * dist.get_world_size()
        if done < total + dist.get_world_size():  # steps of the recipe pass over them again
            logger.info(f'calibration: batch {min(done, total)}/{total}')
        return out

    if dist.get_world_size() == 1:
        calibrate_(classifier, data.load(data.batches), forward, report=logger.info)
    else:
        calibrate_(classifier, data.load(deal(data.batches)), forward, sync=RankSync())
    return len(data.indices)
