# Scheme, calibration images and the paper's preprocessing, for configs that have custom_hooks of their own:
# add dict(type='fqvit_plugin.QuantHook') to your list. Everybody else inherits fqvit.py.

# Every argument of fqvit_plugin.get_scheme; `type` is the scheme's name.
quant_scheme = dict(
    type='fqvit_w8a8',
    observer='minmax',  # minmax, ema, percentile, omse, or dict(type='percentile', alpha=0.9999)
    ptf=True,  # Power-of-Two Factor on LayerNorm's inputs
    lis=True,  # Log-Int-Softmax
    preset='strict',  # reference: the published implementation's numbers
    input_quant=True,  # the paper: on for DeiT and Swin, off for ViT
)

# Training images. Without a pipeline of its own the data set gets test_dataloader's, so the two cannot drift apart.
calib_dataloader = dict(
    batch_size=100,
    num_workers=2,
    dataset=dict(type='mmpretrain.ImageNet', data_root='data/imagenet', split='train'),
    sampler=dict(type='DefaultSampler', shuffle=True),
)

# The paper's preprocessing at 224 pixels: crop ratio 0.9 for ViT and Swin, 0.875 for DeiT.
crop_900_pipeline = [
    dict(type='mmpretrain.LoadImageFromFile'),
    dict(
        type='mmpretrain.ResizeEdge',
        scale=248,
        edge='short',
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='mmpretrain.CenterCrop', crop_size=224),
    dict(type='mmpretrain.PackInputs'),
]
crop_875_pipeline = [
    dict(type='mmpretrain.LoadImageFromFile'),
    dict(
        type='mmpretrain.ResizeEdge',
        scale=256,
        edge='short',
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='mmpretrain.CenterCrop', crop_size=224),
    dict(type='mmpretrain.PackInputs'),
]
