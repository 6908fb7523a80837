"""The report's two pictures: curves per epoch, and example images with predictions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from fastarat.evaluation import attack_title
from fastarat.report.subjects import NUM_STEPS, Examples, Subject
from fastarat.texts import printable

DPI = 200
RIGHT, WRONG = "#00694A", "#B3261E"
_INK, _SOFT, _FAINT = "#1A1A1A", "#444444", "#8A8A8A"
# Okabe and Ito's palette without its yellow, which is too pale for a line on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_MARKERS = "os^DvPX"
_SOLID, _DASHED, _DOTTED = "-", (0, (4, 2)), (0, (1, 1.5))
_OTHERS = ((0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_DROP_LINE = {"linestyle": (0, (2, 2)), "linewidth": 1}
_RING = {"linestyle": "", "marker": "o", "markersize": 8, "markerfacecolor": "none"}
_WIDTH_IN = 9.0
# A learning rate that falls by less than this in an epoch is a smooth schedule, not a drop.
_DROP = 0.7

Style = dict[str, Any]


class _Curve(NamedTuple):
    """One kind of line: its panel, its metric, what the panel's key calls it, and how it is drawn in every run."""

    panel: str
    key: str
    name: str
    dashes: Any = _SOLID
    hollow: bool = False  # so that a run of one epoch, which has no line, can be read as well

    @property
    def style(self) -> Style:
        return {"linestyle": self.dashes} | ({"markerfacecolor": "white"} if self.hollow else {})

    @property
    def key_style(self) -> Style:
        return self.style if self.panel.startswith("Weighted") else {"marker": "o", **self.style}


def curves_figure(runs: Sequence[Subject]) -> Figure:
    """Draw loss, its terms, clean and robust accuracy per epoch, all runs on the same axes."""
    styles = [
        {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]}
        for i in range(len(runs))
    ]
    curves = _curves(runs)
    terms = "Weighted terms of the loss" if any(run.terms for run in runs) else "Training loss"
    # Figure, not pyplot: no window system is asked for, and no global list keeps the figure alive.
    figure = Figure(figsize=(_WIDTH_IN, 6.8), facecolor="white", layout="constrained")
    panels = figure.subplot_mosaic([["Training loss", terms], ["Clean accuracy", "Robust accuracy"]])
    shown: set[str] = set()
    ringed: set[str] = set()
    for run, style in zip(runs, styles, strict=True):
        keys = {key for row in run.metrics for key in row if row[key] is not None}
        # The name of a single term, which is the loss, may be one of another run's several.
        keys &= {"train/loss", "val/clean_acc", "train/clean_acc", "train/robust_acc", run.robust_key, *run.terms}
        for curve in curves:
            if curve.key in keys:
                _draw(panels[curve.panel], run, curve, style)
        ringed |= _ring_best(panels, run, style)
        shown |= keys

    drops = _drops(runs, styles)
    for name, axes in panels.items():
        key = [(curve.key_style, curve.name) for curve in curves if curve.panel == name and curve.key in shown]
        if name == "Training loss":
            key = [(_DROP_LINE, "drop of the learning rate")] if drops else []
            _label_drops(axes, drops)
        if name in ringed:
            key.append((_RING, "best epoch"))
        percent = name.endswith("accuracy")
        logarithmic = not percent and _spread(axes)
        _title(axes, name + (" (logarithmic)" if logarithmic else ""), key)
        _dress(axes, percent)
        for x, _, colour in drops:
            axes.axvline(x, color=colour, alpha=0.35, zorder=0, **_DROP_LINE)
    names = [f"{_short(run.label, 56)}  ({run.budget})" for run in runs]
    columns = max(1, min(3, 130 // (max(map(len, names)) + 8)))
    styles = [{"linewidth": 2, "markersize": 5, **style} for style in styles]
    _legend(figure, styles, names, loc="outside upper left", ncols=columns, fontsize=9)
    return figure


def _curves(runs: Sequence[Subject]) -> list[_Curve]:
    terms = dict.fromkeys(key for run in runs for key in run.terms)
    attacks = dict.fromkeys(run.robust_key for run in runs if run.robust_key)
    dashes = (_SOLID, _DASHED, _DOTTED, *_OTHERS)
    solid = (_SOLID, *_OTHERS)  # dotted lines are training batches
    return [
        _Curve("Training loss", "train/loss", "loss"),
        *(_Curve("Weighted terms of the loss", key, key.removeprefix("train/"), dashes[i % len(dashes)])
          for i, key in enumerate(terms)),
        _Curve("Clean accuracy", "val/clean_acc", "validation"),
        _Curve("Clean accuracy", "train/clean_acc", "training batches", _DOTTED, hollow=True),
        *(_Curve("Robust accuracy", key, f"validation, {attack_title(key)}", solid[i % len(solid)])
          for i, key in enumerate(attacks)),
        _Curve("Robust accuracy", "train/robust_acc", "training attack", _DOTTED, hollow=True),
    ]  # fmt: skip


def _draw(axes: Axes, run: Subject, curve: _Curve, style: Style) -> None:
    rows = [row for row in run.metrics if row.get(curve.key) is not None]
    values = np.array([row[curve.key] for row in rows], dtype=float) * (100 if "_acc" in curve.key else 1)
    axes.plot(
        [row["epoch"] for row in rows],
        values,
        **style,
        **curve.style,
        linewidth=1.6 if curve.dashes == _SOLID else 1.3,
        markersize=3.5,
        markevery=max(1, len(rows) // 12),
    )


def _ring_best(panels: dict[str, Axes], run: Subject, style: Style) -> set[str]:
    """Ring the accuracies of the run's best epoch; return the panels that have them."""
    best = next((row for row in run.metrics if run.best and row["epoch"] == run.best["epoch"]), {})
    keys = {"Clean accuracy": "val/clean_acc", "Robust accuracy": run.robust_key or ""}
    ringed = {name for name, key in keys.items() if best.get(key) is not None}
    for name in ringed:
        ring = {**_RING, "markersize": 9, "markeredgecolor": style["color"], "markeredgewidth": 1.2, "zorder": 4}
        panels[name].plot(best["epoch"], 100 * best[keys[name]], **ring)
    return ringed


def _spread(axes: Axes) -> bool:
    """Use a logarithmic axis where a linear one would flatten all but the largest losses."""
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.ones(1)])
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0 or values.max() < 20 * values.min():
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def _drops(runs: Sequence[Subject], styles: list[Style]) -> list[tuple[float, str, str]]:
    """Return where the learning rate drops, what to write there, and a colour: the run's when it is its alone."""
    # Runs of one schedule share their lines: three on top of each other would only be a darker one.
    owners: dict[tuple[int, str], list[int]] = {}
    for number, run in enumerate(runs):
        for before, after in pairwise(run.metrics):
            if after["lr"] <= _DROP * before["lr"]:
                owners.setdefault((after["epoch"], f"lr {after['lr']:.3g}"), []).append(number)
    return [
        (epoch - 0.5, text, styles[numbers[0]]["color"] if len(numbers) == 1 < len(runs) else "#666666")
        for (epoch, text), numbers in owners.items()
    ]


def _label_drops(axes: Axes, drops: list[tuple[float, str, str]]) -> None:
    where = axes.get_xaxis_transform()
    for x, text, colour in drops:
        axes.annotate(
            text, (x, 0.98), (-2, 0), xycoords=where, textcoords="offset points", rotation=90, ha="right", va="top",
            fontsize=7, color=colour, alpha=0.8,
        )  # fmt: skip


def _title(axes: Axes, title: str, key: list[tuple[Style, str]]) -> None:
    """Write a panel's title, and between it and the axes the line styles; colours are explained above all panels."""
    columns = max(1, min(len(key), 4 * len(key) // max(1, sum(len(name) + 6 for _, name in key) // 16)))
    lines = max(1, -(-len(key) // columns))
    axes.set_title(title, loc="left", pad=8 + 12 * lines, fontsize=9.5, fontweight="bold", color=_INK)
    if key:
        styles = [{"color": "#555555", "linewidth": 1.4, "markersize": 4, **style} for style, _ in key]
        _legend(
            axes, styles, [name for _, name in key], loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1,
            borderpad=0.1, ncols=columns, columnspacing=1.4, handlelength=2.2, fontsize=8, labelcolor=_SOFT,
        )  # fmt: skip


def _legend(where: Axes | Figure, styles: list[Style], names: list[str], **options: Any) -> None:
    handles = [Line2D([], [], **style) for style in styles]
    legend = where.legend(handles, ["name"] * len(names), frameon=False, **options)
    # The names are set afterwards: given as labels, one that begins with _ would be left out.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=printable(name), parse_math=False)


def _dress(axes: Axes, percent: bool) -> None:
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(which="both", labelsize=8, color=_FAINT, labelcolor=_SOFT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", fontsize=8, color=_SOFT)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", fontsize=8, color=_FAINT)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
        low, high = axes.get_ylim()
        wider = max(0.0, (10 - (high - low)) / 2)
        # Ten points at least: on a tight axis half a point of noise looks like a trend.
        axes.set_ylim(max(low - wider, -2), min(high + wider, 102))


def examples_figure(runs: Sequence[Subject], examples: Sequence[Examples], classes: Sequence[str]) -> Figure:
    """Draw, for each run, a row of clean images, one of adversarial images and one of their differences."""
    count = len(examples[0].labels)
    left, gap, text_row, head = 1.15, 0.07, 0.23, 0.52
    # Few images are not blown up, and many make the figure wider rather than too small to see.
    cell = min(1.3, max(0.62, (_WIDTH_IN - left - gap) / count - gap))
    width = max(left + count * (cell + gap) + gap, 5.0)
    height_of = cell * examples[0].clean.shape[2] / examples[0].clean.shape[3]
    block = head + 3 * height_of + 2 * text_row + gap
    height = 0.3 + len(runs) * block + 0.08
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        style = {"fontsize": 8, "color": _INK, "va": "center", "parse_math": False, **style}
        figure.text(x / width, 1 - y / height, printable(text, "\n"), **style)

    def centre(column: int) -> float:
        return left + column * (cell + gap) + cell / 2

    letters = int(cell * 72 / 4.9)  # of the 8 point font, on average
    write(left - 0.1, 0.17, "true class", ha="right", color=_FAINT)
    for column, label in enumerate(examples[0].labels.tolist()):
        write(centre(column), 0.17, _short(classes[int(label)], letters), ha="center", weight="bold")
    for number, (run, found) in enumerate(zip(runs, examples, strict=True)):
        top = 0.3 + number * block
        clean, robust = found.correct()
        write(0.1, top + 0.14, _short(run.label, int(width * 10)), weight="bold", fontsize=10)
        text = f"PGD-{NUM_STEPS}, {run.budget}. Of these {count}: {clean} correct clean, {robust} adversarial."
        write(0.1, top + 0.35, text, fontsize=8, color="#555555")
        difference = found.adversarial - found.clean
        factor, scale = visible(difference)
        rows = (
            ("clean", found.clean, found.clean_pred),
            (f"adversarial\n(PGD-{NUM_STEPS})", found.adversarial, found.adv_pred),
            (f"perturbation\n× {scale}, grey is 0", (0.5 + factor * difference).clamp(0, 1), None),
        )
        y = top + head
        for name, pictures, predictions in rows:
            write(left - 0.1, y + height_of / 2, name, ha="right", linespacing=1.4)
            for column, picture in enumerate(pictures):
                x = centre(column) - cell / 2
                axes = figure.add_axes((x / width, 1 - (y + height_of) / height, cell / width, height_of / height))
                colour = "#BBBBBB"
                if predictions is not None:
                    right = bool(predictions[column] == found.labels[column])
                    colour, sign = (RIGHT, "✓") if right else (WRONG, "✗")
                    told = f"{sign} {_short(classes[int(predictions[column])], letters - 2)}"
                    write(centre(column), y + height_of + 0.11, told, ha="center", color=colour, weight="bold")
                _show(axes, picture, colour, cell * DPI)
            y += height_of + (gap if predictions is None else text_row)
    return figure


def _show(axes: Axes, picture: Tensor, colour: str, width_px: float) -> None:
    """Draw one image [C, H, W]: grey for one channel, colour for three, with sharp pixels when it is enlarged."""
    grey = picture.shape[0] != 3
    shown = (picture.mean(0) if grey else picture.permute(1, 2, 0)).numpy()
    sharp = picture.shape[2] <= width_px
    axes.imshow(
        shown, cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="nearest" if sharp else "antialiased"
    )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=colour, linewidth=1.6)


def visible(difference: Tensor) -> tuple[float, str]:
    """Return the factor that spreads a perturbation over the range of grey, and how to write it."""
    largest = float(difference.abs().max())
    if largest == 0:
        return 1.0, "1"
    factor = 0.5 / largest
    factor = float(int(factor + 1e-4)) if factor >= 1 else round(factor, 2)
    return factor, f"{factor:g}"


def _short(text: str, letters: int) -> str:
    text = printable(text)
    return text if len(text) <= letters else text[: max(letters - 1, 1)] + "…"
