"""The baselines row of a table: train and evaluate several defenses and seeds, and write one table.

Every run is an ordinary run folder. What is finished is not repeated, what was interrupted is resumed. With `tune`,
each row's settings are first chosen on validation images, by one rule and with seeds of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastarat.config import DEFENSES, Config, from_dict, merge, nest, resolve_defense, to_dict, write_yaml
from fastarat.data import load_dataset
from fastarat.errors import UserError, nearest
from fastarat.evaluation import evaluate, parse_attacks
from fastarat.files import write_text
from fastarat.runs import Run, load_network
from fastarat.schedules import counted, ends_at, in_words, recipe_of
from fastarat.table import PUBLISHED, Comparison
from fastarat.training import Diverged, pick_device, resolve, train

_BUDGET = 8 / 255
FINALISTS = 2
"""Settings of a row that get all tuning seeds; the others get the first one only."""


_ROWS_OWN = {"seed": "seeds", "defense": "defenses", "swa": "a row named NAME+swa", "out": "out"}
_ADDED = ("awp", "awp_warmup")
_TUNED = ("bn", "start", "objective", "num_steps", "step_size", "num_restarts")


class Plan(NamedTuple):
    """One run of the comparison. config: resolved. needs: the run whose weights it starts from, or None."""

    name: str
    defense: str
    seed: int
    config: Config
    needs: Plan | None


class Failure(NamedTuple):
    """Why a run has no final network. diverged: by itself, rather than for a mistake or an interruption."""

    why: str
    diverged: bool


class Choice(NamedTuple):
    """What tuning chose for a row, as flags would say it, and every setting that was tried."""

    settings: dict[str, Any]
    tried: list[dict[str, Any]]


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
) -> Comparison:
    """Train each defense with each seed, evaluate, and tabulate.

    Rows of one seed share data, validation split, batch order, augmentation and initial weights. A value in `base` such
    as `optim.recipe` puts all rows on one schedule; without it each follows its own release, and the table warns where
    their learning rates end differently.

    Args:
        defenses: names, or FILE.py:CLASS; `NAME+swa` averages weights and reports the averaged network.
        seeds: one run each.
        base: values of `Config` common to all runs (dataset, model, epochs, attack ...); a defense's own recipe fills
            the rest.
        out: holds one run folder per defense and seed, and the tables.
        attack: as in `evaluate`. limit: test images.
        tune: values to choose from, by name as in flags: {"optim.lr": [0.03, 0.1], "ar-at:defense.gamma": [5, 30]}; a
            name that starts with a row applies to that row alone. A row tries every combination of what applies to it
            with the first of `tune_seeds`, and the best two with all of them; the highest mean of clean + PGD
            accuracy (clean alone for a defense without an attack) on validation images after the last epoch wins. Test
            images are not looked at. tune.md and tune.json list everything that was tried.
        tune_seeds: seeds for tuning, none of them in `seeds`.
        parallel: trainings, and evaluations, at once, each a process of its own (several seeds share a GPU).
    Returns: Comparison, already saved. A seed that diverges is counted in its row, not in its means.
    Raises: UserError before any training for a mistake, or a folder of other settings; after the others are done for
        runs that failed.
    """
    if not isinstance(base or {}, Mapping):
        raise UserError(f"base={type(base).__name__}: expected a dict of Config's values, such as {{'epochs': 20}}")
    out, base, tune = Path(out), dict(base or {}), dict(tune or {})
    if not defenses or not seeds:
        raise UserError("compare needs at least one defense and one seed")
    for key in _ROWS_OWN.keys() & base.keys():
        raise UserError(f"base holds {key}={base[key]!r}, which is each run's own: give {_ROWS_OWN[key]} instead")
    defenses = [_row_name(d) for d in defenses]
    if len(set(defenses)) != len(defenses) or len(set(seeds)) != len(seeds):
        raise UserError("a defense or seed is named twice")
    if parallel < 1:
        raise UserError(f"parallel={parallel}: expected 1 or more")
    if tune and (not tune_seeds or set(tune_seeds) & set(seeds) or len(set(tune_seeds)) != len(tune_seeds)):
        raise UserError(
            f"tune_seeds={list(tune_seeds)}: expected different seeds, none of those reported ({list(seeds)})"
        )
    parse_attacks(attack)
    grids = _grids(defenses, tune)
    runner = _Runner(out, base, parallel, progress)
    for row, grid in grids.items():  # every mistake before any training
        known: list[dict[str, Any]] = []
        for settings in grid:
            config = to_dict(runner.plan(row, seeds[0], settings, out).config)
            if config in known:
                raise UserError(f"tune: {row} would try {_said(settings)} twice: give each value once")
            known.append(config)
    if any(len(grid) > 1 for grid in grids.values()) and not len(runner.dataset.val):
        raise UserError("tuning chooses on validation images, and there are none: give --eval.val-images")
    pick_device(runner.plan(defenses[0], seeds[0], {}, out).config.device)
    shared: dict[str, str] = {}
    for row in defenses:
        other = shared.setdefault(name := runner.plan(row, seeds[0], {}, out).name, row)
        if other != row:
            raise UserError(f"{row} and {other} would share the folder {name}: rename one")

    chosen = runner.tuned(grids, list(tune_seeds)) if tune else {}
    plans = [runner.plan(d, s, chosen[d].settings if d in chosen else {}, out) for s in seeds for d in defenses]
    if progress:
        done = sum(runner.state(p) == "finished" for p in plans)
        print(f"{len(plans)} runs, {done} finished already", flush=True)
    failed = runner.train(plans)
    results = runner.evaluated([p for p in plans if p.name not in failed], attack, limit)
    broken = {name: f.why for name, f in failed.items() if not f.diverged}
    if broken:
        first = "; ".join(f"{name}: {why}" for name, why in broken.items())
        raise UserError(
            f"{len(broken)} of {len(plans)} runs failed ({first}); the others are kept, call again to go on"
        )
    if not results:
        raise UserError(f"every run diverged ({next(iter(failed.values())).why}): lower --optim.lr, or tune it")
    comparison = _tabulate(defenses, seeds, plans, results, chosen, list(tune_seeds), runner.dataset.name, out)
    comparison.save()
    return comparison


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


def _grids(defenses: Sequence[str], tune: Mapping[str, Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
    """Every combination of the values that apply to each row, in the order given."""
    axes: dict[str, dict[str, list[Any]]] = {d: {} for d in defenses}
    for name, values in tune.items():
        row, colon, key = name.rpartition(":")
        key = key.removeprefix("--").replace("-", "_")
        if colon and row not in axes:
            raise UserError(f"tune: {name}: no such row {row!r}{nearest(row, axes) or '.'} Rows: {', '.join(axes)}.")
        if isinstance(values, str) or not values:
            raise UserError(f"tune: {name}={values!r}: expected a list of values")
        part, _, field = key.partition(".")
        own = part == "defense" and field != "name" and bool(field)
        if not (own or (part == "optim" and field) or (part == "attack" and field in _TUNED) or part in _ADDED):
            raise UserError(
                f"tune: {name}: only settings that leave rows comparable can be chosen: defense.*, optim.*, "
                f"{', '.join(f'attack.{f}' for f in _TUNED)}, {', '.join(_ADDED)}; others are given to all rows"
            )
        for d in [row] if colon else defenses:
            axes[d][key] = list(values)
    return {
        d: [dict(zip(a, values, strict=True)) for values in itertools.product(*a.values())] for d, a in axes.items()
    }


class _Runner:
    """Plans, trains and evaluates the runs of one comparison."""

    def __init__(self, out: Path, base: dict[str, Any], parallel: int, progress: bool) -> None:
        self.out, self.base, self.parallel, self.progress = out, base, parallel, progress
        # What a `standard` run that others start from is trained with: its row's choice, once there is one.
        self.standard: dict[str, Any] = {}
        self.finished: set[str] = set()
        config = from_dict(base, source="compare")
        self.dataset = load_dataset(
            config.dataset,
            data_dir=config.data_dir,
            val_images=config.eval.val_images,
            image_size=config.image_size,
        )

    def state(self, plan: Plan) -> str:
        """`_state_of`, which opens a checkpoint, once for each run that is finished."""
        if plan.config.out not in self.finished and (state := _state_of(plan)) != "finished":
            return state
        self.finished.add(plan.config.out)
        return "finished"

    def plan(self, row: str, seed: int, settings: dict[str, Any], folder: Path, tag: str = "") -> Plan:
        """Return the run of `row` with `seed`. Raises: UserError for settings that are not a Config."""
        bare, plus, addon = row.partition("+")
        if plus and addon != "swa":
            raise UserError(f"unknown add-on {addon!r} in {row!r}: only +swa")
        kind = resolve_defense(bare)
        path, _, cls = bare.partition(":")
        label = f"{f'{Path(path).stem}-{cls}' if cls else bare}{plus}{addon}"
        name = f"{label}{tag}-seed{seed}"
        needs = self.plan("standard", seed, self.standard, self.out) if kind.starts_from else None
        defense: dict[str, Any] = {"name": bare}
        if needs is not None:
            defense[kind.starts_from] = str(needs.config.out)
        values = {**self.base, "defense": defense, "seed": seed, "out": str(folder / name), "swa": bool(plus)}
        source = "compare" if not settings else f"compare, {row} with {settings}"
        config = from_dict(merge(values, nest(settings)), source=source)
        if kind.starts_from and f"defense.{kind.starts_from}" in settings:
            raise UserError(f"tune: {row}: defense.{kind.starts_from} is the standard run that compare trains for it")
        return Plan(name, row, seed, resolve(config, self.dataset), needs)

    def tuned(self, grids: dict[str, list[dict[str, Any]]], seeds: list[int]) -> dict[str, Choice]:
        """Choose each row's settings on validation images, rows that others start from first."""
        first = [row for row in grids if not resolve_defense(row.partition("+")[0]).starts_from]
        chosen: dict[str, Choice] = {}
        for rows in (first, [row for row in grids if row not in first]):
            tried = {
                row: [{"settings": settings, "runs": [], "chosen": False} for settings in grids[row]]
                for row in rows
                if len(grids[row]) > 1
            }
            self._try(tried, seeds[:1])
            finals = {row: sorted(all_, key=lambda t: -t["mean"])[:FINALISTS] for row, all_ in tried.items()}
            self._try(finals, seeds[1:])
            for row, all_ in tried.items():  # of equals, the one named first
                finals[row] = [t for t in all_ if len(t["runs"]) == len(seeds)] if len(seeds) > 1 else all_
            for row in rows:
                best = max(finals[row], key=lambda t: t["mean"]) if row in finals else {"settings": grids[row][0]}
                if all(r["diverged"] for r in best.get("runs", ())) and row in finals:
                    raise UserError(f"every setting tried for {row} diverged: give --tune smaller values of optim.lr")
                best["chosen"] = True
                chosen[row] = Choice(best["settings"], tried.get(row, []))
            if "standard" in chosen:
                self.standard = chosen["standard"].settings
        self._save_tuning(chosen, seeds)
        return chosen

    def _try(self, tried: dict[str, list[dict[str, Any]]], seeds: Sequence[int]) -> None:
        """Train every setting of `tried` with these seeds, and add what each reached on validation images."""
        runs = [
            (t, seed, self._tuning_plan(row, seed, t["settings"]))
            for row, settings in tried.items()
            for t in settings
            for seed in seeds
        ]
        failed = self.train([plan for _, _, plan in runs])
        broken = next((f"{name}: {f.why}" for name, f in failed.items() if not f.diverged), None)
        if broken:
            raise UserError(f"tuning stopped ({broken}); what is finished is kept, call again to go on")
        for t, seed, plan in runs:
            t["runs"].append({"seed": seed, **_score(plan, plan.name in failed)})
            t["mean"] = statistics.fmean(r["score"] for r in t["runs"])

    def _tuning_plan(self, row: str, seed: int, settings: dict[str, Any]) -> Plan:
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
        return self.plan(row, seed, settings, self.out / "tune", f"-{digest}")

    def _save_tuning(self, chosen: dict[str, Choice], seeds: list[int]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        record = {
            "rule": rule(seeds, list(chosen)),
            "seeds": seeds,
            "rows": {row: c._asdict() for row, c in chosen.items()},
        }
        write_text(self.out / "tune.json", json.dumps(record, indent=2) + "\n")
        lines = ["| row | settings | seeds | clean | PGD | score | |", "| --- | --- |" + " ---: |" * 4 + " --- |"]
        for row, choice in chosen.items():
            if self.progress:
                print(f"{'chosen' if choice.tried else 'given'} for {row}: {_said(choice.settings)}", flush=True)
            for t in sorted(choice.tried, key=lambda t: (-len(t["runs"]), -t["mean"])):
                cells = [row, _said(t["settings"]), str(len(t["runs"]))]
                for key in ("clean_acc", "robust_acc"):
                    values = [r[key] for r in t["runs"] if key in r]
                    cells.append(f"{100 * statistics.fmean(values):.1f}" if values else "–")
                diverged = sum(r["diverged"] for r in t["runs"])
                said = ["chosen"] * t["chosen"] + [f"{diverged} diverged"] * bool(diverged)
                lines.append("| " + " | ".join([*cells, f"{100 * t['mean']:.1f}", ", ".join(said)]) + " |")
        write_text(self.out / "tune.md", "\n".join([*lines, "", record["rule"], ""]))

    def train(self, plans: Sequence[Plan]) -> dict[str, Failure]:
        """Train what is left, first what others start from; return why, for the runs without a final network."""
        needed = {p.needs.name: p.needs for p in plans if p.needs is not None}
        waves = [[*needed.values(), *(p for p in plans if p.needs is None and p.name not in needed)],
                 [p for p in plans if p.needs is not None]]  # fmt: skip
        failed: dict[str, Failure] = {}
        for wave in waves:
            pending = [(p, state) for p in wave if (state := self.state(p)) != "finished"]
            failed |= self._train_wave(pending, dict(failed))
        return failed

    def _train_wave(self, pending: list[tuple[Plan, str]], failed: dict[str, Failure]) -> dict[str, Failure]:
        def one(job: tuple[Plan, str]) -> tuple[str, Failure | None]:
            plan, state = job
            if plan.needs is not None and plan.needs.name in failed:
                cause = failed[plan.needs.name]
                return plan.name, Failure(
                    f"it starts from {plan.needs.name}, which failed: {cause.why}", cause.diverged
                )
            if state == "diverged":
                return plan.name, Failure(_diverged_file(plan).read_text().strip(), True)
            failure = self._in_a_process(plan, state) if self.parallel > 1 else self._here(plan, state)
            if failure is not None and failure.diverged:
                _diverged_file(plan).parent.mkdir(parents=True, exist_ok=True)
                write_text(_diverged_file(plan), failure.why + "\n")
            return plan.name, failure

        done = _at_once(one, pending, self.parallel, self.progress and self.parallel > 1)
        return {name: why for name, why in done if why is not None}

    def _here(self, plan: Plan, state: str) -> Failure | None:
        if self.progress:
            print(f"\n--- {plan.name}", flush=True)
        try:
            if state == "new":
                train(plan.config, progress=self.progress)
            else:
                train(resume=plan.config.out, progress=self.progress)
        except UserError as error:
            return Failure(str(error), isinstance(error, Diverged))
        return None

    def _in_a_process(self, plan: Plan, state: str) -> Failure | None:
        folder = Path(plan.config.out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.parent / f"{folder.name}.log"
        if state == "new":
            asked = folder.parent / f"{folder.name}.yaml"
            write_yaml(plan.config, asked)
            code = self._call(["train", "--config", str(asked)], log)
        else:
            code = self._call(["train", "--resume", str(folder)], log)
        if code == 0:
            return None
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        why = last[0].removeprefix("fastarat: ") if last else f"exit code {code}"
        if code < 0:
            why = f"killed by signal {-code}" + (", perhaps for want of memory" if code == -9 else "")
        diverged = code == 1 and why.startswith("training stopped")
        return Failure(why if diverged else f"{why} (log: {log})", diverged)

    def _call(self, command: list[str], log: Path) -> int:
        threads = str(max(1, (os.cpu_count() or 1) // self.parallel))
        with open(log, "a") as file:
            return subprocess.run(
                [sys.executable, "-m", "fastarat.cli", *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": threads},
                check=False,
            ).returncode

    def evaluated(self, plans: Sequence[Plan], attack: str, limit: int | None) -> dict[str, dict[str, Any]]:
        """Evaluate each run, or read what an earlier call found with the same settings."""

        def one(plan: Plan) -> tuple[str, dict[str, Any]]:
            saved = _saved_evaluation(plan, attack, limit)
            if saved is None:
                saved = self._evaluate(plan, attack, limit)
            return plan.name, saved

        return dict(_at_once(one, plans, self.parallel, False))

    def _evaluate(self, plan: Plan, attack: str, limit: int | None) -> dict[str, Any]:
        folder = Path(plan.config.out)
        which = "swa" if plan.config.swa else "last"
        # A file of its own: `fastarat eval` on this run, with another budget perhaps, writes eval.json.
        file = folder / f"compare-{which}.json"
        own = folder / ("eval.json" if which == "last" else f"eval-{which}.json")
        if self.progress:
            print(f"{plan.name}: evaluating", flush=True)
        if self.parallel > 1:
            log = folder / "eval.log"
            flags = ["--attack", attack, "--weights", which, "--device", plan.config.device, "--out", str(file)]
            if self._call(["eval", str(folder), *flags, *(["--limit", str(limit)] if limit else [])], log):
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise UserError(f"evaluating {folder} failed: {''.join(last).removeprefix('fastarat: ')} (log: {log})")
            table = file.read_text()
            if not own.exists():
                write_text(own, table)  # for `fastarat report`
            return json.loads(table)
        model, meta, config = load_network(folder, which)
        data = load_dataset(
            config.dataset, data_dir=config.data_dir, val_images=config.eval.val_images, image_size=config.image_size
        )
        result = evaluate(
            model.to(pick_device(config.device)),
            data.test,
            attack,
            epsilon=meta["epsilon"],
            norm=meta["norm"],
            limit=limit,
            state_dir=folder / "eval",
            progress=self.progress,
        )
        result = dataclasses.replace(
            result, settings={**result.settings, "weights": which, "epoch": meta["epoch"], "limit": limit}
        )
        result.save(file)
        if not own.exists():
            result.save(own)
        if self.progress:
            print(result.table(), flush=True)
        return json.loads(result.to_json())


def _at_once(call: Callable[[Any], tuple[str, Any]], jobs: Sequence[Any], parallel: int, report: bool) -> list:
    """Call `call` on every job, so many at a time; say each one's name when it is done."""
    if parallel == 1:
        return [call(job) for job in jobs]
    done = []
    with ThreadPoolExecutor(parallel) as pool:
        for name, result in pool.map(call, jobs):
            done.append((name, result))
            if report:
                print(f"{name}: {result.why if isinstance(result, Failure) else 'done'}", flush=True)
    return done


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


def _row_name(name: str) -> str:
    """A row's name, built-in ones in the spelling of the tables."""
    bare, plus, addon = name.partition("+")
    return f"{bare.lower()}{plus}{addon}" if bare.lower() in DEFENSES else name


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "its own defaults"


def _diverged_file(plan: Plan) -> Path:
    return Path(plan.config.out).with_name(f"{Path(plan.config.out).name}.diverged")


def _state_of(plan: Plan) -> str:
    """ "new", "started", "finished" or "diverged". Raises: UserError when the folder holds a run of other settings."""
    run = Run(plan.config.out)
    if other := run.difference(plan.config):
        raise UserError(
            f"{run.path} was run with {other[0]}={other[1]!r}, not as asked now: choose another --out, or remove it"
        )
    if _diverged_file(plan).is_file():
        return "diverged"
    if not run.config_file.is_file():
        return "new"
    return "finished" if run.finished() else "started"


def _last_validation(plan: Plan) -> dict[str, float]:
    """Validation accuracies after the last epoch: clean_acc and robust_acc, those there are."""
    rows = Run(plan.config.out).metrics()
    last = {} if not rows else rows[-1]
    found = {"clean_acc": last.get("val/clean_acc")}
    found["robust_acc"] = next((v for k, v in last.items() if k.startswith("val/robust_acc_pgd")), None)
    return {key: value for key, value in found.items() if value is not None}


def _score(plan: Plan, diverged: bool) -> dict[str, Any]:
    """What tuning maximises for one run; a diverged one has 0."""
    if diverged:
        return {"score": 0.0, "diverged": True}
    found = _last_validation(plan)
    if "clean_acc" not in found:
        raise UserError("tuning chooses on validation images, and there are none: give --eval.val-images")
    robust = found["robust_acc"] if plan.config.defense.chosen_by == "robust" else 0.0
    return {"score": found["clean_acc"] + robust, "diverged": False, **found}


def _saved_evaluation(plan: Plan, attack: str, limit: int | None) -> dict[str, Any] | None:
    which = "swa" if plan.config.swa else "last"
    run = Run(plan.config.out)
    file = run.compared(which)
    if not file.is_file():
        return None
    meta = run.meta(which)
    saved = json.loads(file.read_text())
    found = {**saved["settings"], "attacks": list(saved["settings"]["attacks"])}
    asked = {
        "attacks": [a.name for a in parse_attacks(attack)],
        "limit": limit,
        "epoch": meta["epoch"],
        "epsilon": meta["epsilon"],
        "norm": meta["norm"],
    }
    return saved if all(found.get(key) == value for key, value in asked.items()) else None


def _spread(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def _collapsed(plans: Sequence[Plan], num_classes: int) -> list[int]:
    """Seeds no better than chance under attack, on validation images at the end, or under half of the best of these."""
    robust = {p.seed: _last_validation(p).get("robust_acc") for p in plans if p.config.defense.attacks}
    found = {seed: value for seed, value in robust.items() if value is not None}
    return [seed for seed, value in found.items() if value <= 1 / num_classes or value < max(found.values()) / 2]


def _schedule(config: Config, settings: Mapping[str, Any]) -> str:
    """The row's schedule in words; what the row's own settings say is not said again."""
    optim, recipe = config.optim, recipe_of(config.optim.recipe)
    if settings.keys() & {"optim.lr", "optim.warmup"} and not recipe.one_cycle:
        drops = [f"x {f:g} from epoch {at:g}" for at, f in recipe.drops_in(config.epochs)]
        lr = ", ".join(["the row's lr and warm-up", *drops])
    else:
        lr = in_words(recipe, epochs=config.epochs, lr=optim.lr, warmup=optim.warmup)
    momentum = "" if optim.momentum == 0.9 and not optim.nesterov else f", momentum {optim.momentum or '0.95 to 0.85'}"
    return f"{optim.recipe}: {counted(config.epochs, 'epoch')}, {lr}{momentum}; weight decay {optim.weight_decay:g}"


def _tabulate(
    defenses: Sequence[str],
    seeds: Sequence[int],
    plans: Sequence[Plan],
    results: dict[str, dict],
    chosen: dict[str, Choice],
    tune_seeds: list[int],
    dataset: str,
    out: Path,
) -> Comparison:
    rows = []
    found = next(iter(results.values()))
    keys = list(found["accuracy"])
    configs: dict[str, Config] = {}
    for name in defenses:
        mine = [p for p in plans if p.defense == name]
        done = [p for p in mine if p.name in results]
        evals = [results[p.name] for p in done]
        row: dict[str, Any] = {"defense": name, "seeds": list(seeds)}
        for key in keys:
            row[key] = _spread([e["accuracy"][key] for e in evals])
        if {"clean_acc", "robust_acc_aa"} <= set(keys):
            pairs = [(e["accuracy"]["clean_acc"], e["accuracy"]["robust_acc_aa"]) for e in evals]
            row["sum"] = _spread([c + r for c, r in pairs])
            row["nrr"] = _spread([2 * c * r / (c + r) if c + r else 0.0 for c, r in pairs])
        walls = [m["wall_s"] for p in done for m in Run(p.config.out).metrics()]
        row["epoch_s"] = statistics.median(walls) if walls else None
        configs[name] = first = mine[0].config
        published = PUBLISHED.get((first.dataset, first.model, name))
        same_budget = first.attack.norm == "linf" and abs(first.attack.epsilon - _BUDGET) < 1e-9
        row["published"] = published._asdict() if published and same_budget else None
        row["settings"] = chosen[name].settings if name in chosen else {}
        row["schedule"] = _schedule(first, row["settings"])
        row["tried"] = len(chosen[name].tried) if name in chosen else 0
        row["collapsed"] = _collapsed(done, found["settings"]["num_classes"])
        row["diverged"] = [p.seed for p in mine if p.name not in results]
        row["warnings"] = sorted({w for e in evals for w in e["warnings"]})
        rows.append(row)
    settings = {
        # By its name: a folder's path says little, and differs from machine to machine.
        "dataset": dataset,
        "model": first.model,
        "epochs": " / ".join(map(str, sorted({c.epochs for c in configs.values()}))),
        "seeds": list(seeds),
        "epsilon": first.attack.epsilon,
        "norm": first.attack.norm,
        "keys": keys,
        "num_images": found["num_images"],
        "device": _device(),
        "torch": torch.__version__,
        "rule": rule(tune_seeds, [row["defense"] for row in rows if row["tried"]]),
        "warnings": [*_unequal(configs), *_overestimates(rows)],
    }
    return Comparison(rows, settings, out)


def _overestimates(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name the rows, in one sentence, whose PGD accuracy is over 5 points above AutoAttack's in the mean over seeds."""
    gaps = []
    for row in rows:
        pgd = [v["mean"] for k, v in row.items() if k.startswith("robust_acc_pgd") and v]
        aa = row.get("robust_acc_aa")
        if pgd and aa and (gap := 100 * (min(pgd) - aa["mean"])) > 5:
            gaps.append(f"{row['defense']} by {gap:.1f}")
    if not gaps:
        return []
    return [f"PGD overestimates {', '.join(gaps)} points against AutoAttack: quote AutoAttack, not PGD"]


def _unequal(configs: dict[str, Config]) -> list[str]:
    """Say where rows are trained so differently that a short run's order may be the schedule's."""
    ends: dict[float, list[str]] = {}
    for name, c in configs.items():
        ends.setdefault(ends_at(recipe_of(c.optim.recipe), epochs=c.epochs, warmup=c.optim.warmup), []).append(name)
    found = []
    if len(ends) > 1:
        said = "; ".join(f"{', '.join(names)} at {share:.2g} of it" for share, names in ends.items())
        found.append(
            f"the rows end at different shares of their base learning rate ({said}), so part of a difference between "
            "them may be the schedule's; --optim.recipe NAME puts all on one"
        )
    lengths = sorted({c.epochs for c in configs.values()})
    if len(lengths) > 1:
        found.append(f"the rows were trained for {' / '.join(map(str, lengths))} epochs; --epochs N gives all the same")
    return found


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU with {os.cpu_count()} cores"
