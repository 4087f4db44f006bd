_base_ = './fqvit_swin_s_w8a8.py'

quant_scheme = dict(type='fqvit_w4a8')
