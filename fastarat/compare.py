"""The baselines row of a table: train and evaluate several defenses and seeds, and write one table.

Every run is an ordinary run folder. What is finished is not repeated, what was interrupted is resumed.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastarat.config import Config, from_dict, read_yaml, resolve_defense, to_dict, write_yaml
from fastarat.data import load_dataset
from fastarat.errors import UserError
from fastarat.evaluate import attack_title, evaluate, parse_attacks
from fastarat.record import RunFolder, load_checkpoint, load_weights, write_atomic
from fastarat.train import load_run, pick_device, pixels, train


class Published(NamedTuple):
    """Accuracies in percent as printed in a paper. Baselines differ by source: compare within one table only."""

    clean: float
    autoattack: float
    source: str


_ARAT = "Waseda et al., ICLR 2025, main table"
_CURE = "Gowda et al., ICLR 2024, its CIFAR-10 table"
PUBLISHED: dict[tuple[str, str, str], Published] = {
    (dataset, model, defense): Published(clean, robust, source)
    for dataset, model, defense, clean, robust, source in (
        ("cifar10", "resnet18", "at", 83.77, 42.42, _ARAT),
        ("cifar10", "resnet18", "trades", 81.25, 48.54, _ARAT),
        ("cifar10", "resnet18", "mart", 82.15, 47.83, _ARAT),
        ("cifar10", "resnet18", "lbgat", 85.00, 48.85, _ARAT),
        ("cifar10", "resnet18", "arrest", 86.63, 46.14, _ARAT + ", copied there from its paper"),
        ("cifar10", "resnet18", "ar-at", 87.82, 49.02, _ARAT),
        ("cifar10", "resnet18", "ar-at+swa", 86.44, 50.28, _ARAT),
        ("cifar10", "resnet18", "cure", 86.76, 49.69, _CURE),
        ("cifar10", "wrn-34-10", "at", 86.06, 46.26, _ARAT),
        ("cifar10", "wrn-34-10", "trades", 84.33, 51.75, _ARAT),
        ("cifar10", "wrn-34-10", "mart", 86.10, 49.11, _ARAT),
        ("cifar10", "wrn-34-10", "lbgat", 88.19, 52.56, _ARAT),
        ("cifar10", "wrn-34-10", "arrest", 90.24, 50.20, _ARAT + ", copied there from its paper"),
        ("cifar10", "wrn-34-10", "ar-at", 90.89, 50.77, _ARAT),
        ("cifar10", "wrn-34-10", "ar-at+swa", 90.06, 54.03, _ARAT),
        ("cifar10", "wrn-34-10", "cure", 87.05, 52.10, _CURE),
        ("cifar100", "resnet18", "at", 55.82, 19.50, _ARAT),
        ("cifar100", "resnet18", "trades", 54.74, 23.60, _ARAT),
        ("cifar100", "resnet18", "mart", 54.54, 26.04, _ARAT),
        ("cifar100", "resnet18", "lbgat", 65.87, 23.19, _ARAT),
        ("cifar100", "resnet18", "ar-at", 67.51, 23.38, _ARAT),
        ("cifar100", "resnet18", "ar-at+swa", 67.17, 24.36, _ARAT),
        ("cifar100", "wrn-34-10", "at", 59.83, 23.94, _ARAT),
        ("cifar100", "wrn-34-10", "trades", 57.61, 26.88, _ARAT),
        ("cifar100", "wrn-34-10", "mart", 57.75, 24.89, _ARAT),
        ("cifar100", "wrn-34-10", "lbgat", 68.17, 26.92, _ARAT),
        ("cifar100", "wrn-34-10", "arrest", 73.05, 24.32, _ARAT + ", copied there from its paper"),
        ("cifar100", "wrn-34-10", "ar-at", 72.51, 24.18, _ARAT),
        ("cifar100", "wrn-34-10", "ar-at+swa", 72.37, 27.31, _ARAT),
    )
}
_BUDGET = 8 / 255


class Plan(NamedTuple):
    """One run of the comparison. needs: name of the run whose weights it starts from, or None."""

    name: str
    defense: str
    seed: int
    config: Config
    needs: str | None


@dataclass(frozen=True)
class Comparison:
    """The table. rows: one dict per defense, accuracies as fractions: mean, deviation and the values per seed."""

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    out: Path

    def markdown(self) -> str:
        head, body = self._cells("±", "–")
        lines = [head, ["---:" if right else "---" for right in self._right(head)], *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + self.note()

    def latex(self) -> str:
        head, body = self._cells("$\\pm$", "--")
        rows = [" & ".join(c.replace("%", "\\%").replace("_", "\\_") for c in line) + " \\\\" for line in [head, *body]]
        rows.insert(1, "\\midrule")
        table = "\n".join(
            [
                "\\begin{tabular}{" + "".join("lr"[r] for r in self._right(head)) + "}",
                "\\toprule",
                *rows,
                "\\bottomrule",
                "\\end{tabular}",
            ]
        )
        return f"% {self.note()}\n{table}\n"

    def csv(self) -> str:
        keys = self.settings["keys"]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                "defense",
                "seeds",
                *(f"{k}_{s}" for k in [*keys, "sum", "nrr"] for s in ("mean", "std")),
                "epoch_s",
                "published_clean",
                "published_aa",
                "published_source",
            ]
        )
        for row in self.rows:
            published = row["published"] or {}
            cells = [row["defense"], len(row["seeds"])]
            for key in [*keys, "sum", "nrr"]:
                value = row.get(key) or {"mean": "", "std": ""}
                cells += [value["mean"], "" if value["std"] is None else value["std"]]
            writer.writerow(
                [*cells, row["epoch_s"], *(published.get(k, "") for k in ("clean", "autoattack", "source"))]
            )
        return file.getvalue()

    def to_json(self) -> str:
        return json.dumps({"settings": self.settings, "rows": self.rows}, indent=2) + "\n"

    def note(self) -> str:
        """One sentence that says what the numbers are."""
        s = self.settings
        ended = (
            f"mean ± standard deviation over seeds {', '.join(map(str, s['seeds']))}"
            if len(s["seeds"]) > 1
            else f"seed {s['seeds'][0]}"
        )
        return (
            f"{s['dataset']}, {s['model']}, {s['epochs']} epochs, {s['norm']} epsilon {pixels(s['epsilon'])}, "
            f"{s['num_images']:,} test images, last checkpoint, {ended}; accuracies in %. "
            + ("Sum = clean + AutoAttack, NRR = their harmonic mean. " if self._sums() else "")
            + f"s/epoch on {s['device']}."
        )

    def _sums(self) -> bool:
        return {"clean_acc", "robust_acc_aa"} <= set(self.settings["keys"])

    def _right(self, head: list[str]) -> list[bool]:
        """Whether each column holds numbers, to be set flush right."""
        return [title != "defense" and not title.startswith("published") for title in head]

    def _cells(self, plus_minus: str, empty: str) -> tuple[list[str], list[list[str]]]:
        keys = self.settings["keys"]
        shown = [*keys, *(("sum", "nrr") if self._sums() else ())]
        head = ["defense", *({"sum": "Sum", "nrr": "NRR"}.get(k) or attack_title(k) for k in shown), "s/epoch"]
        compared = any(row["published"] for row in self.rows)
        head += ["published clean / AutoAttack"] if compared else []
        body = []
        for row in self.rows:
            cells = [row["defense"]]
            for key in shown:
                value = row.get(key)
                spread = "" if value is None or value["std"] is None else f" {plus_minus} {100 * value['std']:.2f}"
                cells.append(empty if value is None else f"{100 * value['mean']:.2f}{spread}")
            published = row["published"]
            cells.append(f"{row['epoch_s']:.1f}")
            if compared:
                cells.append(
                    f"{published['clean']:.2f} / {published['autoattack']:.2f} ({published['source']})"
                    if published
                    else empty
                )
            body.append(cells)
        return head, body

    def save(self) -> Path:
        """Write table.md, .tex, .csv and .json into the comparison's folder."""
        for suffix, text in (
            ("md", self.markdown() + "\n"),
            ("tex", self.latex()),
            ("csv", self.csv()),
            ("json", self.to_json()),
        ):
            write_atomic(self.out / f"table.{suffix}", lambda p, text=text: p.write_text(text))
        return self.out / "table.md"


def compare(
    defenses: Sequence[str],
    seeds: Sequence[int],
    *,
    base: dict[str, Any] | None = None,
    out: str | Path = "runs/compare",
    attack: str = "clean,pgd-20,autoattack",
    limit: int | None = None,
    parallel: int = 1,
    progress: bool = True,
) -> Comparison:
    """Train each defense with each seed, evaluate, and tabulate.

    Args:
        defenses: names, or FILE.py:CLASS; `NAME+swa` averages weights and reports the averaged network.
        seeds: one run each.
        base: values of `Config` common to all runs (dataset, model, epochs, attack ...); a defense's own recipe fills
            the rest.
        out: holds one run folder per defense and seed, and the tables.
        attack: as in `evaluate`. limit: test images.
        parallel: trainings at once, each a process of its own (several seeds share a GPU).
    Returns: Comparison, already saved.
    Raises: UserError before any training for a mistake, or a folder of other settings; after the others are done for
        runs that failed.
    """
    out, base = Path(out), dict(base or {})
    if not defenses or not seeds:
        raise UserError("compare needs at least one defense and one seed")
    if len(set(defenses)) != len(defenses) or len(set(seeds)) != len(seeds):
        raise UserError("a defense or seed is named twice")
    if parallel < 1:
        raise UserError(f"parallel={parallel}: expected 1 or more")
    parse_attacks(attack)
    plans = _plans(defenses, seeds, base, out)
    pick_device(next(iter(plans.values())).config.device)
    todo = {name: state for name, plan in plans.items() if (state := _state_of(plan)) != "finished"}
    if progress:
        print(f"{len(plans)} runs, {len(plans) - len(todo)} finished already", flush=True)
    waves = [[p for p in plans.values() if p.needs is None], [p for p in plans.values() if p.needs is not None]]
    failed: dict[str, str] = {}
    for wave in waves:
        pending = [(p, todo[p.name]) for p in wave if p.name in todo]
        failed |= _train_all(pending, parallel, failed, progress)
    wanted = [p for p in plans.values() if p.defense in defenses and p.name not in failed]
    results = {p.name: _evaluated(p, attack, limit, progress) for p in wanted}
    if failed:
        first = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise UserError(
            f"{len(failed)} of {len(plans)} runs failed ({first}); the others are kept, call again to go on"
        )
    comparison = _tabulate(defenses, seeds, plans, results, out)
    comparison.save()
    return comparison


def _plans(defenses: Sequence[str], seeds: Sequence[int], base: dict[str, Any], out: Path) -> dict[str, Plan]:
    plans: dict[str, Plan] = {}
    for seed in seeds:
        for name in defenses:
            bare, plus, addon = name.partition("+")
            if plus and addon != "swa":
                raise UserError(f"unknown add-on {addon!r} in {name!r}: only +swa")
            kind = resolve_defense(bare)
            path, _, cls = bare.partition(":")
            label = f"{Path(path).stem}-{cls}" if cls else bare
            label = f"{label}{plus}{addon}-seed{seed}"
            if label in plans and plans[label].defense != name:
                raise UserError(f"{name} and {plans[label].defense} would share the folder {label}: rename one")
            needs = None
            defense: dict[str, Any] = {"name": bare}
            if kind.starts_from:
                needs = f"standard-seed{seed}"
                defense[kind.starts_from] = str(out / needs)
            values = {**base, "defense": defense, "seed": seed, "out": str(out / label), "swa": bool(plus)}
            plans[label] = Plan(label, name, seed, from_dict(values, source="compare"), needs)
            if needs and needs not in plans:
                values = {**base, "defense": "standard", "seed": seed, "out": str(out / needs)}
                plans[needs] = Plan(needs, "standard", seed, from_dict(values, source="compare"), None)
    return plans


def _state_of(plan: Plan) -> str:
    """ "new", "started" or "finished". Raises: UserError when the folder holds a run of other settings."""
    folder = Path(plan.config.out)
    if not (folder / "config.yaml").is_file():
        return "new"
    saved = from_dict(read_yaml(folder / "config.yaml"), source=str(folder / "config.yaml"))
    asked, found = to_dict(plan.config), to_dict(saved)
    for key, other in _differences(asked, found):
        raise UserError(f"{folder} was run with {key}={other!r}, not as asked now: choose another --out, or remove it")
    if not (folder / "last.pt").is_file():
        return "started"
    done = load_checkpoint(folder / "last.pt")["epoch"] >= saved.epochs
    return "finished" if done and (not saved.swa or (folder / "swa.safetensors").is_file()) else "started"


def _differences(asked: dict[str, Any], found: dict[str, Any], prefix: str = ""):
    for key, value in asked.items():
        other = found.get(key)
        if isinstance(value, dict):
            yield from _differences(value, other or {}, f"{prefix}{key}.")
        elif key == "precision" and asked.get("amp"):
            continue
        elif (
            value is not None
            and value != other
            and key not in ("device", "threads", "data_dir", "loader", "log_every", "tensorboard")
        ):
            yield prefix + key, other


def _train_all(
    pending: list[tuple[Plan, str]], parallel: int, failed: dict[str, str], progress: bool
) -> dict[str, str]:
    """Train what is left; return {run: reason} for those that failed."""

    def one(job: tuple[Plan, str]) -> tuple[str, str]:
        plan, state = job
        if plan.needs in failed:
            return plan.name, f"it starts from {plan.needs}, which failed"
        if parallel > 1:
            return plan.name, _train_in_a_process(plan, state, parallel)
        if progress:
            print(f"\n--- {plan.name}", flush=True)
        try:
            if state == "new":
                train(plan.config, progress=progress)
            else:
                train(resume=plan.config.out, progress=progress)
        except UserError as error:
            return plan.name, str(error)
        return plan.name, ""

    if parallel == 1:
        done = [one(job) for job in pending]
    else:
        with ThreadPoolExecutor(parallel) as pool:
            done = []
            for name, why in pool.map(one, pending):
                done.append((name, why))
                if progress:
                    print(f"{name}: {why or 'done'}", flush=True)
    return {name: why for name, why in done if why}


def _train_in_a_process(plan: Plan, state: str, parallel: int) -> str:
    folder = Path(plan.config.out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    command = [sys.executable, "-m", "fastarat.cli", "train"]
    if state == "new":
        asked = folder.parent / f"{folder.name}.yaml"
        write_yaml(plan.config, asked)
        command += ["--config", str(asked)]
    else:
        command += ["--resume", str(folder)]
    threads = str(max(1, (os.cpu_count() or 1) // parallel))
    with open(log, "a") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": threads}, check=False
        )
    if done.returncode == 0:
        return ""
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    return (last[0].removeprefix("fastarat: ") if last else f"exit code {done.returncode}") + f" (log: {log})"


def _evaluated(plan: Plan, attack: str, limit: int | None, progress: bool) -> dict[str, Any]:
    folder = Path(plan.config.out)
    which = "swa" if plan.config.swa else "last"
    # A file of its own: `fastarat eval` on this run, with another budget perhaps, writes eval.json.
    file = folder / f"compare-{which}.json"
    meta = load_weights(folder / f"{which}.safetensors")[1]
    asked = {
        "attacks": [a.name for a in parse_attacks(attack)],
        "limit": limit,
        "epoch": meta["epoch"],
        "epsilon": meta["epsilon"],
        "norm": meta["norm"],
    }
    if file.is_file():
        saved = json.loads(file.read_text())
        found = {**saved["settings"], "attacks": list(saved["settings"]["attacks"])}
        if all(found.get(key) == value for key, value in asked.items()):
            return saved
    if progress:
        print(f"\n--- {plan.name}: evaluating", flush=True)
    model, meta, config = load_run(folder, which)
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
        progress=progress,
    )
    result = dataclasses.replace(
        result, settings={**result.settings, "weights": which, "epoch": meta["epoch"], "limit": limit}
    )
    result.save(file)
    own = folder / ("eval.json" if which == "last" else f"eval-{which}.json")
    if not own.exists():
        result.save(own)  # for `fastarat report`
    if progress:
        print(result.table(), flush=True)
    return json.loads(result.to_json())


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def _tabulate(
    defenses: Sequence[str], seeds: Sequence[int], plans: dict[str, Plan], results: dict[str, dict], out: Path
) -> Comparison:
    rows = []
    keys = list(next(iter(results.values()))["accuracy"])
    for name in defenses:
        mine = [p for p in plans.values() if p.defense == name and p.seed in seeds]
        evals = [results[p.name] for p in mine]
        row: dict[str, Any] = {"defense": name, "seeds": [p.seed for p in mine]}
        for key in keys:
            row[key] = _spread([e["accuracy"][key] for e in evals])
        if {"clean_acc", "robust_acc_aa"} <= set(keys):
            pairs = [(e["accuracy"]["clean_acc"], e["accuracy"]["robust_acc_aa"]) for e in evals]
            row["sum"] = _spread([c + r for c, r in pairs])
            row["nrr"] = _spread([2 * c * r / (c + r) if c + r else 0.0 for c, r in pairs])
        walls = [m["wall_s"] for p in mine for m in RunFolder(p.config.out, resume=True).metrics()]
        row["epoch_s"] = statistics.median(walls)
        first = load_run_config(Path(mine[0].config.out))
        published = PUBLISHED.get((first.dataset, first.model, name))
        same_budget = first.attack.norm == "linf" and abs(first.attack.epsilon - _BUDGET) < 1e-9
        row["published"] = published._asdict() if published and same_budget else None
        row["warnings"] = sorted({w for e in evals for w in e["warnings"]})
        rows.append(row)
    shown = [load_run_config(Path(p.config.out)) for p in plans.values() if p.defense in defenses]
    epochs = sorted({c.epochs for c in shown})
    settings = {
        # By its name: a folder's path says little, and differs from machine to machine.
        "dataset": load_weights(Path(mine[0].config.out) / "last.safetensors")[1]["dataset"],
        "model": first.model,
        "epochs": " / ".join(map(str, epochs)),
        "seeds": list(seeds),
        "epsilon": first.attack.epsilon,
        "norm": first.attack.norm,
        "keys": keys,
        "num_images": next(iter(results.values()))["num_images"],
        "device": _device(),
        "torch": torch.__version__,
    }
    return Comparison(rows, settings, out)


def load_run_config(folder: Path) -> Config:
    """Read the resolved config of a run folder."""
    return from_dict(read_yaml(folder / "config.yaml"), source=str(folder / "config.yaml"))


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU with {os.cpu_count()} cores"
