"""The two questions that older versions of torch are asked by other names."""

from __future__ import annotations

import torch

__all__ = ['is_autocast_enabled', 'is_compiling']

if hasattr(torch.compiler, 'is_compiling'):  # torch 2.3
    is_compiling = torch.compiler.is_compiling
else:
    from torch._utils import is_compiling  # what torch's own optimizers ask then; Dynamo takes it for True

#: torch 2.4 brought ``is_autocast_available`` and, with it, a device for ``is_autocast_enabled``.
_BY_DEVICE = hasattr(torch.amp, 'is_autocast_available')


def is_autocast_enabled(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    if _BY_DEVICE:
        return torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == 'cpu' else torch.is_autocast_enabled()
