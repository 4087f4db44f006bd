"""The Triton kernels. Oracle: the integer kernels, which test_integer.py checks against Python's integers.

They run on a GPU where there is one, and in Triton's interpreter where ``TRITON_INTERPRET=1`` was set before Python
started, which :func:`test_kernels_in_the_interpreter` does. Without either, what can be tested is that they compile.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmpretrain import get_model

import fqvit_plugin as fq
from fqvit_plugin.gpu import GpuModel, missing, support
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.integer.kernels import KERNELS
from fqvit_plugin.integer.program import Grid, IntegerModel, Op, Program

from . import models

triton = pytest.importorskip('triton', minversion='3.4', reason='Triton 3.4 is not installed')
tl = triton.language

from fqvit_plugin.gpu.base import PlainKernel  # noqa: E402 - they need Triton
from fqvit_plugin.gpu.kernels.attention import attention_kernel  # noqa: E402
from fqvit_plugin.gpu.kernels.gemm import linear_kernel  # noqa: E402
from fqvit_plugin.gpu.kernels.rules import integer_quotient, integer_root  # noqa: E402
from fqvit_plugin.gpu.planner import plan  # noqa: E402
from fqvit_plugin.gpu.steps import (  # noqa: E402
    Attention,
    FusedLinear,
    FusedNorm,
    ImagePatches,
    ResidualAdd,
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
runs = pytest.mark.skipif(missing() is not None, reason=f'Triton kernels do not run here: {missing()}')


def codes(*shape, seed=0):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def numbers(low, high, *shape, dtype=torch.int32, seed=3):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_device(step, *tensors):
    return step.to(DEVICE)(*(t.to(DEVICE) for t in tensors)).cpu()


def equal(a, b):
    return a.dtype is b.dtype and torch.equal(a, b)


# ---------------------------------------------------------------- kernels


@triton.jit
def root_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):  # noqa: N803
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, integer_root(tl.load(x_ptr + at)))


@triton.jit
def quotient_kernel(a, b_ptr, out_ptr, SIZE: tl.constexpr):  # noqa: N803
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, integer_quotient(a, tl.load(b_ptr + at)))


@runs
def test_root_is_the_floor_next_to_squares():
    near = [k * k + d for k in (1, 2, 3, 1000, 2**20 - 1, 2**25, 2**26 - 1) for d in (-1, 0, 1)]
    values = [0, 2**52 - 1, 2**52, *near]
    values += torch.randint(0, 2**52, (1024 - len(values),), generator=torch.Generator().manual_seed(0)).tolist()
    x = torch.tensor(values, device=DEVICE)
    out = torch.empty_like(x)
    root_kernel[(1,)](x, out, SIZE=1024)
    assert out.tolist() == [math.isqrt(v) for v in values]


@runs
@pytest.mark.parametrize('bits', [32, 44, 53, 57])
def test_quotients_of_powers_of_two_are_floors(bits):
    near = [2**k + d for k in range(1, 30) for d in (-1, 0, 1)]
    values = [1, 2**31 - 1, *near, *(2**bits // q for q in (3 * 2 ** (bits - 30), 5 * 2 ** (bits - 28)))]
    values += torch.randint(1, 2**27, (1024 - len(values),), generator=torch.Generator().manual_seed(0)).tolist()
    b = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    out = torch.empty(1024, dtype=torch.int64, device=DEVICE)
    quotient_kernel[(1,)](2**bits, b, out, SIZE=1024)
    assert out.tolist() == [2**bits // v for v in values]


#: Rises and falls by one, as GELU's does, at distances from 65 entries on.
TABLE = torch.cat([torch.arange(32768) // 65, 504 + torch.arange(32768) // 257])
TABLE = TABLE.sub(250).abs().sub(120).clamp(-128, 127).to(torch.int8)


def linear_case(terms, outputs, bits=8, table=None, gain=None):
    """Constants of a linear layer that use most of the output's range."""
    gain = numbers(2**22, 2**24, outputs) * numbers(0, 2, outputs, seed=4).mul(2).sub(1) if gain is None else gain
    shift = 31 if bits <= 8 else 22
    linear = dict(weight=codes(outputs, terms, seed=1), zero=-77)
    affine = dict(
        gain=gain, offset=numbers(-(2**30), 2**30, outputs), shift=shift, offset_shift=3, bits=bits,
        zero=numbers(-20, 20, outputs) if bits == 8 else torch.tensor(5, dtype=torch.int32),
    )  # fmt: skip
    return linear, affine, FusedLinear(('x',), 'y', linear, affine, table)


@runs
@pytest.mark.parametrize(
    ('shape', 'terms', 'outputs', 'bits'),
    [((3, 5), 48, 7, 8), ((70,), 130, 80, 8), ((2, 3, 4), 17, 65, 4), ((9,), 64, 32, 16)],
)
def test_linear_with_its_rescaling(shape, terms, outputs, bits):
    linear, affine, step = linear_case(terms, outputs, bits)
    x = codes(*shape, terms)
    wanted = KERNELS['affine'](KERNELS['linear'](x, **linear), **affine)
    assert equal(on_device(step, x), wanted)
    assert len(wanted.unique()) > (10 if bits == 4 else 20)


@runs
def test_linear_with_one_gain_and_a_table():
    linear, affine, step = linear_case(40, 24, 16, TABLE, torch.tensor(1_234_567, dtype=torch.int32))
    x = codes(6, 40)
    fine = KERNELS['affine'](KERNELS['linear'](x, **linear), **affine)
    wanted = KERNELS['lookup'](fine, table=TABLE)
    assert equal(on_device(step, x), wanted)
    assert len(wanted.unique()) > 40


@runs
def test_linear_with_a_small_table():
    table = codes(256, seed=5)
    linear, affine, step = linear_case(40, 24, 8, table)
    x = codes(6, 40)
    fine = KERNELS['affine'](KERNELS['linear'](x, **linear), **affine)
    assert equal(on_device(step, x), KERNELS['lookup'](fine, table=table))


def test_a_table_that_changes_often_is_refused():
    with pytest.raises(ValueError, match='y: its table of 65536 entries changes too often'):
        linear_case(40, 24, 16, codes(65536))


@runs
def test_linear_takes_views():
    linear, affine, step = linear_case(16, 8)
    x = codes(5, 4, 16).transpose(0, 1)
    assert equal(on_device(step, x), KERNELS['affine'](KERNELS['linear'](x, **linear), **affine))


@runs
@pytest.mark.parametrize(
    ('channels', 'root_bits', 'bits', 'steep', 'last'),
    [(40, 3, 8, 0, 3), (96, -2, 4, 0, 3), (32, 0, 8, 5, 7), (1100, 3, 8, 0, 3), (1536, 0, 8, 0, 7)],
)
def test_layernorm(channels, root_bits, bits, steep, last):
    norm = dict(
        zero=numbers(-128, 128, channels), factors=numbers(0, last + 1, channels, dtype=torch.uint8), guard=12345,
        gain=numbers(-(2**23), 2**23, channels), offset=numbers(-(2**40), 2**40, channels, dtype=torch.int64),
        shifts=numbers(33, 36, channels, dtype=torch.uint8), root_bits=root_bits, out_zero=numbers(-9, 9, channels),
        bits=bits,
    )  # fmt: skip
    norm['shifts'][:steep] = 22  # with gains of so many bits nothing can be spared of the product
    x = codes(3, 7, channels)
    x[0, 0] = norm['zero'].clamp(-128, 127)  # the smallest variance there is
    wanted = KERNELS['layernorm'](x, **norm)
    assert equal(on_device(FusedNorm(('x',), ['y'], norm), x), wanted)
    assert len(wanted.unique()) > (10 if bits == 4 else 100)


@runs
@pytest.mark.parametrize('leading', [(2, 5), (1, 5), (5,), ()])
@pytest.mark.parametrize('single', [False, True])
def test_add_repeats_the_second_operand(leading, single):
    shape = () if single else (24,)
    add = dict(
        gain_a=numbers(2**28, 2**30, *shape), gain_b=numbers(2**28, 2**30, *shape, seed=4), shift=30,
        zero_a=torch.tensor(-128, dtype=torch.int32), zero_b=numbers(-128, 128, *shape),
        zero=torch.tensor(-90, dtype=torch.int32), bits=8,
    )  # fmt: skip
    a, b = codes(2, 5, 24), codes(*leading, 24, seed=1)
    wanted = KERNELS['add'](a, b, **add)
    assert equal(on_device(ResidualAdd(('a', 'b'), 'y', add), a, b), wanted)
    assert len(wanted.unique()) > 100


@runs
def test_add_names_shapes_that_do_not_fit():
    number = torch.tensor(1, dtype=torch.int32)
    add = dict(gain_a=number, gain_b=number, zero_a=number, zero_b=number, zero=number, shift=1, bits=8)
    with pytest.raises(ValueError, match=r'sum: \(4, 1\) does not repeat over \(4, 6\)'):
        on_device(ResidualAdd(('a', 'b'), 'sum', add), codes(4, 6), codes(4, 1))


def attention_case(heads, tokens, windows, biased):
    """Constants of attention, with logits and exponents that use their whole range."""
    one = torch.tensor
    matmul = dict(zero_a=-7, zero_b=9)
    affine = dict(
        gain=one(11_000_001).int(), offset=one(1000).int(), shift=33, offset_shift=2, bits=8, zero=one(3).int()
    )
    numbers_of_add = dict(gain_a=2**29 + 5, gain_b=2**29 - 3, zero_a=3, zero_b=-4, zero=-2)
    add = {k: one(v).int() for k, v in numbers_of_add.items()} | dict(shift=30, bits=8) if biased else None
    bias = codes(heads, tokens, tokens, seed=8) if biased else None
    exponents = torch.tensor([max(-1, 15 - d // 6) for d in range(256)], dtype=torch.int8)
    attend = dict(exponents=exponents, zero=-30, gain=11_000_000, shift=23, out_zero=6, bits=8)
    if windows:
        mask = numbers(0, 3, windows, tokens, tokens, dtype=torch.bool)
        attend['mask'] = mask & ~torch.eye(tokens, dtype=torch.bool)
    return matmul, affine, add, bias, attend


@runs
@pytest.mark.parametrize(
    ('tokens', 'dims', 'windows', 'biased'),
    [(17, 12, 0, False), (49, 32, 2, True), (70, 16, 0, False), (130, 8, 2, False), (5, 40, 0, True)],
)
def test_attention(tokens, dims, windows, biased):
    batch, heads = 2, 2
    matmul, affine, add, bias, attend = attention_case(heads, tokens, windows, biased)
    # as they lie in a model: views of one tensor
    q, k, v = codes(batch, tokens, 3, heads, dims).permute(2, 0, 3, 1, 4)
    logits = KERNELS['affine'](KERNELS['matmul'](q, k.transpose(2, 3), **matmul), **affine)
    if add is not None:
        logits = KERNELS['add'](logits, bias, **add)
    wanted = KERNELS['attend'](logits, v, **attend)
    step = Attention(('q', 'k', 'v'), 'y', matmul, affine, add, bias, attend)
    assert equal(on_device(step, q, k.transpose(2, 3), v), wanted)
    assert len(wanted.unique()) > 100
    assert len(logits.unique()) > 50


# ---------------------------------------------------------------- networks


@pytest.fixture(scope='module')
def integer_models():
    made = {'vit': (models.vit_with_outlier(), 32), 'swin': (models.swin(), 56)}
    quantized = {k: models.quantized(m, models.batches(2, size), input_quant=True) for k, (m, size) in made.items()}
    return {
        k: (to_integer(m, (made[k][1],) * 2), models.images(1 + (k == 'vit'), made[k][1]))
        for k, m in quantized.items()
    }


@runs
@pytest.mark.parametrize('name', ['vit', 'swin'])
def test_every_code_of_a_network(integer_models, name):
    integer, images = integer_models[name]
    model = GpuModel(integer).to(DEVICE)
    wanted = {op.output: tensor for op, tensor in integer.steps(images)}
    compared = 0
    for output, tensor in model.steps(images.to(DEVICE)):
        assert equal(tensor.cpu(), wanted[output]), output
        compared += 1
    assert compared > 40
    assert torch.equal(model(images.to(DEVICE)).cpu(), integer(images))


@pytest.mark.skipif(DEVICE == 'cpu', reason='CUDA graphs need a GPU')
def test_a_recorded_graph_gives_the_same_logits(integer_models):
    integer, images = integer_models['vit']
    model = GpuModel(integer, cuda_graph=True).cuda()
    for batch in (images, images.flip(0), images[:1], images):
        assert torch.equal(model(batch.cuda()).cpu(), integer(batch))


@pytest.mark.skipif(DEVICE == 'cpu', reason='what is tested is the simulation on a GPU')
def test_the_simulation_on_a_gpu_gives_the_codes_of_the_cpu():
    """Oracle: the integer model on the CPU, whose logits the simulation has there (test_integer.py)."""
    torch.manual_seed(0)
    model = get_model('deit-tiny_4xb256_in1k', pretrained=False).eval().to(DEVICE)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    fq.quantize_model_(model, dataclasses.replace(fq.get_scheme('fqvit_w8a8_attn4'), input_quant=True))
    fq.calibrate_(model, [images.to(DEVICE)])
    fq.quant(model)
    with torch.no_grad():
        logits = model(images.to(DEVICE))
    assert logits.device.type == DEVICE
    assert logits.std() > 0.01
    assert torch.equal(logits.cpu(), to_integer(model, (224, 224))(images))


@pytest.mark.parametrize('name', ['vit', 'swin'])
def test_nothing_heavy_is_left_to_the_integer_kernels(integer_models, name):
    integer, _ = integer_models[name]
    kept = {step.kernel.__name__ for step in plan(integer.program) if isinstance(step, PlainKernel)}
    rest = {'quantize', 'patches', 'lookup', 'constant', 'mean_sums', 'affine'}  # the last two: average pooling
    assert kept <= rest | {'prepend', 'reshape', 'permute', 'select', 'crop', 'roll', 'pad_map'}
    assert sum(isinstance(step, Attention) for step in plan(integer.program)) == {'vit': 2, 'swin': 4}[name]


def test_sums_that_are_read_twice_are_not_fused():
    number = dict(gain=torch.tensor([3]).int(), offset=torch.tensor([0]).int(), zero=torch.tensor([0]).int())
    constants = {'w': codes(4, 8), **number}
    rescale = dict(constants={k: k for k in number}, settings=dict(shift=9, offset_shift=0, bits=8))
    ops = (
        Op('select', ('image',), 'row', settings=dict(dim=1, index=0)),
        Op('linear', ('row',), 'sums', {'weight': 'w'}, {'zero': 1}),
        Op('affine', ('sums',), 'a', **rescale),
        Op('affine', ('sums',), 'b', **rescale),
        Op('reshape', ('b',), 'end', settings=dict(shape=[-1, 4])),
    )
    program = Program(ops, constants, 'end', {'end': Grid((1.0,), (0,), 8)}, (2, 8))
    steps = plan(program)
    assert [type(step) for step in steps] == [PlainKernel] * 5
    tensors = {'image': codes(3, 2, 2, 8)[:, 0]}
    for step in steps:
        tensors[step.outputs[0]] = step(*(tensors[n] for n in step.inputs))
    wanted = {op.output: t for op, t in IntegerModel(program).steps(tensors['image'])}
    assert all(equal(tensors[k], v) for k, v in wanted.items())


# ---------------------------------------------------------------- refusals


@pytest.fixture
def bare(monkeypatch):
    """A machine with neither a GPU nor the interpreter."""
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)


def test_without_triton_or_cuda_it_says_what_to_do(bare, monkeypatch):
    integer = IntegerModel.__new__(IntegerModel)
    with pytest.raises(RuntimeError, match=r'CUDA.*run the IntegerModel'):
        GpuModel(integer)
    monkeypatch.setattr(triton, '__version__', '2.1.0')
    with pytest.raises(RuntimeError, match=r'Triton 2\.1\.0 is too old'):
        GpuModel(integer)
    monkeypatch.setitem(sys.modules, 'triton', None)  # importing it fails
    with pytest.raises(RuntimeError, match='Triton is not installed: pip install'):
        GpuModel(integer)


def test_images_elsewhere_or_of_another_size_are_refused(bare, monkeypatch, integer_models):
    integer, images = integer_models['vit']
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    model = GpuModel(integer)
    with pytest.raises(ValueError, match=r'images on a GPU, got cpu: model\.cuda\(\)'):
        model(images)
    with pytest.raises(ValueError, match=r'\(32, 32\), got \(16, 16\)'):
        model(images[..., :16, :16])


# ---------------------------------------------------------------- without a GPU


@pytest.mark.slow
@pytest.mark.skipif(support.interpreted(), reason='this is the interpreter')
def test_kernels_in_the_interpreter():
    files = [__file__, str(Path(__file__).with_name('test_gpu_escapes.py'))]
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *files, '-k', 'not without_a_gpu'],
        capture_output=True, text=True, timeout=600, check=False, cwd=Path(__file__).parents[1],
        env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r'(\d+) passed', run.stdout)[1]) >= 60, run.stdout[-1000:]
    assert not re.search('SKIPPED.*do not run here', run.stdout)


class _Driver:
    """What a launch asks a driver for, short of the launch."""

    def __init__(self, capability):
        self.target = triton.backends.compiler.GPUTarget('cuda', capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton keeps what it knows of a device under this number

    def get_current_stream(self, device):
        return 0


@pytest.mark.slow
@pytest.mark.skipif(support.interpreted(), reason='the interpreter compiles nothing')
@pytest.mark.parametrize('capability', [80, 90])
def test_kernels_compile_without_a_gpu(capability, monkeypatch, tmp_path):
    """Oracle: Triton's compiler and NVIDIA's assembler, which take what a launch on an A100 or H100 gives them."""
    made = []
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, '_active', _Driver(capability), raising=False)
    if not isinstance(getattr(type(triton.runtime.driver), 'active', None), property):  # Triton before 3.6
        monkeypatch.setattr(triton.runtime.driver, 'active', _Driver(capability), raising=False)

    def only_compile(self, grid):
        def launch(*arguments, **options):
            for config in getattr(self, 'configs', [triton.Config({})]):
                if config.pre_hook is not None:
                    config.pre_hook({**dict(zip(self.arg_names, arguments, strict=False)), **config.kwargs})
                kernel = self.fn if hasattr(self, 'configs') else self
                chosen = config.all_kwargs() if hasattr(self, 'configs') else {}
                made.append(kernel.warmup(*arguments, grid=grid, **options, **chosen))

        return launch

    # some of the choices: each takes seconds
    several = 1 if capability == 80 else 2
    for kernel in (linear_kernel, attention_kernel):
        monkeypatch.setattr(kernel, 'configs', kernel.configs[2 : 2 + several])
    monkeypatch.setattr(triton.runtime.jit.KernelInterface, '__getitem__', only_compile)
    x = codes(2, 49, 96)
    linear_case(96, 288)[2](x)
    linear_case(96, 384, 16, TABLE)[2](x)
    number = torch.ones(96, dtype=torch.int32)
    byte = number.to(torch.uint8)
    norm = dict(
        zero=number, factors=byte, gain=number, offset=number.long(), shifts=byte, guard=2**40, root_bits=3,
        out_zero=number, bits=8,
    )  # fmt: skip
    FusedNorm(('x',), ['y'], norm)(x)
    add = dict(gain_a=number, gain_b=number, zero_a=number, zero_b=number, zero=number, shift=1, bits=8)
    ResidualAdd(('a', 'b'), 'y', add)(x, x)
    linear, affine, _ = linear_case(96, 96)
    FusedLinear(('x',), 'y', linear, {**affine, 'far': number}, None)(x)
    far_sum = dict(add, far_a=number, far_b=number, far=number)
    FusedNorm(('a', 'b'), ['sum', 'y'], dict(norm, far=number), far_sum)(x, x)
    ResidualAdd(('a', 'b'), 'y', far_sum)(x, x)
    quantize = dict(scale=torch.ones(()), zero=0, bits=8)
    patches = dict(kernel=[4, 4], stride=[4, 4], padding=[0, 0, 0, 0], value=0)
    ImagePatches(('image',), 'y', quantize, patches)(torch.zeros(1, 3, 16, 16))
    for tokens, windows, biased in ((49, 2, True), (197, 0, False)):
        q, k, v = codes(2, tokens, 3, 3, 32).permute(2, 0, 3, 1, 4)
        Attention(('q', 'k', 'v'), 'y', *attention_case(3, tokens, windows, biased))(q, k.transpose(2, 3), v)
    assembly = ''.join(kernel.asm['ptx'] for kernel in made)
    assert len(made) == (10 if capability == 80 else 15)
    assert all(kernel.asm['cubin'] for kernel in made)
    product = r'wgmma\.mma_async\S*s32\.s8\.s8' if capability == 90 else r'mma\.sync\S*s32\.s8\.s8'
    assert re.search(product, assembly), 'no int8 product on the tensor cores'
