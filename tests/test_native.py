"""The native engine. Oracles: the integer model's kernels, tensor by tensor, and Python's integers."""

from __future__ import annotations

import math
import platform
from fractions import Fraction

import accuracy
import pytest
import torch

from fqvit_plugin import compiled
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.integer.program import Grid, IntegerModel, Op, Program
from fqvit_plugin.native import attention, build, planner, structs
from fqvit_plugin.native.model import NativeModel

from . import models
from .shared_data import imagenet

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason='no C++ compiler for the native engine')

X86 = platform.machine() in ('x86_64', 'AMD64')
#: Other instruction sets than this machine's own; a machine with AVX-512 or AVX2 runs all of them.
BUILDS = {
    'generic': '-O3 -fopenmp',
    'avx2': '-O3 -march=haswell -fopenmp',
    'without AMX': '-O3 -march=native -mno-amx-int8 -fopenmp',
    'one thread': '-O1 -march=native',
}


def runs(flags: str) -> bool:
    """Whether this CPU has the instructions."""
    if 'haswell' in flags:
        return X86 and torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')
    return X86 or 'amx' not in flags


def small_vit(channels=48, heads=3, tokens=32, **options):
    arch = dict(embed_dims=channels, num_layers=2, num_heads=heads, feedforward_channels=2 * channels + 4)
    head = dict(type='VisionTransformerClsHead', num_classes=models.CLASSES, in_channels=channels)
    backbone = models.vit_backbone(arch=arch, img_size=tokens, **options)
    return models.build(dict(type='ImageClassifier', backbone=backbone, head=head))


MODELS = {
    'vit': (lambda: models.vit(), 32, {}),
    'vit, mean of the patches': (lambda: models.vit(out_type='avg_featmap'), 32, {}),
    'vit, pre_logits': (lambda: models.vit(head=dict(hidden_dim=20)), 32, {}),
    'vit, one channel far out': (models.vit_with_outlier, 32, {}),
    'vit, weights of 4 bits': (lambda: models.vit(), 32, dict(weight_bits=4)),
    'vit, everything in 4 bits': (lambda: models.vit(), 32, dict(weight_bits=4, act_bits=4, ptf=False)),
    'vit, heads of 10': (lambda: small_vit(70, 7), 32, {}),
    'vit, heads of 80': (lambda: small_vit(160, 2), 32, {}),
    'vit, 197 tokens': (lambda: small_vit(64, 1, 112), 112, {}),
    'deit3': (lambda: models.vit('DeiT3'), 32, {}),
    'swin': (lambda: models.swin(), 56, {}),
    'swin, padded windows': (lambda: models.swin(img_size=60), 60, {}),
    'swin, odd maps': (lambda: models.swin(img_size=68), 68, {}),
}


@pytest.fixture(scope='module', params=MODELS)
def pair(request):
    """An integer model and images."""
    make, size, scheme = MODELS[request.param]
    x = models.images(3, size)
    return to_integer(models.quantized(make(), [x, x], **scheme), (size, size)), x


def assert_same(native, integer, x):
    """All codes that ``native`` materializes, and the logits of two batches."""
    expected = {op.output: tensor for op, tensor in integer.steps(x)}
    for name, codes in native.codes(x).items():
        assert torch.equal(codes, expected[name]), name
    for batch in (x, x[:1]):
        assert torch.equal(native(batch), integer(batch))


def test_all_codes_are_those_of_the_integer_model(pair):
    integer, x = pair
    native = NativeModel(integer)
    assert native.fallbacks == []
    assert_same(native, integer, x)
    assert len(native.codes(x)) > 15


@pytest.mark.parametrize('name', BUILDS)
def test_other_instruction_sets_give_the_same_codes(pair, name):
    if not runs(BUILDS[name]):
        pytest.skip(f'this CPU cannot run {BUILDS[name]}')
    integer, x = pair
    native = NativeModel(integer, BUILDS[name])
    assert_same(native, integer, x)
    if name == 'avx2':
        assert native.isa == 'avx2'
    if name == 'without AMX':
        assert native.isa != 'amx-int8'


@pytest.mark.parametrize('threads', [1, 2, 5])
def test_any_number_of_threads(threads):
    x = models.images(2, 56)
    integer = to_integer(models.quantized(models.swin(), [x, x]), (56, 56))
    native, before = NativeModel(integer), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(native(x), integer(x))
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- by hand: Python's integers


def program(ops, constants, output, image_size, bits=8):
    grid = Grid((1.0,), (0,), bits)
    grids = {op.output: grid for op in ops if op.kind != 'linear'}
    return IntegerModel(Program(tuple(ops), constants, output, grids, image_size))


def read_codes(zero=0):
    """The first operation: takes whole floats as codes."""
    return Op('quantize', ('image',), 'codes', {'scale': 'one'}, {'zero': zero, 'bits': 8}), torch.tensor(1.0)


def int32(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.int32)


def affine_op(source, output, bits=8, **settings):
    names = {k: f'{output}:{k}' for k in ('gain', 'offset', 'zero')}
    return Op('affine', (source,), output, names, {'bits': bits, **settings})


@pytest.mark.parametrize('flags', [compiled.FLAGS, *BUILDS.values()])
@pytest.mark.parametrize(
    ('rows', 'depth', 'columns'),
    [(1, 3, 1), (7, 39, 70), (25, 300, 33), (14, 6, 130), (9, 63, 20), (3, 66, 50), (40, 126, 16)],
)
def test_products_and_new_grids_against_pythons_integers(rows, depth, columns, flags):
    if not runs(flags):
        pytest.skip(f'this CPU cannot run {flags}')
    g = torch.Generator().manual_seed(depth)
    codes = torch.randint(-128, 128, (2, rows, depth), generator=g)
    weight = torch.randint(-128, 128, (columns, depth), generator=g, dtype=torch.int8)
    codes[0, 0], weight[0] = 127, 127  # the largest sum, where pairs of products saturate 16 bits
    codes[1, 0] = -128
    gain = torch.randint(-(2**23), 2**23, (columns,), generator=g, dtype=torch.int32)
    offset = torch.randint(-(2**30), 2**30, (columns,), generator=g, dtype=torch.int32)
    shift, offset_shift, zero, out_zero = 30, 4, -7, 3
    first, one = read_codes()
    constants = {'one': one, 'w': weight, 'y:gain': gain, 'y:offset': offset, 'y:zero': int32(out_zero)}
    ops = [
        first,
        Op('reshape', ('codes',), 'rows', {}, {'shape': [-1, rows, depth]}),
        Op('linear', ('rows',), 'sums', {'weight': 'w'}, {'zero': zero}),
        affine_op('sums', 'y', shift=shift, offset_shift=offset_shift),
    ]
    native = NativeModel(program(ops, constants, 'y', (rows, depth // 3)), flags)
    assert native.fallbacks == []
    y = native.codes(codes.float().view(2, 3, rows, depth // 3))['y']
    sums = (codes - zero) @ weight.long().t()
    for c in range(columns):
        for value, out in zip(sums[..., c].flatten().tolist(), y[..., c].flatten().tolist(), strict=True):
            exact = Fraction(value * int(gain[c]) + int(offset[c]) * 2**offset_shift, 2**shift)
            assert out == max(-128, min(127, math.floor(exact + Fraction(1, 2)) + out_zero))


def test_a_gain_that_leaves_32_bits_saturates_on_the_right_side():
    first, one = read_codes()
    weight = torch.tensor([[127, 127, 127], [-127, -127, -127]], dtype=torch.int8)
    constants = {'one': one, 'w': weight, 'y:gain': int32(2**23), 'y:offset': int32(0), 'y:zero': int32(5)}
    ops = [
        first,
        Op('reshape', ('codes',), 'rows', {}, {'shape': [-1, 1, 3]}),
        Op('linear', ('rows',), 'sums', {'weight': 'w'}, {'zero': 0}),
        affine_op('sums', 'y', shift=1, offset_shift=0),
    ]
    native = NativeModel(program(ops, constants, 'y', (1, 1)))
    assert native.codes(torch.full((1, 3, 1, 1), 100.0))['y'].flatten().tolist() == [127, -128]


@pytest.mark.parametrize(('last', 'wide'), [(3, 0), (7, 1)])
@pytest.mark.parametrize('flags', [compiled.FLAGS, BUILDS['avx2'], BUILDS['generic']])
def test_layernorm_of_rows_without_spread_and_of_extremes(flags, last, wide):
    if not runs(flags):
        pytest.skip(f'this CPU cannot run {flags}')
    channels = 99
    rows = torch.randint(-128, 128, (8, channels), generator=torch.Generator().manual_seed(0))
    rows[0], rows[1] = 5, -128
    rows[2], rows[2, 0] = -128, 127
    rows[3], rows[3, ::2] = -128, 127
    rows[4], rows[4, 0] = 0, 1  # the smallest spread there is, so the largest reciprocal
    first, one = read_codes()
    g = torch.Generator().manual_seed(1)
    constants = {
        'one': one, 'out_zero': int32(7),
        'zero': torch.randint(-128, 128, (channels,), generator=g, dtype=torch.int32),
        'factors': torch.randint(0, last + 1, (channels,), generator=g).to(torch.uint8),
        'gain': torch.randint(-(2**23), 2**23, (channels,), generator=g, dtype=torch.int32),
        'offset': torch.randint(-(2**40), 2**40, (channels,), generator=g),
        'shifts': torch.randint(30, 40, (channels,), generator=g).to(torch.uint8),
    }  # fmt: skip
    rows[5] = constants['zero']  # all u are 0
    names = {k: k for k in constants if k != 'one'}
    most = 7 if wide else 9  # fills the radicand
    for guard, root_bits in ((0, most), (0, 0), (12345, most - 1), (2**45, 2), (0, 17)):  # the last is left to torch
        ops = [
            first,
            Op('reshape', ('codes',), 'rows', {}, {'shape': [-1, 8, channels]}),
            Op('layernorm', ('rows',), 'y', names, {'guard': guard, 'root_bits': root_bits, 'bits': 8}),
        ]
        integer = program(ops, constants, 'y', (8, channels // 3))
        native = NativeModel(integer, flags)
        assert native.fallbacks == (['y'] if root_bits == 17 else [])
        norms = [step for step in native._plan.steps if getattr(step, 'kind', '') == 'norm']
        assert [step.fields['wide'] for step in norms] == ([] if root_bits == 17 else [wide])
        assert_same(native, integer, rows.float().view(1, 3, 8, channels // 3))


# ---------------------------------------------------------------- what the engine does not have


def test_without_fused_attention_torch_computes_it(monkeypatch):
    x = models.images(3, 60)
    integer = to_integer(models.quantized(models.swin(img_size=60), [x, x]), (60, 60))
    monkeypatch.setattr(planner, 'attention_step', lambda planner, op: False)
    native = NativeModel(integer)
    assert any(name.endswith('.context') for name in native.fallbacks)
    assert_same(native, integer, x)


@pytest.mark.parametrize('name', ['requant', 'sum_fields', 'norm_fields', 'attend_fields'])
def test_constants_out_of_bounds_are_left_to_torch(monkeypatch, name):
    x = models.images(3)
    integer = to_integer(models.quantized(models.vit(), [x, x]))
    monkeypatch.setattr(planner.made, name, lambda *args, **kwargs: None)
    native = NativeModel(integer)
    assert native.fallbacks
    assert_same(native, integer, x)


def test_numbers_past_53_bits_are_left_to_torch():
    first, one = read_codes()
    weight = torch.full((1, 3), 127, dtype=torch.int8)
    constants = {'one': one, 'w': weight, 'y:gain': int32(2**30), 'y:offset': int32(2**30), 'y:zero': int32(0)}
    ops = [
        first,
        Op('reshape', ('codes',), 'rows', {}, {'shape': [-1, 1, 3]}),
        Op('linear', ('rows',), 'sums', {'weight': 'w'}, {'zero': 0}),
        affine_op('sums', 'y', shift=42, offset_shift=24),
    ]
    integer = program(ops, constants, 'y', (1, 1))
    native = NativeModel(integer)
    assert native.fallbacks == ['sums', 'y']
    x = torch.tensor([1.0, -2, 3]).view(1, 3, 1, 1)
    assert torch.equal(native(x), integer(x))


def test_layouts_that_mix_images_are_left_to_torch():
    first, one = read_codes()
    ops = [
        first,
        Op('permute', ('codes',), 'channels', {}, {'dims': [1, 0, 2, 3]}),
        Op('reshape', ('channels',), 'mixed', {}, {'shape': [-1, 4]}),
        Op('lookup', ('mixed',), 'y', {'table': 'table'}),
    ]
    table = torch.arange(-128, 128).flip(0).to(torch.int8)
    integer = program(ops, {'one': one, 'table': table}, 'y', (2, 2))
    native = NativeModel(integer)
    x = torch.arange(24.0).view(2, 3, 2, 2)
    assert torch.equal(native(x), integer(x))
    assert 'mixed' in native.fallbacks


def test_an_unknown_kernel_is_named():
    first, one = read_codes()
    with pytest.raises(ValueError, match='does not know the kernel sort'):
        NativeModel(program([first, Op('sort', ('codes',), 'y')], {'one': one}, 'y', (2, 2)))


@pytest.fixture(scope='module')
def small():
    x = models.images(2)
    return NativeModel(to_integer(models.quantized(models.vit(), [x, x])))


@pytest.mark.parametrize('shape', [(1, 3, 32, 31), (1, 1, 32, 32), (3, 32, 32), (0, 3, 32, 32)])
def test_images_of_another_size_are_refused(small, shape):
    with pytest.raises(ValueError, match=r'takes images of \(B, 3, 32, 32\)'):
        small(torch.zeros(shape))


def test_timings_count_products(small):
    times = small.timings(models.images(2), repeats=2)
    assert {t.kind for t in times} >= {'quantize', 'gemm', 'attention', 'norm'}
    assert all(t.seconds >= 0 for t in times)
    qkv = next(t for t in times if t.output.endswith('layers.0.attn.qkv_act'))
    assert qkv.products == 17 * 48 * 144


def test_structs_of_another_size_are_noticed(monkeypatch):
    monkeypatch.setitem(structs.KINDS, 'gather', structs.KINDS['lookup'])
    with pytest.raises(RuntimeError, match='the struct gather has'):
        structs.check_sizes(build.library())


def test_spacing_of_heads_is_checked_element_by_element():
    index = torch.arange(2 * 3 * 4 * 5).view(1, 2, 3, 20)[..., :5].contiguous()
    view = planner.View('x', index, 120, 0)
    assert attention._strides(view, transposed=False) == (0, 120, 60, 20)
    index[0, 1, 2, 3] += 1
    assert attention._strides(view, transposed=False) is None


@pytest.mark.slow
def test_deit_tiny_on_photographs():
    folder = imagenet()
    cfg, model = accuracy.load_model('deit_t', folder / 'weights')
    photos = accuracy.read_photos(folder / 'calib', cfg.test_dataloader.dataset.pipeline)
    x = model.data_preprocessor({'inputs': photos.images[:3]}, False)['inputs']
    simulated = models.quantized(model, [x])
    integer = to_integer(simulated)
    native = NativeModel(integer)
    assert native.fallbacks == []
    logits = native(x)
    assert torch.equal(logits, integer(x))
    with torch.no_grad():
        assert torch.equal(logits, simulated(x))
