"""Observers against obvious slow versions: numpy percentiles, Python loops over channels and candidates, tables."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from mmengine.utils import digit_version
from torch import tensor

from fqvit_plugin import grids, observers
from fqvit_plugin.functional import affine_qparams, fake_quantize
from fqvit_plugin.observers import EmaObserver, MinMaxObserver, Observer, PercentileObserver, RangeObserver, _ends
from fqvit_plugin.scheme import BitType
from fqvit_plugin.searching import OmseObserver, PtfObserver

UINT8, INT8 = BitType(8, signed=False), BitType(8, signed=True)
KINDS = [MinMaxObserver, EmaObserver, PercentileObserver, OmseObserver, PtfObserver]
AXES = [None, 0, 1, -1]
ARITHMETICS = ('strict', 'reference')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stream(count=4, shape=(3, 5, 7), seed=0):
    """Batches of skewed data, each channel of the last axis on its own scale."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 3, shape[-1])
    return [torch.randn(shape, generator=generator) * spread + 0.3 for _ in range(count)]


def observe(observer, batches):
    for batch in batches:
        observer.update(batch)
    return observer.qparams(batches[-1])


def rows_of(x, axis):
    """Per channel, a list of its values; the obvious way."""
    return [x.flatten()] if axis is None else [x.select(axis, c).flatten() for c in range(x.shape[axis])]


def slow_grid(lo, hi, bit_type, arithmetic='strict'):
    """Scale and zero point as the paper and ONNX write them, in Python floats."""
    if bit_type.signed:
        steps = bit_type.qmax if arithmetic == 'strict' else (bit_type.qmax - bit_type.qmin) / 2
        return max(-lo, hi) / steps, 0
    if arithmetic == 'strict':
        lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / (bit_type.qmax - bit_type.qmin)
    return scale, min(max(bit_type.qmin - round(lo / scale), bit_type.qmin), bit_type.qmax)


def assert_grid(observed, expected):
    """``expected``: (scale, zero point) per channel, in Python numbers."""
    scale, zero_point = observed
    torch.testing.assert_close(
        scale.double().reshape(-1), tensor([s for s, _ in expected], dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert zero_point.dtype == torch.int32
    assert zero_point.reshape(-1).tolist() == [z for _, z in expected]


# ---------------------------------------------------------------- min-max


@pytest.mark.parametrize('axis', AXES)
@pytest.mark.parametrize('bit_type', [UINT8, INT8], ids=lambda b: b.name)
@pytest.mark.parametrize('arithmetic', ARITHMETICS)
def test_minmax(axis, bit_type, arithmetic):
    batches = stream()
    channels = zip(*(rows_of(b, axis) for b in batches), strict=True)
    ends = [(min(float(r.min()) for r in rows), max(float(r.max()) for r in rows)) for rows in channels]
    observer = MinMaxObserver(bit_type, axis=axis, arithmetic=arithmetic)
    scale, zero_point = observe(observer, batches)
    assert scale.shape == zero_point.shape == (() if axis is None else (batches[0].shape[axis],))
    assert_grid((scale, zero_point), [slow_grid(lo, hi, bit_type, arithmetic) for lo, hi in ends])


@pytest.mark.parametrize('axis', AXES)
def test_minmax_does_not_care_how_data_is_cut_or_ordered(axis):
    batches = stream(6)
    whole = torch.cat(batches, dim=2) if axis in (0, 1) else torch.cat(batches, dim=0)
    expected = observe(MinMaxObserver(UINT8, axis=axis), [whole])
    for order in (batches, batches[::-1]):
        assert torch.equal(observe(MinMaxObserver(UINT8, axis=axis), order)[0], expected[0])


# ---------------------------------------------------------------- averages over batches


def slow_average(values, sigma, arithmetic):
    """The weighted mean of the docstring, in exact fractions: weights fade by 1 - sigma with every newer batch."""
    sigma, values = Fraction(sigma), [Fraction(v) for v in values]
    weights = [sigma * (1 - sigma) ** age for age in reversed(range(len(values)))]
    if arithmetic == 'reference':  # it starts at the first batch, which so keeps the rest of the weight
        weights[0] = (1 - sigma) ** (len(values) - 1)
    return float(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))


@pytest.mark.parametrize('axis', AXES)
@pytest.mark.parametrize('arithmetic', ARITHMETICS)
@pytest.mark.parametrize('sigma', [None, 0.5, 1.0])
def test_ema(axis, arithmetic, sigma):
    batches = stream(7)
    channels = list(zip(*(rows_of(b, axis) for b in batches), strict=True))
    share = sigma or {'strict': 0.1, 'reference': 0.01}[arithmetic]
    ends = [
        (
            slow_average([float(r.min()) for r in rows], share, arithmetic),
            slow_average([float(r.max()) for r in rows], share, arithmetic),
        )
        for rows in channels
    ]
    observer = EmaObserver(UINT8, axis=axis, arithmetic=arithmetic, sigma=sigma)
    assert_grid(observe(observer, batches), [slow_grid(lo, hi, UINT8, arithmetic) for lo, hi in ends])


def test_ema_weight_of_the_first_of_ten_batches():
    # field.md B4: .9135 at the reference's sigma (0.99 ** 9); strict at 0.1: 0.1 * 0.9 ** 9 / (1 - 0.9 ** 10)
    first, rest = tensor([0.0, 1.0]), tensor([0.0, 0.0])
    for arithmetic, share in (('reference', 0.99**9), ('strict', 0.1 * 0.9**9 / (1 - 0.9**10))):
        observer = EmaObserver(UINT8, arithmetic=arithmetic)
        observe(observer, [first] + [rest] * 9)
        assert observer.bounds()[1].item() == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize('kind', [EmaObserver, PercentileObserver])
@pytest.mark.parametrize('arithmetic', ARITHMETICS)
def test_average_of_equal_batches_is_that_batch(kind, arithmetic):
    (batch,) = stream(1)
    once = observe(kind(UINT8, arithmetic=arithmetic), [batch])
    often = observe(kind(UINT8, arithmetic=arithmetic), [batch] * 20)
    torch.testing.assert_close(often[0], once[0], rtol=1e-6, atol=0)


# ---------------------------------------------------------------- percentile


@pytest.mark.parametrize('alpha', [0.99999, 0.999, 0.9, 0.51, 1.0])
@pytest.mark.parametrize('shape', [(1,), (2,), (3,), (10,), (7, 11), (50, 40)])
def test_percentile_is_numpys(alpha, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for axis in (None, 0, -1):
        observer = PercentileObserver(UINT8, axis=axis, alpha=alpha)
        observer.update(x)
        expected = [np.quantile(r.numpy().astype(np.float64), [1 - alpha, alpha]) for r in rows_of(x, axis)]
        for end, value in enumerate(observer.bounds()):
            np.testing.assert_allclose(value.reshape(-1).numpy(), [e[end] for e in expected], rtol=2e-6, atol=1e-6)


#: The published code met a torch.quantile that ranks in float32 and has a limit; the newest does neither.
FLOAT32_RANKS = digit_version(torch.__version__) < digit_version('2.14')


@pytest.mark.parametrize('size', [1_000, 99_999, 300_001])
def test_percentile_with_float32_ranks_is_torchs(size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(4))
    observer = PercentileObserver(UINT8, arithmetic='reference')
    observer.update(x)
    found, ordered = torch.stack(observer.bounds()), np.sort(x.numpy()).astype(np.float64)
    ranks = np.float32([1 - 0.99999, 0.99999]) * np.float32(size - 1)
    by_hand = np.interp(ranks, np.arange(size), ordered)
    np.testing.assert_allclose(found.numpy(), by_hand, rtol=1e-6)
    if FLOAT32_RANKS:
        torch.testing.assert_close(found, torch.quantile(x, tensor([1 - 0.99999, 0.99999])), rtol=1e-6, atol=0)


def test_percentile_above_torchs_limit_has_numpys_ranks(monkeypatch):
    # torch.quantile refuses more than 2**24 elements; a lowered limit takes the same way at a small size
    if FLOAT32_RANKS:
        with pytest.raises(RuntimeError, match='too large'):
            torch.quantile(torch.zeros(observers._TORCH_QUANTILE_LIMIT + 1), 0.5)
    torch.quantile(torch.zeros(observers._TORCH_QUANTILE_LIMIT), 0.5)
    monkeypatch.setattr(observers, '_TORCH_QUANTILE_LIMIT', 1000)
    x = torch.randn(299_983, generator=torch.Generator().manual_seed(5))
    observer = PercentileObserver(UINT8, arithmetic='reference')
    observer.update(x)
    expected = np.quantile(x.numpy().astype(np.float64), [1 - 0.99999, 0.99999])
    np.testing.assert_allclose([float(b) for b in observer.bounds()], expected, rtol=1e-6)


def test_percentile_cuts_the_outlier():
    x = torch.cat((torch.linspace(-1, 1, 9999), tensor([1000.0])))
    observer = PercentileObserver(UINT8, alpha=0.999)
    observer.update(x)
    assert float(observer.bounds()[1]) == pytest.approx(1, abs=0.01)


# ---------------------------------------------------------------- OMSE


def slow_omse(last, ends, bit_type, arithmetic, axis):
    """Ninety shrunken ranges, the first of the least squared error: loops over candidates, channels and values."""
    tables = []  # per channel, per candidate: error, grid
    for row, (lo, hi) in zip(rows_of(last, axis), ends, strict=True):
        table = []
        for i in range(90):
            shrunk = lo * (1 - 0.01 * i), hi * (1 - 0.01 * i)
            if arithmetic == 'reference':  # always affine, also for signed types
                scale = (shrunk[1] - shrunk[0]) / (bit_type.qmax - bit_type.qmin)
                zero = min(max(bit_type.qmin - round(shrunk[0] / scale), bit_type.qmin), bit_type.qmax)
            else:
                scale, zero = slow_grid(*shrunk, bit_type)
            error = 0.0
            for value in row.tolist():
                ratio = value / scale
                code = round(ratio) + zero if arithmetic == 'strict' else round(ratio + zero)
                code = min(max(code, bit_type.qmin), bit_type.qmax)
                error += ((code - zero) * scale - value) ** 2
            table.append((error, (scale, zero)))
        tables.append(table)
    if arithmetic == 'reference':  # one candidate for all channels
        best = min(range(90), key=lambda i: sum(table[i][0] for table in tables))
        return [table[best][1] for table in tables]
    return [min(table, key=lambda entry: entry[0])[1] for table in tables]


@pytest.mark.parametrize('axis', [None, -1])
@pytest.mark.parametrize('bits', ['uint4', 'int4', 'uint8', 'int3'])
@pytest.mark.parametrize('arithmetic', ARITHMETICS)
def test_omse(axis, bits, arithmetic):
    bit_type = BitType.parse(bits)
    batches = stream(3, (2, 8, 5))
    channels = zip(*(rows_of(b, axis) for b in batches), strict=True)
    ends = [(min(float(r.min()) for r in rows), max(float(r.max()) for r in rows)) for rows in channels]
    observer = OmseObserver(bit_type, axis=axis, arithmetic=arithmetic)
    expected = slow_omse(batches[-1], ends, bit_type, arithmetic, axis)
    assert_grid(observe(observer, batches), expected)
    if bits == 'uint4':
        shrinks = [s / slow_grid(*e, bit_type, arithmetic)[0] for (s, _), e in zip(expected, ends, strict=True)]
        assert min(shrinks) < 0.97, 'the data must make the search shrink'


def test_omse_tie_takes_the_whole_range():
    # a dead channel beside a live one: all ninety candidates of the dead one err by 0
    x = torch.stack((torch.zeros(50), torch.randn(50)))
    observer = OmseObserver(UINT8, axis=0)
    scale, zero_point = observe(observer, [x])
    assert scale[0] == (x.max() - x.min()) / 255 * 2.0**-10
    assert zero_point[0] == 0


def test_omse_has_ninety_candidates():
    # a value far out: the search wants to shrink below 11 % of the range and stops at the last candidate
    x = torch.cat((1.8 + 0.1 * torch.rand(5000), tensor([50.0])))
    scale, _ = observe(OmseObserver(BitType(2, False)), [x])
    assert scale.item() == pytest.approx(50 * 0.11 / 3, rel=1e-5)


def test_omse_in_chunks_is_the_same(monkeypatch):
    batches = stream(2)
    expected = observe(OmseObserver(UINT8, axis=-1), batches)
    monkeypatch.setattr(grids, '_CHUNK', 13)
    for ours, theirs in zip(observe(OmseObserver(UINT8, axis=-1), batches), expected, strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- Power-of-Two Factor


def slow_ptf(last, ends, bit_type, arithmetic, axis):
    """Scale and zero point of each channel, whose ranges are ``ends``: the best of the base times powers of two."""
    kind = BitType(bit_type.bits, signed=False)  # PTF is affine for signed types too
    if arithmetic == 'reference':  # four factors; the largest covers the tensor, whose zero point it shares
        ends = [(min(lo for lo, _ in ends), max(hi for _, hi in ends))] * len(ends)
    factors = [2**k for k in range(8 if arithmetic == 'strict' else 4)]
    base = max(slow_grid(*pair, kind, arithmetic)[0] for pair in ends) / factors[-1]
    result = []
    for row, (lo, hi) in zip(rows_of(last, axis), ends, strict=True):
        candidates = []
        for scale in (base * factor for factor in factors):
            if arithmetic == 'strict':  # of the channel's own range with 0, cut at both ends alike
                lo, hi = min(lo, 0.0), max(hi, 0.0)
                cut = min(1.0, kind.qmax * scale / (hi - lo)) if hi > lo else 1.0
                zero = min(max(round(-lo * cut / scale), 0), kind.qmax)
            else:
                zero = slow_grid(lo, hi, kind, arithmetic)[1]
            error = 0.0
            for value in row.tolist():
                ratio = value / scale
                code = round(ratio) + zero if arithmetic == 'strict' else round(ratio + zero)
                error += ((min(max(code, 0), kind.qmax) - zero) * scale - value) ** 2
            candidates.append((error, scale, zero + bit_type.qmin))
        result.append(min(candidates, key=lambda c: c[0])[1:])  # min gives the first of equals
    return [scale for scale, _ in result], [zero for _, zero in result]


@pytest.mark.parametrize('axis', [-1, 1])
@pytest.mark.parametrize('bits', ['uint8', 'int8', 'uint4'])
@pytest.mark.parametrize('arithmetic', ARITHMETICS)
def test_ptf(axis, bits, arithmetic):
    bit_type = BitType.parse(bits)
    gains, offsets = torch.logspace(-2, 0, 9), torch.linspace(-0.3, 0.1, 9)
    batches = [b * gains + offsets for b in stream(3, (2, 6, 9))]
    if axis == 1:
        batches = [b.transpose(1, 2) for b in batches]
    rows = [torch.cat(parts) for parts in zip(*(rows_of(b, axis) for b in batches), strict=True)]
    ends = [(float(row.min()), float(row.max())) for row in rows]
    scales, zeros = slow_ptf(batches[-1], ends, bit_type, arithmetic, axis)
    scale, zero_point = observe(PtfObserver(bit_type, axis=axis, arithmetic=arithmetic), batches)
    assert zero_point.shape == ((9,) if arithmetic == 'strict' else ())
    assert zero_point.expand(9).tolist() == zeros
    torch.testing.assert_close(scale, tensor(scales), rtol=1e-5, atol=0)
    if bits == 'uint8':
        assert len(set(scales)) >= 3, 'the data must use several factors'


#: By hand, a range of 0..255 on uint8: factors 1, 2, 4, 8 of s = 1/8 cover 0..31.875, 63.75, 127.5, 255.
PTF_ROWS = tensor(
    [
        [0.0, 255.0],  # needs the largest factor
        [0.125, 31.875],  # odd multiples of 1/8, which smaller factors do not cover
        [0.25, 63.75],
        [0.5, 127.5],
        [8.0, 16.0],  # exact with every factor that covers it: a tie, the smallest
        [0.0, 0.0],  # a dead channel: a tie, the smallest
    ]
)


def test_ptf_by_hand():
    scale, zero_point = observe(PtfObserver(UINT8, axis=0, arithmetic='reference'), [PTF_ROWS])
    assert (scale * 8).tolist() == [8, 1, 2, 4, 1, 1]
    assert zero_point.item() == 0
    scale, zero_point = observe(PtfObserver(UINT8, axis=0), [PTF_ROWS])  # 1/8 is factor 16 of 128
    assert (scale * 128).tolist() == [128, 16, 32, 64, 16, 1]
    assert zero_point.tolist() == [0] * 6


def test_zero_points_of_ptf():
    x = tensor([[-100.0, 155.0], [-1.0, 1.0]])
    # by hand (field.md B9): range -100..155, 8 s = 1, zero point 100 for every channel
    scale, zero_point = observe(PtfObserver(UINT8, axis=0, arithmetic='reference'), [x])
    assert scale.tolist() == [1.0, 0.125]
    assert zero_point.item() == 100
    # strict: 128 s = 1; s itself covers no more than 1.99 of the second channel's 2, 2 s is exact
    scale, zero_point = observe(PtfObserver(UINT8, axis=0), [x])
    assert scale.tolist() == [1.0, 2 / 128]
    assert zero_point.tolist() == [100, 64]


def test_ptf_cuts_a_range_that_is_too_wide_at_both_ends():
    # one value of 10,000 far out at each end: a factor that loses them is the best, and has its zero in the middle
    x = torch.linspace(-1, 1, 10_000)
    x = torch.stack((torch.cat((x, tensor([-3.0, 3.0]))), torch.cat((x * 4, tensor([-100.0, 100.0])))))
    scale, zero_point = observe(PtfObserver(BitType(4, False), axis=0), [x])
    low, high = -zero_point * scale, (15 - zero_point) * scale
    assert (high < tensor([3, 100])).all(), 'the data must make the search cut'
    assert ((low + high).abs() <= 1.001 * scale).all()


def test_ptf_options():
    options = dict(factors=4, shared_zero_point=True)
    ours = observe(PtfObserver(UINT8, axis=0, **options), [PTF_ROWS])
    published = observe(PtfObserver(UINT8, axis=0, arithmetic='reference'), [PTF_ROWS])
    for a, b in zip(ours, published, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match='from 1 to 8, got 9'):
        PtfObserver(UINT8, axis=0, factors=9)


def test_a_channels_scale_is_not_far_below_the_others():
    # all channels' gains share a shift, so that a dead channel's would cost the others their bits
    x = tensor([[0.0, 255.0], [0.0, 0.0], [-0.001, 0.001]])
    scale, zero_point = observe(MinMaxObserver(UINT8, axis=0), [x])
    assert scale.tolist() == [1.0, 2.0**-10, 2.0**-10]
    assert zero_point.tolist() == [0, 0, 1]
    scale, _ = observe(MinMaxObserver(UINT8, axis=0, arithmetic='reference'), [x])
    assert scale[1] == torch.finfo(torch.float32).eps


def test_ptf_needs_an_axis():
    with pytest.raises(ValueError, match='needs an axis'):
        PtfObserver(BitType(8, signed=False))


# ---------------------------------------------------------------- every observer


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('bits', range(2, 17))
@pytest.mark.parametrize('arithmetic', ARITHMETICS)
def test_all_bits(kind, signed, bits, arithmetic):
    bit_type = BitType(bits, signed)
    batches = stream(2)
    axis = -1 if kind is PtfObserver else None
    scale, zero_point = observe(kind(bit_type, axis=axis, arithmetic=arithmetic), batches)
    assert (scale > 0).all()
    assert (bit_type.qmin <= zero_point).all()
    assert (zero_point <= bit_type.qmax).all()
    if signed and arithmetic == 'strict' and kind is not PtfObserver:
        assert zero_point == 0
    back = fake_quantize(batches[-1], scale, zero_point, bit_type.qmin, bit_type.qmax, arithmetic)
    steps = (back - batches[-1]).abs() / scale
    low, high = (bit_type.qmin - zero_point) * scale, (bit_type.qmax - zero_point) * scale
    inside = (batches[-1] > low) & (batches[-1] < high)
    assert inside.double().mean() > 0.5
    assert steps[inside].max() <= 0.51, 'the nearest grid point is at most half a step away'
    if kind is MinMaxObserver:  # the zero point's rounding, or the reference's 127.5, costs half a step at the ends
        assert steps.max() <= 1.01


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('axis', [0, -1])
@pytest.mark.parametrize('poison', [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(kind, axis, poison):
    for position in (0, 17, 34):
        for batch in range(2):
            observer = kind(UINT8, axis=axis)
            x = torch.randn(5, 7)
            for _ in range(batch):
                observer.update(x)
            x.view(-1)[position] = poison
            with pytest.raises(ValueError, match='NaN or infinity'):
                observer.update(x)


@pytest.mark.parametrize('kind', [k for k in KINDS if k is not PtfObserver])
@pytest.mark.parametrize('poison', [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_per_tensor(kind, poison):
    x = torch.randn(500)
    x[321] = poison
    with pytest.raises(ValueError, match='NaN or infinity'):
        kind(UINT8).update(x)


@pytest.mark.parametrize('kind', KINDS)
def test_a_refused_batch_leaves_no_trace(kind):
    batches = stream(2)
    clean, troubled = kind(UINT8, axis=-1), kind(UINT8, axis=-1)
    expected = observe(clean, batches)
    troubled.update(batches[0])
    with pytest.raises(ValueError, match='NaN'):
        troubled.update(torch.full_like(batches[0], math.nan))
    troubled.update(batches[1])
    assert torch.equal(troubled.qparams(batches[1])[0], expected[0])


@pytest.mark.parametrize('kind', KINDS)
def test_empty_and_unobserved(kind):
    observer = kind(UINT8, axis=-1)
    with pytest.raises(ValueError, match='empty tensor'):
        observer.update(torch.zeros(0, 5))
    with pytest.raises(RuntimeError, match=f'{kind.__name__} has observed nothing'):
        observer.qparams(torch.zeros(2, 5))


@pytest.mark.parametrize('kind', KINDS)
def test_observers_keep_no_graph_and_take_half_precision(kind):
    x = torch.randn(4, 6, requires_grad=True)
    scale, _ = observe(kind(UINT8, axis=-1), [x * 2])
    assert not scale.requires_grad
    scale, _ = observe(kind(UINT8, axis=-1), [x.detach().bfloat16()])
    assert scale.dtype == torch.float32


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('axis', [0, -1])
def test_deferred_measurements_fold_to_the_same(kind, axis):
    batches = stream(5, (6, 6))
    expected = observe(kind(UINT8, axis=axis), batches)
    observer = kind(UINT8, axis=axis)
    observer.deferred = []
    for batch in batches:
        observer.update(batch)
    assert len(observer.deferred) == 5
    with pytest.raises(RuntimeError, match='observed nothing'):
        observer.qparams(batches[-1])
    for measured in observer.deferred:
        observer.fold(measured)
    assert torch.equal(observer.qparams(batches[-1])[0], expected[0])


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        (EmaObserver, dict(sigma=0.0), r'sigma must be in \(0, 1\], got 0.0'),
        (EmaObserver, dict(sigma=1.5), r'sigma must be in \(0, 1\], got 1.5'),
        (PercentileObserver, dict(sigma=-1.0), 'sigma must be'),
        (PercentileObserver, dict(alpha=0.5), r'alpha must be in \(0.5, 1\], got 0.5'),
        (PercentileObserver, dict(alpha=99.9), r'alpha must be in \(0.5, 1\], got 99.9'),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(UINT8, **options)


def test_base_classes_are_abstract():
    with pytest.raises(TypeError, match='abstract'):
        Observer(UINT8)
    assert issubclass(RangeObserver, Observer)


@pytest.mark.parametrize('count', [300, 3_000_000])
def test_omse_drops_no_candidate_that_could_win(count):
    # oracle: every candidate scored on every value, in float64
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator) ** 3
    bit_type = BitType(4, False)
    observer = OmseObserver(bit_type)
    observer.update(x)
    scale, _ = observer.qparams(x)
    lo, hi, best = x.min(), x.max(), None
    for i in range(90):
        shrink = 1.0 - i * 0.01
        s, z = affine_qparams(lo * shrink, hi * shrink, 0, 15)
        steps = (x / s).round_().add_(z).clamp_(0, 15).sub_(z)
        error = (steps.double() * s - x).square_().sum().item()
        if best is None or error < best[0]:
            best = (error, s)
    assert scale == best[1]


@pytest.mark.parametrize('shape', [(7,), (1000,), (99_991,), (3, 50_000)])
@pytest.mark.parametrize('largest', [True, False])
@pytest.mark.parametrize('count', [1, 2, 7])
def test_ends_are_topk(shape, largest, count):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).round_(decimals=2)  # with many ties
    rows = x.reshape(-1, shape[-1])
    expected = rows.topk(count, dim=1, largest=largest).values
    assert torch.equal(_ends(rows, count, largest), expected)
    sorted_rows = rows.sort(dim=1, descending=largest).values  # the extremes all in one block
    assert torch.equal(_ends(sorted_rows, count, largest), expected)
