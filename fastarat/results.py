"""What a run leaves, for Python: what `train` returns, and a trained network out of a run folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastarat.card import accuracy_name, best_by
from fastarat.config import Config
from fastarat.device import pick_device
from fastarat.runs import load_network
from fastarat.schedules import counted


@dataclass(frozen=True, repr=False)
class Result:
    """What a run leaves. run: its folder. metrics: one dict per epoch. model: the final network, in eval mode.

    config: resolved. stopped: why a callback ended it before its last epoch (`train(resume=...)` goes on); None for a
    run that is finished, by `early_stop` too.
    """

    run: Path
    metrics: list[dict[str, Any]]
    model: nn.Module
    config: Config
    stopped: str | None = None

    @property
    def epochs(self) -> int:
        """How many epochs were finished, those before a resume included."""
        return self.metrics[-1]["epoch"] if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Seconds of all epochs, without validation and checkpoints."""
        return math.fsum(row.get("wall_s", 0.0) for row in self.metrics)

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the epoch that best.safetensors is of, by the rule on the card; None without validation."""
        by, tie = (f"val/{name}" for name in best_by(self.config))
        rows = [row for row in self.metrics if by in row]
        # Of equal ones the earliest, which is what `max` returns.
        return max(rows, key=lambda row: (row[by], row.get(tie, -math.inf)), default=None)

    @property
    def last(self) -> dict[str, Any] | None:
        """The row of the last epoch; None before there is one."""
        return self.metrics[-1] if self.metrics else None

    def __repr__(self) -> str:
        planned = "" if self.stopped is None else f" of {self.config.epochs}, stopped: {self.stopped}"
        parts = [str(self.run), f"{counted(self.epochs, 'epoch')}{planned}"]
        for name, row in (("best", self.best), ("last", self.last)):
            found = _accuracies(row or {})
            if row is not None and found:
                parts.append(f"{name} (epoch {row['epoch']}): {found}")
        return f"Result({'; '.join([*parts, f'{self.seconds:.1f} s'])})"


def _accuracies(row: dict[str, Any]) -> str:
    found = {key.removeprefix("val/"): value for key, value in row.items() if key.startswith("val/")}
    return ", ".join(f"{accuracy_name(k).removesuffix(' accuracy')} {v:.1%}" for k, v in found.items() if "_acc" in k)


class Loaded(NamedTuple):
    """A trained network. model: in eval mode. meta: what is known of its weights, as `fastarat.runs.meta_of` has it."""

    model: nn.Module
    meta: dict[str, Any]


def load_run(
    run: str | Path,
    which: str | None = None,
    *,
    model: nn.Module | Callable[[int], nn.Module] | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load a trained network out of a run folder, or a checkpoint file.

    Args:
        run: the folder, or a .safetensors or .pt file of one.
        which: of a folder "best" (by validation), "last", "swa" or "ema". Default: best where there is one, last
            where there is none.
        model: the network, or the function that makes it, of a run that it was given to in Python. Without it the
            network is built by its name.
        device: where the network is put; "auto": the GPU where there is one.
    Returns: Loaded(model, meta): images [B, C, H, W] in [0, 1] to logits [B, K], by BatchNorm branch adv.
    Raises: UserError for anything missing, corrupt, or of another architecture.
    """
    if which is None:
        which = "best" if Path(run, "best.safetensors").is_file() else "last"
    given = {} if model is None else {"model": model}
    network, meta, _ = load_network(run, which, **given)
    return Loaded(network.to(pick_device(str(device))), meta)
