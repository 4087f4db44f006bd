"""The ONNX export. Oracles: the integer executor, Python's integers, and engines that are not ours."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch

from fqvit_plugin.export import convert, to_onnx
from fqvit_plugin.export.functions import FUNCTIONS, function_of, write_function
from fqvit_plugin.export.graph import Graph
from fqvit_plugin.export.integer_form import code_offset, floor_root, rounded
from fqvit_plugin.export.proof import codes_of, compare_codes, session
from fqvit_plugin.export.targets import TARGETS
from fqvit_plugin.export.tensorrt import check_tensorrt
from fqvit_plugin.integer.checkpoint import load_integer, save_integer
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.integer.program import Grid, IntegerModel

from . import models
from .test_integer import MODELS, calibrated

onnx = pytest.importorskip('onnx', reason='the extra export brings it')
pytest.importorskip('onnxruntime', reason='the extra export brings it')


@pytest.fixture(scope='module', params=MODELS)
def pair(request):
    """An integer model and images: more than the export's own proof takes, so the batch is free."""
    build, size = MODELS[request.param]
    x = models.images(3, size)
    return to_integer(calibrated(build(), x), (size, size)), x


@pytest.fixture(scope='module')
def vit():
    x = models.images(4)
    return to_integer(calibrated(models.vit(), x)), x


def run(path, x, optimized=False):
    return session(path, optimized).run(['logits'], {'image': x.numpy()})[0]


def steps_off(model, logits, x):
    """The largest difference of logits, in steps of their grid."""
    return float(np.abs(logits - model(x).numpy()).max() / model.output_scale)


# ---------------------------------------------------------------- form integer


@pytest.mark.parametrize('optimized', [False, True])
def test_every_tensor_of_the_integer_form_is_the_executors(pair, tmp_path, optimized):
    model, x = pair
    to_onnx(model, tmp_path / 'm.onnx', form='integer')
    proto = onnx.load(tmp_path / 'm.onnx')
    inside = [op for op in model.program.ops if op.kind != 'constant']
    proto.graph.output.extend(onnx.ValueInfoProto(name=op.output) for op in inside)
    results = session(proto, optimized).run(None, {'image': x.numpy()})
    assert torch.equal(torch.from_numpy(results[0]), model(x))
    found = dict(zip((op.output for op in inside), results[1:], strict=True))
    for op, tensor in model.steps(x):
        if op.output in found:
            grid = model.program.grids.get(op.output)
            offset = 0 if grid is None else code_offset(grid.bits)
            assert np.array_equal(found[op.output].astype(np.int64) - offset, tensor.numpy()), op.output


def test_the_integer_form_holds_no_float_between_image_and_logits(vit, tmp_path):
    to_onnx(vit[0], tmp_path / 'm.onnx', form='integer')
    proto = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / 'm.onnx'))
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    inside = [v.name for v in proto.graph.value_info if v.type.tensor_type.elem_type in floats]
    assert inside
    assert all(name.startswith('image') for name in inside)  # its quantization; roots are float64, exact


@pytest.mark.parametrize(
    'options', [dict(weight_bits=4), dict(weight_bits=7), dict(act_bits=6), dict(ptf=False), dict(name='fqvit_w8a8')]
)
def test_other_schemes_are_exact_too(options, tmp_path):
    x = models.images(4)
    model = to_integer(calibrated(models.vit(), x, **options))
    assert to_onnx(model, tmp_path / 'm.onnx', form='integer', images=x).plain.exact
    assert to_onnx(model, tmp_path / 'q.onnx', images=x).plain.largest <= 1


@pytest.mark.parametrize('patches', [dict(stride=4), dict(padding=3)], ids=['overlapping', 'padded'])
def test_other_patches_are_cut_alike(patches, tmp_path):
    x = models.images(3)
    model = to_integer(calibrated(models.vit(patch_cfg=patches), x))
    assert to_onnx(model, tmp_path / 'm.onnx', form='integer', images=x).plain.exact
    for target in TARGETS:
        assert to_onnx(model, tmp_path / 'm.onnx', target=target, images=x).plain.largest <= 1


def test_an_integer_checkpoint_alone_can_be_exported(vit, tmp_path):
    model, x = vit
    save_integer(model, tmp_path / 'm.safetensors')
    to_onnx(load_integer(tmp_path / 'm.safetensors'), tmp_path / 'm.onnx', form='integer')
    assert torch.equal(torch.from_numpy(run(tmp_path / 'm.onnx', x)), model(x))


def evaluated(write, values):
    """What onnxruntime makes of ``write(graph, name)`` on int64 ``values``."""
    graph = Graph()
    name = write(graph, graph.constant(values, np.int64, 'values'))
    proto = graph.model({}, {}, {})
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return session(proto, optimized=False).run(None, {})[0].tolist()


def test_the_root_is_the_floor_of_the_root():
    near = [k * k + d for k in (1, 2, 3, 1000, 2**20 - 1, 2**25, 2**26 - 1, 2**26) for d in (-1, 0, 1)]
    values = [v for v in near if v <= 2**52] + np.random.default_rng(0).integers(1, 2**52, 2000).tolist()
    assert evaluated(lambda g, x: floor_root(g, x, 0), values) == [max(1, math.isqrt(v)) for v in values]
    small = [v >> 8 for v in values]
    assert evaluated(lambda g, x: floor_root(g, x, 3), small) == [max(1, math.isqrt(v << 6)) for v in small]
    assert evaluated(lambda g, x: floor_root(g, x, -3), values) == [max(1, math.isqrt(v >> 6)) for v in values]


@pytest.mark.parametrize('shift', [1, 5, 28, 58])
def test_shifts_round_halves_up(shift):
    half = 1 << (shift - 1)
    values = [sign * (k * half) + d for k in (0, 1, 2, 3, 4) for sign in (-1, 1) for d in (-1, 0, 1)]
    expected = [(v + 7 + half) >> shift for v in values]  # Python's shift is a floor
    assert evaluated(lambda g, x: rounded(g, x, shift, 7), values) == expected


# ---------------------------------------------------------------- form qdq


@pytest.mark.parametrize('target', TARGETS)
def test_qdq_layers_agree_within_a_step(pair, tmp_path, target):
    model, x = pair
    report = to_onnx(model, tmp_path / 'm.onnx', target=target, images=x)
    assert report.plain.largest <= 1
    assert report.plain.different <= 1e-3 * report.plain.codes
    assert report.plain.tensors > 20
    logits = run(tmp_path / 'm.onnx', x)
    assert (logits.argmax(1) == model(x).numpy().argmax(1)).all()
    assert 'layer by layer' in str(report)


@pytest.mark.parametrize('target', TARGETS)
def test_the_qdq_softmax_is_the_models_own(vit, tmp_path, target):
    to_onnx(vit[0], tmp_path / 'm.onnx', target=target)
    kinds = [node.op_type for node in onnx.load(tmp_path / 'm.onnx').graph.node]
    assert 'Softmax' not in kinds
    assert kinds.count('Round') == kinds.count('ThresholdedRelu') == 2  # a block each
    assert kinds.count('LayerNormalization') == 5


def test_weights_are_int8_with_a_scale_for_each_channel(vit, tmp_path):
    model, _ = vit
    for kind in ('int8', 'uint8'):
        to_onnx(model, tmp_path / 'm.onnx', weights=kind)
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / 'm.onnx').graph.initializer}
        weights = {n.removesuffix('.weight'): t for n, t in tensors.items() if n.endswith('.weight')}
        linear = [op for op in model.program.ops if op.kind == 'linear']
        assert len(weights) == len(linear)
        for op in linear:
            reader = next(r for r in model.program.ops if op.output in r.inputs)
            stored = model.program.constants[op.constants['weight']].numpy().T.astype(int)
            assert weights[reader.output].dtype == kind
            assert np.array_equal(weights[reader.output].astype(int) - (128 if kind == 'uint8' else 0), stored)


def test_uint8_weights_change_no_answer(vit, tmp_path):
    model, x = vit
    for kind in ('int8', 'uint8'):
        to_onnx(model, tmp_path / f'{kind}.onnx', weights=kind)
    assert np.array_equal(run(tmp_path / 'int8.onnx', x), run(tmp_path / 'uint8.onnx', x))
    # codes that differ by one in one layer of ten thousand make as much of the whole
    assert steps_off(model, run(tmp_path / 'uint8.onnx', x, optimized=True), x) < 20


@pytest.mark.parametrize('target', TARGETS)
def test_dead_channels_and_negative_factors(tmp_path, target):
    x = models.images(4)
    model = models.vit('DeiT3')
    with torch.no_grad():
        hidden = model.backbone.layers[0].ffn.layers[0][0]
        hidden.weight[3] = 0  # its smallest scale is far below the others'
        hidden.bias[3] = 5
        model.backbone.layers[0].ffn.gamma2.weight[::2] *= -1  # a layer scale turns the signs of gains
    model = to_integer(calibrated(model, x))
    report = to_onnx(model, tmp_path / 'm.onnx', target=target, images=x)
    assert report.plain.largest <= 1
    proto = onnx.load(tmp_path / 'm.onnx')
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    scales = [tensors[n.input[1]] for n in proto.graph.node if n.op_type in ('QuantizeLinear', 'DequantizeLinear')]
    assert min(s.min() for s in scales) > 0


def test_tables_are_recognized():
    source, target = Grid((0.0003,), (5,), 16), Grid((0.05,), (-100,), 8)
    x = (torch.arange(-(2**15), 2**15, dtype=torch.float64) - 5) * 0.0003
    for name, function in FUNCTIONS.items():
        table = (torch.round(function(x) / 0.05) - 100).clamp(-128, 127).to(torch.int8)
        assert function_of(table, source, target) == name
    with pytest.raises(ValueError, match='none of identity, gelu'):
        function_of((torch.sin(x) / 0.05).to(torch.int8), source, target)


@pytest.mark.parametrize('name', sorted(FUNCTIONS.keys() - {'identity'}))
def test_functions_are_written_as_they_are(name):
    values = np.linspace(-6, 6, 1001, dtype=np.float32)
    graph = Graph()
    y = write_function(graph, name, graph.constant(values, np.float32, 'values'))
    proto = graph.model({}, {}, {})
    proto.graph.output.append(onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1001]))
    proto.graph.node.append(onnx.helper.make_node('Identity', [y], ['y']))
    (found,) = session(proto, optimized=True).run(None, {})
    assert np.allclose(found, FUNCTIONS[name](torch.from_numpy(values).double()).numpy(), atol=2e-6)


def test_programs_without_a_qdq_form_are_refused(vit, tmp_path):
    model, _ = vit
    program = model.program
    name = next(n for n in program.constants if n.endswith('qkv_act.sums:weight') or n.endswith('qkv.sums:weight'))
    weight = program.constants[name].clone()
    weight[0, 0] = -128
    wide = IntegerModel(dataclasses.replace(program, constants={**program.constants, name: weight}))
    with pytest.raises(ValueError, match='a weight is -128'):
        to_onnx(wide, tmp_path / 'm.onnx')
    table = next(n for n in program.constants if n.endswith('hidden_act:table'))
    odd = {**program.constants, table: program.constants[table].flip(0)}
    with pytest.raises(ValueError, match="form='integer' has"):
        to_onnx(IntegerModel(dataclasses.replace(program, constants=odd)), tmp_path / 'm.onnx')


# ---------------------------------------------------------------- OpenVINO, an engine that is not ours


def openvino_logits(path, x):
    core = pytest.importorskip('openvino', reason='the extra export brings it').Core()
    return core.compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})([x.numpy()])[0]


def test_openvino_answers_like_the_integer_model(pair, tmp_path):
    model, x = pair
    to_onnx(model, tmp_path / 'm.onnx', target='openvino')
    logits = openvino_logits(tmp_path / 'm.onnx', x)
    assert (logits.argmax(1) == model(x).numpy().argmax(1)).all()
    # a bias lost, as a quantized convolution lost all but one, is 25 steps or more
    assert steps_off(model, logits, x) <= 10


def test_openvino_computes_int64_in_32_bits(vit, tmp_path):
    model, x = vit
    to_onnx(model, tmp_path / 'm.onnx', form='integer')
    assert steps_off(model, openvino_logits(tmp_path / 'm.onnx', x), x) > 50  # hence float32 that carries integers


# ---------------------------------------------------------------- TensorRT, by its documented rules only


def planted(vit, tmp_path, change):
    to_onnx(vit[0], tmp_path / 'm.onnx', target='tensorrt')
    proto = onnx.load(tmp_path / 'm.onnx')
    tensors = {t.name: t for t in proto.graph.initializer}
    change(proto, lambda name, array: tensors[name].CopyFrom(onnx.numpy_helper.from_array(array, name)))
    return proto


def first(proto, kind, weight=False):
    nodes = (n for n in proto.graph.node if n.op_type == kind)
    return next(n for n in nodes if n.input[0].endswith('.weight') is weight)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda p, put: put(first(p, 'QuantizeLinear').input[2], np.array(3, np.int8)), 'symmetric'),
        (lambda p, put: put(first(p, 'QuantizeLinear').input[1], np.array(-1, np.float32)), 'positive'),
        (lambda p, put: put(first(p, 'QuantizeLinear').input[1], np.ones(3, np.float32)), 'one scale'),
        (lambda p, put: first(p, 'QuantizeLinear').input.__setitem__(1, 'image'), 'constants'),
        (lambda p, put: first(p, 'Reshape').input.__setitem__(0, first(p, 'QuantizeLinear').output[0]), 'only Deq'),
        (lambda p, put: put(first(p, 'DequantizeLinear', True).input[0], np.full((3, 3), -128, np.int8)), '-127'),
        (lambda p, put: setattr(first(p, 'DequantizeLinear', True).attribute[0], 'i', 0), 'output channels'),
        (lambda p, put: setattr(first(p, 'Erf'), 'op_type', 'MatMulInteger'), 'MatMulInteger'),
    ],
)
def test_a_broken_rule_of_tensorrt_is_named(vit, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        check_tensorrt(planted(vit, tmp_path, change))


@pytest.mark.parametrize('target', ['onnxruntime', 'openvino'])
def test_graphs_for_other_targets_break_tensorrts_rules(vit, tmp_path, target):
    to_onnx(vit[0], tmp_path / 'm.onnx', target=target)
    with pytest.raises(ValueError, match='symmetric'):
        check_tensorrt(onnx.load(tmp_path / 'm.onnx'))


# ---------------------------------------------------------------- the proof, and refusals


@pytest.mark.parametrize('form', ['integer', 'qdq'])
@pytest.mark.parametrize('constant', ['backbone.layers.1.norm2_act:offset', 'backbone.layers.0.attn.qkv_act:gain'])
def test_a_wrong_graph_is_not_written(vit, tmp_path, monkeypatch, form, constant):
    model, _ = vit
    wrong = {**model.program.constants, constant: (model.program.constants[constant] * 1.2).to(torch.int64)}
    other = dataclasses.replace(model.program, constants=wrong)
    writer = 'IntegerWriter' if form == 'integer' else 'QdqWriter'
    real = getattr(convert, writer)
    monkeypatch.setattr(convert, writer, lambda graph, _, *rest: real(graph, other, *rest))
    (tmp_path / 'm.onnx').write_text('mine')
    with pytest.raises(RuntimeError, match='does not compute what the integer model does'):
        to_onnx(model, tmp_path / 'm.onnx', form=form)
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx']
    assert (tmp_path / 'm.onnx').read_text() == 'mine'


def test_differences_are_counted(vit, tmp_path):
    model, x = vit
    to_onnx(model, tmp_path / 'm.onnx', form='integer')
    proto = onnx.load(tmp_path / 'm.onnx')
    last = next(n for n in proto.graph.node if n.output[0] == model.program.output)
    last.output[0] = 'before'
    one = onnx.numpy_helper.from_array(np.array(1, np.uint8), 'one')
    proto.graph.initializer.append(one)
    place = list(proto.graph.node).index(last) + 1
    proto.graph.node.insert(place, onnx.helper.make_node('BitShift', ['before', 'one'], [model.program.output],
                                                         direction='RIGHT'))  # fmt: skip
    expected = codes_of(model, x)
    found = compare_codes(proto, expected, x, layerwise=False, optimized=False)
    codes = expected[model.program.output].astype(int) + 128
    assert found.different == int((codes != codes >> 1).sum())
    assert found.largest == int((codes - (codes >> 1)).max())
    assert found.where == model.program.output
    assert 'differ' in str(found)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(form='float'), "must be 'qdq' or 'integer'"),
        (dict(target='ncnn'), 'one of onnxruntime, openvino, tensorrt'),
        (dict(weights='int4'), "must be 'int8' or 'uint8'"),
        (dict(form='integer', target='tensorrt'), 'no MatMulInteger'),
        (dict(target='tensorrt', weights='uint8'), "for form 'qdq' and target 'onnxruntime'"),
        (dict(path='missing/m.onnx'), 'there is no folder'),
        (dict(images=torch.zeros(2, 3, 31, 32)), r'takes \(B, 3, 32, 32\)'),
    ],
)
def test_what_does_not_exist_is_refused(vit, tmp_path, options, message):
    path = tmp_path / options.pop('path', 'm.onnx')
    with pytest.raises(ValueError, match=message):
        to_onnx(vit[0], path, **options)


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_a_missing_package_names_the_extra(vit, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'needs {package} .*fqvit_plugin\[export\]'):
        to_onnx(vit[0], tmp_path / 'm.onnx')


def test_a_simulated_model_is_converted_first(tmp_path):
    x = models.images(4)
    model = calibrated(models.vit(), x)
    to_onnx(model, tmp_path / 'm.onnx', form='integer', meta={'classes': 'a,b'})
    assert torch.equal(torch.from_numpy(run(tmp_path / 'm.onnx', x)), to_integer(model)(x))
    meta = {p.key: p.value for p in onnx.load(tmp_path / 'm.onnx').metadata_props}
    assert meta['classes'] == 'a,b'
    assert meta['form'] == 'integer'
