"""The report's page: its numbers as text, and the one call that writes pictures and page."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from matplotlib.figure import Figure

from fastarat.device import pick_device
from fastarat.errors import UserError
from fastarat.evaluation import attack_title, collect, wilson
from fastarat.files import make_writable, write_atomic, write_text
from fastarat.report.figures import DPI, curves_figure, examples_figure
from fastarat.report.subjects import NUM_STEPS, Subject, budget_of, first_per_class, load_data, predicted, read
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


def report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    num_images: int = 8,
    device: torch.device | str | None = None,
    data_dir: str | Path | None = "data",
    refresh_s: float | None = None,
) -> Path:
    """Write curves.png, examples.png and report.html, which embeds both, about one or more runs of one data set.

    Args:
        runs: run folders; a folder named twice counts once. Their last weights are shown.
        out: folder to write into, made if missing; default: `report` in the first run.
        num_images: test images in the grid, the first one of each class, then the second ones ...
        device: where the adversarial images are made; default: the GPU if there is one.
        data_dir: where the data set is kept; None: where the first run found it.
        refresh_s: seconds after which the page reloads itself in a browser; None: never.
    Returns: the path of report.html.
    Raises: UserError for a folder that is no run or has no metrics or weights yet, runs of different data sets or image
        shapes, an unreadable eval.json, and a folder that cannot be written.
    """
    if num_images < 1:
        raise UserError(f"num_images={num_images}: expected 1 or more test images in the grid")
    device = pick_device(str(device or "auto"))
    paths = list({Path(run).resolve(): Path(run) for run in runs}.values())
    if not paths:
        raise UserError("no run given: expected one run folder or more")
    subjects = read(paths)
    folder = Path(out) if out is not None else paths[0] / "report"
    make_writable(folder)

    dataset = load_data(subjects[0], data_dir)
    images, labels = collect(first_per_class(dataset.test, num_images))
    examples = [
        predicted(run.model, images, labels, epsilon=run.meta["epsilon"], norm=run.meta["norm"], device=device)
        for run in subjects
    ]
    figures = {"curves": curves_figure(subjects), "examples": examples_figure(subjects, examples, dataset.classes)}
    pictures = {name: _png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        # `picture` is bound now: a plain closure would see the loop's last one if it were ever called later.
        write_atomic(folder / f"{name}.png", lambda p, picture=picture: p.write_bytes(picture))
    evaluations = [result for run in subjects for result in run.evaluations.values()]
    page = _PAGES.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        refresh=None if refresh_s is None else Markup(refresh_line(refresh_s)),
        runs=subjects,
        dataset=dataset,
        pictures={name: base64.b64encode(picture).decode("ascii") for name, picture in pictures.items()},
        predictions=[(run.label, *found.correct()) for run, found in zip(subjects, examples, strict=True)],
        num_shown=len(labels),
        num_steps=NUM_STEPS,
        evaluation=evaluation_rows(subjects),
        counts=sorted({result["num_images"] for result in evaluations}),
        attacks=sorted({attack_title(run.robust_key) for run in subjects if run.robust_key}),
        metrics=metric_rows(subjects),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def refresh_line(refresh_s: float) -> str:
    """The page's line that has a browser load it again."""
    return f'<meta http-equiv="refresh" content="{math.ceil(refresh_s)}">'


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})  # a version would change it for nothing
    return file.getvalue()


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
                attack = ["none (clean)", ""] if name == "clean" else [attack_title(key), budget_of(settings)]
                rows.append([run.label, weights, *attack, f"{count:,}", f"{value:.2%}", f"{low:.2%} to {high:.2%}"])
    return rows


def metric_rows(runs: Sequence[Subject]) -> list[list[str]]:
    """One row per metric of the last epoch, one column per run; validation last, and then the best epoch."""
    # In the order they were logged; runs of different defenses have different terms.
    keys = list(dict.fromkeys(key for run in runs for key in run.metrics[-1]))
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
