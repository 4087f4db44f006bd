"""timm's own models: surgery, the roads to it, and the same weights through timm and through MMPretrain.

Oracles: timm's float model, which the twin must equal in phase float, and to which its error must fall by sixteen
with every four bits more; MMPretrain's twins of the same weights, whose scales must come out the same; timm's own
transform.
"""

from __future__ import annotations

import copy
import io

import accuracy
import calibrate
import convert_checkpoint
import numpy as np
import pytest
import timm
import torch
from _twins import scale_difference
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import digit_version
from mmpretrain.registry import MODELS as MMPRETRAIN
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import fqvit_plugin as fq
from fqvit_plugin.blocks.common import QNormAct, linked
from fqvit_plugin.checkpoint import check_weights, save_calibrated
from fqvit_plugin.lifecycle import named_quantizers, phase_of
from fqvit_plugin.phase import Phase, QuantLayer
from fqvit_plugin.surgery import check_model
from fqvit_plugin.timm_data import data_settings

from . import models as mmpretrain_models
from .models import batches, images, quantized
from .projects import CLASSES, project, runner, write_images
from .shared_data import imagenet
from .test_surgery import error, run, snapshot
from .timm_models import distilled, shaken, swin, vit

#: name -> (how to build it, image size)
MODELS = {
    'vit': (vit, 32),
    'vit, average of the patches': (lambda: vit(global_pool='avg'), 32),
    'vit, average, no class token': (lambda: vit(global_pool='avg', class_token=False), 32),
    'vit, average after the norm': (lambda: vit(global_pool='avg', fc_norm=False), 32),
    'vit, norm after the class token was picked': (lambda: vit(fc_norm=True), 32),
    'vit, layer scale, class token without position': (lambda: vit(init_values=0.5, no_embed_class=True), 32),
    'vit, register tokens': (lambda: vit(reg_tokens=3), 32),
    'vit, register tokens without position': (lambda: vit(reg_tokens=3, no_embed_class=True), 32),
    'vit, norms of query and key': (lambda: vit(qk_norm=True), 32),
    'vit, no qkv bias': (lambda: vit(qkv_bias=False), 32),
    'vit, any image size': (lambda: vit(dynamic_img_size=True), (40, 56)),
    'vit, no classifier': (lambda: vit(num_classes=0), 32),
    'vit, all tokens': (lambda: vit(num_classes=0, global_pool=''), 32),
    'distilled': (distilled, 32),
    'swin': (swin, 56),
    'swin, four stages': (lambda: swin(img_size=64, window_size=4, depths=(1, 2, 1, 1), num_heads=(2, 2, 4, 4)), 64),
    'swin, small windows with padding': (lambda: swin(img_size=40, window_size=4), 40),
    'swin, no classifier': (lambda: swin(num_classes=0), 56),
    'swin, map': (lambda: swin(num_classes=0, global_pool=''), 56),
}
EVERY_MODEL = pytest.mark.parametrize('name', MODELS)


def made(name):
    build, size = MODELS[name]
    return build(), images(4, size)


# ---------------------------------------------------------------- surgery on a bare timm model


@EVERY_MODEL
def test_in_float_the_twin_computes_what_the_model_did(name):
    model, x = made(name)
    expected = run(model, x)[0]
    keys, parameters = set(model.state_dict()), [(key, id(p)) for key, p in model.named_parameters()]
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    assert phase_of(model) is Phase.FLOAT
    # Swin's attention is the same operations; the ViTs' is fused in timm, which rounds differently
    tolerance = 0.0 if name.startswith('swin') else 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(run(model, x)[0], expected, rtol=0, atol=tolerance)
    assert [(key, id(p)) for key, p in model.named_parameters()] == parameters, 'shared, in the same order'
    new = {f'{n}.{b}' for n, q in named_quantizers(model) for b, _ in q.named_buffers()}
    assert set(model.state_dict()) - keys == new
    assert keys <= set(model.state_dict()), 'a timm checkpoint loads into the twin'


@EVERY_MODEL
@pytest.mark.parametrize('ptf', [True, False])
def test_with_many_bits_the_quantized_model_is_the_float_one(name, ptf):
    errors = []
    for bits in (12, 16):
        model, x = made(name)
        expected = run(model, x)
        scheme = dict(lis=False, ptf=ptf, weight_bits=bits, act_bits=bits, attn_bits=bits)
        errors.append(error(run(quantized(model, [x], **scheme), x), expected))
    assert errors[0] <= 0.03
    assert errors[1] <= errors[0] / 8, f'four bits more must leave about a sixteenth: {errors}'


@EVERY_MODEL
@pytest.mark.parametrize('preset', ['strict', 'reference'])
def test_the_papers_bits_are_near_float(name, preset):
    model, x = made(name)
    expected = run(model, x)
    model = quantized(model, [*batches(2, x.shape[2:]), x], preset=preset)
    assert 0 < error(run(model, x), expected) <= 0.45  # random weights amplify noise
    fq.dequant(model)
    assert error(run(model, x), expected) < 1e-5


@EVERY_MODEL
def test_every_product_and_every_norm_reads_a_grid(name):
    model, x = made(name)
    model = quantized(model, [x])
    grids = [m.quantizer for m in model.modules() if isinstance(m, fq.QAct) and m.scale.ndim == 0]
    reads, codes = {}, {}

    def norm_reads(norm, args, kwargs, path):
        act = linked(norm) if isinstance(norm, QNormAct) else args[1]
        scale = act.scale.repeat(norm.tile) if isinstance(norm, QNormAct) and act.scale.ndim else act.scale
        codes[path] = args[0] / scale

    for path, module in model.named_modules():
        if isinstance(module, QuantLayer) and hasattr(module, 'weight_quantizer'):
            module.register_forward_pre_hook(lambda _, args, p=path: reads.update({p: args[0].unique()}))
        if isinstance(module, fq.QIntLayerNorm):
            assert module.integer
            module.register_forward_pre_hook(
                lambda m, args, kwargs, p=path: norm_reads(m, args, kwargs, p), with_kwargs=True
            )
    run(model, x)
    assert len(reads) >= 9
    assert len(codes) >= 4
    for path, values in reads.items():
        assert any(torch.equal(grid(values), values) for grid in grids), f'{path} reads what no quantizer wrote'
    for path, steps in codes.items():
        assert (steps - steps.round()).abs().max() < 1e-2, path


def test_the_head_is_quantized_and_the_report_says_what_is_not():
    model, _ = made('vit')
    report = fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8_attn4'))
    kinds = [entry.kind for entry in report.entries]
    assert kinds.count('QConv2d') == 1
    assert kinds.count('QLinear') == 2 * 4 + 1  # qkv, proj, fc1, fc2 in two blocks; the head
    assert kinds.count('QIntLayerNorm') == 2 * 2 + 1
    assert kinds.count('QAct') == 5 + 2 * 10 + 2  # as in MMPretrain's twin
    assert report.left_float.keys() == {'blocks.0.mlp.act', 'blocks.1.mlp.act'}
    assert 'head.out_act' in [entry.path for entry in report.entries]


def test_images_with_labels_calibrate_as_images_alone():
    model, x = made('vit')
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(4)), batch_size=2)
    fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    fq.calibrate_(model, loader)
    fq.quant(model)
    alone = quantized(made('vit')[0], list(x.split(2)), name='fqvit_w8a8')
    assert torch.equal(model(x), alone(x))


def test_features_of_all_tokens_are_quantized_too():
    model, x = made('vit')
    model = quantized(model, [x])
    with torch.no_grad():
        features = model.forward_features(x)
    assert features.shape == (4, 17, 48)
    # the head's own token is what forward sees; the others share its range
    assert torch.equal(model.forward_head(features), model(x))


@pytest.mark.parametrize('name', ['vit, norms of query and key', 'distilled', 'swin'])
def test_copies_are_wired_to_themselves(name):
    model, x = made(name)
    model = quantized(model, [x])
    expected = run(model, x)[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(copied, x)[0], expected)
        own = {id(m) for m in copied.modules()}
        links = [linked(m) for m in copied.modules() if '_input_act' in m.__dict__]
        assert len(links) >= 3
        assert all(id(act) in own for act in links)


@pytest.mark.skipif(digit_version(torch.__version__) < digit_version('2.5.0'), reason='Dynamo of torch 2.1 cannot')
@pytest.mark.parametrize('name', ['vit', 'vit, average of the patches', 'distilled', 'swin'])
def test_the_quantized_model_is_one_graph(name):
    model, x = made(name)
    model = quantized(model, [x])
    expected = run(model, x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert torch.equal(run(compiled, x)[0], expected)


# ---------------------------------------------------------------- the same weights through MMPretrain


PAIRS = {
    'vit': (vit, lambda: mmpretrain_models.vit(), 32, 'backbone.output_act'),
    'distilled': (
        distilled,
        lambda: mmpretrain_models.vit('DistilledVisionTransformer', head=dict(type='DeiTClsHead')),
        32,
        'backbone.output_act',
    ),
    'swin': (swin, lambda: mmpretrain_models.swin(), 56, 'backbone.norm1.out_act'),
}


@pytest.mark.parametrize('scheme', [dict(), dict(preset='reference'), dict(observer='omse')], ids=str)
@pytest.mark.parametrize('name', PAIRS)
def test_scales_are_those_of_mmpretrains_twin(name, scheme):
    build, build_theirs, size, last = PAIRS[name]
    ours, theirs, x = build(), build_theirs(), images(4, size)
    loaded = theirs.load_state_dict(fq.convert_state_dict(ours.state_dict()), strict=False)
    assert not loaded.unexpected_keys
    assert all(key.endswith('relative_position_index') for key in loaded.missing_keys), 'timm computes it'
    torch.testing.assert_close(run(ours, x)[0], run_classifier(theirs, x), rtol=0, atol=1e-4)
    data = [*batches(2, size), x]
    count, difference = scale_difference(quantized(ours, data, **scheme), quantized(theirs, data, **scheme), last)
    assert count > 30
    assert difference <= 1e-4
    assert (
        error([run(ours, x)[0]], [run_classifier(theirs, x)]) < 0.05
    )  # a value on a rounding edge may fall elsewhere


@torch.no_grad()
def run_classifier(model, x):
    """Logits; of a distilled DeiT the mean of both heads, as its float prediction."""
    logits = model(x)
    return sum(logits) / 2 if isinstance(logits, tuple) else logits


@pytest.mark.parametrize('name', ['vit_t', 'deit_t'])
def test_real_weights_through_timm_and_through_mmpretrain(name):
    """Oracle: the other road. All 400 images: tools/accuracy.py --via mmpretrain timm (docs/results.md)."""
    folder = imagenet()
    roads = {via: {} for via in accuracy.BUILDERS}
    for via in accuracy.BUILDERS:
        cfg, model = accuracy.load_model(name, folder / 'weights', via)
        photos = accuracy.read_photos(folder / 'calib', cfg.test_dataloader.dataset.pipeline).shuffled(0)
        chosen = [accuracy.Photos(photos.images[i : i + 20], photos.labels[i : i + 20]) for i in (0, 20)]
        roads[via]['float', 0] = model, accuracy.predict(model, chosen[0])
        _, model = accuracy.load_model(name, folder / 'weights', via)
        scheme = fq.get_scheme('fqvit_w8a8_attn4', input_quant=cfg.quant_scheme.input_quant)
        fq.quantize_model_(model, scheme)
        fq.calibrate_(model, [dict(inputs=photos.images) for photos in chosen], accuracy.forward)
        fq.quant(model)
        roads[via]['8/8/4', 0] = model, accuracy.predict(model, chosen[0])
    plain, quantized = accuracy.compare(name, roads['timm'], roads['mmpretrain'])
    assert plain.logits <= 1e-4
    assert (plain.changed, plain.scales) == (0, 0)
    assert quantized.scales > 150
    assert quantized.apart <= 1e-4


# ---------------------------------------------------------------- what timm calls its models

SMALL_VIT = dict(embed_dim=48, num_heads=3, depth=1, num_classes=5)
SMALL_SWIN = dict(embed_dim=24, num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), num_classes=5)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('vit_tiny_patch16_224', SMALL_VIT),
        ('vit_small_patch32_224', SMALL_VIT),
        ('vit_base_patch16_224', SMALL_VIT),
        ('vit_base_patch16_gap_224', SMALL_VIT),
        ('vit_small_patch14_dinov2', dict(SMALL_VIT, img_size=56)),
        ('vit_small_patch14_reg4_dinov2', dict(SMALL_VIT, img_size=56)),
        ('deit_tiny_patch16_224', SMALL_VIT),
        ('deit_tiny_distilled_patch16_224', SMALL_VIT),
        ('deit3_small_patch16_224', SMALL_VIT),
        ('swin_tiny_patch4_window7_224', SMALL_SWIN),
        ('swin_s3_tiny_224', dict(num_classes=5)),
    ],
)
def test_timms_names(name, options):
    model = shaken(timm.create_model(name, pretrained=False, **options))
    x = images(1, model.patch_embed.img_size)
    expected = run(model, x)
    # many bits: what the paper's do to random weights and one image says nothing
    scheme = dict(lis=False, weight_bits=16, act_bits=16, attn_bits=16)
    assert 0 < error(run(quantized(model, [x], **scheme), x), expected) <= 0.01


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda: timm.create_model('resnet18'),
            r'ResNet is not covered\. Covered are .*timm\.SwinTransformer',
        ),
        (
            lambda: timm.create_model('swinv2_tiny_window8_256', **SMALL_SWIN),
            'SwinTransformerV2 is not covered: no twin is written',
        ),
        (
            lambda: timm.create_model('swin_tiny_patch4_window7_224', features_only=True, **SMALL_SWIN),
            r'backbone timm\.Feature\w+ is not covered',
        ),
        (lambda: timm.create_model('beit_base_patch16_224', **SMALL_VIT), 'Beit is not covered: its attention adds'),
        (
            lambda: timm.create_model('eva02_tiny_patch14_224', embed_dim=48, num_heads=3, depth=1),
            'Eva is not covered: rotary positions',
        ),
        (
            lambda: timm.create_model('vit_relpos_small_patch16_224', **SMALL_VIT),
            'VisionTransformerRelPos is not cov',
        ),
        (lambda: vit(pre_norm=True), r'VisionTransformer with pre_norm=True \(CLIP\) is not covered'),
        (lambda: vit(global_pool='map'), "global_pool='map', attention pooling, is not covered"),
        (lambda: with_part('blocks.1.mlp', timm.layers.SwiGLU(48)), r'blocks\.1\.mlp is a SwiGLU, not a Mlp'),
        (lambda: with_part('blocks.1.mlp', timm.layers.GluMlp(48)), r'blocks\.1\.mlp is a GluMlp, not a Mlp'),
        (
            lambda: with_part('blocks.0.norm2', timm.layers.GroupNorm1(48)),
            r'blocks\.0\.norm2 is a GroupNorm1, not a Lay',
        ),
        (lambda: with_part('blocks.0.attn', nn.Identity()), r'blocks\.0\.attn is a Identity, not a Attention'),
        (lambda: with_part('blocks.1', nn.Identity()), r'blocks\.1 is a Identity, not a Block'),
        (lambda: with_part('blocks.0.attn.q_norm', nn.BatchNorm1d(16)), r'attn\.q_norm is a BatchNorm1d'),
        (lambda: with_part('patch_embed', nn.Identity()), 'patch_embed is a Identity, not a PatchEmbed'),
        (lambda: with_part('head', nn.Sequential(nn.Linear(48, 7))), 'head is a Sequential, not a Linear'),
        (lambda: with_part('pos_embed', None), r"without a position embedding \(pos_embed='none'\)"),
        (lambda: with_part('head_dist', nn.Identity(), distilled()), 'head_dist is a Identity, not a Linear'),
        (lambda: with_part('norm', nn.Identity(), distilled()), 'without a final norm before its heads'),
        (lambda: with_part('layers.1.downsample', nn.Linear(24, 48), swin()), r'layers\.1\.downsample is a Linear'),
        (lambda: with_part('norm', nn.BatchNorm1d(48), swin()), 'norm is a BatchNorm1d'),
        (
            lambda: with_part('layers.0.blocks.1.attn', nn.Identity(), swin()),
            r'blocks\.1\.attn is a Identity, not a Win',
        ),
    ],
)
def test_refusals_name_the_part_and_change_nothing(make, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    with pytest.raises(ValueError, match=message):
        check_model(model)
    assert snapshot(model) == before


def with_part(path, part, model=None):
    model = vit() if model is None else model
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, part)
    return model


def test_a_gated_attention_is_refused():
    model = vit()
    model.blocks[1].attn.gate = nn.Linear(48, 48)
    with pytest.raises(ValueError, match=r'blocks\.1\.attn gates its output'):
        check_model(model)


def test_a_hybrid_is_refused_by_its_patch_embedding():
    model = timm.create_model('vit_tiny_r_s16_p8_224', pretrained=False, depth=1, num_classes=5)
    with pytest.raises(ValueError, match='patch_embed is a Hybrid'):
        check_model(model)


# ---------------------------------------------------------------- inside MMPretrain

TIMM_CLASSIFIER = dict(
    type='TimmClassifier', model_name='vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, depth=2,
    num_heads=2, num_classes=CLASSES,
)  # fmt: skip


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    """A project whose model is timm's, its config file, and the weights as timm would publish them."""
    root = tmp_path_factory.mktemp('timm')
    cfg = project(write_images(root / 'images', {'train': 4, 'val': 2}), root / 'work')
    cfg.model = TIMM_CLASSIFIER
    cfg.custom_hooks[0]['compare_float'] = True
    cfg.dump(root / 'config.py')
    init_default_scope('mmpretrain')
    model = shaken(MMPRETRAIN.build(dict(TIMM_CLASSIFIER)))
    weights = model.model.state_dict()
    assert 'blocks.0.attn.qkv.weight' in weights
    torch.save({'model': weights}, root / 'published.pth')
    save_file(weights, root / 'published.safetensors')
    return root, model


def test_hook_on_timm_classifier_and_reload(job):
    root, model = job
    cfg = Config.fromfile(root / 'config.py')
    cfg.load_from = str(root / 'published.pth')
    first = runner(cfg)
    metrics = first.test()
    assert torch.equal(first.model.model.head.weight, model.model.head.weight), 'the published weights are loaded'
    saved = torch.load(root / 'work' / 'calibrated.pth', weights_only=True)
    assert 'blocks.0.attn.qkv_act.quantizer.scale' in saved['meta']['fqvit']['buffers'], "timm's names"
    again = Config.fromfile(root / 'config.py')
    again.load_from, again.calib_dataloader = str(root / 'work' / 'calibrated.pth'), None
    again.experiment_name += '_again'
    assert runner(again).test() == metrics, 'no calibration, the same result'
    fresh = shaken(MMPRETRAIN.build(dict(TIMM_CLASSIFIER)))
    report = fq.load_quantized_(fresh, root / 'work' / 'calibrated.pth')
    assert 'model.head' in [entry.path for entry in report.entries]
    bare = timm.create_model(**{k: v for k, v in TIMM_CLASSIFIER.items() if k != 'type'})
    fq.load_quantized_(bare, root / 'work' / 'calibrated.pth')
    x = images(2)
    assert torch.equal(bare(x), fresh(x))


@pytest.mark.parametrize('file', ['published.pth', 'published.safetensors'])
def test_calibrate_tool_reads_what_timm_publishes(job, tmp_path, file):
    root, model = job
    out = tmp_path / 'q.pth'
    assert calibrate.main([str(root / 'config.py'), str(root / file), '--out', str(out), '--batches', '2']) == 0
    saved = torch.load(out, weights_only=True)['state_dict']
    assert torch.equal(saved['head.weight'], model.model.head.weight)


def test_safetensors_become_a_file_that_mmengine_loads(job, tmp_path):
    root, model = job
    assert (
        convert_checkpoint.main([str(root / 'published.safetensors'), str(tmp_path / 'x.pth'), '--keep-names']) == 0
    )
    cfg = Config.fromfile(root / 'config.py')
    cfg.load_from, cfg.work_dir = str(tmp_path / 'x.pth'), str(tmp_path)
    cfg.experiment_name += '_kept'
    made = runner(cfg)
    made.test()
    assert torch.equal(made.model.model.head.weight, model.model.head.weight)


def test_files_of_another_model_are_refused(job):
    _, model = job
    names = dict(model.state_dict())
    check_weights(model, names)
    theirs = mmpretrain_models.vit().state_dict()
    with pytest.raises(ValueError, match="it has the names of MMPretrain names, and the model is timm's"):
        check_weights(model, theirs)
    # MMPretrain would resize it while loading, timm does not
    larger = dict(names, pos_embed=torch.zeros(1, 50, 24))
    with pytest.raises(ValueError, match=r'pos_embed has shape \(1, 50, 24\)'):
        check_weights(model, larger)


def test_bare_timm_model_saved_and_reloaded(tmp_path):
    model, x = made('swin')
    scheme = fq.get_scheme('fqvit_w8a8_attn4')
    model = quantized(model, [x])
    save_calibrated(tmp_path / 'q.pth', model, scheme)
    fresh = swin()
    fq.load_quantized_(fresh, tmp_path / 'q.pth')
    assert torch.equal(fresh(x), model(x))


def test_timm_backbone_alone_and_in_a_classifier_that_cannot_read_it():
    options = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    backbone = dict(type='TIMMBackbone', model_name='vit_tiny_patch16_224', **options)
    init_default_scope('mmpretrain')
    alone = MMPRETRAIN.build(dict(backbone))
    shaken(alone.timm_model)
    x = images(2)
    expected = run(alone, x)
    assert expected[0].shape == (2, 17, 24), 'all tokens'
    assert 0 < error(run(quantized(alone, [x]), x), expected) <= 0.45
    head = dict(type='VisionTransformerClsHead', num_classes=3, in_channels=24)
    model = MMPRETRAIN.build(dict(type='ImageClassifier', backbone=backbone, head=head))
    with pytest.raises(ValueError, match="write model = dict\\(type='TimmClassifier'"):
        check_model(model)


# ---------------------------------------------------------------- preprocessing


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
@pytest.mark.parametrize(
    ('name', 'shape'), [('vit_tiny_patch16_224', (301, 400)), ('deit_tiny_patch16_224', (260, 231))]
)
def test_the_pipeline_is_timms_transform(tmp_path, name, shape, suffix):
    model = timm.create_model(name, pretrained=False, depth=1, embed_dim=24, num_heads=2)
    settings = data_settings(model)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    path = tmp_path / f'x.{suffix}'
    Image.fromarray(pixels).save(path)
    with Image.open(path) as image:
        expected = create_transform(**resolve_model_data_config(model))(image.convert('RGB'))
    got = through_mmpretrain(settings, path)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def through_mmpretrain(settings, path):
    init_default_scope('mmpretrain')
    dataset = dict(type='CustomDataset', data_root=str(path.parent), lazy_init=True, pipeline=settings['pipeline'])
    packed = accuracy.DATASETS.build(dataset).pipeline({'img_path': str(path)})
    preprocess = MMPRETRAIN.build(dict(type='ClsDataPreprocessor', **settings['data_preprocessor']))
    return preprocess({'inputs': packed['inputs'][None]})['inputs'][0]


def test_squash_and_what_has_no_counterpart(tmp_path):
    model = vit()
    model.pretrained_cfg = dict(input_size=(3, 48, 32), crop_mode='squash', crop_pct=0.8, interpolation='bilinear')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(tmp_path / 'x.png')
    with Image.open(tmp_path / 'x.png') as image:
        expected = create_transform(**resolve_model_data_config(model))(image)
    torch.testing.assert_close(
        through_mmpretrain(data_settings(model), tmp_path / 'x.png'), expected, rtol=0, atol=1e-4
    )
    model.pretrained_cfg = dict(model.pretrained_cfg, crop_mode='border')
    with pytest.raises(ValueError, match="crop_mode='border' at 48 by 32 pixels has no counterpart"):
        data_settings(model)


def test_the_config_says_what_timm_says():
    cfg = Config.fromfile(accuracy.CONFIGS / 'timm' / 'fqvit_vit_t_w8a8_attn4_timm.py')
    init_default_scope('mmpretrain')
    model = MMPRETRAIN.build(cfg.model)
    check_model(model)
    settings = data_settings(model)
    assert settings['data_preprocessor']['mean'] == cfg.data_preprocessor.mean
    assert settings['data_preprocessor']['std'] == cfg.data_preprocessor.std
    ours = {step.type.split('.')[-1]: step for step in cfg.test_dataloader.dataset.pipeline}
    theirs = {step['type'].split('.')[-1]: step for step in settings['pipeline']}
    assert ours['ResizeEdge'] == {**theirs['ResizeEdge'], 'type': ours['ResizeEdge'].type}
    assert (ours['CenterCrop'].crop_size,) * 2 == theirs['CenterCrop']['crop_size']
    assert [hook.type for hook in cfg.custom_hooks] == ['fqvit_plugin.QuantHook']
