"""Measuring a network under a list of attacks, the PGD among them, and the result: `Evaluation`.

Source: Madry et al., ICLR 2018 (PGD); Wilson, JASA 1927 (the interval).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastarat.attacks import pgd, random_start
from fastarat.checks import input_channels
from fastarat.device import enough_memory, pick_device
from fastarat.errors import UserError
from fastarat.evaluation.autoattack import AutoAttackRun, find_package, named_version, plan
from fastarat.evaluation.checks import check_data, check_finite, check_model, check_network, doubts, furthest
from fastarat.evaluation.task import Entry, Task, collect, device_of, in_pixels, parse_attacks, share
from fastarat.files import make_writable, parse_json, seal, tensors_hash, write_text
from fastarat.values import EPSILON, Norm, checked_budget, checked_seed, coerce, whole


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on how many images, and how.

    accuracy: fractions in [0, 1] by key: clean_acc, robust_acc_pgd20, robust_acc_aa, ...
    autoattack: robust accuracy left after each member of AutoAttack's standard version, in order.
    max_perturbation: by attack name, the largest distance from a clean image, in `settings["norm"]`.
    wall_s: seconds by attack name.
    warnings: what makes a number above less than it seems; empty is good.
    settings: epsilon, step_size, norm, seed, branch, limit, device, versions, hashes of the weights and the data ...
    """

    accuracy: dict[str, float]
    num_images: int
    settings: dict[str, Any]
    autoattack: dict[str, float] = field(default_factory=dict)
    max_perturbation: dict[str, float] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the evaluation as indented JSON, with the 95 % interval of each accuracy, and a checksum."""
        record = asdict(self)
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
            add(name, self.accuracy[key], name)
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
        )
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    data: Any,
    attack: str = "clean,pgd-20",
    *,
    epsilon: float = EPSILON,
    step_size: float | None = None,
    norm: Norm = "linf",
    limit: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    branch: str = "adv",
    state_dir: str | Path | None = None,
    progress: bool = True,
    tf32: bool = False,
) -> Evaluation:
    """Measure the accuracy of `model` under each attack of a comma-separated list.

    The model comes back as it was: mode of every module, requires_grad, BN branch, device; no global random generator
    has moved. A PGD image counts as robust when the last point of every restart is classified correctly; an AutoAttack
    image when it is correct without perturbation and after every member.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] -> logits float32 [B, K]; it normalises inside.
        data: a `fastarat.data.Split`, a loader, or (images float32 [N, C, H, W] in [0, 1], labels int64 [N]).
        attack: entries `clean`, `pgd-N` (N steps from a uniform start), `pgd-N-R` (R restarts), `autoattack` (standard
            version), or one member of it: `apgd-ce`, `apgd-t`, `fab-t`, `square`.
        epsilon: radius in pixel units, 1.0 the full range.
        step_size: of PGD; default epsilon / 4, which is 2/255 for 8/255.
        limit: number of images, at even distances through the set (one stored class by class stays balanced).
        batch_size: images per forward; with the seed it fixes AutoAttack's random numbers.
        device: where to evaluate: a device, its name, or "auto"; default: where the model is.
        branch: BN branch of a split model.
        state_dir: AutoAttack saves its state here after every batch, and a later call with the same weights, data and
            settings continues from it.
        progress: show one line per attack on a terminal and in a notebook.
        tf32: allow TensorFloat-32 in convolutions and matrix products (faster on CUDA; settings record it).
    Raises: UserError for an unknown attack, a budget outside (0, 1], images outside [0, 1], labels outside [0, K), and
        a model that does not return finite float32 logits; all before the first attack.
    """
    entries = parse_attacks(attack)
    budget = checked_budget(epsilon, step_size, norm)
    batch_size, seed = whole("batch_size", batch_size), checked_seed(seed)
    progress, tf32 = coerce(progress, bool, "progress"), coerce(tf32, bool, "tf32")
    check_network(model)
    # An hour of PGD should not end in the news that a package is missing.
    if any(e.members for e in entries):
        find_package()
    device = device_of(model) if device is None else pick_device(device)
    images, labels = collect(data, limit=limit, batch_size=batch_size, channels=input_channels(model))
    check_data(model, images, labels)
    budget = checked_budget(*budget, shape=images.shape)
    task = Task(model, images, labels, budget, batch_size, seed, branch, tf32, device, progress)
    with task.lent(), enough_memory(batch_size):
        return _measured(task, entries, limit, state_dir)


def _measured(task: Task, entries: list[Entry], limit: int | None, state_dir: str | Path | None) -> Evaluation:
    """Check the model, then run the attacks in turn."""
    num_classes = check_model(task, needs_gradient=any(e.name not in ("clean", "square") for e in entries))
    plans = {e.name: plan(e, num_classes, task.found) for e in entries if e.members}
    settings = {
        "attacks": {e.name: e.key for e in entries},
        **task.budget._asdict(),
        "weights_sha256": tensors_hash(dict(sorted(task.model.state_dict().items()))),
        "data_sha256": tensors_hash({"images": task.images, "labels": task.labels}),
        "limit": limit,
        "batch_size": task.batch_size,
        "seed": task.seed,
        "branch": task.branch,
        "num_classes": num_classes,
        "autoattack_members": {name: list(members) for name, members in plans.items()},
        "precision": "tf32" if task.tf32 else "float32",
        "device": torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else task.device.type,
        "torch": torch.__version__,
        "autoattack_package": named_version(find_package()) if plans else None,
    }
    result = Evaluation({}, len(task.labels), settings)
    began = time.perf_counter()
    # Whatever was asked for: AutoAttack attacks what is correct so far, and `doubts` compares with clean accuracy.
    correct = torch.cat([_correct(task, x, y).cpu() for x, y in task.batches()])
    clean_wall_s = time.perf_counter() - began
    for entry in entries:
        name, began = entry.name, time.perf_counter()
        if name == "clean":
            robust, result.wall_s[name] = correct, clean_wall_s
        elif entry.num_steps:
            robust, result.max_perturbation[name] = _pgd_robust(task, entry)
            result.wall_s[name] = time.perf_counter() - began
        else:
            run = AutoAttackRun(task, name, plans[name], num_classes, correct.clone())
            if state_dir is not None:
                run.remember(Path(state_dir))
            run.play()
            robust, done = run.robust, run.done
            result.max_perturbation[name] = max(d["max_perturbation"] for d in done.values())
            result.wall_s[name] = sum(d["wall_s"] for d in done.values())
            if name == "autoattack":
                result.autoattack.update({"clean": share(correct)} | {m: d["accuracy"] for m, d in done.items()})
                result.wall_s.update({f"{name}/{m}": d["wall_s"] for m, d in done.items()})
        result.accuracy[entry.key] = share(robust)
    # The same doubt may come up at every batch; a dict keeps the order, a set would not.
    notes = [*task.found, *doubts(entries, result.accuracy, result.autoattack, share(correct))]
    return replace(result, warnings=tuple(dict.fromkeys(notes)))


def adversarial_examples(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float = EPSILON,
    step_size: float | None = None,
    num_steps: int = 20,
    norm: Norm = "linf",
    seed: int = 0,
    branch: str = "adv",
) -> Tensor:
    """Return PGD images of one batch, for plotting, made exactly as `evaluate` makes them.

    Args:
        images: float32 [B, C, H, W] in [0, 1]; stay unchanged.
        labels: int64 [B].
        epsilon, step_size, num_steps, norm, seed, branch: as in `evaluate`.
    Returns: float32 [B, C, H, W] on the device of `images`, within epsilon of them and within [0, 1].
    Raises: UserError as `evaluate`.
    """
    num_steps, seed = whole("num_steps", num_steps), checked_seed(seed)
    check_network(model)
    check_data(model, images, labels)
    budget = checked_budget(epsilon, step_size, norm, shape=images.shape)
    # The model's device rules here, not the images': `predicted` keeps its images on the CPU.
    images, device = images.detach(), device_of(model)
    task = Task(model, images, labels, budget, len(images), seed, branch, tf32=False, device=device, progress=False)
    with task.lent():
        check_model(task, needs_gradient=True)
        x, y = next(task.batches())
        generator = torch.Generator(device).manual_seed(seed)
        points = _pgd(task, x, y, _start(task, x, generator), num_steps)
        furthest(points, x, budget)
    return points.to(images.device)


def _correct(task: Task, points: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = task.forward(points)
    check_finite(logits)
    return logits.argmax(1) == labels


def _start(task: Task, images: Tensor, generator: torch.Generator) -> Tensor:
    epsilon, _, norm = task.budget
    return random_start(images, epsilon=epsilon, kind="uniform", norm=norm, generator=generator)


def _pgd(task: Task, images: Tensor, labels: Tensor, start: Tensor, num_steps: int) -> Tensor:
    # The labels twice: kappa is counted by the first, the cross-entropy taken of the second.
    return pgd(task.forward, images, labels, labels, start, num_steps=num_steps, **task.budget._asdict()).images


def _pgd_robust(task: Task, entry: Entry) -> tuple[Tensor, float]:
    """Return bool [N], correct under every restart, and the largest perturbation."""
    generator = torch.Generator(task.device).manual_seed(task.seed)
    parts, largest = [], 0.0
    with task.bar(entry.name, len(task.labels)) as bar:
        for x, y in task.batches():
            correct = torch.ones_like(y, dtype=torch.bool)
            for _ in range(entry.num_restarts):
                # For the whole batch, whatever is left of it: later batches must not depend on this one's success.
                start = _start(task, x, generator)
                # Only what has withstood every start so far is attacked again: an image counts once, at its worst.
                rows = correct.nonzero().squeeze(1)
                if len(rows):
                    points = _pgd(task, x[rows], y[rows], start[rows], entry.num_steps)
                    largest = max(largest, furthest(points, x[rows], task.budget))
                    correct[rows] = _correct(task, points, y[rows])
            parts.append(correct.cpu())
            bar.update()
            bar.set_postfix_str(f"robust {share(torch.cat(parts)):.2%}")
    return torch.cat(parts), largest


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


def data_hash(data: Any, limit: int | None = None) -> str:
    """Return what `evaluate` records of the images and labels it looks at, as `data_sha256`."""
    images, labels = collect(data, limit=limit)
    return tensors_hash({"images": images, "labels": labels})


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
