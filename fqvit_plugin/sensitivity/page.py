"""What the sensitivity analysis adds to the HTML report: effects, channels, attention codes and the worst images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image
from torch import Tensor

from ..analysis.page import Section, plot, role_panels, role_title
from ..analysis.records import Analysis
from ..analysis.svg import bands, bars, histogram_path, strip
from ..analysis.terminal import format_decibels, format_share
from .channels import ChannelRanges
from .records import LEVELS, Effect, Entry, ImageEffect, Sensitivity
from .terminal import format_kl

__all__ = ['Photo', 'sensitivity_sections', 'thumbnail']

ROWS = 30  #: of a table of units
LEAST = 1e-7  #: nats; where the plots of divergences begin
_TITLES = {'group': 'Kinds of tensors', 'block': 'Blocks', 'layer': 'Layers', 'tensor': 'Tensors'}


@dataclass(frozen=True)
class Photo:
    """One of the worst images.

    Args:
        effect: what quantization did to it.
        name: base name of its file, or its number.
        expected, found: names of the float and of the quantized model's classes.
        source: ``data:`` address of a small picture; empty where none is shown.
    """

    effect: ImageEffect
    name: str
    expected: str
    found: str
    source: str = ''


def thumbnail(image: Tensor, size: int = 112) -> str:
    """A small JPEG of (3, H, W) uint8 in BGR, as MMPretrain's pipelines give it, as a ``data:`` address."""
    picture = Image.fromarray(image.flip(0).permute(1, 2, 0).contiguous().cpu().numpy())
    picture.thumbnail((size, size))
    file = io.BytesIO()
    picture.save(file, 'JPEG', quality=70)
    return f'data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode("ascii")}'


def sensitivity_sections(
    result: Sensitivity, analysis: Analysis, channels: Sequence[ChannelRanges] = (), photos: Sequence[Photo] = ()
) -> list[Section]:
    """What :func:`~fqvit_plugin.analysis.page.render_page` adds; sections that have nothing to show are left out.

    Args:
        result: of :func:`~fqvit_plugin.sensitivity.measure.measure_sensitivity`.
        analysis: of the same model.
        channels: of the tensors that matter.
        photos: of the images that changed most.
    """
    sections = [
        Section('effects', 'Effects', _effects(result)),
        Section('per-tensor', 'Per tensor', _per_tensor(result, analysis)),
        Section('channels', 'Channels', _channels(channels)),
        Section('attention', 'Attention codes', _attention(analysis)),
        Section('images', 'Worst images', _images(photos)),
    ]
    return [section for section in sections if section.html]


def _effects(result: Sensitivity) -> str:
    whole = result.quantized
    tables = ''.join(_table(unit, result) for unit in reversed(LEVELS))
    return (
        '<section id="effects"><h2>Where the loss is</h2>'
        f'<p>Divergence (KL) of the class probabilities from the float model’s on {result.images} images, in nats, '
        'and the share of images with the same first class. <b>Only</b>: this unit quantized, the rest in float. '
        '<b>Without</b>: the rest quantized, this unit in float. With everything quantized: '
        f'{escape(_words(whole))}. Bars are square roots.</p>{tables}</section>'
    )


def _words(effect: Effect) -> str:
    return f'{format_kl(effect.kl)} nats, {format_share(effect.agree)} the same'


def _table(unit: str, result: Sensitivity) -> str:
    by = 'only' if any(e.only for e in result.entries if e.unit == unit) else 'without'
    ranked = result.ranked(unit, by)
    entries = ranked[:ROWS]
    if not entries:
        return ''
    highest = {
        d: max(LEAST, *(getattr(e, d).kl for e in entries if getattr(e, d)))
        for d in ('only', 'without')
        if any(getattr(e, d) for e in entries)
    }
    about = ('Bits', 'SQNR') if unit == 'tensor' else ('Tensors',)
    columns = [*about, *(name for d in highest for name in (f'{d.capitalize()}: KL', '', 'Same class'))]
    head = ''.join(f'<th scope="col" class="n">{name}</th>' if name else '<td></td>' for name in columns)
    rows = ''.join(_row(entry, highest) for entry in entries)
    count = '' if len(entries) == len(ranked) else f', the first {len(entries)} of {len(ranked)}'
    return (
        f'<details{" open" if unit == "group" else ""}><summary>{_TITLES[unit]}{count}</summary>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_TITLES[unit]}"><table><thead><tr>'
        f'<th scope="col">Unit</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _row(entry: Entry, highest: Mapping[str, float]) -> str:
    sqnr = escape(format_decibels(entry.sqnr_db))
    about = [str(entry.bits or '–'), sqnr] if entry.unit == 'tensor' else [str(entry.members)]
    cells = [f'<td class="n">{text}</td>' for text in about]
    for direction, top in highest.items():
        effect: Effect | None = getattr(entry, direction)
        if effect is None:
            cells.append('<td class="n">–</td><td></td><td class="n">–</td>')
            continue
        bar = strip(math.sqrt(effect.kl / top), _quality(effect.kl), f'{effect.kl:.2g} nats')
        cells.append(f'<td class="n">{format_kl(effect.kl)}</td><td>{bar}</td>')
        cells.append(f'<td class="n">{format_share(effect.agree)}</td>')
    return f'<tr><th scope="row">{escape(entry.name)}</th>{"".join(cells)}</tr>'


def _quality(kl: float) -> str:
    """Style class: from a hundredth of a nat on first classes change, below a thousandth hardly any does."""
    return 'good' if kl < 1e-3 else 'fair' if kl < 1e-2 else 'low'


def _per_tensor(result: Sensitivity, analysis: Analysis) -> str:
    effects = {e.name: e.only for e in result.entries if e.unit == 'tensor' and e.only and _is_own(e, analysis)}
    levels = {name: 10 * math.log10(max(effect.kl, LEAST) / LEAST) for name, effect in effects.items()}
    top = 10.0 * math.ceil(max([10.0, *levels.values()]) / 10)
    drawn = []
    for role, every in role_panels(analysis):
        members = [r for r in every if r.path in effects]
        if not members:
            continue
        kls = [effects[r.path].kl for r in members]
        titles = [f'{r.path}: {kl:.2g} nats' for r, kl in zip(members, kls, strict=True)]
        svg = bars(
            [levels[r.path] for r in members], [None] * len(members), top, list(map(_quality, kls)), titles,
            f'Divergence of {role}: {max(kls):.2g} nats at the highest',
        )  # fmt: skip
        figure = plot(svg, f'{LEAST * 10 ** (top / 10):.0e}', f'{LEAST:.0e}', members)
        drawn.append(f'<div class="panel"><h3>{escape(role_title(role))}</h3>{figure}</div>')
    if not drawn:
        return ''
    return (
        '<section id="per-tensor"><h2>Effect of every tensor alone</h2><p>Divergence in nats with this one tensor '
        'quantized, in the order of the network; a line is a factor of ten.</p><ul class="legend"><li><span '
        'class="key-good"></span>below 0.001</li><li><span class="key-fair"></span>0.001 to 0.01</li><li><span '
        f'class="key-low"></span>0.01 and more</li></ul><div class="panels">{"".join(drawn)}</div></section>'
    )


def _is_own(entry: Entry, analysis: Analysis) -> bool:
    """Whether it was measured at the bits that the model has."""
    return any(r.path == entry.name and r.bits.endswith(f'int{entry.bits}') for r in analysis.tensors)


def _channels(channels: Sequence[ChannelRanges]) -> str:
    drawn = []
    for ranges in channels:
        low, high = (pick(ranges.grid[i] + ranges.before[i]) for i, pick in ((0, min), (1, max)))
        svg = bands(
            [(*ranges.grid, 'covered'), (*ranges.before, 'seen'), (*ranges.after, 'after')],
            f'Ranges of the {len(ranges.grid[0])} channels of {ranges.path}',
        )
        drawn.append(
            f'<figure class="panel"><h3>{escape(ranges.path)}</h3>{svg}<div class="ends"><span>{low:.3g} to '
            f'{high:.3g}</span><span>{len(ranges.grid[0])} channels</span></div></figure>'
        )
    if not drawn:
        return ''
    return (
        '<section id="channels"><h2>Ranges of channels</h2><p>Of the tensors that cost most alone: what the grid '
        'covers, what each channel holds in the float model, and, as a line, in the quantized one. Heights are '
        'square roots. A channel that fills little of the grid has few codes.</p><ul class="legend"><li><span '
        'class="key-covered"></span>grid</li><li><span class="key-seen"></span>before</li><li><span class="mark">'
        f'</span>after</li></ul><div class="panels">{"".join(drawn)}</div></section>'
    )


def _attention(analysis: Analysis) -> str:
    drawn = []
    for r in analysis.tensors:
        if r.kind == 'QIntSoftmax' and r.code_counts:
            zeros = format_share(r.code_counts[-1] / max(sum(r.code_counts), 1)) if r.observer == 'log2' else ''
            last = f', {zeros} in the last, which is zero' if zeros else ''
            drawn.append(
                f'<figure class="panel"><h3>{escape(r.path)}</h3>'
                f'{histogram_path(r.code_counts, f"Codes of {r.path}")}<div class="ends"><span>{r.codes_used} of '
                f'{r.codes} codes{last}</span></div></figure>'
            )
    if not drawn:
        return ''
    return (
        '<section id="attention"><h2>Codes of the attention probabilities</h2><p>On the log2 grid code k is the '
        'probability 2 to the power -k before rows are normalized, so the left is one and the right is zero. Heights '
        f'are square roots of the counts.</p><div class="panels">{"".join(drawn)}</div></section>'
    )


def _images(photos: Sequence[Photo]) -> str:
    drawn = []
    for photo in photos:
        picture = f'<img src="{photo.source}" alt="{escape(photo.name)}">' if photo.source else ''
        changed = escape(photo.expected)
        if photo.expected != photo.found:
            changed = f'{changed} <span class="low">→ {escape(photo.found)}</span>'
        drawn.append(
            f'<figure class="panel">{picture}<figcaption><b>{format_kl(photo.effect.kl)} nats</b><br>{changed}<br>'
            f'<span class="soft">{escape(photo.name)}</span></figcaption></figure>'
        )
    if not drawn:
        return ''
    return (
        '<section id="images"><h2>Images that changed most</h2><p>Divergence of the fully quantized model from the '
        f'float one, and their first classes.</p><div class="photos">{"".join(drawn)}</div></section>'
    )
