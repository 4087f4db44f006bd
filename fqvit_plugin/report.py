"""What surgery did to a model, for people: one screen, and numbers for tools."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .quantizers import Quantizer
from .scheme import QuantScheme
from .weight_quantizer import factors_of, packed_bytes

__all__ = ['LayerEntry', 'Report', 'count_bytes']


@dataclass(frozen=True)
class LayerEntry:
    """One Q layer: its path, its kind and the bits of what it quantizes."""

    path: str
    kind: str
    bits: str


@dataclass(frozen=True)
class Report:
    """What was quantized, and what stays float and why.

    Args:
        scheme: the recipe.
        entries: every Q layer.
        left_float: path of what computes in float -> the reason.
        float_bytes: parameters before, 4 bytes each.
        quantized_bytes: packed weights, float biases and norms, scales and zero points.
    """

    scheme: QuantScheme
    entries: tuple[LayerEntry, ...]
    left_float: dict[str, str]
    float_bytes: int
    quantized_bytes: int

    @property
    def recipe(self) -> str:
        """The scheme's choices in words."""
        scheme = self.scheme
        return (
            f'preset {scheme.arithmetic}: observer {scheme.act.observer}, '
            f'PTF {_on(scheme.norm_input.observer == "ptf")}, LIS {_on(scheme.log_int_softmax)}, '
            f'input quantization {_on(scheme.input_quant)}'
        )

    def kinds(self) -> list[tuple[tuple[str, str], int]]:
        """How many layers there are of each kind and bits."""
        return sorted(Counter((e.kind, e.bits) for e in self.entries).items())

    def reasons(self) -> list[tuple[str, list[str]]]:
        """Paths of what stays float, by the reason."""
        grouped: dict[str, list[str]] = {}
        for path, reason in self.left_float.items():
            grouped.setdefault(reason, []).append(path)
        return list(grouped.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, without the scheme, which has its own."""
        return {
            'layers': [asdict(entry) for entry in self.entries],
            'left_float': self.left_float,
            'float_bytes': self.float_bytes,
            'quantized_bytes': self.quantized_bytes,
        }

    def __str__(self) -> str:
        """One screen, plain text for logs; :mod:`fqvit_plugin.analysis.terminal` has the one in colour."""
        lines = [f'scheme {self.scheme.name}, {self.recipe}', 'quantized:']
        lines += [f'  {count:4d} x {kind:<14s} {bits}' for (kind, bits), count in self.kinds()]
        lines.append('float:')
        for reason, paths in self.reasons():
            lines.append(f'  {len(paths):4d} x {reason} ({paths[0]}{", …" if len(paths) > 1 else ""})')
        lines.append('     biases, class and position parameters are stored in float')
        ratio = self.quantized_bytes / self.float_bytes
        lines.append(
            f'size: {self.float_bytes / 1e6:.2f} MB float, {self.quantized_bytes / 1e6:.2f} MB quantized '
            f'({ratio:.1%})'
        )
        return '\n'.join(lines)


def _on(flag: bool) -> str:
    return 'on' if flag else 'off'


def count_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, quantized weights at their bits with factors, and of scales and zero points."""
    total = 0
    module: Any
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        weight_quantizer: Any = getattr(module, 'weight_quantizer', None)
        if weight_quantizer is not None:
            weight, spec = own.pop('weight'), weight_quantizer.spec
            total += packed_bytes(weight.numel(), spec.bit_type.bits, factors_of(weight, spec))
        total += sum(p.numel() * 4 for p in own.values())
        if isinstance(module, Quantizer):
            total += sum(b.numel() * b.element_size() for b in module.buffers(recurse=False))
    return total
