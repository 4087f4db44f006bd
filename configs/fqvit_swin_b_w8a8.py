_base_ = ['mmpretrain::swin_transformer/swin-base_16xb64_in1k.py', './_base_/fqvit.py']

val_dataloader = dict(dataset=dict(pipeline=_base_.crop_900_pipeline))
test_dataloader = dict(dataset=dict(pipeline=_base_.crop_900_pipeline))
