"""The sensitivity analysis in a terminal: kinds, blocks and the tensors that matter, the costliest first."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ..analysis.terminal import format_decibels
from .records import LEVELS, Effect, Entry, Sensitivity

__all__ = ['format_kl', 'print_sensitivity']

_TITLES = {'tensor': 'tensors', 'layer': 'layers', 'block': 'blocks', 'group': 'kinds'}


def format_kl(kl: float) -> str:
    """Three figures, without the noise of double precision."""
    return '0' if kl < 5e-7 else f'{kl:.2g}' if kl < 1e-3 else f'{kl:.4f}' if kl < 1 else f'{kl:.3f}'


def print_sensitivity(console: Console, result: Sensitivity, by: str = 'only', top: int = 20) -> None:
    """Print what quantization does to the outputs as a whole, and a table for each level that was measured.

    Args:
        console: where to.
        result: of :func:`~fqvit_plugin.sensitivity.measure.measure_sensitivity`.
        by: ``'only'`` or ``'without'``: what the rows are sorted by.
        top: rows of a table, at most.
    """
    whole = result.quantized
    console.print(f'{result.images} images, everything quantized: {_words(whole)}{_float(result)}', soft_wrap=True)
    for unit in reversed(LEVELS):
        entries = result.ranked(unit, by)
        if entries:
            console.print(_table(unit, entries[:top], len(entries), by))


def _words(effect: Effect) -> str:
    text = f'KL {format_kl(effect.kl)}, first class as in float on {100 * effect.agree:.1f} %'
    return text if effect.top1 is None else f'{text}, top-1 {100 * effect.top1:.1f} %'


def _float(result: Sensitivity) -> str:
    return '' if result.float_top1 is None else f' (float {100 * result.float_top1:.1f} %)'


def _table(unit: str, entries: tuple[Entry, ...], count: int, by: str) -> Table:
    title = _TITLES[unit] if len(entries) == count else f'{_TITLES[unit]}, {len(entries)} of {count}'
    both = {d: any(getattr(e, d) is not None for e in entries) for d in ('only', 'without')}
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify='left', pad_edge=False)
    table.add_column('', overflow='fold')
    has_tensors = unit == 'tensor'
    for name in ('bits', 'SQNR') if has_tensors else ('tensors',):
        table.add_column(name, justify='right', no_wrap=True)
    for direction, wanted in both.items():
        if wanted:
            mark = ' ▾' if direction == by else ''
            table.add_column(f'{direction}: KL{mark}', justify='right', no_wrap=True)
            table.add_column('agree', justify='right', no_wrap=True)
    for e in entries:
        about = (_bits(e), format_decibels(e.sqnr_db)) if has_tensors else (str(e.members),)
        cells = [c for d, wanted in both.items() if wanted for c in _cells(getattr(e, d))]
        table.add_row(e.name.removeprefix('backbone.') or e.name, *about, *cells)
    return table


def _bits(entry: Entry) -> str:
    return '–' if entry.bits is None else str(entry.bits)


def _cells(effect: Effect | None) -> tuple[str, str]:
    return ('–', '–') if effect is None else (format_kl(effect.kl), f'{100 * effect.agree:.1f} %')
