"""The table of a comparison: what each row says, its four formats, and the published numbers beside it."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastarat import texts
from fastarat.card import pixels
from fastarat.config import Config
from fastarat.evaluation import attack_title
from fastarat.files import write_text
from fastarat.schedules import counted, ends_at, in_words
from fastarat.specs import known
from fastarat.tuning import rule


class Published(NamedTuple):
    """Accuracies in percent as printed in a paper. Baselines differ by source: compare within one table only."""

    clean: float
    autoattack: float
    source: str


_ARAT = "Waseda et al., ICLR 2025, main table"
_COPIED = f"{_ARAT}, copied there from its paper"
_CURE = "Gowda et al., ICLR 2024, its CIFAR-10 table"
_RESNET, _WIDE = "resnet18", "wrn-34-10"
PUBLISHED: dict[tuple[str, str, str], Published] = {
    (dataset, model, defense): Published(*accuracies, source)
    for dataset, defense, source, printed in (
        ("cifar10", "at", _ARAT, {_RESNET: (83.77, 42.42), _WIDE: (86.06, 46.26)}),
        ("cifar10", "trades", _ARAT, {_RESNET: (81.25, 48.54), _WIDE: (84.33, 51.75)}),
        ("cifar10", "mart", _ARAT, {_RESNET: (82.15, 47.83), _WIDE: (86.10, 49.11)}),
        ("cifar10", "lbgat", _ARAT, {_RESNET: (85.00, 48.85), _WIDE: (88.19, 52.56)}),
        ("cifar10", "arrest", _COPIED, {_RESNET: (86.63, 46.14), _WIDE: (90.24, 50.20)}),
        ("cifar10", "ar-at", _ARAT, {_RESNET: (87.82, 49.02), _WIDE: (90.89, 50.77)}),
        ("cifar10", "ar-at+swa", _ARAT, {_RESNET: (86.44, 50.28), _WIDE: (90.06, 54.03)}),
        ("cifar10", "cure", _CURE, {_RESNET: (86.76, 49.69), _WIDE: (87.05, 52.10)}),
        ("cifar100", "at", _ARAT, {_RESNET: (55.82, 19.50), _WIDE: (59.83, 23.94)}),
        ("cifar100", "trades", _ARAT, {_RESNET: (54.74, 23.60), _WIDE: (57.61, 26.88)}),
        ("cifar100", "mart", _ARAT, {_RESNET: (54.54, 26.04), _WIDE: (57.75, 24.89)}),
        ("cifar100", "lbgat", _ARAT, {_RESNET: (65.87, 23.19), _WIDE: (68.17, 26.92)}),
        ("cifar100", "arrest", _COPIED, {_WIDE: (73.05, 24.32)}),
        ("cifar100", "ar-at", _ARAT, {_RESNET: (67.51, 23.38), _WIDE: (72.51, 24.18)}),
        ("cifar100", "ar-at+swa", _ARAT, {_RESNET: (67.17, 24.36), _WIDE: (72.37, 27.31)}),
    )
    for model, accuracies in printed.items()
}
_SHARED = "data, batch order and initial weights"
# Published numbers are for this budget under L-infinity; beside any other they would mislead.
_BUDGET = 8 / 255


@dataclass(frozen=True)
class Comparison:
    """The table. rows: one dict per defense, accuracies as fractions: mean, deviation and the values per seed."""

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    out: Path

    def markdown(self) -> str:
        head, body = self._cells("±", "–")
        rule = ["---", *("---:" if self._is_number(h) else "---" for h in head[1:])]
        lines = [head, rule, *([texts.markdown(c) for c in line] for line in body)]
        note = "\n\n".join(texts.markdown(line) for line in self._notes())
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + note

    def latex(self) -> str:
        head, body = self._cells("±", "--")
        # Escaped whole, names and all; only then is the one sign put in that is LaTeX's own.
        rows = [" & ".join(texts.latex(c).replace("±", "$\\pm$") for c in line) + " \\\\" for line in [head, *body]]
        rows.insert(1, "\\midrule")
        columns = "l" + "".join("r" if self._is_number(h) else "l" for h in head[1:])
        table = "\n".join([f"\\begin{{tabular}}{{{columns}}}", "\\toprule", *rows, "\\bottomrule", "\\end{tabular}"])
        return "".join(f"% {texts.printable(line)}\n" for line in self._notes()) + f"{table}\n"

    def csv(self) -> str:
        lines = []
        for row in self.rows:
            line = {"defense": row["defense"], "seeds": len(row["seeds"]), "images": self.settings["num_images"]}
            for key in (*self.settings["keys"], "sum", "nrr"):
                line |= {f"{key}_{part}": (row.get(key) or {}).get(part) for part in ("mean", "std")}
            for key in dict.fromkeys(key for r in self.rows for key in r.get("diagnostics", {})):
                line |= {
                    f"{key}_{part}": (row.get("diagnostics", {}).get(key) or {}).get(part) for part in ("mean", "std")
                }
            line |= {
                "epoch_s": row["epoch_s"],
                "schedule": row["schedule"],
                "settings": settings_in_words(row["settings"]),
            }
            line |= {"tried": row["tried"], **{k: " ".join(map(str, row[k])) for k in ("collapsed", "diverged")}}
            names = {"clean": "published_clean", "autoattack": "published_aa", "source": "published_source"}
            line |= {name: (row["published"] or {}).get(part) for part, name in names.items()}
            lines.append({name: texts.cell(value) for name, value in line.items()})
        file = io.StringIO()
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return file.getvalue()

    def to_json(self) -> str:
        # NaN is not JSON: strict readers refuse the file, so better to fail here.
        return json.dumps({"settings": self.settings, "rows": self.rows}, indent=2, allow_nan=False) + "\n"

    def note(self) -> str:
        """What the numbers are, how the rows were trained, and what keeps them from being compared."""
        return "\n\n".join(self._notes())

    def _notes(self) -> list[str]:
        s = self.settings
        ended = (
            f"mean ± standard deviation over seeds {', '.join(map(str, s['seeds']))}"
            if len(s["seeds"]) > 1
            else f"seed {s['seeds'][0]}"
        )
        lines = [
            f"{s['dataset']}, {s['model']}, {s['epochs']} epochs, {s['norm']} epsilon {pixels(s['epsilon'])}, "
            f"{s['num_images']:,} test images in every cell, last checkpoint, {ended}; accuracies in %."
            + (f" Sum = clean + {attack_title(aa)}, NRR = their harmonic mean." if (aa := summed(s["keys"])) else "")
            + f" s/epoch on {s['device']}. Rows of one seed share "
            + s.get("shared", _SHARED)
            + "."
        ]
        if len({row["schedule"] for row in self.rows}) == 1:
            lines.append(f"Schedule of every row: {self.rows[0]['schedule']}.")
        if s["precision"]:
            lines.append(f"Precision of every row: {s['precision']}.")
        if any(row["tried"] for row in self.rows):
            lines.append(s["rule"])
        if self._shows_collapsed():
            lines.append(
                "Collapsed: a seed that diverged, or whose last PGD accuracy on validation images is no better than "
                "chance or under half of its row's best seed's; counted in the means unless it diverged."
            )
        lines += s.get("notes", [])
        return lines + [f"Warning: {text}" for text in s["warnings"]]

    def _shows_collapsed(self) -> bool:
        return any(row["collapsed"] or row["diverged"] for row in self.rows)

    @staticmethod
    def _is_number(title: str) -> bool:
        return not title.startswith(("published", "schedule", "settings"))

    def _cells(self, plus_minus: str, empty: str) -> tuple[list[str], list[list[str]]]:
        """Return the titles of the columns, and the cells of every row."""
        shown = {key: attack_title(key) for key in self.settings["keys"]}
        shown |= {"sum": "Sum", "nrr": "NRR"} if summed(self.settings["keys"]) else {}
        measured = {
            key: title
            for key, title in (("grad_sim", "Grad-sim"), ("grad_conflict", "conflict ratio"))
            if any(key in row.get("diagnostics", {}) for row in self.rows)
        }
        optional = {
            "collapsed": self._shows_collapsed(),
            "schedule": len({row["schedule"] for row in self.rows}) > 1,
            "settings": any(row["settings"] for row in self.rows),
            "published clean / AutoAttack": any(row["published"] for row in self.rows),
        }
        body = []
        for row in self.rows:
            cells = {"defense": row["defense"]}
            for key, title in shown.items():
                value = row.get(key)
                spread = "" if value is None or value["std"] is None else f" {plus_minus} {100 * value['std']:.2f}"
                cells[title] = empty if value is None else f"{100 * value['mean']:.2f}{spread}"
            for key, title in measured.items():
                value = row.get("diagnostics", {}).get(key)
                spread = "" if value is None or value["std"] is None else f" {plus_minus} {value['std']:.3f}"
                cells[title] = empty if value is None else f"{value['mean']:.3f}{spread}"
            cells["s/epoch"] = empty if row["epoch_s"] is None else f"{row['epoch_s']:.1f}"
            bad = len({*row["collapsed"], *row["diverged"]})
            cells["collapsed"] = f"{bad} of {len(row['seeds'])}" if bad else "0"
            cells["schedule"] = row["schedule"]
            tried = f" (of {row['tried']})" if row["tried"] else ""
            cells["settings"] = f"{settings_in_words(row['settings'])}{tried}" or empty
            p = row["published"]
            cells["published clean / AutoAttack"] = (
                f"{p['clean']:.2f} / {p['autoattack']:.2f}{_grad_sim(p)} ({p['source']})" if p else empty
            )
            body.append({title: cell for title, cell in cells.items() if optional.get(title, True)})
        return list(body[0]), [list(cells.values()) for cells in body]

    def save(self) -> Path:
        """Write table.md, .tex, .csv and .json into the comparison's folder."""
        forms = {"md": self.markdown() + "\n", "tex": self.latex(), "csv": self.csv(), "json": self.to_json()}
        for suffix, text in forms.items():
            write_text(self.out / f"table.{suffix}", text)
        return self.out / "table.md"


def _grad_sim(published: Mapping[str, Any]) -> str:
    return f", Grad-sim {published['grad_sim']:.2f}" if "grad_sim" in published else ""


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """`{"optim.lr": 0.03, "defense.predictor_adv": False}` as `lr 0.03, predictor adv off`."""
    return ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {_word(value)}" for key, value in settings.items())


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class Row(NamedTuple):
    """What the runs of one row gave. config: of its first seed. robust: PGD accuracy on validation images at the end.

    evaluations, robust: by seed, of those that did not diverge. epochs_s: seconds of every epoch of all of them.
    settings: chosen or given; tried: how many they were chosen among, 0 for none. diagnostics: by seed, of a run each.
    """

    config: Config
    seeds: list[int]
    evaluations: dict[int, dict[str, Any]]
    robust: dict[int, float | None]
    epochs_s: list[float]
    settings: dict[str, Any]
    tried: int
    diagnostics: dict[int, dict[str, float]] = {}


def tabulate(
    rows: Mapping[str, Row], tune_seeds: Sequence[int], dataset: str, out: Path, *, precision: str
) -> Comparison:
    """Put all rows into one table.

    dataset: its name. out: where the table is written. precision: what all rows are trained in, and why; "" by default.
    """
    # Any evaluation will do: all rows have the same attacks on the same images, which `compare` saw to.
    one = next(e for row in rows.values() for e in row.evaluations.values())
    keys = list(one["accuracy"])
    table = [_cells_of(name, row, keys, one["settings"]["num_classes"]) for name, row in rows.items()]
    configs = {name: row.config for name, row in rows.items()}
    first = next(iter(configs.values()))
    settings = {
        # By its name: a folder's path says little, and differs from machine to machine.
        "dataset": dataset,
        "model": " / ".join(dict.fromkeys(str(c.model) for c in configs.values())),
        "epochs": " / ".join(map(str, _lengths(configs))),
        "seeds": next(iter(rows.values())).seeds,
        "shared": _SHARED
        if len({(c.model, c.batch_size, c.limit_train) for c in configs.values()}) == 1
        else "the data",
        "epsilon": first.attack.epsilon,
        "norm": first.attack.norm,
        "precision": precision,
        "keys": keys,
        "num_images": one["num_images"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU with {os.cpu_count()} cores",
        "torch": torch.__version__,
        "rule": rule(tune_seeds, [name for name, row in rows.items() if row.tried]),
        "warnings": [*_unequal(configs), *overestimates(table)],
    }
    return Comparison(table, settings, out)


def _cells_of(name: str, row: Row, keys: Sequence[str], num_classes: int) -> dict[str, Any]:
    config, accuracies = row.config, [e["accuracy"] for e in row.evaluations.values()]
    cells: dict[str, Any] = {"defense": name, "seeds": row.seeds}
    cells |= {key: _spread([a[key] for a in accuracies]) for key in keys}
    if aa := summed(keys):
        pairs = [(a["clean_acc"], a[aa]) for a in accuracies]
        cells["sum"] = _spread([c + r for c, r in pairs])
        cells["nrr"] = _spread([2 * c * r / (c + r) if c + r else 0.0 for c, r in pairs])
    published = PUBLISHED.get((config.dataset, str(config.model), name))
    same_budget = config.attack.norm == "linf" and abs(config.attack.epsilon - _BUDGET) < 1e-9
    return cells | {
        "epoch_s": statistics.median(row.epochs_s) if row.epochs_s else None,
        "published": published._asdict() if published and same_budget else None,
        "settings": row.settings,
        "diagnostics": {
            key: _spread([found[key] for found in row.diagnostics.values() if key in found])
            for key in dict.fromkeys(key for found in row.diagnostics.values() for key in found)
        },
        "schedule": _schedule(config, row.settings),
        "tried": row.tried,
        "collapsed": collapsed(row.robust, num_classes),
        "diverged": [seed for seed in row.seeds if seed not in row.evaluations],
        "warnings": sorted({w for e in row.evaluations.values() for w in e["warnings"]}),
    }


def summed(keys: Sequence[str]) -> str | None:
    """Return the accuracy that is added to clean accuracy: under AutoAttack, or its fast form; None without both."""
    found = next((key for key in ("robust_acc_aa", "robust_acc_aa_fast") if key in keys), None)
    return found if "clean_acc" in keys else None


def _spread(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    # Of the sample (n - 1), and None for one seed: 0 would claim that seeds agree.
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def collapsed(robust: Mapping[int, float | None], num_classes: int) -> list[int]:
    """Seeds no better than chance under attack, on validation images at the end, or under half of the best of these."""
    found = {seed: value for seed, value in robust.items() if value is not None}
    return [seed for seed, value in found.items() if value <= 1 / num_classes or value < max(found.values()) / 2]


def _schedule(config: Config, settings: Mapping[str, Any]) -> str:
    """The row's schedule in words; what the row's own settings say is not said again."""
    optim, recipe, epochs = config.optim, config.optim.schedule(), known(config.epochs)
    if settings.keys() & {"optim.lr", "optim.warmup"} and not (recipe.one_cycle or recipe.cosine):
        drops = [f"x {f:g} from epoch {at:g}" for at, f in recipe.drops_in(epochs)]
        lr = ", ".join(["the row's lr and warm-up", *drops])
    else:
        lr = in_words(recipe, epochs=epochs, lr=known(optim.lr), warmup=optim.warmup)
    momentum = "" if optim.momentum == 0.9 and not optim.nesterov else f", momentum {optim.momentum or '0.95 to 0.85'}"
    return f"{optim.recipe}: {counted(epochs, 'epoch')}, {lr}{momentum}; weight decay {optim.weight_decay:g}"


def overestimates(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name the rows, in one sentence, whose PGD accuracy is over 5 points above AutoAttack's in the mean over seeds."""
    gaps = []
    for row in rows:
        pgd = [v["mean"] for k, v in row.items() if k.startswith("robust_acc_pgd") and v]
        aa = row.get("robust_acc_aa") or row.get("robust_acc_aa_fast")
        if pgd and aa and (gap := 100 * (min(pgd) - aa["mean"])) > 5:
            gaps.append(f"{row['defense']} by {gap:.1f}")
    said = f"PGD overestimates {', '.join(gaps)} points against AutoAttack: quote AutoAttack, not PGD"
    return [said] if gaps else []


def _lengths(configs: dict[str, Config]) -> list[int]:
    return sorted({known(c.epochs) for c in configs.values()})


def _unequal(configs: dict[str, Config]) -> list[str]:
    """Say where rows are trained so differently that a short run's order may be the schedule's."""
    ends: dict[float, list[str]] = {}
    for name, c in configs.items():
        share = ends_at(c.optim.schedule(), epochs=known(c.epochs), warmup=c.optim.warmup)
        ends.setdefault(share, []).append(name)
    found = []
    if len(ends) > 1:
        said = "; ".join(f"{', '.join(names)} at {share:.2g} of it" for share, names in ends.items())
        found.append(
            f"the rows end at different shares of their base learning rate ({said}), so part of a difference between "
            "them may be the schedule's; --optim.recipe NAME puts all on one"
        )
    lengths = _lengths(configs)
    if len(lengths) > 1:
        found.append(f"the rows were trained for {' / '.join(map(str, lengths))} epochs; --epochs N gives all the same")
    return found
