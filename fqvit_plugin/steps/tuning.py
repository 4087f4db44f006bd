"""Tune: rounding, biases and steps of activations by gradients, block by block and then for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codebook import LevelsQuantizer
from ..layers import QAct
from ..lifecycle import quant, set_phase
from ..phase import Phase
from ..quantizers import UniformQuantizer
from ..registry import STEPS
from .base import Block, Calibration, Step, blocks_of, first_of, in_phase, outputs_of, roundable, walk, weight_layers

__all__ = ['Tune']


@STEPS.register_module(name=['tune', 'Tune'])
class Tune(Step):
    """Moves codes of weights to a neighbour where that brings the model nearer to its float twin; no labels.

    Weights themselves stay. What is trained is an offset of at most ``reach`` steps before rounding (from the weight,
    or from a code that a step before chose, on the weight's side of it), the bias, and the logarithm of each
    activation's step where the tensor has one, all straight-through. First every block is fitted to its float output
    on inputs that are partly the float model's, then all blocks together to the float logits, on random crops and
    reflections of the calibration images.

    Args:
        block_steps: gradient steps for each block; 0 leaves blocks out.
        model_steps: gradient steps for the whole model; 0 leaves it out.
        batch_size: images of a gradient step.
        views: random crops and reflections of each image that blocks see besides it.
        rounding_rate, scale_rate: learning rates of Adam for blocks, in steps and relative; the model's are
            ``model_rate`` times these.
        model_rate: see there.
        mix: part of a block's input that comes from the float model (QDrop's idea, for inputs).
        features: weight of the blocks' outputs beside the logits.
        crop: the smallest part of an image that a crop keeps.
        reach: see above.
        seed: of images, crops and mixes.

    Source: Nagel et al., AdaRound, ICML 2020; Li et al., BRECQ, ICLR 2021; Wei et al., QDrop, ICLR 2022.
    """

    def __init__(
        self,
        block_steps: int = 200,
        model_steps: int = 600,
        batch_size: int = 32,
        views: int = 2,
        rounding_rate: float = 5e-3,
        scale_rate: float = 1e-3,
        model_rate: float = 0.2,
        mix: float = 0.5,
        features: float = 1.0,
        crop: float = 0.5,
        reach: float = 1.5,
        seed: int = 0,
    ) -> None:
        if min(block_steps, model_steps, views) < 0 or batch_size < 1 or not 0 < crop <= 1 or not 0 <= mix <= 1:
            raise ValueError(
                'tune wants block_steps, model_steps and views from 0, batch_size from 1, crop and mix in 0 to 1, '
                f'got {block_steps}, {model_steps}, {views}, {batch_size}, {crop}, {mix}'
            )
        self.block_steps, self.model_steps, self.batch_size = block_steps, model_steps, batch_size
        self.rates, self.views = (rounding_rate, scale_rate), views
        self.model_rate, self.mix, self.features, self.crop = model_rate, mix, features, crop
        self.reach, self.seed = reach, seed

    def run(self, calibration: Calibration) -> None:
        """Put codes, biases and steps into the quantizers."""
        quant(calibration.model)
        generator = torch.Generator().manual_seed(self.seed)
        if self.block_steps:
            images = _Images(calibration, generator, self.crop, self.batch_size)
            views = [images.again(batch) for _ in range(self.views) for batch in calibration.batches]
            seen = replace(calibration, batches=[*calibration.batches, *views])
            for name, block, floats, quants, wanted in walk(seen):
                calibration.report(f'tune: {name}')
                streams = (torch.cat(floats), torch.cat(quants), torch.cat(wanted))
                self._tune_block(calibration, block, streams, generator)
        if self.model_steps:
            self._tune_model(calibration, generator)

    def _tune_block(
        self, calibration: Calibration, block: Block, streams: tuple[Tensor, ...], generator: torch.Generator
    ) -> None:
        floats, quants, wanted = streams
        spread = wanted.flatten(0, -2).std(0) + 1e-6

        def loss() -> Tensor:
            chosen = torch.randint(0, len(floats), (self.batch_size,), generator=generator)
            x = quants[chosen]
            if self.mix:
                x = torch.where(torch.rand(x.shape, generator=generator).to(x.device) < self.mix, floats[chosen], x)
            return ((block(x) - wanted[chosen]) / spread).square().mean()

        with in_phase(calibration.model, Phase.TUNE), torch.enable_grad():
            self._descend(block.module, loss, self.block_steps, 1.0)

    def _tune_model(self, calibration: Calibration, generator: torch.Generator) -> None:
        model, forward = calibration.model, calibration.forward
        images = _Images(calibration, generator, self.crop, self.batch_size)
        modules = [module for _, module in blocks_of(model)]

        def loss() -> Tensor:
            batch = next(images)
            with torch.no_grad(), in_phase(model, Phase.FLOAT), outputs_of(modules) as wanted:
                logits = _logits(forward(model, batch))
            with outputs_of(modules) as given:
                set_phase(model, Phase.TUNE)
                got = _logits(forward(model, batch))
            total = F.kl_div(got.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction='batchmean')
            for ours, theirs in zip(given.values(), wanted.values(), strict=True):
                total = total + self.features * F.mse_loss(_normed(ours), _normed(theirs))
            return total

        calibration.report('tune: the whole model')
        with in_phase(model, Phase.TUNE), torch.enable_grad():
            self._descend(nn.ModuleList(modules), loss, self.model_steps, self.model_rate)

    def _descend(self, module: nn.Module, loss: Any, steps: int, rate: float) -> None:
        offsets, others = _attach(module)
        rounding, scale = (r * rate for r in self.rates)
        optimizer = torch.optim.Adam(
            [dict(params=offsets, lr=rounding), dict(params=others, lr=scale)], betas=(0.9, 0.99)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        try:
            for _ in range(steps):
                optimizer.zero_grad()
                loss().backward(inputs=[*offsets, *others])  # the model's own parameters get no gradient
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    for offset in offsets:
                        offset.clamp_(-self.reach, self.reach)
            _commit(module)
        finally:
            _detach(module)


#: How far from its code a weight may start, in steps: short of the next one.
_NEAR = 0.45


class _Tuned:
    """Offsets and bias of a weight while they are tuned."""

    def __init__(self, layer: Any) -> None:
        quantizer = layer.weight_quantizer
        weight, _ = layer.expanded()
        steps, scale, bias = layer.integers()
        self.quantizer = quantizer
        self.scale, self.multiples = scale[:, None].detach(), layer.multiples()
        start = (weight / (self.scale * self.multiples)).detach()
        if quantizer.is_chosen:  # the code holds, and is as near to its neighbour as can be
            codes = steps / self.multiples
            start = codes + (start - codes).clamp(-_NEAR, _NEAR)
        self.start = start
        self.offset = nn.Parameter(torch.zeros_like(start))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def steps(self) -> Tensor:
        """Whole steps: codes times factors."""
        x = self.start + self.offset
        kind = self.quantizer.spec.bit_type
        return (x + (x.round() - x).detach()).clamp(kind.qmin, kind.qmax) * self.multiples

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        return self.steps() * self.scale, self.bias


def _attach(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Give layers what is tuned; the offsets, and the rest."""
    offsets, others = [], []
    for layer in module.modules():
        if isinstance(layer, QAct) and isinstance(layer.quantizer, UniformQuantizer) and _is_read(layer):
            layer.tuned = nn.Parameter(layer.scale.detach().log())
            others.append(layer.tuned)
    for layer in roundable(module):
        layer.tuned = _Tuned(layer)
        offsets.append(layer.tuned.offset)
        others += [] if layer.tuned.bias is None else [layer.tuned.bias]
    return offsets, others


def _is_read(act: QAct) -> bool:
    """Whether one scale serves the whole tensor and nothing else depends on it."""
    quantizer = act.quantizer
    return quantizer.scale.ndim == 0 and type(quantizer) in (UniformQuantizer, LevelsQuantizer)


@torch.no_grad()
def _commit(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, QAct) and layer.tuned is not None:
            layer.scale.copy_(layer.tuned.exp())
    for _, layer in weight_layers(module):
        if layer.tuned is not None:
            steps, bias = layer.tuned.steps(), layer.tuned.bias
            layer.weight_quantizer.choose(steps, steps.new_zeros(len(steps)) if bias is None else bias)


def _detach(module: nn.Module) -> None:
    layer: Any
    for layer in module.modules():
        if getattr(layer, 'tuned', None) is not None:
            del layer.tuned
            layer.tuned = None


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class _Images:
    """Random crops and reflections of random calibration images, as the model's ``forward`` takes them.

    Args:
        calibration: its batches are tensors (N, 3, H, W), pairs that begin with one, or MMEngine's dicts.
        generator: chooses.
        crop: the smallest part of an image's area.
        size: images of a batch.
    """

    def __init__(self, calibration: Calibration, generator: torch.Generator, crop: float, size: int) -> None:
        self.generator, self.crop, self.size = generator, crop, size
        self.pool = [image for batch in calibration.batches for image in _images_of(batch)]
        self.is_dict = isinstance(calibration.batches[0], Mapping)

    def __next__(self) -> Any:
        chosen = torch.randint(0, len(self.pool), (self.size,), generator=self.generator).tolist()
        return self._batch([self.pool[i] for i in chosen])

    def again(self, batch: Any) -> Any:
        """A view of each image of ``batch``."""
        return self._batch(_images_of(batch))

    def _batch(self, images: Sequence[Tensor]) -> Any:
        views = [self._view(image) for image in images]
        return {'inputs': views} if self.is_dict else torch.stack(views)

    def _view(self, image: Tensor) -> Tensor:
        """A crop at the size of the image, perhaps reflected; of its type."""
        area, ratio, left, top, flip = torch.rand(5, generator=self.generator).tolist()
        side = (self.crop + (1 - self.crop) * area) ** 0.5
        stretch = math.exp(0.25 * (2 * ratio - 1))
        width, height = min(side * stretch, 1.0), min(side / stretch, 1.0)
        theta = torch.tensor(
            [[width * (1 if flip < 0.5 else -1), 0.0, (2 * left - 1) * (1 - width)],
             [0.0, height, (2 * top - 1) * (1 - height)]], device=image.device
        )  # fmt: skip
        real = image[None].float()
        grid = F.affine_grid(theta[None], list(real.shape), align_corners=False)
        out = F.grid_sample(real, grid, mode='bicubic', padding_mode='reflection', align_corners=False)[0]
        return out if image.is_floating_point() else out.round().clamp_(0, 255).to(image.dtype)


def _images_of(batch: Any) -> Sequence[Tensor]:
    if isinstance(batch, Mapping):
        return list(batch['inputs'])
    return list(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _logits(out: Any) -> Tensor:
    """What the model says of each image, (N, classes)."""
    return first_of(out).flatten(1)
