"""The report's page: figures, tables and cards in one HTML file, and the call that writes it and every figure."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastarat.data import Dataset
from fastarat.device import pick_device
from fastarat.errors import UserError
from fastarat.evaluation import attack_title, collect, wilson
from fastarat.files import make_writable, write_atomic, write_text
from fastarat.report import sections
from fastarat.report.charts import Drawn
from fastarat.report.figures import DPI, curves_figure, examples_figure, visible
from fastarat.report.subjects import (
    NUM_STEPS,
    Examples,
    Subject,
    conditions,
    expanded,
    first_per_class,
    load_data,
    predicted,
    read,
    title_in,
)
from fastarat.texts import printable

# What run folders and data sets say (names, notes, cards) is text, never markup.
_PAGES = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    # Markup is what a macro made of text that went through here.
    finalize=lambda value: printable(value, "\n\t") if type(value) is str else value,
)
_TEMPLATE = Path(__file__).with_name("page.html.jinja")


class Example(NamedTuple):
    """One test image as the page shows it: PNGs as data addresses, names of classes, whether each answer is right."""

    clean: str
    adversarial: str
    perturbation: str
    label: str
    said: tuple[str, str]
    right: tuple[bool, bool]


class Grid(NamedTuple):
    """The examples of one run; scale: how much the perturbations are magnified."""

    run: Subject
    scale: str
    correct: tuple[int, int]
    examples: list[Example]


def report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    num_images: int = 8,
    device: torch.device | str | None = None,
    data_dir: str | Path | None = "data",
    refresh_s: float | None = None,
) -> Path:
    """Write report.html about one or more runs of one data set: a page that needs no other file and no network.

    Beside it lie curves and examples (.png and .svg), and in figures/ every chart of the page as both.

    Args:
        runs: run folders, or folders of `fastarat compare`, which stand for the runs in them; a folder named twice
            counts once. Their last weights are shown; a run that has none yet, or whose data or network was given in
            Python, is shown without example images.
        out: folder to write into, made if missing; default: `report` in the first run, or in the comparison's folder.
        num_images: test images in the grid, the first one of each class, then the second ones ...
        device: where the adversarial images are made; default: the GPU if there is one.
        data_dir: where the data set is kept; None: where the first run found it.
        refresh_s: seconds after which the page reloads itself in a browser; None: never.
    Returns: the path of report.html.
    Raises: UserError for a folder that is no run or has no metrics yet, runs of different data sets or image shapes, an
        unreadable eval.json, and a folder that cannot be written.
    """
    if num_images < 1:
        raise UserError(f"num_images={num_images}: expected 1 or more test images in the grid")
    device = pick_device(str(device or "auto"))
    if not runs:
        raise UserError("no run given: expected one run folder or more")
    subjects = read(expanded(runs))
    folder = Path(out) if out is not None else Path(runs[0]) / "report"
    make_writable(folder)

    dataset = load_data(subjects[0], data_dir)
    examples = {}
    if len(dataset.test):
        images, labels = collect(first_per_class(dataset.test, num_images))
        examples = {
            run: predicted(run.model, images, labels, epsilon=run.meta["epsilon"], norm=run.meta["norm"], device=device)
            for run in subjects
            if run.model is not None
        }
    charts = {
        "by_epoch": sections.curves(subjects, by_time=False),
        "by_time": sections.curves(subjects, by_time=True),
        "strength": sections.strength(subjects),
        "classes": sections.by_class(subjects, dataset.classes),
        "diagnostics": sections.diagnostics(subjects),
    }
    make_writable(folder / "figures")
    for name, content in _files(subjects, examples, dataset, charts).items():
        # `content` is bound now: a plain closure would see the loop's last one if it were ever called later.
        write_atomic(folder / name, lambda p, content=content: p.write_bytes(content))
    write_text(folder / "report.html", _page(subjects, examples, dataset, charts, refresh_s))
    return folder / "report.html"


def _files(
    subjects: list[Subject], examples: dict[Subject, Examples], dataset: Dataset, charts: dict[str, list[Drawn]]
) -> dict[str, bytes]:
    """Every figure by its file's name."""
    figures = {"curves": curves_figure(subjects)}
    if examples:
        figures["examples"] = examples_figure(list(examples), list(examples.values()), dataset.classes)
    files = {f"{name}.{kind}": _saved(figure, kind) for name, figure in figures.items() for kind in ("png", "svg")}
    for chart in (chart for group in charts.values() for chart in group):
        files |= {f"figures/{chart.name}.svg": chart.svg, f"figures/{chart.name}.png": chart.png}
    return files


def _page(
    subjects: list[Subject],
    examples: dict[Subject, Examples],
    dataset: Dataset,
    charts: dict[str, list[Drawn]],
    refresh_s: float | None,
) -> str:
    evaluations = [result for run in subjects for result in run.evaluations.values()]
    return _PAGES.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        refresh=None if refresh_s is None else Markup(refresh_line(refresh_s)),
        runs=subjects,
        dataset=dataset,
        charts=charts,
        grids=[_grid(run, found, dataset) for run, found in examples.items()],
        num_steps=NUM_STEPS,
        head=sections.HEAD,
        leaders=sections.leaderboard(subjects),
        gaps=sections.gaps(subjects),
        cards=sections.cards(subjects),
        lacking={name: [_quoted(run) for run in sections.without(subjects, name)] for name in ("curves", "per_class")},
        evaluation=evaluation_rows(subjects),
        counts=sorted({result["num_images"] for result in evaluations}),
        attacks=sorted({attack_title(run.robust_key) for run in subjects if run.robust_key}),
        metrics=metric_rows(subjects),
    )


def refresh_line(refresh_s: float) -> str:
    """The page's line that has a browser load it again."""
    return f'<meta http-equiv="refresh" content="{math.ceil(refresh_s)}">'


def _quoted(run: Subject) -> str:
    return shlex.quote(str(run.path))


def _saved(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    # A version or a date would change the file for nothing.
    nothing = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastarat"}):
        figure.savefig(file, format=kind, dpi=DPI, metadata=nothing)
    return file.getvalue()


def _grid(run: Subject, found: Examples, dataset: Dataset) -> Grid:
    difference = found.adversarial - found.clean
    factor, scale = visible(difference)
    magnified = (0.5 + factor * difference).clamp(0, 1)
    examples = []
    for i, label in enumerate(found.labels.tolist()):
        said = (int(found.clean_pred[i]), int(found.adv_pred[i]))
        clean, adversarial, perturbation = (_address(x[i]) for x in (found.clean, found.adversarial, magnified))
        right = (said[0] == label, said[1] == label)
        names = (dataset.classes[said[0]], dataset.classes[said[1]])
        examples.append(Example(clean, adversarial, perturbation, dataset.classes[label], names, right))
    return Grid(run, scale, found.correct(), examples)


def _address(image: Tensor) -> str:
    """Return one image [C, H, W] in [0, 1] as a data address: grey for one channel, colour for three."""
    pixels = (image.permute(1, 2, 0) if image.shape[0] == 3 else image.mean(0)).mul(255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def evaluation_rows(runs: Sequence[Subject]) -> list[list[str]]:
    """One row per run, weights and attack: run, weights, attack, budget, images, accuracy, 95 % interval."""
    rows = []
    for run in runs:
        if not run.evaluations:
            missing = f"not evaluated yet: fastarat eval {shlex.quote(str(run.path))}"
            rows.append([run.label, "", missing, "", "", "", ""])
        for weights, result in run.evaluations.items():
            settings, count = result["settings"], result["num_images"]
            for name, key in settings.get("attacks", {}).items():
                value = result["accuracy"][key]
                low, high = wilson(value, count)
                attacked = name != "clean"
                attack = [
                    title_in(settings, key) if attacked else "none (clean)",
                    conditions(settings, attacked=attacked),
                ]
                rows.append([run.label, weights, *attack, f"{count:,}", f"{value:.2%}", f"{low:.2%} to {high:.2%}"])
    return rows


def metric_rows(runs: Sequence[Subject]) -> list[list[str]]:
    """One row per metric of the last epoch, one column per run; validation last, and then the best epoch."""
    # In the order they were logged; runs of different defenses have different terms.
    # Not each layer's: a network has dozens of them, and metrics.jsonl has all.
    keys = list(dict.fromkeys(key for run in runs for key in run.metrics[-1] if key.count("/") < 2))
    keys.sort(key=lambda key: key.startswith("val/"))
    rows = []
    for key in keys:
        name = "train/robust_acc (the run's training attack)" if key == "train/robust_acc" else key
        rows.append([name, *(_value(key, run.metrics[-1].get(key)) for run in runs)])
    return [*rows, ["best epoch on validation", *(_best(run.best) for run in runs)]]


def _best(best: dict[str, Any] | None) -> str:
    if best is None:
        return "none"
    by = "clean" if best["by"] == "clean_acc" else f"under {attack_title(best['by'])}"
    return f"{best['epoch']} (chosen by {best['value']:.2%} {by})"


def _value(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if "_acc" in key:
        return f"{value:.2%}"
    return f"{value:,.0f}" if key == "images_per_s" else f"{value:.1f}" if key == "wall_s" else f"{value:.4g}"
