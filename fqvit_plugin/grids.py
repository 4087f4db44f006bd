"""Which of several candidate grids has the least squared error: the search of the OMSE and PTF observers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .functional import Arithmetic, round_steps_

if TYPE_CHECKING:
    from .scheme import BitType

__all__ = ['Grids']

#: Elements times candidate grids worked on at a time in a search; twice that is taken as workspace: 4 MB.
_CHUNK = 1 << 19


@dataclass(frozen=True)
class Grids:
    """Candidate grids of a search: ``scales`` and ``zero_points``, (K, C), or (K, 1) for all channels alike."""

    scales: Tensor
    zero_points: Tensor
    bit_type: BitType
    arithmetic: Arithmetic

    def __len__(self) -> int:
        return len(self.scales)

    def __getitem__(self, candidates: Tensor) -> Grids:
        return replace(self, scales=self.scales[candidates], zero_points=self.zero_points[candidates])

    def chunk(self, rows: Tensor) -> int:
        """How many samples of ``rows`` to work on at a time."""
        return max(1, _CHUNK // (len(self) * rows.shape[0]))

    def errors(self, rows: Tensor, work: Tensor) -> Tensor:
        """Sums of squared errors of ``rows`` (C, S) on every grid, streamed over samples: (K, C) in float64."""
        total = torch.zeros(len(self), rows.shape[0], dtype=torch.float64, device=rows.device)
        scales, zero_points = self.scales[:, :, None], self.zero_points[:, :, None]
        qmin, qmax = self.bit_type.qmin, self.bit_type.qmax
        for part in rows.split(self.chunk(rows), dim=1):
            exact, error = (w[: len(self) * part.numel()].view(len(self), *part.shape) for w in work)
            torch.div(part, scales, out=exact)  # (K, C, width), in steps
            round_steps_(error.copy_(exact), zero_points, qmin, qmax, self.arithmetic).sub_(exact)
            # sum() adds in cascades; a norm's running sum in float32 would be off by 1e-4 of millions of terms
            total += error.square_().sum(dim=2).double() * self.scales.double().square()
        return total

    def workspace(self, rows: Tensor) -> Tensor:
        """Room for :meth:`errors` of ``rows`` on any of these grids; new memory costs more than the arithmetic."""
        return rows.new_empty(2, min(_CHUNK, len(self) * rows.numel()) + len(self) * rows.shape[0])

    def best(self, rows: Tensor, jointly: bool) -> Tensor:
        """The grid of least squared error of each channel, or of all ``jointly``; the first one on a tie.

        Squared errors only grow as samples are added, so a candidate is dropped once it is past the error of a good
        one over all samples; which one is good, a few samples tell. The result is that of scoring all of them.

        Returns:
            (C,) or (1,) indices.
        """
        work = self.workspace(rows)

        def score(grids: Grids, rows: Tensor) -> Tensor:
            errors = grids.errors(rows, work)
            return errors.sum(dim=1, keepdim=True) if jointly else errors

        samples = rows.shape[1]
        good = score(self, rows[:, :: max(1, samples // 4096)]).argmin(dim=0)
        limit = torch.stack([score(self[candidate[None]], rows)[0] for candidate in good.unique()]).amin(dim=0)
        limit *= 1 + 1e-5  # sums in another order differ
        total = torch.zeros(len(self), len(limit), dtype=torch.float64, device=rows.device)
        alive, start = torch.arange(len(self), device=rows.device), 0
        while start < samples:
            grids = self[alive]
            end = start + grids.chunk(rows)
            total[alive] += score(grids, rows[:, start:end])
            start = end
            alive = alive[(total[alive] <= limit).any(dim=1)]
        return alive[total[alive].argmin(dim=0)]  # argmin gives the first of equals
