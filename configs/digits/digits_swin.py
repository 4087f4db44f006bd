# A Swin transformer of two stages, 8 x 8 and 4 x 4 tokens, in windows of 4 x 4: the first stage has
# four windows and a shifted block, the second is one window. A patch is one pixel of the digit.
_base_ = ['_base_/data.py', '_base_/schedule.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=32, depths=[2, 2], num_heads=[2, 4]),
        img_size=32,
        patch_size=4,
        window_size=4,
        out_indices=(1,),
        drop_path_rate=0.0,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
