"""The calibration report on one screen of a terminal: colour where there is one, plain text in a log file."""

from __future__ import annotations

import math

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..report import Report
from .records import Analysis, TensorRecord

__all__ = ['format_decibels', 'format_share', 'print_report', 'quality']

#: Below LOW a tensor has lost what a few bits hold; from HIGH on it is as good as 8 bits usually are.
LOW, HIGH = 20.0, 30.0
_COLOUR = {'low': 'bold red', 'fair': 'yellow', 'good': 'green'}


def quality(sqnr: float) -> str:
    """``'low'``, ``'fair'`` or ``'good'``; docs/reports.md says where the limits come from."""
    if math.isnan(sqnr):
        return 'good'
    return 'low' if sqnr < LOW else 'fair' if sqnr < HIGH else 'good'


def format_decibels(sqnr: float | None) -> str:
    """One decimal; ``exact`` where nothing was lost, a dash where nothing was measured."""
    if sqnr is None or math.isnan(sqnr):
        return '–'
    return 'exact' if sqnr == math.inf else f'{sqnr:.1f} dB'


def format_share(share: float) -> str:
    """Percent, with the digits that small shares need."""
    if share == 0:
        return '0 %'
    return f'{share:.1%}'.replace('%', ' %') if share >= 0.001 else f'{share * 1e6:.0f} ppm'


def print_report(console: Console, report: Report, analysis: Analysis | None = None) -> None:
    """Print what was quantized, what stays float and why, sizes, and where ``analysis`` is given the errors."""
    parts: list[RenderableType] = [_layers(report)]
    if analysis is not None:
        parts += [Text(), _worst(analysis), Text(), _summary(report, analysis)]
    else:
        parts += [Text(), _sizes(report)]
    scheme = Text.assemble((report.scheme.name, 'bold'), f'  {report.recipe}')
    console.print(
        Panel(Group(scheme, Text(), *parts), title='FQ-ViT calibration', title_align='left', padding=(0, 1))
    )


def _grid(*justify: JustifyMethod) -> Table:
    """A table without lines; the last column takes what is left and folds."""
    table = Table.grid(padding=(0, 2), expand=True)
    for i, side in enumerate(justify):
        last = i == len(justify) - 1
        table.add_column(justify=side, ratio=1 if last else None, overflow='fold', no_wrap=not last)
    return table


def _layers(report: Report) -> Table:
    table = _grid('right', 'left', 'left')
    for (kind, bits), count in report.kinds():
        table.add_row(Text(str(count), 'bold'), Text(kind), Text(bits, 'cyan'))
    for reason, paths in report.reasons():
        table.add_row(Text(str(len(paths)), 'bold'), Text('float', 'dim'), Text(reason, 'dim'))
    return table


def _worst(analysis: Analysis) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True, pad_edge=False)
    table.add_column('worst tensors', ratio=1, overflow='fold')
    for title in ('bits', 'SQNR', 'in the model', 'saturated'):
        table.add_column(title, justify='right', no_wrap=True)
    for r in analysis.worst():
        table.add_row(
            Text(r.path.removeprefix('backbone.')),
            Text(r.bits),
            _coloured(r),
            format_decibels(r.total_sqnr),
            format_share(r.saturated),
        )
    return table


def _coloured(record: TensorRecord) -> Text:
    return Text(format_decibels(record.sqnr), _COLOUR[quality(record.sqnr)])


def _summary(report: Report, analysis: Analysis) -> Table:
    table = _sizes(report)
    if (log2 := analysis.log2_range()) is not None:
        count, low, high = log2
        table.add_row(
            'log2 grid',
            Text(f'{count} tensors, {low:.1f} to {high:.1f} dB; 14 where probabilities spread, more where they peak'),
        )
    end = analysis.end_to_end
    text = Text(format_decibels(end.sqnr), _COLOUR[quality(end.sqnr)])
    if end.agreement is not None:
        text.append(f', first class as in float on {end.agreement:.1%}'.replace('%', ' %'), 'default')
    text.append(f' of {end.images} images' if end.agreement is not None else f', {end.images} images', 'default')
    table.add_row('outputs', text)
    return table


def _sizes(report: Report) -> Table:
    table = _grid('left', 'left')
    table.add_row(
        'size',
        Text(
            f'{report.float_bytes / 1e6:.2f} MB float, {report.quantized_bytes / 1e6:.2f} MB quantized '
            f'({report.quantized_bytes / report.float_bytes:.1%})'.replace('%', ' %')
        ),
    )
    return table
