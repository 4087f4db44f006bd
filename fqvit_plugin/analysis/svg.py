"""Small plots as SVG text: bars over a shared scale, ranges, histograms.

The drawings hold no text and stretch to the width of their box, so that they stay readable on a telephone; titles
and axis labels are HTML beside them. Colours are classes of the page's style sheet, so they follow light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

__all__ = ['bands', 'bars', 'histogram_path', 'ranges', 'strip']

WIDTH, HEIGHT = 300.0, 100.0


def _svg(body: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(label)}">{body}</svg>'
    )


def _number(value: float) -> str:
    return f'{value:.2f}'.rstrip('0').rstrip('.')


def bars(
    values: Sequence[float],
    marks: Sequence[float | None],
    top: float,
    classes: Sequence[str],
    titles: Sequence[str],
    label: str,
) -> str:
    """One bar per value from 0 up to ``top``, with a mark across it where ``marks`` has one.

    Args:
        values, marks: cut off at 0 and ``top``; NaN draws nothing.
        classes: style class of each bar.
        titles: tooltip of each bar.
        label: what a screen reader says.
    """
    slot = WIDTH / max(len(values), 1)
    body = [_line(HEIGHT * (1 - level / top)) for level in _levels(top)]
    for i, (value, mark, name, title) in enumerate(zip(values, marks, classes, titles, strict=True)):
        left, width = i * slot + slot * 0.12, slot * 0.76
        drawn = []
        if not math.isnan(value):
            y = HEIGHT * (1 - _share(value, top))
            drawn.append(_rect(left, y, width, HEIGHT - y, name))
        if mark is not None and not math.isnan(mark):
            drawn.append(_rect(i * slot, HEIGHT * (1 - _share(mark, top)) - 1.2, slot, 2.4, 'mark'))
        body.append(f'<g><title>{html.escape(title)}</title>{"".join(drawn)}</g>')
    return _svg(''.join(body), label)


def ranges(
    outer: Sequence[tuple[float, float]], inner: Sequence[tuple[float, float]], titles: Sequence[str], label: str
) -> str:
    """A floating bar from low to high per entry of ``outer``, and a narrower one for ``inner`` in it."""
    ends = [value for pair in (*outer, *inner) for value in pair if math.isfinite(value)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    span = (high - low) or 1.0
    slot = WIDTH / max(len(outer), 1)
    body = []
    for i, (wide, narrow, title) in enumerate(zip(outer, inner, titles, strict=True)):
        drawn = ''
        for (bottom, top), share, name in ((wide, 0.8, 'covered'), (narrow, 0.3, 'seen')):
            y, height = HEIGHT * (high - top) / span, max(HEIGHT * (top - bottom) / span, 0.5)
            drawn += _rect(i * slot + slot * (1 - share) / 2, y, slot * share, height, name)
        body.append(f'<g><title>{html.escape(title)}</title>{drawn}</g>')
    return _svg(''.join(body) + _line(HEIGHT * high / span), label)


def histogram_path(counts: Sequence[int], label: str) -> str:
    """A filled histogram, the highest bin at the top.

    Heights are square roots of the counts, or the one bin that most values share would flatten all others.
    """
    highest = math.sqrt(max([1, *counts]))
    steps = [f'M0 {HEIGHT:g}']
    for i, count in enumerate(counts):
        y = _number(HEIGHT * (1 - math.sqrt(count) / highest))
        steps.append(f'V{y}H{_number(WIDTH * (i + 1) / len(counts))}')
    return _svg(f'<path class="area" d="{"".join(steps)}V{HEIGHT:g}Z"/>', label)


def bands(layers: Sequence[tuple[Sequence[float], Sequence[float], str]], label: str) -> str:
    """Bands over channels, one before the other, from a low to a high end of each channel.

    Heights are square roots of the distances from zero, up and down, or one wide channel would flatten all others.

    Args:
        layers: low ends, high ends and style class of each band; the ends of one band are as many.
        label: what a screen reader says.
    """
    ends = [_root(v) for lows, highs, _ in layers for v in (*lows, *highs)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    span = (high - low) or 1.0

    def y(value: float) -> str:
        return _number(HEIGHT * (high - _root(value)) / span)

    body = []
    for lows, highs, name in layers:
        edges = [_number(WIDTH * i / max(len(lows), 1)) for i in range(len(lows) + 1)]
        there = ''.join(f'V{y(value)}H{edges[i + 1]}' for i, value in enumerate(highs))
        back = ''.join(f'V{y(value)}H{edges[len(lows) - i - 1]}' for i, value in enumerate(reversed(lows)))
        body.append(f'<path class="{name}" d="M0 {y(0.0)}{there}{back}Z"/>')
    return _svg(''.join(body) + _line(HEIGHT * high / span), label)


def strip(share: float, name: str, label: str) -> str:
    """One bar from the left, ``share`` of the width long; 0 to 1."""
    return _svg(_rect(0, 0, WIDTH * min(max(share, 0.0), 1.0), HEIGHT, name), label)


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _share(value: float, top: float) -> float:
    return min(max(value / top, 0.0), 1.0)


def _levels(top: float) -> range:
    return range(10, int(top), 10)


def _rect(x: float, y: float, width: float, height: float, name: str) -> str:
    x, y, width, height = (_number(v) for v in (x, y, width, height))  # type: ignore[assignment]
    return f'<rect class="{name}" x="{x}" y="{y}" width="{width}" height="{height}"/>'


def _line(y: float) -> str:
    return f'<line class="rule" x1="0" x2="{WIDTH:g}" y1="{_number(y)}" y2="{_number(y)}"/>'
