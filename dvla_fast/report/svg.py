"""Charts as inline SVG, drawn by our own few functions so that they follow the page's colours.

No colour is written here: strokes and fills come from classes (``c0`` … ``c5``, ``muted``) that the
page's style sheet maps to variables for light and dark. All charts are about 400 units wide, so
that their text is readable on a phone without scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = 6
_WIDTH = 400
_MOST_POINTS = 400  # of a line: more cannot be seen
_MANY_ROWS, _SHORT = 8, 22  # of an interval chart: rows, and letters of a name


@dataclass(frozen=True)
class Line:
    """One line of a line chart.

    Attributes:
        points: (x, y), in order of x.
        colour: index of the series' colour; -1: muted.
        dashed, dots: how it is drawn.
        band: (x, low, high) of the shaded area around it.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart: a value and the half width of its interval.

    Attributes:
        note: more for the mark's tooltip.
        aside: short words at the end of the label's line, such as a p-value; never cut.
    """

    label: str
    value: float
    half: float | None = None
    colour: int = 0
    note: str = ""
    aside: str = ""


@dataclass(frozen=True)
class Mark:
    """Points of one kind in a scatter chart: ``shape`` is dot, star or cross."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    shape: str = "dot"


@dataclass
class Frame:
    """The coordinates of a plot: data to SVG units."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: float = _WIDTH
    height: float = 220
    left: float = 44
    right: float = 10
    top: float = 22
    bottom: float = 34
    parts: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        """Horizontal place of a value."""
        return self.left + _share(value, self.x) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Vertical place of a value."""
        return (
            self.height
            - self.bottom
            - _share(value, self.y) * (self.height - self.top - self.bottom)
        )

    def axes(self, x_label: str, y_label: str, whole: bool = False) -> None:
        """Draw grid, ticks and labels; ``whole``: x counts something, such as epochs."""
        for value in ticks(*self.y, 4):
            y = self.py(value)
            self.parts.append(
                f'<path class="rule" d="M{self.left:g} {y:.1f}H{self.width - self.right:g}"/>'
                f'<text x="{self.left - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">'
                f"{tick_label(value)}</text>"
            )
        for value in ticks(*self.x, 5, whole):
            self.parts.append(
                f'<text x="{self.px(value):.1f}" y="{self.height - self.bottom + 16:g}" '
                f'text-anchor="middle">{tick_label(value)}</text>'
            )
        right = self.width - self.right
        self.parts.append(
            f'<text class="label" x="{right:g}" y="{self.height - 4:g}" text-anchor="end">'
            f"{escape(x_label)}</text>"
            f'<text class="label" x="{self.left:g}" y="12">{escape(y_label)}</text>'
        )

    def svg(self, alt: str) -> str:
        """Return the finished picture with its text alternative."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{escape(alt)}">{"".join(self.parts)}</svg>'
        )


def _share(value: float, bounds: tuple[float, float]) -> float:
    return (value - bounds[0]) / (bounds[1] - bounds[0])


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers inside [low, high], about ``about`` of them; ``whole``: without fractions."""
    raw = (high - low) / max(about, 1)
    if whole:
        raw = max(raw, 1.0)
    size = 10 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(factor * size for factor in factors if factor * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    """Write a round number as it is: four digits would call 0.49075 another number."""
    return number(value, 12)


def number(value: float, digits: int = 4) -> str:
    """Write a number shortly: ``digits`` in all, two fewer where it has an exponent."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.{digits - 3}e}".split("e")
        text = f"{mantissa.rstrip('0').removesuffix('.')}e{int(exponent)}"
        return text.replace("-", "−", 1) if value < 0 else text
    return f"{value:.{digits}g}".replace("-", "−")


def bounds(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    """Range of the finite values with a margin; never empty."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    margin = pad * (high - low) or max(abs(high) * 0.05, 0.05)
    return low - margin, high + margin


def colour(index: int) -> str:
    """Class of a series' colour."""
    return "muted" if index < 0 else f"c{index % COLOURS}"


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    guide: float | None = None,
) -> str:
    """Lines over a common axis.

    Args:
        y_range: limits; None: those of the values.
        guide: value of a faint horizontal line.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [y for line in lines for _, low, high in line.band for y in (low, high)]
    x_range = (min(xs), max(xs)) if xs else (0.0, 1.0)
    if x_range[0] == x_range[1]:
        x_range = (x_range[0] - 0.5, x_range[1] + 0.5)
    frame = Frame(x_range, y_range or bounds(ys))
    frame.axes(x_label, y_label, whole=all(float(x).is_integer() for x in xs))
    if guide is not None:
        frame.parts.append(
            f'<path class="guide" d="M{frame.left:g} {frame.py(guide):.1f}H'
            f'{frame.width - frame.right:g}"/>'
        )
    for line in lines:
        if line.band:
            frame.parts.append(_band(frame, line))
    for line in lines:
        frame.parts.append(_line(frame, line))
    return frame.svg(f"{y_label} over {x_label}. {'; '.join(map(_trend, lines))}.")


def _trend(line: Line) -> str:
    if not line.points:
        return f"{line.name}: nothing recorded"
    (x0, y0), (x1, y1) = line.points[0], line.points[-1]
    if x0 == x1:
        return f"{line.name}: {number(y0)} at {number(x0)}"
    return f"{line.name}: {number(y0)} at {number(x0)}, {number(y1)} at {number(x1)}"


def _thin(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    step = -(-len(points) // _MOST_POINTS)
    kept = list(points[::step]) if step > 1 else list(points)
    if kept and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def _path(frame: Frame, points: Sequence[tuple[float, ...]]) -> str:
    """A path that leaves out what is not finite."""
    commands, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        commands.append(f"{pen}{frame.px(x):.1f} {frame.py(y):.1f}")
        pen = "L"
    return "".join(commands)


def _line(frame: Frame, line: Line) -> str:
    points = _thin(line.points)
    style = f"line {colour(line.colour)}{' dashed' if line.dashed else ''}"
    drawn = f'<path class="{style}" d="{_path(frame, points)}"/>'
    if line.dots or len(points) == 1:
        drawn += "".join(
            f'<circle class="dot {colour(line.colour)}" cx="{frame.px(x):.1f}" '
            f'cy="{frame.py(y):.1f}" r="3"><title>{escape(line.name)}: {number(y)} at '
            f"{number(x)}</title></circle>"
            for x, y in points
            if math.isfinite(y)
        )
    return drawn


def _band(frame: Frame, line: Line) -> str:
    points = [p for p in _thin(line.band) if all(map(math.isfinite, p))]
    upper = [(x, min(high, frame.y[1])) for x, _, high in points]
    lower = [(x, max(low, frame.y[0])) for x, low, _ in reversed(points)]
    return f'<path class="band {colour(line.colour)}" d="{_path(frame, [*upper, *lower])}Z"/>'


def interval_chart(
    rows: Sequence[Interval],
    x_label: str,
    x_range: tuple[float, float] | None = None,
    digits: int = 2,
    guide: float | None = None,
    signed: bool = False,
) -> str:
    """One row a value: its name above, a dot, its interval, and the numbers.

    Args:
        digits: decimals of the numbers.
        guide: value of a faint vertical line.
        signed: write values with their sign, as of differences.
    """
    ends = [
        end for row in rows for end in (row.value - (row.half or 0), row.value + (row.half or 0))
    ]
    limits = x_range or bounds(ends, 0.1)
    # Many rows of short names stand beside their marks; otherwise a name has the line above.
    beside = len(rows) > _MANY_ROWS and max(len(row.label) for row in rows) <= _SHORT
    step = 19 if beside else 38
    height = step * len(rows) + 42
    left = 16 + 6.4 * max(len(row.label) for row in rows) if beside else 8
    frame = Frame(limits, (0.0, 1.0), height=height, left=left, right=72, top=4)
    for value in ticks(*limits, 4):
        x = frame.px(value)
        frame.parts.append(
            f'<path class="rule" d="M{x:.1f} 4V{height - 34:g}"/>'
            f'<text x="{x:.1f}" y="{height - 20:g}" text-anchor="middle">{tick_label(value)}</text>'
        )
    if guide is not None:
        frame.parts.append(f'<path class="guide" d="M{frame.px(guide):.1f} 4V{height - 34:g}"/>')
    frame.parts.append(
        f'<text class="label" x="{frame.left:g}" y="{height - 4:g}">{escape(x_label)}</text>'
    )
    spoken: list[str] = []
    for index, row in enumerate(rows):
        place = (8.0, step * index + 18.0) if beside else (frame.left, step * index + 16.0)
        middle = place[1] - 4 if beside else place[1] + 12
        shown = _plus_minus(row, f"{'+' if signed else ''}.{digits}f", digits)
        frame.parts.append(_interval_row(frame, row, place, middle, shown))
        spoken.append(f"{row.label}: {', '.join(filter(None, (shown, row.aside)))}")
    return frame.svg(f"{x_label}. {'; '.join(spoken)}.")


def _plus_minus(row: Interval, form: str, digits: int) -> str:
    known = row.half is not None and math.isfinite(row.half)
    text = format(row.value, form) + (f" ± {row.half:.{digits}f}" if known else "")
    return text.replace("-", "−")


def _interval_row(
    frame: Frame, row: Interval, place: tuple[float, float], y: float, shown: str
) -> str:
    """``place``: of the name; ``y``: of the mark; ``shown``: the numbers."""
    x, name = frame.px(row.value), colour(row.colour)
    right = f'x="{frame.width - 2:g}" text-anchor="end"'
    label = _cut(row.label, 50 if row.aside else 58)
    parts = [f'<text class="row" x="{place[0]:g}" y="{place[1]:g}">{escape(label)}</text>']
    if row.aside:
        parts.append(f'<text class="row" y="{place[1]:g}" {right}>{escape(row.aside)}</text>')
    if row.half is not None and math.isfinite(row.half):
        low, high = frame.px(row.value - row.half), frame.px(row.value + row.half)
        parts.append(f'<path class="whisker {name}" d="M{low:.1f} {y:g}H{high:.1f}"/>')
    parts.append(
        f'<circle class="dot {name}" cx="{x:.1f}" cy="{y:g}" r="4.5"><title>{escape(row.label)}: '
        f"{shown}{escape(row.note)}</title></circle>"
        f'<text class="value" y="{y + 4:g}" {right}>{shown}</text>'
    )
    return "".join(parts)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def scatter(
    marks: Sequence[Mark],
    x_label: str = "",
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    alt: str = "",
) -> str:
    """Points of several kinds; without labels the axes are left out, as a t-SNE's mean nothing."""
    xs = [x for mark in marks for x, _ in mark.points]
    ys = [y for mark in marks for _, y in mark.points]
    frame = Frame(x_range or bounds(xs), bounds(ys))
    if x_label or y_label:
        frame.axes(x_label, y_label)
    else:
        frame.left = frame.right = frame.top = frame.bottom = 8
        frame.height = 320
        frame.parts.append(
            f'<rect class="frame" x="1" y="1" width="{frame.width - 2:g}" '
            f'height="{frame.height - 2:g}" rx="6"/>'
        )
    for mark in marks:
        frame.parts.append(_marks(frame, mark))
    return frame.svg(alt or f"{y_label} against {x_label}, {len(xs)} points.")


def _marks(frame: Frame, mark: Mark) -> str:
    places = [(frame.px(x), frame.py(y)) for x, y in mark.points]
    name = colour(mark.colour)
    if mark.shape == "dot":  # one path of round caps is far shorter than a circle for every point
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
        return f'<path class="points {name}" d="{path}"/>'
    if mark.shape == "cross":
        path = "".join(f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" for x, y in places)
        return f'<path class="cross {name}" d="{path}"/>'
    return "".join(f'<path class="star {name}" d="{_star(x, y)}"/>' for x, y in places)


def _star(x: float, y: float) -> str:
    corners = []
    for k in range(10):
        radius, angle = (9 if k % 2 == 0 else 3.8), math.pi * (k / 5 - 0.5)
        corners.append(f"{x + radius * math.cos(angle):.1f} {y + radius * math.sin(angle):.1f}")
    return f"M{'L'.join(corners)}Z"


def heatmap(rates: Sequence[Sequence[float]], names: Sequence[str], alt: str) -> str:
    """A square matrix of shares in [0, 1]; rows are the truth, NaN is left grey."""
    count = len(names)
    cell = min(44.0, max(9.0, 300 / count))
    longest = min(max(map(len, names)), 18)
    left = min(110.0, 12 + 6.2 * longest)
    width, height = left + count * cell + 6, left + count * cell + 6
    frame = Frame((0, 1), (0, 1), width=max(width, 200), height=height)
    small = " small" if cell < 16 else ""
    for index, name in enumerate(names):
        middle = left + (index + 0.5) * cell
        text = escape(_cut(name, 18))
        frame.parts.append(
            f'<text class="tick{small}" x="{left - 6:.1f}" y="{middle + 3.5:.1f}" '
            f'text-anchor="end">{text}</text>'
            f'<text class="tick{small}" transform="translate({middle + 3.5:.1f} {left - 6:.1f}) '
            f'rotate(-90)">{text}</text>'
        )
    for row in range(count):
        for column in range(count):
            frame.parts.append(_cell(rates[row][column], row, column, left, cell, names))
    return frame.svg(alt)


def _cell(
    value: float, row: int, column: int, left: float, cell: float, names: Sequence[str]
) -> str:
    x, y = left + column * cell, left + row * cell
    size = f'x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}"'
    if value != value:
        return f'<rect class="void" {size}/>'
    kind = "hit" if row == column else "miss"
    drawn = f'<rect class="{kind}" {size} fill-opacity="{max(value, 0.03):.2f}">'
    told = f"{escape(names[row])} taken for {escape(names[column])}: {100 * value:.1f} %"
    drawn += f"<title>{told}</title></rect>"
    if cell >= 24:
        ink = " strong" if value > 0.55 else ""
        drawn += (
            f'<text class="cell{ink}" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" '
            f'text-anchor="middle">{100 * value:.0f}</text>'
        )
    return drawn
