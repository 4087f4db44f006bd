"""New-style (pure Python) configs, inherited with ``with read_base(): from fqvit_plugin.configs.fqvit import *``."""
