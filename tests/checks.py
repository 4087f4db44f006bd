"""What holds for every quantized model, as functions of a model and its images.

Oracles: what the float model computes; and, of a quantized one, how many different values each operand takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fqvit_plugin
from fqvit_plugin import QIntLayerNorm, fused, get_scheme, quantize_model_
from fqvit_plugin.blocks.common import linked
from fqvit_plugin.lifecycle import named_quantizers
from fqvit_plugin.phase import QuantLayer

from .models import features

BLOCKS = Path(fqvit_plugin.__file__).parent / 'blocks'
BITS = 4
POINTS = 2**BITS


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Every tensor the model returns."""
    return features(model(x))


def error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error among the features: ``|y - f| / |f - mean f|``."""
    return max(float((y - f).norm() / (f - f.mean()).norm()) for y, f in zip(outputs, expected, strict=True))


def assert_equal_in_float(model: nn.Module, x: Tensor) -> None:
    """Surgery changes no output by more than rounding, and no parameter at all; float checkpoints load."""
    expected = run(model, x)
    state, parameters = model.state_dict(), {key: id(p) for key, p in model.named_parameters()}
    quantize_model_(model, get_scheme('fqvit_w8a8'))
    for y, f in zip(run(model, x), expected, strict=True):
        torch.testing.assert_close(y, f, rtol=0, atol=1e-6 * float(f.abs().max()))
    assert {key: id(p) for key, p in model.named_parameters()} == parameters, 'shared, in place, none new'
    new_keys = set(model.state_dict()) - set(state)
    assert set(state) <= set(model.state_dict())
    assert new_keys == {f'{n}.{b}' for n, q in named_quantizers(model) for b, _ in q.named_buffers()}
    state = {key: value.clone() for key, value in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert error(run(model, x), expected) < 1e-5


class GridWatch(TorchFunctionMode):
    """Fails where a block multiplies or adds tensors that are not on a grid of ``POINTS`` points.

    Looked at are the products of :mod:`fqvit_plugin.blocks` between two activations (matrix products, and elementwise
    ones of the same two last axes) and its sums of token sequences; a softmax's output is told by its rows' sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = self.sums = 0

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        name = getattr(func, '__name__', '')
        frame = sys._getframe(1)
        while 'torch' in Path(frame.f_code.co_filename).parts or frame.f_code.co_filename.endswith('phase.py'):
            frame = frame.f_back
        caller = type(frame.f_locals.get('self')).__name__
        file = Path(frame.f_code.co_filename)
        if (file.parent == BLOCKS or file.name == 'exact.py') and len(tensors) == 2:
            elementwise = self._alike(*tensors)
            # MViT's attention adds the pooled query to the accumulator, and quantizes once, after
            sequences = all(t.ndim == 3 for t in tensors) and caller != 'QMultiScaleAttention'
            if name in ('matmul', '__matmul__', 'einsum') or (name in ('mul', '__mul__', '__rmul__') and elementwise):
                self._product(*tensors, caller)
            elif name in ('add', '__add__', '__radd__') and elementwise and sequences:
                self.look_at_sum(*tensors, caller)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _alike(a: Tensor, b: Tensor) -> bool:
        return min(a.ndim, b.ndim) > 1 and a.shape[-2:] == b.shape[-2:] and min(a.shape[-2:]) > 1

    def _product(self, a: Tensor, b: Tensor, caller: str) -> None:
        self.products += 1
        for operand in (a, b):
            probabilities = bool((operand >= 0).all()) and torch.allclose(operand.sum(-1), torch.ones(()), atol=1e-4)
            assert probabilities or len(operand.unique()) <= POINTS, f'{caller} multiplies what is on no grid'

    def look_at_sum(self, a: Tensor, b: Tensor, caller: str) -> None:
        self.sums += 1
        for operand in (a, b):
            most = max(len(channel.unique()) for channel in operand.flatten(0, 1).T)
            assert most <= POINTS, f'{caller} adds what is on no grid'


def assert_operands_on_grids(model: nn.Module, x: Tensor) -> None:
    """Of a model at ``BITS`` bits: every layer with weights, product and residual sum reads points of one grid."""

    def check_layer(path: str) -> Callable:
        def hook(_: nn.Module, args: Any) -> None:
            assert len(args[0].unique()) <= POINTS, f'{path} reads what is on no grid'

        return hook

    def check_norm(norm: nn.Module, args: Any, kwargs: Any) -> None:
        x, act = args[:2] if len(args) > 1 else (args[0], linked(norm))
        scale = act.scale if act.scale.ndim == 0 else act.scale.repeat_interleave(kwargs.get('repeat', 1))
        codes = x / scale
        assert (codes - codes.round()).abs().max() < 1e-2, 'a LayerNorm reads another grid than it was told'
        assert norm.integer

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, QuantLayer) and hasattr(module, 'weight_quantizer'):
            handles.append(module.register_forward_pre_hook(check_layer(path)))
        elif isinstance(module, QIntLayerNorm):
            handles.append(module.register_forward_pre_hook(check_norm, with_kwargs=True))
    watch = GridWatch()

    def add(a: Tensor, b: Tensor, *rules: Any) -> Tensor:
        if a.ndim == b.ndim == 3:
            watch.look_at_sum(a, b, 'the exact sum')
        return exact_add(a, b, *rules)

    exact_add = fused.add
    with pytest.MonkeyPatch.context() as patch, watch:
        patch.setattr(fused, 'add', add)
        run(model, x)
    for handle in handles:
        handle.remove()
    assert watch.products >= 4
    assert watch.sums >= 4
    assert len(handles) >= 8
