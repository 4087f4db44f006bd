_base_ = ['./_base_/vit_augreg.py', './_base_/fqvit.py']

quant_scheme = dict(input_quant=False)
val_dataloader = dict(dataset=dict(pipeline=_base_.crop_900_pipeline))
test_dataloader = dict(dataset=dict(pipeline=_base_.crop_900_pipeline))
