"""Tuning of a comparison: which settings each row tries, the rule that chooses among them, and what is said of it."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastarat.errors import UserError, nearest
from fastarat.files import write_text
from fastarat.texts import markdown

FINALISTS = 2
"""Settings of a row that get all tuning seeds; the others get the first one only."""
_ADDED = ("awp", "awp_warmup")
_TUNED = ("bn", "start", "objective", "num_steps", "step_size", "num_restarts")

Settings = dict[str, Any]
"""As flags would say it: {"optim.lr": 0.03}."""


class Choice(NamedTuple):
    """What tuning chose for a row, and every setting that was tried."""

    settings: Settings
    tried: list[dict[str, Any]]


def parse_tune(flags: Sequence[str]) -> dict[str, list[str]]:
    """Turn `["optim.lr=0.03,0.1", "ar-at:defense.gamma=5,30"]` into what `compare` takes as `tune`."""
    tune: dict[str, list[str]] = {}
    for flag in flags:
        key, equals, values = flag.partition("=")
        chosen = [v.strip() for v in values.split(",") if v.strip()]
        if not equals or not chosen:
            raise UserError(f"--tune {flag}: expected NAME=VALUE,VALUE, such as optim.lr=0.03,0.1")
        if key in tune:
            raise UserError(f"--tune names {key} twice: give all its values at once")
        tune[key] = chosen
    return tune


def grids_of(defenses: Sequence[str], tune: Mapping[str, Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return every combination of the values that apply to each row, in the order given."""
    axes: dict[str, dict[str, list[Any]]] = {d: {} for d in defenses}
    for name, values in tune.items():
        row, key, part, field = parts_of(name)
        if row and row not in axes:
            raise UserError(f"tune: {name}: no such row {row!r}{nearest(row, axes) or '.'} Rows: {', '.join(axes)}.")
        if isinstance(values, str) or not values:
            raise UserError(f"tune: {name}={values!r}: expected a list of values")
        # The threat model, the data and the length stay out: choosing those per row would compare different tasks.
        own = part == "defense" and field != "name" and bool(field)
        if not (own or (part == "optim" and field) or (part == "attack" and field in _TUNED) or part in _ADDED):
            raise UserError(
                f"tune: {name}: only settings that leave rows comparable can be chosen: defense.*, optim.*, "
                f"{', '.join(f'attack.{f}' for f in _TUNED)}, {', '.join(_ADDED)}; others are given to all rows"
            )
        for d in [row] if row else defenses:
            axes[d][key] = list(values)
    return {d: combinations(a) for d, a in axes.items()}


def parts_of(name: str) -> tuple[str, str, str, str]:
    """Take `ROW:PART.FIELD` apart: row ("": all), key, and the key's part and field."""
    row, _, key = name.rpartition(":")
    key = key.removeprefix("--").replace("-", "_")
    part, _, field = key.partition(".")
    return row, key, part, field


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Every combination of the values, in the order given; the last name's vary fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def choose(
    grids: Mapping[str, Sequence[Settings]],
    seeds: Sequence[int],
    scored: Callable[[list[tuple[str, Settings, int]]], list[dict[str, Any]]],
) -> dict[str, Choice]:
    """Choose the settings of each row: all are tried with the first seed, the best of those with the others.

    scored: trains each (row, settings, seed), and returns for each a dict that holds `score` and `diverged`.
    Raises: UserError when all that was tried for a row diverged.
    """
    tried = {
        row: [{"settings": settings, "runs": [], "chosen": False} for settings in grid]
        for row, grid in grids.items()
        if len(grid) > 1
    }

    def add(trials: dict[str, list[dict[str, Any]]], seeds: Sequence[int]) -> None:
        jobs = [(row, t, seed) for row, all_ in trials.items() for t in all_ for seed in seeds]
        scores = scored([(row, t["settings"], seed) for row, t, seed in jobs])
        for (_, t, seed), score in zip(jobs, scores, strict=True):
            t["runs"].append({"seed": seed, **score})
            t["mean"] = statistics.fmean(r["score"] for r in t["runs"])

    add(tried, seeds[:1])
    # One round of successive halving: most settings are seen to be bad with one seed, and luck decides only near the
    # top.
    add({row: sorted(all_, key=lambda t: -t["mean"])[:FINALISTS] for row, all_ in tried.items()}, seeds[1:])
    chosen = {row: Choice(grid[0], []) for row, grid in grids.items()}
    for row, all_ in tried.items():
        # Of equals, the one named first.
        best = max((t for t in all_ if len(t["runs"]) == len(seeds)), key=lambda t: t["mean"])
        if all(r["diverged"] for r in best["runs"]):
            raise UserError(f"every setting tried for {row} diverged: give --tune smaller values of optim.lr")
        best["chosen"] = True
        chosen[row] = Choice(best["settings"], all_)
    return chosen


def rule(seeds: Sequence[int], rows: Sequence[str]) -> str:
    """How settings were chosen, in a sentence or two."""
    averaged = " (+swa: of the network before averaging)" if any("+swa" in row for row in rows) else ""
    return (
        "Settings (of N) were chosen among N combinations on validation images, by the same rule in every row: highest "
        "mean of clean + PGD accuracy, clean alone for what is trained on clean images, after the last epoch"
        f"{averaged}; every combination with seed {seeds[0]}"
        + (f", the best {FINALISTS} with seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "")
        + ". The test images chose nothing."
    )


def in_words(settings: Settings) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "its own defaults"


def save(out: Path, chosen: dict[str, Choice], seeds: Sequence[int]) -> None:
    """Write tune.json and tune.md: all that was tried, the rule, and what it chose."""
    out.mkdir(parents=True, exist_ok=True)
    said = rule(seeds, list(chosen))
    record = {"rule": said, "seeds": list(seeds), "rows": {row: c._asdict() for row, c in chosen.items()}}
    write_text(out / "tune.json", json.dumps(record, indent=2) + "\n")
    lines = ["| row | settings | seeds | clean | PGD | score | |", "| --- | --- |" + " ---: |" * 4 + " --- |"]
    for row, choice in chosen.items():
        for t in sorted(choice.tried, key=lambda t: (-len(t["runs"]), -t["mean"])):
            cells = [markdown(row), markdown(in_words(t["settings"])), str(len(t["runs"]))]
            for key in ("clean_acc", "robust_acc"):
                values = [r[key] for r in t["runs"] if key in r]
                cells.append(f"{100 * statistics.fmean(values):.1f}" if values else "–")
            diverged = sum(r["diverged"] for r in t["runs"])
            notes = ["chosen"] * t["chosen"] + [f"{diverged} diverged"] * bool(diverged)
            lines.append("| " + " | ".join([*cells, f"{100 * t['mean']:.1f}", ", ".join(notes)]) + " |")
    write_text(out / "tune.md", "\n".join([*lines, "", markdown(said), ""]))
