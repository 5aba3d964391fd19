"""Small charts as inline SVG that take their colours and type from the page: light, dark and print alike.

Coordinates are pixels of the view box, y downwards; a chart is scaled by the page, never by its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from markupsafe import Markup

from pipeline.evaluation.frame import Floats

LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 36
"""Margins: room for tick labels and axis titles."""


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers that cover a range: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a tick label: short, thousands as k, tiny numbers by their power of ten."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.4g}"


class Chart:
    """One chart with two linear axes.

    Args:
        x: range of the horizontal axis.
        y: range of the vertical axis.
        x_label: its title.
        y_label: its title.
        about: what the chart shows, for those who hear it.
        width: of the view box, pixels.
        height: of the view box, pixels.
        bare: without axes, for planes that have no units.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str,
        y_label: str,
        about: str,
        width: int = 320,
        height: int = 230,
        bare: bool = False,
    ) -> None:
        self.x, self.y, self.width, self.height = _widened(x), _widened(y), width, height
        self.about = about
        self.left, self.bottom = (RIGHT, TOP) if bare else (LEFT, BOTTOM)
        self._parts: list[str] = []
        if not bare:
            self._axes(x_label, y_label)

    def px(self, value: float) -> float:
        """Return the horizontal pixel of a value."""
        low, high = self.x
        return self.left + (value - low) / (high - low) * (self.width - self.left - RIGHT)

    def py(self, value: float) -> float:
        """Return the vertical pixel of a value."""
        low, high = self.y
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - TOP - self.bottom)

    def _axes(self, x_label: str, y_label: str) -> None:
        left, right, top, bottom = LEFT, self.width - RIGHT, TOP, self.height - BOTTOM
        for tick in ticks(*self.y):
            y = self.py(tick)
            self.add(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
            self.text(left - 6, y + 3.5, number(tick), "end")
        for tick in ticks(*self.x):
            self.text(self.px(tick), bottom + 14, number(tick), "middle")
        self.add(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
        self.text((left + right) / 2, self.height - 5, x_label, "middle", "title")
        middle = (top + bottom) / 2
        self.add(
            f'<text class="title" x="12" y="{middle:.0f}" text-anchor="middle" '
            f'transform="rotate(-90 12 {middle:.0f})">{escape(y_label)}</text>'
        )

    def add(self, element: str) -> None:
        """Add one SVG element."""
        self._parts.append(element)

    def text(self, x: float, y: float, words: str, anchor: str = "start", kind: str = "tick") -> None:
        """Write words at a pixel."""
        self.add(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def diagonal(self) -> None:
        """Draw the line from the lower left to the upper right corner."""
        (x0, x1), (y0, y1) = self.x, self.y
        self.add(f'<path class="guide" d="M{self.px(x0):.1f} {self.py(y0):.1f}L{self.px(x1):.1f} {self.py(y1):.1f}"/>')

    def line(self, x: Sequence[float] | Floats, y: Sequence[float] | Floats, kind: str) -> None:
        """Draw a line through points, skipping those that are not finite."""
        points = [f"{self.px(a):.1f} {self.py(b):.1f}" for a, b in zip(x, y, strict=True) if math.isfinite(b)]
        if points:
            self.add(f'<path class="line {kind}" d="M{"L".join(points)}"/>')

    def band(self, x: Floats, low: Floats, high: Floats, kind: str) -> None:
        """Fill the room between two lines."""
        there = [f"{self.px(a):.1f} {self.py(b):.1f}" for a, b in zip(x, high, strict=True)]
        back = [f"{self.px(a):.1f} {self.py(b):.1f}" for a, b in zip(x[::-1], low[::-1], strict=True)]
        self.add(f'<path class="band {kind}" d="M{"L".join(there + back)}Z"/>')

    def points(self, x: Floats, y: Floats, kind: str, radius: float | Callable[[int], float] = 2.2) -> None:
        """Draw dots; ``radius`` may depend on the index."""
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            r = radius(i) if callable(radius) else radius
            self.add(f'<circle class="dot {kind}" cx="{self.px(a):.1f}" cy="{self.py(b):.1f}" r="{r:.1f}"/>')

    def bars(self, edges: Floats, heights: Floats, kind: str) -> None:
        """Draw a histogram as one filled outline."""
        base = self.py(max(self.y[0], 0.0))
        steps = "".join(
            f"L{self.px(a):.1f} {self.py(h):.1f}L{self.px(b):.1f} {self.py(h):.1f}"
            for a, b, h in zip(edges[:-1], edges[1:], heights, strict=True)
        )
        path = f"M{self.px(edges[0]):.1f} {base:.1f}{steps}L{self.px(edges[-1]):.1f} {base:.1f}Z"
        self.add(f'<path class="bars {kind}" d="{path}"/>')

    def svg(self) -> Markup:
        """Return the chart as an SVG element."""
        return wrap("".join(self._parts), self.width, self.height, self.about)


def wrap(content: str, width: float, height: float, about: str) -> Markup:
    """Return an SVG element around its content."""
    # Safe as markup: every piece of text in it went through escape().
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(about)}">{content}</svg>')


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _widened(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def heat_map(
    values: Floats,
    rows: Sequence[str],
    columns: Sequence[str],
    about: str,
    form: Callable[[float], str] = "{:.2f}".format,
    row_title: str = "",
    column_title: str = "",
) -> Markup:
    """Draw a matrix as shaded cells with their numbers, darkest at the largest; NaN is left empty.

    Args:
        values: (rows, columns), not negative.
        rows: names, top to bottom.
        columns: names, left to right.
        about: what it shows, for those who hear it.
        form: writes a cell's number.
        row_title: what the rows are.
        column_title: what the columns are.
    """
    rows, columns = [_cut(name, 32) for name in rows], [_cut(name, 22) for name in columns]
    label = max((len(r) for r in rows), default=0) * 6.2 + 14 + (14 if row_title else 0)
    cell_w = max(26.0, min(64.0, (360 - label) / max(len(columns), 1)))
    cell_h = 26.0
    turn = any(len(c) * 6.2 > cell_w for c in columns)
    top = (max(len(c) for c in columns) * 4.6 + 14 if turn else 20) + (14 if column_title else 0)
    beyond = max(len(columns[-1]) * 4.6 - cell_w / 2, 0) if turn else 0.0
    width, height = label + cell_w * len(columns) + 6 + beyond, top + cell_h * len(rows) + 6
    peak = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    parts: list[str] = []
    for j, name in enumerate(columns):
        x, y = label + cell_w * (j + 0.5), top - 7
        anchor, rotate = ("start", f' transform="rotate(-45 {x:.1f} {y:.1f})"') if turn else ("middle", "")
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{rotate}>{escape(name)}</text>')
    for i, name in enumerate(rows):
        y = top + cell_h * i
        parts.append(f'<text class="tick" x="{label - 8:.1f}" y="{y + 17:.1f}" text-anchor="end">{escape(name)}</text>')
        for j in range(len(columns)):
            value = float(values[i, j])
            if not math.isfinite(value):
                continue
            share, x = (value / peak if peak > 0 else 0.0), label + cell_w * j
            parts.append(
                f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell_w - 2:.1f}" '
                f'height="{cell_h - 2:.1f}" rx="3" style="fill-opacity:{0.06 + 0.86 * share:.3f}"/>'
                f'<text class="cellnumber{" on" if share > 0.66 else ""}" x="{x + cell_w / 2:.1f}" y="{y + 17:.1f}" '
                f'text-anchor="middle">{escape(form(value))}</text>'
            )
    if column_title:
        middle = label + cell_w * len(columns) / 2
        parts.append(f'<text class="title" x="{middle:.1f}" y="11" text-anchor="middle">{escape(column_title)}</text>')
    if row_title:
        middle = top + cell_h * len(rows) / 2
        parts.append(
            f'<text class="title" x="11" y="{middle:.1f}" text-anchor="middle" '
            f'transform="rotate(-90 11 {middle:.1f})">{escape(row_title)}</text>'
        )
    return wrap("".join(parts), round(width), round(height), about)
