"""Tensors as exact integers on their way to a grid: what products and sums put out under strict quant.

A layer that knows the grid of its input hands its quantizer an :class:`Exact` tensor instead of a float one. The
quantizer lays it on its own grid by the integer rules of :mod:`fqvit_plugin.dyadic`, so that the simulation puts out
the codes of the integer model. Integers are carried in float32 below 2**24 and in float64 below 2**53.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .dyadic import add_rule, added, affine_rule, mean_rule, rescaled_, weighted_mean
from .functional import whole_steps
from .intmath import LARGEST_EXPONENT

__all__ = ['Attended', 'Exact', 'Joined', 'Powers', 'Sum', 'Sums', 'reals']


class Exact(ABC):
    """A tensor that is not yet on a grid (abstract)."""

    @property
    @abstractmethod
    def sources(self) -> tuple[Tensor, ...]:
        """The parameters that :meth:`rule` reads."""

    @abstractmethod
    def rule(self, scale: Tensor) -> Any:
        """The integer constants that lead to a grid of step ``scale``, () or (C,)."""

    @abstractmethod
    def steps(self, rule: Any) -> Tensor:
        """Whole steps of that grid, float32, not yet saturated."""

    @abstractmethod
    def value(self) -> Tensor:
        """The same in reals, float32: for a quantizer that knows no integer rule."""


@dataclass(frozen=True, eq=False)
class Sums(Exact):
    """Accumulators: ``x = sums * prod(scales) * factor + bias * factor``.

    Args:
        sums: (…, C) float32 integers below 2**24, or float64 ones of at most 28 bits.
        scales: () or (C,) each.
        factor: layer scale (C,), or a number such as the attention's.
        bias: (C,).
    """

    sums: Tensor
    scales: tuple[Tensor, ...]
    factor: Tensor | float = 1.0
    bias: Tensor | None = None

    def times(self, factor: Tensor | float) -> Sums:
        """Multiplied; () or (C,)."""
        return replace(self, factor=self.factor * factor)

    def view(self, change: Callable[[Tensor], Tensor]) -> Sums:
        """In another layout; ``change`` leaves the last axis alone where it has scales of its own."""
        return replace(self, sums=change(self.sums))

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What :meth:`rule` reads."""
        return tuple(t for t in (*self.scales, self.factor, self.bias) if isinstance(t, Tensor))

    def rule(self, scale: Tensor) -> Any:
        """See :func:`~fqvit_plugin.dyadic.affine_rule`."""
        return affine_rule(self.scales, self.factor, self.bias, scale)

    def steps(self, rule: Any) -> Tensor:
        """Overwrites ``sums``."""
        return rescaled_(self.sums, rule)

    def value(self) -> Tensor:
        """In reals."""
        x = self.sums.float()
        for scale in self.scales:
            x = x * scale
        return (x if self.bias is None else x + self.bias) * self.factor


@dataclass(frozen=True, eq=False)
class Sum(Exact):
    """The sum of two tensors that are on grids already: residual sums, position embeddings.

    Args:
        a, b: reals on the grids of ``scale_a`` and ``scale_b``; shapes broadcast.
    """

    a: Tensor
    scale_a: Tensor
    b: Tensor
    scale_b: Tensor

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What :meth:`rule` reads."""
        return self.scale_a, self.scale_b

    def rule(self, scale: Tensor) -> Any:
        """See :func:`~fqvit_plugin.dyadic.add_rule`."""
        return add_rule(self.scale_a, self.scale_b, scale)

    def steps(self, rule: Any) -> Tensor:
        """A new tensor."""
        return added(self.a, self.scale_a, self.b, self.scale_b, rule)

    def value(self) -> Tensor:
        """In reals."""
        return self.a + self.b


@dataclass(frozen=True, eq=False)
class Powers:
    """Probabilities of Log-Int-Softmax, ``2**-k`` over their row's sum; on their grid already.

    Args:
        powers: (…, N, T), ``2**-k`` with k up to 15, or 0.
    """

    powers: Tensor

    def times(self, v_steps: Tensor, v_scale: Tensor) -> Attended:
        """The product with values of (…, T, D) whole steps of ``v_scale`` ()."""
        total = self.powers.sum(dim=-1, keepdim=True)  # exact up to 512 tokens, as are both products
        high = torch.threshold(self.powers, 2.0**-7.5, 0.0)  # eight powers each, as two int8 products have them
        sums = (high @ v_steps).double().add_(self.powers.sub_(high) @ v_steps)
        return Attended(sums, total.double(), v_scale)

    def value(self) -> Tensor:
        """Rows that sum to 1."""
        return self.powers / self.powers.sum(dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Attended(Exact):
    """What attention puts out: ``x = sums / total * scale``.

    Args:
        sums: (…, D) float64, multiples of 2**-15.
        total: (…, 1) float64, the same.
        scale: ().
        merge: layout of the result.
    """

    sums: Tensor
    total: Tensor
    scale: Tensor
    merge: Callable[[Tensor], Tensor] = lambda x: x

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What :meth:`rule` reads."""
        return (self.scale,)

    def rule(self, scale: Tensor) -> Any:
        """See :func:`~fqvit_plugin.dyadic.mean_rule`."""
        return mean_rule(self.scale.double() / scale.double())

    def steps(self, rule: Any) -> Tensor:
        """Overwrites ``sums``."""
        one = 2.0**LARGEST_EXPONENT
        return self.merge(weighted_mean(self.sums.mul_(one), self.total * one, rule).float())

    def value(self) -> Tensor:
        """In reals."""
        return self.merge((self.sums / self.total).float() * self.scale)


@dataclass(frozen=True, eq=False)
class Joined(Exact):
    """Reals, which are rounded to the grid as they are, before an exact tensor: class token and patches.

    Args:
        first: (B, P, C).
        rest: (B, N, C).
    """

    first: Tensor
    rest: Exact

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What :meth:`rule` reads."""
        return self.rest.sources

    def rule(self, scale: Tensor) -> Any:
        """The rule of the exact part, and the scale."""
        return scale, self.rest.rule(scale)

    def steps(self, rule: Any) -> Tensor:
        """A new tensor (B, P + N, C)."""
        scale, rest = rule
        return torch.cat((whole_steps(self.first, scale), self.rest.steps(rest)), dim=1)

    def value(self) -> Tensor:
        """In reals."""
        return torch.cat((self.first, self.rest.value()), dim=1)


def reals(x: Tensor | Exact | Powers) -> Tensor:
    """``x`` in reals."""
    return x if isinstance(x, Tensor) else x.value()
