# ViT-Tiny built by timm, with timm's own weight file: mim test ... --checkpoint the file as timm publishes it (.pth).
# Preprocessing is the model's own in timm; fqvit_plugin.timm_data.data_settings gives it for another model.
_base_ = '../fqvit_vit_b_w8a8.py'

model = dict(_delete_=True, type='TimmClassifier', model_name='vit_tiny_patch16_224')

quant_scheme = dict(type='fqvit_w8a8_attn4')
