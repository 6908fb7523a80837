"""What one evaluation is about: the attacks of its list, the images, and the network, lent in eval mode."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm as plain_tqdm
from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

from fastarat.bars import LineBar
from fastarat.checks import check_images, check_labels
from fastarat.data import Dataset, as_split, make_loader
from fastarat.device import float32_flags, seeded_apart
from fastarat.distributed import World
from fastarat.errors import UserError, unknown
from fastarat.nets.attacker import frozen
from fastarat.nets.batchnorm import branch as use_branch
from fastarat.values import Budget, coerce, whole

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""Members of AutoAttack's standard version, in their order."""
_KEYS = {
    "clean": "clean_acc",
    "autoattack": "robust_acc_aa",
    "autoattack-fast": "robust_acc_aa_fast",
    "transfer": "robust_acc_transfer",
    "worst": "robust_acc_worst",
    "corruptions": "corruption_acc",
} | {member: "robust_acc_" + member.replace("-", "_") for member in STANDARD}
_TITLES = {
    "clean_acc": "clean",
    "corruption_acc": "corruptions",
    "aa": "AutoAttack",
    "aa_fast": "AutoAttack-fast",
    "apgd_ce": "APGD-CE",
    "apgd_t": "APGD-T",
    "fab_t": "FAB-T",
    "worst": "worst of all attacks",
}


class Entry(NamedTuple):
    """One entry of an attack list: its name, the key of its accuracy, and for PGD its steps, restarts and objective.

    objective: "ce", or "cw", the margin of Carlini and Wagner.
    """

    name: str
    key: str
    num_steps: int = 0
    num_restarts: int = 1
    objective: str = "ce"

    @property
    def members(self) -> tuple[str, ...]:
        """The AutoAttack members this entry runs, in order; empty for everything else."""
        if self.name in ("autoattack", "autoattack-fast"):
            return STANDARD
        return (self.name,) if self.name in STANDARD else ()

    @property
    def attacks(self) -> bool:
        """Whether it looks for points within epsilon itself: neither the clean images, nor corruptions, nor `worst`."""
        return bool(self.members or self.num_steps)

    @property
    def needs_gradient(self) -> bool:
        """Whether it takes gradients of the network that is measured."""
        return self.attacks and self.name not in ("square", "transfer")


def parse_attacks(attack: str) -> list[Entry]:
    """Parse a comma-separated attack list into entries, each once.

    Raises: UserError for an unknown name, naming the nearest one, a step or restart count below 1, or `worst` without
        an attack.
    """
    entries: dict[str, Entry] = {}
    for name in (part.strip().lower() for part in coerce(attack, tuple[str, ...], "attack")):
        if name in _KEYS:
            entry = Entry(name, _KEYS[name], num_steps=20 if name == "transfer" else 0)
        elif counts := re.fullmatch(r"(pgd|cw)-(\d+)(?:-(\d+))?", name):
            kind, steps, restarts = counts[1], int(counts[2]), int(counts[3] or 1)
            if steps < 1 or restarts < 1:
                raise UserError(f"attack {name!r}: steps and restarts start at 1; write {kind}-20 or {kind}-20-5")
            name, key = f"{kind}-{steps}", f"robust_acc_{kind}{steps}"
            if restarts > 1:
                name, key = f"{name}-{restarts}", f"{key}_r{restarts}"
            entry = Entry(name, key, steps, restarts, "cw" if kind == "cw" else "ce")
        else:
            raise unknown("attack", name, ["pgd-20", "pgd-20-5", "cw-20", "cw-20-5", *_KEYS])
        entries[entry.name] = entry
    if "worst" in entries and not any(entry.attacks for entry in entries.values()):
        raise UserError("attack 'worst' is the worst of the attacks beside it: name some, as in pgd-20,cw-20,worst")
    return list(entries.values())


def attack_title(key: str) -> str:
    """Name what an accuracy was measured under: robust_acc_pgd20_r5 -> PGD-20 x5 restarts, val/clean_acc -> clean."""
    name = key.removeprefix("val/").removeprefix("robust_acc_")
    if found := re.fullmatch(r"(pgd|cw)(\d+)(?:_r(\d+))?", name):
        return f"{found[1].upper()}-{found[2]}" + (f" x{found[3]} restarts" if found[3] else "")
    return _TITLES.get(name, name.capitalize())


def in_pixels(value: float) -> str:
    """Write a length in pixel units as one types it: 8/255, or 0.03 where it is no fraction of 255."""
    # A tolerance, because 8/255 has passed through float32, or through JSON, on its way here.
    top = round(value * 255)
    return f"{top}/255" if top > 0 and abs(value * 255 - top) < 1e-6 else f"{value:.5g}"


def collect(
    data: Any, *, limit: int | None = None, batch_size: int = 256, channels: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the images and labels to evaluate, on the CPU, in the order of the data and never augmented.

    Args:
        data: (images, labels) as float32 tensors [N, C, H, W] in [0, 1] and int64 [N]; a `fastarat.data.Split`, a
            loader (whose split is read afresh); or what else `fastarat.data.as_split` takes, 8-bit or NumPy arrays, a
            torch Dataset or DataLoader, a Hugging Face split.
        limit: number of images, taken at even distances through the set; None takes all.
        channels: C that the network takes, if known.
    Returns: images float32 [N, C, H, W] in [0, 1], labels int64 [N].
    Raises: UserError for something else, tensors of another type or shape, or limit < 1.
    """
    limit = None if limit is None else whole("limit", limit)
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)
    # Strictly: a batch that is not what a step takes is told so here in the same words.
    if pair and not (data[0].dtype == torch.uint8 and data[0].dim() == 4):
        check_images(data[0], channels=channels)
        check_labels(data[1], data[0])
        images, labels = (t.detach().cpu() for t in data)
        count = len(labels)
        wanted = torch.arange(count) if limit is None or limit >= count else torch.arange(limit) * count // limit
        return images[wanted].contiguous(), labels[wanted]
    if isinstance(data, (str, Mapping, Dataset)):
        raise UserError(
            f"cannot evaluate on a {type(data).__name__}: give one part of it, such as load_dataset(...).test, a "
            "loader, or (images, labels)"
        )
    split = as_split(data, limit=limit)
    # Not shuffled, not augmented, the last batch short: row i of the result is row i of the split.
    batches = make_loader(split, batch_size=batch_size, device="cpu").epoch(0)
    return torch.cat([b.images.contiguous() for b in batches]), split.labels


@dataclass(frozen=True)
class Task:
    """A network, what it is measured on, and how; the doubts that come up are gathered in `found`.

    images: float32 [N, C, H, W] in [0, 1], labels: int64 [N], both anywhere; each batch is brought to `device`.
    world: the processes that share the work; each of them has all the images.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    budget: Budget
    batch_size: int
    seed: int
    branch: str
    tf32: bool
    device: torch.device
    progress: bool
    found: list[str] = field(default_factory=list)
    world: World = field(default_factory=World)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits float32 [B, K] of images float32 [B, C, H, W]."""
        # AutoAttack flattens with view(), so the images it holds are never channels-last.
        return self.model(images.contiguous(memory_format=torch.channels_last) if self._channels_last else images)

    @cached_property
    def _channels_last(self) -> bool:
        weights = (p for p in self.model.parameters() if p.dim() == 4 and not p.is_contiguous())
        return any(p.is_contiguous(memory_format=torch.channels_last) for p in weights)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images and labels on the device, `batch_size` at a time."""
        for x, y in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield x.to(self.device), y.to(self.device)

    def bar(self, title: str, count: int, *, each: int = 1, unit: str = "batch") -> plain_tqdm:
        """Return a progress bar over the batches of `count` images, `each` ticks a batch.

        On a terminal and in a notebook it moves; elsewhere it is a line every 10 seconds.
        """
        options = {"total": math.ceil(count / self.batch_size) * each, "desc": title, "unit": unit, "leave": False}
        # A notebook is no terminal, and shows it all the same.
        if self.progress and not issubclass(tqdm, tqdm_notebook) and not sys.stderr.isatty():
            return LineBar(**options)
        return tqdm(**options, disable=not self.progress)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Hold the model in eval mode, frozen, float32, on `device` and `branch`, and leave it as it was."""
        model = self.model
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.is_floating_point() and p.dtype != torch.float32:
                raise UserError(f"{name} is {p.dtype}: evaluation is in float32; call model.float() before evaluating")
        home = device_of(model)
        # Each module's own: train(True) afterwards would also wake the BatchNorm layers that somebody had frozen.
        modes = [(m, m.training) for m in model.modules()]
        try:
            with (
                # Inside a caller's inference mode no gradient exists, and enable_grad() does not bring it back.
                torch.inference_mode(False),
                seeded_apart(self.device),
                # A caller's autocast would round the logits that an attack compares, to three digits in bf16.
                torch.autocast(self.device.type, enabled=False),
                float32_flags(self.tf32),
                use_branch(model, self.branch),
                frozen(model),
            ):
                if self.device != home:
                    model.to(self.device)
                model.eval()
                yield
        finally:
            for m, training in modes:
                m.training = training
            if self.device != home:
                model.to(home)


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter or buffer lies; the CPU where it has none."""
    first = next((t for t in [*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if first is None else first.device


def share(flags: Tensor) -> float:
    """Return the share of true flags, bool [N], exactly as a count over a count."""
    return int(flags.sum()) / len(flags)
