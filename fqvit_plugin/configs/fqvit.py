"""Scheme, calibration images and hook for new-style configs; says what ``configs/_base_/fqvit.py`` says."""

from mmengine.dataset import DefaultSampler
from mmpretrain.datasets import ImageNet

from fqvit_plugin.hooks import QuantHook

# Every argument of fqvit_plugin.get_scheme; `type` is the scheme's name.
quant_scheme = dict(type='fqvit_w8a8', observer='minmax', ptf=True, lis=True, preset='strict', input_quant=True)

# Training images. Without a pipeline of its own the data set gets test_dataloader's.
calib_dataloader = dict(
    batch_size=100,
    num_workers=2,
    dataset=dict(type=ImageNet, data_root='data/imagenet', split='train'),
    sampler=dict(type=DefaultSampler, shuffle=True),
)

custom_hooks = [dict(type=QuantHook, num_batches=10)]
