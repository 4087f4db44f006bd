"""Functions of one value, GELU above all, as integer arithmetic has them: a table over a 16-bit grid.

The simulation rounds the function's input to that grid too, so that both compute the same codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .quantizers import UniformQuantizer

__all__ = ['TABLE_BITS', 'function_table', 'input_grid']

#: Bits of the grid that a function reads. An 8-bit result changes at few hundred of its 65,536 points.
TABLE_BITS = 16


def input_grid(function: Callable[[Tensor], Tensor], quantizer: UniformQuantizer) -> tuple[float, int]:
    """Scale and zero point (signed) of a 16-bit grid outside of which the code of ``function(x)`` is constant.

    Args:
        function: elementwise; it must settle towards both sides, or leave the output's grid there.
        quantizer: of the result, with one scale.

    Raises:
        ValueError: a function with parameters, or one that settles nowhere.
    """
    with torch.no_grad():
        scale = float(quantizer.scale)
        reach = 16 + 2.0 ** (quantizer.spec.bit_type.bits + 1) * scale
        if any(True for _ in getattr(function, 'parameters', tuple)()):
            raise ValueError(f'{type(function).__name__} has parameters: no table can stand for it')
        ends = torch.tensor([-reach, -1e30, reach, 1e30], dtype=torch.float64, device=quantizer.scale.device)
        low_code, lowest_code, high_code, highest_code = quantizer.quantize(function(ends)).tolist()
        if (low_code, high_code) != (lowest_code, highest_code):
            raise ValueError(f'{type(function).__name__} does not settle within {reach:.3g} of 0: no table for it')
        x = torch.linspace(-reach, reach, 2**20 + 1, dtype=torch.float64, device=quantizer.scale.device)
        changes = quantizer.quantize(function(x)).diff().nonzero().flatten()
    low, high = (float(x[changes[0]]), float(x[changes[-1] + 1])) if len(changes) else (-1.0, 1.0)
    margin = 1e-3 * (high - low)  # so that the last points lie safely where the code is constant, and all beyond
    low, high = min(low - margin, 0.0), max(high + margin, 0.0)
    step = (high - low) / (2**TABLE_BITS - 1)
    step = float(torch.tensor(step, dtype=torch.float32))  # what the simulation can hold
    return step, round(-(2 ** (TABLE_BITS - 1)) - low / step)


def function_table(function: Callable[[Tensor], Tensor], quantizer: UniformQuantizer) -> tuple[float, int, Tensor]:
    """Scale and zero point of :func:`input_grid`, and the code of ``function`` at each of its points, float64.

    Raises:
        ValueError: as :func:`input_grid`.
    """
    step, zero = input_grid(function, quantizer)
    half = 2 ** (TABLE_BITS - 1)
    with torch.no_grad():
        x = torch.arange(-half - zero, half - zero, dtype=torch.float64, device=quantizer.scale.device) * step
        return step, zero, quantizer.quantize(function(x))
