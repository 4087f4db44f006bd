"""FQViTQuantizer: FQ-ViT behind the interface of NNI 3's own quantizers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QAct, QConv2d, QIntSoftmax, QLinear
from ..lifecycle import calibrating, close_calibrate, named_quantizers, open_last_calibrate, quant
from ..presets import parse_scheme
from ..quantizers import UniformQuantizer
from ..report import Report
from ..scheme import QuantScheme
from ..structure import Structure
from ..surgery import quantize_model_
from .nni_compat import import_compression
from .nni_config import scheme_of

__all__ = ['FQViTQuantizer']

_logger = logging.getLogger('nni.fqvit_plugin')
_Quantizer: Any = import_compression().compressor.Quantizer


class FQViTQuantizer(_Quantizer):
    """FQ-ViT in the place of ``PtqQuantizer``: same constructor, ``compress``, ``unwrap_model``, ``from_compressor``.

    NNI wraps single layers; FQ-ViT quantizes whole blocks, because PTF and LIS lie between layers. So the blocks of
    the model are swapped as :func:`~fqvit_plugin.surgery.quantize_model_` does, *all* of them, and ``config_list``
    says with how many bits single tensors; what it does not name gets the bits of ``scheme``. What each key means,
    and what is refused: ``docs/nni.md``.

    Args:
        model: an MMPretrain classifier that surgery covers.
        config_list: NNI's; may be empty.
        evaluator: NNI's, with a function that evaluates: every batch it runs through the model calibrates.
        existed_wrappers: of a pruner; its masks on weights and biases are multiplied in.
        scheme: name, dict or QuantScheme for all that NNI's config cannot say: observer, PTF, LIS, preset.

    Raises:
        ValueError: the model is not covered, or the configuration asks for what FQ-ViT does not do.
    """

    _is_wrapped: bool

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Any = None,
        existed_wrappers: Mapping[str, Any] | None = None,
        scheme: str | Mapping[str, Any] | QuantScheme = 'fqvit_w8a8',
    ) -> None:
        self.base_scheme = parse_scheme(scheme)
        if steps := ', '.join(s.name for s in self.base_scheme.steps):
            raise ValueError(
                f'{self.base_scheme.name} has steps ({steps}), which pass over the images again, and '
                "NNI's evaluator does not hand them out: calibrate with tools/calibrate.py or the QuantHook, or "
                'leave them out with scheme=dict(type=..., steps=[])'
            )
        self.scheme = scheme_of(model, config_list, self.base_scheme)
        self.report: Report | None = None
        self._existed = dict(existed_wrappers or {})
        self._masks = _pruning_masks(self._existed)
        self._before: Structure | None = None
        super().__init__(model, [], evaluator)  # NNI gets no entries: it would wrap the layers we swap
        self.config_list = [dict(entry) for entry in config_list]

    @classmethod
    def from_compressor(
        cls,
        compressor: Any,
        new_config_list: Sequence[Mapping[str, Any]],
        evaluator: Any = None,
        scheme: str | Mapping[str, Any] | QuantScheme | None = None,
    ) -> FQViTQuantizer:
        """A new quantizer on the model of ``compressor``, which is unwrapped.

        A pruner hands on its masks; an FQViTQuantizer its entries, which hold before new ones, and its scheme.

        Raises:
            ValueError: another quantizer or a distiller, whose wrappers cannot stay under FQ-ViT's blocks.
        """
        if compressor._is_wrapped:
            compressor.unwrap_model()
        ours = isinstance(compressor, FQViTQuantizer)
        wrappers = compressor._existed if ours else compressor._module_wrappers
        config_list = [*(compressor.config_list if ours else []), *new_config_list]
        if scheme is None:
            scheme = compressor.base_scheme if ours else 'fqvit_w8a8'
        return cls(compressor.bound_model, config_list, compressor.evaluator or evaluator, wrappers, scheme)

    def wrap_model(self) -> None:
        """Put the quantized blocks in; calibrated parameters come with ``compress`` or ``update_calibration_config``.

        Raises:
            ValueError: the model is not covered.
        """
        if self._is_wrapped:
            _logger.warning('The bound model has been wrapped, no need to wrap again.')
            return
        before = Structure(self.bound_model)
        for name, target, mask in self._masks:
            module = self.bound_model.get_submodule(name)
            kept = getattr(module, target)
            setattr(module, target, nn.Parameter(kept.detach() * mask, requires_grad=kept.requires_grad))
        try:
            self.report = quantize_model_(self.bound_model, self.scheme)
        except BaseException:
            before.restore_()
            raise
        self._before, self._is_wrapped = before, True

    def unwrap_model(self) -> None:
        """Put the float blocks back: the same modules and parameters as before."""
        if self._before is None:
            _logger.warning('The bound model is not wrapped, can not unwrap it.')
            return
        self._before.restore_()
        self._before, self._is_wrapped = None, False

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, dict]:
        """Calibrate on what the evaluator evaluates, and quantize.

        Args:
            max_steps: at most so many batches calibrate; ``None`` for all.
            max_epochs: accepted as NNI's interface has it; static ranges learn nothing from a second pass.

        Returns:
            The model, quantized from now on, and :meth:`get_calibration_config`.

        Raises:
            ValueError: there is no evaluator, it evaluated nothing, or ``max_steps`` is not positive.
        """
        self._single_compress(max_steps, max_epochs)
        return self.bound_model, self.get_calibration_config()

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self.evaluator is None:
            raise ValueError('no evaluator: FQ-ViT calibrates on what its evaluating function runs')
        if max_steps is not None and max_steps < 1:
            raise ValueError(f'max_steps must be at least 1, got {max_steps}')
        if not self._is_wrapped:
            self.wrap_model()
        self.evaluator.bind_model(self.bound_model, self._get_param_names_map())
        try:
            _calibrate_through(self.bound_model, self.evaluator.evaluate, max_steps)
        finally:
            self.evaluator.unbind_model()
        quant(self.bound_model)

    def _fuse_preprocess(self, evaluator: Any) -> None:
        raise ValueError('FQViTQuantizer cannot be fused with a training compressor: train first, then calibrate')

    _fuse_postprocess = _fuse_preprocess

    def get_calibration_config(self) -> dict[str, dict[str, dict[str, Any]]]:
        """NNI's form: layer -> target -> scale, zero point, dtype, scheme, bits, ends of the grid, further buffers.

        Layers are those of the quantized model. Attention probabilities lie on a fixed log2 grid, without a scale.
        """
        config: dict[str, dict[str, dict[str, Any]]] = {}
        for name, module in self._quantized_layers().items():
            if isinstance(module, (QConv2d, QLinear)):
                config[name] = {'weight': _entry(module.weight_quantizer, 'symmetric')}
            elif isinstance(module, QAct) or isinstance(module.quantizer, UniformQuantizer):
                config[name] = {'_output_0': _entry(module.quantizer, 'affine')}
            else:
                kind = module.spec.bit_type
                log2 = {'scale': None, 'zero_point': None, 'quant_dtype': kind.name, 'quant_scheme': 'log2'}
                config[name] = {'_output_0': {**log2, 'quant_bits': kind.bits}}
        return config

    def update_calibration_config(self, calibration_config: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Take scales and zero points from :meth:`get_calibration_config` of an equal quantizer, and quantize.

        Raises:
            ValueError: a layer is missing or unknown, or has other bits or channels; nothing is changed then.
        """
        own = self.get_calibration_config()
        if different := sorted(set(own) ^ set(calibration_config)):
            raise ValueError(f'the calibration config is of another model: {different[0]} is only on one side')
        pairs = [(n, t, new, calibration_config[n].get(t, {})) for n, ts in own.items() for t, new in ts.items()]
        for name, target, ours, given in pairs:
            shapes = [None if s is None else tuple(s.shape) for s in (ours['scale'], given.get('scale'))]
            if given.get('quant_dtype') != ours['quant_dtype'] or shapes[0] != shapes[1]:
                raise ValueError(
                    f'{target} of {name} was calibrated as {given.get("quant_dtype")} with scales of shape '
                    f'{shapes[1]}; the model wants {ours["quant_dtype"]}, {shapes[0]}'
                )
        layers: dict[str, Any] = self._quantized_layers()
        with torch.no_grad():
            for name, target, ours, given in pairs:
                if ours['scale'] is not None:
                    layer = layers[name]
                    quantizer = layer.weight_quantizer if target == 'weight' else layer.quantizer
                    quantizer.scale.copy_(given['scale'])
                    quantizer.zero_point.copy_(given['zero_point'])
                    for buffer, value in given['buffers'].items():
                        getattr(quantizer, buffer).resize_(value.shape).copy_(value)
        quant(self.bound_model)

    def _quantized_layers(self) -> dict[str, Any]:
        kinds = (QConv2d, QLinear, QAct, QIntSoftmax)
        return {n: m for n, m in self.bound_model.named_modules() if isinstance(m, kinds)}


def _entry(quantizer: UniformQuantizer, scheme: str) -> dict[str, Any]:
    kind, scale, zero_point = quantizer.spec.bit_type, quantizer.scale.cpu(), quantizer.zero_point.cpu()
    widest, (low, high) = quantizer.widest_step.cpu(), quantizer.step_range()
    return {
        'scale': scale.clone(),
        'zero_point': zero_point.clone(),
        'quant_dtype': kind.name,
        'quant_scheme': scheme,
        'quant_bits': kind.bits,
        'tracked_max': high.cpu() * widest,
        'tracked_min': low.cpu() * widest,
        'buffers': {n: b.cpu().clone() for n, b in quantizer.named_buffers() if n not in ('scale', 'zero_point')},
    }


def _pruning_masks(wrappers: Mapping[str, Any]) -> list[tuple[str, str, Tensor]]:
    """Layer, parameter and mask of every mask that another compressor's wrappers hold."""
    masks = []
    for name, wrapper in wrappers.items():
        if wrapper.quantization_target_spaces or wrapper.distillation_target_spaces:
            raise ValueError(
                f'{name} is wrapped by another quantizer or a distiller, which cannot stay under FQ-ViT: '
                'unwrap it and make an FQViTQuantizer on the model'
            )
        for target, space in wrapper.pruning_target_spaces.items():
            if space.mask is None or bool((space.mask == 1).all()):
                continue
            if target not in ('weight', 'bias'):
                raise ValueError(f'{target} of {name} is masked; only masks on weight and bias can be taken over')
            masks.append((name, target, space.mask))
    return masks


class _EnoughError(Exception):
    """Leaves the user's evaluating function after the last batch that was asked for."""


@torch.no_grad()
def _calibrate_through(model: nn.Module, run: Callable[[], Any], max_batches: int | None) -> None:
    """Calibrate on the batches that ``run`` passes through ``model``, not knowing which will be the last.

    What the observers knew is noted before every batch. After the last one they are set back to that and the batch
    passes once more, as the last: the result is that of :func:`~fqvit_plugin.lifecycle.calibrate_`.
    """
    latest: tuple[Any, Any] | None = None
    known: dict[Any, Any] = {}
    count = 0

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal latest, known, count
        if count == max_batches:
            raise _EnoughError
        known = {q: copy.deepcopy(q.observer) for _, q in named_quantizers(model) if isinstance(q, UniformQuantizer)}
        latest, count = (args, kwargs), count + 1

    model.eval()
    with calibrating(model):
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            run()
        except _EnoughError:
            pass
        finally:
            handle.remove()
        if latest is None:
            raise ValueError('the evaluator ran nothing through the model: give it an evaluating function that does')
        for quantizer, observer in known.items():
            quantizer.observer = observer
        open_last_calibrate(model)
        model(*latest[0], **latest[1])
        close_calibrate(model)
