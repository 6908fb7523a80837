"""What a report shows of each run: its record as read from the run folder, and its predictions on example images."""

from __future__ import annotations

import shlex
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastarat.config import Config
from fastarat.data import Dataset, Split
from fastarat.errors import UserError
from fastarat.evaluation import adversarial_examples, attack_title, in_pixels
from fastarat.metadata import check_meta
from fastarat.nets.batchnorm import branch
from fastarat.runs import Run, dataset_of, load_network
from fastarat.texts import GIVEN
from fastarat.values import Norm

NUM_STEPS = 20


@dataclass(frozen=True, eq=False)
class Subject:
    """One run as a report sees it.

    label: a short name, unique in the report. metrics: one row per epoch. evaluations: what `fastarat eval` saved, by
    the weights it evaluated. best: epoch of the best checkpoint, the accuracy that chose it (`by`) and its `value`.
    """

    path: Path
    label: str
    metrics: list[dict[str, Any]]
    card: str
    evaluations: dict[str, dict[str, Any]]
    model: nn.Module | None
    meta: dict[str, Any]
    config: Config
    best: dict[str, Any] | None

    @property
    def budget(self) -> str:
        return budget_of(self.meta)

    @property
    def terms(self) -> list[str]:
        """Metrics of the loss's terms when there are several; a single term is the loss."""
        known = ("train/loss", "train/clean_acc", "train/robust_acc")
        keys = dict.fromkeys(
            key for row in self.metrics for key in row if key.startswith("train/") and key not in known
        )
        return list(keys) if len(keys) > 1 else []

    @property
    def robust_key(self) -> str | None:
        """The metric that holds robust accuracy on validation images."""
        return next((key for row in self.metrics for key in row if key.startswith("val/robust_acc")), None)


class Examples(NamedTuple):
    """The same images without and with a perturbation, and what a run's model says of them.

    clean, adversarial: float32 [B, C, H, W] in [0, 1], on the CPU. labels, clean_pred, adv_pred: int64 [B].
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    clean_pred: Tensor
    adv_pred: Tensor

    def correct(self) -> tuple[int, int]:
        """Number of correct predictions on the clean and on the adversarial images."""
        return int((self.clean_pred == self.labels).sum()), int((self.adv_pred == self.labels).sum())


def budget_of(settings: dict[str, Any]) -> str:
    """Name the perturbations that `settings` (a run's metadata or an evaluation's) allow: L∞ ε = 8/255."""
    norm = {"linf": "L∞", "l2": "L2"}.get(settings["norm"], settings["norm"])
    return f"{norm} ε = {in_pixels(settings['epsilon'])}"


def title_in(settings: dict[str, Any], key: str) -> str:
    """Name an accuracy as `attack_title` does, and say where AutoAttack's quick search was not confirmed."""
    unsure = settings.get("confirmed", {}).get("autoattack-fast") is False
    return attack_title(key) + " (unconfirmed)" * (unsure and key in ("robust_acc_aa_fast", "robust_acc_worst"))


def conditions(settings: dict[str, Any], *, attacked: bool = True) -> str:
    """What an accuracy was measured under: the budget, where it was attacked, and what is not as usual."""
    branch, data = settings.get("branch", "adv"), settings.get("dataset")
    unusual = [f"branch {branch}"] * (branch != "adv") + [str(settings.get("precision"))] * (
        settings.get("precision") == "tf32"
    )
    return ", ".join([*[budget_of(settings)] * attacked, *unusual, *([f"on {data}"] if data else [])])


def expanded(paths: Sequence[str | Path]) -> list[Path]:
    """Return run folders, each once: those named, and in place of a comparison's folder the runs in it.

    Raises: UserError for a folder of which no run has an epoch yet. Runs of a comparison that have none are left out.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        inside = sorted(config.parent for config in path.glob("*/config.yaml"))
        if (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file() or not inside:
            found.setdefault(path.resolve(), path)
            continue
        begun = [run for run in inside if Run(run).metrics()]
        if not begun:
            raise UserError(f"{path}: none of its {len(inside)} runs has finished an epoch: try again when one has")
        found.update((run.resolve(), run) for run in begun if run.resolve() not in found)
    return list(found.values())


def read(paths: Sequence[Path]) -> list[Subject]:
    """Read run folders to be shown side by side.

    Raises: UserError for a folder that is no run or has no metrics yet, an unreadable evaluation, and runs
        of different data sets, which the grid of examples cannot hold.
    """
    subjects = [_read(path, label) for path, label in zip(paths, labels(paths), strict=True)]
    first = subjects[0]
    for other in subjects[1:]:
        if any(a != b and None not in (a, b) for a, b in zip(_identity(other), _identity(first), strict=True)):
            a, b = _described(first), _described(other)
            raise UserError(
                f"the example grid shows the same test images to every run, but {first.path} was trained on {a} and "
                f"{other.path} on {b if b != a else b + ' with other class names'}: write one report per data set"
            )
    return subjects


def labels(paths: Sequence[Path]) -> list[str]:
    """Name each run by its folder, with as many parents as it takes to tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    found = []
    for own in parts:
        # runs/a/seed0 and runs/b/seed0 become a/seed0 and b/seed0.
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        found.append("/".join(own[-depth:]))
    return found


def _identity(run: Subject) -> tuple:
    return tuple(run.meta.get(key) for key in ("dataset", "classes", "in_channels", "image_size"))


def _described(run: Subject) -> str:
    meta, size = run.meta, run.meta.get("image_size")
    if size is None:
        return meta["dataset"]
    return f"{meta['dataset']} ({meta['num_classes']} classes, {meta['in_channels']}x{size}x{size})"


def _read(path: Path, label: str) -> Subject:
    if not path.is_dir():
        raise UserError(f"{path} is not a run folder: expected one that `fastarat train` wrote")
    run = Run(path)
    metrics = run.metrics()
    if not metrics:
        raise UserError(
            f"{path} has no metrics yet (metrics.jsonl is missing, empty or damaged throughout): expected a run folder "
            f"with one finished epoch or more; `fastarat train --resume {shlex.quote(str(path))}` continues a run"
        )
    model, meta, config = _network(run)
    if config is None:
        raise UserError(f"{path} has no config.yaml: it says which data set the run's images come from")
    card = "(no card.txt in this run folder)"
    if run.card_file.is_file():
        # Words for people: what is damaged in them is shown as such.
        card = run.card_file.read_bytes()[:100_000].decode("utf-8", "replace").rstrip("\n")
    evaluations = run.evaluations()
    for which, found in list(evaluations.items()):
        if why := run.stale(which, found):
            said = f"{run.evaluation(which)} is {why}, and is left out: fastarat eval {path} --weights {which}"
            warnings.warn(said, stacklevel=2)
            del evaluations[which]
    return Subject(path, label, metrics, card, evaluations, model, meta, config, _best(run, metrics))


def _network(run: Run) -> tuple[nn.Module | None, dict[str, Any], Config | None]:
    # `last` is written after the epoch's metrics, or once in several epochs: a running run may have none yet.
    if run.weights().is_file() or run.checkpoint().is_file():
        config, meta = run.read_config(), run.meta()
        check_meta(meta, run.weights())
        if meta["model"].startswith(GIVEN):  # in Python, where it still is
            return None, meta, config
        return load_network(run.path)
    config = run.read_config()
    if config is None:
        return None, {}, None
    attack = config.attack
    return None, {"dataset": config.dataset, "epsilon": attack.epsilon, "norm": attack.norm}, config


def _best(run: Run, metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not run.weights("best").is_file():
        return None
    meta = run.meta("best")
    if "best" in meta:
        return meta["best"]
    # A run from before the rule was kept: PGD chose.
    row = next((row for row in metrics if row["epoch"] == meta["epoch"]), {})
    key = next((key for key in row if key.startswith("val/robust_acc")), None)
    return None if key is None else {"epoch": meta["epoch"], "by": key.removeprefix("val/"), "value": row[key]}


def load_data(run: Subject, data_dir: str | Path | None = None) -> Dataset:
    """Load the data set of a run; `data_dir` None: from where the run found it. Raises: UserError if it changed.

    One that was given in Python comes without images.
    """
    meta = run.meta
    if run.config.dataset.startswith(GIVEN):  # in Python: of it the names of its classes are here
        shape = (meta.get("in_channels", 1), meta.get("image_size", 1), meta.get("image_size", 1))
        none = Split.empty(shape)
        return Dataset(run.config.dataset, tuple(meta.get("classes", ())), shape, none, none, none)
    dataset = dataset_of(run.config, data_dir)
    if "num_classes" not in meta:
        return dataset
    if len(dataset.classes) != meta["num_classes"] or dataset.shape[0] != meta["in_channels"]:
        raise UserError(
            f"{run.path} was trained for {meta['num_classes']} classes and {meta['in_channels']} channel(s), but "
            f"{run.config.dataset} now has {len(dataset.classes)} and {dataset.shape[0]}: the data set changed since"
        )
    return dataset


def first_per_class(split: Split, num_images: int) -> Split:
    """Return the first image of each class, then the second of each, up to `num_images`; classes in order."""
    seen: Counter[int] = Counter()
    ranks = []
    for row, label in enumerate(split.labels.tolist()):
        ranks.append((seen[label], label, row))
        seen[label] += 1
    return split.take(torch.tensor([row for *_, row in sorted(ranks)[:num_images]]))


def predicted(
    model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, norm: Norm, device: torch.device
) -> Examples:
    """Attack `images` with PGD-20 as `evaluate` does, and classify both versions in eval mode with the adv branch.

    images: float32 [B, C, H, W] in [0, 1]. labels: int64 [B]. epsilon: pixel units.
    Returns: Examples. The model is left on the CPU.
    """
    model.to(device).eval()
    adversarial = adversarial_examples(
        model, images, labels, epsilon=epsilon, num_steps=NUM_STEPS, norm=norm, branch="adv"
    )
    # On the CPU float32 is float32: a GPU's TF32 could flip a prediction at the boundary.
    model.cpu()
    with torch.no_grad(), branch(model, "adv"):
        clean_pred, adv_pred = (model(x).argmax(1) for x in (images, adversarial))
    return Examples(images, adversarial, labels, clean_pred, adv_pred)
