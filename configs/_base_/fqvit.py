_base_ = './fqvit_without_hook.py'

custom_hooks = [dict(type='fqvit_plugin.QuantHook', num_batches=10)]
