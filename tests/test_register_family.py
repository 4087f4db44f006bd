"""Families that users register: treated, replaced, refused.

Oracle: the functions of a family written here, and which of them surgery calls.
"""

from __future__ import annotations

import pytest
from torch import nn

import fqvit_plugin as fq
from fqvit_plugin import surgery
from fqvit_plugin.blocks.family import Family, class_path


class Backbone(nn.Module):
    """One linear layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)


class Other(Backbone):
    """A subclass, which no family of Backbone covers."""


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    monkeypatch.setattr(surgery, '_ADDED', [])


def family(calls: list[str], name: str, *models: type) -> Family:
    def quantize_(backbone, make):
        calls.append(f'{name} quantize')
        backbone.fc = make.linear(backbone.fc)

    return Family(tuple(map(class_path, models)), lambda _: calls.append(f'{name} check'), quantize_)


def test_a_registered_family_is_treated():
    calls: list[str] = []
    scheme = fq.get_scheme('fqvit_w8a8')
    with pytest.raises(ValueError, match=r'backbone tests\.Backbone is not covered'):
        fq.quantize_model_(Backbone(), scheme)
    ours = family(calls, 'first', Backbone)
    assert fq.register_family(ours) is ours
    model = Backbone()
    report = fq.quantize_model_(model, scheme)
    assert calls == ['first check', 'first quantize']
    assert isinstance(model.fc, fq.QLinear)
    assert [entry.path for entry in report.entries] == ['fc']
    assert surgery.covered_backbones()[-1] == 'tests.Backbone'
    with pytest.raises(ValueError, match=r'backbone tests\.Other is not covered.*Backbone'):
        fq.quantize_model_(Other(), scheme)


def test_registered_again_it_takes_the_old_ones_place():
    calls: list[str] = []
    fq.register_family(family(calls, 'first', Backbone))
    fq.register_family(family(calls, 'second', Backbone, Other))
    fq.quantize_model_(Backbone(), fq.get_scheme('fqvit_w8a8'))
    assert calls == ['second check', 'second quantize']
    assert surgery.covered_backbones().count('tests.Backbone') == 1


def test_what_the_package_covers_is_not_given_away():
    path = surgery.FAMILIES[0].models[0]
    with pytest.raises(ValueError, match=rf'{path}: covered by the package already'):
        fq.register_family(Family((path,), print, print))
    assert surgery._ADDED == []
