_base_ = ['mmpretrain::deit/deit-base_16xb64_in1k.py', './_base_/fqvit_without_hook.py']

custom_hooks = [
    dict(type='EMAHook', momentum=4e-5, priority='ABOVE_NORMAL'),  # as in the config inherited
    dict(type='fqvit_plugin.QuantHook', num_batches=10),
]
val_dataloader = dict(dataset=dict(pipeline=_base_.crop_875_pipeline))
test_dataloader = dict(dataset=dict(pipeline=_base_.crop_875_pipeline))
