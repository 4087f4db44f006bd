"""What a planned program is made of: modules that hold packed constants and launch one kernel each.

Tensors are CUDA's, or the CPU's in Triton's interpreter. Offsets are packed in int64, with everything that does not
depend on the input: bias, zero points, and the half that makes a shift round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor, nn

from ..dyadic import MEAN_BITS
from ..integer.kernels import KERNELS
from ..integer.program import Op
from .kernels.attention import attention_kernel
from .kernels.gemm import linear_kernel
from .kernels.rows import add_kernel, layernorm_kernel

__all__ = ['Attention', 'FusedLinear', 'FusedNorm', 'PlainKernel', 'ResidualAdd', 'Step']


class Step(nn.Module):
    """Some operations of a program as one.

    Args:
        inputs: tensors, by name.
        output: name of the result.
    """

    def __init__(self, inputs: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.inputs, self.output = inputs, output

    def hold(self, **tensors: Tensor) -> None:
        """Register constants, which move with the module but are no part of a checkpoint."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)


class PlainKernel(Step):
    """One operation by the integer model's own kernel."""

    def __init__(self, op: Op, constants: Mapping[str, Tensor]) -> None:
        super().__init__(op.inputs, op.output)
        self.kernel: Callable[..., Tensor] = KERNELS[op.kind]
        self.settings = dict(op.settings)
        self.names = {f'constant_{name}': name for name in op.constants}
        self.hold(**{held: constants[op.constants[name]] for held, name in self.names.items()})

    def forward(self, *tensors: Tensor) -> Tensor:
        """The operation's result."""
        constants = {name: getattr(self, held) for held, name in self.names.items()}
        return self.kernel(*tensors, **constants, **self.settings)


def _limits(bits: int) -> dict[str, int]:
    return {'LOW': -(2 ** (bits - 1)), 'HIGH': 2 ** (bits - 1) - 1}


def _dtype(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16


def _blocks(channels: int, most: int = 2048) -> tuple[int, int]:
    """Rows and channels of a program that has about ``most`` elements."""
    block = triton.next_power_of_2(channels)
    return max(1, min(64, most // block)), block


class FusedLinear(Step):
    """``linear``, ``affine`` and, with ``table``, ``lookup``: (…, I) codes to (…, O) codes."""

    weight: Tensor
    gain: Tensor
    offset: Tensor
    zero: Tensor
    table: Tensor

    def __init__(
        self, inputs: tuple[str, ...], output: str, linear: Mapping[str, Any], affine: Mapping[str, Any],
        table: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(inputs, output)
        weight = linear['weight']
        features = (weight.shape[0],)
        gain = affine['gain'].expand(features)
        offset = (affine['offset'].long() << affine['offset_shift']) + (1 << (affine['shift'] - 1))
        offset = offset.reshape(-1) - linear['zero'] * weight.sum(1, dtype=torch.int64) * gain.long()
        self.hold(weight=weight, gain=gain, offset=offset, zero=affine['zero'].expand(features))
        # a kernel's argument has to be a tensor, also where it is not read
        self.hold(table=torch.zeros(1, dtype=torch.int8) if table is None else table)
        self.entries = 0 if table is None else len(table)
        self.shift, self.bits = affine['shift'], affine['bits']

    def forward(self, x: Tensor) -> Tensor:
        """Codes of the layer's output."""
        outputs, terms = self.weight.shape
        flat = x.reshape(-1, terms).contiguous()
        rows = flat.shape[0]
        dtype = self.table.dtype if self.entries else _dtype(self.bits)
        out = torch.empty(rows, outputs, dtype=dtype, device=x.device)

        def grid(meta: Mapping[str, int]) -> tuple[int]:
            return (triton.cdiv(rows, meta['BLOCK_M']) * triton.cdiv(outputs, meta['BLOCK_N']),)

        linear_kernel[grid](
            flat, self.weight, out, self.gain, self.offset, self.zero, self.table, rows, self.shift,
            triton.next_power_of_2(rows), N=outputs, K=terms, TABLE=self.entries, **_limits(self.bits),
        )  # fmt: skip
        return out.view(*x.shape[:-1], outputs)


class FusedNorm(Step):
    """``layernorm``: (…, C) codes to (…, C) codes."""

    zero: Tensor
    factors: Tensor
    gain: Tensor
    offset: Tensor
    shifts: Tensor
    out_zero: Tensor

    def __init__(self, inputs: tuple[str, ...], output: str, norm: Mapping[str, Any]) -> None:
        super().__init__(inputs, output)
        channels = norm['factors'].shape
        half = torch.ones(channels, dtype=torch.int64) << (norm['shifts'].long() - 1)
        self.hold(
            zero=norm['zero'].expand(channels), factors=norm['factors'], gain=norm['gain'].expand(channels),
            offset=norm['offset'].long() + half, shifts=norm['shifts'], out_zero=norm['out_zero'].expand(channels),
        )  # fmt: skip
        root_bits = norm['root_bits']
        self.scalars = (norm['guard'], max(2 * root_bits, 0), max(-2 * root_bits, 0), 1 << (45 + root_bits))
        self.bits = norm['bits']

    def forward(self, x: Tensor) -> Tensor:
        """Codes of the normalized rows."""
        channels = x.shape[-1]
        x = x.contiguous()
        rows = x.numel() // channels
        out = torch.empty(x.shape, dtype=_dtype(self.bits), device=x.device)
        block_r, block_c = _blocks(channels)
        layernorm_kernel[(triton.cdiv(rows, block_r),)](
            x, out, self.zero, self.factors, self.gain, self.offset, self.shifts, self.out_zero, rows, *self.scalars,
            CHANNELS=channels, BLOCK_R=block_r, BLOCK_C=block_c, **_limits(self.bits),
        )  # fmt: skip
        return out


class ResidualAdd(Step):
    """``add``: two tensors of codes to one; the second may repeat over the first one's leading dimensions."""

    gain_a: Tensor
    gain_b: Tensor
    offset: Tensor
    zero: Tensor

    def __init__(self, inputs: tuple[str, ...], output: str, add: Mapping[str, Any]) -> None:
        super().__init__(inputs, output)
        offset = 1 << (add['shift'] - 1)
        # the gains in int64: torch multiplies () int64 by (C,) int32 in int32
        offset = offset - add['zero_a'] * add['gain_a'].long() - add['zero_b'] * add['gain_b'].long()
        parameters = torch.broadcast_tensors(add['gain_a'], add['gain_b'], offset, add['zero'])
        self.hold(**dict(zip(('gain_a', 'gain_b', 'offset', 'zero'), parameters, strict=True)))
        self.shift, self.bits = add['shift'], add['bits']

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes of the sum.

        Raises:
            ValueError: ``b`` does not repeat over ``a``.
        """
        channels = a.shape[-1]
        if not _repeats(b, a):
            raise ValueError(f'{self.output}: {tuple(b.shape)} does not repeat over {tuple(a.shape)}')
        a, b = a.contiguous(), b.contiguous()
        rows, b_rows = a.numel() // channels, b.numel() // channels
        out = torch.empty(a.shape, dtype=_dtype(self.bits), device=a.device)
        block_r, block_c = _blocks(min(channels, 1024))
        add_kernel[(triton.cdiv(rows, block_r), triton.cdiv(channels, block_c))](
            a, b, out, self.gain_a, self.gain_b, self.offset, self.zero, rows, b_rows, self.shift,
            PER_CHANNEL=self.gain_a.numel() > 1, CHANNELS=channels, BLOCK_R=block_r, BLOCK_C=block_c,
            **_limits(self.bits),
        )  # fmt: skip
        return out


def _repeats(b: Tensor, a: Tensor) -> bool:
    """Whether ``a`` is as large as ``b``, or as copies of it one behind the other."""
    shape = list(b.shape)
    while shape and shape[0] == 1:
        shape.pop(0)
    return list(a.shape[a.ndim - len(shape) :]) == shape and b.shape[-1] == a.shape[-1]


class Attention(Step):
    """``matmul``, ``affine``, Swin's ``add`` of the position bias, and ``attend``.

    Args:
        matmul, affine, attend: their constants and settings; the constants of ``affine`` and ``add`` hold one number.
        add: the same, or None.
        bias: (heads, N, N) or (1, heads, N, N) codes, with ``add``.
    """

    powers: Tensor
    bias: Tensor
    mask: Tensor

    def __init__(
        self, inputs: tuple[str, ...], output: str, matmul: Mapping[str, Any], affine: Mapping[str, Any],
        add: Mapping[str, Any] | None, bias: Tensor | None, attend: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(inputs, output)
        exponents = attend['exponents'].to(torch.int32)
        nothing = torch.zeros(1, dtype=torch.int8)
        mask = attend.get('mask')
        self.hold(
            powers=torch.where(exponents < 0, 0, torch.ones_like(exponents) << exponents.clamp_min(0)),
            bias=nothing if bias is None else bias,
            mask=nothing if mask is None else mask.to(torch.int8),
        )
        self.has_bias, self.has_mask = bias is not None, mask is not None
        self.zeros = (matmul['zero_a'], matmul['zero_b'], attend['zero'])
        self.scores = _scores(affine)
        self.sum = (0, 0, 0, 1, 0) if add is None else _sum(add)
        shift = attend['shift'] + MEAN_BITS
        self.mean = (attend['gain'], 1 << (shift - 1), shift, attend['out_zero'])
        self.bits = attend['bits']
        score, logit = _limits(affine['bits']), _limits(affine['bits'] if add is None else add['bits'])
        self.limits = dict(
            SCORE_LOW=score['LOW'], SCORE_HIGH=score['HIGH'], LOGIT_LOW=logit['LOW'], LOGIT_HIGH=logit['HIGH']
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (B, heads, N, D), transposed keys and values to (B, heads, N, D), a view of (B, N, heads, D)."""
        batch, heads, tokens, dims = q.shape
        out = torch.empty(batch, tokens, heads, dims, dtype=_dtype(self.bits), device=q.device).transpose(1, 2)
        k = k.transpose(2, 3)

        def grid(meta: Mapping[str, int]) -> tuple[int, int]:
            return batch * heads, triton.cdiv(tokens, meta['BLOCK_Q'])

        attention_kernel[grid](
            q, k, v, out, self.powers, self.bias, self.mask, *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            *self.scores, *self.sum, self.mask.shape[0], *self.zeros, *self.mean, len(self.powers), heads,
            N=tokens, D=dims, BIAS=self.has_bias, MASK=self.has_mask, **self.limits, **_limits(self.bits),
            BLOCK_D=max(32, triton.next_power_of_2(dims)),
        )  # fmt: skip
        return out


def _scores(affine: Mapping[str, Any]) -> tuple[int, int, int, int]:
    shift = affine['shift']
    offset = (int(affine['offset']) << affine['offset_shift']) + (1 << (shift - 1))
    return int(affine['gain']), offset, shift, int(affine['zero'])


def _sum(add: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    gain_a, gain_b = int(add['gain_a']), int(add['gain_b'])
    offset = (1 << (add['shift'] - 1)) - int(add['zero_a']) * gain_a - int(add['zero_b']) * gain_b
    return gain_a, gain_b, offset, add['shift'], int(add['zero'])
