"""What a run keeps of itself, after each epoch and within one, and how it goes on from that."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastarat.averages import MovingAverage, WeightAverage
from fastarat.card import best_by
from fastarat.config import Config, to_dict
from fastarat.data import derive_seed
from fastarat.diagnostics import Diagnostics
from fastarat.engine.shares import settle_statistics
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.files import load_into
from fastarat.runs import Run
from fastarat.stopping import over_early
from fastarat.values import shown

_NO_BEST = {"epoch": 0, "value": -1.0, "tie": -1.0}


@dataclass
class Place:
    """Where in an epoch a run is. steps: done of it. images: seen in it. wall_s: seconds spent on it."""

    epoch: int
    steps: int = 0
    images: int = 0
    wall_s: float = 0.0


class Checkpoints:
    """Writes a run's state to its folder, and puts it back.

    meta: what every file says beside its tensors. epoch: the last one that is kept whole. best: which was, so far, and
    by which accuracy. other_rule: the accuracy that chose the best one before, "" where it is the same.
    """

    def __init__(
        self,
        folder: Run,
        config: Config,
        step: TrainStep,
        average: WeightAverage | None,
        ema: MovingAverage | None,
        meta: dict[str, Any],
        diagnostics: Diagnostics | None = None,
    ) -> None:
        self.folder, self.config, self.meta, self.diagnostics = folder, config, meta, diagnostics
        self.step, self.average, self.ema = step, average, ema
        self.epoch, self.other_rule = 0, ""
        self.best: dict[str, Any] = {**_NO_BEST, "by": best_by(config)[0]}

    def over_early(self) -> bool:
        """Whether `early_stop` says that the run is over after the last epoch that is kept whole."""
        count = None if self.average is None else self.average.count
        return over_early(self.config, self.epoch, self.best["epoch"], count)

    def since_best(self, epoch: int, row: dict[str, Any]) -> dict[str, int]:
        """What a row says of `early_stop`: epochs since the best one, this included; nothing without it."""
        if self.config.early_stop is None:
            return {}
        return {"since_best": 0 if self._beats_best(row) else epoch - self.best["epoch"]}

    def _rank(self, row: dict[str, Any]) -> tuple[float, float]:
        by, tie = best_by(self.config)
        return row.get(f"val/{by}", -math.inf), row.get(f"val/{tie}", -math.inf)

    def _beats_best(self, row: dict[str, Any]) -> bool:
        # Strictly better: among equals the earliest stays.
        return self._rank(row) > (self.best["value"], self.best["tie"])

    def save(self, epoch: int, row: dict[str, Any]) -> None:
        """Write the checkpoints of an epoch, the best one first: `last` alone says how far the run is."""
        if best := self._beats_best(row):
            value, tie = self._rank(row)
            self.best = {"epoch": epoch, "by": best_by(self.config)[0], "value": value, "tie": tie}
        # So far on all ranks, which have the same numbers; rank 0 alone writes.
        self.epoch = epoch
        if not self.step.shares.world.first_one:
            return
        state = self._state(epoch)
        if best:
            self.folder.save("best", state, {**self.meta, "best": self.best})
        if self.ema is not None:
            self.folder.save_weights("ema", self.ema.state, {**self.meta, "epoch": epoch, "ema": self.config.ema})
        self.folder.save("last", state, self.meta)
        self.folder.checkpoint("unfinished").unlink(missing_ok=True)

    def settle(self) -> None:
        """Bring the ranks to one state, which is then that of the run; every rank does it at once."""
        settle_statistics(self.step, None if self.ema is None else self.ema.state)

    def save_within(self, place: Place) -> None:
        """Write unfinished.pt, from which the epoch goes on; every rank calls it at once."""
        self.settle()
        device, generator = self.step.device, self.step.generator
        within = {
            "steps": place.steps,
            "images": place.images,
            "wall_s": place.wall_s,
            "meter": self.step.meter.state_dict(),
            "generator": generator.get_state(),
            "rng": torch.get_rng_state(),
            "device": device.type,
            "diagnostics": None if self.diagnostics is None else self.diagnostics.state_dict(),
            "device_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        if self.step.shares.world.first_one:
            self.folder.save_unfinished({**self._state(place.epoch - 1), "within": within}, self.meta)

    def _state(self, epoch: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "step": self.step.state_dict(),
            "best": self.best,
            "config": to_dict(self.config),
            "average": None if self.average is None else self.average.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load(self, state: dict[str, Any], steps: int) -> Place:
        """Put a state back, all but the random streams, and return where it was. steps: in an epoch.

        An epoch's own streams begin with it; within one they are `load_streams`'s, once nothing else draws from them.
        Raises: UserError for a state that is not of this run.
        """
        load_into(self.step.model, state["step"]["model"], self.folder.checkpoint())
        with self._of_this_run():
            self.step.load_state_dict(state["step"])
            # The mean of a run that is extended is of its last part alone.
            extended = (state.get("config") or {}).get("epochs", self.config.epochs) != self.config.epochs
            if self.average is not None and state["average"] is not None and not extended:
                self.average.load_state_dict(state["average"])
            if self.ema is not None and state["ema"] is not None:
                self.ema.load_state_dict(state["ema"])
            self.epoch = state["epoch"]
            # Runs from before the rule was a defense's own: PGD chose, and the earliest of equals stayed.
            old = {"by": f"robust_acc_pgd{self.config.eval.num_steps}", "tie": math.inf}
            best = {**old, **(state.get("best") or _NO_BEST)}
            if best["by"] == self.best["by"]:
                self.best = best
            elif best["epoch"]:
                self.other_rule = best["by"]
            within = state.get("within") or {"steps": 0, "images": 0, "wall_s": 0.0}
            place = Place(self.epoch + 1, int(within["steps"]), int(within["images"]), float(within["wall_s"]))
            if not (0 <= place.steps <= steps and place.images >= 0 and 0 <= place.wall_s < math.inf):
                raise ValueError(f"{place}, in epochs of {steps} steps")
            return place

    def load_streams(self, within: dict[str, Any]) -> None:
        """Go on within an epoch: its random streams, and what was measured of it. Raises: UserError."""
        device = self.step.device
        with self._of_this_run():
            self.step.meter.load_state_dict(within["meter"])
            torch.set_rng_state(within["rng"].cpu())
            if self.diagnostics is not None and within.get("diagnostics"):
                self.diagnostics.load_state_dict(within["diagnostics"])
            if within["device"] != device.type:  # another kind of generator: a stream of its own
                seed = derive_seed(self.config.seed, "attack", self.epoch + 1, within["steps"])
                self.step.generator.manual_seed(seed)
                return
            self.step.generator.set_state(within["generator"].cpu())
            if device.type == "cuda":
                torch.cuda.set_rng_state(within["device_rng"].cpu(), device)

    @contextlib.contextmanager
    def _of_this_run(self) -> Iterator[None]:
        try:
            yield
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint in {self.folder.path} is not of this run, or damaged ({type(error).__name__}: "
                f"{shown(error)}): put the files back as they were, or start another run"
            ) from error
