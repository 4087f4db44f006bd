"""What this machine lacks for the GPU kernels. It can be imported without Triton and without a GPU."""

from __future__ import annotations

import os

import torch

__all__ = ['interpreted', 'missing', 'require']


def interpreted() -> bool:
    """Whether Triton interprets its kernels with NumPy, on tensors of the CPU: ``TRITON_INTERPRET=1``.

    Triton reads the variable when a kernel is defined: set it before Python starts.
    """
    return os.environ.get('TRITON_INTERPRET', '') == '1'


def missing() -> str | None:
    """Why :class:`~fqvit_plugin.gpu.GpuModel` cannot run here and what to do; None where it can."""
    try:
        import triton
    except ImportError:
        return 'Triton is not installed: pip install "triton>=3.4"; wheels of torch for CUDA on Linux bring it'
    if tuple(int(part) for part in triton.__version__.split('.')[:2]) < (3, 4):
        return f'Triton {triton.__version__} is too old: the kernels need 3.4, which torch 2.8 for CUDA brings'
    if interpreted() or torch.cuda.is_available():
        return None
    built = 'torch finds no CUDA device' if torch.version.cuda else f'torch {torch.__version__} is built without CUDA'
    return f'{built}; on the CPU run the IntegerModel, or try the kernels in an interpreter by TRITON_INTERPRET=1'


def require() -> None:
    """Raise if the GPU kernels cannot run.

    Raises:
        RuntimeError: what :func:`missing` says.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f'the GPU kernels cannot run: {reason}')
