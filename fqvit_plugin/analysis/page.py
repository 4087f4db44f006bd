"""The analysis as one HTML page that needs nothing else: no network, no fonts, no images, no script to be read."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from ..report import Report
from .records import Analysis, TensorRecord
from .style import SCRIPT, STYLE
from .svg import bars, histogram_path, ranges
from .terminal import format_decibels, format_share, quality

__all__ = ['PageInfo', 'Section', 'plot', 'render_page', 'role_panels', 'role_title', 'write_text']

#: The page may load nothing: what is not inline is refused by the browser.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class PageInfo:
    """What the page's header says.

    Args:
        model: name of the model.
        date: of the calibration, as text.
        config: base name of the config file, empty without one.
        calibration: what the ranges were taken on, in words.
        versions: package -> version.
    """

    model: str
    date: str
    config: str = ''
    calibration: str = ''
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The config's name, which says more than the model's; that one where there is no config."""
        return self.config.removesuffix('.py') or self.model

    @classmethod
    def of(cls, classifier: Any, cfg: Any, calibration: str = '') -> PageInfo:
        """Of a classifier and the config it was built from, now; no folder of this machine is told."""
        backbone = getattr(classifier, 'backbone', classifier)
        arch = ((cfg.get('model') or {}).get('backbone') or {}).get('arch')
        name = type(backbone).__name__.removeprefix('Q')
        versions = {name: _version(name) for name in ('fqvit_plugin', 'mmengine', 'mmpretrain', 'torch')}
        return cls(
            model=f'{name}, arch {arch}' if isinstance(arch, str) else name,
            date=datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
            config=os.path.basename(getattr(cfg, 'filename', None) or ''),
            calibration=calibration,
            versions=versions,
        )


@dataclass(frozen=True)
class Section:
    """A part of the page that somebody else adds.

    Args:
        anchor: the ``id`` of its outermost element, for the page's navigation.
        title: what the navigation says.
        html: of the whole section; what comes from outside is escaped in it.
    """

    anchor: str
    title: str
    html: str


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return 'from a checkout'


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` aside first, so that an interruption leaves no half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        aside.write_text(text, encoding='utf-8')
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def render_page(info: PageInfo, report: Report, analysis: Analysis, added: Sequence[Section] = ()) -> str:
    """The page as text; everything that comes from outside is escaped. ``added`` sections come first."""
    title = escape(f'{info.title}: FQ-ViT calibration')
    sections = [
        _cards(report, analysis),
        *(section.html for section in added),
        _errors(analysis),
        _ranges(analysis),
        _table(analysis),
        _histograms(analysis),
        _left_float(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>\n<body>'
        f'<a class="skip" href="#main">Skip to the figures</a>\n{_header(info, report, added)}\n'
        f'<main id="main">\n{chr(10).join(sections)}\n</main>\n'
        f'<footer>Written by fqvit_plugin. FQ-ViT: Lin et al., IJCAI 2022.</footer>\n<script>{SCRIPT}</script>\n'
        '</body></html>\n'
    )


def _header(info: PageInfo, report: Report, added: Sequence[Section]) -> str:
    facts = {
        'Scheme': f'{report.scheme.name}, {report.recipe}',
        'Model': info.model,
        'Calibrated on': info.calibration,
        'Date': info.date,
        'Versions': ', '.join(f'{name} {version}' for name, version in info.versions.items()),
    }
    items = ''.join(f'<div><dt>{k}:</dt><dd>{escape(v)}</dd></div>' for k, v in facts.items() if v)
    links = {
        **{section.anchor: section.title for section in added},
        'errors': 'Errors',
        'ranges': 'Ranges',
        'table': 'All tensors',
        'histograms': 'Histograms',
        'float': 'Float',
    }
    nav = ''.join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in links.items())
    return (
        f'<header><h1>{escape(info.title)}</h1><p>FQ-ViT calibration report</p><dl class="facts">{items}</dl>'
        f'<nav aria-label="Sections"><ul>{nav}</ul></nav></header>'
    )


def _breakable(path: str) -> str:
    """A path that may break after its dots."""
    return re.sub(r'\.(?=[A-Za-z])', '.<wbr>', escape(path))


def _card(label: str, figure: str, note: str, kind: str = '') -> str:
    return (
        f'<div class="card"><div class="label">{escape(label)}</div><div class="figure {kind}">{escape(figure)}</div>'
        f'<div class="note">{_breakable(note)}</div></div>'
    )


def _cards(report: Report, analysis: Analysis) -> str:
    end, kinds = analysis.end_to_end, report.kinds()
    worst = analysis.worst(1)
    cards = [
        _card(
            'Size',
            f'{report.quantized_bytes / 1e6:.2f} MB',
            f'{report.float_bytes / 1e6:.2f} MB in float; {report.quantized_bytes / report.float_bytes:.1%} of it',
        ),
        _card(
            'Q layers',
            str(len(report.entries)),
            ', '.join(f'{count} {kind} {bits}' for (kind, bits), count in kinds),
        ),
        _card('Outputs, SQNR', format_decibels(end.sqnr), f'{end.images} calibration images', quality(end.sqnr)),
    ]
    if end.agreement is not None:
        note = 'images with the same first class; a calibration figure, not an accuracy'
        cards.append(_card('Agreement with float', f'{end.agreement:.1%}'.replace('%', ' %'), note))
    if worst:
        cards.append(_card('Worst tensor', format_decibels(worst[0].sqnr), worst[0].path, quality(worst[0].sqnr)))
    return f'<section aria-label="Summary"><div class="cards">{"".join(cards)}</div></section>'


def role_panels(analysis: Analysis) -> list[tuple[str, Sequence[TensorRecord]]]:
    """Tensors of one role side by side; those that occur once share a panel."""
    roles = analysis.roles()
    panels: list[tuple[str, Sequence[TensorRecord]]] = [(r, t) for r, t in roles.items() if len(t) > 1]
    single = [tensors[0] for tensors in roles.values() if len(tensors) == 1]
    for name, members in (
        ('weights outside the blocks', [r for r in single if r.is_weight]),
        ('activations outside the blocks', [r for r in single if not r.is_weight]),
    ):
        if members:
            panels.append((name, members))
    return panels


def role_title(role: str) -> str:
    """The part of a role that tells it from others: what comes after the last block's number."""
    return role.rpartition('.#.')[2]


def plot(svg: str, top: str, bottom: str, members: Sequence[TensorRecord]) -> str:
    first, last = (f'{_place(members[i])}' for i in (0, -1))
    if len(members) < 2 or first == last:
        first, last = 'in the order', 'of the network'
    return (
        f'<div class="plot"><div class="y"><span>{top}</span><span>{bottom}</span></div>{svg}'
        f'<div class="x"><span>{escape(first)}</span><span>{escape(last)}</span></div></div>'
    )


def _place(record: TensorRecord) -> str:
    """The numbers of the block: ``1.0`` for stage 1, block 0."""
    return '.'.join(part for part in record.block.split('.') if part.isdigit())


def _describe(record: TensorRecord) -> str:
    text = f'{record.path}: {format_decibels(record.sqnr)}'
    return text if record.total_sqnr is None else f'{text}, in the model {format_decibels(record.total_sqnr)}'


def _errors(analysis: Analysis) -> str:
    finite = [v for r in analysis.tensors for v in (r.sqnr, r.total_sqnr or 0) if math.isfinite(v)]
    top = 10.0 * math.ceil(max([40.0, *finite]) / 10)
    panels = []
    for role, members in role_panels(analysis):
        svg = bars(
            [r.sqnr for r in members],
            [r.total_sqnr for r in members],
            top,
            [quality(r.sqnr) for r in members],
            [_describe(r) for r in members],
            f'Signal-to-noise ratio of {role}: {min(r.sqnr for r in members):.1f} dB at the lowest',
        )
        panels.append(
            f'<div class="panel"><h3>{escape(role_title(role))}</h3>{plot(svg, f"{top:.0f} dB", "0", members)}</div>'
        )
    return (
        '<section id="errors"><h2>Error of every tensor</h2>'
        '<p>Signal-to-quantization-noise ratio (SQNR): higher is better, 6 dB are one bit. Each bar is one tensor, '
        'in the order of the network; the mark across it is the same tensor inside the quantized model, with the '
        'errors of everything before it.</p>'
        '<ul class="legend"><li><span class="key-good"></span>30 dB and more</li>'
        '<li><span class="key-fair"></span>20 to 30 dB</li><li><span class="key-low"></span>below 20 dB '
        '(14 is normal for probs on the log2 grid)</li>'
        f'<li><span class="mark"></span>in the model</li></ul><div class="panels">{"".join(panels)}</div></section>'
    )


def _ranges(analysis: Analysis) -> str:
    panels = []
    for role, every in role_panels(analysis):
        members = [r for r in every if r.covered is not None and r.observer != 'log2']
        if not members:
            continue
        covered = [r.covered for r in members if r.covered is not None]
        titles = [f'{r.path}: covers {_interval(r.covered)}, seen {_interval(r.seen)}' for r in members]
        seen = [r.seen for r in members]
        svg = ranges(covered, seen, titles, f'Covered and seen ranges of {role}')
        ends = [0.0, *itertools.chain.from_iterable((*covered, *seen))]
        low, high = f'{min(ends):.3g}', f'{max(ends):.3g}'
        panels.append(f'<div class="panel"><h3>{escape(role_title(role))}</h3>{plot(svg, high, low, members)}</div>')
    return (
        '<section id="ranges"><h2>Ranges</h2><p>What the integer grid covers and which values occurred. A grid much '
        'wider than its values wastes codes; values beyond the grid saturate. The line is zero.</p>'
        '<ul class="legend"><li><span class="key-covered"></span>covered by the grid</li>'
        '<li><span class="key-seen"></span>seen</li></ul>'
        f'<div class="panels">{"".join(panels)}</div></section>'
    )


def _interval(pair: tuple[float, float] | None) -> str:
    return '–' if pair is None else f'{pair[0]:.4g} to {pair[1]:.4g}'


_COLUMNS = (
    'Tensor', '#SQNR, dB', '#In the model, dB', '#Saturated', 'Layer', 'Bits', 'Observer', '#Codes used', '#Scale',
    '#Highest scale', '#Zero point', 'PTF', '#Low', '#High', '#Seen low', '#Seen high',
)  # fmt: skip


def _table(analysis: Analysis) -> str:
    head = ''.join(f'<th scope="col"{" class=n" if c[0] == "#" else ""}>{c.lstrip("#")}</th>' for c in _COLUMNS)
    rows = ''.join(_row(record) for record in analysis.tensors)
    kinds = ''.join(f'<option>{escape(kind)}</option>' for kind in sorted({r.kind for r in analysis.tensors}))
    return (
        '<section id="table"><h2>All tensors</h2><p>The median scale over the channels, the highest beside it. PTF: '
        'channels with the factor 1, 2, 4, ... over the finest scale in use.</p><div id="tools" class="tools" hidden>'
        '<label>Find <input id="filter" type="search" autocomplete="off"></label><label>Layer <select id="kind">'
        f'<option value="">all</option>{kinds}</select></label><span id="found" role="status"></span></div>'
        '<div class="scroll" tabindex="0" role="region" aria-label="All tensors"><table id="tensors">'
        '<caption class="visually-hidden">Every quantized tensor, its error, its scale and its range</caption>'
        f'<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _row(r: TensorRecord) -> str:
    scales = r.scales
    zero = '' if scales is None else ' to '.join(str(z) for z in dict.fromkeys(scales.zero_point))
    covered = (None, None) if r.covered is None else r.covered
    cells = [
        _cell(r.sqnr, format_decibels(r.sqnr).removesuffix(' dB'), quality(r.sqnr)),
        _cell(r.total_sqnr, format_decibels(r.total_sqnr).removesuffix(' dB')),
        _cell(r.saturated, format_share(r.saturated)),
        *(f'<td>{escape(text)}</td>' for text in (r.kind, r.bits, r.observer)),
        _cell(r.codes_used / r.codes if r.codes else None, f'{r.codes_used} of {r.codes}'),
        _cell(None if scales is None else scales.median),
        _cell(None if scales is None else scales.highest),
        _cell(None if scales is None else scales.zero_point[0], zero),
        f'<td>{escape(" / ".join(map(str, scales.shifts)) if scales else "")}</td>',
        *(_cell(v) for v in (*covered, *r.seen)),
    ]
    return f'<tr data-kind="{escape(r.kind)}"><th scope="row">{_breakable(r.path)}</th>{"".join(cells)}</tr>'


def _cell(value: float | None, text: str | None = None, kind: str = '') -> str:
    """A number with the value to sort by; infinity sorts above all."""
    if value is None or math.isnan(value):
        return '<td class="n" data-value="">–</td>'
    key = 'Infinity' if value == math.inf else '-Infinity' if value == -math.inf else f'{value:.6g}'
    return f'<td class="n {kind}" data-value="{key}">{escape(f"{value:.4g}" if text is None else text)}</td>'


def _histograms(analysis: Analysis) -> str:
    groups = itertools.groupby(analysis.tensors, key=lambda r: r.block)
    parts = []
    for block, members in groups:
        figures = list(map(_figure, members))
        plural = '' if len(figures) == 1 else 's'
        parts.append(
            f'<details><summary>{escape(block)} <span class="soft">({len(figures)} tensor{plural})</span></summary>'
            f'<div class="panels">{"".join(figures)}</div></details>'
        )
    return (
        '<section id="histograms"><h2>Histograms</h2>'
        '<p>Of the values over the range the grid covers, and of the '
        'codes from the lowest to the highest. Heights are square roots of the counts, so that rare values show.</p>'
        f'<p id="opener" hidden><button type="button" id="open">Open all</button></p>{"".join(parts)}</section>'
    )


def _figure(r: TensorRecord) -> str:
    caption = f'{r.bits}, {r.observer}: {format_decibels(r.sqnr)}, {format_share(r.saturated)} saturated'
    plots = ''
    if r.covered is not None:
        values = histogram_path(r.value_counts, f'Values of {r.path}')
        codes = histogram_path(r.code_counts, f'Codes of {r.path}, {r.codes_used} of {r.codes} used')
        plots = (
            f'{values}<div class="ends"><span>{r.covered[0]:.3g}</span><span>values</span>'
            f'<span>{r.covered[1]:.3g}</span></div>'
            f'{codes}<div class="ends"><span>codes: {r.codes_used} of {r.codes} used</span></div>'
        )
    head = f'<h3>{_breakable(r.path)}</h3><figcaption>{escape(caption)}</figcaption>'
    return f'<figure class="panel">{head}{plots}</figure>'


def _left_float(report: Report) -> str:
    parts = ''.join(
        f'<details><summary>{escape(reason)} <span class="soft">({len(paths)})</span></summary>'
        f'<ul>{"".join(f"<li>{escape(path)}</li>" for path in paths)}</ul></details>'
        for reason, paths in report.reasons()
    )
    return (
        '<section id="float"><h2>What stays float, and why</h2>'
        f'<p>Biases, class and position parameters are stored in float.</p>{parts}</section>'
    )
