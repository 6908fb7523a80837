"""TRADES: clean cross-entropy plus a penalty on how far predictions move under attack."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fastarat import losses
from fastarat.defenses.base import Defense, Settings, Views, as_typed


@dataclass(frozen=True, kw_only=True)
class TRADES(Defense):
    """Minimise CE(f(x), y) + beta KL(p(x) || p(x')), x' maximising the KL (Zhang et al., ICML 2019).

    The clean prediction the attack climbs away from is computed once per step: weights and statistics stand still
    meanwhile, so recomputing it, as the release does, gives the same images. The release forwards the clean images
    twice in training, before and after the adversarial ones: the second forward has the first one's values, and what
    it does to the running statistics is done without it.
    """

    name: ClassVar[str] = "trades"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"
    formula: ClassVar[str] = "CE(f(x), y) + beta KL(p(x) || p(x'))"
    objective: ClassVar[str] = "kl"
    start: ClassVar[str] = "gaussian"
    needs_clean: ClassVar[bool] = True
    regularizers: ClassVar[tuple[str, ...]] = ("kl",)
    recipe: ClassVar[str] = "trades"
    released_budget: ClassVar[tuple[float, float]] = (0.031, 0.007)
    under_l2: ClassVar[str] = ""
    also_released: ClassVar[dict[str, tuple]] = {"optim.recipe": ("trades-wrn",), "epochs": (76,)}

    beta: float = field(default=6.0, metadata={"help": "weight of the KL", "range": "[0, inf)"})
    exact: bool = field(
        default=True,
        metadata={
            "help": "move the running statistics three times a step (clean, adv, clean), as released; off: twice "
            "(clean, adv), as later re-implementations do"
        },
    )

    @property
    def updates(self) -> tuple[str, ...] | None:
        return ("clean", "adv", "clean") if self.exact else None

    def equals_default(self, run: Settings) -> dict[str, object]:
        return {"attack.start": "gaussian"} if run.norm == "l2" else {}

    def departures(self, run: Settings) -> tuple[str, ...]:
        found = super().departures(run)
        step = 2 * run.epsilon / run.num_steps
        if run.norm == "l2" and not (run.start == "gaussian" and math.isclose(run.step_size, step)):
            found += (
                "the release's L2 attack takes steps of 2 epsilon / steps from 0.001 N(0, 1); here the step is "
                f"{as_typed(run.step_size)} and the start {run.start or 'a random direction'} (close to it: "
                f"--attack.start gaussian --attack.step-size {as_typed(step)})",
            )
        if not self.exact:
            found += (
                "the running statistics move twice a step (clean, adv), in the release three times "
                "(clean, adv, clean: --defense.exact)",
            )
        if run.model != "wrn-34-10":
            length = "" if run.epochs == 76 else f"{run.epochs} epochs of "
            found += (
                f"the release trains WRN-34-10, for 76 epochs; {length}{run.model} "
                f"{'are' if length else 'is'} our choice (--model wrn-34-10 --epochs 76)",
            )
        return found

    def loss(self, views: Views) -> dict[str, Tensor]:
        return losses.trades(views.logits_clean, views.logits_adv, views.targets, self.beta)
