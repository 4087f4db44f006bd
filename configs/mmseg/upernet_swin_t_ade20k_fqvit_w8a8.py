# UPerNet on Swin-T, ADE20K at 512 pixels: MMSegmentation's own config, quantized in the backbone.
_base_ = [
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/fqvit.py',
]

# Test checkpoints hold the backbone too; nothing needs the weights it was trained from.
model = dict(backbone=dict(init_cfg=None))

# None: the images of train_dataloader in the test pipeline, one at a time because their sizes differ.
calib_dataloader = None
custom_hooks = [dict(type='fqvit_plugin.QuantHook', num_batches=100)]
