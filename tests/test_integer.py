"""The integer execution. Oracles: Python's integers and fractions, the simulated model, and the tensors' dtypes."""

from __future__ import annotations

import json
import lzma
import math
import os
import platform
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fqvit_plugin.integer.checkpoint import VERSION, load_integer, save_integer
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.integer.kernels import KERNELS, int8_matmul, integer_sqrt
from fqvit_plugin.integer.program import Grid
from fqvit_plugin.intmath import input_range, int_layernorm, layernorm_constants
from fqvit_plugin.layers import QAct
from fqvit_plugin.lifecycle import calibrate_, dequant, quant
from fqvit_plugin.presets import get_scheme
from fqvit_plugin.quantizers import build_quantizer
from fqvit_plugin.surgery import quantize_model_
from fqvit_plugin.tables import input_grid

from . import models


def codes(*shape, seed=0):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def rounded(value: Fraction) -> int:
    """Halves up, as an added half and a shift round."""
    return math.floor(value + Fraction(1, 2))


def stored(value: int, bits: int = 8) -> int:
    return max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, value))


def int32(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.int32)


# ---------------------------------------------------------------- kernels, against Python's integers


def test_int8_matmul_of_matrices_and_of_batches():
    a, b = codes(2, 3, 5, 7), codes(2, 3, 7, 4, seed=1)
    assert torch.equal(int8_matmul(a, b), (a.long() @ b.long()).int())
    assert torch.equal(int8_matmul(a, b[0, 0]), (a.long() @ b[0, 0].long()).int())


def test_linear_and_matmul_take_zero_points_off():
    x, weight = codes(3, 5, 16), codes(8, 16, seed=1)
    assert torch.equal(KERNELS['linear'](x, weight=weight, zero=-7).long(), (x.long() + 7) @ weight.long().t())
    b = codes(3, 16, 6, seed=2)
    assert torch.equal(KERNELS['matmul'](x, b, zero_a=3, zero_b=-128).long(), (x.long() - 3) @ (b.long() + 128))


@pytest.mark.parametrize('bits', [4, 8, 16])
def test_affine_rounds_halves_up_and_saturates(bits):
    x = torch.randint(-(2**20), 2**20, (5, 3), dtype=torch.int32)
    gain, offset, zero = int32(2**30, 12345, -777), int32(5, -6, 7), int32(-3)
    y = KERNELS['affine'](x, gain=gain, offset=offset, shift=31, offset_shift=20, zero=zero, bits=bits)
    for row, out in zip(x.tolist(), y.tolist(), strict=True):
        for c, value in enumerate(row):
            exact = Fraction(value * int(gain[c]) + int(offset[c]) * 2**20, 2**31)
            assert out[c] == stored(rounded(exact) - 3, bits)
    assert y.dtype is (torch.int16 if bits == 16 else torch.int8)


def test_add_of_two_grids():
    a, b = codes(4, 3), codes(4, 3, seed=1)
    y = KERNELS['add'](
        a, b, gain_a=int32(2**29), gain_b=int32(1, 2**20, 2**29 + 7), zero_a=int32(5), zero_b=int32(-9), shift=30,
        zero=int32(4), bits=8,
    )  # fmt: skip
    for i in range(4):
        for c, gain in enumerate((1, 2**20, 2**29 + 7)):
            exact = Fraction((int(a[i, c]) - 5) * 2**29 + (int(b[i, c]) + 9) * gain, 2**30)
            assert int(y[i, c]) == stored(rounded(exact) + 4)


def test_lookup_is_a_table_over_stored_codes():
    table = torch.arange(256).flip(0).sub(128).to(torch.int8)
    assert torch.equal(KERNELS['lookup'](codes(100), table=table).int(), -1 - codes(100).int())


def test_integer_sqrt_is_the_floor_of_the_root():
    near = [k * k + d for k in (1, 2, 3, 1000, 2**20 - 1, 2**25, 2**26 - 1) for d in (-1, 0, 1)]
    values = [0, 1, 2, 3, 8, 2**31, 2**52 - 1, 2**52, *near]
    values += torch.randint(0, 2**52, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert integer_sqrt(torch.tensor(values)).tolist() == [math.isqrt(v) for v in values]


@pytest.mark.parametrize('masked', [False, True])
def test_attend_divides_once(masked):
    logits, value = codes(2, 2, 5, 5), codes(2, 2, 5, 3, seed=1)
    exponents = torch.tensor([max(-1, 14 - d // 4) for d in range(256)], dtype=torch.int8)
    mask = torch.eye(5, dtype=torch.bool).roll(1, 0)[None].repeat(2, 1, 1) if masked else None
    y = KERNELS['attend'](
        logits, value, exponents=exponents, mask=mask, zero=-3, gain=11_000_000, shift=22, out_zero=6, bits=8
    )
    for w in range(2):
        for h in range(2):
            for n in range(5):
                allowed = [t for t in range(5) if mask is None or not mask[w, n, t]]
                top = max(int(logits[w, h, n, t]) for t in allowed)
                powers = {t: int(exponents[top - int(logits[w, h, n, t])]) for t in allowed}
                powers = {t: 2**e if e >= 0 else 0 for t, e in powers.items()}
                for d in range(3):
                    total = sum(p * (int(value[w, h, t, d]) + 3) for t, p in powers.items())
                    exact = Fraction(total * 11_000_000, sum(powers.values()) * 2**22)
                    assert int(y[w, h, n, d]) == stored(rounded(exact) + 6)


@pytest.mark.parametrize(('channels', 'last'), [(40, 3), (40, 7), (1536, 7)])
def test_layernorm_is_the_simulation_bit_by_bit(channels, last):
    generator = torch.Generator().manual_seed(0)
    x_q = codes(50, channels)
    factors = torch.randint(0, last + 1, (channels,), generator=generator)
    scale = 0.013 * 2.0**factors
    weight, bias = torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)
    out_scale, zero = torch.tensor(0.031), torch.randint(-128, 128, (channels,), generator=generator)
    in_range = input_range(scale, -128 - zero, 127 - zero)
    arguments = (scale, in_range, out_scale, weight, bias, 1e-6)
    expected = int_layernorm((x_q.float() - zero) * scale, *arguments)
    layer = layernorm_constants(channels, *arguments)
    assert layer.wide == (last == 7)
    y = KERNELS['layernorm'](
        x_q, zero=zero.int(), factors=factors.to(torch.uint8), gain=layer.gain.int(), offset=layer.offset.long(),
        shifts=layer.shift.to(torch.uint8), guard=int(layer.guard), root_bits=int(layer.root_bits),
        out_zero=int32(-5), bits=8,
    )  # fmt: skip
    assert torch.equal(y.float(), (expected - 5).clamp(-128, 127))


# ---------------------------------------------------------------- whole models


def calibrated(model, x, name='fqvit_w8a8_attn4', **options):
    quantize_model_(model, get_scheme(name, **options))
    calibrate_(model, [x, x])
    quant(model)
    return model


MODELS = {
    'vit': (lambda: models.vit(), 32),
    'vit, mean of the patches': (lambda: models.vit(out_type='avg_featmap'), 32),
    'vit, pre_logits': (lambda: models.vit(head=dict(hidden_dim=20)), 32),
    'vit, one channel far out': (models.vit_with_outlier, 32),
    'vit, escapes': (models.vit_with_escapes, 32),
    'deit3': (lambda: models.vit('DeiT3'), 32),
    'swin': (lambda: models.swin(), 56),
    'swin, padded windows': (lambda: models.swin(img_size=60), 60),
}


@pytest.fixture(scope='module', params=MODELS)
def pair(request):
    """A simulated model, its integer twin, and images."""
    build, size = MODELS[request.param]
    x = models.images(4, size)
    model = calibrated(build(), x)
    return model, to_integer(model, (size, size)), x


class FloatsSeen(TorchDispatchMode):
    """Collects the operations that put out floats."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.names += [str(function) for r in results if isinstance(r, torch.Tensor) and r.is_floating_point()]
        return result


def test_the_largest_factor_occurs():
    x = models.images(4)
    act = calibrated(models.vit_with_outlier(), x).backbone.residual_act
    assert act.scale.max() == 128 * act.scale.min()
    assert act.quantizer.zero_point.unique().numel() > 10


def test_every_tensor_between_image_and_logits_is_an_integer(pair):
    _, integer, x = pair
    steps = integer.steps(x)
    op, image = next(steps)
    assert op.kind == 'quantize'
    assert image.dtype is torch.int8
    with FloatsSeen() as seen:
        for _, tensor in steps:
            assert not tensor.is_floating_point()
    assert seen.names == []


def simulated_codes(model, integer, x):
    """Stored codes of every quantizer's output in the simulated model, by the quantizer's path."""
    grids, found = integer.program.grids, {}

    def keep(path):
        def hook(module, inputs, out):
            grid = grids[path]
            codes = (out / torch.tensor(grid.scale) + torch.tensor(grid.zero)).round()
            found[path] = codes.clamp(-128, 127) if grid.far else codes  # an end code is what lies far beyond it

        return hook

    hooks = [m.register_forward_hook(keep(p)) for p, m in model.named_modules() if isinstance(m, QAct) and p in grids]
    with torch.no_grad():
        logits = model(x)
    for hook in hooks:
        hook.remove()
    return found, logits


def assert_codes_and_logits_are_the_simulations(model, integer, x):
    simulated, logits = simulated_codes(model, integer, x)
    compared = 0
    for op, tensor in integer.steps(x):
        if op.output in simulated:
            compared += 1
            assert torch.equal(simulated[op.output].flatten().to(tensor.dtype), tensor.flatten()), op.output
    assert compared > 15
    assert torch.equal(integer(x), logits)


def test_codes_and_logits_are_those_of_the_simulation(pair):
    assert_codes_and_logits_are_the_simulations(*pair)


def test_another_image_size_is_refused(pair):
    _, integer, x = pair
    with pytest.raises(ValueError, match='takes images of'):
        integer(x[..., :-1])


def test_checkpoint_reloads_to_the_same_logits(pair, tmp_path):
    _, integer, x = pair
    size = save_integer(integer, tmp_path / 'model.safetensors', {'classes': 'a,b'})
    assert size == (tmp_path / 'model.safetensors').stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ['model.safetensors']  # no draft left
    loaded = load_integer(tmp_path / 'model.safetensors')
    assert torch.equal(loaded(x), integer(x))
    assert loaded.program.grids.keys() == integer.program.grids.keys()


def test_four_bit_weights_are_packed_two_a_byte(tmp_path):
    x = models.images(4)
    model = calibrated(models.vit(), x, weight_bits=4)
    integer = to_integer(model)
    packed = save_integer(integer, tmp_path / 'w4.safetensors')
    whole = save_integer(to_integer(calibrated(models.vit(), x)), tmp_path / 'w8.safetensors')
    weights = sum(m.weight.numel() for m in model.modules() if hasattr(m, 'weight_quantizer'))
    assert weights / 2 <= whole - packed <= 0.6 * weights, 'half, and what deflating takes off the rest'
    assert torch.equal(load_integer(tmp_path / 'w4.safetensors')(x), integer(x))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(preset='reference'), 'preset strict'),
        (dict(lis=False), 'lis=True'),
        (dict(input_quant=False), 'input_quant=True'),
        (dict(act_bits=10), 'at most 8'),
        (dict(weight_bits=9), 'at most 8 bits'),
    ],
)
def test_what_has_no_integer_form_is_named(options, message):
    x = models.images(2)
    with pytest.raises(ValueError, match=message):
        to_integer(calibrated(models.vit(), x, **options))


def test_a_model_that_is_not_quantized_is_refused():
    model = calibrated(models.vit(), models.images(2))
    dequant(model)
    with pytest.raises(ValueError, match='call quant'):
        to_integer(model)


def test_several_outputs_are_refused():
    with pytest.raises(ValueError, match='out_indices'):
        to_integer(calibrated(models.vit(out_indices=[0, 1]), models.images(2)))


def test_files_that_are_no_integer_checkpoint(tmp_path):
    with pytest.raises(ValueError, match='there is no'):
        load_integer(tmp_path / 'none.safetensors')
    (tmp_path / 'text').write_text('nothing')
    with pytest.raises(ValueError, match='not a safetensors file'):
        load_integer(tmp_path / 'text')
    save_file({'a': torch.zeros(1)}, tmp_path / 'other')
    with pytest.raises(ValueError, match='no integer checkpoint'):
        load_integer(tmp_path / 'other')
    for version, message in (('99', 'update it'), ('1', 'export it again'), ('', 'export it again')):
        save_file({'a': torch.zeros(1)}, tmp_path / 'other', {'format': 'fqvit_plugin.integer', 'version': version})
        with pytest.raises(ValueError, match=message):
            load_integer(tmp_path / 'other')


def damage(tensors, part):
    if part == 'no program':
        del tensors['program']
    elif part == 'no weight':
        del tensors[next(name for name in tensors if name.endswith(':weight'))]
    elif part == 'cut':
        tensors['constants'] = tensors['constants'][:-9].clone()
    else:  # shorter or longer than its contents
        data = lzma.decompress(tensors['constants'].numpy().tobytes())
        data = data[:-2] if part == 'short' else data + b'more'
        tensors['constants'] = torch.frombuffer(bytearray(lzma.compress(data)), dtype=torch.uint8)


@pytest.mark.parametrize('part', ['no program', 'no weight', 'cut', 'short', 'long'])
def test_a_damaged_integer_checkpoint_is_named(tmp_path, part):
    path = tmp_path / 'int.safetensors'
    save_integer(to_integer(calibrated(models.vit(), models.images(2))), path)
    tensors = load_file(path)
    damage(tensors, part)
    save_file(tensors, path, {'format': 'fqvit_plugin.integer', 'version': str(VERSION)})
    with pytest.raises(ValueError, match=r'int\.safetensors is a damaged integer checkpoint'):
        load_integer(path)


FEW = {'rows': dict(weight_bits=4), 'groups': dict(weight_bits=4, group_size=16), '6 bits': dict(weight_bits=6)}


@pytest.mark.parametrize('options', FEW.values(), ids=FEW)
def test_the_file_is_read_as_the_document_says(tmp_path, options):
    """docs/integer.md, followed with numpy alone."""
    integer = to_integer(calibrated(models.swin(), models.images(2, 56), **options), (56, 56))
    save_integer(integer, tmp_path / 'int.safetensors')
    tensors = {name: tensor.numpy() for name, tensor in load_file(tmp_path / 'int.safetensors').items()}
    program = json.loads(lzma.decompress(tensors.pop('program').tobytes()))
    block, start, found = lzma.decompress(tensors.pop('constants').tobytes()), 0, {}
    for name, (kind, shape) in program['constants'].items():
        count = math.prod(shape)
        found[name] = np.frombuffer(block, kind, count, start).reshape(shape)
        start += found[name].nbytes
    assert start == len(block)
    grouped = 0
    for name, stored in tensors.items():
        packed = np.frombuffer(zlib.decompress(stored.tobytes()), np.uint8)
        if name in program['int8']:
            found[name] = packed.view(np.int8).reshape(program['int8'][name])
            continue
        halves = np.stack((packed & 15, packed >> 4), 1).ravel().astype(np.int8)
        shape = program['int4'][name]
        found[name] = np.where(halves > 7, halves - 16, halves)[: math.prod(shape)].reshape(shape)
        if name + ':groups' in found:
            groups, packed = found.pop(name + ':groups'), found.pop(name + ':factors')
            factors = np.stack((packed & 15, packed >> 4), 1).ravel()[: shape[0] * (groups.max() + 1)]
            found[name] = found[name] * factors.reshape(shape[0], -1)[:, groups].astype(np.int8)
            grouped += 1
    assert bool(grouped) is ('group_size' in options)
    assert program['grids'].keys() == integer.program.grids.keys()
    for name, grid in integer.program.grids.items():
        fields = [field for field in ('scale', 'zero', 'far') if f'{name}#{field}' in found]
        numbers = {field: tuple(found.pop(f'{name}#{field}').tolist()) for field in fields}
        assert grid == Grid(**numbers, bits=program['grids'][name])
    assert found.keys() == integer.program.constants.keys()
    for name, value in integer.program.constants.items():
        assert np.array_equal(found[name], value.numpy()), name
    assert [op['kind'] for op in program['ops']] == [op.kind for op in integer.program.ops]


# ---------------------------------------------------------------- found by reading: each was wrong once


SATURATING = """
import torch
from fqvit_plugin.integer.kernels import cpu_support, int8_matmul
g = torch.Generator().manual_seed(0)
a, b = (torch.randint(-128, 128, s, dtype=torch.int8, generator=g) for s in ((40, 64), (64, 24)))
a[0], b[:, 0] = 127, -128
assert torch.equal(int8_matmul(a, b), a.int() @ b.int())
print(cpu_support())
"""


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='names an instruction set of x86')
def test_products_are_exact_where_the_cpu_saturates_pairs():
    env = {**os.environ, 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'PYTHONPATH': str(Path(__file__).resolve().parents[1])}
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', SATURATING], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() in ('saturating', 'none', 'exact')


def test_a_neck_behind_a_vit_is_refused():
    model = calibrated(models.vit(), models.images(2))
    model.neck = torch.nn.Identity()
    with pytest.raises(ValueError, match='the neck Identity'):
        to_integer(model)


def test_a_backbone_alone_is_refused():
    model = calibrated(models.build(models.vit_backbone()), models.images(2))
    with pytest.raises(ValueError, match='no classifier of MMPretrain'):
        to_integer(model)


def test_narrow_layers_keep_their_reciprocal_in_64_bits():
    arch = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32)
    cfg = models.vit_backbone(arch=arch)
    head = dict(type='VisionTransformerClsHead', num_classes=models.CLASSES, in_channels=16)
    x = models.images(4)
    model = calibrated(models.build(dict(type='ImageClassifier', backbone=cfg, head=head)), x, act_bits=4, ptf=False)
    integer = to_integer(model, [32, 32])
    with torch.no_grad():
        assert torch.allclose(integer(x), model(x), atol=1.01 * float(integer.output_scale))


def test_the_lowest_code_is_not_taken_for_four_bits(tmp_path):
    integer = to_integer(calibrated(models.vit(), models.images(2), weight_bits=4))
    name = next(name for name in integer.program.constants if name.endswith(':weight'))
    integer.program.constants[name][0, :2] = torch.tensor([-128, -9], dtype=torch.int8)
    save_integer(integer, tmp_path / 'odd.safetensors')
    loaded = load_integer(tmp_path / 'odd.safetensors').program.constants
    assert torch.equal(loaded[name], integer.program.constants[name])


def test_the_grid_before_gelu_follows_new_scales():
    x = models.images(2)
    model, other = (calibrated(models.vit(), factor * x) for factor in (50, 0.01))
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(0.01 * x), other(0.01 * x))


def test_a_function_that_settles_nowhere_has_no_table():
    quantizer = build_quantizer(get_scheme('fqvit_w8a8').act)
    quantizer.scale.fill_(0.1)
    quantizer.zero_point.fill_(128)
    with pytest.raises(ValueError, match='does not settle'):
        input_grid(torch.nn.LeakyReLU(1e-9), quantizer)
    with pytest.raises(ValueError, match='has parameters'):
        input_grid(torch.nn.PReLU(), quantizer)
