"""Writes integer programs: turns the scales of quantizers into gains, shifts, offsets and tables.

All real arithmetic of the conversion happens here, in float64, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..codebook import LevelsQuantizer
from ..dyadic import add_rule, affine_rule, mean_rule
from ..escape import far_of
from ..intmath import LARGEST_EXPONENT, input_range, layernorm_constants, log_int_softmax_codes
from ..layers import QAct, QActOf, QIntLayerNorm
from ..quantizers import UniformQuantizer
from ..tables import TABLE_BITS, function_table
from .program import Grid, Op, Program

__all__ = ['Builder', 'Codes', 'Sums']

#: PTF's largest factor: steps of 8 bits then fit 16.
PTF_LARGEST = 128


@dataclass(frozen=True)
class Codes:
    """A tensor of stored codes: ``x = (stored - zero) * scale``, both () or (C,) in float64 and int64.

    ``far``: (C,) int64 steps of channels with an escape (:mod:`fqvit_plugin.escape`), 0 for others; None for none.
    """

    name: str
    scale: Tensor
    zero: Tensor
    bits: int
    far: Tensor | None = None

    def far_as(self, keyword: str) -> dict[str, Tensor]:
        """``far`` as a constant of a kernel; none where it is None."""
        return {} if self.far is None else {keyword: self.far.to(torch.int32)}

    @property
    def single(self) -> tuple[float, int]:
        """Scale and zero point of a tensor that has one."""
        if self.scale.ndim or self.zero.ndim:
            raise ValueError(f'{self.name} has a scale for each channel where the integer model needs a single one')
        return float(self.scale), int(self.zero)


@dataclass(frozen=True)
class Sums:
    """A tensor of accumulators: ``x = sums * prod(scales) + bias``, scales () or (C,), bias (C,) or None."""

    name: str
    scales: tuple[Tensor, ...]
    bias: Tensor | None = None


def grid_of(act: QAct, name: str) -> Codes:
    """The grid of a quantizer that is in force.

    Raises:
        ValueError: a quantizer of another kind than uniform, or of more than 8 bits.
    """
    quantizer = act.quantizer
    if not isinstance(quantizer, UniformQuantizer):
        raise ValueError(f'{name}: the integer model knows uniform quantizers, not {type(quantizer).__name__}')
    bit_type = quantizer.spec.bit_type
    if bit_type.bits > 8:
        raise ValueError(f'{name} has {bit_type.bits} bits; the integer model computes with at most 8')
    middle = bit_type.qmin + 2 ** (bit_type.bits - 1)
    far = far_of(quantizer)
    if far is not None and bit_type.bits != 8:
        raise ValueError(f'{name} has channels with an escape and {bit_type.bits} bits; the integer model wants 8')
    scale, zero = quantizer.scale.double().cpu(), quantizer.zero_point.long().cpu() - middle
    return Codes(name, scale, zero, bit_type.bits, None if far is None else far.long().cpu())


class Builder:
    """Collects operations and constants.

    Args:
        model: whose module paths name the tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._ops: list[Op] = []
        self._constants: dict[str, Tensor] = {}
        self._grids: dict[str, Grid] = {}
        self._groups: dict[str, Tensor] = {}

    def path(self, module: Any) -> str:
        """The name of ``module`` in the model."""
        return self._paths[id(module)]

    def program(self, output: Codes, image_size: tuple[int, int]) -> Program:
        """What was written."""
        return Program(tuple(self._ops), self._constants, output.name, self._grids, image_size, self._groups)

    def emit(
        self,
        kind: str,
        inputs: Sequence[str],
        output: str,
        constants: dict[str, Tensor] | None = None,
        **settings: Any,
    ) -> str:
        """Add an operation; gives the name of its result."""
        if any(op.output == output for op in self._ops):
            raise ValueError(f'{output} is computed twice; the integer model needs a module for each call')
        names = {}
        for argument, value in (constants or {}).items():
            names[argument] = f'{output}:{argument}'
            self._constants[names[argument]] = value.cpu().contiguous()
        self._ops.append(Op(kind, tuple(inputs), output, names, settings))
        return output

    def _codes(self, codes: Codes) -> Codes:
        parts = (codes.scale, codes.zero, torch.zeros(0) if codes.far is None else codes.far)
        scale, zero, far = (tuple(t.reshape(-1).tolist()) for t in parts)
        self._grids[codes.name] = Grid(scale, zero, codes.bits, far)
        return codes

    def same_grid(self, name: str, codes: Codes) -> Codes:
        """``codes`` under another name: after a change of layout."""
        return self._codes(replace(codes, name=name))

    def grid(self, act: QAct) -> Codes:
        """The grid of ``act``, under its own name."""
        return grid_of(act, self.path(act))

    def merged(self, name: str, codes: Codes, repeat: int) -> Codes:
        """``codes`` after ``repeat`` positions were put side by side, channel by channel."""
        fields = {n: getattr(codes, n) for n in ('scale', 'zero', 'far')}
        merged = {n: t.repeat_interleave(repeat) for n, t in fields.items() if t is not None and t.ndim}
        return self._codes(replace(codes, name=name, **merged))

    def layout(self, kind: str, codes: Codes, name: str, **settings: Any) -> Codes:
        """A change of layout, which leaves the codes as they are."""
        return self.same_grid(self.emit(kind, [codes.name], name, **settings), codes)

    # ---------------------------------------------------------------- arithmetic

    def quantize(self, act: QAct) -> Codes:
        """The image on the grid of ``act``."""
        grid = self.grid(act)
        _, zero = grid.single
        self.emit('quantize', ['image'], grid.name, {'scale': act.scale.detach().clone()}, zero=zero, bits=grid.bits)
        return self._codes(grid)

    def linear(self, x: Codes, layer: Any, act: QAct, factor: Tensor | None = None) -> Codes:
        """A linear layer and its output's quantizer; ``factor`` (layer scale) multiplies the output."""
        sums = self.linear_sums(x, layer)
        return self._onto(act, lambda out: self.affine(sums, out, 1.0 if factor is None else factor))

    def linear_sums(self, x: Codes, layer: Any) -> Sums:
        """The accumulators of a linear layer or of a convolution on patches."""
        _, zero = x.single
        quantizer = layer.weight_quantizer
        if quantizer.spec.bit_type.bits > 8 or int(quantizer.zero_point.abs().max()):
            raise ValueError(f'{self.path(layer)}: the integer model takes symmetric weights of at most 8 bits')
        steps, scale, bias = layer.integers()
        weight = steps.flatten(1).to(torch.int8)
        name = self.emit('linear', [x.name], f'{self.path(layer)}.sums', {'weight': weight}, zero=zero)
        if (groups := layer.column_groups()) is not None:
            self._groups[f'{name}:weight'] = groups
        return Sums(name, (scale, x.scale), bias)

    def affine(self, x: Sums, out: Codes, factor: Tensor | float = 1.0) -> Codes:
        """``x * factor`` on the grid of ``out``, whose name the result bears."""
        factor = factor.detach().cpu() if isinstance(factor, Tensor) else factor
        bias = None if x.bias is None else x.bias.detach().cpu()
        rule = affine_rule([scale.cpu() for scale in x.scales], factor, bias, out.scale)
        offset_shift = int(rule.offset_shift)
        constants = {
            'gain': rule.gain.to(torch.int32),
            'offset': (rule.offset / 2.0**offset_shift).to(torch.int32),
            'zero': out.zero.to(torch.int32),
            **out.far_as('far'),
        }
        self.emit(
            'affine', [x.name], out.name, constants, shift=int(rule.shift), offset_shift=offset_shift, bits=out.bits
        )
        return self._codes(out)

    def add(self, a: Codes, b: Codes, act: QAct, name: str | None = None) -> Codes:
        """A residual sum on the grid of ``act``."""
        out = grid_of(act, name or self.path(act))
        rule = add_rule(a.scale, b.scale, out.scale)
        constants = {
            'gain_a': rule.gain_a.to(torch.int32),
            'gain_b': rule.gain_b.to(torch.int32),
            'zero_a': a.zero.to(torch.int32),
            'zero_b': b.zero.to(torch.int32),
            'zero': out.zero.to(torch.int32),
            **a.far_as('far_a'),
            **b.far_as('far_b'),
            **out.far_as('far'),
        }
        shift = int(rule.shift)
        self.emit('add', [a.name, b.name], out.name, constants, shift=shift, bits=out.bits)
        return self._codes(out)

    def _onto(self, act: QAct, make: Callable[[Codes], Codes], name: str | None = None) -> Codes:
        """What ``make`` puts on the grid that it is given, on the levels of ``act`` where it has some."""
        out, quantizer = grid_of(act, name or self.path(act)), act.quantizer
        if not isinstance(quantizer, LevelsQuantizer) or not quantizer.level_count:
            return make(out)
        fine = make(replace(out, name=f'{out.name}.grid'))
        table = (quantizer.nearest() - 2 ** (out.bits - 1)).to(torch.int8)
        self.emit('lookup', [fine.name], out.name, {'table': table})
        return self._codes(out)

    def lookup(self, x: Codes, function: Callable[[Tensor], Tensor], act: QAct) -> Codes:
        """Any function of one code, on the grid of ``act``: a table of ``2**bits`` entries."""
        scale, zero = x.single
        stored = torch.arange(-(2 ** (x.bits - 1)), 2 ** (x.bits - 1), device=act.scale.device)
        return self._lookup(x, self.codes_of(function((stored - zero) * scale), act), act)

    def _lookup(self, x: Codes, table: Tensor, act: QAct) -> Codes:
        out = self.grid(act)
        self.emit('lookup', [x.name], out.name, {'table': table})
        return self._codes(out)

    def regrid(self, x: Codes, channels: int, act: QAct, name: str) -> Codes:
        """The same values on the grid of ``act``: the sum of ``x`` (…, channels) with zeros."""
        zeros = {'value': x.zero.expand(1, 1, channels).to(torch.int8)}
        return self.add(x, self.same_grid(self.emit('constant', [], f'{name}.zeros', zeros), x), act, name)

    def function(self, x: Sums, act: QActOf) -> Codes:
        """``act.function(x)`` on the grid of ``act``: a table of 65,536 entries over the grid it reads."""
        step, zero, codes = function_table(act.function, act.quantizer)
        fine = Codes(f'{self.path(act)}.input', torch.tensor(step), torch.tensor(zero), TABLE_BITS)
        middle = 2 ** (act.quantizer.spec.bit_type.bits - 1) + act.quantizer.spec.bit_type.qmin
        return self._lookup(self.affine(x, fine), (codes.cpu() - middle).to(torch.int8), act)

    def constant(self, x: Tensor, act: QAct, name: str) -> Codes:
        """Real values that never change, on the grid of ``act``."""
        self.emit('constant', [], name, {'value': self.codes_of(x, act)})
        return self._codes(grid_of(act, name))

    def codes_of(self, x: Tensor, act: QAct) -> Tensor:
        """Stored codes of real values: constants and tables."""
        with torch.no_grad():
            return self._stored(act.quantizer.steps(x.detach()).cpu(), self.grid(act))

    @staticmethod
    def _stored(steps: Tensor, out: Codes) -> Tensor:
        limit = 2 ** (out.bits - 1)
        return (steps + out.zero).clamp(-limit, limit - 1).to(torch.int8)

    def mean(self, x: Codes, dims: list[int], count: int, act: QAct) -> Codes:
        """The mean over ``dims``, which hold ``count`` positions, on the grid of ``act``."""
        _, zero = x.single
        name = self.emit('mean_sums', [x.name], f'{self.path(act)}.sums', zero=zero, dims=dims)
        return self.affine(Sums(name, (x.scale,)), self.grid(act), 1 / count)

    def matmul(self, a: Codes, b: Codes, name: str) -> Sums:
        """The product of two activations."""
        (_, zero_a), (_, zero_b) = a.single, b.single
        self.emit('matmul', [a.name, b.name], name, zero_a=zero_a, zero_b=zero_b)
        return Sums(name, (a.scale, b.scale))

    def attend(
        self, logits: Codes, value: Codes, act: QAct, bits: int, name: str, mask: Tensor | None = None
    ) -> Codes:
        """Log-Int-Softmax of ``logits``, with codes of ``bits`` bits, times ``value``, on the grid of ``act``."""
        scale, zero = value.single
        distance = torch.arange(2**logits.bits, dtype=torch.float32)
        codes, last = log_int_softmax_codes(distance, logits.scale.float(), bits)
        constants = {'exponents': torch.where(codes < last, LARGEST_EXPONENT - codes, -1.0).to(torch.int8)}
        if mask is not None:
            constants['mask'] = mask < 0

        def attend(out: Codes) -> Codes:
            out_scale, out_zero = out.single
            rule = mean_rule(torch.tensor(scale / out_scale, dtype=torch.float64))
            settings = dict(zero=zero, gain=int(rule.gain), shift=int(rule.shift), out_zero=out_zero, bits=out.bits)
            self.emit('attend', [logits.name, value.name], out.name, constants, **settings)
            return self._codes(out)

        return self._onto(act, attend, name)

    def layernorm(self, x: Codes, norm: QIntLayerNorm, act: QAct) -> Codes:
        """The integer LayerNorm of ``x``, on the grid of ``act``."""
        return self._onto(act, lambda out: self._layernorm(x, norm, out))

    def _layernorm(self, x: Codes, norm: QIntLayerNorm, out: Codes) -> Codes:
        channels = norm.normalized_shape[0]
        weight = torch.ones(channels) if norm.weight is None else norm.weight.detach().cpu()
        bias = torch.zeros(channels) if norm.bias is None else norm.bias.detach().cpu()
        ratios = torch.log2(x.scale / x.scale.min())
        if not torch.equal(ratios, ratios.round()) or 2 ** ratios.max() > PTF_LARGEST:
            raise ValueError(
                f'{x.name}: the integer LayerNorm wants scales that are apart by powers of two, {PTF_LARGEST} at most'
            )
        # the same float32 scales and the same functions as the simulation, hence the same integers
        limit = 2 ** (x.bits - 1)
        ends = -limit - x.zero, limit - 1 - x.zero
        if x.far is not None:
            ends = torch.minimum(ends[0], x.far), torch.maximum(ends[1], x.far)
        in_range = input_range(x.scale.float(), *ends)
        layer = layernorm_constants(
            channels, x.scale.float(), in_range, out.scale.float(), weight.float(), bias.float(), norm.eps
        )
        constants = {
            'zero': x.zero.to(torch.int32),
            'factors': ratios.expand(channels).to(torch.uint8),
            'gain': layer.gain.to(torch.int32),
            'offset': layer.offset.to(torch.int64),
            'shifts': layer.shift.to(torch.uint8),
            'out_zero': out.zero.to(torch.int32),
            **x.far_as('far'),
        }
        settings = dict(guard=int(layer.guard), root_bits=int(layer.root_bits), bits=out.bits)
        self.emit('layernorm', [x.name], out.name, constants, **settings)
        return self._codes(out)
