"""``to_onnx(model, path)``: an integer program as an ONNX file, proved before it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..integer.convert import to_integer
from ..integer.program import IntegerModel, Program
from .carried_form import CarriedWriter
from .graph import OPSET, Graph
from .integer_form import IntegerWriter
from .packages import need
from .proof import Agreement, codes_of, compare_codes, session
from .qdq_form import QdqWriter
from .shapes import image_channels, shapes_of
from .targets import TARGETS
from .tensorrt import check_tensorrt

__all__ = ['FORMS', 'OnnxReport', 'to_onnx']

FORMS = ('qdq', 'integer')
#: As many codes may differ by one step from the integer model's: its halves round up, QuantizeLinear's to even; its
#: biases are finer than int32 ones in units of the accumulator (which matters most for weights of few bits); its GELU
#: reads a 16-bit grid; its sums are exact where floats round.
ALLOWED = 1e-2
#: The same for integers carried in float32, of which only values within 1e-7 or so of a tie may round otherwise; one
#: may in any network.
ALLOWED_CARRIED = 1e-6


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how it was proved.

    Args:
        path: the file.
        size: of it, in bytes.
        form, target, opset: of the graph.
        nodes: operators in it.
        plain: agreement of its codes with the integer model's in onnxruntime, graph optimization off. Form
            ``integer`` for onnxruntime: of the whole network; else of each layer on the integer model's codes.
        optimized: the same with the optimization on: what this machine's kernels make of it. Not part of the proof.
    """

    path: Path
    size: int
    form: str
    target: str
    opset: int
    nodes: int
    plain: Agreement
    optimized: Agreement

    def __str__(self) -> str:
        whose = 'network' if _is_exact(self.form, self.target) else 'layer by layer'
        return (
            f'{self.path}: {self.size / 1e6:.2f} MB, form {self.form} for {self.target}, opset {self.opset}, '
            f'{self.nodes} operators\n'
            f'  onnxruntime, optimization off, {whose}: {self.plain}\n'
            f'  onnxruntime, optimization on, {whose}: {self.optimized}'
        )


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    form: str = 'qdq',
    target: str = 'onnxruntime',
    *,
    images: Tensor | None = None,
    weights: str = 'int8',
    meta: Mapping[str, str] | None = None,
) -> OnnxReport:
    """Write ``model`` as an ONNX file with input ``image`` (B, C, H, W) and output ``logits`` (B, classes), B free.

    The graph is compared with the integer model in onnxruntime first, with graph optimization off; no file is written
    unless it agrees: form ``integer`` in every code of every tensor (for OpenVINO all but one of a million, layer by
    layer), form ``qdq`` layer by layer, given the integer model's codes, within one step, in all but 1 of 100 codes.

    Args:
        model: an :class:`IntegerModel`, or a calibrated classifier in phase quant that ``to_integer`` takes.
        path: replaced only when everything is proved.
        form: ``qdq``, QuantizeLinear and DequantizeLinear around float operators, for engines with int8 kernels; or
            ``integer``, which computes the integer model's codes: for onnxruntime in integer operators, exactly; for
            OpenVINO in float32 that carries integers, all but one of millions. Compile that with
            ``INFERENCE_PRECISION_HINT`` f32.
        target: ``onnxruntime``, ``openvino`` or ``tensorrt``: how ``qdq`` is written, see ``docs/export.md``.
        images: (B, C, H, W), normalized, for the comparison; two of noise by default.
        weights: ``int8``, or ``uint8`` for form ``qdq`` and onnxruntime on CPUs without VNNI, whose kernels for uint8
            by int8 saturate. Form ``integer`` always stores uint8.
        meta: texts for the file's metadata.

    Raises:
        ValueError: a combination that does not exist, a model that has no such form, or a missing package.
        RuntimeError: the graph does not agree with the integer model.
    """
    _check(form, target, weights, Path(path))
    need('onnxruntime')
    integer = model if isinstance(model, IntegerModel) else to_integer(model)
    graph, shapes = Graph(), shapes_of(integer)
    if _is_exact(form, target):
        IntegerWriter(graph, integer.program, shapes).write()
    elif form == 'integer':
        CarriedWriter(graph, integer.program, shapes, TARGETS[target], unsigned_weights=False).write()
    else:
        QdqWriter(graph, integer.program, shapes, TARGETS[target], weights == 'uint8').write()
    proto = _proto(graph, integer.program, shapes, {**(meta or {}), 'form': form, 'target': target})
    if target == 'tensorrt':
        check_tensorrt(proto)
    plain, optimized = _prove(proto, integer, form, target, _images(integer, images))
    size = _write(proto, Path(path))
    return OnnxReport(Path(path), size, form, target, OPSET, len(proto.graph.node), plain, optimized)


def _check(form: str, target: str, weights: str, path: Path) -> None:
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be 'qdq' or 'integer'")
    if target not in TARGETS:
        raise ValueError(f'target is {target!r}; it must be one of {", ".join(TARGETS)}')
    if weights not in ('int8', 'uint8'):
        raise ValueError(f"weights is {weights!r}; it must be 'int8' or 'uint8'")
    if form == 'integer' and target == 'tensorrt':
        why = 'TensorRT has no MatMulInteger and no uint8 arithmetic'
        raise ValueError(f"form 'integer' is for onnxruntime and OpenVINO: {why}. Use form='qdq'")
    if weights == 'uint8' and (form, target) != ('qdq', 'onnxruntime'):
        raise ValueError("weights='uint8' is for form 'qdq' and target 'onnxruntime'; form 'integer' needs no choice")
    if not path.resolve().parent.is_dir():
        raise ValueError(f'there is no folder {path.resolve().parent}')


def _proto(graph: Graph, program: Program, shapes: dict[str, tuple[int, ...]], meta: Mapping[str, str]) -> Any:
    grids = {
        n: {'scale': min(g.scale), 'zero': g.zero[0] if len(set(g.zero)) == 1 else g.zero, 'bits': g.bits}
        | ({'far': g.far} if g.far else {})
        for n, g in program.grids.items()
    }
    texts = {'format': 'fqvit_plugin.onnx', 'version': '1', 'grids': json.dumps(grids, separators=(',', ':')), **meta}
    image, logits = (['batch', *shapes[name][1:]] for name in ('image', program.output))
    return graph.model({'image': image}, {'logits': logits}, texts)


def _images(integer: IntegerModel, images: Tensor | None) -> Tensor:
    shape = (image_channels(integer.program), *integer.program.image_size)
    if images is None:
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    if images.shape[1:] != shape or not len(images):
        raise ValueError(f'images are {tuple(images.shape)}; the model takes (B, {", ".join(map(str, shape))})')
    return images.float()


def _is_exact(form: str, target: str) -> bool:
    return (form, target) == ('integer', 'onnxruntime')


def _prove(proto: Any, integer: IntegerModel, form: str, target: str, images: Tensor) -> tuple[Agreement, Agreement]:
    layerwise = not _is_exact(form, target)
    expected = codes_of(integer, images)
    plain = compare_codes(proto, expected, images, layerwise, optimized=False)
    if not layerwise:
        (logits,) = session(proto, optimized=False).run(['logits'], {'image': images.numpy(force=True)})
        codes = torch.from_numpy(expected[integer.program.output]).int()
        scale, zero = integer.output_scale.cpu(), integer.output_zero.cpu()
        right = plain.exact and torch.equal(torch.from_numpy(logits), (codes - zero) * scale)
    else:
        allowed = ALLOWED * plain.codes if form == 'qdq' else max(1, ALLOWED_CARRIED * plain.codes)
        right = plain.largest <= 1 and plain.different <= allowed
    if not right:
        raise RuntimeError(
            f'the ONNX graph does not compute what the integer model does: {plain}; nothing was written'
        )
    return plain, compare_codes(proto, expected, images, layerwise, optimized=True)


def _write(proto: Any, path: Path) -> int:
    draft = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        draft.write_bytes(proto.SerializeToString())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path.stat().st_size
