"""The charts of a report's page: small line charts, accuracy by class, confusion; for the page, and as SVG and PNG.

A chart is `WIDTH` points wide, which is what a phone shows in pixels, so that its letters have their own size there.
In the page its colours are CSS variables (dark mode) and every point carries its value.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from fastarat.texts import printable

WIDTH = 360
DPI = 200
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#6b6b6b", "#e69f00", "#56b4e9")
MARKERS = "os^DvPX"
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_INK, _SOFT, _LINE, _PAPER = "#1b1c1e", "#55585c", "#e4e4e2", "#ffffff"
_VARIABLES = {colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)} | {
    _INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)", _PAPER: "var(--paper)"
}  # fmt: skip
_LETTER = 5.6  # points, of the 11 point font, on average
CLASSES = 20
"""How many classes a chart by class names; of more it takes those of the lowest robust accuracy."""


class Line(NamedTuple):
    """One line: the number of its run (colour and marker), the name of its kind (dashes), its points, a ringed one."""

    run: int
    x: Sequence[float]
    y: Sequence[float]
    kind: int = 0
    ring: float | None = None


class Chart(NamedTuple):
    """What a line chart says. kinds: what the dashes mean, when there are several; unit: what x counts."""

    name: str
    title: str
    unit: str
    lines: list[Line]
    kinds: Sequence[str] = ()
    percent: bool = False
    log_x: bool = False
    log_y: bool = False


class Drawn(NamedTuple):
    """A chart as drawn. inline: SVG for the page; svg, png: the same as files."""

    name: str
    inline: Markup
    svg: bytes
    png: bytes


class _Hit(NamedTuple):
    x: float
    y: float
    text: str


def draw_lines(chart: Chart, labels: Sequence[str]) -> Drawn:
    """Draw a line chart; labels: the runs' names."""
    runs = sorted({line.run for line in chart.lines})
    entries = [(_short(labels[run], 46), _style(run)) for run in runs]
    if len(chart.kinds) > 1:
        entries += [(_short(kind, 46), {"color": _SOFT, "linestyle": DASHES[i % len(DASHES)]})
                    for i, kind in enumerate(chart.kinds)]  # fmt: skip
    if any(line.ring is not None for line in chart.lines):
        entries.append(("best epoch", {"color": _SOFT, "linestyle": "", "marker": "o", "markersize": 9,
                                       "markerfacecolor": "none"}))  # fmt: skip
    figure, axes, height = _panel(chart.title, entries)
    hits = []
    for line in chart.lines:
        y = np.asarray(line.y, float) * (100 if chart.percent else 1)
        axes.plot(line.x, y, **_style(line.run, len(y)) | {"linestyle": DASHES[line.kind % len(DASHES)]})
        if line.ring is not None and line.ring in line.x:
            at = list(line.x).index(line.ring)
            axes.plot(line.x[at], y[at], "o", markersize=10, markerfacecolor="none",
                      markeredgecolor=COLOURS[line.run % len(COLOURS)], markeredgewidth=1.4)  # fmt: skip
    _dress(axes, chart)
    for line in chart.lines:
        kind = f", {chart.kinds[line.kind]}" if len(chart.kinds) > 1 else ""
        for x, y in zip(line.x, line.y, strict=True):
            told = f"{y:.2%}" if chart.percent else f"{y:.4g}"
            point = axes.transData.transform((x, 100 * y if chart.percent else y))
            hits.append(_Hit(point[0], point[1], f"{labels[line.run]}{kind}: {told} at {_at(chart, x)}"))
    return _drawn(chart.name, chart.title, figure, height, hits)


def draw_classes(
    name: str, title: str, classes: Sequence[str], clean: Sequence[float] | None, robust: Sequence[float] | None
) -> Drawn:
    """Draw one line per class, from robust to clean accuracy (fractions); either may be missing."""
    known: Sequence[float] = robust or clean or []
    order = sorted(range(len(known)), key=known.__getitem__)[:CLASSES]
    order.sort()
    kinds = [("clean", clean, "o", _PAPER), ("robust", robust, "s", COLOURS[1])]
    styles = {"clean": COLOURS[0], "robust": COLOURS[1]}
    entries = [(kind, {"color": styles[kind], "marker": marker, "markerfacecolor": face, "linestyle": "",
                       "markersize": 7}) for kind, values, marker, face in kinds if values]  # fmt: skip
    letters = 12
    figure, axes, height = _panel(title, entries, plot=20 * len(order) + 10, left=letters * _LETTER + 14)
    hits = []
    rows = range(len(order))
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    if clean and robust:
        axes.hlines(rows, [100 * robust[c] for c in order], [100 * clean[c] for c in order], colors=_SOFT, lw=1)
    for kind, values, marker, face in kinds:
        if values:
            axes.plot([100 * values[c] for c in order], rows, linestyle="", marker=marker, color=styles[kind],
                      markerfacecolor=face, markersize=7)  # fmt: skip
            for row, c in zip(rows, order, strict=True):
                point = axes.transData.transform((100 * values[c], row))
                hits.append(_Hit(point[0], point[1], f"{classes[c]}, {kind}: {values[c]:.2%}"))
    _name_rows(axes, rows, [_short(classes[c], letters) for c in order])
    axes.grid(axis="x", color=_LINE, linewidth=0.8)
    axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    return _drawn(name, title, figure, height, hits)


def draw_confusion(name: str, title: str, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Drawn:
    """Draw a confusion matrix: rows the true class, columns what was predicted, shaded by its share of the row."""
    table = np.asarray(counts, float)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    size, letters = len(table), 7
    left = letters * _LETTER + 10
    figure, axes, height = _panel(title, [], plot=WIDTH - left - 16, left=left, bottom=52)
    axes.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    hits = []
    for row in range(size):
        for column in range(size) if size <= CLASSES else ():
            point = axes.transData.transform((column, row))
            told = f"{classes[row]} taken for {classes[column]}: {table[row, column]:,.0f} ({share[row, column]:.1%})"
            hits.append(_Hit(point[0], point[1], told))
            if size <= 12 and table[row, column]:
                dark = share[row, column] < 0.5
                # Other greys than the page's ink: these lie on the shade, which dark mode leaves as it is.
                axes.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", fontsize=11,
                          color="#fefefe" if dark else "#010101")  # fmt: skip
    step = max(1, -(-size // 20))
    ticks = list(range(0, size, step))
    _name_rows(axes, ticks, [_short(classes[i], letters) for i in ticks])
    axes.set_xticks([])
    wide = max((len(classes[i]) for i in ticks), default=0) * _LETTER > (WIDTH - left) / max(1, len(ticks))
    for i in ticks:
        axes.annotate(_short(classes[i], 5), (i, 0), (0, -5), xycoords=axes.get_xaxis_transform(), ha="center",
                      va="top", textcoords="offset points", rotation=90 if wide else 0, fontsize=11, color=_SOFT,
                      parse_math=False)  # fmt: skip
    figure.text((left + WIDTH - 16) / 2 / WIDTH, 12 / height, "predicted class (rows: the true one)", fontsize=11,
                color=_SOFT, ha="center", va="center")  # fmt: skip
    return _drawn(name, title, figure, height, hits)


def _name_rows(axes: Axes, rows: Sequence[int], names: Sequence[str]) -> None:
    # Text of our own and no tick labels: those read mathematics into a class named $x$.
    axes.set_yticks([])
    for row, name in zip(rows, names, strict=True):
        axes.annotate(name, (0, row), (-6, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                      ha="right", va="center", fontsize=11, color=_SOFT, parse_math=False)  # fmt: skip


def _style(run: int, points: int = 0) -> dict:
    return {
        "color": COLOURS[run % len(COLOURS)],
        "marker": MARKERS[(run + run // len(COLOURS)) % len(MARKERS)],
        "linewidth": 1.8,
        "markersize": 4.5,
        "markevery": max(1, points // 10),
    }


def _panel(title: str, entries: list, *, plot: float = 170, left: float = 46, bottom: float = 40) -> tuple:
    """Return a figure with one axes of `plot` points, the title above and the key below it; and its height."""
    lines = _columns(entries)
    key = 16 * sum(1 for _ in lines)
    height = 26 + plot + bottom + key
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor=_PAPER)
    axes = figure.add_axes((left / WIDTH, (bottom + key) / height, (WIDTH - left - 16) / WIDTH, plot / height))
    axes.set_facecolor(_PAPER)
    figure.text(2 / WIDTH, 1 - 13 / height, _short(title, 44), fontsize=12, fontweight="bold", color=_INK, va="center",
                parse_math=False)  # fmt: skip
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    axes.tick_params(which="both", labelsize=11, length=3, color=_SOFT, labelcolor=_SOFT)
    axes.tick_params(axis="y", which="both", length=0)
    for number, row in enumerate(lines):
        y = (key - 16 * number - 9) / height
        for x, name, style in row:
            figure.add_artist(Line2D([x / WIDTH, (x + 12) / WIDTH, (x + 24) / WIDTH], [y] * 3,
                                     transform=figure.transFigure,
                                     **{"linewidth": 1.8, **style, "markevery": [1]}))  # fmt: skip
            figure.text((x + 28) / WIDTH, y, name, fontsize=11, color=_SOFT, va="center", parse_math=False)
    return figure, axes, height


def _columns(entries: list) -> list[list[tuple]]:
    """Lay the key's entries out in lines as wide as the chart."""
    lines: list[list[tuple]] = []
    x = WIDTH
    for name, style in entries:
        width = 28 + 6.3 * len(name) + 14
        if x + width - 14 > WIDTH:
            lines.append([])
            x = 2
        lines[-1].append((x, name, style))
        x += width
    return lines


def _dress(axes: Axes, chart: Chart) -> None:
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(chart.unit, fontsize=11, color=_SOFT, labelpad=4)
    if chart.log_x:
        axes.set_xscale("log")
        axes.set_xticks(sorted({x for line in chart.lines for x in line.x}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=chart.unit == "epoch", min_n_ticks=1))
    values = [y for line in chart.lines for y in line.y if np.isfinite(y)]
    if chart.log_y and values and min(values) > 0 and max(values) >= 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
        low, high = axes.get_ylim()
        wider = max(0.0, (10 - (high - low)) / 2)
        # Ten points at least: on a tight axis half a point of noise looks like a trend.
        axes.set_ylim(max(low - wider, -2), min(high + wider, 102))
    # Limits are worked out when they are asked for; the places of the points need them.
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())


def _at(chart: Chart, x: float) -> str:
    return f"epoch {x:g}" if chart.unit == "epoch" else f"{x:.4g} {chart.unit.split(' (')[0]}"


def _drawn(name: str, title: str, figure: Figure, height: float, hits: list[_Hit]) -> Drawn:
    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return Drawn(name, _inline(svg.getvalue().decode(), title, height, hits), svg.getvalue(), png.getvalue())


def _inline(svg: str, title: str, height: float, hits: list[_Hit]) -> Markup:
    """Make a file's SVG part of a page: CSS variables for colours, no clashing ids, the points' values."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index(">", svg.index("<svg")) + 1 :], flags=re.S)
    body = re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", body)
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.S)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    points = "".join(
        f'<circle class="hit" cx="{hit.x:.1f}" cy="{height - hit.y:.1f}" r="8" '
        f'data-tip="{escape(printable(hit.text))}"/>'
        for hit in hits
        if np.isfinite(hit.x) and np.isfinite(hit.y)
    )
    end = body.rindex("</svg>")
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(printable(title))}">'
    return Markup(head + body[:end] + points + "</svg>")


def _short(text: str, letters: int) -> str:
    """Shorten in the middle: names of one comparison differ at their ends, by the seed."""
    text = printable(text)
    if len(text) <= letters:
        return text
    end = (letters - 1) // 3
    return text[: letters - 1 - end] + "…" + text[len(text) - end :]
