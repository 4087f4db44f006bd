"""Schemes: what a name means, what is refused and in which words, and that they survive a checkpoint."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fqvit_plugin import BitType, QuantScheme, QuantSpec, get_scheme
from fqvit_plugin.observers import MinMaxObserver
from fqvit_plugin.presets import SCHEMES, parse_scheme
from fqvit_plugin.registry import OBSERVERS

# ---------------------------------------------------------------- bit types


@pytest.mark.parametrize(
    ('name', 'qmin', 'qmax'),
    [
        ('int8', -128, 127),
        ('uint8', 0, 255),
        ('int4', -8, 7),
        ('uint4', 0, 15),
        ('int2', -2, 1),
        ('uint2', 0, 3),
        ('int16', -32768, 32767),
        ('uint16', 0, 65535),
    ],
)
def test_bit_types(name, qmin, qmax):
    bit_type = BitType.parse(name)
    assert (bit_type.qmin, bit_type.qmax, bit_type.name) == (qmin, qmax, name)
    assert BitType.parse(bit_type) is bit_type


@pytest.mark.parametrize('bits', [1, 17, 0, -8, 8.0, True, '8', None])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match=f'bits must be a whole number from 2 to 16, got {bits!r}'):
        BitType(bits, signed=True)


@pytest.mark.parametrize('name', ['int', 'uint', 'i8', 'int8 ', 'fp8', 'uuint8', 'int-8', 'int8.0', ''])
def test_bad_bit_type_names(name):
    with pytest.raises(ValueError, match=f'bit type must read like int8 or uint4, got {name!r}'):
        BitType.parse(name)


# ---------------------------------------------------------------- what a scheme says


@pytest.mark.parametrize(('name', 'attn'), [('fqvit_w8a8', 'uint8'), ('fqvit_w8a8_attn4', 'uint4')])
def test_the_paper(name, attn):
    # oracle: section 5 of the paper. Weights int8 per channel, activations uint8 per tensor, PTF, LIS.
    scheme = get_scheme(name)
    assert scheme.name == name
    assert (scheme.weight.bit_type.name, scheme.weight.axis) == ('int8', 0)
    assert (scheme.act.bit_type.name, scheme.act.axis, scheme.act.observer) == ('uint8', None, 'minmax')
    assert (scheme.norm_input.bit_type.name, scheme.norm_input.axis, scheme.norm_input.observer) == (
        'uint8',
        -1,
        'ptf',
    )
    assert scheme.probs.bit_type.name == attn
    assert scheme.log_int_softmax
    assert scheme.int_norm
    assert scheme.input_quant
    assert scheme.arithmetic == 'strict'


@pytest.mark.parametrize(
    ('preset', 'ptf', 'int_norm'),
    [('strict', True, True), ('strict', False, True), ('reference', True, True), ('reference', False, False)],
)
def test_integer_norm(preset, ptf, int_norm):
    scheme = get_scheme('fqvit_w8a8', preset=preset, ptf=ptf)
    assert scheme.int_norm is int_norm
    assert scheme.norm_input.observer == ('ptf' if ptf else 'minmax')


@pytest.mark.parametrize(
    ('name', 'lis', 'bits', 'quantizer'),
    [
        ('fqvit_w8a8', True, {}, 'log2'),
        ('fqvit_w8a8', False, {}, 'uniform'),
        ('fqvit_w8a8_attn4', False, {}, 'log2'),
        ('fqvit_w8a8', False, dict(attn_bits=6), 'log2'),
        ('fqvit_w8a8_attn4', False, dict(attn_bits=8), 'uniform'),
    ],
)
def test_quantizer_of_the_probabilities(name, lis, bits, quantizer):
    scheme = get_scheme(name, lis=lis, **bits)
    assert scheme.probs.quantizer == quantizer
    assert scheme.log_int_softmax is lis


def test_bits_depart_from_the_name():
    scheme = get_scheme('fqvit_w8a8', weight_bits=4, act_bits=6, attn_bits=3)
    names = [s.bit_type.name for s in (scheme.weight, scheme.act, scheme.norm_input, scheme.probs)]
    assert names == ['int4', 'uint6', 'uint6', 'uint3']


def test_observer_with_options():
    scheme = get_scheme('fqvit_w8a8', observer=dict(type='percentile', sigma=0.2, alpha=0.999))
    assert scheme.act.observer == 'percentile'
    assert scheme.act.observer_options == (('alpha', 0.999), ('sigma', 0.2))
    assert scheme.norm_input.observer_options == (), 'PTF takes none of them'
    assert get_scheme('fqvit_w8a8', observer=dict(type='ema')) == get_scheme('fqvit_w8a8', observer='ema')


@pytest.mark.parametrize('preset', ['strict', 'reference'])
def test_the_preset_reaches_every_tensor(preset):
    scheme = get_scheme('fqvit_w8a8', preset=preset)
    specs = (scheme.weight, scheme.act, scheme.branch, scheme.norm_input, scheme.probs)
    assert {s.arithmetic for s in specs} == {scheme.arithmetic} == {preset}


class OneRangeObserver(MinMaxObserver):
    def __init__(self, bit_type, *, arithmetic='strict', axis=None):
        super().__init__(bit_type, arithmetic=arithmetic)
        if axis is not None:
            raise ValueError('no axis')


def test_branches_keep_a_scale_for_each_channel_in_strict_where_the_observer_can(monkeypatch):
    scheme = get_scheme('fqvit_w8a8', observer=dict(type='percentile', alpha=0.99), act_bits=6)
    assert scheme.branch == dataclasses.replace(scheme.act, axis=-1)
    scheme = get_scheme('fqvit_w8a8', preset='reference')
    assert scheme.branch == scheme.act
    monkeypatch.setitem(OBSERVERS.module_dict, 'one range', OneRangeObserver)
    scheme = get_scheme('fqvit_w8a8', observer='one range')
    assert scheme.branch == scheme.act


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ('arguments', 'parts'),
    [
        (dict(name='fqvit'), ["unknown scheme 'fqvit'", *SCHEMES]),
        (dict(preset='exact'), ["unknown preset 'exact'", 'strict', 'reference']),
        (dict(observer='median'), ["unknown observer 'median'", 'minmax', 'ema', 'percentile', 'omse', 'ptf']),
        (dict(observer=dict(alpha=0.9)), ['observer must be a name or dict(type=name', "{'alpha': 0.9}"]),
        (dict(weight_bits=1), ['2 to 16', 'got 1']),
        (dict(act_bits=17), ['2 to 16', 'got 17']),
        (dict(attn_bits=8.0), ['2 to 16', 'got 8.0']),
        (dict(weight_bits=True), ['2 to 16', 'got True']),
        (dict(bits=8), ["unknown option 'bits'", 'weight_bits', 'act_bits', 'attn_bits']),
        (dict(ptff=True), ["unknown option 'ptff'"]),
        (dict(ptf='no'), ["ptf must be True or False, got 'no'"]),
        (dict(lis=1), ['lis must be True or False, got 1']),
        (dict(input_quant=None), ['input_quant must be True or False, got None']),
        (dict(observer=dict(type='percentile', alhpa=0.9)), ["'percentile' does not take", 'alhpa']),
        (dict(observer=dict(type='percentile', alpha=2)), ['alpha must be in (0.5, 1], got 2']),
    ],
)
def test_errors_say_what_and_what_instead(arguments, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the parts below are the match
        get_scheme(**dict(dict(name='fqvit_w8a8'), **arguments))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(observer='median'), "unknown observer 'median'"),
        (dict(quantizer='cubic'), "unknown quantizer 'cubic'; there is: .*log2.*uniform"),
        (dict(arithmetic='exact'), "must be one of strict, reference, got 'exact'"),
    ],
)
def test_a_spec_is_checked_however_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(BitType(8, False), **options)


def test_frozen():
    scheme = get_scheme('fqvit_w8a8')
    for value, field in ((scheme, 'name'), (scheme.act, 'observer'), (scheme.act.bit_type, 'bits')):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 'other')
    assert hash(scheme) == hash(get_scheme('fqvit_w8a8'))


# ---------------------------------------------------------------- from a config


def test_parse_scheme():
    plain = get_scheme('fqvit_w8a8')
    assert parse_scheme('fqvit_w8a8') == plain
    assert parse_scheme(plain) is plain
    assert parse_scheme(dict(type='fqvit_w8a8', _scope_='mmpretrain')) == plain
    value = dict(type='fqvit_w8a8_attn4', observer='omse', ptf=False, preset='reference', act_bits=6)
    kept = dict(value)
    expected = get_scheme('fqvit_w8a8_attn4', observer='omse', ptf=False, preset='reference', act_bits=6)
    assert parse_scheme(value) == expected
    assert value == kept


@pytest.mark.parametrize('value', [None, 8, dict(observer='omse'), ['fqvit_w8a8']])
def test_parse_scheme_refuses(value):
    with pytest.raises(ValueError, match=r'quant_scheme must be a name or dict\(type='):
        parse_scheme(value)


# ---------------------------------------------------------------- into and out of a checkpoint


@pytest.mark.parametrize(
    'scheme',
    [
        get_scheme('fqvit_w8a8'),
        get_scheme('fqvit_w8a8_attn4', observer=dict(type='percentile', alpha=0.9), preset='reference', lis=False),
        get_scheme('fqvit_w8a8', ptf=False, weight_bits=4, attn_bits=2, input_quant=False),
    ],
    ids=lambda s: s.name,
)
def test_round_trip(scheme):
    assert QuantScheme.from_dict(scheme.to_dict()) == scheme
    # checkpoint meta may pass through JSON, which turns tuples into lists
    assert QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert scheme.differences(QuantScheme.from_dict(scheme.to_dict())) == []


def damaged(change):
    data = get_scheme('fqvit_w8a8').to_dict()
    change(data)
    return data


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (lambda d: d.pop('act'), 'act'),
        (lambda d: d.pop('branch'), "not a quantization scheme of this version: it says nothing of 'branch'"),
        (lambda d: d.pop('int_norm'), 'int_norm'),
        (lambda d: d.update(colour='red'), 'colour'),
        (lambda d: d['act'].update(colour='red'), 'colour'),
        (lambda d: d['weight'].pop('bit_type'), 'bit_type'),
        (lambda d: d['weight']['bit_type'].update(bits=40), 'got 40'),
        (lambda d: d['act'].update(observer='median'), 'median'),
        (lambda d: d.update(act=3), 'int'),
    ],
)
def test_from_dict_refuses(change, named):
    with pytest.raises(ValueError, match=named):
        QuantScheme.from_dict(damaged(change))


def test_differences_name_fields():
    ours, theirs = get_scheme('fqvit_w8a8'), get_scheme('fqvit_w8a8_attn4', observer='ema', weight_bits=4)
    lines = ours.differences(theirs)
    assert "name: 'fqvit_w8a8' != 'fqvit_w8a8_attn4'" in lines
    assert "act.observer: 'minmax' != 'ema'" in lines
    assert "branch.observer: 'minmax' != 'ema'" in lines
    assert 'weight.bit_type.bits: 8 != 4' in lines
    assert 'probs.bit_type.bits: 8 != 4' in lines
    assert not any(line.startswith('norm_input.observer') for line in lines)
