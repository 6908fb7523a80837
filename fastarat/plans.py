"""One run of a comparison: its files, and how it is trained and evaluated in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastarat.children import last_line
from fastarat.config import DEFENSES, Config, defense_key, write_yaml
from fastarat.errors import UserError, nearest
from fastarat.files import make_writable
from fastarat.runs import Run
from fastarat.values import shown

Call = Callable[[list[str | Path], Path], int]
"""Runs `fastarat ARGV`, its output added to a log, and returns the exit code, or minus the signal that killed it."""


class RowSpec(NamedTuple):
    """What a row trains. defense: its name. swa: whether weights are averaged. own: settings that are its alone.

    label: what its runs' folders are called by.
    """

    defense: str
    swa: bool
    own: dict[str, Any]
    label: str


def row_spec(row: str, rows: Mapping[str, Mapping[str, Any]]) -> RowSpec:
    """Return what `row` stands for: a defense, with `+swa` or not, or an entry of `rows`, named as one likes.

    Raises: UserError for another add-on.
    """
    own = dict(rows.get(row, {}))
    bare, plus, addon = str(own.pop("defense", row)).partition("+")
    if plus and addon != "swa":
        raise UserError(f"unknown add-on {addon!r} in {row!r}: only +swa")
    path, _, cls = bare.partition(":")
    label = f"{f'{Path(path).stem}-{cls}' if cls else bare}{plus}{addon}"
    if row in rows:
        label = re.sub(r"[^A-Za-z0-9._+-]+", "-", row).strip("-.") or "row"
    return RowSpec(bare, bool(plus), own, label)


_EACH_RUNS = {"seed": "seeds", "out": "out", "defense.name": "defense"}


def checked_rows(rows: Any, defenses: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return what names in `defenses` stand for that are no defense's; None is nothing.

    Raises: UserError for another form, a name that `defenses` lacks, or a key that is not a row's own. What is no
        setting of `Config` shows once a run is planned.
    """
    rows = {} if rows is None else rows
    expected = "expected {NAME: {'defense': ..., 'SETTING': value}}"
    if not isinstance(rows, Mapping):
        raise UserError(f"rows={shown(rows)}: {expected}")
    for name, own in rows.items():
        if not isinstance(name, str) or not isinstance(own, Mapping):
            raise UserError(f"rows: {shown(name)} stands for {shown(own)}: {expected}")
        if name not in defenses:
            raise UserError(f"rows has {name!r}, which defenses does not name{nearest(name, defenses)}: name it there")
        if not isinstance(own.get("defense", ""), str):
            raise UserError(
                f"rows: {name!r} has defense={shown(own['defense'])}: expected a name, and the settings beside it, "
                "such as 'defense.beta': 6"
            )
        for key in own:
            if not isinstance(key, str):
                raise UserError(f"rows: {name!r} has the key {shown(key)}: expected a setting's name")
            if (plain := key.replace("-", "_")) in _EACH_RUNS:
                raise UserError(f"rows: {name!r} holds {key}, which is no setting of a row: give {_EACH_RUNS[plain]}")
    return dict(rows)


class Plan(NamedTuple):
    """One run of the comparison. config: resolved. needs: the run whose weights it starts from, or None."""

    name: str
    defense: str
    seed: int
    config: Config
    needs: Plan | None

    @property
    def run(self) -> Run:
        return Run(str(self.config.out))

    @property
    def which(self) -> str:
        """The weights that are evaluated."""
        return "swa" if self.config.swa else "last"

    @property
    def eval_log(self) -> Path:
        """What the evaluation says, where it is a process of its own."""
        return self.run.path / "eval.log"

    def beside(self, suffix: str) -> Path:
        """A file beside the run's folder: .yaml (what was asked), .log, .diverged (why it has no final network)."""
        return self.run.path.with_name(self.run.path.name + suffix)


class Failure(NamedTuple):
    """Why a run has no final network. diverged: by itself, rather than for a mistake or an interruption."""

    why: str
    diverged: bool


def train_apart(plan: Plan, call: Call, *, begun: bool) -> Failure | None:
    """Train, or go on where `begun`, in a process; return why it has no final network, or None."""
    asked, log = plan.beside(".yaml"), plan.beside(".log")
    make_writable(log.parent)
    if not begun:
        write_yaml(plan.config, asked)
    begins = ["--resume", plan.run.path] if begun else ["--config", asked]
    # Code is run only where a person named it on a command line: here --defenses, passed on.
    own = [] if type(plan.config.defense) in DEFENSES.values() else ["--defense", defense_key(plan.config.defense)]
    code = call(["train", *begins, *own], log)
    if code == 0:
        return None
    why = last_line(log) or f"exit code {code}"
    if code < 0:
        why = f"killed by signal {-code}" + (", perhaps for want of memory" if code == -9 else "")
    # The exit code alone does not tell: 1 is every stop while running, a full disk among them.
    diverged = code == 1 and why.startswith("training stopped")
    return Failure(why if diverged else f"{why} (log: {log})", diverged)


def evaluate_apart(plan: Plan, call: Call, attack: str, limit: int | None) -> None:
    """Evaluate in a process, into the comparison's own file. Raises: UserError where that fails."""
    flags = ["--attack", attack, "--weights", plan.which, "--device", plan.config.device]
    # Overwritten: what is there was found to be of other weights or settings, which has been said.
    flags += ["--out", plan.run.compared(plan.which), "--overwrite", *(["--limit", str(limit)] if limit else [])]
    if call(["eval", plan.run.path, *flags], plan.eval_log):
        raise UserError(f"evaluating {plan.run.path} failed: {last_line(plan.eval_log)} (log: {plan.eval_log})")
