_base_ = ['mmpretrain::deit/deit-small_4xb256_in1k.py', './_base_/fqvit.py']

val_dataloader = dict(dataset=dict(pipeline=_base_.crop_875_pipeline))
test_dataloader = dict(dataset=dict(pipeline=_base_.crop_875_pipeline))
