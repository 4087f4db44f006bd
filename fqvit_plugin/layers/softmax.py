"""QIntSoftmax: softmax with quantized probabilities, Log-Int-Softmax above all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._torch import is_compiling
from ..exact import Exact, Powers, reals
from ..fused import powers
from ..intmath import LARGEST_EXPONENT, log_int_softmax_, log_int_softmax_reference_
from ..phase import Phase, QuantLayer
from ..quantizers import build_quantizer
from ..scheme import QuantSpec
from .act import QAct
from .common import ACT_SPEC, parse_spec, register

__all__ = ['QIntSoftmax']


@register
class QIntSoftmax(QuantLayer):
    """Softmax over the last axis with quantized probabilities.

    Args:
        spec: recipe of the probabilities; its quantizer (``'uniform'`` or ``'log2'``) serves the float softmax.
        log_int: Log-Int-Softmax, integer from the logits' codes on, instead of a float softmax.

    Source: FQ-ViT, section 4.2.
    """

    def __init__(self, spec: QuantSpec | Mapping[str, Any] = ACT_SPEC, log_int: bool = False) -> None:
        super().__init__()
        self.log_int = log_int
        self.spec = parse_spec(spec)
        self.quantizer: Any = None if log_int else build_quantizer(self.spec)

    def forward(self, logits: Tensor | Exact, in_act: QAct | None = None, mask: Tensor | None = None) -> Any:
        """Probabilities of the last axis.

        Args:
            logits: (…, N). Exact ones give exact :class:`~fqvit_plugin.exact.Powers`.
            in_act: quantizes the logits first.
            mask: additive, broadcasts to ``logits``; negative where attention is forbidden.

        Raises:
            ValueError: Log-Int-Softmax without ``in_act``.
        """
        if self.log_int and self._integer_now():
            if in_act is None:
                raise ValueError('Log-Int-Softmax needs in_act: the grid of the logits')
            if isinstance(logits, Exact) and in_act.is_exact and self.spec.arithmetic == 'strict':
                return self._powers(logits, in_act, mask)
            return self._log_int(reals(logits), in_act, mask)
        logits = reals(logits) if in_act is None else in_act(logits)
        if self.phase is Phase.TUNE and self.log_int and self.spec.arithmetic == 'strict':
            return self._soft_powers(logits, mask)
        x = logits if mask is None else logits + mask
        # Saves a tensor as large as the logits during calibration; autograd and compilers need the copy.
        own = mask is not None or (in_act is not None and in_act.inplace)
        copies = not own or torch.is_grad_enabled() or is_compiling()
        probabilities = torch.softmax(x, dim=-1) if copies else torch.softmax(x, dim=-1, out=x)
        return probabilities if self.quantizer is None else self.quantized(probabilities, self.quantizer)

    def _powers(self, logits: Exact, in_act: QAct, mask: Tensor | None) -> Powers:
        rule, finish = in_act.constants(
            lambda: (logits.rule(in_act.scale), in_act.to_steps(logits.channels)),
            logits.channels,
            *logits.sources,
            use='steps',
        )
        return Powers(*powers(logits.laid(rule, finish), in_act.scale, self.spec.bit_type.bits, mask))

    def _soft_powers(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Log-Int-Softmax with gradients, of real logits on their grid."""
        x = logits if mask is None else logits + torch.where(mask < 0, -torch.inf, 0.0)
        octaves = (x - x.amax(-1, keepdim=True).detach()) * math.log2(math.e)
        whole = octaves.detach().round()
        kept = whole > -min(2**self.spec.bit_type.bits - 1, LARGEST_EXPONENT + 1)
        powers = torch.where(kept, torch.exp2(octaves + (whole - octaves.detach()).nan_to_num(0.0)), 0.0)
        return powers / powers.sum(-1, keepdim=True)

    def _integer_now(self) -> bool:
        # The published scales were taken on a last batch that had already passed through Log-Int-Softmax.
        reference_quirk = self.spec.arithmetic == 'reference' and self.phase is Phase.LAST_CALIBRATE
        return self.phase is Phase.QUANT or reference_quirk

    def _log_int(self, logits: Tensor, in_act: QAct, mask: Tensor | None) -> Tensor:
        bits = self.spec.bit_type.bits
        if self.spec.arithmetic == 'strict':
            return log_int_softmax_(in_act.quantizer.steps(logits, in_act.inplace), in_act.scale, bits, mask)
        x = in_act(logits)
        if mask is not None:
            x = x + mask
        elif x is logits and not in_act.inplace:
            x = x.clone()
        return log_int_softmax_reference_(x, in_act.quantizer.latest_scale, bits)
