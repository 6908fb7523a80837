"""What an evaluation found, `Evaluation`: as JSON, as a table, and read again with suspicion.

Source: Wilson, JASA 1927 (the interval).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastarat.errors import UserError
from fastarat.evaluation.task import in_pixels
from fastarat.files import make_writable, parse_json, seal, write_text

_OPTIONAL = ("per_class", "class_counts", "confusion", "curves", "corruptions", "corruptions_by_branch")
"""What earlier versions did not write, and is left out where it is empty."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on how many images, and how.

    accuracy: fractions in [0, 1] by key: clean_acc, robust_acc_pgd20, robust_acc_aa, ...
    autoattack: robust accuracy left after each member of AutoAttack's standard version, in order.
    max_perturbation: by attack name, the largest distance from a clean image, in `settings["norm"]`.
    wall_s: seconds by attack name.
    warnings: what makes a number above less than it seems; empty is good.
    per_class: by key, how many images of each class were classified correctly, of `class_counts`.
    confusion: by key, K lists of K counts, true class by predicted one; of clean and PGD, up to 100 classes.
    curves: accuracy along epsilon and PGD steps, where it was asked for (`crafted.measure_curves`).
    corruptions: by kind, the accuracy in severities 1 to 5; `corruptions_by_branch`: of the other BatchNorm branches.
    settings: epsilon, step_size, norm, seed, branch, limit, device, versions, hashes of the weights and the data ...
    """

    accuracy: dict[str, float]
    num_images: int
    settings: dict[str, Any]
    autoattack: dict[str, float] = field(default_factory=dict)
    max_perturbation: dict[str, float] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    per_class: dict[str, list[int]] = field(default_factory=dict)
    class_counts: list[int] = field(default_factory=list)
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    corruptions: dict[str, list[float]] = field(default_factory=dict)
    corruptions_by_branch: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the evaluation as indented JSON, with the 95 % interval of each accuracy, and a checksum."""
        record = {key: value for key, value in asdict(self).items() if value or key not in _OPTIONAL}
        record["interval_95"] = {key: wilson(value, self.num_images) for key, value in self.accuracy.items()}
        return json.dumps(record | {"sha256": seal(record)}, indent=2)

    def save(self, path: str | Path) -> Path:
        """Write `to_json()` to `path`, whole or not at all. Raises: UserError where it cannot be written."""
        path = Path(path)
        check_writable(path)
        write_text(path, self.to_json() + "\n")
        return path

    def table(self) -> str:
        """Return the accuracies as plain text: attack, images, accuracy, 95 % Wilson interval, time."""
        rows = [("attack", "images", "accuracy", "95 % interval", "time")]

        def add(label: str, value: float, timed: str) -> None:
            low, high = wilson(value, self.num_images)
            wall = f"{self.wall_s[timed]:.1f} s" if timed in self.wall_s else ""
            interval = f"{low:.2%} to {high:.2%}"
            rows.append((label, f"{self.num_images:,}", f"{value:.2%}", interval, wall))

        for name, key in self.settings["attacks"].items():
            unsure = self.settings.get("confirmed", {}).get(name) is False
            add(f"{name} (unconfirmed)" if unsure else name, self.accuracy[key], name)
            if name == "corruptions":
                for branch, by_kind in self.corruptions_by_branch.items():
                    values = [value for accuracies in by_kind.values() for value in accuracies]
                    add(f"  branch {branch}", sum(values) / len(values), "")
            if name == "autoattack":
                for member, value in self.autoattack.items():
                    add(f"  after {member}" if member != "clean" else "  clean", value, f"{name}/{member}")
        first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([name.ljust(first), *(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))])
            for name, *cells in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        s = self.settings
        lines.append(
            f"{s['norm']} epsilon {in_pixels(s['epsilon'])}, PGD step {in_pixels(s['step_size'])}, "
            f"branch {s['branch']}, seed {s['seed']}, {s['precision']}, {s['device']}"
            + (f", {s['processes']} processes" if "processes" in s else "")
        )
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def wilson(share: float, num_images: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share observed on `num_images` images.

    Worked value: 0.5 of 100 images gives (0.4038, 0.5962). Source: Wilson, JASA 1927.
    """
    from scipy.stats import binomtest  # here, because it takes more than a second to import

    # Wilson's interval, because the usual one has no width at 0 and 100 %. The test wants counts, so the division is
    # undone.
    interval = binomtest(round(share * num_images), num_images).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def check_writable(path: Path) -> None:
    """Make the folder of `path`; raise UserError when a file cannot be written there. Nothing else changes."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    make_writable(path.parent, path)


def check_record(record: Any) -> None:
    """Raise ValueError, TypeError or LookupError for what is not of the form that `Evaluation.to_json` gives.

    A seal proves nothing of who set it. What earlier versions did not write may be missing.
    """
    settings, accuracy, count = record["settings"], record["accuracy"], record["num_images"]
    attacks = settings.get("attacks", {})
    for key in {*accuracy, *attacks.values()}:
        if type(accuracy[key]) not in (int, float) or type(count) is not int:
            raise TypeError(f"the accuracy {key} is no number")
        wilson(accuracy[key], count)
    if not (isinstance(settings["norm"], str) and type(settings["epsilon"]) in (int, float)):
        raise TypeError("its budget is none")
    if not all(isinstance(name, str) for name in (*attacks, *accuracy)):
        raise TypeError("an attack's name is no text")
    for key in ("autoattack", "max_perturbation", "wall_s"):
        if not all(type(value) in (int, float) for value in dict(record.get(key, {})).values()):
            raise TypeError(f"{key} holds what is no number")
    found = record.get("warnings", [])
    if not (isinstance(found, list) and all(isinstance(text, str) for text in found)):
        raise TypeError("its warnings are no texts")
    classes = settings.get("num_classes", 2)
    if type(classes) is not int or classes < 1:
        raise TypeError("num_classes is no number of classes")
    confirmed = settings.get("confirmed", {})
    if not (isinstance(confirmed, dict) and all(isinstance(value, bool) for value in confirmed.values())):
        raise TypeError("what is confirmed is not said")
    _check_details(record, classes)


def _check_details(record: Any, classes: int) -> None:
    """Check what newer versions add: counts by class, curves, corruptions."""
    if record.get("per_class") and "class_counts" not in record:
        raise LookupError("counts by class, and not of how many")
    rows = [*record.get("per_class", {}).values(), record.get("class_counts", [0] * classes)]
    for matrix in record.get("confusion", {}).values():
        if len(matrix) != classes:
            raise TypeError("a confusion matrix has not a row for each class")
        rows += matrix
    if not all(len(row) == classes and all(type(count) is int and count >= 0 for count in row) for row in rows):
        raise TypeError("its counts by class are none")
    shares = [record.get("corruptions", {}), *record.get("corruptions_by_branch", {}).values()]
    series = [accuracies for by_kind in shares for accuracies in by_kind.values()]
    if not all(len(accuracies) == 5 for accuracies in series):
        raise TypeError("a corruption has not five severities")
    for name, axis in record.get("curves", {}).items():
        if name == "num_images":
            wilson(0.0, axis)
        elif len(axis["values"]) != len(axis["accuracy"]) or not all(
            type(value) in (int, float) for value in axis["values"]
        ):
            raise TypeError(f"the curve of {name} is none")
        else:
            series.append(axis["accuracy"])
    if not all(type(value) in (int, float) and 0 <= value <= 1 for accuracies in series for value in accuracies):
        raise TypeError("a curve or a corruption holds what is no accuracy")


def saved_evaluation(file: Path, asked: dict[str, Any], *, weights: str, data: str) -> dict[str, Any] | None:
    """Return the evaluation in a file if it is whole, of these weights and images, and of the settings `asked`.

    weights, data: their hashes. None where it is not; but for other settings the reason goes to stderr.
    """
    try:
        saved = parse_json(file.read_bytes())
        why = "" if saved["sha256"] == seal(saved) else "was edited, or is damaged"
        check_record(saved)
        found = {**saved["settings"], "attacks": list(saved["settings"]["attacks"])}
        # What the table reads besides.
        if {*saved["accuracy"]} != {*saved["settings"]["attacks"].values()}:
            raise LookupError
        _ = saved["warnings"], saved["wall_s"], found["num_classes"]
    except KeyError as error:
        why, saved, found = f"is damaged, or of an earlier version (it has no {error})", {}, {}
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        why, saved, found = "is damaged", {}, {}
    same = all(found.get(key) == value for key, value in asked.items())
    if not why and found.get("weights_sha256") != weights:
        why = "is of other weights than the run holds now"
    if not why and same and found.get("data_sha256") != data:
        why = "is of other test images than there are now"
    if why:
        print(f"warning: {file} {why}: evaluated anew", file=sys.stderr, flush=True)
    return saved if same and not why else None


def keep_previous(file: Path, result: Evaluation) -> Path | None:
    """Move an evaluation that says what `result` does not out of its way; return where to, None where there is none.

    It says more where it has an attack, curves, more images, or another budget, branch or data.
    """
    if not file.is_file():
        return None
    saved, kept = parse_json(file.read_bytes()), file.with_name(f"{file.stem}.previous{file.suffix}")
    new = parse_json(result.to_json().encode())
    told = ("epsilon", "norm", "branch", "data_sha256", "confirmed")
    same = all(saved["settings"].get(key) == new["settings"].get(key) for key in told)
    more = {*saved["accuracy"]} - {*new["accuracy"]} or any(
        saved.get(k) and not new[k] for k in ("curves", "corruptions")
    )
    if same and not more:
        return None
    file.replace(kept)
    return kept


def check_replaceable(file: Path, weights: str) -> None:
    """Raise UserError for a file that exists and is no evaluation of the weights of this hash."""
    if not file.is_file():
        return
    mend = "nothing is overwritten: name another --out, move the file away, or add --overwrite"
    try:
        saved = parse_json(file.read_bytes())
        check_record(saved)
        known = saved["settings"].get("weights_sha256")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}), so it is not replaced; {mend}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{file} is no evaluation that can be read (damaged, or another file); {mend}") from error
    if known is None:
        raise UserError(f"{file} is of an earlier version, which did not record the weights; {mend}")
    if known != weights:
        raise UserError(f"{file} is an evaluation of other weights; {mend}")
