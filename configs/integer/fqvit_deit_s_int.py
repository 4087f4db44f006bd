_base_ = '../fqvit_deit_s_w8a8.py'

model = dict(_delete_=True, type='fqvit_plugin.IntegerClassifier')
custom_hooks = []
