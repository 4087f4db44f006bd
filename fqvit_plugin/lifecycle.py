"""The transitions of FQ-ViT on any model: calibrate, take parameters on the last batch, quant, dequant.

::

    open_calibrate(model)
    for batch in batches[:-1]: model(batch)
    open_last_calibrate(model)
    model(batches[-1])
    close_calibrate(model)
    quant(model)                     # dequant(model) undoes it

Parameters come into force all at once in :func:`close_calibrate`; if calibration breaks off before, what was in
force stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .phase import Phase, QuantLayer
from .quantizers import Quantizer

if TYPE_CHECKING:
    from .distributed import RankSync

__all__ = [
    'calibrate_',
    'calibrating',
    'close_calibrate',
    'dequant',
    'forward_images',
    'named_quantizers',
    'open_calibrate',
    'open_last_calibrate',
    'phase_of',
    'quant',
    'set_phase',
]


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer of ``model`` with its path."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Quantizer))


def phase_of(model: nn.Module) -> Phase:
    """The phase all Q layers of ``model`` are in.

    Raises:
        ValueError: it has no Q layer.
        RuntimeError: its layers are in different phases.
    """
    phases = {layer.phase for layer in _layers(model)}
    if not phases:
        raise ValueError('the model has no quantized layer: call quantize_model_(model, scheme) first')
    if len(phases) > 1:
        raise RuntimeError(f'layers are in different phases: {", ".join(sorted(p.value for p in phases))}')
    return phases.pop()


def _layers(model: nn.Module) -> Iterator[QuantLayer]:
    return (module for module in model.modules() if isinstance(module, QuantLayer))


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Put all Q layers of ``model`` into ``phase``, without asking whether they are ready for it."""
    for layer in _layers(model):
        layer.phase = phase


def _require(model: nn.Module, allowed: Phase, verb: str, instead: str) -> None:
    phase = phase_of(model)
    if phase is not allowed:
        raise RuntimeError(f'cannot {verb} a model in phase {phase.value!r}: {instead}')


def open_calibrate(model: nn.Module) -> None:
    """Start observing, from nothing; forward passes stay float.

    Raises:
        RuntimeError: the model is quantized or already calibrating.
    """
    _require(model, Phase.FLOAT, 'open calibration of', 'call dequant or close_calibrate first')
    for name, quantizer in named_quantizers(model):
        quantizer.name = name
        quantizer.reset()
    set_phase(model, Phase.CALIBRATE)


def open_last_calibrate(model: nn.Module) -> None:
    """Take every quantizer's parameters in the next forward pass, which must be the last batch.

    Raises:
        RuntimeError: calibration is not open.
    """
    _require(model, Phase.CALIBRATE, 'open the last calibration of', 'call open_calibrate first')
    set_phase(model, Phase.LAST_CALIBRATE)


def close_calibrate(model: nn.Module) -> None:
    """Put the parameters in force and go back to float.

    Raises:
        RuntimeError: there was no last batch, or some layer never saw one; nothing changes then but the phase.
    """
    phase = phase_of(model)
    set_phase(model, Phase.FLOAT)
    if phase is not Phase.LAST_CALIBRATE:
        raise RuntimeError(
            f'cannot close calibration in phase {phase.value!r}: call open_calibrate, run batches, call '
            'open_last_calibrate and run the last batch first'
        )
    missed = [name for name, q in named_quantizers(model) if not q.is_taken]
    if missed:
        raise RuntimeError(f'no last batch passed through {_some(missed)}')
    for _, quantizer in named_quantizers(model):
        quantizer.commit()


def quant(model: nn.Module) -> None:
    """Quantize from now on; integer LayerNorm and softmax too, where the scheme has them.

    Raises:
        RuntimeError: a layer is not calibrated; the message names it.
    """
    if phase_of(model) not in (Phase.FLOAT, Phase.QUANT):
        raise RuntimeError('cannot quant a model that is calibrating: call close_calibrate first')
    unset = [name for name, q in named_quantizers(model) if not q.is_calibrated]
    if unset:
        raise RuntimeError(f'not calibrated: {_some(unset)}. Calibrate, or load a calibrated checkpoint, first')
    for layer in _layers(model):
        layer.freeze()
    set_phase(model, Phase.QUANT)


def dequant(model: nn.Module) -> None:
    """Compute in float again, every layer of it; calibrated parameters are kept.

    Raises:
        RuntimeError: the model is calibrating.
    """
    if phase_of(model) not in (Phase.FLOAT, Phase.QUANT):
        raise RuntimeError('cannot dequant a model that is calibrating: call close_calibrate first')
    for layer in _layers(model):
        layer.thaw()
    set_phase(model, Phase.FLOAT)


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Open calibration, and leave the model in float with its old parameters when it breaks off."""
    open_calibrate(model)
    try:
        yield
    except BaseException:
        set_phase(model, Phase.FLOAT)
        for _, quantizer in named_quantizers(model):
            quantizer.reset()
        raise


def forward_images(model: nn.Module, batch: Any) -> Any:
    """``model(batch)``, or of the images where the batch is (images, labels)."""
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    sync: RankSync | None = None,
) -> int:
    """Run the whole calibration: open, every batch, parameters on the last one, close.

    Args:
        model: with Q layers, in phase float; is put in eval mode and stays there.
        batches: any iterable; it is streamed, one batch ahead.
        forward: runs one batch; by default the model sees the batch, or its images where it is (images, labels), as
            data loaders of torchvision and timm give it.
        sync: exchanges measurements between processes; ``batches`` are then those of
            :func:`~fqvit_plugin.distributed.deal`.

    Returns:
        How many batches this process ran through.

    Raises:
        ValueError: there is no batch, or a tensor held NaN or infinity (the layer is named).
    """
    run = forward or forward_images
    iterator = iter(batches)
    try:
        ahead = next(iterator)
    except StopIteration:
        raise ValueError('no calibration batch: the calibration data set is empty') from None
    model.eval()
    count = 1
    with calibrating(model):
        if sync is not None:
            run = sync.guard(run)
            sync.defer(model)
        for batch in iterator:
            run(model, ahead)
            if sync is not None:
                sync.exchange(model)
            ahead, count = batch, count + 1
        if sync is not None:
            sync.resume(model)
        open_last_calibrate(model)
        run(model, ahead)
        if sync is not None:
            sync.settle()
        close_calibrate(model)
    return count


def _some(names: list[str]) -> str:
    shown = ', '.join(names[:3])
    return shown if len(names) <= 3 else f'{shown} and {len(names) - 3} more'
