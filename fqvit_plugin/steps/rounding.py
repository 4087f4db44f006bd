"""Round: codes of weights that make up for each other's errors, on the inputs that the quantized model gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..lifecycle import quant
from ..phase import Phase
from ..registry import STEPS
from .base import Block, Calibration, Step, in_phase, roundable, walk

__all__ = ['Round', 'round_with_feedback', 'searched_scale']


@STEPS.register_module(name=['round', 'Round'])
class Round(Step):
    """Chooses the codes of every weight in the blocks, and its bias, layer by layer along the quantized stream.

    The scale of a row is the one of least error, each column weighted by its input's second moment. Columns are then
    rounded one after the other, and those to come take over what the rounded ones did wrong. The bias moves so that
    the mean of the output is that of the float model.

    Args:
        damp: added to the diagonal of the inputs' second moments, as a part of its mean; between 0 and 1.
        shrink: the narrowest range that is tried, as a part of a row's.

    Source: Frantar et al., GPTQ, ICLR 2023; Nagel et al., ICCV 2019 (bias correction).
    """

    def __init__(self, damp: float = 0.01, shrink: float = 0.3) -> None:
        if not 0 < damp <= 1 or not 0 < shrink <= 1:
            raise ValueError(f'round wants damp and shrink between 0 and 1, got {damp} and {shrink}')
        self.damp, self.shrink = damp, shrink

    @torch.no_grad()
    def run(self, calibration: Calibration) -> None:
        """Put codes and biases into the weights' quantizers."""
        quant(calibration.model)
        for name, block, floats, quants, _ in walk(calibration):
            calibration.report(f'round: {name}')
            self._round_block(calibration, block, floats, quants)

    def _round_block(
        self, calibration: Calibration, block: Block, floats: list[Tensor], quants: list[Tensor]
    ) -> None:
        layers = roundable(block.module)
        means: dict[Any, Moments] = {layer: Moments() for layer in layers}
        order: list[Any] = []

        def observe(layer: Any, _: Any, out: Tensor) -> None:
            if layer not in order:
                order.append(layer)
            means[layer].add(out, second=False)

        _run(block, floats, [layer.register_forward_hook(observe) for layer in layers])
        for layer in order:
            inputs = Moments()
            with in_phase(calibration.model, Phase.QUANT):
                hook = layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.add(args[0]))
                _run(block, quants, [hook])
            self._round_layer(layer, inputs, means[layer].mean)

    def _round_layer(self, layer: Any, inputs: Moments, wanted: Tensor) -> None:
        weight, _ = layer.expanded()
        quantizer = layer.weight_quantizer
        limit = quantizer.spec.bit_type.qmax + 1
        covariance = inputs.covariance
        scale = searched_scale(layer.weight, inputs.diagonal[: layer.weight.shape[1]], limit, self.shrink)
        quantizer.scale.copy_(scale)
        rows = layer.integers()[1]  # with the scales of copies
        codes = round_with_feedback(weight, rows, covariance, limit, self.damp)
        if (copies := layer.copies[0]) is not None:  # as far below their channel as in float
            wanted = torch.cat((wanted, wanted[copies[0]] - copies[1]))
        quantizer.choose(codes, wanted - (codes.float() * rows[:, None]) @ inputs.mean)
        layer.freeze()


def _run(block: Block, streams: Sequence[Tensor], handles: Sequence[Any]) -> None:
    try:
        for x in streams:
            block(x)
    finally:
        for handle in handles:
            handle.remove()


class Moments:
    """Mean and covariance of rows, summed over batches."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0.0
        self.second: Any = 0.0

    def add(self, x: Any, second: bool = True) -> None:
        """Rows (…, C)."""
        rows = x.detach().flatten(0, -2)
        self.count += len(rows)
        self.total = self.total + rows.sum(0, dtype=torch.float64)
        if second:
            self.second = self.second + (rows.T @ rows).double()

    @property
    def mean(self) -> Tensor:
        """(C,)."""
        return (self.total / self.count).float()

    @property
    def covariance(self) -> Tensor:
        """(C, C), float64: without the mean, which the bias takes."""
        mean = self.total / self.count
        return self.second / self.count - mean[:, None] * mean

    @property
    def diagonal(self) -> Tensor:
        """(C,)."""
        return self.covariance.diagonal().clamp_min(0).float()


def searched_scale(weight: Tensor, importance: Tensor, limit: int, shrink: float) -> Tensor:
    """(O,) scales of least squared error, columns weighted by ``importance``.

    Args:
        weight: (O, I).
        importance: (I,).
        limit: codes are -limit to limit - 1.
        shrink: the narrowest range, as a part of the row's.
    """
    top = weight.abs().amax(1).clamp_min(1e-8) / (limit - 0.5)
    best, best_error = top, torch.full_like(top, torch.inf)
    for part in torch.linspace(shrink, 1.0, 71).tolist():
        scale = (top * part)[:, None]
        codes = torch.round(weight / scale).clamp_(-limit, limit - 1)
        error = (codes.mul_(scale).sub_(weight).square_() * importance).sum(1)
        better = error < best_error
        best, best_error = torch.where(better, scale[:, 0], best), torch.where(better, error, best_error)
    return best


def round_with_feedback(weight: Tensor, scale: Tensor, covariance: Tensor, limit: int, damp: float) -> Tensor:
    """(O, I) int8 codes; each column's error is spread over the columns to come.

    Args:
        weight: (O, I).
        scale: (O,).
        covariance: (I, I) of the inputs.
        limit: codes are -limit to limit - 1.
        damp: of the diagonal, as a part of its mean.
    """
    size = weight.shape[1]
    second = covariance.clone()
    second.diagonal().add_(damp * second.diagonal().mean().clamp_min(1e-12))
    order = second.diagonal().argsort(descending=True)
    second = second[order][:, order]
    feedback = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second)), upper=True)
    rest, step = weight.double()[:, order], scale.double()[:, None]
    codes = torch.zeros_like(rest)
    for start in range(0, size, _COLUMNS):
        stop = min(start + _COLUMNS, size)
        errors = torch.zeros_like(rest[:, start:stop])
        for i in range(start, stop):
            code = torch.round(rest[:, i : i + 1] / step).clamp_(-limit, limit - 1)
            codes[:, i : i + 1] = code
            error = (rest[:, i : i + 1] - code * step) / feedback[i, i]
            errors[:, i - start : i - start + 1] = error
            rest[:, i:stop] -= error @ feedback[i : i + 1, i:stop]
        rest[:, stop:] -= errors @ feedback[start:stop, stop:]
    return codes[:, order.argsort()].to(torch.int8)


#: Columns that are rounded before what remains is brought up to date.
_COLUMNS = 64
