"""Calibration by several processes that gives the scales of one.

Batches are dealt to the ranks in turn. Each rank measures its own; after every round the measurements are
exchanged and folded in batch order, so even an order-dependent average comes out the same, bit for bit. The last
batch runs on every rank, which makes every search see the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import mmengine.dist as dist
from torch import nn

from .lifecycle import named_quantizers
from .observers import Observer

__all__ = ['RankSync', 'deal']

T = TypeVar('T')


def deal(batches: Sequence[T]) -> list[T | None]:
    """The batches this rank runs: its share of all but the last, ``None`` where a round has none, and the last."""
    rank, world = dist.get_rank(), dist.get_world_size()
    first, last = batches[:-1], batches[-1]
    rounds = -(-len(first) // world)
    mine: list[T | None] = [first[i] if i < len(first) else None for i in range(rank, rounds * world, world)]
    return [*mine, last]


class RankSync:
    """Exchanges measurements between ranks; an error on one rank is raised on all, none is left waiting."""

    def __init__(self) -> None:
        self._error: str | None = None

    def defer(self, model: nn.Module) -> None:
        """Keep measurements back from here on, to be exchanged by :meth:`exchange`."""
        for observer in _observers(model):
            observer.deferred = []

    def guard(self, forward: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
        """``forward`` that skips empty turns and keeps an error for the next exchange."""

        def run(model: nn.Module, batch: Any) -> None:
            if batch is None:
                return
            try:
                forward(model, batch)
            except (ValueError, RuntimeError) as error:
                self._error = f'rank {dist.get_rank()}: {error}'

        return run

    def exchange(self, model: nn.Module) -> None:
        """Fold this round's measurements of every rank, in batch order.

        Raises:
            ValueError: the forward pass of some rank failed.
        """
        observers = list(_observers(model))
        local = [[m.cpu() for m in observer.deferred or ()] for observer in observers]
        gathered = dist.all_gather_object((self._error, local))
        self.raise_any([error for error, _ in gathered])
        for i, observer in enumerate(observers):
            device = observer.deferred[0].device if observer.deferred else None
            for _, measured in gathered:
                for m in measured[i]:
                    observer.fold(m if device is None else m.to(device))
            observer.deferred = []

    def resume(self, model: nn.Module) -> None:
        """Fold measurements as they come again, for the last batch."""
        for observer in _observers(model):
            observer.deferred = None

    def settle(self) -> None:
        """Raise what happened on any rank since the last exchange."""
        self.raise_any(dist.all_gather_object(self._error))

    @staticmethod
    def raise_any(errors: Sequence[str | None]) -> None:
        """Raise the first error there is."""
        for error in errors:
            if error is not None:
                raise ValueError(error)


def _observers(model: nn.Module) -> Iterator[Observer]:
    for _, quantizer in named_quantizers(model):
        observer = getattr(quantizer, 'observer', None)
        if observer is not None:
            yield observer
