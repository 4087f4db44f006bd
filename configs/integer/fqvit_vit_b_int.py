_base_ = '../fqvit_vit_b_w8a8.py'

model = dict(_delete_=True, type='fqvit_plugin.IntegerClassifier')
custom_hooks = []
