"""Constants of the GPU kernels. Oracle: Python's integers, and the tables that were packed."""

from __future__ import annotations

import pytest
import torch

from fqvit_plugin.gpu.packing import exponent_line, halves, pack_escape, pack_table, rescaling, unpack_table


@pytest.mark.parametrize('shift', [26, 31, 32, 40])
def test_a_shift_of_the_upper_half_gives_the_same_integers(shift):
    gain, offset = torch.tensor([2**24, -(2**24) + 1, 3]), torch.tensor([2**50, -(2**49), 7])
    rule = rescaling(gain, offset, torch.tensor(shift))
    assert not rule.wide
    for x in (-(2**28) + 1, -1, 0, 5, 2**28 - 1):
        wanted = [(x * g + o) >> shift for g, o in zip(gain.tolist(), offset.tolist(), strict=True)]
        numbers = zip(rule.gain.tolist(), rule.offset.tolist(), strict=True)
        made = [(x * g + o) >> 32 >> int(rule.shift) for g, o in numbers]
        assert made == wanted


def test_gains_that_would_leave_32_bits_keep_the_whole_number():
    gain, offset = torch.tensor([2**24, 5]), torch.tensor([1, 2])
    rule = rescaling(gain, offset, torch.tensor(24))
    assert rule.wide
    assert (rule.gain.tolist(), rule.offset.tolist(), int(rule.shift)) == ([2**24, 5], [1, 2], 24)
    assert rescaling(torch.tensor(1), torch.tensor(2**55), torch.tensor(20)).wide


def test_halves_make_up_the_number():
    numbers = [0, -1, 2**31, -(2**31), 2**45 + 2**31 + 3, -(2**60) + 1]
    upper, lower = halves(torch.tensor(numbers)).tolist()
    assert [(u << 32) | (v & 0xFFFFFFFF) for u, v in zip(upper, lower, strict=True)] == numbers


def test_an_escape_holds_its_end_and_what_it_stands_for():
    packed = pack_escape(torch.tensor([-700, 0, 2**24, 3]), torch.tensor([-20, 5, 127, -9]))
    assert [(p >> 2, p & 3) for p in packed.tolist()] == [(-720, 1), (5, 0), (2**24 + 127, 2), (-6, 2)]
    with pytest.raises(ValueError, match='an escape of 16777217 steps: the kernels hold no more than 16777216'):
        pack_escape(torch.tensor([-(2**24) - 1]), torch.tensor(0))


def test_a_table_that_rises_and_falls_is_packed():
    table = torch.cat([torch.arange(2048) // 65 - 128, torch.full((64,), -96), -97 - torch.arange(1984) // 70])
    packed = pack_table(table.to(torch.int8))
    assert packed is not None
    assert len(packed) == len(table) // 64
    assert torch.equal(unpack_table(packed), table.to(torch.int8))


def test_codes_at_both_ends_of_a_byte_are_packed():
    table = torch.tensor([-128] * 64 + [126] * 3 + [127] * 61 + [0] * 64 + [0] * 9 + [-1] * 55, dtype=torch.int8)
    packed = pack_table(table)
    assert packed is not None
    assert torch.equal(unpack_table(packed), table)


@pytest.mark.parametrize('table', [[0, 1] * 32, [0] * 32 + [2] * 32, [0] * 63], ids=['changes', 'a jump', 'a part'])
def test_other_tables_are_not(table):
    assert pack_table(torch.tensor(table, dtype=torch.int8)) is None


@pytest.mark.parametrize('last', [16, 15])
@pytest.mark.parametrize('factor', [1e-4, 0.0181, 0.307, 1.73, 40.3])
def test_exponents_along_a_line(factor, last):
    octaves = torch.round(torch.arange(256) * torch.tensor(factor))
    exponents = torch.where(octaves < last, 15 - octaves, -1).to(torch.int8)
    line = exponent_line(exponents)
    assert line is not None
    made = [(d * line.slope + (1 << (line.shift - 1))) >> line.shift for d in range(256)]
    assert [15 - k if k < line.last else -1 for k in made] == exponents.tolist()
    beyond = line.end * line.slope + (1 << (line.shift - 1))
    assert beyond >> line.shift >= 16
    assert (line.end + 512) * line.slope < 2**31, 'a distance from what is forbidden must fit 32 bits'


def test_exponents_along_no_line():
    assert exponent_line(torch.tensor([15, 13, 13, 12, 5, -1, -1, -1], dtype=torch.int8)) is None
