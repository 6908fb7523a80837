"""What the sections of the page say, as plain values: leaderboard, gaps, cards, and the charts of every section."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from fastarat.errors import UserError
from fastarat.evaluation import attack_title, wilson
from fastarat.report.charts import CLASSES, Chart, Drawn, Line, draw_classes, draw_confusion, draw_lines
from fastarat.report.subjects import Subject, conditions, title_in

T = TypeVar("T")


class Cell(NamedTuple):
    """A cell of a table: what it says, and a smaller second line."""

    text: str
    note: str = ""


MISSING = Cell("not measured")
HEAD = ("run", "clean", "PGD", "AutoAttack", "Sum", "NRR", "time", "images")


def leaderboard(runs: Sequence[Subject]) -> list[list[Cell]]:
    """One row per run (and weights, where several were evaluated), the highest NRR first, then the highest PGD.

    By Sum a network without any robustness would stand at the top. Source of NRR: Gowda et al., ICLR 2024.
    """
    rows: list[tuple[tuple, list[Cell]]] = []
    counts = [result["num_images"] for run in runs for result in run.evaluations.values()]
    usual = statistics.mode(counts) if counts else 0
    for run in runs:
        epoch = [row["wall_s"] for row in run.metrics if "wall_s" in row]
        timed = Cell(f"{_time(statistics.mean(epoch))} an epoch", f"{_time(sum(epoch))} in all") if epoch else MISSING
        if not run.evaluations:
            how = f"not evaluated yet: fastarat eval {shlex.quote(str(run.path))}"
            cells = [Cell(run.label, how), *[MISSING] * 5, timed, Cell("0")]
            rows.append(((-1.0, -1.0), cells))
        for weights, result in run.evaluations.items():
            rows.append(_ranked(run, weights, result, timed, usual))
    return [cells for _, cells in sorted(rows, key=lambda row: row[0], reverse=True)]


def _ranked(run: Subject, weights: str, result: dict, timed: Cell, usual: int) -> tuple[tuple, list[Cell]]:
    accuracy, settings, count = result["accuracy"], result["settings"], result["num_images"]

    def measured(key: str | None, note: str = "") -> Cell:
        if key is None or key not in accuracy:
            return MISSING
        low, high = wilson(accuracy[key], count)
        return Cell(f"{accuracy[key]:.2%}", f"{note}{low:.1%} to {high:.1%}")

    pgds = [key for key in accuracy if key.startswith("robust_acc_pgd")]
    pgd = "robust_acc_pgd20" if "robust_acc_pgd20" in pgds else next(iter(pgds), None)
    full = next((key for key in ("robust_acc_aa", "robust_acc_aa_fast") if key in accuracy), None)
    fast = ""
    if full == "robust_acc_aa_fast":
        confirmed = settings.get("confirmed", {}).get("autoattack-fast", False)
        fast = "AutoAttack-fast: " if confirmed else "AutoAttack-fast (unconfirmed): "
    total = nrr = MISSING
    rank = (-1.0, accuracy.get(pgd, -1.0))
    if full and "clean_acc" in accuracy:
        clean, robust = accuracy["clean_acc"], accuracy[full]
        total = Cell(f"{100 * (clean + robust):.2f}")
        harmonic = 2 * clean * robust / (clean + robust) if clean + robust else 0.0
        nrr = Cell(f"{100 * harmonic:.2f}")
        rank = (harmonic, rank[1])
    mixed = "≠ other rows' number of images" if count != usual else ""
    return rank, [
        Cell(run.label, f"{weights} weights, {conditions(settings)}"),
        measured("clean_acc"),
        measured(pgd, f"{attack_title(pgd)}: " if pgd else ""),
        measured(full, fast),
        total,
        nrr,
        timed,
        Cell(f"{count:,}", mixed),
    ]


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def gaps(runs: Sequence[Subject]) -> list[list[Cell]]:
    """Best epoch against the last one, under PGD on validation images: run, best, last, gap (robust overfitting)."""
    rows = []
    for run in runs:
        key = run.robust_key
        measured = [row for row in run.metrics if key and row.get(key) is not None]
        if not key or not measured:
            rows.append([Cell(run.label), *[MISSING] * 3])
            continue
        chosen = [row for row in measured if run.best and row["epoch"] == run.best["epoch"]]
        best = chosen[0] if chosen else max(measured, key=lambda row, key=key: row[key])
        why = "the best checkpoint" if chosen else "the highest"
        last = measured[-1]
        points = 100 * (best[key] - last[key])
        rows.append([
            Cell(run.label, attack_title(key)),
            Cell(f"{best[key]:.2%}", f"epoch {best['epoch']}, {why}"),
            Cell(f"{last[key]:.2%}", f"epoch {last['epoch']}"),
            Cell(f"{points:+.2f} points"),
        ])  # fmt: skip
    return rows


def cards(runs: Sequence[Subject]) -> list[tuple[str, bool, list[str]]]:
    """Each fact of the run cards: its name, whether the runs differ in it, and what each run's card says."""
    split = []
    for run in runs:
        facts: dict[str, str] = {}
        for number, line in enumerate(run.card.splitlines()):
            name, _, text = line.partition("  ")
            facts[name if text else f"line {number + 1}"] = (text or line).strip()
        split.append(facts)
    names = dict.fromkeys(name for facts in split for name in facts)
    rows = [(name, [facts.get(name, "") for facts in split]) for name in names]
    return [(name, len(set(texts)) > 1, texts) for name, texts in rows]


def curves(runs: Sequence[Subject], by_time: bool) -> list[Drawn]:
    """Loss, its weighted terms, accuracies and learning rate, by epoch or by minutes of training."""
    terms = list(dict.fromkeys(key for run in runs for key in run.terms))
    robust = list(dict.fromkeys(run.robust_key for run in runs if run.robust_key))
    panels = [
        ("loss", "Training loss", ["train/loss"], ["loss"], False),
        ("terms", "Weighted terms of the loss", terms,
         [f"{key.removeprefix('train/')} (weighted)" for key in terms], False),
        ("clean", "Clean accuracy", ["val/clean_acc", "train/clean_acc"], ["validation", "training batches"], True),
        ("robust", "Robust accuracy", [*robust, "train/robust_acc"],
         [*(f"validation, {attack_title(key)}" for key in robust), "training attack"], True),
        ("lr", "Learning rate", ["lr"], ["lr"], False),
    ]  # fmt: skip
    drawn = []
    for name, title, keys, kinds, percent in panels:
        lines = [line for i, key in enumerate(keys) for n, run in enumerate(runs)
                 for line in _line(run, n, key, i, by_time)]  # fmt: skip
        if lines:
            unit = "minutes of training" if by_time else "epoch"
            chart = Chart(f"{name}{'-time' * by_time}", title, unit, lines, kinds, percent, log_y=not percent)
            drawn.append(draw_lines(chart, [run.label for run in runs]))
    return drawn


def _line(run: Subject, number: int, key: str, kind: int, by_time: bool = False) -> list[Line]:
    if key.startswith("train/") and key not in ("train/loss", "train/clean_acc", "train/robust_acc", *run.terms):
        return []  # the name of a single term, which is the loss, may be one of another run's several
    x, y, passed, ring = [], [], 0.0, None
    for row in run.metrics:
        passed += row.get("wall_s", 0.0) / 60
        if row.get(key) is not None:
            x.append(passed if by_time else row["epoch"])
            y.append(row[key])
            if run.best and row["epoch"] == run.best["epoch"] and key in ("val/clean_acc", run.robust_key):
                ring = x[-1]
    return [Line(number, x, y, kind, ring)] if x else []


def strength(runs: Sequence[Subject]) -> list[Drawn]:
    """Accuracy against epsilon and against PGD steps, of the evaluations that have `curves`."""
    lines: dict[str, list[Line]] = {"epsilon": [], "steps": []}
    for number, run in enumerate(runs):
        for name in lines if (found := _of(run, "curves")) else ():
            lines[name].append(_checked(run, "curves", lambda i=number, f=found, n=name: _against(i, f[n], n)))
    epsilon = Chart("epsilon", "Accuracy against epsilon (PGD-20)", "epsilon (of 255)", lines["epsilon"], (), True)
    steps = Chart("steps", "Accuracy against PGD steps", "steps of PGD", lines["steps"], (), True, log_x=True)
    names = [run.label for run in runs]
    return [draw_lines(chart, names) for chart in (epsilon, steps) if chart.lines]


def _against(number: int, curve: dict, name: str) -> Line:
    x = [float(value) * (255 if name == "epsilon" else 1) for value in curve["values"]]
    y = [float(value) for value in curve["accuracy"]]
    if len(x) != len(y):
        raise ValueError
    return Line(number, x, y)


def by_class(runs: Sequence[Subject], classes: Sequence[str]) -> list[Drawn]:
    """Clean and robust accuracy of each class, and the confusion matrix, of each run that measured them."""
    drawn = []
    for number, run in enumerate(runs):
        if found := _of(run, "per_class"):
            drawn.append(_checked(run, "per_class", lambda run=run, i=number, f=found: _classes(run, i, f, classes)))
        if matrices := _of(run, "confusion"):
            drawn.append(_checked(run, "confusion", lambda r=run, i=number, m=matrices: _confused(r, i, m, classes)))
    return drawn


def _classes(run: Subject, number: int, found: dict, classes: Sequence[str]) -> Drawn:
    sizes = _of(run, "class_counts")
    shares = {key: [n / size if size else 0.0 for n, size in zip(counts, sizes, strict=True)]
              for key, counts in found.items()}  # fmt: skip
    key = _strongest(found)
    if any(len(values) != len(classes) for values in shares.values()):
        raise ValueError
    few = f" (the {CLASSES} least robust)" if len(classes) > CLASSES else ""
    title = f"{_titled(run, key) if key else 'clean'} by class{few}: {run.label}"
    return draw_classes(f"classes-{number}", title, classes, shares.get("clean_acc"), shares[key] if key else None)


def _confused(run: Subject, number: int, matrices: dict, classes: Sequence[str]) -> Drawn:
    key = _strongest(matrices) or "clean_acc"
    counts = matrices[key]
    if len(counts) != len(classes) or any(len(row) != len(classes) for row in counts):
        raise ValueError
    return draw_confusion(f"confusion-{number}", f"{_titled(run, key)} confusion: {run.label}", classes, counts)


def _strongest(found: dict) -> str | None:
    """The key of the attack to show: AutoAttack where it was run, else what leaves the fewest; transfer comes last.

    found: counts by class, or confusion matrices, whose diagonals are those.
    """

    def left(key: str) -> int:
        return sum(row[i] if isinstance(row, list) else row for i, row in enumerate(found[key]))

    keys = sorted(
        (key for key in found if key.startswith("robust_acc")),
        key=lambda key: (key == "robust_acc_transfer", left(key)),
    )
    return next((key for key in ("robust_acc_aa", "robust_acc_aa_fast") if key in keys), keys[0] if keys else None)


def _titled(run: Subject, key: str) -> str:
    return next(
        (title_in(r["settings"], key) for r in run.evaluations.values() if key in r["accuracy"]), attack_title(key)
    )


def _of(run: Subject, name: str) -> Any:
    """Return a part of the evaluations that not all have: of the last weights, or of the first that have it."""
    return next((result[name] for result in run.evaluations.values() if result.get(name)), None)


def without(runs: Sequence[Subject], name: str) -> list[Subject]:
    """Return the runs whose evaluations lack a part."""
    return [run for run in runs if not _of(run, name)]


def _checked(run: Subject, name: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(
            f"{run.path}: `{name}` of its evaluation is damaged, or of other classes: expected what `fastarat eval` "
            f"writes; fastarat eval {shlex.quote(str(run.path))} measures it anew"
        ) from None


DIAGNOSTICS = {
    "grad_sim": "Gradient similarity (cosine)",
    "grad_conflict": "Gradient conflict (share of pairs)",
    "bn_distance_mean": "BatchNorm means, clean to adversarial",
    "bn_distance_std": "BatchNorm deviations, clean to adv",
    "bn_stability_shared": "BatchNorm stability, shared",
    "bn_stability_clean": "BatchNorm stability, clean branch",
    "bn_stability_adv": "BatchNorm stability, adv branch",
    "rep_distance": "Representation distance ‖z' − z‖",
}


def diagnostics(runs: Sequence[Subject]) -> list[Drawn]:
    """The paper's diagnostics by epoch, where the runs have them; single layers are in the table of last metrics."""
    keys = list(dict.fromkeys(key for run in runs for row in run.metrics for key in row if _is_diagnostic(key)))
    drawn = []
    for number, key in enumerate(keys):
        name = key.removeprefix("diag/")
        lines = [line for n, run in enumerate(runs) for line in _line(run, n, key, 0)]
        if lines:
            chart = Chart(f"diagnostic-{number}", DIAGNOSTICS.get(name, name), "epoch", lines)
            drawn.append(draw_lines(chart, [run.label for run in runs]))
    return drawn


def _is_diagnostic(key: str) -> bool:
    return key.startswith("diag/") and key.count("/") == 1
