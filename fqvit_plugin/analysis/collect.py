"""Running a calibrated model in float and quantized over the same images, and measuring every quantized tensor.

A quantizer's own error is taken in the float pass, on a copy: under quant the layers write over their inputs, and
integer LayerNorm and Log-Int-Softmax do not call their quantizers at all. The error in the quantized model is taken
on a few thousand values of each tensor, picked by the same random indices in both passes, so nothing large is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import CalibrationSet, forward_of
from ..exact import Exact, Powers, reals
from ..layers import QAct, QConv2d, QIntLayerNorm, QIntSoftmax, QLinear
from ..lifecycle import dequant, forward_images, phase_of, quant
from ..phase import Phase
from ..surgery import find_classifier
from .measure import Tally
from .records import Analysis, EndToEnd, decibels

__all__ = ['PER_BATCH', 'analyse', 'analyse_on', 'first_images']

SAMPLES = 4096  #: values per tensor and batch that are compared between the float and the quantized model
IMAGES, PER_BATCH = 64, 16  #: of the calibration images, what analyse_on looks at


@torch.no_grad()
def analyse(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> Analysis:
    """Measure every quantized tensor of a calibrated ``model``, and its outputs, against the float model.

    Args:
        model: after surgery and calibration, in phase float or quant; is put in eval mode, its phase is kept.
        batches: streamed; each runs once in float and once quantized.
        forward: runs one batch and returns the outputs; by default what ``calibrate_`` does.

    Raises:
        ValueError: there is no batch.
        RuntimeError: the model is not calibrated, or is calibrating.
    """
    run = forward or forward_images
    before = phase_of(model)
    quant(model)  # says what is not calibrated
    model.eval()
    collector, outputs = _Collector(model), _Outputs()
    try:
        for batch in batches:
            dequant(model)
            with collector.float_pass():
                expected = _tensors(run(model, batch))
            quant(model)
            with collector.quantized_pass():
                outputs.add(expected, _tensors(run(model, batch)))
    finally:
        (quant if before is Phase.QUANT else dequant)(model)
    if outputs.images == 0:
        raise ValueError('no batch to analyse: give at least one')
    return Analysis(collector.records(), outputs.result())


def analyse_on(model: nn.Module, data: CalibrationSet, images: int = IMAGES) -> Analysis:
    """:func:`analyse` a classifier on the first ``images`` images of its calibration data.

    Raises:
        ValueError, RuntimeError: as :func:`analyse`.
    """
    classifier = find_classifier(model)
    return analyse(classifier, data.load(first_images(data.batches, images)), forward_of(classifier))


def first_images(batches: Sequence[Sequence[int]], images: int) -> list[list[int]]:
    """The first ``images`` of ``batches``, in smaller ones; never joined, since their images may differ in size."""
    found: list[list[int]] = []
    for batch in batches:
        for start in range(0, len(batch), PER_BATCH):
            room = images - sum(map(len, found))
            if room > 0:
                found.append(list(batch[start : start + min(PER_BATCH, room)]))
    return found


def _tensors(output: Any) -> list[Tensor]:
    """Every tensor in what a model returned, copied: under quant the next layer's owner may write over it."""
    if isinstance(output, Tensor):
        return [output.detach().float().clone()]
    if isinstance(output, Mapping):
        output = output.values()
    if output is None or not isinstance(output, Iterable) or isinstance(output, str):
        return []
    return [tensor for item in output for tensor in _tensors(item)]


class _Outputs:
    """Adds up the model's outputs."""

    def __init__(self) -> None:
        self.images = self.agreed = 0
        self.signal = self.noise = 0.0
        self.are_logits = True

    def add(self, expected: list[Tensor], found: list[Tensor]) -> None:
        """Compare one batch."""
        self.images += len(expected[0])
        for x, y in zip(expected, found, strict=True):
            self.signal += float(x.square().sum(dtype=torch.float64))
            self.noise += float((x - y).square().sum(dtype=torch.float64))
        self.are_logits &= len(expected) == 1 and expected[0].ndim == 2
        if self.are_logits:
            self.agreed += int((expected[0].argmax(1) == found[0].argmax(1)).sum())

    def result(self) -> EndToEnd:
        """The sums as a record."""
        agreement = self.agreed / self.images if self.are_logits else None
        return EndToEnd(self.images, decibels(self.signal, self.noise), agreement)


class _Collector:
    """Hooks on the Q layers of one model, and what they saw."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.tallies: dict[nn.Module, Tally] = {}
        self.expected: dict[nn.Module, deque[Tensor]] = {}
        self.drift: dict[nn.Module, tuple[float, float]] = {}
        self._measuring = False  # calls that come from measuring are not the model's
        self._chosen: dict[int, Tensor] = {}

    @contextmanager
    def float_pass(self) -> Iterator[None]:
        """Measure every quantizer's own error in the forward pass inside."""
        with ExitStack() as hooks:
            for module in self.names:
                if isinstance(module, QAct):
                    hooks.enter_context(module.register_forward_hook(self._act_in_float))
                elif isinstance(module, QIntSoftmax):
                    hooks.enter_context(module.register_forward_pre_hook(self._logits_in_float, with_kwargs=True))
                    hooks.enter_context(module.register_forward_hook(self._probs_in_float))
                elif isinstance(module, (QConv2d, QLinear)) and module not in self.tallies:
                    hooks.enter_context(module.register_forward_pre_hook(self._weight))
            yield

    @contextmanager
    def quantized_pass(self) -> Iterator[None]:
        """Compare with the float pass before, in the forward pass inside."""
        with ExitStack() as hooks:
            for module in self.names:
                if isinstance(module, QAct):
                    hooks.enter_context(module.register_forward_hook(self._compare_output))
                elif isinstance(module, QIntSoftmax):
                    hooks.enter_context(module.register_forward_pre_hook(self._compare_logits, with_kwargs=True))
                    hooks.enter_context(module.register_forward_hook(self._compare_output))
                elif isinstance(module, QIntLayerNorm):
                    hooks.enter_context(module.register_forward_hook(self._compare_norm, with_kwargs=True))
            yield
        self.expected.clear()

    def records(self) -> tuple[Any, ...]:
        """One record per tensor, in the order in which the network uses them."""
        made = []
        for module, tally in self.tallies.items():
            drift = self.drift.get(module)
            total = None if drift is None else decibels(*drift)
            kind = next(k for k in (QConv2d, QLinear, QAct, QIntSoftmax) if isinstance(module, k))
            made.append(tally.record(self.names[module], kind.__name__, total))
        return tuple(made)

    def _weight(self, layer: Any, args: Any) -> None:
        if layer not in self.tallies:
            self.tallies[layer] = Tally(layer.weight_quantizer.spec, layer.weight_quantizer)
            self.tallies[layer].add(layer.weight)

    def _act_in_float(self, act: Any, args: Any, x: Tensor) -> None:
        if self._measuring:
            return
        # In phase float a QAct puts out what it would quantize: its input, or the function of it.
        self._tally(act, act.quantizer.spec, act.quantizer).add(x)
        self._expect(act, x)

    def _logits_in_float(self, softmax: Any, args: Any, kwargs: Any) -> None:
        """Log-Int-Softmax against the float softmax of the same logits, which are on their grid already."""
        if not softmax.log_int:
            return
        logits, in_act, mask = _softmax_arguments(*args, **kwargs)
        on_grid = in_act.quantizer(logits)
        expected = torch.softmax(on_grid if mask is None else on_grid + mask, dim=-1)
        with self._quantizing(softmax, in_act):
            found = softmax.forward(on_grid, in_act, mask)
        # The logits come first in the network; their own hook fills this place.
        self._tally(in_act, in_act.quantizer.spec, in_act.quantizer)
        self._tally(softmax, softmax.spec, None).add(expected, found)

    def _probs_in_float(self, softmax: Any, args: Any, probs: Tensor) -> None:
        if not softmax.log_int:
            self._tally(softmax, softmax.spec, softmax.quantizer).add(probs)
        self._expect(softmax, probs)

    def _compare_output(self, module: Any, args: Any, output: Tensor) -> None:
        self._compare(module, self._sample(output))

    def _compare_norm(self, norm: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        """The integer LayerNorm lays its result on the grid of ``out_act`` without calling it."""
        out_act = args[2] if len(args) > 2 else kwargs.get('out_act', getattr(norm, 'out_act', None))
        if norm.integer and out_act is not None:
            self._compare(out_act, self._sample(output))

    def _compare_logits(self, softmax: Any, args: Any, kwargs: Any) -> None:
        """Strict Log-Int-Softmax takes the codes of its logits without calling ``in_act``."""
        if softmax.log_int and softmax.spec.arithmetic == 'strict':
            logits, in_act, _ = _softmax_arguments(*args, **kwargs)
            self._compare(in_act, in_act.quantizer(self._sample(logits)))

    def _tally(self, module: nn.Module, spec: Any, quantizer: Any) -> Tally:
        if module not in self.tallies:
            self.tallies[module] = Tally(spec, quantizer)
        return self.tallies[module]

    def _expect(self, module: nn.Module, x: Tensor) -> None:
        self.expected.setdefault(module, deque()).append(self._sample(x))

    def _compare(self, module: nn.Module, found: Tensor) -> None:
        expected = self.expected[module].popleft().double()
        signal, noise = self.drift.get(module, (0.0, 0.0))
        error = (expected - found.double()).square().sum()
        self.drift[module] = (signal + float(expected.square().sum()), noise + float(error))

    def _sample(self, x: Tensor | Exact | Powers) -> Tensor:
        """``SAMPLES`` values of ``x``, the same ones of every tensor of its size; all where it has fewer."""
        flat = reals(x).detach().reshape(-1)
        if len(flat) <= SAMPLES:
            return flat.float().clone()
        if len(flat) not in self._chosen:
            generator = torch.Generator().manual_seed(len(flat))
            self._chosen[len(flat)] = torch.randint(len(flat), (SAMPLES,), generator=generator).to(flat.device)
        return flat[self._chosen[len(flat)]].float()

    @contextmanager
    def _quantizing(self, *layers: Any) -> Iterator[None]:
        """Only these layers in phase quant, and no hook of ours on what they call."""
        self._measuring = True
        for layer in layers:
            layer.phase = Phase.QUANT
        try:
            yield
        finally:
            for layer in layers:
                layer.phase = Phase.FLOAT
            self._measuring = False


def _softmax_arguments(logits: Any, in_act: QAct, mask: Tensor | None = None) -> tuple[Any, QAct, Tensor | None]:
    return logits, in_act, mask
