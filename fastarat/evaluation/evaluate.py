"""Measuring a network under a list of attacks, in turn, and comparing what they found."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastarat.checks import input_channels, logits_of
from fastarat.device import enough_memory, pick_device
from fastarat.distributed import World
from fastarat.errors import UserError
from fastarat.evaluation import corruptions
from fastarat.evaluation.alarms import doubts, probed, square_took
from fastarat.evaluation.autoattack import AutoAttackRun, find_package, named_version, plan
from fastarat.evaluation.checks import check_data, check_model, check_network, furthest
from fastarat.evaluation.crafted import (
    Outcome,
    clean_outcome,
    generator_of,
    measure_curves,
    perturb,
    pgd_outcome,
    start_of,
)
from fastarat.evaluation.result import Evaluation
from fastarat.evaluation.search import SEARCH, fast_members
from fastarat.evaluation.task import Entry, Task, collect, device_of, parse_attacks, share
from fastarat.files import tensors_hash
from fastarat.specs import known
from fastarat.values import EPSILON, Budget, Norm, checked_budget, checked_seed, coerce, whole

LARGEST_CONFUSION = 100
"""Classes up to which confusion matrices are kept."""


class _Asked(NamedTuple):
    """What `evaluate` was asked for besides the attacks and the task."""

    limit: int | None
    state_dir: str | Path | None
    source: nn.Module | None
    curves: bool
    alarms: bool
    confirm: bool
    prepared: Path | None
    rows: Tensor | None


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
    source: nn.Module | None = None,
    curves: bool = False,
    corruptions_dir: str | Path | None = None,
    alarms: bool = True,
    confirm: bool = True,
    world: World | None = None,
) -> Evaluation:
    """Measure the accuracy of `model` under each attack of a comma-separated list.

    The model comes back as it was: mode of every module, requires_grad, BN branch, device; no global random generator
    has moved. A PGD image counts as robust when the last point of every restart is classified correctly; an AutoAttack
    image when it is correct without perturbation and after every member.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] -> logits float32 [B, K]; it normalises inside.
        data: a `Split`, (images float32 [N, C, H, W] in [0, 1], labels int64 [N]), or what `data.as_split` takes.
        attack: entries `clean`, `pgd-N` (N steps from a uniform start), `pgd-N-R` (R restarts), `cw-N` and `cw-N-R` (on
            the margin), `autoattack` (standard version), or one member of it: `apgd-ce`, `apgd-t`, `fab-t`, `square`;
            `transfer` (PGD-20 on `source`), `worst` (images that withstand every attack of the list), `corruptions`
            (mean over 15 kinds and 5 severities, no attack).
        epsilon: radius in pixel units, 1.0 the full range.
        step_size: of PGD; default epsilon / 4. limit: number of images, at even distances through the set.
        batch_size: images per forward; with the seed it fixes AutoAttack's random numbers.
        device: where to evaluate: a device, its name, or "auto"; default: where the model is. branch: of a split model.
        state_dir: AutoAttack saves its state here after every batch, and a later call with the same weights, data and
            settings continues from it.
        progress: show one line per attack. tf32: allow TensorFloat-32 (faster on CUDA; settings record it).
        source: for `transfer`, the network that the images are crafted on, in its branch `adv`.
        curves: also measure accuracy along epsilon and along PGD steps (`Evaluation.curves`): 260 steps an image.
        corruptions_dir: prepared files of the whole test set, as CIFAR-10-C has them; default: made here.
        alarms: where PGD is the strongest attack of the list, try FGSM and CW-PGD-10 on some images that withstood it,
            for at most 8 % of its steps (but 128 images), and warn of masked gradients.
        confirm: `autoattack-fast` attacks what its searches leave in float32, too; False labels it unconfirmed.
        world: processes that share the work (`fastarat.distributed.joined`): all make this very call, and get the same
            result, which is that of one process.
    Raises: UserError for an unknown attack, a budget outside (0, 1], images outside [0, 1], labels outside [0, K), and
        a model that does not return finite float32 logits; all before the first attack.
    """
    entries = _entries(attack, source, corruptions_dir)
    budget, flags = checked_budget(epsilon, step_size, norm), _flags(curves=curves, alarms=alarms, confirm=confirm)
    task = _task(model, data, limit, budget, entries, batch_size, seed, branch, tf32, device, progress, source, world)
    prepared, rows = _prepared(task, entries, corruptions_dir, limit)
    with task.lent(), enough_memory(batch_size):
        return _measured(task, entries, _Asked(limit, state_dir, source, prepared=prepared, rows=rows, **flags))


def _entries(attack: str, source: nn.Module | None, corruptions_dir: str | Path | None) -> list[Entry]:
    """Parse the list, and refuse what is asked for without its other half."""
    entries = parse_attacks(attack)
    names = {e.name for e in entries}
    if ("transfer" in names) != (source is not None):
        raise UserError("the attack transfer and the network to craft on (source=, --from RUN) go together: name both")
    if corruptions_dir is not None and "corruptions" not in names:
        raise UserError("corruptions_dir is read by the attack corruptions: name that in the list")
    return entries


def _flags(**given: bool) -> dict[str, bool]:
    return {name: coerce(value, bool, name) for name, value in given.items()}


def _task(
    model: nn.Module,
    data: Any,
    limit: int | None,
    budget: Budget,
    entries: list[Entry],
    batch_size: int,
    seed: int,
    branch: str,
    tf32: bool,
    device: torch.device | str | None,
    progress: bool,
    source: nn.Module | None,
    world: World | None,
) -> Task:
    """Check the arguments of `evaluate` and collect its images."""
    batch_size, seed = whole("batch_size", batch_size), checked_seed(seed)
    progress, tf32 = coerce(progress, bool, "progress"), coerce(tf32, bool, "tf32")
    for network in (model, *([] if source is None else [source])):
        check_network(network)
    # An hour of PGD should not end in the news that a package is missing.
    if any(e.members for e in entries):
        find_package()
    device = device_of(model) if device is None else pick_device(device)
    images, labels = collect(data, limit=limit, batch_size=batch_size, channels=input_channels(model))
    check_data(model, images, labels)
    budget = checked_budget(*budget, shape=images.shape)
    task = Task(model, images, labels, budget, batch_size, seed, branch, tf32, device, progress)
    return task if world is None else _shared(task, world)


def _shared(task: Task, world: World) -> Task:
    """Return the task for one of several processes; the first shows its progress for all."""
    batches = -(-len(task.labels) // task.batch_size)
    if batches < world.size:
        task.found.append(
            f"{len(task.labels):,} images in batches of {task.batch_size} are {batches} batch(es) for {world.size} "
            "processes, some of which had nothing to do: a smaller batch_size is faster"
        )
    return replace(task, world=world, progress=task.progress and world.first_one)


def _prepared(
    task: Task, entries: list[Entry], folder: str | Path | None, limit: int | None
) -> tuple[Path | None, Tensor | None]:
    """Check that corruptions can be made of the images, or read, where they are asked for."""
    if not any(e.name == "corruptions" for e in entries):
        return None, None
    corruptions.check_shape(task.images)
    return (None, None) if folder is None else corruptions.check_prepared(folder, task.images, task.labels, limit)


def _measured(task: Task, entries: list[Entry], asked: _Asked) -> Evaluation:
    """Check the model, then run the attacks in turn, and compare them."""
    num_classes = check_model(task, needs_gradient=any(e.needs_gradient for e in entries) or asked.curves)
    source = None if asked.source is None else _lent_source(task, asked.source, num_classes)
    plans = {e.name: plan(e, num_classes, task.found) for e in entries if e.members}
    result = Evaluation({}, len(task.labels), _settings(task, entries, plans, num_classes, asked))
    _check_same(task.world, result.settings)
    began = time.perf_counter()
    # Whatever was asked for: AutoAttack attacks what is correct so far, and `doubts` compares with clean accuracy.
    clean = clean_outcome(task)
    clean_wall_s, outcomes = time.perf_counter() - began, {}
    for entry in entries:
        name, began = entry.name, time.perf_counter()
        if name == "worst":  # of all the others, whose order does not matter
            continue
        if name == "corruptions":
            _corrupt(task, asked, result)
            result.wall_s[name] = time.perf_counter() - began
            continue
        if name == "clean":
            outcome, seconds = clean, clean_wall_s
        elif name == "transfer":
            outcome, seconds = _transferred(task, entry, known(source)), time.perf_counter() - began
        elif entry.num_steps:
            outcome, seconds = pgd_outcome(task, entry), time.perf_counter() - began
        else:
            outcome, seconds = _autoattack(task, entry, plans[name], num_classes, clean.robust, result, asked)
        result.wall_s[name] = seconds
        if name != "clean":
            result.max_perturbation[name] = outcome.largest
        outcomes[name] = outcome
    result = _counted(task, entries, outcomes, clean, result, num_classes)
    if asked.curves:
        began = time.perf_counter()
        result.curves.update(measure_curves(task, clean.robust))
        result.wall_s["curves"] = time.perf_counter() - began
    notes = doubts(
        entries, result.accuracy, result.autoattack, share(clean.robust), num_images=len(task.labels),
        probe=probed(task, entries, outcomes) if asked.alarms else None, curves=result.curves,
    )  # fmt: skip
    told = task.world.gather((task.found, result.wall_s))
    # The same doubt may come up at every batch, and on every rank; a dict keeps the order, a set would not.
    warnings = tuple(dict.fromkeys([*itertools.chain(*(found for found, _ in told)), *notes]))
    return replace(result, warnings=warnings, wall_s=told[0][1])


def _check_same(world: World, settings: dict[str, Any]) -> None:
    """Raise UserError, on all ranks, where they were not asked for the same."""
    world.same("weights", settings["weights_sha256"], "load one checkpoint on all of them")
    world.same("images", settings["data_sha256"], "give all of them the whole set: batches are dealt to them here")
    for key, value in settings.items():
        if key not in ("weights_sha256", "data_sha256", "device"):
            world.same(f"settings of the evaluation ({key})", value, "make the same call on all of them")


def _settings(
    task: Task, entries: list[Entry], plans: dict[str, tuple[str, ...]], num_classes: int, asked: _Asked
) -> dict[str, Any]:
    """Everything the numbers depend on."""
    found = {
        "attacks": {e.name: e.key for e in entries},
        **task.budget._asdict(),
        "weights_sha256": _weights_hash(task.model),
        "data_sha256": tensors_hash({"images": task.images, "labels": task.labels}),
        "limit": asked.limit,
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
    if task.world.size > 1:
        found["processes"] = task.world.size
    if "autoattack-fast" in plans:
        found["confirmed"] = {"autoattack-fast": asked.confirm}
    if asked.source is not None:
        found["from"] = _weights_hash(asked.source)
    if any(e.name == "corruptions" for e in entries):
        found["corruptions_dir"] = None if asked.prepared is None else str(asked.prepared)
    return found


def _weights_hash(model: nn.Module) -> str:
    return tensors_hash(dict(sorted(model.state_dict().items())))


def _autoattack(
    task: Task,
    entry: Entry,
    members: tuple[str, ...],
    num_classes: int,
    correct: Tensor,
    result: Evaluation,
    asked: _Asked,
) -> tuple[Outcome, float]:
    """Run AutoAttack, or a member; what each member left goes into `result`. Returns the outcome and its seconds."""
    fast = entry.name == "autoattack-fast"
    if fast:
        members = fast_members(members, confirm=asked.confirm)
        if not asked.confirm:
            task.found.append(
                "autoattack-fast is unconfirmed: the standard version in float32 did not attack what its searches left"
            )
    run = AutoAttackRun(task, entry.name, members, num_classes, correct.clone())
    if asked.state_dir is not None:
        run.remember(Path(asked.state_dir))
    run.play()
    if entry.name == "autoattack":
        result.autoattack.update({"clean": share(correct)} | {m: d["accuracy"] for m, d in run.done.items()})
    if fast:
        task.found.extend(square_took({m.removeprefix(SEARCH): d["accuracy"] for m, d in run.done.items()}))
    if fast or entry.name == "autoattack":
        result.wall_s.update({f"{entry.name}/{m}": d["wall_s"] for m, d in run.done.items()})
    furthest = max(d["max_perturbation"] for d in run.done.values())
    return Outcome(run.robust, None, furthest), sum(d["wall_s"] for d in run.done.values())


def _lent_source(task: Task, source: nn.Module, num_classes: int) -> Task:
    """Return the task of crafting on `source`, which must take these images and have these classes."""
    channels = input_channels(source)
    if channels not in (None, task.images.shape[1]):
        raise UserError(f"the network to craft on takes {channels} channel(s), the images have {task.images.shape[1]}")
    crafting = replace(task, model=source, branch="adv", progress=False, found=[])
    with crafting.lent(), torch.no_grad():
        found = logits_of(crafting.forward, next(task.batches())[0]).shape[1]
    if found != num_classes:
        raise UserError(f"the network to craft on has {found} classes, this one {num_classes}: expected the same")
    return crafting


def _transferred(task: Task, entry: Entry, source: Task) -> Outcome:
    with source.lent():
        return pgd_outcome(task, entry, source)


def _corrupt(task: Task, asked: _Asked, result: Evaluation) -> None:
    by_branch = corruptions.measure(task, asked.prepared, asked.rows)
    result.accuracy["corruption_acc"] = corruptions.mean_accuracy(by_branch[task.branch])
    result.corruptions.update(by_branch.pop(task.branch))
    result.corruptions_by_branch.update(by_branch)


def _counted(
    task: Task, entries: list[Entry], outcomes: dict[str, Outcome], clean: Outcome, result: Evaluation, num_classes: int
) -> Evaluation:
    """Turn outcomes into accuracies, `worst` among them, counts by class and confusion matrices."""
    labels, standing = task.labels.cpu(), clean.robust
    for entry in entries:
        if entry.attacks:
            standing = standing & outcomes[entry.name].robust
    outcomes = {**outcomes, "worst": Outcome(standing)}
    per_class, confusion = {}, {}
    # In the order of the list, `worst` and corruptions where they were named.
    accuracy = {e.key: result.accuracy.get(e.key, 0.0) for e in entries}
    for entry in entries:
        if entry.name == "corruptions":
            continue
        outcome = outcomes[entry.name]
        accuracy[entry.key] = share(outcome.robust)
        per_class[entry.key] = torch.bincount(labels[outcome.robust], minlength=num_classes).tolist()
        if outcome.predicted is not None and num_classes <= LARGEST_CONFUSION:
            pairs = labels * num_classes + outcome.predicted
            counts = torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
            confusion[entry.key] = counts.tolist()
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    return replace(result, accuracy=accuracy, per_class=per_class, class_counts=counts, confusion=confusion)


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
        points = perturb(task, x, y, start_of(task, x, generator_of(task)), num_steps)
        furthest(points, x, budget)
    return points.to(images.device)


def data_hash(data: Any, limit: int | None = None) -> str:
    """Return what `evaluate` records of the images and labels it looks at, as `data_sha256`."""
    images, labels = collect(data, limit=limit)
    return tensors_hash({"images": images, "labels": labels})
