"""Escapes in the Triton kernels. Oracle: the integer kernels. Where they run, test_gpu.py says."""

from __future__ import annotations

import itertools

import pytest
import torch

from fqvit_plugin.escape import EscapeQuantizer
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.integer.kernels import KERNELS
from fqvit_plugin.integer.program import Grid, IntegerModel, Op, Program

from . import models

pytest.importorskip('triton', minversion='3.4', reason='Triton 3.4 is not installed')

from fqvit_plugin.gpu import GpuModel
from fqvit_plugin.gpu.planner import plan
from fqvit_plugin.gpu.steps import FusedLinear, FusedNorm, ResidualAdd

from .test_gpu import DEVICE, codes, equal, linear_case, numbers, on_device, runs


def far_values(channels, least, most, seed=6):
    """Far below, none, far above, in turn."""
    sides = torch.arange(channels, dtype=torch.int32) % 3 - 1
    return numbers(least, most, channels, seed=seed) * sides


def escaped(stored, far):
    """Which codes stand for what is far out."""
    return (far != 0) & (stored == torch.where(far < 0, -128, 127))


def some_of_each(stored, far):
    """Whether channels with an escape below and above have codes that escape, and others."""
    out = escaped(stored, far).flatten(0, -2)
    return all(bool(out[:, side].any()) and not bool(out[:, side].all()) for side in (far < 0, far > 0))


def sum_case(channels, marks, furthest=2**15):
    """Constants of a sum: ``marks`` says which of a, b and the sum have escapes."""
    far = {name: far_values(channels, 300, furthest, seed) for seed, name in enumerate(('far_a', 'far_b', 'far'))}
    return dict(
        gain_a=numbers(2**28, 2**30, channels), gain_b=numbers(2**28, 2**30, channels, seed=4), shift=30,
        zero_a=numbers(-128, 128, channels), zero_b=torch.tensor(-90, dtype=torch.int32),
        zero=numbers(-20, 20, channels, seed=5), bits=8,
        **{name: values for (name, values), mark in zip(far.items(), marks, strict=True) if mark},
    )  # fmt: skip


def norm_case(channels, last, far):
    return dict(
        zero=numbers(-128, 128, channels), factors=numbers(0, last + 1, channels, dtype=torch.uint8), guard=12345,
        gain=numbers(-(2**23), 2**23, channels), offset=numbers(-(2**40), 2**40, channels, dtype=torch.int64),
        shifts=numbers(33, 36, channels, dtype=torch.uint8), root_bits=3, out_zero=numbers(-9, 9, channels), bits=8,
        far=far,
    )  # fmt: skip


# ---------------------------------------------------------------- kernels


@runs
@pytest.mark.parametrize('shift', [31, 28, 22, 5], ids=['near', 'further', 'wide', 'beyond 32 bits'])
@pytest.mark.parametrize('least', [1, 300], ids=['within the range too', 'outside'])
def test_linear_with_escapes(shift, least):
    linear, affine, _ = linear_case(40, 70)
    affine.update(shift=shift, far=far_values(70, least, 2**7 if least == 1 else 2**11))
    x = codes(64, 40)
    wanted = KERNELS['affine'](KERNELS['linear'](x, **linear), **affine)
    assert equal(on_device(FusedLinear(('x',), 'y', linear, affine, None), x), wanted)
    assert shift == 5 or least == 1 or some_of_each(wanted, affine['far'])
    without = KERNELS['affine'](KERNELS['linear'](x, **linear), **{**affine, 'far': None})
    assert shift == 5 or not equal(wanted, without)


@runs
def test_linear_with_escapes_and_a_table():
    linear, affine, _ = linear_case(40, 24)
    affine.update(shift=29, far=far_values(24, 300, 2**10))
    table, x = codes(256, seed=5), codes(9, 40)
    fine = KERNELS['affine'](KERNELS['linear'](x, **linear), **affine)
    assert some_of_each(fine, affine['far'])
    step = FusedLinear(('x',), 'y', linear, affine, table)
    assert equal(on_device(step, x), KERNELS['lookup'](fine, table=table))


@runs
@pytest.mark.parametrize('marks', list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize('leading', [(2, 50), ()])
def test_add_with_escapes(marks, leading):
    add = sum_case(24, marks)
    a, b = codes(2, 50, 24), codes(*leading, 24, seed=1)
    a[0, :9], b[..., 6:12] = torch.tensor([[-128], [127], [0]] * 3), 127
    wanted = KERNELS['add'](a, b, **add)
    assert equal(on_device(ResidualAdd(('a', 'b'), 'y', add), a, b), wanted)
    without = KERNELS['add'](a, b, **{k: v for k, v in add.items() if not k.startswith('far')})
    assert not equal(wanted, without)
    if marks[2] and marks[0]:
        assert some_of_each(wanted, add['far'])


@runs
def test_sums_beyond_32_bits():
    add = sum_case(24, (True, True, False), 2**24)
    add['shift'] = 20
    a, b = codes(3, 30, 24), codes(3, 30, 24, seed=1)
    a[0], b[1] = torch.where(add['far_a'] < 0, -128, 127), torch.where(add['far_b'] < 0, -128, 127)
    for far in ({}, {'far': far_values(24, 300, 2**11)}):
        wanted = KERNELS['add'](a, b, **add, **far)
        assert equal(on_device(ResidualAdd(('a', 'b'), 'y', {**add, **far}), a, b), wanted)


@runs
@pytest.mark.parametrize(('channels', 'last'), [(40, 3), (96, 0), (1100, 3)])
def test_layernorm_with_escapes(channels, last):
    far = far_values(channels, 2**14 >> last, 2**15 >> last)
    norm = norm_case(channels, last, far)
    x = codes(3, 7, channels).clamp(-120, 120)
    x[0, :3, 1] = 127  # no escape there
    x[0, :3, :8], x[1, :, 2] = torch.where(far < 0, -128, 127)[:8].to(torch.int8), 127
    x[2, 1:] = torch.where(far < 0, -128, 127)  # squares beyond 32 bits, which those of ordinary codes are not
    wanted = KERNELS['layernorm'](x, **norm)
    assert equal(on_device(FusedNorm(('x',), ['y'], norm), x), wanted)
    assert not equal(wanted, KERNELS['layernorm'](x, **{**norm, 'far': None}))


@runs
@pytest.mark.parametrize('inputs', [('moved', 'kept'), ('kept', 'moved')], ids=' + '.join)
def test_a_sum_and_its_norm_with_escapes(inputs):
    """The operand whose rows move becomes the first of the fused step; each keeps its escapes."""
    add = sum_case(16, (True, True, True), 2**11)
    parts = {'add': add, 'layernorm': {**norm_case(16, 3, add['far']), 'zero': add['zero']}}
    constants = {f'{k}.{n}': t for k, part in parts.items() for n, t in part.items() if isinstance(t, torch.Tensor)}
    constants['table'] = codes(256, seed=5)

    def op(kind, names, output):
        settings = {n: v for n, v in parts[kind].items() if not isinstance(v, torch.Tensor)}
        return Op(kind, names, output, {n: f'{kind}.{n}' for n in parts[kind] if n not in settings}, settings)

    ops = (
        Op('roll', ('image',), 'moved', settings=dict(shifts=[1], dims=[2])),
        Op('lookup', ('image',), 'kept', {'table': 'table'}),
        op('add', inputs, 'sum'),
        op('layernorm', ('sum',), 'end'),
    )
    program = Program(ops, constants, 'end', {'end': Grid((1.0,), (0,), 8)}, (5, 16))
    steps = plan(program)
    assert [type(step).__name__ for step in steps] == ['PlainKernel', 'FusedNorm']
    image = codes(2, 3, 5, 16)
    image[0, :, ::2] = torch.where(add['far_a'] < 0, -128, 127).to(torch.int8)
    wanted = {o.output: t for o, t in IntegerModel(program).steps(image)}
    kept = on_device(steps[0], image)
    total, end = steps[1].to(DEVICE)(image.to(DEVICE), kept.to(DEVICE))
    assert some_of_each(wanted['sum'], add['far'])
    assert equal(total.cpu(), wanted['sum'])
    assert equal(end.cpu(), wanted['end'])


# ---------------------------------------------------------------- a network


@runs
def test_every_code_of_a_network_with_escapes():
    model = models.quantized(models.vit_with_escapes(), models.batches(2), input_quant=True)
    backbone, images = model.backbone, models.images(2)
    for act in (backbone.pos_act, backbone.residual_act, backbone.layers[0].ffn.out_act):
        assert isinstance(act.quantizer, EscapeQuantizer)
        assert act.quantizer.far.any()
    integer = to_integer(model, (32, 32))
    wanted = {op.output: tensor for op, tensor in integer.steps(images)}
    escapes = {
        name: int(escaped(tensor, torch.tensor(integer.program.grids[name].far)).sum())
        for name, tensor in wanted.items()
        if name in integer.program.grids and integer.program.grids[name].far
    }
    assert sum(count > 0 for count in escapes.values()) >= 7, escapes  # the branch, the sums
    gpu = GpuModel(integer).to(DEVICE)
    for name, tensor in gpu.steps(images.to(DEVICE)):
        assert equal(tensor.cpu(), wanted[name]), name
    assert torch.equal(gpu(images.to(DEVICE)).cpu(), integer(images))
