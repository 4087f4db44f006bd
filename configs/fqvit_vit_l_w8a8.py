_base_ = './fqvit_vit_b_w8a8.py'

model = dict(backbone=dict(arch='l'), head=dict(in_channels=1024))
