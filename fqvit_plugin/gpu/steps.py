"""What a planned program is made of: modules that hold packed constants and launch one kernel each.

Tensors are CUDA's, or the CPU's in Triton's interpreter. Offsets are packed in int64, with everything that does not
depend on the input: bias, zero points, and the half that makes a shift round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dyadic import MEAN_BITS
from .base import Step, code_dtype, limits, up_to
from .kernels.attention import attention_kernel
from .kernels.gemm import linear_kernel
from .kernels.image import patches_kernel
from .kernels.rows import add_kernel, norm_kernel
from .packing import BIN, exponent_line, halves, pack_escape, pack_table, rescaling
from .support import interpreted

__all__ = ['Attention', 'FusedLinear', 'FusedNorm', 'ImagePatches', 'ResidualAdd', 'RowMap']


class ImagePatches(Step):
    """``quantize`` and ``patches``: (B, C, H, W) float images to (B, N, C kh kw) codes."""

    scale: Tensor

    def __init__(
        self, inputs: tuple[str, ...], output: str, quantize: Mapping[str, Any], patches: Mapping[str, Any]
    ) -> None:
        super().__init__(inputs, output)
        self.hold(scale=quantize['scale'].float().reshape(1))
        self.zero, self.bits, self.value = quantize['zero'], quantize['bits'], patches['value']
        self.kernel, self.stride, self.padding = patches['kernel'], patches['stride'], patches['padding']

    def forward(self, image: Tensor) -> Tensor:
        """Codes of the patches."""
        image = image.float().contiguous()
        batch, channels, height, width = image.shape
        left, right, top, bottom = self.padding
        (kernel_y, kernel_x), (stride_y, stride_x) = self.kernel, self.stride
        down = (height + top + bottom - kernel_y) // stride_y + 1
        across = (width + left + right - kernel_x) // stride_x + 1
        terms, rows = channels * kernel_y * kernel_x, batch * down * across
        out = torch.empty(batch, down * across, terms, dtype=torch.int8, device=image.device)
        block_c = min(1024, triton.next_power_of_2(terms))
        block_r = 2048 // block_c
        patches_kernel[(triton.cdiv(rows, block_r), triton.cdiv(terms, block_c))](
            image, out, self.scale, rows, self.zero, self.value, DOWN=down, ACROSS=across, CHANNELS=channels,
            HEIGHT=height, WIDTH=width, KERNEL_Y=kernel_y, KERNEL_X=kernel_x, STRIDE_Y=stride_y, STRIDE_X=stride_x,
            TOP=top, LEFT=left, BLOCK_R=block_r, BLOCK_C=block_c, **limits(self.bits),
        )  # fmt: skip
        return out


class FusedLinear(Step):
    """``linear``, ``affine`` and, with ``table``, ``lookup``: (…, I) codes to (…, O) codes.

    Args:
        table: of at most 256 entries, or one that :func:`fqvit_plugin.gpu.packing.pack_table` packs.
    """

    weight: Tensor
    gain: Tensor
    offset: Tensor
    table: Tensor
    far: Tensor

    def __init__(
        self, inputs: tuple[str, ...], output: str, linear: Mapping[str, Any], affine: Mapping[str, Any],
        table: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(inputs, output)
        weight, shift, bits = linear['weight'], affine['shift'], affine['bits']
        self.features, self.terms = weight.shape
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        first = 0 if table is None else -low  # indices instead of codes
        zero = affine['zero'].long() + first
        gain = affine['gain'].expand(self.features)
        offset = (affine['offset'].long() << affine['offset_shift']) + (1 << (shift - 1)) + (zero << shift)
        offset = offset.reshape(-1) - linear['zero'] * weight.sum(1, dtype=torch.int64) * gain.long()
        rule = rescaling(gain, offset, torch.tensor(shift))
        # what lies beyond the last feature is multiplied and not stored; a row of a matrix begins at 16 bytes
        beyond = -self.features % 256
        self.hold(
            weight=F.pad(weight, (0, -self.terms % 16)), gain=F.pad(rule.gain, (0, beyond)),
            offset=F.pad(rule.offset, (0, beyond)),
        )  # fmt: skip
        packed = None if table is None or len(table) <= 256 else pack_table(table)
        if table is not None and len(table) > 256 and packed is None:
            raise ValueError(f'{output}: its table of {len(table)} entries changes too often to be packed')
        # a kernel's argument has to be a tensor, also where it is not read
        held = torch.zeros(1) if table is None else table if packed is None else packed
        far = affine.get('far')
        escape = torch.zeros(1, dtype=torch.int32) if far is None else F.pad(pack_escape(far, zero), (0, beyond))
        self.hold(table=held.to(torch.int32), far=escape)
        self.dtype = code_dtype(bits) if table is None else torch.int8
        self.shift = int(rule.shift)
        self.options = dict(
            ENTRIES=0 if table is None else len(self.table), BIN=0 if packed is None else BIN, WIDE=rule.wide,
            FAR=far is not None, LOW=low + first, HIGH=high + first,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Codes of the layer's output."""
        flat = x.reshape(-1, self.terms)
        if self.terms % 16:
            flat = F.pad(flat, (0, -self.terms % 16))
        flat = flat.contiguous()
        if flat.data_ptr() % 16:
            flat = flat.clone()
        rows, terms = flat.shape
        out = torch.empty(rows, up_to(self.features, 16), dtype=self.dtype, device=x.device)[:, : self.features]

        def grid(meta: Mapping[str, int]) -> tuple[int]:
            return (triton.cdiv(rows, meta['BLOCK_M']) * triton.cdiv(self.features, meta['BLOCK_N']),)

        linear_kernel[grid](
            _blocks_of(flat), _blocks_of(self.weight), _blocks_of(out), self.gain, self.offset, self.table,
            self.far, rows, self.features, terms, self.shift, triton.next_power_of_2(rows),
            COUNT=terms if interpreted() else 0, **self.options,
        )  # fmt: skip
        return out.view(*x.shape[:-1], self.features)


def _blocks_of(matrix: Tensor) -> TensorDescriptor:
    """A matrix that is read by blocks, whose size the kernel's choice fills in."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [1, 16])


class RowMap:
    """Where codes come from or go to: positions within an image.

    Args:
        index: (rows,) of the rows of a tensor, or (rows, channels) of its elements.
        size: rows, or elements, of the other tensor for one image.
    """

    def __init__(self, index: Tensor, size: int) -> None:
        self.index, self.size = index.to(torch.int32), size


class FusedNorm(Step):
    """``layernorm``, after the residual ``add`` whose sum it normalizes, if one is given: rows of codes.

    The first input may lie in other rows than the results, and the normalized rows may go to others: layouts before
    and behind, Swin's windows above all, cost nothing.

    Args:
        inputs: what is normalized; or the operands of the sum.
        outputs: the normalized rows; with a sum, before them its codes.
        add: constants and settings of the sum, or None.
        source: of the first input; None if it lies as it is.
        target: (rows,), of the normalized rows; None if they stay.
    """

    def __init__(
        self, inputs: tuple[str, ...], outputs: Sequence[str], norm: Mapping[str, Any],
        add: Mapping[str, Any] | None = None, source: RowMap | None = None, target: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(inputs, *outputs)
        self.channels = len(norm['factors'])
        shifts = norm['shifts'].long()
        offset = norm['offset'].long() + (torch.ones_like(shifts) << (shifts - 1))
        rule = rescaling(norm['gain'].expand(self.channels), offset + (norm['out_zero'].long() << shifts), shifts)
        nothing = torch.zeros(1, dtype=torch.int32)
        self.hold(
            zero=norm['zero'].expand(self.channels), gain=rule.gain, offset=halves(rule.offset),
            shifts=rule.shift * 16 + norm['factors'].to(torch.int32),
            source=nothing if source is None else source.index,
            target=nothing if target is None else target.to(torch.int32),
        )  # fmt: skip
        root_bits = norm['root_bits']
        self.scalars = (norm['guard'], max(2 * root_bits, 0), max(-2 * root_bits, 0), 1 << (45 + root_bits))
        self.add_shift, add_bits, per_channel = 0, 8, False
        if add is None:
            self.hold(gain_a=nothing, gain_b=nothing, add_offset=nothing)
        else:
            self.add_shift, add_bits, per_channel = _hold_sum(self, add, 'add_offset')
        far, marks = _escapes(norm, add)
        self.hold(far=far)
        self.source_size = 0 if source is None else source.size
        self.size = len(source.index) if source is not None else 1 if target is None else len(target)
        self.shape, self.bits, self.sum_dtype = shape, norm['bits'], code_dtype(add_bits)
        self.options = dict(
            ADD=0 if add is None else 1 + per_channel, SOURCE=0 if source is None else self.source.ndim,
            TARGET=target is not None, FAR=marks, WIDE=rule.wide, NARROW=_fit_squares(norm), CHANNELS=self.channels,
            **limits(add_bits, 'ADD_'), **limits(self.bits),
        )  # fmt: skip

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Codes of the normalized rows, or those of the sum and of its normalized rows."""
        a = a.contiguous()
        added = a if b is None else b.contiguous()
        rows = a.numel() // self.channels
        if self.source_size:
            image = self.source_size * (self.channels if self.source.ndim == 1 else 1)
            rows = a.numel() // image * self.size
        total = a if b is None else torch.empty(added.shape, dtype=self.sum_dtype, device=a.device)
        shape = a.shape if self.shape is None else (-1, *self.shape)
        out = torch.empty(rows, self.channels, dtype=code_dtype(self.bits), device=a.device)
        block_r, block_c, warps = _row_blocks(self.channels)
        norm_kernel[(triton.cdiv(rows, block_r),)](
            a, added, total, out, self.source, self.target, self.gain_a, self.gain_b, self.add_offset, self.zero,
            self.gain, self.offset, self.shifts, self.far, rows, self.add_shift, self.size, self.source_size,
            *self.scalars, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=warps, **self.options,
        )  # fmt: skip
        out = out.view(shape)
        return out if b is None else (total, out)


def _fit_squares(norm: Mapping[str, Any]) -> bool:
    """Whether the squares of a row fit 32 bits: those of up to 255 steps in each channel, or of what is far out."""
    factors, far = norm['factors'].double(), norm.get('far')
    steps = torch.full_like(factors, 255.0) if far is None else far.double().abs().clamp_min(255.0)
    return float((steps * 2.0**factors).square().sum()) < 2**32


def _row_blocks(channels: int) -> tuple[int, int, int]:
    """Rows and channels of a program, and its warps: as few as hold a row, for each of them computes its root."""
    block = triton.next_power_of_2(channels)
    return (max(1, 1024 // block), block, max(1, block // 1024)) if block >= 256 else (2048 // block, block, 4)


def _hold_sum(step: Step, add: Mapping[str, Any], offset_name: str) -> tuple[int, int, bool]:
    """Register what a residual sum needs; gives its shift, its bits, and whether channels have gains of their own."""
    gain_a, gain_b, zero, shift = add['gain_a'], add['gain_b'], add['zero'].long(), add['shift']
    # the gains in int64: torch multiplies () int64 by (C,) int32 in int32
    offset = (zero << shift) + (1 << (shift - 1)) - add['zero_a'] * gain_a.long() - add['zero_b'] * gain_b.long()
    gain_a, gain_b, offset = torch.broadcast_tensors(gain_a, gain_b, offset)
    step.hold(gain_a=gain_a, gain_b=gain_b, **{offset_name: halves(offset)})
    return shift, add['bits'], gain_a.numel() > 1


def _escapes(norm: Mapping[str, Any] | None, add: Mapping[str, Any] | None) -> tuple[Tensor, int]:
    """(4, C) packed escapes of a sum's operands, of the sum and of what is normalized; and which of them there are.

    They are 1, 2, 4 and 8 in the second result. Without any, the tensor is a small one, which is not read.
    """
    add, norm = add or {}, norm or {}
    pairs = [(add, 'far_a', 'zero_a'), (add, 'far_b', 'zero_b'), (add, 'far', 'zero'), (norm, 'far', 'zero')]
    packed = [pack_escape(c[far], c[zero]) if c.get(far) is not None else None for c, far, zero in pairs]
    known = next((p for p in packed if p is not None), None)
    if known is None:
        return torch.zeros(1, dtype=torch.int32), 0
    marks = sum(1 << i for i, p in enumerate(packed) if p is not None)
    return torch.stack([torch.zeros_like(known) if p is None else p for p in packed]), marks


class ResidualAdd(Step):
    """``add``: two tensors of codes to one; the second may repeat over the first one's leading dimensions."""

    gain_a: Tensor
    gain_b: Tensor
    offset: Tensor
    far: Tensor

    def __init__(self, inputs: tuple[str, ...], output: str, add: Mapping[str, Any]) -> None:
        super().__init__(inputs, output)
        self.shift, self.bits, self.per_channel = _hold_sum(self, add, 'offset')
        far, self.marks = _escapes(None, add)
        self.hold(far=far)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes of the sum.

        Raises:
            ValueError: ``b`` does not repeat over ``a``.
        """
        channels = a.shape[-1]
        if not _repeats(b, a):
            raise ValueError(f'{self.outputs[0]}: {tuple(b.shape)} does not repeat over {tuple(a.shape)}')
        a, b = a.contiguous(), b.contiguous()
        rows, b_rows = a.numel() // channels, b.numel() // channels
        out = torch.empty(a.shape, dtype=code_dtype(self.bits), device=a.device)
        block_c = triton.next_power_of_2(min(channels, 1024))
        block_r = max(1, min(64, 2048 // block_c))
        add_kernel[(triton.cdiv(rows, block_r), triton.cdiv(channels, block_c))](
            a, b, out, self.gain_a, self.gain_b, self.offset, self.far, rows, b_rows, self.shift,
            PER_CHANNEL=self.per_channel, FAR=self.marks, CHANNELS=channels, BLOCK_R=block_r, BLOCK_C=block_c,
            **limits(self.bits),
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
        bias: (heads, N, N) codes, with ``add``.
    """

    numbers: Tensor
    offsets: Tensor
    octaves: Tensor
    bias: Tensor
    mask: Tensor

    def __init__(
        self, inputs: tuple[str, ...], output: str, matmul: Mapping[str, Any], affine: Mapping[str, Any],
        add: Mapping[str, Any] | None, bias: Tensor | None, attend: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(inputs, output)
        exponents = attend['exponents'].to(torch.int32)
        line = exponent_line(exponents)
        mask = attend.get('mask')
        scores, wide = _scores(affine)
        shift = attend['shift'] + MEAN_BITS
        mean, mean_wide = _rescaling(attend['gain'], (1 << (shift - 1)) + (attend['out_zero'] << shift), shift)
        zeros = (matmul['zero_a'], matmul['zero_b'], attend['zero'])
        (gain_a, gain_b, sum_offset, sum_shift), (slope, line_shift) = _sum(add), (0, 1) if line is None else line[:2]
        numbers = [scores[0], scores[2], gain_a, gain_b, sum_shift, slope, line_shift, mean[0], mean[2], *zeros]
        # further from every maximum than the line's end
        numbers.append(-16384 if line is None else -256 - line.end)
        self.hold(
            numbers=torch.tensor(numbers, dtype=torch.int32),
            offsets=torch.tensor([scores[1], sum_offset, mean[1]], dtype=torch.int64),
            octaves=torch.where(exponents < 0, 16, 15 - exponents),
            bias=_pitched(bias), mask=_pitched(mask),
        )  # fmt: skip
        self.bits = attend['bits']
        self.options = dict(
            DISTANCES=len(exponents), LAST=0 if line is None else line.last, BIAS=bias is not None,
            MASK=mask is not None, WIDE=wide, MEAN_WIDE=mean_wide, **limits(affine['bits'], 'SCORE_'),
            **limits((affine if add is None else add)['bits'], 'LOGIT_'), **limits(self.bits),
        )  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (B, heads, N, D), transposed keys and values to (B, heads, N, D), a view of (B, N, heads, D)."""
        batch, heads, tokens, dims = q.shape
        out = torch.empty(batch, tokens, heads, dims, dtype=code_dtype(self.bits), device=q.device).transpose(1, 2)
        k = k.transpose(2, 3)

        def grid(meta: Mapping[str, int]) -> tuple[int, int]:
            return batch * heads, triton.cdiv(tokens, meta['BLOCK_Q'])

        attention_kernel[grid](
            q, k, v, out, self.octaves, self.bias, self.mask, self.numbers, self.offsets, *q.stride(), *k.stride(),
            *v.stride(), *out.stride(), self.mask.shape[0], heads, triton.next_power_of_2(batch * heads), N=tokens,
            D=dims, PITCH=up_to(tokens, 16), LONG=tokens > 256,
            BLOCK_D=max(32, triton.next_power_of_2(dims)), **self.options,
        )  # fmt: skip
        return out


def _pitched(matrices: Tensor | None) -> Tensor:
    """(…, N, N) as int8 with rows that begin at 16 bytes; a small tensor instead of None, which no kernel takes."""
    if matrices is None:
        return torch.zeros(1, dtype=torch.int8)
    return F.pad(matrices.to(torch.int8), (0, -matrices.shape[-1] % 16))


def _scores(affine: Mapping[str, Any]) -> tuple[tuple[int, int, int], bool]:
    shift = affine['shift']
    offset = (int(affine['offset']) << affine['offset_shift']) + (1 << (shift - 1)) + (int(affine['zero']) << shift)
    return _rescaling(int(affine['gain']), offset, shift)


def _rescaling(gain: int, offset: int, shift: int) -> tuple[tuple[int, int, int], bool]:
    rule = rescaling(*(torch.tensor(number, dtype=torch.int64) for number in (gain, offset, shift)))
    return (int(rule.gain), int(rule.offset), int(rule.shift)), rule.wide


def _sum(add: Mapping[str, Any] | None) -> tuple[int, int, int, int]:
    if add is None:
        return 0, 0, 0, 1
    gain_a, gain_b, shift = int(add['gain_a']), int(add['gain_b']), add['shift']
    offset = (1 << (shift - 1)) - int(add['zero_a']) * gain_a - int(add['zero_b']) * gain_b
    return gain_a, gain_b, offset + (int(add['zero']) << shift), shift
