"""TRADES: clean cross-entropy plus a penalty on how far predictions move under attack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fastarat import losses
from fastarat.defenses.base import Defense, Views


@dataclass(frozen=True, kw_only=True)
class TRADES(Defense):
    """Minimise CE(f(x), y) + beta KL(p(x) || p(x')), x' maximising the KL (Zhang et al., ICML 2019).

    The clean prediction the attack climbs away from is computed once per step: weights and statistics stand still
    meanwhile, so recomputing it, as the release does, gives the same images. With the L2 norm the attack is the
    common one (step as given), not the release's 2 epsilon / steps.
    """

    name: ClassVar[str] = "trades"
    formula: ClassVar[str] = "CE(f(x), y) + beta KL(p(x) || p(x'))"
    objective: ClassVar[str] = "kl"
    start: ClassVar[str] = "gaussian"
    needs_clean: ClassVar[bool] = True
    recipe: ClassVar[str] = "trades"
    released_budget: ClassVar[tuple[float, float]] = (0.031, 0.007)

    beta: float = field(default=6.0, metadata={"help": "weight of the KL", "range": "[0, inf)"})
    exact: bool = field(
        default=False,
        metadata={
            "help": "move the running statistics towards the clean batch a second time after the adversarial one, "
            "as the release's second clean forward does"
        },
    )

    @property
    def updates(self) -> tuple[str, ...] | None:
        return ("clean", "adv", "clean") if self.exact else None

    def loss(self, views: Views) -> dict[str, Tensor]:
        return losses.trades(views.logits_clean, views.logits_adv, views.labels, self.beta)
