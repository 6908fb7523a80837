"""What the processes of one run agree on: that they can train together, when to stop, and how a killed one goes on."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import torch

from fastarat.config import Config
from fastarat.data import Dataset
from fastarat.distributed import Votes, World
from fastarat.errors import UserError
from fastarat.interrupts import Pace, Signals
from fastarat.resuming import newest
from fastarat.runs import Run


def steps_of(config: Config, dataset: Dataset, world: World) -> int:
    """Return the steps of an epoch: a last batch of fewer than two images per part is left out.

    Batch statistics of a single image are no statistics. Raises: UserError where a part of a whole batch has fewer.
    """
    images, source, micro = len(dataset.train), dataset.train.source, config.accumulate
    if source is not None and source.in_order:  # a DataLoader's own batches
        steps = source.num_batches
    else:
        steps = whole_steps(images, config.batch_size, world.size, micro)
    # Reached with one training image, or a batch size that leaves one over.
    if steps < 1:
        parts = _in_parts(world.size, micro)
        least = 2 * world.size * micro
        raise UserError(f"{images} training image(s){' in ' + parts if parts else ''}: at least {least} are needed")
    return steps


def whole_steps(images: int, batch_size: int, processes: int, accumulate: int) -> int:
    """Return the batches of `images` whose every part has two or more. Raises: UserError for a batch too small."""
    least = 2 * processes * accumulate
    if batch_size < least:
        raise UserError(
            f"batch_size={batch_size} in {_in_parts(processes, accumulate)}: BatchNorm needs at least 2 images in "
            f"each; write --batch-size {least} or more (it is that of all processes together)"
        )
    whole, rest = divmod(images, batch_size)
    return whole + (rest >= least)


def _in_parts(processes: int, accumulate: int) -> str:
    parts = [f"{processes} processes"] * (processes > 1) + [f"{accumulate} micro-batches"] * (accumulate > 1)
    return " x ".join(parts)


def check_together(world: World, config: Config, dataset: Dataset) -> None:
    """Raise UserError, on all ranks, for what several processes cannot do, or see differently."""
    if config.diagnostics and (world.size > 1 or config.accumulate > 1):
        raise UserError(
            "diagnostics measure the gradients of a whole batch in one process: leave --diagnostics out, or "
            f"{'torchrun' if world.size > 1 else '--accumulate'}"
        )
    source = dataset.train.source
    if source is not None and source.in_order and (world.size > 1 or config.accumulate > 1):
        raise UserError(
            "a DataLoader's batches are its own, and cannot be divided among processes or micro-batches: give its "
            "data set instead"
        )
    if world.size == 1:
        return
    seen = dataset.train
    pixels = 0
    if seen.images is not None:  # few, spread over the set
        few = seen.images[:: max(1, len(seen) // 64)]
        pixels = zlib.crc32(few.contiguous().numpy().tobytes())
    labels = zlib.crc32(seen.labels.numpy().tobytes())
    mend = "give all of them the same --dataset and files"
    world.same("data", f"{len(seen)} training images of {len(dataset.classes)} classes", mend)
    world.same("data", f"labels and pixels of checksum {labels:08x}-{pixels:08x}", mend)
    settings = dataclasses.replace(config, out=None, device="auto", threads=None)
    world.same(
        "settings", f"of checksum {zlib.crc32(repr(settings).encode()):08x}", "give all of them the same command"
    )


def begun(world: World, config: Config, device: torch.device, resume: bool) -> tuple[bool, bool, dict[str, Any] | None]:
    """Return whether the run goes on, whether its last.pt was read as a whole, and the state that it goes on from.

    config: resolved. resume: asked for; else the launcher may have started it anew. The state is None where the run
    starts over. Raises: UserError for a folder that exists and is not gone on with.
    """
    run = Run(config.out or "")

    def look() -> tuple[bool, bool, dict[str, Any] | None]:
        if not (resume or _goes_on(world, config)):
            Run.check_new(run.path)  # before time is spent on the choice of a precision
            return False, False, None
        # On the host where it is sent to others.
        state = newest(run, device if world.size == 1 else "cpu")
        return True, run.last_is_whole, state

    return world.first(look)


def _goes_on(world: World, config: Config) -> bool:
    """Whether the launcher has started this run anew after one of its processes ended, so that it goes on by itself.

    config: resolved.
    """
    run = Run(config.out or "")
    if not world.restarts or not run.config_file.is_file():
        return False
    saved = run.read_config()
    # The precision that was chosen is written where none was asked for.
    asked = dataclasses.replace(config, precision=config.precision or (saved and saved.precision))
    if (other := run.difference(asked)) is not None:
        raise UserError(
            f"{run.path} was begun with {other[0]}={other[1]!r}, so it cannot go on after a restart of its processes: "
            "choose another --out"
        )
    return True


class Course:
    """When a run is kept within an epoch and when it ends: all ranks at the same step, whoever was asked for the end.

    wanted: whether something here, besides a signal, asks for it. stopping: whether all of them know that it ends.
    """

    def __init__(self, world: World, signals: Signals, pace: Pace, wanted: Callable[[], bool] = lambda: False) -> None:
        self.world, self.signals, self.pace = world, signals, pace
        self._votes, self._wanted = Votes(world), wanted
        self.stopping = False

    def whole(self, total: int) -> dict[str, int]:
        """Say to a step of what batch it has a part, where it has no whole one."""
        return {"total": total} if self.world.size > 1 else {}

    def due(self, *, within: bool) -> bool:
        """After a step: whether the run is kept now, and ended if `stopping`. within: steps follow in the epoch."""
        due = self.pace.due() and within
        # All count the same steps, and each has a clock of its own: rank 0's is asked.
        by_clock = bool(due and self.world.first_one and not self.pace.steps)
        signum, clock, asked = self._votes.cast(self.signals.received or 0, int(by_clock), int(self._wanted()))
        return self.stop(signum, bool(asked)) or bool(clock and within) or bool(due and self.pace.steps)

    def ending(self) -> bool:
        """Whether the end was asked for at any rank: asked by all at once."""
        signum, _, asked = self._votes.now(self.signals.received or 0, 0, int(self._wanted()))
        return self.stop(signum, bool(asked))

    def stop(self, signum: int, asked: bool = False) -> bool:
        """Note that the run ends by this signal, or as asked, as all ranks know; 0 and False: it does not."""
        # None where a signal came to another; and of one that came here just now the others do not know yet.
        if signum and self.signals.received is None:
            self.signals.received = signum
        self.stopping = self.stopping or bool(signum) or asked
        return self.stopping
