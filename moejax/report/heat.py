"""Heat maps: a small palette PNG inside an SVG with axes.

Colours are laid over the page's background with an opacity that grows with the value, so that one picture does in
light and in dark: what is usual is the background itself.
"""

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from moejax.report.axes import Scale, round_step, short, tick_names
from moejax.report.chart import HALF, LETTER, THIRD, figure, svg

RED, BLUE, TEAL, AMBER, VIOLET, GREY = "#dc4a3f", "#3a7bd5", "#12917f", "#d98a12", "#a21caf", "#808080"
LEVELS = 63  # on either side of the middle: more would be neither seen nor compressed
MISSING, NOTHING = 255, 254  # numbers of the palette: no value; an expert without a token


@dataclass(frozen=True)
class Palette:
    """How numbers become colours: `under` below the middle, `over` above, each more opaque the farther away."""

    under: str
    over: str
    stops: tuple[tuple[float, str], ...]  # of the legend: -1 to 1, and the number there
    nothing: str = ""  # what the colour of NOTHING means, if it is used

    def colours(self) -> np.ndarray:
        """The palette of the PNG, uint8 [256, 4] of RGBA; index LEVELS is the middle."""
        found = np.zeros((256, 4), np.uint8)
        for index in range(2 * LEVELS + 1):
            share = (index - LEVELS) / LEVELS
            found[index] = (*_rgb(self.over if share > 0 else self.under), round(255 * abs(share) ** 0.8))
        found[MISSING], found[NOTHING] = (*_rgb(GREY), 70), (*_rgb(VIOLET), 255)
        return found


LOAD = Palette(BLUE, RED, ((-1, "≤ ¼"), (-0.5, "½"), (0, "1"), (0.5, "2"), (1, "≥ 4")), "no token")


def load_levels(load: np.ndarray) -> np.ndarray:
    """The palette's numbers of relative loads, uint8: doubling and halving are the same distance."""
    with np.errstate(divide="ignore"):
        levels = _levels(np.log2(load) / 2)
    return np.where(load == 0, NOTHING, levels).astype(np.uint8)


def amount_palette(most: float) -> Palette:
    """For numbers from 0 to `most`."""
    return Palette(RED, RED, ((0, "0"), (0.5, short(most / 2)), (1, f"≥ {short(most)}")))


def signed_palette(most: float) -> Palette:
    """For numbers from -`most` to `most`."""
    name = short(most)
    return Palette(AMBER, TEAL, ((-1, f"-{name}"), (0, "0"), (1, name)))


def signed_levels(values: np.ndarray, most: float) -> np.ndarray:
    """The palette's numbers of values from -`most` to `most`, uint8."""
    return _levels(values / (most or 1.0)).astype(np.uint8)


def _levels(shares: np.ndarray) -> np.ndarray:
    levels = LEVELS + np.round(LEVELS * np.clip(np.nan_to_num(shares, nan=0.0, posinf=1, neginf=-1), -1, 1))
    return np.where(np.isnan(shares), MISSING, levels)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


# ------------------------------------------------------------------------------------------------------------- files


def png(levels_HW: np.ndarray, palette_C4: np.ndarray) -> bytes:
    """A PNG of palette numbers, uint8 [H, W], with the RGBA colours of a palette, uint8 [256, 4]."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width = levels_HW.shape
    before = np.pad(levels_HW, ((0, 0), (1, 0)))[:, :-1]
    rows = np.pad(levels_HW - before, ((0, 0), (1, 0)), constant_values=1)  # filter 1: what differs from the left
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, palette
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            chunk(b"PLTE", palette_C4[:, :3].tobytes()),
            chunk(b"tRNS", palette_C4[:, 3].tobytes()),
            chunk(b"IDAT", zlib.compress(rows.astype(np.uint8).tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )


# ----------------------------------------------------------------------------------------------------------- figures


def heat_map(
    title: str,
    unit: str,
    levels_HW: np.ndarray,
    palette: Palette,
    *,
    rows: Sequence[str],
    columns: np.ndarray,
    row_name: str,
    column_name: str,
    words: Sequence[str] = (),
    note: str = "",
    dividers: Sequence[int] = (),
    small: bool = False,
) -> str:
    """A figure of palette numbers, uint8 [H, W].

    Args:
        title: of the figure.
        unit: of the numbers, said behind the title.
        levels_HW: numbers of the palette.
        palette: what they mean.
        rows: a name for each row.
        columns: a number for each column, ascending.
        row_name: what rows are.
        column_name: what columns are.
        words: what each row says under the pointer; none: nothing.
        note: a sentence below.
        dividers: columns before which there is a line.
        small: smaller, and without a legend.
    """
    height, width = levels_HW.shape
    left = 14 + LETTER * max(len(row_name), *map(len, rows))
    whole = THIRD if small else HALF
    wide, high = whole - left - 12, float(min(max(14 * height, 90), 130 if small else 300))
    top, each = 8, high / height
    data = base64.b64encode(png(levels_HW, palette.colours())).decode()
    place = f'x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{high:.1f}"'
    pieces = [
        f'<image class="heat" {place} preserveAspectRatio="none" href="data:image/png;base64,{data}"/>',
        f'<rect class="frame" {place}/>',
        *(f'<path class="divider" d="M{left + wide * at / width:.1f} {top}v{high:.1f}"/>' for at in dividers),
        *_row_axis(rows, left, top, each),
        *_column_axis(columns, left, top + high, wide, column_name),
        f'<text class="y" x="{left - 6:.1f}" y="{top + high + 31:.1f}">{escape(row_name)}</text>',
    ]
    for index, said in enumerate(words):
        box = f'x="{left:.1f}" y="{top + index * each:.2f}" width="{wide:.1f}" height="{each:.2f}"'
        pieces.append(f'<rect class="spot" {box}><title>{escape(said)}</title></rect>')
    picture = svg(whole, top + high + 38, title, pieces)
    return figure(title, unit, picture, "" if small else _scale(palette), note)


def _row_axis(rows: Sequence[str], left: float, top: float, each: float) -> list[str]:
    """The names of so many rows that they do not touch."""
    every = int(round_step(max(1.0, 12 / each)))
    last = len(rows) - 1
    shown = [n for n in range(len(rows)) if (n % every == 0 and (last - n) * each >= 12) or n == last]
    return [
        f'<text class="y" x="{left - 6:.1f}" y="{top + (n + 0.5) * each + 3.5:.1f}">{escape(rows[n])}</text>'
        for n in shown
    ]


def _column_axis(columns: np.ndarray, left: float, bottom: float, wide: float, name: str) -> list[str]:
    """The numbers of all columns where they have room, else round ones at the columns that are nearest."""
    each = wide / len(columns)
    if (LETTER * len(f"{columns[-1]:,.0f}") + 8) <= each:
        shown, names = list(range(len(columns))), [f"{column:,.0f}" for column in columns]
    else:
        ticks = [t for t in Scale(columns[0], columns[-1], wide).ticks(int(wide / 65)) if t == round(t)]
        shown, names = [int(np.abs(columns - tick).argmin()) for tick in ticks], tick_names(ticks)
    found = []
    for n, words in zip(shown, names, strict=True):
        at = min(left + (n + 0.5) * each, left + wide - LETTER * len(words) / 2)
        found.append(f'<text class="x" x="{at:.1f}" y="{bottom + 16:.1f}">{words}</text>')
    return [*found, f'<text class="end" x="{left + wide:.1f}" y="{bottom + 31:.1f}">{escape(name)}</text>']


def _scale(palette: Palette) -> str:
    """The legend: a bar of the palette's colours with the numbers below."""
    first, last = palette.stops[0][0], palette.stops[-1][0]
    colours = palette.colours()
    steps = np.linspace(first, last, 9)
    parts = []
    for share in steps:
        red, green, blue, opacity = colours[LEVELS + round(LEVELS * share)]
        parts.append(f"rgba({red},{green},{blue},{opacity / 255:.2f})")
    bar = f'<span class="bar" style="background:linear-gradient(90deg,{",".join(parts)})"></span>'
    names = "".join(f"<span>{escape(name)}</span>" for _, name in palette.stops)
    nothing = f'<i style="background:{VIOLET}"></i>{escape(palette.nothing)}' if palette.nothing else ""
    return f'<div class="scale"><div>{bar}<div class="names">{names}</div></div><p>{nothing}</p></div>'
