"""Size on disk of integer checkpoints.

Oracle: what was asked for, 27 % of the float file at 8 bits and 15 % at 4; in between, 20 % at 6.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmpretrain.registry import MODELS

import fqvit_plugin as fq
from fqvit_plugin.apis import load_config
from fqvit_plugin.convert import load_checkpoint_file
from fqvit_plugin.integer.checkpoint import save_integer
from fqvit_plugin.integer.convert import to_integer

from .shared_data import imagenet

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
pytestmark = pytest.mark.slow


def float_model(name, path):
    """A network with its weights in a float file at ``path``: official ones for DeiT-Tiny, random ones for others."""
    torch.manual_seed(0)
    cfg = load_config(CONFIGS / f'fqvit_{name}_w8a8.py')
    model = MODELS.build(cfg.model).eval()
    if name == 'deit_t':
        weights = imagenet() / 'weights' / 'deit_tiny_patch16_224.pth'
        model.load_state_dict(fq.convert_state_dict(load_checkpoint_file(weights)))
    torch.save({name: parameter.data for name, parameter in model.named_parameters()}, path)
    return model


SCHEMES = {
    '8': (dict(name='fqvit_w8a8'), 0.27),
    '6': (dict(name='fqvit_w6a6', steps=[]), 0.20),
    '4': (dict(name='fqvit_w8a8', weight_bits=4), 0.15),
    '4 with factors': (dict(name='fqvit_w4a8', steps=[]), 0.15),
    '4 with factors for 8': (dict(name='fqvit_w4a4', steps=[], group_size=8), 0.15),
}


#: the smallest network, where what is no weight takes most, in every scheme but one, for which it is too small
CASES = [
    *(('deit_t', scheme) for scheme in SCHEMES if scheme != '4 with factors for 8'),
    *((name, scheme) for name in ('deit_s', 'swin_t') for scheme in '84'),
    ('swin_t', '4 with factors for 8'),
]


@pytest.mark.parametrize(('name', 'scheme'), CASES)
def test_share_of_the_float_file(name, scheme, tmp_path):
    options, share = SCHEMES[scheme]
    model = float_model(name, tmp_path / 'float.pth')
    fq.quantize_model_(model, fq.get_scheme(**options))
    fq.calibrate_(model, [torch.randn(1, 3, 224, 224)])
    fq.quant(model)
    size = save_integer(to_integer(model), tmp_path / 'int.safetensors')
    assert size == (tmp_path / 'int.safetensors').stat().st_size
    assert size <= share * (tmp_path / 'float.pth').stat().st_size
