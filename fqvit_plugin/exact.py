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

from . import fused
from .dyadic import add_rule, affine_rule, mean_rule

__all__ = ['Attended', 'Exact', 'Joined', 'Powers', 'Sum', 'Sums', 'reals']


class Exact(ABC):
    """A tensor that is not yet on a grid (abstract)."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Size of the last axis of what :meth:`laid` finishes."""

    @property
    @abstractmethod
    def sources(self) -> tuple[Tensor, ...]:
        """The parameters that :meth:`rule` reads."""

    @abstractmethod
    def rule(self, scale: Tensor) -> Any:
        """The constants that lead to a grid of step ``scale``, () or (C,)."""

    @abstractmethod
    def laid(self, rule: Any, finish: Any) -> Tensor:
        """On that grid, or through a table, as ``finish`` says (:class:`~fqvit_plugin.fused.ToGrid`); float32."""

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
    def channels(self) -> int:
        """C."""
        return self.sums.shape[-1]

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What :meth:`rule` reads."""
        return tuple(t for t in (*self.scales, self.factor, self.bias) if isinstance(t, Tensor))

    def rule(self, scale: Tensor) -> Any:
        """See :func:`~fqvit_plugin.dyadic.affine_rule`."""
        return fused.Affine.of(affine_rule(self.scales, self.factor, self.bias, scale), self.channels)

    def laid(self, rule: Any, finish: Any) -> Tensor:
        """May overwrite ``sums``."""
        return fused.affine(self.sums, rule, finish)

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
    def channels(self) -> int:
        """C."""
        return self.a.shape[-1]

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What :meth:`rule` reads."""
        return self.scale_a, self.scale_b

    def rule(self, scale: Tensor) -> Any:
        """See :func:`~fqvit_plugin.dyadic.add_rule`."""
        rule = add_rule(self.scale_a, self.scale_b, scale)
        return fused.Add.of(rule, self.scale_a, self.scale_b, self.channels)

    def laid(self, rule: Any, finish: Any) -> Tensor:
        """A new tensor."""
        return fused.add(self.a, self.b, rule, finish)

    def value(self) -> Tensor:
        """In reals."""
        return self.a + self.b


@dataclass(frozen=True, eq=False)
class Powers:
    """Probabilities of Log-Int-Softmax, powers of two over their row's sum; on their grid already.

    Two products of eight powers each fit float32 as they fit int8.

    Args:
        high: (…, N, T), ``2**-k`` with k up to 7, or 0.
        low: the same with k from 8 to 15.
        total: (…, N, 1), the row's sum of both.
    """

    high: Tensor
    low: Tensor
    total: Tensor

    def view(self, *lead: int) -> Powers:
        """With other axes before the last."""
        return Powers(*(t.view(*lead, t.shape[-1]) for t in (self.high, self.low, self.total)))

    def times(self, v_steps: Tensor, v_scale: Tensor, merge: Callable[[Tensor], Tensor]) -> Attended:
        """The product with values of (…, T, D) whole steps of ``v_scale`` (); ``merge`` makes its layout."""
        return Attended(self.high @ v_steps, self.low @ v_steps, self.total, v_scale, merge)

    def value(self) -> Tensor:
        """Rows that sum to 1."""
        return (self.high + self.low) / self.total


@dataclass(frozen=True, eq=False)
class Attended(Exact):
    """What attention puts out: ``x = (high + low) / total * scale``.

    Args:
        high, low: (…, D) float32, multiples of 2**-7 and 2**-15.
        total: (…, 1) float32, multiples of 2**-15.
        scale: ().
        merge: layout of the result.
    """

    high: Tensor
    low: Tensor
    total: Tensor
    scale: Tensor
    merge: Callable[[Tensor], Tensor]

    @property
    def channels(self) -> int:
        """D."""
        return self.high.shape[-1]

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What :meth:`rule` reads."""
        return (self.scale,)

    def rule(self, scale: Tensor) -> Any:
        """See :func:`~fqvit_plugin.dyadic.mean_rule`."""
        return mean_rule(self.scale.double() / scale.double())

    def laid(self, rule: Any, finish: Any) -> Tensor:
        """Overwrites ``high``."""
        return self.merge(fused.weighted_mean(self.high, self.low, self.total, rule, finish))

    def value(self) -> Tensor:
        """In reals."""
        return self.merge((self.high + self.low) / self.total * self.scale)


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
    def channels(self) -> int:
        """C."""
        return self.rest.channels

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What :meth:`rule` reads."""
        return self.rest.sources

    def rule(self, scale: Tensor) -> Any:
        """The rule of the exact part, and the scale."""
        return scale, self.rest.rule(scale)

    def laid(self, rule: Any, finish: Any) -> Tensor:
        """A new tensor (B, P + N, C)."""
        scale, rest = rule
        first = finish.finish(torch.round(self.first / scale))
        return torch.cat((first, self.rest.laid(rest, finish)), dim=1)

    def value(self) -> Tensor:
        """In reals."""
        return torch.cat((self.first, self.rest.value()), dim=1)


def reals(x: Tensor | Exact | Powers) -> Tensor:
    """``x`` in reals."""
    return x if isinstance(x, Tensor) else x.value()
