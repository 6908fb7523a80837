"""The baselines row of a table: train and evaluate several defenses and seeds, and write one table.

Every run is an ordinary run folder. What is finished is not repeated, what was interrupted is resumed. With `tune`,
each row's settings are first chosen on validation images, by one rule and with seeds of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from fastarat import tuning
from fastarat.bench.bench import forwards_of
from fastarat.building import choose_precision, shared_precision
from fastarat.child import PARTING_S
from fastarat.children import Children, last_line, terminable
from fastarat.config import DEFENSES, from_dict, merge, nest, resolve_defense, to_dict
from fastarat.device import pick_device, threads
from fastarat.diagnostics import in_short
from fastarat.errors import UserError
from fastarat.evaluation import Evaluation, data_hash, evaluate, parse_attacks, saved_evaluation
from fastarat.files import make_writable, write_text
from fastarat.finite import Diverged
from fastarat.live import Board, shown
from fastarat.locks import held
from fastarat.plans import Failure, Plan, checked_rows, evaluate_apart, row_spec, train_apart
from fastarat.resuming import finished
from fastarat.runs import dataset_of, is_current, load_network
from fastarat.sweep import check_distinct
from fastarat.table import Comparison, Row, tabulate
from fastarat.training import resolve, train
from fastarat.tuning import Choice, Settings

_ROWS_OWN = {"seed": "seeds", "defense": "defenses", "swa": "a row named NAME+swa", "out": "out"}

_KEPT = "finished and begun runs are kept: the same command goes on from there"
_ORPHANS_S = 3 * PARTING_S
"""Seconds to wait for the trainings of a comparison that was killed a moment ago: they are ending."""


def compare(
    defenses: Sequence[str],
    seeds: Sequence[int],
    *,
    base: dict[str, Any] | None = None,
    out: str | Path = "runs/compare",
    attack: str = "clean,pgd-20,autoattack",
    limit: int | None = None,
    tune: Mapping[str, Sequence[Any]] | None = None,
    tune_seeds: Sequence[int] = (100, 101, 102),
    parallel: int = 1,
    progress: bool = True,
    rows: Mapping[str, Mapping[str, Any]] | None = None,
) -> Comparison:
    """Train each defense with each seed, evaluate, and tabulate.

    Rows of one seed share data, validation split, batch order, augmentation and initial weights. A value in `base` such
    as `optim.recipe` puts all rows on one schedule; without it each follows its own release, and the table warns where
    their learning rates end differently.

    Args:
        defenses: names, or FILE.py:CLASS; `NAME+swa` averages weights and reports the averaged network.
        seeds: one run each.
        base: values of `Config` common to all runs; a defense's own recipe fills the rest.
        out: folder of the runs and the tables. attack: as in `evaluate`. limit: test images.
        tune: values to choose from, by name as in flags: {"optim.lr": [0.03, 0.1], "ar-at:defense.gamma": [5, 30]}; a
            name that starts with a row applies to that row alone. A row tries every combination of what applies to it
            with the first of `tune_seeds`, and the best two with all of them; the highest mean of clean + PGD
            accuracy (clean alone for a defense without an attack) on validation images after the last epoch wins. Test
            images are not looked at. tune.md and tune.json list everything that was tried.
        tune_seeds: seeds for tuning, none of them in `seeds`.
        parallel: trainings, and evaluations, at once, each a process of its own (several seeds share a GPU).
        rows: what names in `defenses` stand for that are no defense's: {"ar-at, shared BN": {"defense": "ar-at",
            "defense.split_bn": False}}, so that one defense can have several rows (`sweep.rows_of_sweep`).
    Returns: Comparison, already saved. A seed that diverges is counted in its row, not in its means.
    Raises: UserError before any training for a mistake, or a folder of other settings; after the others are done for
        runs that failed.
    """
    rows = checked_rows(rows, defenses)
    defenses, tune = [d if d in rows else _row_name(d) for d in defenses], dict(tune or {})
    _check_asked(defenses, seeds, base or {}, tune, tune_seeds, parallel)
    parse_attacks(attack)
    with terminable(_KEPT), held(out, "fastarat compare"):
        runner = _Runner(Path(out), dict(base or {}), parallel, progress, rows)
        grids = tuning.grids_of(defenses, tune)
        runner.check(grids, seeds[0])
        check_distinct({row: runner.plan(row, seeds[0], {}, Path()).config for row in rows})
        precision = runner.settle_precision(defenses, seeds[0])
        with runner.shown():
            chosen = runner.tuned(grids, tune_seeds) if tune else {row: Choice({}, []) for row in defenses}
            plans = [runner.plan(row, seed, chosen[row].settings, runner.out) for seed in seeds for row in defenses]
            runner.expect(plans)
            failed = runner.train(plans)
            evaluations = runner.evaluated([p for p in plans if p.name not in failed], attack, limit)
        _check_done(failed, len(plans), bool(evaluations))
        found = {d: [p for p in plans if p.defense == d] for d in defenses}
        done = {d: _row(found[d], evaluations, chosen[d], row_spec(d, rows).own) for d in defenses}
        comparison = tabulate(done, tune_seeds, runner.dataset.name, runner.out, precision=precision)
        comparison.save()
        return comparison


def _row_name(name: str) -> str:
    """A row's name, built-in ones in the spelling of the tables."""
    bare, plus, addon = name.partition("+")
    return f"{bare.lower()}{plus}{addon}" if bare.lower() in DEFENSES else name


def _check_asked(
    defenses: Sequence[str],
    seeds: Sequence[int],
    base: Mapping[str, Any],
    tune: Mapping[str, Sequence[Any]],
    tune_seeds: Sequence[int],
    parallel: int,
) -> None:
    if not isinstance(base, Mapping):
        raise UserError(f"base={type(base).__name__}: expected a dict of Config's values, such as {{'epochs': 20}}")
    if not defenses or not seeds:
        raise UserError("compare needs at least one defense and one seed")
    for key in _ROWS_OWN.keys() & base.keys():
        raise UserError(f"base holds {key}={base[key]!r}, which is each run's own: give {_ROWS_OWN[key]} instead")
    if len(set(defenses)) != len(defenses) or len(set(seeds)) != len(seeds):
        raise UserError("a defense or seed is named twice")
    if parallel < 1:
        raise UserError(f"parallel={parallel}: expected 1 or more")
    if tune and (not tune_seeds or set(tune_seeds) & set(seeds) or len(set(tune_seeds)) != len(tune_seeds)):
        raise UserError(
            f"tune_seeds={list(tune_seeds)}: expected different seeds, none of those reported ({list(seeds)})"
        )


def _check_done(failed: dict[str, Failure], count: int, any_evaluated: bool) -> None:
    broken = {name: failure.why for name, failure in failed.items() if not failure.diverged}
    if broken:
        first = "; ".join(f"{name}: {why}" for name, why in broken.items())
        raise UserError(f"{len(broken)} of {count} runs failed ({first}); the others are kept, call again to go on")
    if not any_evaluated:
        raise UserError(f"every run diverged ({next(iter(failed.values())).why}): lower --optim.lr, or tune it")


def _row(plans: Sequence[Plan], evaluations: Mapping[str, dict[str, Any]], choice: Choice, own: Settings) -> Row:
    done = [p for p in plans if p.name in evaluations]
    return Row(
        config=plans[0].config,
        seeds=[p.seed for p in plans],
        evaluations={p.seed: evaluations[p.name] for p in done},
        robust={p.seed: p.run.last_validation().get("robust_acc") for p in done if p.config.defense.attacks},
        epochs_s=[m["wall_s"] for p in done for m in p.run.metrics() if isinstance(m.get("wall_s"), int | float)],
        settings={**own, **choice.settings},
        diagnostics={p.seed: found for p in done if (found := in_short(p.run.metrics()))},
        tried=len(choice.tried),
    )


_Rows = Mapping[str, Mapping[str, Any]]


class _Runner:
    """Plans, trains and evaluates the runs of one comparison."""

    def __init__(self, out: Path, base: dict[str, Any], parallel: int, progress: bool, rows: _Rows) -> None:
        self.out, self.base, self.rows, self.parallel, self.progress = out, base, rows, parallel, progress
        # Each process would otherwise take every core, and PyTorch's threads would wait for each other.
        self.threads = max(1, (os.cpu_count() or 1) // parallel)
        self.children, self.board = Children(parallel), Board(parallel)
        # What a `standard` run that others start from is trained with: its row's choice, once there is one.
        self.standard, self.finished = dict[str, Any](), set[Path]()
        self.dataset = dataset_of(from_dict(base, source="compare", code=False))

    def shown(self) -> AbstractContextManager[None]:
        """Say what the runs are doing while a block runs; one run alone draws bars of its own on a terminal."""
        return shown(self.board, drawn=self.parallel > 1) if self.progress else nullcontext()

    def expect(self, plans: Sequence[Plan]) -> None:
        """Say how many runs there are to be, and how many there are."""
        if self.progress:
            there = sum(self.state(p) == "finished" for p in plans)
            print(f"{len(plans)} runs, {there} finished already", flush=True)
        self.board.expect(plans, tested=True)

    def check(self, grids: Mapping[str, list[Settings]], seed: int) -> None:
        """Find every mistake before any training."""
        for row, grid in grids.items():
            known: list[dict[str, Any]] = []
            for settings in grid:
                config = to_dict(self.plan(row, seed, settings, self.out).config)
                if config in known:
                    raise UserError(f"tune: {row} would try {tuning.in_words(settings)} twice: give each value once")
                known.append(config)
        if any(len(grid) > 1 for grid in grids.values()) and not len(self.dataset.val):
            raise UserError("tuning chooses on validation images, and there are none: give --eval.val-images")
        shared: dict[str, str] = {}
        for row in grids:
            plan = self.plan(row, seed, {}, self.out)
            pick_device(plan.config.device)
            if (other := shared.setdefault(plan.name, row)) != row:
                raise UserError(f"{row} and {other} would share the folder {plan.name}: rename one")

    def settle_precision(self, rows: Sequence[str], seed: int) -> str:
        """Fix what all runs compute in, and return it in words ("" by default); with `amp` the longest row decides.

        One precision for all: rows that differ in it would differ by more than their defenses.
        """
        plans = [self.plan(row, seed, {}, self.out) for row in rows]
        longest = max(plans, key=lambda p: forwards_of(p.config))
        config, say = longest.config, partial(print, flush=True) if self.progress else lambda text: None
        if config.precision is not None:
            plain = config.precision == "fp32" and not config.amp
            return "" if plain else choose_precision(config, self.dataset, pick_device(config.device))[1]
        with threads(config.threads or (self.threads if self.parallel > 1 else None)):
            precision, note = shared_precision(config, self.dataset, self.out, say=say)
        self.base["precision"] = precision
        note += f"; one for all rows, found with {longest.defense}" * (len(rows) > 1)
        say(f"precision: {note}")
        return note

    def plan(self, row: str, seed: int, settings: Settings, folder: Path, tag: str = "") -> Plan:
        """Return the run of `row` with `seed`. Raises: UserError for settings that are not a Config."""
        spec = row_spec(row, self.rows)
        kind, name = resolve_defense(spec.defense), f"{spec.label}{tag}-seed{seed}"
        needs = self.plan("standard", seed, self.standard, self.out) if kind.starts_from else None
        # One `standard` run per seed, for all rows that need one: they start from the very same weights.
        start = {} if needs is None else {kind.starts_from: str(needs.config.out)}
        defense = {"name": spec.defense, **start}
        values = {**self.base, "defense": defense, "seed": seed, "out": str(folder / name), "swa": spec.swa}
        settings = {**spec.own, **settings}
        source = "compare" if not settings else f"compare, {row} with {settings}"
        config = from_dict(merge(values, nest(settings)), source=source)
        if kind.starts_from and f"defense.{kind.starts_from}" in settings:
            raise UserError(f"tune: {row}: defense.{kind.starts_from} is the standard run that compare trains for it")
        return Plan(name, row, seed, resolve(config, self.dataset), needs)

    def state(self, plan: Plan) -> str:
        """Return "new", "started", "finished" or "diverged". Raises: UserError for a folder of other settings."""
        if plan.run.path in self.finished:  # once is enough: it opens a checkpoint
            return "finished"
        run = plan.run
        if other := run.difference(plan.config):
            key, value = other
            raise UserError(
                f"{run.path} was run with {key}={value!r}, not as asked now: choose another --out, or remove it"
            )
        if plan.beside(".diverged").is_file():
            return "diverged"
        if not run.config_file.is_file():
            return "new"
        if not finished(run):
            return "started"
        self.finished.add(plan.run.path)
        return "finished"

    def tuned(self, grids: Mapping[str, list[Settings]], seeds: Sequence[int]) -> dict[str, Choice]:
        """Choose each row's settings on validation images, rows that others start from first."""
        first = [row for row in grids if not resolve_defense(row_spec(row, self.rows).defense).starts_from]
        chosen: dict[str, Choice] = {}
        self.board.more = True
        for rows in (first, [row for row in grids if row not in first]):
            chosen |= tuning.choose({row: grids[row] for row in rows}, seeds, self._scored)
            if "standard" in chosen:
                self.standard = chosen["standard"].settings
        self.board.more = False
        tuning.save(self.out, chosen, seeds)
        for row, choice in chosen.items() if self.progress else ():
            how = "chosen" if choice.tried else "given"
            print(f"{how} for {row}: {tuning.in_words(choice.settings)}", flush=True)
        return chosen

    def _scored(self, trials: list[tuple[str, Settings, int]]) -> list[dict[str, Any]]:
        """Train each trial and return what tuning maximises, from validation images; a diverged one has 0."""
        plans = []
        for row, settings, seed in trials:
            # The settings are in the folder's name: a grid that is extended later finds what it has trained already.
            text = json.dumps(settings, sort_keys=True, default=str)
            tag = f"-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
            plans.append(self.plan(row, seed, settings, self.out / "tune", tag))
        failed = self.train(plans)
        broken = next((f"{name}: {f.why}" for name, f in failed.items() if not f.diverged), None)
        if broken:
            raise UserError(f"tuning stopped ({broken}); what is finished is kept, call again to go on")
        scores = []
        for plan in plans:
            if plan.name in failed:
                # Kept with score 0 rather than left out, so that tune.md says what was tried and failed.
                scores.append({"score": 0.0, "diverged": True})
                continue
            found = plan.run.last_validation()
            by_robust = plan.config.defense.chosen_by == "robust"
            if not {"clean_acc", *(["robust_acc"] * by_robust)} <= found.keys():
                raise UserError(
                    f"{plan.run.metrics_file} does not say how the last epoch did on validation images: delete "
                    f"{plan.run.path}, and the same command trains it again"
                )
            robust = found["robust_acc"] if by_robust else 0.0
            scores.append({"score": found["clean_acc"] + robust, "diverged": False, **found})
        return scores

    def train(self, plans: Sequence[Plan]) -> dict[str, Failure]:
        """Train what is left, first what others start from; return why, for the runs without a final network."""
        needed = {p.needs.name: p.needs for p in plans if p.needs is not None}
        first = [*needed.values(), *(p for p in plans if p.needs is None and p.name not in needed)]
        failed: dict[str, Failure] = {}
        self.board.expect([*first, *plans], tested=False)
        for run in {p.run.path for p in (*first, *plans) if p.run.path.exists()}:
            with held(run, "fastarat compare", patience=_ORPHANS_S):
                pass
        for wave in (first, [p for p in plans if p.needs is not None]):
            pending = [(p, state) for p in wave if (state := self.state(p)) != "finished"]
            for plan in wave:
                if plan not in [p for p, _ in pending]:
                    self.board.set(plan, "trained")
            failures = self.children.map(lambda job: self._train(*job, failed), pending)
            failed.update({p.name: why for (p, _), why in zip(pending, failures, strict=True) if why is not None})
        return failed

    def _train(self, plan: Plan, state: str, failed: Mapping[str, Failure]) -> Failure | None:
        failure = self._outcome(plan, state, failed)
        self.board.ended(plan, failure)
        if self.progress and self.parallel > 1:
            print(f"{plan.name}: {failure.why if failure else 'done'}", flush=True)
        return failure

    def _outcome(self, plan: Plan, state: str, failed: Mapping[str, Failure]) -> Failure | None:
        if plan.needs is not None and plan.needs.name in failed:
            cause = failed[plan.needs.name]
            return Failure(f"it starts from {plan.needs.name}, which failed: {cause.why}", cause.diverged)
        note = plan.beside(".diverged")
        if state == "diverged":
            return Failure(last_line(note) or f"{note} says so", True)
        if self.parallel == 1 and self.progress:
            print(f"\n--- {self.board.heading(plan)}", flush=True)
        self.board.set(plan, "training")
        if self.parallel > 1:
            failure = train_apart(plan, self._call, begun=state == "started")
        else:
            failure = self._here(plan, state)
        if failure is not None and failure.diverged:
            make_writable(note.parent)
            write_text(note, failure.why + "\n")
        return failure

    def _here(self, plan: Plan, state: str) -> Failure | None:
        try:
            if state == "new":
                train(plan.config, progress=self.progress)
            else:
                train(resume=plan.run.path, defense=plan.config.defense, progress=self.progress)
        except UserError as error:
            return Failure(str(error), isinstance(error, Diverged))
        return None

    def _call(self, command: list[str | Path], log: Path) -> int:
        return self.children.call(command, log, {"OMP_NUM_THREADS": str(self.threads)})

    def evaluated(self, plans: Sequence[Plan], attack: str, limit: int | None) -> dict[str, dict[str, Any]]:
        """Evaluate each run, or read what an earlier call found with the same settings."""
        data = data_hash(self.dataset.test, limit) if any(p.run.compared(p.which).is_file() for p in plans) else ""
        found = self.children.map(
            lambda p: self._saved(p, attack, limit, data) or self._evaluate(p, attack, limit), plans
        )
        for run, which in [(plan.run, plan.which) for plan in plans]:
            if not is_current(run, which):  # for `fastarat report`, and after a kill between the two, too
                write_text(run.evaluation(which), run.compared(which).read_text(encoding="utf-8"))
        return {plan.name: evaluation for plan, evaluation in zip(plans, found, strict=True)}

    def _saved(self, plan: Plan, attack: str, limit: int | None, data: str) -> dict[str, Any] | None:
        """What an earlier call found of these weights on these images with these settings, or None."""
        file = plan.run.compared(plan.which)
        if not file.is_file():
            return None
        meta = plan.run.meta(plan.which)
        asked = {key: meta[key] for key in ("epoch", "epsilon", "norm")}
        asked |= {"attacks": [a.name for a in parse_attacks(attack)], "limit": limit}
        found = saved_evaluation(file, asked, weights=meta["sha256"], data=data)
        if found is not None:
            self.board.set(plan, "kept")
        return found

    def _evaluate(self, plan: Plan, attack: str, limit: int | None) -> dict[str, Any]:
        file = plan.run.compared(plan.which)
        if self.progress:
            print(f"{plan.name}: evaluating", flush=True)
        self.board.set(plan, "evaluating")
        if self.parallel > 1:
            evaluate_apart(plan, self._call, attack, limit)
        else:
            result = self._evaluate_here(plan, attack, limit)
            result.save(file)
            if self.progress:
                print(result.table(), flush=True)
        self.board.set(plan, "done")
        return json.loads(file.read_text(encoding="utf-8"))

    def _evaluate_here(self, plan: Plan, attack: str, limit: int | None) -> Evaluation:
        model, meta, _ = load_network(plan.run.path, plan.which)
        result = evaluate(
            model.to(pick_device(plan.config.device)),
            self.dataset.test,
            attack,
            epsilon=meta["epsilon"],
            norm=meta["norm"],
            limit=limit,
            state_dir=plan.run.state_dir,
            progress=self.progress,
        )
        settings = {**result.settings, "weights": plan.which, "epoch": meta["epoch"]}
        return dataclasses.replace(result, settings=settings)
