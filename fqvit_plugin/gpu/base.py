"""What steps have in common. No Triton here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..integer.kernels import KERNELS
from ..integer.program import Op

__all__ = ['PlainKernel', 'Step', 'code_dtype', 'limits', 'up_to']


class Step(nn.Module):
    """Some operations of a program as one.

    Args:
        inputs: tensors, by name.
        outputs: names of the results; a step with several gives a tuple.
    """

    def __init__(self, inputs: tuple[str, ...], *outputs: str) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs

    def hold(self, **tensors: Tensor) -> None:
        """Register constants, which move with the module but are no part of a checkpoint."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)


class PlainKernel(Step):
    """One operation by the integer model's own kernel."""

    def __init__(self, op: Op, constants: Mapping[str, Tensor]) -> None:
        super().__init__(op.inputs, op.output)
        self.kernel: Callable[..., Tensor] = KERNELS[op.kind]
        self.settings = dict(op.settings)
        self.names = {f'constant_{name}': name for name in op.constants}
        self.hold(**{held: constants[op.constants[name]] for held, name in self.names.items()})

    def forward(self, *tensors: Tensor) -> Tensor:
        """The operation's result."""
        constants = {name: getattr(self, held) for held, name in self.names.items()}
        return self.kernel(*tensors, **constants, **self.settings)


def limits(bits: int, prefix: str = '') -> dict[str, int]:
    """The lowest and the highest stored code, as a kernel's constants."""
    return {f'{prefix}LOW': -(2 ** (bits - 1)), f'{prefix}HIGH': 2 ** (bits - 1) - 1}


def code_dtype(bits: int) -> torch.dtype:
    """What holds codes of so many bits."""
    return torch.int8 if bits <= 8 else torch.int16


def up_to(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
