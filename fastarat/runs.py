"""The run folder: its files by name, how they are written and read, and the networks that lie in it."""

from __future__ import annotations

import json
import os
import shlex
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fastarat.config import Config, defense_key, from_dict, read_yaml, to_dict
from fastarat.data import Dataset, load_dataset
from fastarat.defenses import Defense
from fastarat.errors import UserError
from fastarat.evaluation import check_record
from fastarat.files import (
    FORMAT,
    append_text,
    load_checkpoint,
    load_into,
    load_weights,
    make_writable,
    parse_json,
    save_tensors,
    save_weights,
    seal,
    write_text,
)
from fastarat.locks import LOCK_FILES
from fastarat.metadata import check_meta
from fastarat.nets.batchnorm import split_batchnorm
from fastarat.nets.own import Given, check_named, network

WEIGHTS = ("last", "best", "swa", "ema")
"""What a run may leave weights of: the last epoch, the best one on validation images, two averages."""
MAY_DIFFER = (
    "device", "threads", "data_dir", "loader", "log_every", "checkpoint_every", "tensorboard", "loggers",
    "diagnostics", "out",
)  # fmt: skip
"""Settings that leave a run the same run: they may change when it is resumed, or looked for by `compare`."""


class Run:
    """A run folder; making one of these reads and writes nothing.

    `which` is one of WEIGHTS throughout.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.card_file = self.path / "card.txt"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard_dir = self.path / "tensorboard"
        self.state_dir = self.path / "eval"
        """Where AutoAttack keeps the batches it has finished."""
        self.last_is_whole = False
        """Whether last.pt was written, or read as a whole, through this object."""

    @classmethod
    def holding(cls, path: str | Path) -> Run:
        """Return the run folder that `path` is, or that a checkpoint lies in."""
        path = Path(path)
        return cls(path if path.is_dir() else path.parent)

    @classmethod
    def check_new(cls, path: str | Path) -> Run:
        """Return the run that may be made at `path`. Raises: UserError when it exists: nothing is overwritten."""
        run = cls(path)
        if run.path.exists() and (not run.path.is_dir() or any(map(_is_content, run.path.iterdir()))):
            raise UserError(
                f"run folder {run.path} exists already: continue it with --resume {run.path}, or choose another --out"
            )
        return run

    @classmethod
    def create(cls, path: str | Path) -> Run:
        """Make the folder. Raises: UserError when it exists or cannot be written."""
        run = cls.check_new(path)
        make_writable(run.path)
        run._clear()
        return run

    @classmethod
    def resume(cls, path: str | Path) -> Run:
        """Open a folder to go on in it. Raises: UserError when it holds no run or cannot be written."""
        run = cls(path)
        run.must_exist()
        make_writable(run.path)
        run._clear()
        return run

    def _clear(self) -> None:
        for left in self.path.glob(".*.partial"):  # what a kill left half written
            left.unlink(missing_ok=True)

    def must_exist(self) -> None:
        """Raise UserError where there is nothing to resume."""
        if not (self.config_file.is_file() or self.checkpoint().is_file()):
            raise UserError(f"nothing to resume in {self.path}: it holds no config.yaml and no last.pt")

    def weights(self, which: str = "last") -> Path:
        return self.path / f"{which}.safetensors"

    def checkpoint(self, which: str = "last") -> Path:
        return self.path / f"{which}.pt"

    def evaluation(self, which: str = "last") -> Path:
        """What `fastarat eval` found."""
        return self.path / ("eval.json" if which == "last" else f"eval-{which}.json")

    def compared(self, which: str = "last") -> Path:
        """What `compare` found: a file of its own, since `fastarat eval` may look at another budget."""
        return self.path / f"compare-{which}.json"

    def save(self, which: str, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write NAME.safetensors (weights) and NAME.pt (everything), each whole or not at all, weights first."""
        # Weights first: a kill in between leaves the older .pt, from which a resumed run makes these same weights
        # again.
        self.save_weights(which, state["step"]["model"], {**meta, "epoch": state["epoch"]})
        if which == "last":
            self._keep_previous()
        save_tensors(self.checkpoint(which), {"format": FORMAT, "meta": meta, **state})
        self.last_is_whole |= which == "last"

    def save_unfinished(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write unfinished.pt, of a run that is within an epoch."""
        save_tensors(self.checkpoint("unfinished"), {"format": FORMAT, "meta": meta, **state})

    def _keep_previous(self) -> None:
        """Keep last.pt as previous.pt, for the day that last.pt is damaged."""
        # A last.pt found damaged must not replace the good one before it.
        if not self.last_is_whole:
            return
        link = self.path / f".previous.pt.{os.getpid()}.partial"
        try:
            link.unlink(missing_ok=True)
            os.link(self.checkpoint(), link)
            os.replace(link, self.checkpoint("previous"))
        except OSError:  # no hard links, as on FAT: moved, so that for a moment there is one of two
            os.replace(self.checkpoint(), self.checkpoint("previous"))

    def save_weights(self, which: str, weights: dict[str, Tensor], meta: dict[str, Any]) -> None:
        save_weights(self.weights(which), weights, meta)

    def load(self, which: str = "last", map_location: Any = "cpu") -> dict[str, Any]:
        """Read what `save` wrote; of a `last` that is damaged or gone the one before it, which a warning says.

        Raises: UserError if it is missing or corrupt.
        """
        file, previous = self.checkpoint(which), self.checkpoint("previous")
        try:
            state = load_checkpoint(file, map_location)
            self.last_is_whole |= which == "last"
            return state
        except UserError as error:
            if which != "last" or not previous.is_file():
                raise
            try:
                state = load_checkpoint(previous, map_location)
            except UserError:
                raise error from None
            warnings.warn(f"{error}. Using {previous.name} instead, of epoch {state['epoch']}", stacklevel=2)
            return state

    def load_weights(self, which: str = "last") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return weights and metadata; where the file is damaged, those in the checkpoint beside it, with a warning.

        Raises: UserError if they are missing or corrupt, and no checkpoint holds them.
        """
        try:
            return load_weights(self.weights(which))
        except UserError as error:
            others = [self.checkpoint(which), *([self.checkpoint("previous")] if which == "last" else [])]
            for other in others:
                try:
                    weights, meta = load_weights(other)
                except UserError:
                    continue
                said = f"Using the weights in {other.name} instead, of epoch {meta['epoch']}"
                warnings.warn(f"{error}. {said}", stacklevel=2)
                return weights, meta
            raise

    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from; without one the run starts over."""
        return any(self.checkpoint(name).is_file() for name in ("last", "previous", "unfinished"))

    def meta(self, which: str = "last") -> dict[str, Any]:
        """Return what is known of these weights: model, num_classes, defense, epsilon, epoch and more."""
        return self.load_weights(which)[1]

    def averaged_at(self) -> int | None:
        """After how many epochs the run's SWA was ended; None where it was not."""
        return self.meta("swa")["epoch"] if self.weights("swa").is_file() else None

    def read_config(self) -> Config | None:
        """Return the config the run was started with; None where there is no config.yaml.

        Its code, a defense in a file, is not run: it is `Foreign`.
        """
        if not self.config_file.is_file():
            return None
        return from_dict(read_yaml(self.config_file), source=str(self.config_file), code=False)

    def write_config(self, config: Config) -> None:
        write_text(self.config_file, yaml.safe_dump(to_dict(config), sort_keys=False))

    def difference(self, config: Config) -> tuple[str, Any] | None:
        """Return the first setting (dotted name) that makes `config` another run than this one, and its value here."""
        saved = self.read_config()
        return None if saved is None else next(differences(to_dict(config), to_dict(saved)), None)

    def append_metrics(self, row: dict[str, Any]) -> None:
        append_text(self.metrics_file, _line(row))

    def metrics(self) -> list[dict[str, Any]]:
        """Return one row per epoch, those there are; damaged ones are left out, which a warning says.

        A line's own `crc32`, of the rest of it, is looked at and left out; lines of earlier versions have none.
        """
        rows, damaged = [], []
        lines = self.metrics_file.read_bytes().split(b"\n") if self.metrics_file.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
                if not (isinstance(row, dict) and isinstance(row.get("epoch"), int)):
                    raise ValueError
                crc = row.pop("crc32", None)
                if crc is not None and _line(row) != _line(row, crc):
                    raise ValueError
                if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in row.values()):
                    raise ValueError
                rows.append(row)
            except ValueError:
                if number < len(lines):  # the last is what a run in progress, or killed, was writing
                    damaged.append(number)
        if damaged:
            warnings.warn(
                f"{self.metrics_file}: {len(damaged)} damaged line(s) left out, line {damaged[0]} first", stacklevel=2
            )
        return rows

    def last_validation(self) -> dict[str, float]:
        """Return the accuracies on validation images after the last epoch so far: clean_acc, robust_acc (under PGD)."""
        last = (self.metrics() or [{}])[-1]
        robust = next((value for key, value in last.items() if key.startswith("val/robust_acc_pgd")), None)
        found = {"clean_acc": last.get("val/clean_acc"), "robust_acc": robust}
        return {key: value for key, value in found.items() if value is not None}

    def truncate_metrics(self, epoch: int) -> None:
        """Drop what was logged after `epoch`: a resumed run logs it again."""
        rows = [row for row in self.metrics() if row["epoch"] <= epoch]
        write_text(self.metrics_file, "".join(map(_line, rows)))

    def read_evaluation(self, which: str = "last") -> dict[str, Any] | None:
        """Return what `fastarat eval` found: settings, num_images, accuracy by key; None where there is nothing.

        Raises: UserError for a file that is no evaluation.
        """
        file = self.evaluation(which)
        if not file.is_file():
            return None
        try:
            found = parse_json(file.read_bytes())
            # Here, and not where a report reads it, because the file's name is at hand for the error.
            check_record(found)
            if found.get("sha256", seal(found)) != seal(found):
                raise ValueError("its checksum does not hold: it was edited, or is damaged")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(
                f"{file} is not an evaluation that can be read ({type(error).__name__}: {error}): delete it, then "
                f"fastarat eval {shlex.quote(str(self.path))}"
            ) from error
        return found

    def stale(self, which: str, evaluation: dict[str, Any]) -> str:
        """Say why an evaluation is not of the weights that are here now; "" if it is, or nobody can tell."""
        recorded = evaluation["settings"].get("weights_sha256")
        if not self.weights(which).is_file():
            return ""
        return "" if recorded in (None, self.meta(which)["sha256"]) else "of other weights than are in the run now"

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Return `read_evaluation` of all weights that were evaluated, by their name."""
        found = {which: self.read_evaluation(which) for which in WEIGHTS}
        return {which: evaluation for which, evaluation in found.items() if evaluation is not None}


def _is_content(path: Path) -> bool:
    return path.name not in LOCK_FILES and not (path.name.startswith(".") and path.suffix == ".partial")


def _line(row: dict[str, Any], crc: int | None = None) -> str:
    """A row of metrics.jsonl, with its checksum, or another."""
    crc = zlib.crc32(json.dumps(row).encode()) if crc is None else crc
    return json.dumps({**row, "crc32": crc}) + "\n"


def is_current(run: Run, which: str) -> bool:
    """Whether what `fastarat eval` found is there, whole, and of these weights."""
    try:
        found = run.read_evaluation(which)
        return found is not None and not run.stale(which, found)
    except UserError:
        return False


def differences(asked: dict[str, Any], found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings (dotted name) that make two configs two runs, and their values in `found`."""
    for key, value in asked.items():
        other = found.get(key)
        if isinstance(value, dict):
            yield from differences(value, other or {}, f"{prefix}{key}.")
        elif value != other and prefix + key not in MAY_DIFFER:
            yield prefix + key, other


def dataset_of(config: Config, data_dir: str | Path | None = None) -> Dataset:
    """Load the data set that a config names, split as it says. data_dir: instead of the config's."""
    return load_dataset(
        config.dataset,
        data_dir=config.data_dir if data_dir is None else data_dir,
        val_images=config.eval.val_images,
        image_size=config.image_size,
    )


def meta_of(config: Config, dataset: Dataset, branches: Sequence[str], *, precision: tuple[str, str]) -> dict[str, Any]:
    """Return what somebody needs who finds a run's weights alone: `load_network` rebuilds the network of it.

    config: resolved. branches: of the network's split BatchNorm, () without. precision: what it is trained in, and why.
    """
    return {
        "model": config.model,
        "num_classes": len(dataset.classes),
        "in_channels": dataset.shape[0],
        "image_size": dataset.shape[1],
        "normalized": config.normalize,
        "branches": list(branches),
        "defense": defense_key(config.defense),
        "dataset": dataset.name,
        "classes": list(dataset.classes),
        "epsilon": config.attack.epsilon,
        "norm": config.attack.norm,
        "precision": precision[0],
        "precision_note": precision[1],
    }


def check_branch(run: str | Path, meta: dict[str, Any], branch: str, which: str = "last") -> None:
    """Raise UserError unless a run's network has a BatchNorm set `branch` that can be used."""
    known = meta["branches"] or ["adv"]
    if branch not in known:
        why = "" if meta["branches"] else " (this network has one BatchNorm set, called adv)"
        raise UserError(f"no BatchNorm branch {branch!r} in {run}: it has {', '.join(known)}{why}")
    if (which == "swa" or meta.get("swa")) and meta["branches"] and branch != "adv":
        raise UserError("the averaged network's clean BatchNorm was never re-estimated: take branch adv, or last")


def load_network(
    path: str | Path, which: str = "last", *, model: Given | None = None
) -> tuple[nn.Module, dict[str, Any], Config | None]:
    """Rebuild a trained network from a run folder or a checkpoint file.

    Args:
        path: run folder, .safetensors or .pt. which: one of WEIGHTS, for a folder. model: the network of
            a run that was given one in Python, or what makes it; a copy is loaded.
    Returns: model on the CPU in eval mode, metadata, and the run's config (None for a file elsewhere).
    Raises: UserError for anything missing, corrupt, or of another architecture.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no run folder or checkpoint {path}")
    run, file = Run.holding(path), path
    if path.is_dir():
        file = run.weights(which)
        if not file.exists() and not run.checkpoint(which).exists():
            there = ", ".join(sorted(p.stem for p in path.glob("*.safetensors"))) or "none yet"
            raise UserError(f"{path} has no {which} weights (there: {there})")
        weights, meta = run.load_weights(which)
    else:
        weights, meta = load_weights(file)
    check_meta(meta, file)
    with torch.device("meta"):  # shapes alone: what the file does not hold is not allocated either
        if model is None:
            load_into(network_of(meta), {key: value.to("meta") for key, value in weights.items()}, file)
    loaded = network_of(meta, model)
    load_into(loaded, weights, file)
    return loaded, meta, run.read_config()


def network_of(meta: dict[str, Any], given: Given | None = None) -> nn.Module:
    """Build the network that `meta_of` describes, channels-last and in eval mode, its weights still to be loaded.

    given: as `load_network`'s model. Raises: UserError where it is missing, or one too many.
    """
    check_named(meta["model"], given)
    # The mean and the deviation are buffers: loading the weights puts the true ones in.
    unit = [1.0] * meta["in_channels"] if meta["normalized"] else None
    sizes = {key: meta[key] for key in ("num_classes", "in_channels", "image_size")}
    if meta["defense"] == "imported":
        sizes["image_size"] = None  # a file does not tell; of timm's networks the published size is meant
    model = network(meta["model"], given, **sizes, mean=unit, std=unit)
    if meta["branches"]:
        # Split before loading: the adversarial branch has the ordinary names, so an unsplit network would load half.
        split_batchnorm(model, meta["branches"])
    # torch's stubs of Module.to forget memory_format.
    return model.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def load_start(defense: Defense, model: nn.Module, *, read: bool = True) -> None:
    """Load the last weights of the `standard` run that `defense` starts from, if it needs one, into `model`.

    `train` does so by itself; a `TrainStep` of one's own is built from a model that was loaded first, and refuses one
    that was not. read: False for a model that a checkpoint will be loaded into: that holds everything.

    Raises: UserError, saying how to get such a run, when none is named, or it is missing, of another defense or
        another architecture.
    """
    if not defense.needs_start:
        return
    if not read:
        model.started_from = getattr(defense, defense.starts_from)
        return
    field = f"defense.{defense.starts_from}"
    needs = f"{defense.name} starts from a standardly trained network"
    how = (
        "get one of the same --model and --dataset with `fastarat train --defense standard --out RUN`, then "
        f"`fastarat train --defense {defense.name} --{field} RUN`{defense.start_otherwise}"
    )
    named = getattr(defense, defense.starts_from)
    if named is None:
        raise UserError(f"{needs}, and {field} names none: {how}")
    path = Run(named).weights() if Path(named).is_dir() else Path(named)
    try:
        weights, meta = Run(named).load_weights() if Path(named).is_dir() else load_weights(path)
        if (trained := meta.get("defense")) != "standard":
            raise UserError(f"{path} was trained with {trained}, not standard")
        load_into(model, weights, path)
    except UserError as error:
        raise UserError(f"{field}={named}: {error}. {needs}: {how}") from error
    model.started_from = named
