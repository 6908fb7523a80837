"""Robust accuracy that can be printed: clean, PGD and the official AutoAttack, with the checks it needs.

Every number is measured in eval mode and float32 with frozen parameters, around the unmodified clean images.
AutoAttack's attacks are those of its authors (`pyautoattack`, or an installed `autoattack`); only the loop
that hands them the still-robust images is ours, so that it can report, save and resume.

Source: Croce and Hein, ICML 2020 (AutoAttack, standard version); Madry et al., ICLR 2018 (PGD).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastarat.attacks import pgd, random_start
from fastarat.checks import (
    Budget,
    Norm,
    check_classes,
    check_images,
    check_labels,
    check_no_probabilities,
    check_pixels,
    checked_budget,
    checked_seed,
    coerce,
    input_channels,
    logits_of,
    shown,
    whole,
)
from fastarat.data import Loader, Split, make_loader
from fastarat.device import pick_device
from fastarat.errors import UserError, unknown
from fastarat.nets.batchnorm import branch as use_branch

Forward = Callable[[Tensor], Tensor]

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
PERTURBATION_TOLERANCE = 1e-6
# Trained robust networks lose 2 to 5 points from PGD-20 to AutoAttack; from 2 on PGD alone misleads.
PGD_GAP = 0.02
SQUARE_GAP = 0.002  # the limit of the official `check_square_sr`


class NonFinite(UserError):
    """The model's logits are NaN or infinite."""


class Attack(NamedTuple):
    """One entry of an attack list: its name, the key of its accuracy, and for PGD its steps and restarts."""

    name: str
    key: str
    num_steps: int = 0
    num_restarts: int = 1

    @property
    def members(self) -> tuple[str, ...]:
        """The AutoAttack members this entry runs, in order; empty for clean and PGD."""
        return STANDARD if self.name == "autoattack" else (self.name,) if self.name in STANDARD else ()


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on how many images, and how.

    accuracy: fractions in [0, 1] by key: clean_acc, robust_acc_pgd20, robust_acc_aa, ...
    autoattack: robust accuracy left after each member of AutoAttack's standard version, in order.
    max_perturbation: by attack name, the largest distance from a clean image, in `settings["norm"]`.
    wall_s: seconds by attack name.
    warnings: what makes a number above less than it seems; empty is good.
    settings: epsilon, step_size, norm, seed, branch, limit, device, versions ...
    """

    accuracy: dict[str, float]
    num_images: int
    settings: dict[str, Any]
    autoattack: dict[str, float] = field(default_factory=dict)
    max_perturbation: dict[str, float] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the evaluation as indented JSON, with the 95 % interval of each accuracy beside it."""
        record = asdict(self)
        record["interval_95"] = {key: wilson(value, self.num_images) for key, value in self.accuracy.items()}
        return json.dumps(record, indent=2)

    def save(self, path: str | Path) -> Path:
        """Write `to_json()` to `path`, whole or not at all. Raises: UserError where it cannot be written."""
        path = Path(path)
        check_writable(path)
        _write_whole(path, self.to_json() + "\n")
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
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        s = self.settings
        lines.append(
            f"{s['norm']} epsilon {_fraction(s['epsilon'])}, PGD step {_fraction(s['step_size'])}, "
            f"branch {s['branch']}, seed {s['seed']}, {s['precision']}, {s['device']}"
        )
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    data: Any,
    attack: str = "clean,pgd-20",
    *,
    epsilon: float = 8 / 255,
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

    The model comes back as it was: mode of every module, requires_grad, BN branch, device; no global random
    generator has moved. A PGD image counts as robust when the last point of every restart is classified
    correctly; an AutoAttack image when it is correct without perturbation and after every member.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] -> logits float32 [B, K]; it normalises inside.
        data: a `fastarat.data.Split`, a loader, or (images float32 [N, C, H, W] in [0, 1], labels int64 [N]).
        attack: entries `clean`, `pgd-N` (N steps from a uniform start), `pgd-N-R` (R restarts), `autoattack`
            (standard version), or one member of it: `apgd-ce`, `apgd-t`, `fab-t`, `square`.
        epsilon: radius in pixel units, 1.0 the full range.
        step_size: of PGD; default epsilon / 4, which is 2/255 for 8/255.
        limit: number of images, at even distances through the set (one stored class by class stays balanced).
        batch_size: images per forward; with the seed it fixes AutoAttack's random numbers.
        device: where to evaluate: a device, its name, or "auto"; default: where the model is.
        branch: BN branch of a split model.
        state_dir: AutoAttack saves its state here after every batch, and a later call with the same weights,
            data and settings continues from it.
        progress: show one line per attack on a terminal.
        tf32: allow TensorFloat-32 in convolutions and matrix products (faster on CUDA; settings record it).
    Returns: Evaluation.
    Raises: UserError for an unknown attack, a budget outside (0, 1], images outside [0, 1], labels outside
        [0, K), and a model that does not return finite float32 logits; all before the first attack.
    """
    attacks = parse_attacks(attack)
    budget = checked_budget(epsilon, step_size, norm)
    batch_size, seed = whole("batch_size", batch_size), checked_seed(seed)
    progress, tf32 = coerce(progress, bool, "progress"), coerce(tf32, bool, "tf32")
    _check_network(model)
    package = _autoattack_package() if any(a.members for a in attacks) else None
    home = _device_of(model)
    device = home if device is None else pick_device(device)
    images, labels = collect(data, limit=limit, batch_size=batch_size, channels=input_channels(model))
    _check_images(model, images, labels)
    budget = checked_budget(*budget, shape=images.shape)

    found: list[str] = []
    accuracy: dict[str, float] = {}
    members: dict[str, float] = {}
    max_perturbation: dict[str, float] = {}
    wall_s: dict[str, float] = {}
    with _prepared(model, device, branch, tf32) as forward:
        needs_gradient = any(a.name not in ("clean", "square") for a in attacks)
        num_classes = _check_model(forward, images, labels, batch_size, device, needs_gradient, found)
        plans = {a.name: _members(a, num_classes, found) for a in attacks if a.members}
        began = time.perf_counter()
        correct = _clean_correct(forward, images, labels, batch_size, device)
        clean_wall_s = time.perf_counter() - began
        for entry in attacks:
            began = time.perf_counter()
            if entry.name == "clean":
                accuracy[entry.key] = _mean(correct)
                wall_s[entry.name] = clean_wall_s
            elif entry.num_steps:
                robust, furthest = _pgd_robust(
                    forward, images, labels, entry, budget, batch_size, seed, device, progress
                )
                accuracy[entry.key] = _mean(robust)
                max_perturbation[entry.name] = furthest
                wall_s[entry.name] = time.perf_counter() - began
            else:
                run = _AutoAttackRun(
                    name=entry.name,
                    members=plans[entry.name],
                    images=images,
                    labels=labels,
                    batch_size=batch_size,
                    device=device,
                    budget=budget,
                    progress=progress,
                )
                if state_dir is not None:
                    run.remember(Path(state_dir), _fingerprint(model, run, seed, branch, tf32, package), found)
                ensemble = _build_autoattack(package, forward, device, budget, seed, num_classes)
                run.play(ensemble, forward, correct, found)
                accuracy[entry.key] = _mean(run.robust)
                max_perturbation[entry.name] = max(d["max_perturbation"] for d in run.done.values())
                wall_s[entry.name] = sum(d["wall_s"] for d in run.done.values())
                if entry.name == "autoattack":
                    members = {"clean": _mean(correct)} | {m: d["accuracy"] for m, d in run.done.items()}
                    wall_s |= {f"{entry.name}/{m}": d["wall_s"] for m, d in run.done.items()}
    found += _doubts(attacks, accuracy, members, _mean(correct))
    settings = {
        "attacks": {a.name: a.key for a in attacks},
        **budget._asdict(),
        "limit": limit,
        "batch_size": batch_size,
        "seed": seed,
        "branch": branch,
        "num_classes": num_classes,
        "autoattack_members": {name: list(plan) for name, plan in plans.items()},
        "precision": "tf32" if tf32 else "float32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "autoattack_package": None if package is None else _version(package),
    }
    return Evaluation(
        accuracy=accuracy,
        num_images=len(labels),
        settings=settings,
        autoattack=members,
        max_perturbation=max_perturbation,
        wall_s=wall_s,
        warnings=tuple(dict.fromkeys(found)),
    )


def adversarial_examples(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 8 / 255,
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
    _check_network(model)
    _check_images(model, images, labels)
    budget = checked_budget(epsilon, step_size, norm, shape=images.shape)
    images = images.detach()
    device = _device_of(model)
    entry = Attack(f"pgd-{num_steps}", "", num_steps)
    with _prepared(model, device, branch, tf32=False) as forward:
        x, y = images.to(device).clone(), labels.to(device)
        _check_model(forward, images, labels, len(images), device, needs_gradient=True, found=[])
        generator = torch.Generator(device).manual_seed(seed)
        points = next(_pgd_points(forward, x, y, entry, budget, generator))[1]
        _furthest(points, x, budget)
    return points.to(images.device)


def parse_attacks(attack: str) -> list[Attack]:
    """Parse a comma-separated attack list into entries, each once.

    Raises: UserError for an unknown name, naming the nearest one, or a step or restart count below 1.
    """
    attack = ",".join(coerce(attack, tuple[str, ...], "attack"))
    entries: dict[str, Attack] = {}
    for name in (part.strip().lower() for part in attack.split(",")):
        family, *counts = name.split("-")
        if name == "clean":
            entry = Attack(name, "clean_acc")
        elif name == "autoattack":
            entry = Attack(name, "robust_acc_aa")
        elif name in STANDARD:
            entry = Attack(name, "robust_acc_" + name.replace("-", "_"))
        elif family == "pgd" and 1 <= len(counts) <= 2 and all(c.isdecimal() for c in counts):
            steps, restarts = int(counts[0]), int(counts[1]) if len(counts) == 2 else 1
            if steps < 1 or restarts < 1:
                raise UserError(f"attack {name!r}: steps and restarts start at 1; write pgd-20 or pgd-20-5")
            suffix = f"_r{restarts}" if restarts > 1 else ""
            entry = Attack(f"pgd-{steps}" + f"-{restarts}" * (restarts > 1), f"robust_acc_pgd{steps}{suffix}",
                           steps, restarts)  # fmt: skip
        else:
            raise unknown("attack", name, ["clean", "pgd-20", "pgd-20-5", "autoattack", *STANDARD])
        entries[entry.name] = entry
    return list(entries.values())


def attack_title(key: str) -> str:
    """Name what an accuracy was measured under: robust_acc_pgd20_r5 -> PGD-20 x5 restarts, clean_acc -> clean."""
    name = key.removeprefix("robust_acc_")
    if found := re.fullmatch(r"pgd(\d+)(?:_r(\d+))?", name):
        return f"PGD-{found[1]}" + (f" x{found[2]} restarts" if found[2] else "")
    titles = {"clean_acc": "clean", "aa": "AutoAttack", "apgd_ce": "APGD-CE", "apgd_t": "APGD-T", "fab_t": "FAB-T"}
    return titles.get(name, name.capitalize())


def collect(
    data: Any, *, limit: int | None = None, batch_size: int = 256, channels: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the images and labels to evaluate, on the CPU, in the order of the split and never augmented.

    Args:
        data: a `fastarat.data.Split`, a loader (whose split is read afresh), or (images, labels) tensors.
        limit: number of images, taken at even distances through the set; None takes all.
        channels: C that the network takes, if known.
    Returns: images float32 [N, C, H, W] in [0, 1], labels int64 [N].
    Raises: UserError for something else, tensors of another type or shape, or limit < 1.
    """
    limit = None if limit is None else whole("limit", limit)
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        check_images(data[0], channels=channels)
        check_labels(data[1], data[0])
        images, labels = (t.detach().cpu() for t in data)
        wanted = _evenly(len(labels), limit)
        return images[wanted].contiguous(), labels[wanted]
    split = data.split if isinstance(data, Loader) else data
    if not isinstance(split, Split):
        raise UserError(
            f"cannot evaluate on a {type(data).__name__}: give a Split (load_dataset(...).test), a loader, or "
            "(images, labels) tensors"
        )
    if len(split) == 0:
        raise UserError("the split holds no images: expected at least 1; give another split or val_images > 0")
    wanted = _evenly(len(split), limit)
    split = replace(
        split,
        images=None if split.images is None else split.images[wanted],
        labels=split.labels[wanted],
        indices=split.indices[wanted],
    )
    batches = make_loader(split, batch_size=batch_size, device="cpu").epoch(0)
    return torch.cat([b.images.contiguous() for b in batches]), split.labels


def wilson(share: float, num_images: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share observed on `num_images` images.

    Worked value: 0.5 of 100 images gives (0.4038, 0.5962). Source: Wilson, JASA 1927.
    """
    z = 1.959964
    centre = share + z * z / (2 * num_images)
    half = z * math.sqrt(share * (1 - share) / num_images + (z / (2 * num_images)) ** 2)
    scale = 1 + z * z / num_images
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


# The frozen model


@contextmanager
def _prepared(model: nn.Module, device: torch.device, branch: str, tf32: bool) -> Iterator[Forward]:
    """Lend the model in eval mode, frozen, float32, on `device` and `branch`, and give it back as it was."""
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_floating_point() and p.dtype != torch.float32:
            raise UserError(f"{name} is {p.dtype}: evaluation is in float32; call model.float() before evaluating")
    home = _device_of(model)
    modes = [(m, m.training) for m in model.modules()]
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    rng_devices = [device] if device.type == "cuda" else []
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.random.fork_rng(devices=rng_devices))
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(_precision(tf32))
            stack.enter_context(use_branch(model, branch))
            if device != home:
                model.to(device)
            model.eval()
            for p, _ in frozen:
                p.requires_grad_(False)
            channels_last = any(
                p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
                for p, _ in frozen
            )

            def forward(images: Tensor) -> Tensor:
                # AutoAttack flattens with view(), so the images it holds are never channels-last.
                return model(images.contiguous(memory_format=torch.channels_last) if channels_last else images)

            yield forward
    finally:
        for m, training in modes:
            m.training = training
        for p, requires_grad in frozen:
            p.requires_grad_(requires_grad)
        if device != home:
            model.to(home)


@contextmanager
def _precision(tf32: bool) -> Iterator[None]:
    """Fix the precision of float32 convolutions and matrix products, and restore the caller's."""
    b = torch.backends
    switches = [b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv]
    wanted = ["tf32", "tf32", "ieee", "ieee"] if tf32 else ["ieee"] * 4
    before = [s.fp32_precision for s in switches]
    try:
        for s, value in zip(switches, wanted, strict=True):
            s.fp32_precision = value
        yield
    finally:
        for s, value in zip(switches, before, strict=True):
            s.fp32_precision = value


def _device_of(model: nn.Module) -> torch.device:
    first = next((t for t in [*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if first is None else first.device


# Checks


def _check_network(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"model={shown(model)}: expected an nn.Module, images [B, C, H, W] -> logits [B, K]")


def _check_images(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    check_images(images, channels=input_channels(model))
    check_labels(labels, images)
    check_pixels(images)


def _check_model(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    device: torch.device,
    needs_gradient: bool,
    found: list[str],
) -> int:
    """Refuse a model that cannot be evaluated, note what makes it doubtful, return the number of classes."""
    x, y = images[:batch_size].to(device), labels[:batch_size].to(device)
    with torch.no_grad():
        logits = logits_of(forward, x)
        _check_logits(logits)
        check_no_probabilities(logits)
        again = forward(x)
        moved = ((again - logits).norm(dim=1) / (logits.norm(dim=1) + 1e-10)).max().item()
    if moved > 1e-4:  # the limit of the official `check_randomized`
        found.append(
            f"two forwards on the same images differ by {moved:.2g} (relative): the model is randomised, "
            "and these attacks do not average over its randomness"
        )
    num_classes = logits.shape[1]
    check_classes(labels, num_classes)
    if needs_gradient:
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            logits = forward(x)
            if not logits.requires_grad:
                raise UserError(
                    "the logits do not depend on the images through autograd: gradient attacks cannot work; "
                    "remove detach(), no_grad() or quantisation from the model's forward"
                )
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x, allow_unused=True)
        zero = len(x) if grad is None else int((grad.flatten(1).abs().amax(1) == 0).sum())
        if zero:
            found.append(
                f"zero input gradient on {zero / len(x):.1%} of the first {len(x)} images: gradient attacks "
                "stand still there, so their robust accuracy is an overestimate"
            )
    return num_classes


def _check_logits(logits: Tensor) -> None:
    if logits.dtype != torch.float32:
        raise UserError(f"the model returned {logits.dtype}: expected float32 logits; turn off autocast in its forward")
    if not bool(logits.isfinite().all()):
        raise NonFinite("the model returned NaN or infinite logits: expected finite ones; check the checkpoint")


def _furthest(points: Tensor, images: Tensor, budget: Budget) -> float:
    """Return the largest distance between rows, asserting that budget and pixel range are kept."""
    delta = (points - images).flatten(1)
    if budget.norm == "linf":
        distance, slack = delta.abs().amax().item(), PERTURBATION_TOLERANCE
    else:
        # Both our projection and the official one take a float32 norm over C*H*W terms.
        distance, slack = (
            delta.double().norm(dim=1).max().item(),
            PERTURBATION_TOLERANCE + 1e-5 * budget.epsilon,
        )
    low, high = (v.item() for v in points.aminmax())
    if math.isnan(low):
        raise NonFinite("the model's input gradient is NaN: expected a finite one; check the checkpoint")
    assert distance <= budget.epsilon + slack, f"perturbation {distance} exceeds epsilon {budget.epsilon}"
    assert -1e-6 <= low <= high <= 1 + 1e-6, f"adversarial images span [{low}, {high}]"
    return distance


def _doubts(attacks: list[Attack], accuracy: dict, members: dict, clean: float) -> list[str]:
    """Return the notes that compare attacks with each other."""
    notes = []
    weakest = {a.name: accuracy[a.key] for a in attacks if a.num_steps}
    for name, value in weakest.items():
        if value > clean:
            notes.append(f"accuracy under {name} ({value:.2%}) is above clean accuracy ({clean:.2%}): masked gradients")
    if weakest and "robust_acc_aa" in accuracy:
        name, value = min(weakest.items(), key=lambda item: item[1])
        gap = value - accuracy["robust_acc_aa"]
        if gap > PGD_GAP:
            notes.append(
                f"AutoAttack is {100 * gap:.1f} points below {name}: report AutoAttack; beyond about 5 "
                "points the defense probably masks gradients"
            )
    if "square" in members:
        before = min(v for k, v in members.items() if k != "square")
        if before - members["square"] > SQUARE_GAP:
            notes.append(
                f"Square, which sees no gradient, took {100 * (before - members['square']):.1f} points more: "
                "masked gradients, and AutoAttack itself may be an overestimate"
            )
    return notes


# Clean and PGD


def _clean_correct(forward: Forward, images: Tensor, labels: Tensor, batch_size: int, device: torch.device) -> Tensor:
    parts = []
    with torch.no_grad():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = forward(x.to(device))
            _check_logits(logits)
            parts.append((logits.argmax(1) == y.to(device)).cpu())
    return torch.cat(parts)


def _pgd_robust(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    entry: Attack,
    budget: Budget,
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: bool,
) -> tuple[Tensor, float]:
    """Return bool [N], correct under every restart, and the largest perturbation."""
    generator = torch.Generator(device).manual_seed(seed)
    parts, furthest, robust = [], 0.0, 0
    bar = _bar(entry.name, math.ceil(len(labels) / batch_size), progress)
    with bar:
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x, y = x.to(device), y.to(device)
            correct = torch.ones_like(y, dtype=torch.bool)
            for rows, points in _pgd_points(forward, x, y, entry, budget, generator, correct):
                furthest = max(furthest, _furthest(points, x[rows], budget))
                with torch.no_grad():
                    logits = forward(points)
                    _check_logits(logits)
                    correct[rows] = logits.argmax(1) == y[rows]
            parts.append(correct.cpu())
            robust += int(correct.sum())
            bar.update()
            bar.set_postfix_str(f"robust {robust / sum(map(len, parts)):.2%}")
    return torch.cat(parts), furthest


def _pgd_points(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    entry: Attack,
    budget: Budget,
    generator: torch.Generator,
    correct: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, points) for each restart; the rows are those `correct` still holds when it begins."""
    for _ in range(entry.num_restarts):
        start = random_start(images, epsilon=budget.epsilon, kind="uniform", norm=budget.norm, generator=generator)
        rows = torch.arange(len(labels), device=labels.device) if correct is None else correct.nonzero().squeeze(1)
        if not len(rows):
            continue  # the start was drawn all the same: later batches must not depend on this one's success
        x, y = images[rows], labels[rows]
        points = pgd(forward, x, y, y, start[rows], num_steps=entry.num_steps, **budget._asdict()).images
        yield rows, points


# AutoAttack


@dataclass
class _AutoAttackRun:
    """The official evaluation loop, cut into batches that can be saved and continued.

    Each member attacks only the images that are still robust when it begins, in batches of `batch_size`, and
    seeds itself again for each batch, exactly as in `AutoAttack.run_standard_evaluation`.
    """

    name: str
    members: tuple[str, ...]
    images: Tensor
    labels: Tensor
    batch_size: int
    device: torch.device
    budget: Budget
    progress: bool
    robust: Tensor | None = None
    # Images the current member has still to attack; None before it begins.
    pending: list[int] | None = None
    done: dict[str, dict[str, float]] = field(default_factory=dict)
    partial: dict[str, float] = field(default_factory=dict)
    path: Path | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def play(self, ensemble: Any, forward: Forward, correct: Tensor, found: list[str]) -> None:
        """Run what is left to run; `correct` are the images classified correctly without perturbation."""
        if self.robust is None:
            self.robust = correct.clone()
        # Survivors come in every batch size: cuDNN would time all its algorithms again for each of them.
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            with _heard(found), torch.no_grad():
                for member in self.members:
                    if member not in self.done:
                        self._play_one(member, _perturb(ensemble, member), forward)
        finally:
            torch.backends.cudnn.benchmark = benchmark

    def _play_one(self, member: str, perturb: Callable, forward: Forward) -> None:
        if self.pending is None:
            self.pending = self.robust.nonzero().squeeze(1).tolist()
            self.partial = {"wall_s": 0.0, "max_perturbation": 0.0}
        title = member if len(self.members) == 1 else f"{self.name} {member}"
        with _bar(title, math.ceil(len(self.pending) / self.batch_size), self.progress) as bar:
            bar.set_postfix_str(f"robust {_mean(self.robust):.2%}")
            while self.pending:
                began = time.perf_counter()
                rows = torch.tensor(self.pending[: self.batch_size])
                x, y = self.images[rows].to(self.device), self.labels[rows].to(self.device)
                points = perturb(x.clone(), y.clone())
                furthest = _furthest(points, x, self.budget)
                self.robust[rows] = (forward(points).argmax(1) == y).cpu()
                self.pending = self.pending[self.batch_size :]
                self.partial["wall_s"] += time.perf_counter() - began
                self.partial["max_perturbation"] = max(self.partial["max_perturbation"], furthest)
                self._save()
                bar.update()
                bar.set_postfix_str(f"robust {_mean(self.robust):.2%}")
        self.done[member] = {"accuracy": _mean(self.robust), **self.partial}
        self.pending = None
        self._save()

    def remember(self, folder: Path, fingerprint: dict[str, Any], found: list[str]) -> None:
        """Keep the state in `folder`; continue the one there of the same weights, data and settings."""
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.fingerprint = folder / f"{self.name}-{digest}.json", fingerprint
        for other in sorted(folder.glob(f"{self.name}-*.json")):
            if other != self.path:
                found += _passed_over(other, fingerprint)
        if not self.path.exists():
            return
        state = _read_state(self.path)
        if state["fingerprint"] != fingerprint or len(state["robust"]) != len(self.labels):
            raise UserError(f"{self.path} does not belong to this evaluation: delete it, or choose another state_dir")
        self.robust = torch.tensor([flag == "1" for flag in state["robust"]])
        self.pending, self.done, self.partial = state["pending"], state["done"], state["partial"]

    def _save(self) -> None:
        if self.path is None:
            return
        state = {
            "fingerprint": self.fingerprint,
            "robust": "".join("01"[flag] for flag in self.robust.tolist()),
            "pending": self.pending,
            "done": self.done,
            "partial": self.partial,
        }
        _write_whole(self.path, json.dumps(state))


def _members(entry: Attack, num_classes: int, found: list[str]) -> tuple[str, ...]:
    """Return the members that exist for this number of classes; the targeted DLR loss needs four logits."""
    if "apgd-t" not in entry.members or num_classes >= 4:
        return entry.members
    if entry.name == "apgd-t":
        raise UserError(f"apgd-t needs at least 4 classes, the model has {num_classes}: use apgd-ce, fab-t and square")
    if num_classes == 3:
        found.append(
            "AutoAttack on 3 classes: the targeted DLR loss needs 4, so apgd-t was replaced by apgd-dlr "
            "(untargeted); this is not the standard version"
        )
        return tuple("apgd-dlr" if m == "apgd-t" else m for m in entry.members)
    found.append(
        f"AutoAttack on {num_classes} classes: the DLR loss needs 3, so apgd-t was left out; this is not the "
        "standard version"
    )
    return tuple(m for m in entry.members if m != "apgd-t")


def _autoattack_package() -> ModuleType:
    for name in ("pyautoattack", "autoattack"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise UserError("AutoAttack is not installed: run pip install pyautoattack")


def _version(package: ModuleType) -> str:
    try:
        return f"{package.__name__} {metadata.version(package.__name__)}"
    except metadata.PackageNotFoundError:
        return f"{package.__name__} {getattr(package, '__version__', 'of unknown version')}"


def _build_autoattack(
    package: ModuleType, forward: Forward, device: torch.device, budget: Budget, seed: int, num_classes: int
) -> Any:
    """Return the official standard ensemble with everything its defaults would guess stated."""
    silent = {"verbose": False} if package.__name__ == "autoattack" else {}
    ensemble = package.AutoAttack(
        forward,
        norm={"linf": "Linf", "l2": "L2"}[budget.norm],
        eps=budget.epsilon,
        seed=seed,
        version="standard",
        device=str(device),
        **silent,
    )
    ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = min(9, num_classes - 1)
    return ensemble


def _perturb(ensemble: Any, member: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return attack `member` of the ensemble, set as the official loop does; each call seeds itself."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        if member in ("apgd-ce", "apgd-dlr"):
            attack = ensemble.apgd
            attack.loss = member.removeprefix("apgd-")
        elif member == "apgd-t":
            attack = ensemble.apgd_targeted
        elif member == "fab-t":
            attack = ensemble.fab
            attack.targeted, attack.n_restarts = True, 1
        else:
            attack = ensemble.square
        return attack.perturb(x, y).detach()

    return call


@contextmanager
def _heard(found: list[str]) -> Iterator[None]:
    """Collect what AutoAttack's own checks log, each sentence once, instead of printing it per batch."""
    zero_gradients = "AutoAttack met points with a zero gradient: its gradient attacks stand still there"

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            found.append(zero_gradients if "zero gradient" in text else f"AutoAttack: {text}")

    logger = logging.getLogger("auto-attack")
    handler, propagate = Collect(logging.WARNING), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _fingerprint(
    model: nn.Module, run: _AutoAttackRun, seed: int, branch: str, tf32: bool, package: ModuleType
) -> dict[str, Any]:
    """Return everything the numbers of an AutoAttack run depend on."""
    return {
        "weights": _digest(model.state_dict()),
        "data": _digest({"images": run.images, "labels": run.labels}),
        "members": list(run.members),
        "epsilon": run.budget.epsilon,
        "norm": run.budget.norm,
        "seed": seed,
        "batch_size": run.batch_size,
        "branch": branch,
        "tf32": tf32,
        "package": _version(package),
    }


def _digest(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
        if not {"fingerprint", "robust", "pending", "done", "partial"} <= state.keys():
            raise ValueError("keys are missing")
    except (ValueError, AttributeError) as error:
        raise UserError(f"cannot read the AutoAttack state {path} ({error}): delete it to start again") from error
    return state


def _passed_over(path: Path, fingerprint: dict[str, Any]) -> list[str]:
    """Say that an unfinished state of other weights, data or settings is not continued."""
    try:
        state = _read_state(path)
    except UserError:
        return []
    theirs = state["fingerprint"]
    if set(theirs.get("members", ())) <= set(state["done"]):
        return []
    other = ", ".join(key for key in fingerprint if theirs.get(key) != fingerprint[key])
    return [f"{path.name} holds an unfinished AutoAttack run with other {other}: it was not continued"]


def check_writable(path: Path) -> None:
    """Make the folder of `path`; raise UserError when a file cannot be written there. Nothing else changes."""
    part = _part(path)
    try:
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _write_whole(path: Path, text: str) -> None:
    part = _part(path)
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; make room or choose another place")


def _bar(title: str, batches: int, progress: bool) -> tqdm:
    # None: shown on a terminal, silent in a log file.
    return tqdm(total=batches, desc=title, unit="batch", leave=False, disable=None if progress else True)


def _evenly(count: int, limit: int | None) -> Tensor:
    return torch.arange(count) if limit is None or limit >= count else torch.arange(limit) * count // limit


def _mean(flags: Tensor) -> float:
    return int(flags.sum()) / len(flags)


def _fraction(value: float) -> str:
    """Return 0.031372 as `8/255`, and other values as they are."""
    scaled = value * 255
    return f"{round(scaled)}/255" if abs(scaled - round(scaled)) < 1e-6 and scaled >= 0.5 else f"{value:g}"
