"""Sweeps: the rows of a comparison, laid out as the product of lists of values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastarat.config import Config, read_yaml, resolve_defense, to_dict
from fastarat.defenses.naming import is_code
from fastarat.errors import UserError, nearest
from fastarat.plans import row_spec
from fastarat.table import settings_in_words
from fastarat.tuning import combinations, in_words, parts_of
from fastarat.values import flat, shown

MOST_ROWS = 100
"""Rows of a sweep: more are hardly meant, and no table of theirs is read."""
# One table compares one task: its data, its threat model and its seeds are every row's.
_SHARED = ("dataset", "data_dir", "image_size", "eval.", "attack.epsilon", "attack.norm", "seed", "out", "extended")
_MACHINE = (
    "device", "threads", "loader", "log_every", "checkpoint_every", "tensorboard", "loggers", "diagnostics",
    "precision", "amp",
)  # fmt: skip


def read_sweep(
    file: str | Path, defenses: Sequence[str] | None = None, flags: Iterable[str] = ()
) -> dict[str, dict[str, Any]]:
    """Read the lists of a YAML file and lay out its rows. defenses, flags: given beside it, these by their names.

    Raises: UserError as `rows_of_sweep` does, and for a defense that is code and named by the file alone.
    """
    values = dict(read_yaml(file))
    named = values.get("defense")
    for name in named if isinstance(named, list) else ():
        if is_code(str(name).partition("+")[0]):
            raise UserError(
                f"{file}: its defense {name} is code, which runs only where the command line names it: if you trust "
                f"that file, write --defenses {name} and leave `defense` out of the sweep"
            )
    if defenses and "defense" in values:
        raise UserError(f"{file} lists `defense`, and --defenses does too: give one")
    listed = {parts_of(key)[1] for key, _ in flat(values)}
    if twice := sorted(listed & set(flags)):
        raise UserError(f"{file} lists `{twice[0]}`, and --{twice[0].replace('_', '-')} gives one: give it once")
    return rows_of_sweep(values if not defenses else {"defense": list(defenses), **values}, source=str(file))


def rows_of_sweep(values: Mapping[str, Any], *, source: str = "sweep") -> dict[str, dict[str, Any]]:
    """Return the rows of a sweep as `compare(rows=...)` takes them: every combination, named by what differs.

    values: lists by name, as in `tune` of `compare`: {"defense": ["at", "trades"], "optim.lr": [0.1, 0.05],
        "defense.beta": [1, 6], "at:optim.warmup": [0, 5]}. A hyper-parameter of a defense is for the rows whose defense
        has it; a name that starts with a defense is for that one alone.
    Raises: UserError for what is no list, a name that no row has or that all rows share, over MOST_ROWS rows.
    """
    lists = {key: _listed(source, key, value) for key, value in flat(values)}
    defenses = [str(name) for name in lists.pop("defense", ())]
    if not defenses:
        raise UserError(f"{source}: it names no defense: write `defense: [at, trades]`, or give --defenses")
    if len(set(defenses)) != len(defenses):
        raise UserError(f"{source}: defense={','.join(defenses)}: one is named twice")
    axes = _axes(source, defenses, lists)
    count = sum(math.prod(len(found) for found in own.values()) for own in axes.values())
    if count > MOST_ROWS:
        raise UserError(f"{source}: {count:,} rows, and {MOST_ROWS} are the most: leave values out, or make two sweeps")
    rows: dict[str, dict[str, Any]] = {}
    for defense, own in axes.items():
        words = _words_of(own)
        for settings in combinations(own):
            differs = {words[key]: value for key, value in settings.items() if len(own[key]) > 1}
            name = ", ".join([defense, *([settings_in_words(differs)] if differs else [])])
            if name in rows:
                raise UserError(f"{source}: {defense} would have the row {in_words(settings)} twice")
            rows[name] = {"defense": defense, **settings}
    return rows


def check_distinct(configs: Mapping[str, Config]) -> None:
    """Raise UserError for two rows, by name, that are one run: their resolved configs differ in the folder alone."""
    seen: dict[str, dict[str, Any]] = {}
    for row, config in configs.items():
        found = {**to_dict(config), "out": None}
        if other := next((name for name, one in seen.items() if one == found), None):
            raise UserError(f"the rows {other!r} and {row!r} are the same run: leave one out")
        seen[row] = found


def _axes(source: str, defenses: Sequence[str], lists: Mapping[str, list[Any]]) -> dict[str, dict[str, list[Any]]]:
    """The lists that apply to each defense."""
    known = [key for key, _ in flat(to_dict(Config()))]
    kinds = {
        name: {f.name for f in dataclasses.fields(resolve_defense(row_spec(name, {}).defense))} for name in defenses
    }
    axes: dict[str, dict[str, list[Any]]] = {name: {} for name in defenses}
    for name, values in lists.items():
        row, key, part, field = parts_of(name)
        if row and row not in axes:
            raise UserError(
                f"{source}: {name}: no such defense {row!r}{nearest(row, axes) or '.'} Here: {', '.join(axes)}."
            )
        given = [row] if row else defenses
        having = given if part != "defense" else [one for one in given if field in kinds[one]]
        if part == "defense" and not having:
            fields = {field for one in given for field in kinds[one]}
            raise UserError(
                f"{source}: {name}: no row can have it: {', '.join(given)} "
                f"{'has' if len(given) == 1 else 'have'} no {field!r}{nearest(field, fields) or ''}"
            )
        if part != "defense" and key not in known:
            raise UserError(f"{source}: unknown key {name!r}{nearest(key, known) or '.'}")
        for shared, why in (
            (_SHARED, "every row's, or one table would compare several tasks"),
            (_MACHINE, "every run's"),
        ):
            if key in shared or f"{part}." in shared:
                how = "--seeds" if key == "seed" else f"--{key.replace('_', '-')}"
                raise UserError(f"{source}: {name}: it is {why}: give {how} beside the sweep")
        for one in having:
            if key in axes[one] and not row:
                continue  # what is given for one defense alone stands
            axes[one][key] = values
    return axes


def _listed(source: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(
            f"{source}: {key}={shown(value)}: expected a list of values, such as [0.1, 0.05]; what all rows share is a "
            "flag, or a line of --config"
        )
    return list(value)


def _words_of(keys: Iterable[str]) -> dict[str, str]:
    """Short names of settings: the last part, where it says which one is meant."""
    keys = list(keys)
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: short if last.count(short) == 1 else key.replace(".", " ") for key, short in zip(keys, last, strict=True)
    }
