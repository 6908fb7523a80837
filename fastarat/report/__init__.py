"""Curves, example images and tables of finished or running runs, as PNG, Markdown and one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor, nn

from fastarat.data import Dataset, Split, load_dataset
from fastarat.device import pick_device
from fastarat.errors import UserError
from fastarat.evaluation import adversarial_examples, attack_title, collect, wilson
from fastarat.files import load_weights, write_atomic
from fastarat.nets.batchnorm import branch
from fastarat.runs import load_network as load_run
from fastarat.training import pixels

NUM_STEPS = 20

# Okabe and Ito's palette without its yellow, which is too pale for a line on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_MARKERS = "os^DvPX"
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_RIGHT, _WRONG, _INK, _FAINT = "#00694A", "#B3261E", "#1A1A1A", "#8A8A8A"
_DPI = 200
_WIDTH_IN = 9.0
# A learning rate that falls by less than this in an epoch is a smooth schedule, not a drop.
_DROP = 0.7


@dataclass(frozen=True, eq=False)
class _Run:
    """What is read from one run folder.

    label: a short name, unique in the report. best: epoch of the best checkpoint and the accuracy that chose it.
    """

    path: Path
    label: str
    metrics: list[dict[str, Any]]
    card: str
    evaluations: dict[str, dict[str, Any]]
    model: nn.Module
    meta: dict[str, Any]
    config: Any
    best: dict[str, Any] | None


class Examples(NamedTuple):
    """The same images without and with a perturbation, and what a run's model says of them.

    clean, adversarial: float32 [B, C, H, W] in [0, 1], on the CPU. labels, clean_pred, adv_pred: int64 [B].
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    clean_pred: Tensor
    adv_pred: Tensor

    def correct(self) -> tuple[int, int]:
        """Number of correct predictions on the clean and on the adversarial images."""
        return int((self.clean_pred == self.labels).sum()), int((self.adv_pred == self.labels).sum())


def report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    num_images: int = 8,
    device: torch.device | str | None = None,
    data_dir: str | Path | None = "data",
) -> Path:
    """Write curves.png, examples.png, report.md and report.html about one or more runs of one data set.

    Args:
        runs: run folders; a folder named twice counts once. Their last weights are shown.
        out: folder to write into, made if missing; default: `report` in the first run.
        num_images: test images in the grid, the first one of each class, then the second ones ...
        device: where the adversarial images are made; default: the GPU if there is one.
        data_dir: where the data set is kept; None: where the first run found it.
    Returns: the path of report.html.
    Raises: UserError for a folder that is no run or has no metrics or weights yet, runs of different data sets or image
        shapes, an unreadable eval.json, and a folder that cannot be written.
    """
    if num_images < 1:
        raise UserError(f"num_images={num_images}: expected 1 or more test images in the grid")
    paths = list({Path(run).resolve(): Path(run) for run in runs}.values())
    if not paths:
        raise UserError("no run given: expected one run folder or more")
    loaded = [_read(path, label) for path, label in zip(paths, _labels(paths), strict=True)]
    _check_comparable(loaded)
    folder = Path(out) if out is not None else paths[0] / "report"
    _make_writable(folder)

    dataset = _dataset(loaded[0], data_dir)
    device = pick_device(str(device or "auto"))
    images, labels = collect(first_per_class(dataset.test, num_images))
    examples = [
        predicted(run.model, images, labels, epsilon=run.meta["epsilon"], norm=run.meta["norm"], device=device)
        for run in loaded
    ]
    pictures = {
        "curves.png": curves_figure(loaded),
        "examples.png": examples_figure(loaded, examples, dataset.classes),
    }
    for name, figure in pictures.items():
        # The temporary file's name does not end in .png, and a version in the file would change it for nothing.
        write_atomic(
            folder / name, lambda p, f=figure: f.savefig(p, format="png", dpi=_DPI, metadata={"Software": None})
        )
    blocks = _contents(loaded, examples, dataset)
    title = "fastarat report: " + ", ".join(run.label for run in loaded)
    write_atomic(folder / "report.md", lambda p: p.write_text(_markdown(title, blocks), encoding="utf-8"))
    page = _html(title, blocks, lambda name: (folder / name).read_bytes())
    write_atomic(folder / "report.html", lambda p: p.write_text(page, encoding="utf-8"))
    return folder / "report.html"


# Reading


def _labels(paths: list[Path]) -> list[str]:
    """Name each run by its folder, with as many parents as it takes to tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    labels = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        labels.append("/".join(own[-depth:]))
    return labels


def _read(path: Path, label: str) -> _Run:
    if not path.is_dir():
        raise UserError(f"{path} is not a run folder: expected one that `fastarat train` wrote")
    metrics = _metrics(path / "metrics.jsonl")
    if not metrics:
        raise UserError(
            f"{path} has no metrics yet (metrics.jsonl is missing or empty): expected a run folder with one finished "
            f"epoch or more; `fastarat train --resume {shlex.quote(str(path))}` continues a run"
        )
    model, meta, config = load_run(path)
    if config is None:
        raise UserError(f"{path} has no config.yaml: it says which data set the run's images come from")
    card = path / "card.txt"
    return _Run(
        path=path,
        label=label,
        metrics=metrics,
        card=card.read_text(encoding="utf-8").rstrip("\n") if card.is_file() else "(no card.txt in this run folder)",
        evaluations=_evaluations(path),
        model=model,
        meta=meta,
        config=config,
        best=_best(path, metrics),
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    # Not RunFolder.metrics: opening a RunFolder probes it for writing, and a run to be looked at may be read-only.
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the line that a run in progress is writing
            continue
    return rows


def _evaluations(path: Path) -> dict[str, dict[str, Any]]:
    """Return what `fastarat eval` saved, by the weights it evaluated."""
    found = {}
    for weights in ("last", "best", "swa"):
        file = path / ("eval.json" if weights == "last" else f"eval-{weights}.json")
        if not file.is_file():
            continue
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            for key in result["settings"]["attacks"].values():
                wilson(float(result["accuracy"][key]), int(result["num_images"]))
            _budget(result["settings"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(
                f"{file} is not an evaluation that can be read ({type(error).__name__}: {error}): delete it, then "
                f"fastarat eval {shlex.quote(str(path))}"
            ) from error
        found[weights] = result
    return found


def _check_comparable(runs: list[_Run]) -> None:
    def described(run: _Run) -> str:
        m = run.meta
        size = m["image_size"]
        return f"{m['dataset']} ({m['num_classes']} classes, {m['in_channels']}x{size}x{size})"

    def identity(run: _Run) -> tuple:
        return tuple(run.meta[key] for key in ("dataset", "classes", "in_channels", "image_size"))

    first = runs[0]
    for other in runs[1:]:
        if identity(other) != identity(first):
            a, b = described(first), described(other)
            raise UserError(
                f"the example grid shows the same test images to every run, but {first.path} was trained on {a} and "
                f"{other.path} on {b if b != a else b + ' with other class names'}: write one report per data set"
            )


def _dataset(run: _Run, data_dir: str | Path | None) -> Dataset:
    config = run.config
    dataset = load_dataset(
        config.dataset,
        data_dir=config.data_dir if data_dir is None else data_dir,
        val_images=config.eval.val_images,
        image_size=config.image_size,
    )
    if len(dataset.classes) != run.meta["num_classes"] or dataset.shape[0] != run.meta["in_channels"]:
        raise UserError(
            f"{run.path} was trained for {run.meta['num_classes']} classes and {run.meta['in_channels']} channel(s), "
            f"but {config.dataset} now has {len(dataset.classes)} and {dataset.shape[0]}: the data set changed since"
        )
    return dataset


def _make_writable(folder: Path) -> None:
    """Find out before the work, not after it, that nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Choose another --out.") from error


# Example images


def first_per_class(split: Split, num_images: int) -> Split:
    """Return the first image of each class, then the second of each, up to `num_images`; classes in order."""
    seen: dict[int, int] = {}
    ranks = []
    for row, label in enumerate(split.labels.tolist()):
        ranks.append((seen.get(label, 0), label, row))
        seen[label] = seen.get(label, 0) + 1
    rows = torch.tensor([row for *_, row in sorted(ranks)[:num_images]])
    return replace(
        split,
        images=None if split.images is None else split.images[rows],
        labels=split.labels[rows],
        indices=split.indices[rows],
    )


def predicted(
    model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, norm: str, device: torch.device
) -> Examples:
    """Attack `images` with PGD-20 as `evaluate` does, and classify both versions in eval mode with the adv branch.

    images: float32 [B, C, H, W] in [0, 1]. labels: int64 [B]. epsilon: pixel units.
    Returns: Examples. The model is left on the CPU.
    """
    model.to(device).eval()
    adversarial = adversarial_examples(
        model, images, labels, epsilon=epsilon, num_steps=NUM_STEPS, norm=norm, branch="adv"
    )
    # On the CPU float32 is float32: a GPU's TF32 could flip a prediction at the boundary.
    model.cpu()
    with torch.no_grad(), branch(model, "adv"):
        clean_pred, adv_pred = (model(x).argmax(1) for x in (images, adversarial))
    return Examples(images, adversarial, labels, clean_pred, adv_pred)


def examples_figure(runs: Sequence[_Run], examples: Sequence[Examples], classes: Sequence[str]) -> Figure:
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
        figure.text(x / width, 1 - y / height, text, **style)

    def centre(column: int) -> float:
        return left + column * (cell + gap) + cell / 2

    letters = int(cell * 72 / 4.9)  # of the 8 point font, on average
    write(left - 0.1, 0.17, "true class", ha="right", color=_FAINT)
    for column, label in enumerate(examples[0].labels.tolist()):
        write(centre(column), 0.17, _short(classes[label], letters), ha="center", weight="bold")
    for number, (run, found) in enumerate(zip(runs, examples, strict=True)):
        top = 0.3 + number * block
        clean, robust = found.correct()
        write(0.1, top + 0.14, _short(run.label, int(width * 10)), weight="bold", fontsize=10)
        text = f"PGD-{NUM_STEPS}, {_budget(run.meta)}. Of these {count}: {clean} correct clean, {robust} adversarial."
        write(0.1, top + 0.35, text, fontsize=8, color="#555555")
        difference = found.adversarial - found.clean
        factor, scale = _visible(difference)
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
                    colour, sign = (_RIGHT, "✓") if right else (_WRONG, "✗")
                    told = f"{sign} {_short(classes[int(predictions[column])], letters - 2)}"
                    write(centre(column), y + height_of + 0.11, told, ha="center", color=colour, weight="bold")
                _show(axes, picture, colour, cell * _DPI)
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
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.6)


def _visible(difference: Tensor) -> tuple[float, str]:
    """Return the factor that spreads a perturbation over the range of grey, and how to write it."""
    largest = float(difference.abs().max())
    if largest == 0:
        return 1.0, "1"
    factor = 0.5 / largest
    factor = float(int(factor + 1e-4)) if factor >= 1 else round(factor, 2)
    return factor, f"{factor:g}"


def _budget(meta: dict[str, Any]) -> str:
    norm = {"linf": "L∞", "l2": "L2"}.get(meta["norm"], meta["norm"])
    return f"{norm} ε = {_fraction(meta['epsilon'])}"


def _fraction(value: float) -> str:
    return pixels(value).split(" ")[0]


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(letters - 1, 1)] + "…"


# Curves


def curves_figure(runs: Sequence[_Run]) -> Figure:
    """Draw loss, its terms, clean and robust accuracy per epoch, all runs on the same axes."""
    styles = [
        {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]}
        for i in range(len(runs))
    ]
    terms = list(dict.fromkeys(term for run in runs for term in _terms(run)))
    attacks = list(dict.fromkeys(key for run in runs if (key := _robust_key(run))))
    solid = [_DASHES[0], *_DASHES[3:]]
    figure = Figure(figsize=(_WIDTH_IN, 6.8), facecolor="white", layout="constrained")
    grid = figure.add_gridspec(2, 2)
    loss = figure.add_subplot(grid[0, 0] if terms else grid[0, :])
    parts = figure.add_subplot(grid[0, 1]) if terms else None
    clean, robust = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])

    for run, style in zip(runs, styles, strict=True):
        _line(loss, run, "train/loss", style)
        for term in _terms(run):
            _line(parts, run, f"train/{term}", style, dashes=_DASHES[terms.index(term) % len(_DASHES)])
        _line(clean, run, "val/clean_acc", style, percent=True)
        for axes, key in ((clean, "train/clean_acc"), (robust, "train/robust_acc")):
            # Hollow, so that a run of one epoch, which has no line, can be read as well.
            _line(axes, run, key, {**style, "markerfacecolor": "white"}, dashes=_DASHES[2], percent=True)
        if key := _robust_key(run):
            _line(robust, run, key, style, dashes=solid[attacks.index(key) % len(solid)], percent=True)
        best = [row for row in run.metrics if run.best and row["epoch"] == run.best["epoch"]]
        for axes, shown in ((clean, "val/clean_acc"), (robust, key)):
            for row in best:
                if row.get(shown) is not None:
                    ring = {"ms": 9, "mfc": "none", "mec": style["color"], "mew": 1.2, "zorder": 4}
                    axes.plot(row["epoch"], 100 * row[shown], "o", **ring)

    logarithmic = [_spread(axes) for axes in (loss, parts) if axes is not None]
    drops = [_mark_drops(axes, runs, styles) for axes in (loss, parts, clean, robust) if axes is not None]
    _label_drops(loss, drops[0])
    dash = {"linestyle": (0, (2, 2)), "linewidth": 1}
    _title(loss, "Training loss", logarithmic[0], [(dash, "drop of the learning rate")] if drops[0] else [])
    if terms:
        key = [({"linestyle": _DASHES[i % len(_DASHES)]}, term) for i, term in enumerate(terms)]
        _title(parts, "Terms of the loss", logarithmic[1], key)
    held_out = {"linestyle": "-", "marker": "o"}
    batches = {"linestyle": _DASHES[2], "marker": "o", "markerfacecolor": "white"}
    ring = {"linestyle": "", "marker": "o", "markersize": 8, "markerfacecolor": "none"}
    trained = {key for run in runs for row in run.metrics for key in row}
    rings = [(ring, "best epoch")] if any(run.best for run in runs) else []
    key = [(batches, "training batches")] if "train/clean_acc" in trained else []
    _title(clean, "Clean accuracy", False, [(held_out, "validation"), *key, *rings])
    key = [
        ({**held_out, "linestyle": solid[i % len(solid)]}, f"validation, {_attack_of(name)}")
        for i, name in enumerate(attacks)
    ]
    key += [(batches, "training attack")] if "train/robust_acc" in trained else []
    _title(robust, "Robust accuracy", False, [*key, *(rings if attacks else [])])

    for axes in figure.axes:
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(which="both", labelsize=8, color=_FAINT, labelcolor="#444444")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch", fontsize=8, color="#444444")
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", fontsize=8, color=_FAINT)
    for axes in (clean, robust):
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
        low, high = axes.get_ylim()
        wider = max(0.0, (10 - (high - low)) / 2)
        axes.set_ylim(max(low - wider, -2), min(high + wider, 102))

    names = [f"{_short(run.label, 56)}  ({_budget(run.meta)})" for run in runs]
    handles = [Line2D([], [], linewidth=2, markersize=5, **style) for style in styles]
    # The names are set afterwards: given as labels, one that begins with _ would be left out.
    legend = figure.legend(
        handles,
        ["run"] * len(runs),
        loc="outside upper left",
        ncols=max(1, min(3, 130 // (max(map(len, names)) + 8))),
        frameon=False,
        fontsize=9,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)
    return figure


def _line(axes: Axes, run: _Run, key: str, style: dict[str, Any], *, dashes: Any = "-", percent: bool = False) -> None:
    rows = [row for row in run.metrics if row.get(key) is not None]
    if not rows:
        return
    values = np.array([row[key] for row in rows], dtype=float) * (100 if percent else 1)
    axes.plot(
        [row["epoch"] for row in rows],
        values,
        **style,
        linestyle=dashes,
        linewidth=1.6 if dashes == "-" else 1.3,
        markersize=3.5,
        markevery=max(1, len(rows) // 12),
    )


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


def _title(axes: Axes, title: str, logarithmic: bool, key: list[tuple[dict[str, Any], str]]) -> None:
    """Write a panel's title, and between it and the axes the line styles; colours are explained above all panels."""
    columns = max(1, min(len(key), 4 * len(key) // max(1, sum(len(name) + 6 for _, name in key) // 16)))
    lines = max(1, -(-len(key) // columns))
    axes.set_title(
        title + (" (logarithmic)" if logarithmic else ""),
        loc="left",
        pad=8 + 12 * lines,
        fontsize=9.5,
        fontweight="bold",
        color=_INK,
    )
    if not key:
        return
    handles = [Line2D([], [], **{"color": "#555555", "linewidth": 1.4, "markersize": 4, **style}) for style, _ in key]
    legend = axes.legend(
        handles,
        ["style"] * len(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.1,
        borderpad=0.1,
        ncols=columns,
        columnspacing=1.4,
        handlelength=2.2,
        frameon=False,
        fontsize=8,
    )
    for text, (_, name) in zip(legend.get_texts(), key, strict=True):
        text.set(text=name, parse_math=False, color="#444444")


def _mark_drops(axes: Axes, runs: Sequence[_Run], styles: list[dict[str, Any]]) -> list[tuple[float, str, str]]:
    """Draw a light line where the learning rate drops, in a run's colour when it is that run's alone.

    Returns: position, text and colour of each line.
    """
    owners: dict[tuple[int, str], list[int]] = {}
    for number, run in enumerate(runs):
        for before, after in pairwise(run.metrics):
            if after["lr"] <= _DROP * before["lr"]:
                owners.setdefault((after["epoch"], f"lr {after['lr']:.3g}"), []).append(number)
    drops = []
    for (epoch, text), numbers in owners.items():
        colour = styles[numbers[0]]["color"] if len(numbers) == 1 < len(runs) else "#666666"
        axes.axvline(epoch - 0.5, color=colour, alpha=0.35, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        drops.append((epoch - 0.5, text, colour))
    return drops


def _label_drops(axes: Axes, drops: list[tuple[float, str, str]]) -> None:
    where = axes.get_xaxis_transform()
    for x, text, colour in drops:
        axes.annotate(
            text, (x, 0.98), (-2, 0), xycoords=where, textcoords="offset points", rotation=90, ha="right", va="top",
            fontsize=7, color=colour, alpha=0.8,
        )  # fmt: skip


def _terms(run: _Run) -> list[str]:
    """Name the terms of a run's loss when there are several; a single term is the loss."""
    known = ("loss", "clean_acc", "robust_acc")
    keys = dict.fromkeys(key for row in run.metrics for key in row if key.startswith("train/"))
    names = [name for key in keys if (name := key.removeprefix("train/")) not in known]
    return names if len(names) > 1 else []


def _robust_key(run: _Run) -> str | None:
    return next((k for row in run.metrics for k in row if k.startswith("val/robust_acc")), None)


def _best(path: Path, metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return epoch, accuracy (`value`) and its name (`by`) of the best checkpoint, or None where there is none."""
    file = path / "best.safetensors"
    if not file.is_file():
        return None
    meta = load_weights(file)[1]
    if "best" in meta:
        return meta["best"]
    # A run from before the rule was kept: PGD chose.
    row = next((row for row in metrics if row["epoch"] == meta["epoch"]), {})
    key = next((key for key in row if key.startswith("val/robust_acc")), None)
    return key and {"epoch": meta["epoch"], "by": key.removeprefix("val/"), "value": row[key]}


def _attack_of(key: str) -> str:
    """val/robust_acc_pgd10 -> PGD-10."""
    return attack_title(key.removeprefix("val/"))


# Text: the contents once, then one writer for each format


class _Heading(NamedTuple):
    text: str
    level: int = 2


class _Paragraph(NamedTuple):
    text: str


class _Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]


class _Code(NamedTuple):
    text: str


class _Picture(NamedTuple):
    name: str
    alt: str


_Block = _Heading | _Paragraph | _Table | _Code | _Picture


def _contents(runs: list[_Run], examples: list[Examples], dataset: Dataset) -> list[_Block]:
    blocks: list[_Block] = [_Heading("Evaluation"), _evaluation_table(runs)]
    notes = []
    for run in runs:
        for weights, result in run.evaluations.items():
            notes += [f"{run.label} ({weights} weights): {text}" for text in result.get("warnings", ())]
    blocks += [_Paragraph(f"Warning: {note}") for note in notes]
    if any(run.evaluations for run in runs):
        blocks.append(
            _Paragraph(
                f"Accuracy on test images of {dataset.name}, never seen in training. The interval is Wilson's: it "
                "covers the choice of test images, not the choice of seed."
            )
        )
    counts = sorted({result["num_images"] for run in runs for result in run.evaluations.values()})
    if len(counts) > 1:
        blocks.append(
            _Paragraph(
                f"Warning: the rows above are not all of the same test images ({', '.join(f'{n:,}' for n in counts)}): "
                "compare rows of one number only, or call `fastarat eval` again with the same --limit."
            )
        )
    if len({_budget(run.meta) for run in runs}) > 1:
        blocks.append(
            _Paragraph(
                "The runs were trained and validated at different budgets: their robust accuracies on validation, and "
                "the images of the grid, do not compare."
            )
        )
    blocks += [_Paragraph(f"Note on {dataset.name}: {note}") for note in dataset.notes]
    attacks = sorted({_attack_of(key) for run in runs if (key := _robust_key(run))})
    robust = f", robust accuracy under {' and '.join(attacks)}" if attacks else ""
    blocks += [
        _Heading("Curves"),
        _Picture("curves.png", f"Training loss and its terms, clean accuracy{robust}, per epoch, of each run"),
        _Paragraph(
            "Validation is in eval mode on images held out of the training set, at each run's budget. Training batches "
            "are augmented and in train mode, and their mean is taken while the weights move. Vertical lines mark "
            "drops of the learning rate."
        ),
        _Heading("Examples"),
        _Picture("examples.png", "Test images, clean and adversarial, with predictions. " + _told(runs, examples)),
        _Paragraph(
            f"The first test images of each class of {dataset.name}, attacked with PGD-{NUM_STEPS} on each run's last "
            "weights at that run's epsilon, in eval mode on the adv branch of split BatchNorm. They illustrate; the "
            "evaluation measures."
        ),
        _Heading("Last metrics"),
        _metrics_table(runs),
        _Heading("Run cards"),
    ]
    for run in runs:
        blocks += [_Heading(run.label, 3), _Code(run.card)]
    return blocks


def _told(runs: list[_Run], examples: list[Examples]) -> str:
    parts = []
    for run, found in zip(runs, examples, strict=True):
        clean, robust = found.correct()
        count = len(found.labels)
        parts.append(f"{run.label}: {clean} of {count} correct clean, {robust} of {count} under PGD-{NUM_STEPS}.")
    return " ".join(parts)


def _evaluation_table(runs: list[_Run]) -> _Table:
    rows = []
    for run in runs:
        if not run.evaluations:
            missing = f"not evaluated yet: fastarat eval {shlex.quote(str(run.path))}"
            rows.append([run.label, "", missing, "", "", "", ""])
        for weights, result in run.evaluations.items():
            settings, count = result["settings"], result["num_images"]
            for name, key in settings["attacks"].items():
                value = result["accuracy"][key]
                low, high = wilson(value, count)
                budget = "" if name == "clean" else _budget(settings)
                interval = f"{low:.2%} to {high:.2%}"
                rows.append(
                    [
                        run.label,
                        weights,
                        "none (clean)" if name == "clean" else _attack_of(key),
                        budget,
                        f"{count:,}",
                        f"{value:.2%}",
                        interval,
                    ]
                )
    return _Table(["run", "weights", "attack", "budget", "images", "accuracy", "95 % interval"], rows)


def _metrics_table(runs: list[_Run]) -> _Table:
    keys = list(dict.fromkeys(key for run in runs for key in run.metrics[-1]))
    keys.sort(key=lambda key: key.startswith("val/"))
    rows = []
    for key in keys:
        name = "train/robust_acc (the run's training attack)" if key == "train/robust_acc" else key
        rows.append([name, *(_value(key, run.metrics[-1].get(key)) for run in runs)])
    best = ["best epoch on validation"]
    for run in runs:
        by = run.best and ("clean" if run.best["by"] == "clean_acc" else f"under {_attack_of(run.best['by'])}")
        best.append(f"{run.best['epoch']} (chosen by {run.best['value']:.2%} {by})" if run.best else "none")
    return _Table(["", *(run.label for run in runs)], [*rows, best])


def _value(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if "_acc" in key:
        return f"{value:.2%}"
    return f"{value:,.0f}" if key == "images_per_s" else f"{value:.1f}" if key == "wall_s" else f"{value:.4g}"


def _markdown(title: str, blocks: list[_Block]) -> str:
    def safe(text: str) -> str:
        text = html.escape(" ".join(text.split()), quote=False)
        # An underscore inside a word is plain text already.
        return re.sub(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    parts = [f"# {safe(title)}"]
    for block in blocks:
        match block:
            case _Heading(text, level):
                parts.append(f"{'#' * level} {safe(text)}")
            case _Paragraph(text):
                parts.append(safe(text))
            case _Table(head, rows):
                lines = [line([safe(cell) for cell in row]) for row in (head, *rows)]
                parts.append("\n".join([lines[0], line(["---"] * len(head)), *lines[1:]]))
            case _Code(text):  # indented, so that nothing in it can close it
                parts.append("\n".join("    " + row for row in text.splitlines()))
            case _Picture(name, alt):
                parts.append(f"![{safe(alt)}]({name})")
    return "\n\n".join(parts) + "\n"


_CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --line: #dddddd; --soft: #f5f5f3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --line: #3a3d42; --soft: #1f2226; }
}
body { margin: 2rem auto; padding: 0 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
img { display: block; max-width: 100%; box-sizing: border-box; background: #ffffff; padding: .5rem;
  border: 1px solid var(--line); border-radius: .5rem; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: .5rem; overflow-x: auto; font-size: .82rem; }
""".strip()


def _html(title: str, blocks: list[_Block], read: Callable[[str], bytes]) -> str:
    safe = html.escape

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{safe(cell)}</{tag}>" for cell in cells) + "</tr>"

    parts = [f"<h1>{safe(title)}</h1>"]
    for block in blocks:
        match block:
            case _Heading(text, level):
                parts.append(f"<h{level}>{safe(text)}</h{level}>")
            case _Paragraph(text):
                parts.append(f"<p>{safe(text)}</p>")
            case _Table(head, rows):
                body = "\n".join(row(cells, "td") for cells in rows)
                table = f"<table>\n<thead>{row(head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
                parts.append(f'<div class="wide">{table}</div>')
            case _Code(text):
                parts.append(f"<pre>{safe(text)}</pre>")
            case _Picture(name, alt):
                data = base64.b64encode(read(name)).decode("ascii")
                parts.append(f'<img alt="{safe(alt)}" src="data:image/png;base64,{data}">')
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{safe(title)}</title>\n'
        f"<style>\n{_CSS}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
