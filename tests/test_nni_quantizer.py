"""FQViTQuantizer: what NNI's interface gives equals our own lifecycle, and unwrapping restores the model.

Oracles: ``calibrate_`` on the same model and batches, compared by ``torch.equal``; the order in which layers run,
for the table of tensors; NNI's own ``PtqQuantizer`` and pruner for the interface.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import fqvit_plugin as fq
from fqvit_plugin.layers import QAct, QIntSoftmax
from fqvit_plugin.lifecycle import named_quantizers, phase_of
from fqvit_plugin.search.nni_compat import import_compression, import_nni
from fqvit_plugin.search.nni_config import scheme_of, tensors_of

from . import models, test_low_bits

nni = import_nni()
import_compression()
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from nni.compression import TorchEvaluator
    from nni.compression.pruning import L1NormPruner
    from nni.compression.quantization import PtqQuantizer

from fqvit_plugin.search.nni_quantizer import FQViTQuantizer  # noqa: E402

W8A8 = fq.get_scheme('fqvit_w8a8')
EVERYTHING = [dict(op_types=['Linear', 'Conv2d'], target_names=['_input_', 'weight', '_output_'], quant_dtype='int8')]


def evaluator_of(model, batches, mode='tensor'):
    """An NNI evaluator that runs ``batches`` through the model and never trains."""

    def evaluate(m):
        for batch in batches:
            m(batch, mode=mode)
        return 0.0

    def train(*args, **kwargs):
        raise AssertionError('post-training quantization must not train')

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    return TorchEvaluator(train, optimizer, lambda batch, m: None, evaluating_func=evaluate)


def buffers_of(model):
    return {f'{n}.{k}': b.clone() for n, q in named_quantizers(model) for k, b in q.named_buffers()}


def calibrated(model, batches, scheme):
    fq.quantize_model_(model, scheme)
    fq.calibrate_(model, batches)
    fq.quant(model)
    return model


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize('preset', ['strict', 'reference'])
@pytest.mark.parametrize(('build', 'size'), [(models.vit, 32), (models.swin, 56)])
def test_compress_gives_the_scales_of_our_lifecycle(build, size, preset):
    batches = models.batches(3, size)
    scheme = fq.get_scheme('fqvit_w8a8_attn4', observer='ema', preset=preset)  # ema depends on the batches' order
    expected = calibrated(build(), batches, scheme)
    model = build()
    compressed, config = FQViTQuantizer(model, EVERYTHING, evaluator_of(model, batches), scheme=scheme).compress()
    assert compressed is model
    assert_same(buffers_of(model), buffers_of(expected))
    with torch.no_grad():
        assert torch.equal(model(batches[0], mode='tensor'), expected(batches[0], mode='tensor'))
    name = 'head.fc' if build is models.swin else 'head.layers.head'
    weight = expected.get_submodule(name).weight_quantizer
    assert torch.equal(config[name]['weight']['scale'], weight.scale)
    assert config[name]['weight']['quant_dtype'] == 'int8'
    probs = next(v for k, v in config.items() if k.endswith('.probs'))['_output_0']
    assert (probs['quant_dtype'], probs['quant_scheme'], probs['scale']) == ('uint4', 'log2', None)


def test_max_steps_limits_the_batches():
    batches = models.batches(4)
    expected = calibrated(models.vit(), batches[:2], W8A8)
    model = models.vit()
    FQViTQuantizer(model, [], evaluator_of(model, batches)).compress(2, None)
    assert_same(buffers_of(model), buffers_of(expected))


def test_unwrap_restores_the_same_modules_and_parameters():
    model, batches = models.vit(), models.batches(2)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    before = model(batches[0], mode='tensor')
    quantizer = FQViTQuantizer(model, EVERYTHING, evaluator_of(model, batches))
    quantizer.compress(None, 1)
    assert not torch.equal(model(batches[0], mode='tensor'), before)
    quantizer.unwrap_model()
    now = dict(model.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[k] is m for k, m in modules.items())
    assert all(p is parameters[k] for k, p in model.named_parameters())
    assert torch.equal(model(batches[0], mode='tensor'), before)
    quantizer.wrap_model()
    assert phase_of(model).value == 'float'
    torch.testing.assert_close(model(batches[0], mode='tensor'), before)


def test_it_takes_the_arguments_of_ptq():
    theirs, ours = (list(inspect.signature(c.__init__).parameters)[:5] for c in (PtqQuantizer, FQViTQuantizer))
    assert ours == theirs
    assert issubclass(FQViTQuantizer, PtqQuantizer.__mro__[1])
    for method in ('compress', 'unwrap_model', 'wrap_model', 'from_compressor', 'update_calibration_config'):
        assert callable(getattr(FQViTQuantizer, method))


def test_the_same_program_runs_with_ptq_and_with_ours():
    """PtqQuantizer with a training function that only forwards is the program to be changed in one word."""
    config = [
        dict(op_types=['Linear'], target_names=['_input_', 'weight'], quant_dtype='int8', quant_scheme='affine')
    ]
    for kind in (PtqQuantizer, FQViTQuantizer):
        model, batches = models.vit(), models.batches(2)
        evaluator = evaluator_of(model, batches)
        evaluator.training_func = lambda *args, **kwargs: None
        _, calibration = kind(model, config, evaluator).compress(max_steps=None, max_epochs=1)
        entry = calibration['backbone.layers.0.attn.qkv']['weight']
        assert entry['quant_bits'] == 8
        assert {'scale', 'zero_point', 'tracked_max', 'tracked_min'} <= entry.keys()


def test_calibration_config_goes_into_another_model():
    batches = models.batches(2)
    first, second = models.swin(), models.swin()
    images = models.batches(2, 56)
    _, config = FQViTQuantizer(first, [], evaluator_of(first, images), scheme='fqvit_w8a8_attn4').compress()
    quantizer = FQViTQuantizer(second, [], scheme='fqvit_w8a8_attn4')
    quantizer.update_calibration_config(config)
    assert_same(buffers_of(second), buffers_of(first))
    assert torch.equal(second(images[0], mode='tensor'), first(images[0], mode='tensor'))
    other = FQViTQuantizer(models.vit(), [], evaluator_of(models.vit(), batches))
    with pytest.raises(ValueError, match='of another model: backbone'):
        other.update_calibration_config(config)
    six = FQViTQuantizer(models.swin(), [], scheme=dict(type='fqvit_w8a8_attn4', act_bits=6))
    with pytest.raises(ValueError, match=r'was calibrated as uint8 .* the model wants uint6'):
        six.update_calibration_config(config)


def test_levels_copies_and_factors_go_into_another_model():
    scheme = dict(type='fqvit_w4a4', steps=[])
    first, second, images = test_low_bits.vit(), test_low_bits.vit(), models.batches(2)
    _, config = FQViTQuantizer(first, [], evaluator_of(first, images), scheme=scheme).compress()
    found = [entry['buffers'] for layer in config.values() for entry in layer.values() if entry['scale'] is not None]
    assert all(any(len(b.get(name, ())) for b in found) for name in ('levels', 'copies', 'factors'))
    FQViTQuantizer(second, [], scheme=scheme).update_calibration_config(config)
    assert_same(buffers_of(second), buffers_of(first))
    assert torch.equal(second(images[0], mode='tensor'), first(images[0], mode='tensor'))


def test_recipes_with_steps_are_refused():
    with pytest.raises(ValueError, match=r'fqvit_w4a4 has steps \(equalize, round\).*steps=\[\]'):
        FQViTQuantizer(models.vit(), [], scheme='fqvit_w4a4')


def test_a_pruners_masks_are_multiplied_in():
    model, batches = models.vit(), models.batches(2)
    pruner = L1NormPruner(model, [dict(op_names=['backbone.layers.0.ffn.layers.0.0'], sparse_ratio=0.5)])
    _, masks = pruner.compress()
    mask = masks['backbone.layers.0.ffn.layers.0.0']['weight']
    original = model.backbone.layers[0].ffn.layers[0][0].weight.detach().clone()
    quantizer = FQViTQuantizer.from_compressor(pruner, [], evaluator_of(model, batches))
    quantizer.compress()
    linear = model.backbone.layers[0].ffn.layers[0][0]
    assert 0 < (mask == 0).float().mean() < 1
    assert torch.equal(linear.weight, original * mask)
    pruned = models.vit()
    with torch.no_grad():
        layer = pruned.backbone.layers[0].ffn.layers[0][0]
        layer.weight.mul_(mask)
        for target, value in masks['backbone.layers.0.ffn.layers.0.0'].items():
            if target == 'bias' and value is not None:
                layer.bias.mul_(value)
    assert_same(buffers_of(model), buffers_of(calibrated(pruned, batches, W8A8)))
    quantizer.unwrap_model()
    assert torch.equal(model.backbone.layers[0].ffn.layers[0][0].weight, original)


def test_from_our_own_the_earlier_entries_hold():
    model = models.vit()
    entry = dict(op_names=['head.layers.head'], target_names=['weight'])
    first = FQViTQuantizer(model, [dict(entry, quant_dtype='int4')], scheme='fqvit_w8a8_attn4')
    second = FQViTQuantizer.from_compressor(first, [dict(entry, quant_dtype='int6')])
    assert second.bound_model is model
    assert model.head.layers.head.weight_quantizer.spec.bit_type.name == 'int4'
    assert model.backbone.layers[0].attn.probs.spec.bit_type.name == 'uint4'
    assert not first._is_wrapped


def test_from_another_quantizer_is_refused():
    model, batches = models.vit(), models.batches(2)
    ptq = PtqQuantizer(model, EVERYTHING, evaluator_of(model, batches))
    with pytest.raises(ValueError, match='wrapped by another quantizer'):
        FQViTQuantizer.from_compressor(ptq, [])


def test_config_entries_become_bits():
    model = models.swin()
    config = [
        dict(op_names_re=['.*ffn.layers.1'], target_names=['weight'], quant_dtype='int4', granularity='out_channel'),
        dict(op_types=['Softmax'], target_names=['_output_'], quant_dtype='uint4'),
        dict(op_types=['Linear'], exclude_op_names=['head.fc'], quant_dtype='int6', quant_scheme='affine'),
        dict(op_names=['backbone.norm1'], target_settings={'_output_': dict(quant_dtype='uint5')}, quant_dtype=None),
    ]
    quantizer = FQViTQuantizer(model, config)
    block = model.backbone.stages[1].blocks[0]
    bits = {
        'fc2': block.ffn.layers[1].weight_quantizer,
        'fc1': block.ffn.layers[0][0].weight_quantizer,
        'fc1 in': block.norm2_act.quantizer,
        'fc1 out': block.ffn.hidden_act.quantizer,
        'residual': block.residual_act.quantizer,
        'head': model.head.fc.weight_quantizer,
        'head in': model.neck.out_act.quantizer,
        'norm': model.backbone.norm1.out_act.quantizer,
    }
    found = {k: q.spec.bit_type.name for k, q in bits.items()}
    assert found == {
        'fc2': 'int4', 'fc1': 'int6', 'fc1 in': 'uint6', 'fc1 out': 'uint6', 'residual': 'uint8',
        'head': 'int8', 'head in': 'uint8', 'norm': 'uint5',
    }  # fmt: skip
    assert block.attn.w_msa.probs.spec.bit_type.name == 'uint4'
    assert quantizer.report is not None
    assert quantizer.report.scheme == quantizer.scheme


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (dict(op_types=['LSTM'], quant_dtype='int8'), 'selects no layer'),
        (dict(op_types=['Dropout'], quant_dtype='int8'), 'is no layer whose tensors FQ-ViT quantizes; such are'),
        (dict(op_types=['Linear'], quant_dtype='uint8', target_names=['weight']), 'weights are signed: int8'),
        (dict(op_types=['Linear'], quant_dtype='int8', target_names=['bias']), 'keeps biases in float'),
        (dict(op_types=['LayerNorm'], quant_dtype='int8', target_names=['weight']), "target 'weight' of backbone"),
        (dict(op_types=['Linear'], quant_dtype='int8', target_names=['_input_'], quant_scheme='symmetric'), 'affine'),
        (dict(op_types=['Linear'], quant_dtype='int8', target_names=['weight'], granularity='in_channel'), 'out_ch'),
        (dict(op_types=['Linear'], quant_dtype='int8', granularity='per_channel'), 'granularity'),
        (dict(op_types=['Linear'], quant_dtype='int8', apply_method='bypass'), "apply_method 'bypass'"),
        (dict(op_types=['Linear'], quant_dtype='int1'), 'from 2 to 16'),
        (dict(op_types=['Linear'], quant_dtype='float8'), 'must read like int8'),
        (dict(op_types=['Linear'], bits=8), 'not in the form of NNI'),
        (
            dict(
                op_types=['Linear'], quant_dtype='int8',
                target_settings={'weight': dict(quant_dtype='int8', quant_scheme='affine')},
            ),
            'weights are symmetric',
        ),
    ],
)  # fmt: skip
def test_what_is_refused(entry, message):
    model = models.vit()
    with pytest.raises(ValueError, match=message) as caught:
        FQViTQuantizer(model, [entry])
    assert 'config_list[0]' in str(caught.value)
    assert not any(isinstance(m, QAct) for m in model.modules())


def test_compress_needs_batches():
    model = models.vit()
    with pytest.raises(ValueError, match='no evaluator'):
        FQViTQuantizer(model, []).compress()
    model = models.vit()
    quantizer = FQViTQuantizer(model, [], evaluator_of(model, []))
    with pytest.raises(ValueError, match='ran nothing through the model'):
        quantizer.compress()
    assert phase_of(model).value == 'float'
    with pytest.raises(ValueError, match='max_steps'):
        quantizer.compress(0)


def _order_of_calls(model, batch):
    """Weight layers and quantizers in the order in which they run."""
    order, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, (QAct, QIntSoftmax, fq.QLinear, fq.QConv2d)):
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: order.append(name)))
    with torch.no_grad():
        model(batch, mode='tensor')
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize(('build', 'size'), [(models.vit, 32), (models.swin, 56)])
def test_the_table_of_tensors_follows_the_calls(build, size):
    """Every tensor is quantized at once: a layer reads what was quantized last, and writes what is quantized next."""
    model = build()
    table = tensors_of(model, W8A8)
    fq.quantize_model_(model, W8A8)
    order = _order_of_calls(model, models.images(2, size))
    linears = [n for n in order if isinstance(model.get_submodule(n), (fq.QLinear, fq.QConv2d))]
    assert set(linears) == {n for n, t in table.items() if 'weight' in t}
    acts = [n for n in order if n not in linears]
    for name in linears:
        at = len([n for n in order[: order.index(name)] if n not in linears])
        assert table[name] == {'_input_': acts[at - 1], 'weight': name, '_output_': acts[at]}


def test_patterns_in_paths_are_literal():
    scheme = scheme_of(models.vit(), [dict(op_types=['Conv2d'], target_names=['weight'], quant_dtype='int5')], W8A8)
    (override,) = scheme.overrides
    assert override == fq.get_scheme(
        'fqvit_w8a8', overrides=[dict(layers=['backbone.patch_embed.projection'], weight_bits=5)]
    ).overrides[0]  # fmt: skip
