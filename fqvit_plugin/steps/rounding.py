"""Round: codes of weights that make up for each other's errors, on the inputs that the quantized model gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lifecycle import quant, set_phase
from ..phase import Phase
from ..registry import STEPS
from .base import Calibration, Step, blocks_of, roundable, walk
from .parts import parts_of
from .statistics import Moments, row_weights

__all__ = ['Round', 'damped', 'round_with_feedback']


@STEPS.register_module(name=['round', 'Round'])
class Round(Step):
    """Chooses the codes of every weight in the blocks, and its bias, layer by layer along the quantized stream.

    A weight is first moved so that the layer, on the inputs which the quantized model gives it, comes nearer to what
    the float model's layer puts out; a layer that adds to the residual stream makes up for the stream's own error
    too. That is a ridge regression on the input. The scale of a row is the one of least error, each column weighted
    by its input's variance. Columns are then rounded one after the other, and those to come take over what the
    rounded ones did wrong. The bias moves so that the mean of the output is the wanted one. Rows of the output count
    as much as they matter to the model's answers.

    Args:
        damp: added to the diagonal of the inputs' covariance for rounding, as a part of its mean; between 0 and 1.
        shrink: the narrowest range that is tried, as a part of a row's.
        ridge: added to the diagonal for the regression, as a part of its mean; None: no regression.
        share: how much of a row's weight is its importance; the rest is alike for all rows. 0 to 1.

    Source: Frantar et al., GPTQ, ICLR 2023; Zhong et al., ERQ, ICML 2024, and Fu et al., QwT, CVPR 2025 (regression);
    Nagel et al., ICCV 2019 (bias correction); Li et al., BRECQ, ICLR 2021 (Fisher information).
    """

    def __init__(
        self, damp: float = 0.01, shrink: float = 0.3, ridge: float | None = 8.0, share: float = 0.5
    ) -> None:
        if not 0 < damp <= 1 or not 0 < shrink <= 1 or (ridge is not None and ridge <= 0) or not 0 <= share <= 1:
            raise ValueError(
                'round wants damp and shrink between 0 and 1, ridge above 0 or None and share in 0 to 1, '
                f'got {damp}, {shrink}, {ridge} and {share}'
            )
        self.damp, self.shrink, self.ridge, self.share = damp, shrink, ridge, share

    @torch.no_grad()
    def run(self, calibration: Calibration) -> None:
        """Put codes and biases into the weights' quantizers."""
        quant(calibration.model)
        set_phase(calibration.model, Phase.FLOAT)
        layers = [layer for _, module in blocks_of(calibration.model) for layer in roundable(module)]
        weights = row_weights(calibration, layers, self.share)
        for name, block, floats, quants, _ in walk(calibration):
            calibration.report(f'round: {name}')
            for part in parts_of(block, floats[0]):
                moments = Moments(weights[part.layer])
                for x, y in zip(floats, quants, strict=True):
                    moments.add(*part.pair(calibration.model, block, x, y))
                self._round_layer(part.layer, moments)

    def _round_layer(self, layer: Any, moments: Moments) -> None:
        weight, _ = layer.expanded()
        quantizer = layer.weight_quantizer
        limit = quantizer.spec.bit_type.qmax + 1
        (mean, wanted), (covariance, cross) = moments.means, moments.covariances
        rows, columns = layer.weight.shape
        if (copies := layer.copies[0]) is not None:  # as far below their channel as in float
            wanted = torch.cat((wanted, wanted[copies[0]] - copies[1]))
            cross = torch.cat((cross, cross[copies[0]]))
        if self.ridge is not None:
            off = cross - weight.double() @ covariance
            weight = weight + torch.linalg.solve(damped(covariance, self.ridge), off.T).T.float()
        variance = covariance.diagonal().clamp_min(0).float()[:columns]
        quantizer.search_(weight[:rows, :columns], variance, self.shrink)
        scale, multiples = layer.integers()[1][:, None], layer.multiples()  # with those of copies
        codes = round_with_feedback(weight, scale * multiples, covariance, limit, self.damp)
        steps = codes * multiples
        quantizer.choose(steps, wanted - (steps * scale) @ mean)
        layer.freeze()


def round_with_feedback(weight: Tensor, scale: Tensor, covariance: Tensor, limit: int, damp: float) -> Tensor:
    """(O, I) int8 codes; each column's error is spread over the columns to come.

    Args:
        weight: (O, I).
        scale: (O, I), or (O, 1).
        covariance: (I, I) of the inputs.
        limit: codes are -limit to limit - 1.
        damp: of the diagonal, as a part of its mean.
    """
    size = weight.shape[1]
    second = damped(covariance, damp)
    order = second.diagonal().argsort(descending=True)
    second = second[order][:, order]
    feedback = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second)), upper=True)
    rest, step = weight.double()[:, order], scale.double().expand_as(weight)[:, order]
    codes = torch.zeros_like(rest)
    for start in range(0, size, _COLUMNS):
        stop = min(start + _COLUMNS, size)
        errors = torch.zeros_like(rest[:, start:stop])
        for i in range(start, stop):
            here = step[:, i : i + 1]
            code = torch.round(rest[:, i : i + 1] / here).clamp_(-limit, limit - 1)
            codes[:, i : i + 1] = code
            error = (rest[:, i : i + 1] - code * here) / feedback[i, i]
            errors[:, i - start : i - start + 1] = error
            rest[:, i:stop] -= error @ feedback[i : i + 1, i:stop]
        rest[:, stop:] -= errors @ feedback[start:stop, stop:]
    return codes[:, order.argsort()].to(torch.int8)


def damped(covariance: Tensor, part: float) -> Tensor:
    """``covariance`` (I, I) with ``part`` of the mean of its diagonal added to it."""
    out = covariance.clone()
    out.diagonal().add_(part * out.diagonal().mean().clamp_min(1e-12))
    return out


#: Columns that are rounded before what remains is brought up to date.
_COLUMNS = 64
