"""How a chart looks, and how it becomes part of a page: matplotlib's SVG in the page's own colours and type.

A chart is drawn once, in the light colours; in its SVG each becomes the CSS variable of the same name, so that one
picture serves light, dark and print. Lengths are pixels of the view box: a figure has 72 of them to the inch, as many
as points. Text stays text, set in the page's fonts; room for it is measured in matplotlib's own DejaVu Sans, a wide
one.
"""

from __future__ import annotations

import io
import re
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = {
    "paper": ("#fdfcfa", "#14171a"),
    "ink": ("#1d2126", "#e7e5e1"),
    "soft": ("#5d6670", "#a3abb3"),
    "faint": ("#8b939c", "#767f88"),
    "rule": ("#e4e1db", "#2b3036"),
    "candidate": ("#0b6e8f", "#58b7d8"),
    "champion": ("#c27a1a", "#e2a64f"),
    "base": ("#8f979f", "#7f8891"),
    "negative": ("#c9694b", "#e0876a"),
    "violet": ("#7a5ea8", "#b09bdc"),
    "green": ("#4d8b3a", "#8cc477"),
    "pink": ("#b8476b", "#e58aa8"),
    "blue": ("#3b62b5", "#86a6ee"),
    "olive": ("#8a7a2b", "#cdbb62"),
    "slate": ("#5b7380", "#9fb4bf"),
}
"""CSS variable → its light and dark value. No two light values are equal: a light value names its variable."""

INK = {name: light for name, (light, _) in COLOURS.items()}
"""What matplotlib draws with."""

TASKS = ("candidate", "champion", "violet", "green", "pink", "blue", "olive", "slate")
"""Colours of the tasks in their order, from the first again after the last."""

LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 36
"""Margins in pixels: room for tick labels and axis titles."""

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # ids that are the same in each process
    "text.parse_math": False,  # a dollar sign in a class's name is a dollar sign
    "font.size": 11,
    "text.color": INK["ink"],
    "axes.edgecolor": INK["faint"],
    "axes.labelcolor": INK["soft"],
    "axes.labelsize": 11.5,
    "axes.linewidth": 1,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK["rule"],
    "grid.linewidth": 1,
    "lines.linewidth": 1.8,
    "path.simplify_threshold": 0.25,  # pixels: the curve of a hundred thousand samples is a few thousand bytes
    **{f"axes.spines.{side}": False for side in ("left", "top", "right")},
    **{f"{axis}tick.{end}": False for axis, end in (("x", "bottom"), ("y", "left"))},
    **{f"{axis}tick.labelcolor": INK["faint"] for axis in "xy"},
    **{f"{axis}tick.labelsize": 11 for axis in "xy"},
}


def style() -> AbstractContextManager[None]:
    """Return the context in which charts are made and written; the user's own matplotlib settings do not count."""
    return matplotlib.style.context(["default", _STYLE])


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be written.

    Args:
        figure: what is drawn.
        axes: its only ones.
        about: what it shows, for those who hear it.
        fitted: cut to what is drawn, instead of the figure's own size.
    """

    figure: Figure
    axes: Axes
    about: str
    fitted: bool = False


Range = tuple[float, float]


def plot(x: Range, y: Range, x_label: str, y_label: str, about: str, width: int = 320, height: int = 230) -> Chart:
    """Return a new chart of two ranges: a base line, faint lines across, few round numbers; sizes in pixels."""
    chart = plane(x, y, about, width, height, (LEFT, RIGHT, TOP, BOTTOM))
    chart.axes.set_axis_on()
    chart.axes.set(xlabel=x_label, ylabel=y_label)
    # At one distance from the edge, whatever the tick labels: charts in a row then stand alike.
    chart.axes.yaxis.set_label_coords(17 / width, (BOTTOM + height - TOP) / 2 / height, chart.figure.transFigure)
    for axis in (chart.axes.xaxis, chart.axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    return chart


def plane(
    x: Range,
    y: Range,
    about: str,
    width: float = 320,
    height: float = 230,
    margins: tuple[float, float, float, float] = (RIGHT, RIGHT, TOP, TOP),
    fitted: bool = False,
) -> Chart:
    """Return a new chart without any mark on its axes, for what has no units; margins left, right, top, bottom."""
    left, right, top, bottom = margins
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    for patch in (figure.patch, axes.patch):
        patch.set_visible(False)
    axes.set(xlim=_widened(x), ylim=_widened(y))
    axes.set_axis_off()
    return Chart(figure, axes, about, fitted)


def _widened(ends: Range) -> Range:
    low, high = ends
    return (low, high) if high != low else (low - 0.5, high + 0.5)


def number(value: float) -> str:
    """Return a tick label: short, thousands as k, tiny numbers by their power of ten."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.4g}"


def svg(chart: Chart, name: str) -> Markup:
    """Return a chart as an SVG element of a page; call it within :func:`style`, where the chart was made.

    Args:
        chart: what to write.
        name: begins the ids within, which must be the page's only ones.
    """
    for artist in chart.figure.findobj():
        artist.set_clip_on(False)  # nothing is drawn outside, and clip paths would need ids
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # DejaVu Sans lacks some scripts; the browser has other fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        chart.figure.savefig(
            buffer,
            format="svg",
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
            bbox_inches="tight" if chart.fitted else None,
            pad_inches=2 / 72,
        )
    root = ElementTree.fromstring(buffer.getvalue())
    root.remove(root[0])  # a style that would hold for the whole page; page.css.j2 has its like
    box = root.attrib["viewBox"]
    used = dict.fromkeys(element.attrib[_XLINK] for element in root.iter() if _XLINK in element.attrib)
    ids = {old.removeprefix("#"): f"{name}-{i}" for i, old in enumerate(used)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = _attributes(element.attrib, ids)
        element.text, element.tail = (element.text or "").strip(), None
    root.attrib = {"viewBox": _short(box), "role": "img", "aria-label": chart.about}
    if chart.fitted:  # few cells stay of a size with many
        root.attrib["style"] = f"max-width: {1.25 * float(box.split()[2]):.0f}px"
    # Safe as markup: the XML writer escapes every text and attribute.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


_XLINK = "{http://www.w3.org/1999/xlink}href"
_VARIABLES = {light: f"var(--{name})" for name, light in INK.items()}


def _attributes(given: dict[str, str], ids: dict[str, str]) -> dict[str, str]:
    """Return an element's attributes as the page needs them: its colours, its fonts, its ids."""
    kept = {name: _short(value) for name, value in given.items() if name in ("d", "x", "y", "transform")}
    if "style" in given:
        coloured = re.sub("#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), given["style"])
        kept["style"] = "; ".join(part for part in coloured.split("; ") if not part.startswith("font-family"))
    if given.get("id") in ids:
        kept["id"] = ids[given["id"]]
    if _XLINK in given:
        kept["href"] = f"#{ids[given[_XLINK].removeprefix('#')]}"
    return {name: value for name, value in kept.items() if value}


def _short(numbers: str) -> str:
    """Return path data or a transformation with one decimal, on one line, without turns by nothing."""
    rounded = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), numbers)
    return " ".join(re.sub(r"rotate\(-?0 [^)]*\)", "", rounded).split())
