"""The integer program on an NVIDIA GPU: fused Triton kernels that put out the integer kernels' codes."""

from .model import GpuModel
from .support import missing

__all__ = ['GpuModel', 'missing']
