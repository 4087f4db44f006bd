"""What closed-form steps know of a layer: which rows of its output matter, moments of its input and output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Calibration, first_of

__all__ = ['Moments', 'row_weights']


class _Probe:
    """Adds zeros that take a gradient to what a layer puts out."""

    def __init__(self, layer: nn.Module) -> None:
        self.zeros: Tensor | None = None
        self._handle = layer.register_forward_hook(self._add)

    def _add(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        self.zeros = torch.zeros_like(out, requires_grad=True)
        return out + self.zeros

    def remove(self) -> None:
        self._handle.remove()


def row_weights(calibration: Calibration, layers: list[Any], share: float, seed: int = 0) -> dict[Any, Tensor]:
    """How much each row of a layer's output matters to the float model's answers, for each of ``layers``.

    A row is a token in the order in which the layer has them, say a class token first, or the tokens window by
    window. Its weight is its squared gradient, summed over channels and averaged over images: of the log likelihood
    of a class that the model's own probabilities draw (sampled Fisher information; no labels), or of a random
    projection where the model puts out something else than rows of logits.

    Args:
        calibration: its model is in phase float.
        layers: of the model.
        share: how much of a weight that is; the rest is the same for all rows. With 0 nothing is computed.
        seed: of the classes drawn.

    Returns:
        (rows of one image,) for each layer, of mean 1; a single 1 for layers whose number of rows differs between
        images, and for all where the forward pass keeps no graph.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[Any, list[Tensor]] = {layer: [] for layer in layers}
    for batch in calibration.batches if share and layers else ():
        probes = {layer: _Probe(layer) for layer in layers}
        try:
            with torch.enable_grad():
                out = first_of(calibration.forward(calibration.model, batch))
                zeros = {layer: probe.zeros for layer, probe in probes.items() if probe.zeros is not None}
                if not torch.is_tensor(out) or not out.requires_grad:  # a forward pass that keeps no graph
                    break
                gradients = torch.autograd.grad(_score(out, generator), list(zeros.values()), allow_unused=True)
        finally:
            for probe in probes.values():
                probe.remove()
        for layer, gradient in zip(zeros, gradients, strict=True):
            if gradient is not None and gradient[..., 0].numel() % len(out) == 0:
                found[layer].append(gradient.square().sum(-1).reshape(len(out), -1).sum(0))
    return {layer: _mixed(sums, share) for layer, sums in found.items()}


def _score(out: Tensor, generator: torch.Generator) -> Tensor:
    if out.ndim == 2:
        logarithms = out.log_softmax(-1)
        drawn = torch.multinomial(logarithms.detach().exp().cpu(), 1, generator=generator)
        return logarithms.gather(1, drawn.to(out.device)).sum()
    return (out * torch.randn(out.shape, generator=generator).to(out.device)).sum()


def _mixed(sums: list[Tensor], share: float) -> Tensor:
    if len({len(rows) for rows in sums}) != 1:  # none, or images of several sizes
        return torch.ones(1)
    total = torch.stack(sums).sum(0)
    return (1 - share) + share * total / total.mean() if bool(total.sum() > 0) else torch.ones(1)


class Moments:
    """Weighted means and covariances of a layer's input and of what it should put out, summed over batches.

    Args:
        weights: (rows of one image,), see :func:`row_weights`.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._count = 0.0
        self._origin: Any = None
        self._sums: Any = (0.0, 0.0)
        self._products: Any = (0.0, 0.0)

    def add(self, x: Tensor, wanted: Tensor) -> None:
        """Rows (…, I) and (…, O)."""
        pair = [t.detach().flatten(0, -2) for t in (x, wanted)]
        if self._origin is None:  # moments about a point among the rows lose no digits
            self._origin = [t.mean(0) for t in pair]
        x, wanted = (t - origin for t, origin in zip(pair, self._origin, strict=True))
        weights = self._weights.to(x).repeat(len(x) // len(self._weights))[:, None]
        heavy = x * weights
        self._count += float(weights.sum())
        self._sums = [
            s + t.sum(0, dtype=torch.float64) for s, t in zip(self._sums, (heavy, wanted * weights), strict=True)
        ]
        self._products = [p + (t.T @ heavy).double() for p, t in zip(self._products, (x, wanted), strict=True)]

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """(I,) and (O,)."""
        one, other = (o + (s / self._count).float() for o, s in zip(self._origin, self._sums, strict=True))
        return one, other

    @property
    def covariances(self) -> tuple[Tensor, Tensor]:
        """(I, I) of the input, and (O, I) of the wanted output with it; float64."""
        x, wanted = (s / self._count for s in self._sums)
        one, other = (p / self._count for p in self._products)
        return one - x[:, None] * x, other - wanted[:, None] * x
