"""Line charts as inline SVG. Colours are CSS variables of the page, so that one figure does in light and in dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from moejax.report.axes import Scale, scale_over, short, thinned, tick_names

WIDE, HALF, THIRD = 1020, 498, 324  # units, which are pixels where the page has room
BUCKETS = {WIDE: 400, HALF: 220}  # parts of a curve of which the extremes are drawn
COLUMNS = {WIDE: 90, HALF: 45}  # that say their numbers under the pointer
FEW_MARKS = 12  # that cross the whole figure; more would hide it
LETTER = 6.4  # units that a letter takes on average, at most


@dataclass(frozen=True)
class Curve:
    """One curve of a chart; x ascends, y may have NaN."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0  # of the page's
    kind: str = "line"  # line, dashed, dots
    faint: np.ndarray | None = None  # drawn thinly behind it: what y is the mean of
    low: np.ndarray | None = None  # a band around it, from low to high
    high: np.ndarray | None = None
    value: str | None = None  # in the legend; None: the last number


@dataclass(frozen=True)
class Span:
    """A part of the x axis with a name."""

    start: float
    end: float
    name: str


@dataclass(frozen=True)
class Mark:
    """Something that happened at a place of the x axis."""

    at: float
    kind: str  # restart, fault
    words: str


def chart(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    x_name: str = "step",
    note: str = "",
    log: bool = False,
    zero: bool = False,
    lines: Sequence[tuple[float, str]] = (),
    spans: Sequence[Span] = (),
    marks: Sequence[Mark] = (),
    width: int = HALF,
) -> str:
    """A figure with its title, legend and axes; an empty string where no curve has a finite number.

    Args:
        title: of the figure.
        unit: of the y axis, said behind the title.
        curves: at least one.
        x_name: what x counts.
        note: a sentence below the figure.
        log: a logarithmic y axis.
        zero: the y axis begins at 0.
        lines: heights at which a dashed line lies, with their names.
        spans: named parts of the x axis, above the figure.
        marks: things that happened.
        width: WIDE or HALF.
    """
    curves = [curve for curve in curves if np.isfinite(curve.y).any()]
    if not curves:
        return ""
    height, top = (330 if width == WIDE else 220), 22 if spans else 8
    pools = [pool for c in curves for pool in (c.y, c.faint, c.low, c.high) if pool is not None]
    values = np.concatenate(pools)
    y, cut = scale_over(values, height - top - 36, log=log, zero=zero)
    if not cut:
        y, _ = scale_over(np.append(values, [value for value, _ in lines]), y.length, log=log, zero=zero)
    ticks = y.ticks(6 if width == WIDE else 5)
    names = tick_names(ticks)
    left = 12 + LETTER * max(map(len, names), default=1)
    first, last = min(c.x[0] for c in curves), max(c.x[-1] for c in curves)
    spread = (last - first) or 1
    x = Scale(first - 0.01 * spread, last + 0.01 * spread, width - left - 12)
    inside = [
        *_spans(spans, x, y.length),
        *(f'<path class="ruler" d="M0 {at:.1f}H{x.length:.1f}"/>' for at in y(np.array(ticks))),
        *(f'<path class="level" d="M0 {float(y(value)):.1f}H{x.length:.1f}"/>' for value, _ in lines),
        *_marks(marks, x, y.length),
        *(piece for curve in curves for piece in _curve(curve, x, y, BUCKETS[width])),
        *(_beyond(curves, x, y, x_name) if cut else ()),
        *_columns(curves, x, y.length, x_name, COLUMNS[width]),
    ]
    around = [
        *(
            f'<text class="y" x="{left - 6:.1f}" y="{top + at + 3.5:.1f}">{name}</text>'
            for name, at in zip(names, y(np.array(ticks)), strict=True)
        ),
        *_x_axis(x, left, top + y.length, x_name),
        *_span_names(spans, x, left),
    ]
    box = f'x="{left:.1f}" y="{top}" width="{x.length:.1f}" height="{y.length}"'
    picture = svg(width, height, title, [f"<svg {box}>{''.join(inside)}</svg>", *around])
    above = f"Some values lie above the figure, up to {short(float(np.nanmax(values)))}" if cut else ""
    words = ". ".join(filter(None, (note, above)))
    return figure(title, unit, picture, legend(curves, lines, marks), words, wide=width == WIDE)


def svg(width: float, height: float, title: str, pieces: Sequence[str]) -> str:
    """An SVG of so many units, as wide as there is room."""
    head = f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
    return f"{head}{''.join(pieces)}</svg>"


def figure(title: str, unit: str, picture: str, key: str, note: str = "", *, wide: bool = False) -> str:
    """A figure of the page: title, legend, picture, note. `key` and `picture` are HTML, the rest is text."""
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    note = f"<figcaption>{escape(note)}.</figcaption>" if note else ""
    kind = ' class="wide"' if wide else ""
    return f'<figure{kind}><h3>{escape(title)}{unit}</h3>{key}<div class="scroll">{picture}</div>{note}</figure>'


def legend(curves: Sequence[Curve], lines: Sequence[tuple[float, str]] = (), marks: Sequence[Mark] = ()) -> str:
    """The legend of a chart."""
    items = []
    for curve in curves:
        last = curve.y[np.isfinite(curve.y)][-1]
        value = short(float(last)) if curve.value is None else curve.value
        items.append((f"c{curve.colour} {curve.kind}", f"{escape(curve.name)} <b>{escape(value)}</b>"))
    items += [("level", f"{escape(name)} <b>{short(value)}</b>") for value, name in lines]
    items += [(f"mark {kind}", escape(kind)) for kind in dict.fromkeys(mark.kind for mark in marks)]
    return f'<ul class="key">{"".join(f"<li><i class={quoted(kind)}></i>{words}</li>" for kind, words in items)}</ul>'


def quoted(text: str) -> str:
    """Text as the value of an attribute."""
    return f'"{escape(text)}"'


# ------------------------------------------------------------------------------------------------------------ pieces


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """The path through points, interrupted where y is NaN; a point alone is a dot."""
    pieces, pen = [], False
    for index, (a, b) in enumerate(zip(x, y, strict=True)):
        if not np.isfinite(b):
            pen = False
            continue
        pieces.append(f"{'L' if pen else 'M'}{a:.1f} {b:.1f}")
        if not pen and (index + 1 == len(y) or not np.isfinite(y[index + 1])):
            pieces.append("h.1")
        pen = True
    return "".join(pieces)


def _curve(curve: Curve, x: Scale, y: Scale, buckets: int) -> list[str]:
    pieces = []
    if curve.low is not None and curve.high is not None:
        good = np.isfinite(curve.low) & np.isfinite(curve.high)
        at, low, high = x(curve.x[good]), y(curve.low[good]), y(curve.high[good])
        points = zip(np.concatenate([at, at[::-1]]), np.concatenate([high, low[::-1]]), strict=True)
        pieces.append(f'<polygon class="band" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
    if curve.faint is not None:
        kept = thinned(curve.faint, buckets)
        pieces.append(f'<path class="faint" d="{_path(x(curve.x[kept]), y(curve.faint[kept]))}"/>')
    kept = thinned(curve.y, buckets)
    at, height = x(curve.x[kept]), y(curve.y[kept])
    if curve.kind != "dots" or len(at) > 1:
        pieces.append(f'<path class="{curve.kind}" d="{_path(at, height)}"/>')
    good = np.isfinite(height)
    if curve.kind == "dots" or good.sum() == 1:
        radius = 3 if len(at) < 60 else 1.5
        dots = zip(at[good], height[good], strict=True)
        pieces += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}"/>' for a, b in dots]
    return [f'<g class="c{curve.colour}">{"".join(pieces)}</g>']


def _beyond(curves: Sequence[Curve], x: Scale, y: Scale, x_name: str) -> list[str]:
    """A triangle at the top for the greatest values that lie above the figure."""
    found = []
    for curve in curves:
        values = curve.y if curve.faint is None else curve.faint
        above = [i for i in thinned(values, 40) if np.isfinite(values[i]) and values[i] > y.high]
        for i in sorted(above, key=lambda i: -values[i])[:20]:
            words = escape(f"{curve.name}: {short(float(values[i]))} at {x_name} {curve.x[i]:,.0f}")
            shape = f"M{float(x(curve.x[i])):.1f} 1l4 7h-8z"
            found.append(f'<path class="c{curve.colour} beyond" d="{shape}"><title>{words}</title></path>')
    return found


def _columns(curves: Sequence[Curve], x: Scale, height: float, x_name: str, most: int) -> list[str]:
    """Invisible columns over the figure; under the pointer each says the numbers in its middle."""
    places = np.unique(np.concatenate([curve.x for curve in curves]))
    places = places[np.unique(np.linspace(0, len(places) - 1, most).round().astype(int))]
    middles = (places[1:] + places[:-1]) / 2
    edges = [x.low, *middles, x.high]
    found = []
    for place, start, end in zip(places, edges[:-1], edges[1:], strict=True):
        words = [f"{x_name} {place:,.0f}"]
        for curve in curves:
            index = min(int(np.searchsorted(curve.x, place)), len(curve.x) - 1)
            if start <= curve.x[index] <= end and np.isfinite(curve.y[index]):
                words.append(f"{curve.name}: {short(float(curve.y[index]))}")
        left, right = float(x(start)), float(x(end))
        box = f'x="{left:.1f}" width="{right - left:.1f}" height="{height:.0f}"'
        found.append(f'<rect class="spot" {box}><title>{escape(chr(10).join(words))}</title></rect>')
    return found


def _x_axis(x: Scale, left: float, bottom: float, name: str) -> list[str]:
    ticks = [tick for tick in x.ticks(max(2, int(x.length / 75))) if tick == round(tick) and tick >= 0]
    names = tick_names(ticks)
    found = [f'<path class="axis" d="M{left:.1f} {bottom:.1f}h{x.length:.1f}"/>']
    for tick, words in zip(ticks, names, strict=True):
        at = left + float(x(tick))
        found.append(f'<path class="axis" d="M{at:.1f} {bottom:.1f}v4"/>')
        found.append(f'<text class="x" x="{at:.1f}" y="{bottom + 16:.1f}">{words}</text>')
    return [*found, f'<text class="end" x="{left + x.length:.1f}" y="{bottom + 31:.1f}">{escape(name)}</text>']


def _spans(spans: Sequence[Span], x: Scale, height: float) -> list[str]:
    found = []
    for number, span in enumerate(spans):
        start, end = (float(x(min(max(at, x.low), x.high))) for at in (span.start, span.end))
        box = f'x="{start:.1f}" width="{max(end - start, 0):.1f}" height="{height:.0f}"'
        found.append(f'<rect class="phase{number % 2}" {box}/>')
    return found


def _span_names(spans: Sequence[Span], x: Scale, left: float) -> list[str]:
    """The names of the spans above the figure, where they have room; all under the pointer."""
    found = []
    for span in spans:
        start, end = (float(x(min(max(at, x.low), x.high))) for at in (span.start, span.end))
        name = escape(span.name)
        fits = LETTER * len(span.name) < end - start
        shown = f'<text class="phase" x="{left + (start + end) / 2:.1f}" y="14">{name}</text>' if fits else ""
        box = f'x="{left + start:.1f}" y="3" width="{max(end - start, 0):.1f}" height="17"'
        found.append(f'{shown}<rect class="spot" {box}><title>{name}</title></rect>')
    return found


def _marks(marks: Sequence[Mark], x: Scale, height: float) -> list[str]:
    found = []
    top = 0 if len(marks) <= FEW_MARKS else height - 14
    for mark in marks:
        at, words = float(x(mark.at)), f"<title>{escape(mark.words)}</title>"
        found.append(f'<path class="mark {mark.kind}" d="M{at:.1f} {top:.1f}V{height:.1f}">{words}</path>')
    return found
