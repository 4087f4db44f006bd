"""Top-1 of an exported file in its engine, next to the integer model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmpretrain.registry import DATASETS, MODELS
from torch import Tensor

from fqvit_plugin.export.packages import need
from fqvit_plugin.export.proof import session
from fqvit_plugin.integer.program import IntegerModel

__all__ = ['Labelled', 'openvino_runner', 'read_labelled', 'runtime_runner', 'top1']


class Labelled:
    """Images of a folder, through a config's test pipeline and normalization.

    Args:
        folder: with a folder for each class, in order of their names; or files named ``<class index>_<anything>``.
        cfg: of the model.
    """

    def __init__(self, folder: Path, cfg: Config) -> None:
        pipeline = cfg.test_dataloader.dataset.pipeline
        flat = not any(p.is_dir() for p in folder.iterdir())
        options = dict(data_root=str(folder), pipeline=pipeline, lazy_init=flat)
        self._dataset = DATASETS.build(dict(type='CustomDataset', **options))
        if flat:
            files = sorted(p for p in folder.iterdir() if p.suffix.lower() in self._dataset.extensions)
            self._entries = [(str(f), _index(f)) for f in files]
        else:
            infos = (self._dataset.get_data_info(i) for i in range(len(self._dataset)))
            self._entries = [(info['img_path'], int(info['gt_label'])) for info in infos]
        if not self._entries:
            raise ValueError(f'--images: {folder} holds no images')
        options = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
        options = {k: options[k] for k in ('mean', 'std', 'to_rgb') if k in options}
        self._preprocessor = MODELS.build(dict(type='ClsDataPreprocessor', **options))

    def __len__(self) -> int:
        return len(self._entries)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalized images (B, 3, H, W) and their classes (B,)."""
        for start in range(0, len(self), size):
            entries = self._entries[start : start + size]
            images = [self._dataset.pipeline({'img_path': path})['inputs'] for path, _ in entries]
            yield self._preprocessor({'inputs': images})['inputs'], torch.tensor([label for _, label in entries])


def _index(file: Path) -> int:
    start = file.name.split('_')[0]
    if not start.isdigit():
        raise ValueError(f'--images: {file.name} is not named <class index>_<anything>, nor in the folder of a class')
    return int(start)


def read_labelled(folder: Path, cfg: Config) -> Labelled:
    """The images of ``folder``.

    Raises:
        ValueError: there are none, or their names do not begin with a class.
    """
    return Labelled(folder, cfg)


def runtime_runner(path: Path) -> Callable[[Tensor], np.ndarray]:
    """The file in onnxruntime with its graph optimization."""
    running = session(path, optimized=True)
    return lambda images: running.run(['logits'], {'image': images.numpy()})[0]


def openvino_runner(path: Path) -> Callable[[Tensor], np.ndarray]:
    """The file in OpenVINO on the CPU; what is not int8 in float32."""
    core = need('openvino').Core()
    compiled: Any = core.compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda images: compiled([images.numpy()])[0]


def top1(path: Path, integer: IntegerModel, images: Labelled, target: str, batch_size: int) -> str:
    """A line for each engine: top-1, and on how many images it answers like the integer model."""
    engines = {'onnxruntime, optimization on': runtime_runner(path)}
    if target == 'openvino':
        engines['openvino'] = openvino_runner(path)
    right = dict.fromkeys(('integer model', *engines), 0)
    same = dict.fromkeys(engines, 0)
    for x, labels in images.batches(batch_size):
        answers = integer(x).argmax(1)
        right['integer model'] += int((answers == labels).sum())
        for name, run in engines.items():
            given = torch.from_numpy(run(x)).argmax(1)
            right[name] += int((given == labels).sum())
            same[name] += int((given == answers).sum())
    lines = [f'  top-1 of {len(images)} images: integer model {right["integer model"] / len(images):.2%}']
    lines += [
        f'  {name}: {right[name] / len(images):.2%}, answers like the integer model on {same[name] / len(images):.2%}'
        for name in engines
    ]
    return '\n'.join(lines)
