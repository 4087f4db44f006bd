"""Quantizers: what they keep, when it comes into force, and how a user adds an observer or a quantizer of his own."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn, tensor

from fqvit_plugin import (
    OBSERVERS,
    QUANTIZERS,
    BitType,
    Log2Quantizer,
    QuantSpec,
    UniformQuantizer,
    get_scheme,
    quantize_model_,
)
from fqvit_plugin.lifecycle import named_quantizers
from fqvit_plugin.observers import MinMaxObserver, RangeObserver
from fqvit_plugin.quantizers import build_quantizer
from fqvit_plugin.registry import lookup

from . import models

UINT4, UINT8, INT8 = BitType(4, False), BitType(8, False), BitType(8, True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def calibrated(quantizer, *batches):
    for batch in batches:
        quantizer.observe(batch)
    quantizer.take_qparams(batches[-1])
    quantizer.commit()
    return quantizer


@pytest.fixture
def registered():
    """Registers a class for one test only."""
    added = []

    def register(registry, cls, **options):
        before = set(registry.module_dict)
        registry.register_module(**options)(cls)
        added.extend((registry, name) for name in set(registry.module_dict) - before)
        return cls

    yield register
    for registry, name in added:
        registry.module_dict.pop(name)


# ---------------------------------------------------------------- the uniform quantizer


def test_by_hand():
    # range -1..14 on uint4: scale 1, zero point 1; halves go to even
    quantizer = calibrated(UniformQuantizer(QuantSpec(UINT4)), tensor([-1.0, 14.0]))
    assert quantizer.scale.item() == 1
    assert quantizer.zero_point.item() == 1
    x = tensor([-5.0, -1.0, 0.0, 0.5, 1.5, 13.4, 99.0])
    assert quantizer.quantize(x).tolist() == [0, 0, 1, 1, 3, 14, 15]
    assert quantizer(x).tolist() == [-1, -1, 0, 0, 2, 13, 14]


@pytest.mark.parametrize('axis', [0, 1, -1])
@pytest.mark.parametrize('bit_type', [UINT8, INT8], ids=lambda b: b.name)
def test_per_channel_is_one_quantizer_for_each_channel(axis, bit_type):
    x = torch.randn(3, 4, 5) * torch.linspace(1, 9, 5)
    channels = x.shape[axis]
    together = calibrated(UniformQuantizer(QuantSpec(bit_type, axis=axis), channels), x)
    assert together.scale.shape == together.zero_point.shape == (channels,)
    for c in range(channels):
        alone = calibrated(UniformQuantizer(QuantSpec(bit_type)), x.select(axis, c))
        assert torch.equal(together(x).select(axis, c), alone(x.select(axis, c)))


@pytest.mark.parametrize(('arithmetic', 'zero_points'), [('strict', (4,)), ('reference', ())])
def test_ptf_has_one_zero_point_or_one_for_each_channel(arithmetic, zero_points):
    spec = QuantSpec(UINT8, 'ptf', axis=-1, arithmetic=arithmetic)
    quantizer = calibrated(UniformQuantizer(spec, 4), torch.randn(6, 4))
    assert quantizer.scale.shape == (4,)
    assert quantizer.zero_point.shape == zero_points


def test_codes_and_fake_quantization_agree():
    x = torch.randn(40, 6)
    quantizer = calibrated(UniformQuantizer(QuantSpec(UINT8, 'ptf', axis=-1), 6), x)
    assert torch.equal(quantizer(x), (quantizer.quantize(x) - quantizer.zero_point) * quantizer.scale)


def test_a_quantized_tensor_is_its_own_nearest_point():
    x = torch.randn(500)
    quantizer = calibrated(UniformQuantizer(QuantSpec(UINT8)), x)
    assert torch.equal(quantizer(quantizer(x)), quantizer(x))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_in_float32(dtype):
    x = torch.randn(100).to(dtype)
    quantizer = calibrated(UniformQuantizer(QuantSpec(UINT8)), x)
    assert quantizer(x).dtype == torch.float32
    assert torch.equal(quantizer(x), quantizer(x.float()))


def test_unset_is_loud():
    quantizer = UniformQuantizer(QuantSpec(UINT8, axis=0), 3)
    assert not quantizer.is_calibrated
    assert torch.isnan(quantizer.scale).all()
    assert torch.isnan(quantizer(torch.ones(3, 2))).all()


def test_parameters_come_into_force_at_commit():
    quantizer = calibrated(UniformQuantizer(QuantSpec(UINT8)), tensor([0.0, 255.0]))
    assert quantizer.scale == 1
    quantizer.observe(tensor([0.0, 510.0]))
    quantizer.take_qparams(tensor([0.0, 510.0]))
    assert quantizer.is_taken
    assert quantizer.scale == 1, 'the old ones stay in force'
    assert quantizer.latest_scale == 2
    quantizer.commit()
    assert quantizer.scale == quantizer.latest_scale == 2
    assert not quantizer.is_taken


def test_commit_forgets_what_was_observed():
    # field.md A2: the reference keeps old extremes for ever
    quantizer = calibrated(UniformQuantizer(QuantSpec(UINT8)), tensor([0.0, 510.0]))
    calibrated(quantizer, tensor([0.0, 255.0]))
    assert quantizer.scale == 1


def test_reset_keeps_what_is_in_force():
    quantizer = calibrated(UniformQuantizer(QuantSpec(UINT8)), tensor([0.0, 255.0]))
    quantizer.observe(tensor([0.0, 510.0]))
    quantizer.take_qparams(tensor([0.0, 510.0]))
    quantizer.reset()
    assert quantizer.scale == 1
    with pytest.raises(RuntimeError, match='no parameters were taken'):
        quantizer.commit()


def test_state_dict_holds_everything():
    x = torch.randn(6, 4)
    spec = QuantSpec(UINT8, 'ptf', axis=-1)
    quantizer = calibrated(UniformQuantizer(spec, 4), x)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    other = UniformQuantizer(spec, 4)
    other.load_state_dict(torch.load(file))  # strict
    assert other.is_calibrated
    assert torch.equal(other(x), quantizer(x))


def test_an_unusable_tensor_is_named():
    quantizer = UniformQuantizer(QuantSpec(UINT8))
    with pytest.raises(ValueError, match=r'calibration of a quantizer: .*NaN'):
        quantizer.observe(tensor([float('nan')]))
    quantizer.name = 'layers.3.attn'
    with pytest.raises(ValueError, match=r'calibration of layers\.3\.attn: .*empty'):
        quantizer.observe(torch.zeros(0))


def test_channels_are_needed():
    with pytest.raises(ValueError, match=r'\(axis=0\) needs the number of channels'):
        UniformQuantizer(QuantSpec(UINT8, axis=0))


def test_repr_tells_the_recipe():
    assert 'uint8, ptf, axis=-1' in repr(UniformQuantizer(QuantSpec(UINT8, 'ptf', axis=-1), 3))
    assert 'int8, minmax' in repr(UniformQuantizer(QuantSpec(INT8)))


# ---------------------------------------------------------------- log2


def test_log2_quantizer():
    quantizer = build_quantizer(QuantSpec(UINT4, quantizer='log2'))
    assert isinstance(quantizer, Log2Quantizer)
    p = tensor([1.0, 0.5, 0.3, 0.0])
    for step in (quantizer.observe, quantizer.take_qparams):
        step(p)
    quantizer.reset()
    quantizer.commit()
    assert quantizer.is_calibrated
    assert quantizer.is_taken
    assert quantizer.quantize(p).tolist() == [0, 1, 2, 15]
    assert quantizer(p).tolist() == [1, 0.5, 0.25, 0]
    assert not quantizer.state_dict()


# ---------------------------------------------------------------- a user's own


class Half(MinMaxObserver):
    """The range, times a share."""

    def __init__(self, bit_type, *, axis=None, arithmetic='strict', share=0.5):
        super().__init__(bit_type, axis=axis, arithmetic=arithmetic)
        self.share = share

    def bounds(self):
        lo, hi = super().bounds()
        return lo * self.share, hi * self.share


@pytest.mark.parametrize(
    ('observer', 'share'), [('MyObserver', 0.5), (dict(type='MyObserver', share=0.25), 0.25)], ids=['name', 'options']
)
def test_own_observer_by_decorator(registered, observer, share):
    registered(OBSERVERS, type('MyObserver', (Half,), {}))
    data = models.batches(2)
    plain = models.quantized(models.vit(), data, ptf=False)
    ours = models.quantized(models.vit(), data, ptf=False, observer=observer)
    pairs = zip(named_quantizers(plain), named_quantizers(ours), strict=True)
    acts = [(p, o) for (name, p), (_, o) in pairs if 'weight_quantizer' not in name]
    assert len(acts) > 10
    for theirs, mine in acts:
        torch.testing.assert_close(mine.scale, theirs.scale * share)
    assert torch.isfinite(ours(data[0])).all()


def test_own_observer_for_another_name(registered):
    registered(OBSERVERS, Half, name=['half', 'HalfObserver'])
    assert lookup(OBSERVERS, 'half') is lookup(OBSERVERS, 'HalfObserver') is Half


def test_own_observer_from_the_base_classes(registered):
    class Fixed(RangeObserver):
        """Always -1..1."""

        def fold(self, measured):
            self.range = torch.tensor([[-1.0], [1.0]])

    registered(OBSERVERS, Fixed)
    quantizer = calibrated(UniformQuantizer(QuantSpec(UINT8, 'Fixed')), torch.randn(9) * 50)
    assert quantizer.scale.item() == pytest.approx(2 / 255)


def test_own_quantizer_by_decorator(registered):
    @torch.no_grad()
    def sign(self, x):
        return torch.sign(x)

    cls = registered(QUANTIZERS, type('SignQuantizer', (Log2Quantizer,), dict(forward=sign)))
    assert type(build_quantizer(QuantSpec(UINT8, quantizer='SignQuantizer'))) is cls


@pytest.mark.parametrize(
    ('observer', 'message'),
    [
        (dict(type='MyObserver', shrae=0.5), "'MyObserver' does not take {'shrae': 0.5}.*shrae"),
        (dict(type='minmax', alpha=0.9), "'minmax' does not take {'alpha': 0.9}"),
        (dict(type='percentile', alpha=2), r'alpha must be in \(0.5, 1\], got 2'),
        ('MyObservre', "unknown observer 'MyObservre'; there is: .*MyObserver.*minmax"),
    ],
)
def test_wrong_observer_is_a_value_error_and_changes_nothing(registered, observer, message):
    registered(OBSERVERS, type('MyObserver', (Half,), {}))
    model = models.vit()
    before = [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        quantize_model_(model, get_scheme('fqvit_w8a8', observer=observer))
    assert [(name, type(m)) for name, m in model.named_modules()] == before


def test_options_of_built_in_observers_reach_them():
    model = models.vit()
    quantize_model_(model, get_scheme('fqvit_w8a8', observer=dict(type='percentile', alpha=0.99, sigma=0.3)))
    observers = [q.observer for name, q in named_quantizers(model) if name.endswith('hidden_act.quantizer')]
    assert [(o.alpha, o.sigma) for o in observers] == [(0.99, 0.3)] * 2


def test_scales_move_with_the_model():
    model = nn.Sequential(calibrated(UniformQuantizer(QuantSpec(UINT8)), torch.randn(10)))
    assert model.to('meta')[0].scale.device.type == 'meta'


def test_calibration_uses_the_spec_of_every_tensor():
    # weights per output channel, activations per tensor, branches, embeddings and norm inputs per channel
    model = models.quantized(models.vit(), models.batches(1))
    embeddings = (model.backbone.patch_embed.patch_act, model.backbone.embed_act, model.backbone.pos_act)
    for branch in (model.backbone.layers[0].attn.proj_act, model.backbone.layers[0].ffn.out_act, *embeddings):
        assert (branch.scale.shape, branch.quantizer.zero_point.shape) == ((48,), (48,))
    assert model.backbone.layers[0].attn.qkv.weight_quantizer.scale.shape == (144,)
    assert model.backbone.layers[0].attn.qkv_act.quantizer.scale.shape == ()
    residual = model.backbone.layers[0].residual_act.quantizer
    assert (residual.scale.shape, residual.zero_point.shape) == ((48,), (48,))


def test_in_the_reference_branches_are_activations():
    model = models.quantized(models.vit(), models.batches(1), preset='reference')
    backbone = model.backbone
    for branch in (backbone.layers[0].attn.proj_act, backbone.patch_embed.patch_act, backbone.pos_act):
        assert branch.scale.shape == ()
    residual = model.backbone.layers[0].residual_act.quantizer
    assert (residual.scale.shape, residual.zero_point.shape) == ((48,), ())
