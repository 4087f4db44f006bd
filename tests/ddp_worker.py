"""One rank of CPU test runs, one per config: ``ddp_worker.py CONFIG.py ...`` under torchrun."""

import sys

import torch
from mmengine.config import Config
from mmengine.runner import Runner

# mmengine's launcher selects a GPU even for gloo, which a machine without one cannot do.
torch.cuda.set_device = lambda *_: None

if __name__ == '__main__':
    for config in sys.argv[1:]:
        Runner.from_cfg(Config.fromfile(config)).test()
