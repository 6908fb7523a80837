"""MART: boosted cross-entropy on adversarial images, consistency where the clean image is misclassified."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fastarat import losses
from fastarat.defenses.base import Defense, Views


@dataclass(frozen=True, kw_only=True)
class MART(Defense):
    """Minimise BCE(p(x'), y) + lam KL(p(x) || p(x')) (1 - p_y(x)), x' maximising the cross-entropy.

    Source: Wang et al., ICLR 2020; the exact terms are in `losses.mart`. Defaults are the released ResNet-18 driver's;
    the WRN-34-10 one has lam 6 and the schedule "mart-wrn".
    """

    name: ClassVar[str] = "mart"
    formula: ClassVar[str] = "BCE(p(x'), y) + lam (1 - p_y(x)) KL(p(x) || p(x'))"
    start: ClassVar[str] = "gaussian"
    needs_clean: ClassVar[bool] = True
    recipe: ClassVar[str] = "mart"
    released_budget: ClassVar[tuple[float, float]] = (0.031, 0.007)

    lam: float = field(default=5.0, metadata={"help": "weight of the KL (WRN-34-10 release: 6)", "range": "[0, inf)"})

    def loss(self, views: Views) -> dict[str, Tensor]:
        return losses.mart(views.logits_clean, views.logits_adv, views.labels, self.lam)
