# A Swin transformer of two stages, 14 x 14 and 7 x 7 tokens, with the usual 7 x 7 windows: the first
# stage has four windows and a shifted block, the second is one window.
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
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
