"""Line charts, small multiples and stacked bars as inline SVG, written by hand: no plotting library, no script.

Coordinates are rounded, so the same numbers give the same text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLORS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a", "#9a6700", "#1b7c83")
INK, QUIET, GRID = "#1f2328", "#656d76", "#e4e7eb"

Number = float | None


@dataclass(frozen=True)
class Series:
    """One line. x increasing; y, low and high of the same length, None or NaN where there is no value (a gap).

    points: drawn faintly behind the line, for the raw values of a smoothed one. dots: mark each value.
    """

    label: str
    x: Sequence[float]
    y: Sequence[Number]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None
    points: Sequence[Number] | None = None
    dots: bool = False
    color: str = COLORS[0]


@dataclass(frozen=True)
class _Frame:
    """Plot area in pixels and the data ranges it spans."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, value: float) -> str:
        return _px(self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left))

    def py(self, value: float) -> str:
        share = (value - self.y[0]) / (self.y[1] - self.y[0])
        return _px(self.bottom - min(1.0, max(0.0, share)) * (self.bottom - self.top))


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "iteration",
    percent: bool = False,
    y_range: tuple[float, float] | None = None,
    reference: float | None = None,
    size: tuple[int, int] = (440, 250),
    legend: bool = True,
) -> str:
    """Draw lines with interval bands, axes and a legend (where there are several labels) as one ``<svg>``.

    percent: show y times 100 with a percent sign. y_range: fixed ends of the y axis; by default what the values span.
    reference: a dashed level. size: width and height in pixels. Without any value it says so in place of lines.
    """
    width, height = size
    names = [(item.label, item.color) for item in series if item.label] if legend and len(series) > 1 else []
    legend_svg, rows = _legend(names, width)
    head = 24 + 16 * rows
    body: list[str] = [_text(8, 15, title, "title"), legend_svg]
    spans = _spans(series, y_range, reference)
    if spans is None:
        body.append(_text(width / 2, height / 2, "no values yet", "quiet", "middle"))
    else:
        ticks = nice_ticks(*spans[1], 5)
        labels = [_label(tick, ticks, percent) for tick in ticks]
        y = spans[1] if y_range is not None else (min(spans[1][0], ticks[0]), max(spans[1][1], ticks[-1]))
        left = 16 + 6.6 * max(len(label) for label in labels)
        frame = _Frame(left, head + 8, width - 12, height - 36, spans[0], y)
        body += _axes(frame, ticks, labels, x_label)
        if reference is not None:
            level = frame.py(reference)
            body.append(f'<path class="level" d="M{_px(frame.left)} {level}H{_px(frame.right)}"/>')
        body += [_line(item, frame) for item in series]
    return _svg(width, height, title, body)


@dataclass(frozen=True)
class Trace:
    """Points joined in their own order, for a scatter. points: (x, y, name); low, high: ends of y, None for none."""

    label: str
    points: Sequence[tuple[float, float, str]]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    color: str = COLORS[0]


def scatter_chart(
    traces: Sequence[Trace], *, title: str, x_label: str, size: tuple[int, int] = (440, 280), names: int = 8
) -> str:
    """Draw traces as dots joined in order, with bars for intervals of y, as one ``<svg>``.

    names: of at most so many points of a trace, the first and the last among them, the name stands beside the dot. The dot
    of the last point is larger. Without any finite point it says so.
    """
    width, height = size
    key = [(item.label, item.color) for item in traces if item.label] if len(traces) > 1 else []
    legend_svg, rows = _legend(key, width)
    head = 24 + 16 * rows
    body: list[str] = [_text(8, 15, title, "title"), legend_svg]
    columns = [Series(t.label, [p[0] for p in t.points], [p[1] for p in t.points], t.low, t.high) for t in traces]
    spans = _spans(columns, None, None)
    if spans is None:
        body.append(_text(width / 2, height / 2, "no values yet", "quiet", "middle"))
        return _svg(width, height, title, body)
    ticks = nice_ticks(*spans[1], 5)
    labels = [_label(tick, ticks, False) for tick in ticks]
    y = (min(spans[1][0], ticks[0]), max(spans[1][1], ticks[-1]))
    room = 0.06 * (spans[0][1] - spans[0][0])
    x = (spans[0][0] - room, spans[0][1] + room)
    frame = _Frame(16 + 6.6 * max(len(label) for label in labels), head + 8, width - 24, height - 36, x, y)
    body += [*_axes(frame, ticks, labels, x_label), *(_path(item, frame, names) for item in traces)]
    return _svg(width, height, title, body)


def _path(item: Trace, frame: _Frame, names: int) -> str:
    points = [point for point in item.points if _valid(point[0]) and _valid(point[1])]
    there = [index for index, point in enumerate(item.points) if point in points]
    line = " ".join(f"{frame.px(x)} {frame.py(y)}" for x, y, _ in points)
    parts = (
        [f'<path d="M{line}" fill="none" stroke="{item.color}" stroke-width="1.2" stroke-opacity=".6"/>']
        if line
        else []
    )
    for index in there:
        low = item.low[index] if item.low else None
        high = item.high[index] if item.high else None
        if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
            at = frame.px(item.points[index][0])
            parts.append(
                f'<path d="M{at} {frame.py(low)}V{frame.py(high)}" stroke="{item.color}" stroke-opacity=".35"/>'
            )
    count = min(names, len(points))
    told = {round(i * (len(points) - 1) / max(1, count - 1)) for i in range(count)}
    for index, (x, y, name) in enumerate(points):
        radius = 4 if index == len(points) - 1 else 2.6
        parts.append(f'<circle cx="{frame.px(x)}" cy="{frame.py(y)}" r="{radius}" fill="{item.color}"/>')
        if index in told:
            parts.append(_text(float(frame.px(x)) + 6, float(frame.py(y)) - 5, name, "tick"))
    return "".join(parts)


def small_multiples(
    panels: Sequence[tuple[str, Sequence[Series]]],
    *,
    x_label: str = "iteration",
    percent: bool = False,
    reference: float | None = None,
    size: tuple[int, int] = (230, 170),
) -> str:
    """Draw one small chart a panel (title, series), all with the same y axis, so that panels compare at a glance."""
    spans = [_spans(series, None, reference) for _, series in panels]
    ends = [span[1] for span in spans if span is not None]
    y_range = None
    if ends:
        ticks = nice_ticks(min(low for low, _ in ends), max(high for _, high in ends), 4)
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        y_range = (min(low, ticks[0]), max(high, ticks[-1]))
    return "".join(
        line_chart(
            series, title=title, x_label=x_label, percent=percent, y_range=y_range, reference=reference, size=size,
            legend=False,
        )
        for title, series in panels
    )  # fmt: skip


def stacked_bar(parts: Sequence[tuple[str, float]], *, title: str, unit: str = "s", width: int = 900) -> str:
    """Draw shares of a whole, parts (name, value >= 0), as one bar with a key that gives value and percent."""
    total = sum(value for _, value in parts)
    if total <= 0:
        return _svg(width, 60, title, [_text(8, 15, title, "title"), _text(8, 40, "no values yet", "quiet")])
    body, left, key = [_text(8, 15, title, "title")], 8.0, []
    for index, (name, value) in enumerate(parts):
        color = COLORS[index % len(COLORS)]
        wide = (width - 16) * value / total
        body.append(f'<rect x="{_px(left)}" y="26" width="{_px(wide)}" height="22" fill="{color}"/>')
        left += wide
        key.append((f"{name} {value:.3g} {unit} ({100 * value / total:.1f}%)", color))
    legend, rows = _legend(key, width, top=68)
    return _svg(width, 62 + 16 * rows, title, [*body, legend])


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` multiples of 1, 2, 2.5 or 5 times a power of ten that enclose [low, high]."""
    span = high - low
    if span <= 0:
        raise ValueError(f"nice_ticks: low {low} must be below high {high}")
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power * count >= span * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _valid(value: Number) -> bool:
    return value is not None and math.isfinite(value)


def _spans(
    series: Sequence[Series], y_range: tuple[float, float] | None, reference: float | None
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Ranges of x and y over all values, widened where they have no length; None without values."""
    xs, ys = [], []
    for item in series:
        xs += [x for x, y in zip(item.x, item.y, strict=True) if _valid(y)]
        for column in (item.y, item.low, item.high, item.points):
            ys += [value for value in column or () if value is not None and math.isfinite(value)]
    if not xs:
        return None
    if reference is not None:
        ys.append(reference)
    return _wide(min(xs), max(xs)), y_range if y_range is not None else _wide(min(ys), max(ys))


def _wide(low: float, high: float) -> tuple[float, float]:
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-9):
        return low, high
    if low == high == 0:
        return 0.0, 1.0
    room = 0.5 * abs(low) or 0.5
    return low - room, high + room


def _axes(frame: _Frame, ticks: Sequence[float], labels: Sequence[str], x_label: str) -> list[str]:
    parts = []
    for tick, label in zip(ticks, labels, strict=True):
        if frame.y[0] - 1e-9 <= tick <= frame.y[1] + 1e-9:
            level = frame.py(tick)
            parts.append(f'<path class="grid" d="M{_px(frame.left)} {level}H{_px(frame.right)}"/>')
            parts.append(_text(frame.left - 6, float(level) + 4, label, "tick", "end"))
    below = frame.bottom + 14
    marks = nice_ticks(*frame.x, 5 if frame.right - frame.left > 250 else 3)
    if x_label == "iteration":
        marks = [mark for mark in marks if mark == round(mark)]
    for mark in marks:
        if frame.x[0] <= mark <= frame.x[1]:
            parts.append(_text(float(frame.px(mark)), below, _label(mark, marks, False), "tick", "middle"))
    parts.append(_text((frame.left + frame.right) / 2, below + 16, x_label, "quiet", "middle"))
    return parts


def _label(tick: float, ticks: Sequence[float], percent: bool) -> str:
    """A tick with just the digits that its spacing needs."""
    scale = 100.0 if percent else 1.0
    step = scale * (ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    size = max(abs(scale * value) for value in ticks)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{scale * tick:.2g}" if tick else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1  # steps of 2.5
    return f"{scale * tick:,.{digits}f}" + ("%" if percent else "")


def _line(item: Series, frame: _Frame) -> str:
    parts = []
    columns = item.low, item.high
    if columns[0] is not None and columns[1] is not None:
        for run in _runs(item.x, columns[0], columns[1]):
            there = " ".join(f"{frame.px(x)} {frame.py(high)}" for x, _, high in run)
            back = " ".join(f"{frame.px(x)} {frame.py(low)}" for x, low, _ in reversed(run))
            parts.append(f'<path d="M{there} {back}Z" fill="{item.color}" fill-opacity=".15"/>')
    dots = [(x, y, 1.4, ' fill-opacity=".35"') for x, y, _ in _flat(item.x, item.points)]
    for run in _runs(item.x, item.y, item.y):
        path = " ".join(f"{frame.px(x)} {frame.py(y)}" for x, y, _ in run)
        parts.append(f'<path d="M{path}" fill="none" stroke="{item.color}" stroke-width="1.8"/>')
        dots += [(x, y, 2.6, "") for x, y, _ in run] if item.dots or len(run) == 1 else []
    parts += [
        f'<circle cx="{frame.px(x)}" cy="{frame.py(y)}" r="{radius}" fill="{item.color}"{faint}/>'
        for x, y, radius, faint in dots
    ]
    return "".join(parts)


Point = tuple[float, float, float]


def _flat(x: Sequence[float], y: Sequence[Number] | None) -> list[Point]:
    return [point for run in _runs(x, y, y) for point in run] if y is not None else []


def _runs(x: Sequence[float], first: Sequence[Number], second: Sequence[Number]) -> list[list[Point]]:
    """Stretches of neighbouring points at which both columns have a value."""
    runs: list[list[Point]] = [[]]
    for at, one, two in zip(x, first, second, strict=True):
        if one is not None and two is not None and math.isfinite(one) and math.isfinite(two):
            runs[-1].append((at, one, two))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _legend(names: Sequence[tuple[str, str]], width: int, top: float = 32) -> tuple[str, int]:
    """Keys in rows from ``top`` down, and how many rows they take."""
    parts, left, row = [], 8.0, 0
    for name, color in names:
        need = 22 + 6.3 * len(name)
        if left > 8 and left + need > width:
            left, row = 8.0, row + 1
        level = top + 16 * row
        parts.append(f'<rect x="{_px(left)}" y="{_px(level - 7)}" width="10" height="6" fill="{color}"/>')
        parts.append(_text(left + 14, level, name, "key"))
        left += need
    return "".join(parts), row + 1 if names else 0


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{_px(x)}" y="{_px(y)}" class="{kind}"{place}>{html.escape(text)}</text>'


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    name = html.escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" aria-label="{name}">'
        + "".join(body)
        + "</svg>"
    )


STYLE = f"""
svg {{ font: 11px system-ui, sans-serif; fill: {INK}; max-width: 100%; height: auto; }}
svg .title {{ font-size: 13px; font-weight: 600; }}
svg .quiet, svg .tick {{ fill: {QUIET}; }}
svg .grid {{ stroke: {GRID}; fill: none; }}
svg .level {{ stroke: {QUIET}; stroke-dasharray: 4 3; fill: none; }}
"""
"""Rules for the page that holds the charts."""
