"""What tools/benchmark.py measures: pieces of work on one float classifier and its quantized twins, and how.

A *piece* is named by a string: ``float`` (one batch), ``float/all`` (all batches), ``calibrate/<observer>`` (all
batches), ``quant/<preset>`` (one batch), and ``compiled float`` and ``compiled quant/<preset>`` (one batch).
"""

from __future__ import annotations

import copy
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mmpretrain
import torch
from mmpretrain.registry import MODELS
from torch import Tensor

import fqvit_plugin as fq
from fqvit_plugin.apis import build_classifier, load_config
from fqvit_plugin.presets import parse_scheme
from fqvit_plugin.scheme import QuantScheme

COMPILED = 'compiled '
#: A shorter piece is repeated within its turn: below this, the clock and the scheduler are a part of the figure.
SHORTEST = 0.05
#: 8/8/4, for a config that says nothing.
DEFAULT_SCHEME = {'type': 'fqvit_w8a8_attn4'}

Work = Callable[[Iterable[Tensor]], object]


@dataclass(frozen=True)
class Settings:
    """What changes the figures, apart from config, machine and versions; ``image_size`` None is the config's."""

    batch_size: int
    image_size: int | None
    batches: int
    repeats: int
    threads: int
    device: str
    seed: int
    checkpoint: str | None
    compile_backend: str
    cfg_options: dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """A piece's seconds in every round, and the multiples of its base in the same rounds (none without a base)."""

    piece: str
    batches: int
    base: str | None
    warm_up: float  #: seconds of the first run, which is when a compiled piece is compiled
    seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    failed: str | None = None  #: why it could not be compiled

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the raw numbers and what the table shows of them."""
        shown = {
            'median': statistics.median(self.seconds) if self.seconds else None,
            'ratio': statistics.median(self.ratios) if self.ratios else None,
            'spread': spread(self.ratios) if self.ratios else None,
        }
        return {**asdict(self), **shown}


@dataclass(frozen=True)
class Memory:
    """Bytes that a piece needed in a process of its own: held before, and at the peak."""

    piece: str
    batches: int
    start: int
    peak: int
    float_growth: int | None  #: of the float forward pass; None for that itself

    def to_dict(self) -> dict[str, Any]:
        """For JSON: with the growth, and its multiple of the float forward pass's."""
        growth = self.peak - self.start
        ratio = growth / self.float_growth if self.float_growth else None
        return {**asdict(self), 'growth': growth, 'ratio': ratio}


def base_of(piece: str) -> str | None:
    """The piece that ``piece`` is reported as a multiple of: the same batches, or the same compiler."""
    if piece.startswith('calibrate/'):
        return 'float/all'
    if piece.startswith(f'{COMPILED}quant'):
        return f'{COMPILED}float'
    return None if piece in ('float', 'float/all') else 'float'


def batches_of(piece: str, batches: int) -> int:
    """How many batches one run of ``piece`` goes through."""
    return batches if 'float/all' in (piece, base_of(piece)) else 1


def rotated(pieces: Sequence[str], number: int) -> list[str]:
    """The order of round ``number``: every piece takes every place, so none always follows the same long one."""
    start = number % len(pieces)
    return [*pieces[start:], *pieces[:start]]


def ratios(rounds: Sequence[Mapping[str, float]], piece: str) -> tuple[float, ...]:
    """In each round, the seconds of ``piece`` over those of its base; nothing where it has no base."""
    base = base_of(piece)
    return () if base is None else tuple(times[piece] / times[base] for times in rounds if base in times)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest."""
    return min(values), max(values)


def forward(model: Any, images: Tensor) -> Tensor:
    """Logits of a batch that is normalized already."""
    return model(images, mode='tensor')


@torch.no_grad()
def forward_all(model: Any, batches: Iterable[Tensor]) -> None:
    """Run through every batch, and keep nothing."""
    for images in batches:
        forward(model, images)


class Subject:
    """The float classifier of one config, its images, and the pieces of work on it.

    Raises:
        ValueError: no such config, or its quant_scheme is none.
    """

    def __init__(self, config: Path, settings: Settings) -> None:
        self.config = config
        self.settings = settings
        self.cfg = load_config(config, settings.cfg_options)
        if self.cfg.get('model') is None:
            raise ValueError(f'config {config} has no model')
        self.cfg.model.pop('train_cfg', None)  # batch augmentation: announces itself, and is for training
        configured = self.cfg.get('quant_scheme', DEFAULT_SCHEME)
        self.scheme_options = {'type': configured} if isinstance(configured, str) else dict(configured)
        size = self.cfg.model.get('backbone', {}).get('img_size')
        self.image_size = settings.image_size or (size if isinstance(size, int) else 224)
        self.model: Any = None

    def scheme_of(self, piece: str) -> QuantScheme | None:
        """The config's scheme as ``piece`` changes it, None for a float piece.

        Raises:
            ValueError: unknown observer or preset.
        """
        kind, _, option = piece.removeprefix(COMPILED).partition('/')
        changes: dict[str, dict[str, Any]] = {
            'calibrate': dict(observer=option, preset='strict', ptf=True, lis=True),
            'quant': dict(preset=option),
        }
        return parse_scheme({**self.scheme_options, **changes[kind]}) if kind in changes else None

    def load(self) -> None:
        """Build the float model: with the checkpoint's weights, or random ones.

        Raises:
            ValueError: the checkpoint does not fit, or images of this size do not pass through the model.
        """
        torch.manual_seed(self.settings.seed)
        if self.settings.checkpoint:
            model = build_classifier(self.cfg, self.settings.checkpoint, self.settings.device)
        else:
            model = MODELS.build(dict(self.cfg.model, data_preprocessor=self.cfg.get('data_preprocessor')))
        for module in model.modules():
            # As surgery does for the quantized model: NumPy's numbers would break the compiled float model's graph at
            # every block, to our advantage.
            if hasattr(module, 'drop_prob'):
                module.drop_prob = float(module.drop_prob)
        self.model = model.to(self.settings.device).eval()
        try:
            forward_all(self.model, self.images(1, batch_size=1))
        except Exception as error:  # mmpretrain asserts, torch raises RuntimeError
            size = f'{self.image_size} x {self.image_size}'
            raise ValueError(f'{self.config}: images of {size} do not pass: {error}') from error

    def images(self, count: int, batch_size: int | None = None) -> Iterator[Tensor]:
        """``count`` batches of random images as if normalized, each made when it is asked for."""
        device, size = self.settings.device, self.image_size
        generator = torch.Generator(device).manual_seed(self.settings.seed)
        shape = (batch_size or self.settings.batch_size, 3, size, size)
        return (torch.randn(shape, generator=generator, device=device) for _ in range(count))

    def prepare(self, piece: str, warm: Sequence[Tensor]) -> Work:
        """The work called ``piece``, for any number of batches; a quantized model is calibrated on ``warm``."""
        model, scheme = self.model, self.scheme_of(piece)
        if scheme is not None:
            # one set of weights for all: copies of a large model would not fit
            model = copy.deepcopy(self.model, memo={id(p): p for p in self.model.parameters()})
            fq.quantize_model_(model, scheme)
        work: Work
        if piece.startswith('calibrate/'):
            work = partial(fq.calibrate_, model, forward=forward)
        else:
            if scheme is not None:
                fq.calibrate_(model, warm, forward)
                fq.quant(model)
            if piece.startswith(COMPILED):
                model = torch.compile(model, backend=self.settings.compile_backend)
            work = partial(forward_all, model)
        return work


def timed(work: Callable[[], object], sync: Callable[[], object], shortest: float = SHORTEST) -> float:
    """Mean seconds of one run, of as many as it takes to fill ``shortest`` seconds."""
    sync()
    start = time.perf_counter()
    runs, passed = 0, 0.0
    while runs == 0 or passed < shortest:
        work()
        sync()
        runs, passed = runs + 1, time.perf_counter() - start
    return passed / runs


class Stopwatch:
    """Times pieces in rounds; what is finished when it is interrupted can still be read from it.

    Args:
        subject: with its model loaded.
        pieces: each base among them.
        tick: is told what is done next, before every warm-up and every run.
    """

    def __init__(self, subject: Subject, pieces: Sequence[str], tick: Callable[[str], object]) -> None:
        self.subject, self.pieces, self.tick = subject, list(pieces), tick
        self.works: dict[str, Work] = {}
        self.warm_ups: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self.rounds: list[dict[str, float]] = []

    def run(self) -> None:
        """Warm up every piece, then time each once per round."""
        settings = self.subject.settings
        device = torch.device(settings.device)
        sync = (lambda: torch.cuda.synchronize(device)) if device.type == 'cuda' else (lambda: None)
        batches = list(self.subject.images(settings.batches))
        if any(piece.startswith(COMPILED) for piece in self.pieces):
            torch.compiler.reset()  # of earlier configs: it gives up on a function that comes with too many models
        for piece in self.pieces:
            self.tick(f'{piece}, warm-up')
            self._warm_up(piece, batches[:1], sync)
        for number in range(settings.repeats):
            times: dict[str, float] = {}
            for piece in rotated(list(self.works), number):
                self.tick(f'{piece}, round {number + 1}')
                work, count = self.works[piece], batches_of(piece, settings.batches)
                times[piece] = timed(partial(work, batches[:count]), sync)
            self.rounds.append(times)

    def _warm_up(self, piece: str, warm: Sequence[Tensor], sync: Callable[[], object]) -> None:
        start = time.perf_counter()
        try:
            work = self.subject.prepare(piece, warm)
            start = time.perf_counter()
            work(warm)
            self.works[piece] = work
        except Exception as error:  # a compiler can fail in any way, and the rest can still be timed
            if not piece.startswith(COMPILED):
                raise
            self.failures[piece] = ' '.join(str(error).split('\n\n')[0].split()) or type(error).__name__
        sync()
        self.warm_ups[piece] = time.perf_counter() - start

    def timings(self) -> list[Timing]:
        """What the finished rounds say, and why a piece is missing in them."""
        found = []
        for piece in self.pieces if self.rounds else []:
            about = (piece, batches_of(piece, self.subject.settings.batches), base_of(piece), self.warm_ups[piece])
            if piece in self.failures:
                found.append(Timing(*about, failed=self.failures[piece]))
            else:
                seconds = tuple(times[piece] for times in self.rounds)
                found.append(Timing(*about, seconds, ratios(self.rounds, piece)))
        return found

    def profile(self, piece: str, top: int) -> list[dict[str, Any]]:
        """The ``top`` operators of one run on one batch that take longest themselves, on the CPU."""
        (images,) = self.subject.images(1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self.works[piece]([images])
        events = sorted(profiler.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
        total = sum(e.self_cpu_time_total for e in events)
        return [
            dict(operator=e.key, calls=e.count, ms=e.self_cpu_time_total / 1e3, share=e.self_cpu_time_total / total)
            for e in events[:top]
        ]


def can_measure_memory(device: str) -> bool:
    """Whether a peak can be reset and read: on a GPU, and on Linux."""
    return torch.device(device).type == 'cuda' or os.access('/proc/self/clear_refs', os.W_OK)


def memory_of(subject: Subject, piece: str, count: int) -> tuple[int, int]:
    """Bytes held before, and at the peak of, ``count`` batches of ``piece``; only in a fresh process."""
    warm = list(subject.images(1, batch_size=1))
    work = subject.prepare(piece, warm)
    work(warm)
    device = torch.device(subject.settings.device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        work(subject.images(count))
        return start, torch.cuda.max_memory_allocated(device)
    Path('/proc/self/clear_refs').write_text('5')
    start = _status('VmRSS')
    work(subject.images(count))
    return start, _status('VmHWM')


def in_processes(config: Path, pieces: Sequence[str], batches: int, argv: Sequence[str]) -> Iterator[Memory]:
    """Peak memory of ``pieces``, each in a fresh process called with ``argv``; of calibration, for 2 batches and all.

    Raises:
        RuntimeError: a process failed, or was killed.
    """
    # glibc keeps what is freed, and ever larger pieces of it, so that a peak depends on fragments: the same
    # calibration grew by 24 to 53 MB in six runs. With a fixed limit every tensor that counts goes back to the
    # system: 15.9 to 16.1 MB.
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}
    tool = Path(__file__).with_name('benchmark.py')
    float_growth = None
    for piece in pieces:
        if piece.startswith(COMPILED) or piece == 'float/all':
            continue
        for count in sorted({min(2, batches), batches}) if piece.startswith('calibrate/') else [1]:
            command = [sys.executable, str(tool), *argv, '--memory-of', str(config), piece, str(count)]
            run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
            if run.returncode:
                said = run.stderr.strip().splitlines() or ['']
                raise RuntimeError(f'memory of {piece}: its process ended with {run.returncode}: {said[-1]}')
            start, peak = json.loads(run.stdout.splitlines()[-1])
            yield Memory(piece, count, start, peak, float_growth)
            float_growth = float_growth or peak - start


def _status(field: str) -> int:
    found = re.search(rf'^{field}:\s*(\d+) kB$', Path('/proc/self/status').read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def machine(device: str) -> dict[str, Any]:
    """What ran it: processor, cores that this process may use, instruction set, GPU, versions."""
    info = Path('/proc/cpuinfo')
    model = re.search(r'^model name\s*:\s*(.+)$', info.read_text(), re.MULTILINE) if info.exists() else None
    return dict(
        cpu=model[1] if model else platform.processor() or platform.machine(),
        cores=cores(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else None,
        python=platform.python_version(),
        torch=torch.__version__,
        mmpretrain=mmpretrain.__version__,
        fqvit_plugin=fq.__version__,
    )


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
