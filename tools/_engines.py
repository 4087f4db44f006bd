"""Engines that tools/benchmark.py compares: ways to run one classifier, float or in int8.

An engine is a function from :class:`Material` to a callable, normalized images to logits. To add one::

    @engine('mine', 'int8', needs=['my_runtime'])
    def _mine(material: Material) -> Run:
        session = my_runtime.compile(material.onnx, threads=material.threads)
        return lambda images: session(images.numpy())
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmpretrain.models.utils import ShiftWindowMSA
from torch import Tensor, nn

import fqvit_plugin as fq
from fqvit_plugin.gpu import GpuModel
from fqvit_plugin.gpu.support import interpreted
from fqvit_plugin.integer.convert import to_integer
from fqvit_plugin.native.model import NativeModel
from fqvit_plugin.scheme import QuantScheme

#: Normalized images (B, 3, H, W), float32 on the CPU, to logits (B, classes) as torch or numpy holds them.
Run = Callable[[Tensor], Any]


@dataclass
class Material:
    """What an engine is built from; what several of them need is made once.

    Args:
        model: the float classifier, in eval mode on the CPU.
        scheme: of our own int8.
        calibration: batches of normalized images: the same for everyone's int8.
        threads: each engine's.
        folder: for files; removed afterwards.
        batch_sizes: those that will be timed.
        compile_backend: of ``torch.compile``.
    """

    model: Any
    scheme: QuantScheme
    calibration: Sequence[Tensor]
    threads: int
    folder: Path
    batch_sizes: Sequence[int]
    compile_backend: str = 'inductor'

    @property
    def example(self) -> Tensor:
        """One image."""
        return self.calibration[0][:1]

    @cached_property
    def simulated(self) -> Any:
        """Our quantized twin, calibrated."""
        twin = copy.deepcopy(self.model, memo={id(p): p for p in self.model.parameters()})
        fq.quantize_model_(twin, self.scheme)
        fq.calibrate_(twin, self.calibration, _forward)
        fq.quant(twin)
        return twin

    @cached_property
    def integer(self) -> Any:
        """Our integer model."""
        return to_integer(self.simulated, tuple(self.example.shape[2:]))

    @cached_property
    def onnx(self) -> Path:
        """The float network as an ONNX file, input ``image`` and output ``logits``, with the batch left open."""
        path = self.folder / 'float.onnx'
        options: dict[str, Any] = {} if torch.__version__ < '2.5' else {'dynamo': False}
        # two images: with one, tracing takes the batch for a constant wherever it is 1
        example = self.calibration[0][:1].expand(2, -1, -1, -1).contiguous()
        with (
            mock.patch.object(ShiftWindowMSA, 'window_reverse', staticmethod(_window_reverse)),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter('ignore')  # of what tracing takes for constant, which is: sizes but for the batch
            torch.onnx.export(
                _Logits(self.model).eval(), (example,), str(path), opset_version=17, input_names=['image'],
                output_names=['logits'], dynamic_axes={'image': {0: 'batch'}, 'logits': {0: 'batch'}}, **options,
            )  # fmt: skip
        return path


def _window_reverse(windows: Tensor, height: int, width: int, size: int) -> Tensor:
    """MMPretrain's, which asks for the batch as a number, and tracing takes that for a constant."""
    x = windows.view(-1, height // size, width // size, size, size, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, windows.shape[-1])


class _Logits(nn.Module):
    """The classifier as a function of one argument.

    Call ``eval()`` on it as well: an exporter that finds the outside in train mode leaves the inside in it too.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image, mode='tensor')


def _forward(model: Any, images: Tensor) -> Tensor:
    return model(images, mode='tensor')


@dataclass(frozen=True)
class Engine:
    """One entry of the table.

    Args:
        name: on the command line.
        precision: ``float32`` or ``int8``; speeds are multiples of the fastest ``float32``.
        build: makes it.
        needs: modules that must be importable.
    """

    name: str
    precision: str
    build: Callable[[Material], Run]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """What to do before it can run, None if it can."""
        absent = [name for name in self.needs if not _is_there(name)]
        if not absent:
            return None
        names = dict.fromkeys(name.partition('.')[0] for name in absent)  # as their distributions are called
        ours = [name for name in absent if name.startswith('fqvit_plugin')]
        return f'not in this version: {ours[0]}' if ours else f'not installed: pip install {" ".join(names)}'


ENGINES: dict[str, Engine] = {}


def engine(
    name: str, precision: str, needs: Sequence[str] = ()
) -> Callable[[Callable[[Material], Run]], Callable[[Material], Run]]:
    """Register the decorated function as an engine."""

    def register(build: Callable[[Material], Run]) -> Callable[[Material], Run]:
        ENGINES[name] = Engine(name, precision, build, tuple(needs))
        return build

    return register


def engines_of(names: Sequence[str]) -> list[Engine]:
    """The engines called ``names``, in that order, each once.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        if name not in ENGINES:
            raise ValueError(f'--engines: unknown engine {name!r}; there is: {",".join(ENGINES)}')
    return [ENGINES[name] for name in dict.fromkeys(names)]


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


@engine('torch', 'float32')
def _torch(material: Material) -> Run:
    return lambda images: _forward(material.model, images)


@engine('compile', 'float32')
def _compile(material: Material) -> Run:
    torch._dynamo.reset()  # torch 2.1 warns where options differ from those of an earlier compilation
    # dynamic=False: code for each batch size of its own, as the others have
    model = torch.compile(_Logits(material.model).eval(), backend=material.compile_backend, dynamic=False)
    return lambda images: model(images)


@engine('simulated', 'int8')
def _simulated(material: Material) -> Run:
    return lambda images: _forward(material.simulated, images)


@engine('integer', 'int8')
def _integer(material: Material) -> Run:
    return lambda images: material.integer(images)


@engine('native', 'int8')
def _native(material: Material) -> Run:
    model = NativeModel(material.integer)
    return lambda images: model(images)


def _gpu_device() -> str:
    """CUDA's, or the CPU where Triton's interpreter does without: to see that an engine works, not how fast."""
    return 'cpu' if interpreted() and not torch.cuda.is_available() else 'cuda'


def _on_gpu(run: Run) -> Run:
    """``run`` on a GPU: the same batch is sent there once, its logits come back every time."""
    last: list[Tensor] = []

    def call(images: Tensor) -> Tensor:
        if not last or last[0] is not images:
            last[:] = [images, images.to(_gpu_device())]
        logits: Tensor = run(last[1])
        return logits.float().cpu()  # waits for the GPU

    return call


@engine('gpu', 'int8', needs=['triton'])
def _gpu(material: Material) -> Run:
    return _on_gpu(GpuModel(material.integer, cuda_graph=True).to(_gpu_device()))


@engine('gpu-bf16', 'bfloat16')
def _gpu_bf16(material: Material) -> Run:
    model = _InBfloat16(copy.deepcopy(material.model).to(_gpu_device()).bfloat16()).eval()
    compiled = torch.compile(model, mode='max-autotune', backend=material.compile_backend, dynamic=False)

    def run(images: Tensor) -> Any:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # Swin makes its masks in it, and float32 ones would win
        try:
            return compiled(images)
        finally:
            torch.set_default_dtype(default)

    return _on_gpu(run)


class _InBfloat16(_Logits):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.bfloat16())
