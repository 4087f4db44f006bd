"""tools/benchmark.py --engines: every engine on one classifier, in interleaved rounds, and their top-1."""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import Settings, Subject, machine, rotated, spread, timed
from _documents import check_writable, write_json
from _engines import ENGINES, Engine, Material, Run, engines_of
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fqvit_plugin.presets import parse_scheme

#: Seconds of one engine's turn in a round: an engine of 5 ms runs 40 times in it.
TURN = 0.2
#: Float logits may differ from torch's by this much of their largest.
FLOAT_TOLERANCE = 1e-3
#: What decides how fast int8 can be, as Linux names it on x86 and on ARM.
FEATURES = (
    'avx2', 'avx512f', 'avx_vnni', 'avx512_vnni', 'avx512_bf16', 'amx_int8', 'amx_bf16', 'asimddp', 'i8mm', 'sve',
)  # fmt: skip


@dataclass
class Row:
    """What is known of one engine.

    Args:
        name, precision: of it.
        problem: why it could not run, or not on.
        build: seconds from the float model to the first logits.
        seconds: by batch size, those of every round, for one batch.
        top1: in per cent.
    """

    name: str
    precision: str
    problem: str | None = None
    build: float | None = None
    seconds: dict[int, list[float]] = field(default_factory=dict)
    top1: float | None = None


def cpu_features(text: str | None = None) -> list[str]:
    """Which of ``FEATURES`` this CPU has, by Linux's /proc/cpuinfo or a ``text`` like it; none on other systems."""
    info = Path('/proc/cpuinfo')
    text = (info.read_text() if info.exists() else '') if text is None else text
    found = re.search(r'^(?:flags|Features)\s*:\s*(.+)$', text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [name for name in FEATURES if name in flags]


def fastest_float(rows: Sequence[Row], batch: int) -> Row | None:
    """The float32 engine with the smallest median, None if none ran."""
    ran = [row for row in rows if row.precision == 'float32' and row.problem is None and row.seconds.get(batch)]
    return min(ran, key=lambda row: statistics.median(row.seconds[batch]), default=None)


def speeds(row: Row, base: Row, batch: int) -> list[float]:
    """How many times as fast as ``base`` ``row`` was, in each round."""
    return [b / a for a, b in zip(row.seconds[batch], base.seconds[batch], strict=False)]


class Comparison:
    """Builds engines, times them in rounds, scores them; what was finished when it is interrupted can be read.

    Args:
        engines: in the table's order.
        material: with the float model and the calibration images.
        images: one batch for each batch size.
        tick: is told what is done next.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        material: Material,
        images: Mapping[int, Tensor],
        tick: Callable[[str], object],
    ) -> None:
        self.material, self.images, self.tick = material, images, tick
        self.engines = engines
        self.rows = [Row(e.name, e.precision, e.missing) for e in engines]
        self.runs: dict[str, Run] = {}

    @torch.no_grad()
    def run(self, repeats: int, scored: tuple[Tensor, Tensor] | None = None) -> None:
        """Build every engine, time each once per round, then score each on ``scored``: images and labels."""
        for engine, row in zip(self.engines, self.rows, strict=True):
            if row.problem is None:
                self.tick(f'{row.name}: build')
                self._try(row, lambda engine=engine, row=row: self._build(engine, row))
        for number in range(repeats):
            for batch in self.images:
                for name in rotated(list(self.runs), number) if self.runs else []:
                    self.tick(f'{name}: batch {batch}, round {number + 1}')
                    row = next(row for row in self.rows if row.name == name)
                    self._try(row, lambda row=row, batch=batch: self._time(row, batch))
        for row in self.rows if scored else []:
            if row.name in self.runs:
                self.tick(f'{row.name}: top-1')
                self._try(row, lambda row=row: self._score(row, *scored))

    def _try(self, row: Row, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of any engine, in any way: the others still count
            said = ' '.join(str(error).split()) or 'no message'
            row.problem = f'failed: {type(error).__name__}: {said[:200]}'
            self.runs.pop(row.name, None)

    def _build(self, engine: Engine, row: Row) -> None:
        start = time.perf_counter()
        run = engine.build(self.material)
        for images in self.images.values():
            logits = torch.as_tensor(np.asarray(run(images)))
            expected = self.material.model(images, mode='tensor')
            if logits.shape != expected.shape or not logits.isfinite().all():
                raise ValueError(
                    f'its logits are {tuple(logits.shape)}, {tuple(expected.shape)} finite ones expected'
                )
            far = ((logits - expected).abs().max() / expected.abs().max()).item()
            if engine.precision == 'float32' and far > FLOAT_TOLERANCE:
                raise ValueError(f'its logits for a batch of {len(images)} differ from torch by {far:.1%}')
        self.runs[engine.name] = run
        row.build = time.perf_counter() - start

    def _time(self, row: Row, batch: int) -> None:
        run, images = self.runs[row.name], self.images[batch]
        run(images)  # caches and threads are its own again
        row.seconds.setdefault(batch, []).append(timed(lambda: run(images), lambda: None, TURN))

    def _score(self, row: Row, images: Tensor, labels: Tensor) -> None:
        size = max(self.images)
        answers = []
        for chunk in images.split(size):
            # a batch size that it was made for: the last chunk is filled up
            full = torch.cat((chunk, chunk[-1:].expand(size - len(chunk), -1, -1, -1))).contiguous()
            answers.append(torch.as_tensor(np.asarray(self.runs[row.name](full)))[: len(chunk)].argmax(1))
        row.top1 = 100 * (torch.cat(answers) == labels).float().mean().item()


def table(rows: Sequence[Row], batches: Sequence[int]) -> Table:
    """Medians and speeds for a terminal, of all that ran; the footer says why others did not."""
    scored = any(row.top1 is not None for row in rows)
    result = Table('engine', 'precision', box=box.SIMPLE_HEAD)
    for batch in batches:
        for name in (f'batch {batch}: ms', 'speed', 'min - max'):
            result.add_column(name, justify='right', no_wrap=True)
    if scored:
        result.add_column('top-1', justify='right', no_wrap=True)
    for row in rows:
        if row.problem is None or row.seconds:
            cells = [cell for batch in batches for cell in _cells(row, fastest_float(rows, batch), batch)]
            top1 = [] if row.top1 is None else [f'{row.top1:.2f}']
            result.add_row(row.name, row.precision, *cells, *top1)
    return result


def _cells(row: Row, base: Row | None, batch: int) -> list[str]:
    if not row.seconds.get(batch):
        return ['', '', '']
    cells = [f'{1e3 * statistics.median(row.seconds[batch]):.1f}']
    if base is None or not (found := speeds(row, base, batch)):
        return [*cells, '', '']
    low, high = spread(found)
    return [*cells, f'{statistics.median(found):.2f}', f'{low:.2f} - {high:.2f}']


def footer(rows: Sequence[Row], batches: Sequence[int], features: Sequence[str]) -> Iterator[str]:
    """What the table does not say: what is missing and why, what speeds are multiples of, what the CPU can do."""
    for row in rows:
        if row.problem is not None:
            yield f'  {row.name}: {row.problem}'
    bases = [(batch, fastest_float(rows, batch)) for batch in batches]
    if named := [f'{base.name} at batch {batch}' for batch, base in bases if base is not None]:
        yield f'speed: times as fast as the fastest float32 engine ({", ".join(named)}), median over rounds'
    vnni = [name for name in features if name in ('avx_vnni', 'avx512_vnni', 'amx_int8', 'asimddp', 'i8mm')]
    known = f'{", ".join(vnni) or "none (no VNNI)"}; it has {", ".join(features)}'
    yield f'int8 dot products of this CPU: {known if features else "not known: this system does not say"}'


def to_dict(rows: Sequence[Row], batches: Sequence[int]) -> list[dict[str, Any]]:
    """For JSON: raw seconds, and what the table shows of them."""
    document = []
    for row in rows:
        shown = {}
        for batch in batches:
            base = fastest_float(rows, batch)
            if seconds := row.seconds.get(batch):
                found = speeds(row, base, batch) if base else []
                shown[str(batch)] = dict(
                    seconds=seconds,
                    median=statistics.median(seconds),
                    speed=statistics.median(found) if found else None,
                    spread=spread(found) if found else None,
                )
        document.append(
            dict(engine=row.name, precision=row.precision, problem=row.problem, build=row.build, top1=row.top1,
                 batches=shown)
        )  # fmt: skip
    return document


def read_photos(folder: Path, subject: Subject) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Calibration batches of ``folder/calib``; images and labels of ``folder/val``; normalized as the config says.

    Raises:
        ValueError: no such photographs.
    """
    import accuracy  # its own imports are for who scores

    pipeline = subject.cfg.test_dataloader.dataset.pipeline
    calib, val = (accuracy.read_photos(folder / split, pipeline) for split in ('calib', 'val'))
    settings = subject.settings
    normalize = subject.model.data_preprocessor
    shuffled = calib.shuffled(settings.seed).batches(settings.batch_size)
    batches = [normalize(batch, False)['inputs'] for batch, _ in zip(shuffled, range(settings.batches), strict=False)]
    return batches, (normalize({'inputs': val.images}, False)['inputs'], val.labels)


def compare(
    subject: Subject,
    engines: Sequence[Engine],
    batch_sizes: Sequence[int],
    photos: Path | None,
    tick: Callable[[str], object],
    results: list[Row],
) -> None:
    """Fill ``results`` with a row for each engine on the loaded ``subject``."""
    settings = subject.settings
    calibration, scored = list(subject.images(settings.batches)), None
    if photos is not None:
        calibration, scored = read_photos(photos, subject)
    source = next(subject.images(1, batch_size=max(batch_sizes))) if scored is None else scored[0]
    images = {size: source[:size].contiguous() for size in dict.fromkeys(batch_sizes)}
    if any(len(batch) != size for size, batch in images.items()):
        raise ValueError(f'--batch-sizes: {photos}/val has only {len(source)} images')
    with tempfile.TemporaryDirectory() as folder:
        material = Material(
            subject.model, parse_scheme(subject.scheme_options), calibration, settings.threads, Path(folder),
            list(images), settings.compile_backend,
        )  # fmt: skip
        comparison = Comparison(engines, material, images, tick)
        results.extend(comparison.rows)
        comparison.run(settings.repeats, scored)


def compare_engines(args: argparse.Namespace, settings: Settings, console: Console) -> None:
    """``--engines``: a table for each config, as it comes.

    Raises:
        ValueError, RuntimeError, OSError: what was given is wrong.
    """
    engines = engines_of(list(ENGINES) if args.engines == 'all' else args.engines.split(','))
    if args.device != 'cpu' or args.baseline is not None:
        raise ValueError('--engines goes with neither --device nor --baseline')
    if args.json is not None:
        check_writable(args.json)
    subjects = [Subject(config, settings) for config in dict.fromkeys(args.configs)]
    document: dict[str, Any] = dict(
        schema='engines-1',
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        machine=machine('cpu'),
        settings=asdict(settings),
    )
    document['machine']['features'], document['configs'] = cpu_features(), {}
    for subject in subjects:
        subject.load()
        rows: list[Row] = []
        try:
            with console.status('') as status:
                compare(subject, engines, args.batch_sizes, args.images, status.update, rows)
        finally:
            size = f'{subject.image_size} x {subject.image_size}'
            console.print(f'{subject.config}: {subject.scheme_options["type"]}, {size}, {args.threads} threads')
            console.print(table(rows, args.batch_sizes))
            console.print(*footer(rows, args.batch_sizes, cpu_features()), sep='\n', soft_wrap=True)
            document['configs'][str(subject.config)] = to_dict(rows, args.batch_sizes)
            if args.json is not None:
                write_json(args.json, document)
        subject.model = None
