"""MART: boosted cross-entropy on adversarial images, consistency where the clean image is misclassified."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastarat import losses
from fastarat.ascent import Attacked
from fastarat.defenses.base import Defense, Forward, Settings, Views
from fastarat.nets.models import WideResNet


@dataclass(frozen=True, kw_only=True)
class MART(Defense):
    """Minimise BCE(p(x'), y) + lam KL(p(x) || p(x')) (1 - p_y(x)), x' maximising the cross-entropy.

    Source: Wang et al., ICLR 2020; the exact terms are in `losses.mart`. Defaults are the released drivers': lam 5 and
    the schedule "mart", or lam 6 and "mart-wrn" for a wide network.
    """

    name: ClassVar[str] = "mart"
    formula: ClassVar[str] = "BCE(p(x'), y) + lam (1 - p_y(x)) KL(p(x) || p(x'))"
    start: ClassVar[str] = "gaussian"
    needs_clean: ClassVar[bool] = True
    regularizers: ClassVar[tuple[str, ...]] = ("kl",)
    recipe: ClassVar[str] = "mart"
    released_budget: ClassVar[tuple[float, float]] = (0.031, 0.007)

    also_released: ClassVar[dict[str, tuple]] = {"defense.lam": (5.0, 6.0)}

    lam: float | None = field(
        default=None, metadata={"help": "weight of the KL (default: 5; 6 for WRN, as released)", "range": "[0, inf)"}
    )

    def departures(self, run: Settings) -> tuple[str, ...]:
        found, wide = super().departures(run), run.model.startswith("wrn")
        if self.lam == (5.0 if wide else 6.0):
            found += (f"lam {self.lam:g} is the other driver's: the release has 5 for ResNet-18 and 6 for WRN-34-10",)
        return found

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked
    ) -> Views:
        views = super().forward(run, companions, images, labels, attacked)
        lam = (6.0 if isinstance(run.model, WideResNet) else 5.0) if self.lam is None else self.lam
        return views._replace(extra={"lam": torch.full_like(run.progress, lam)})

    def loss(self, views: Views) -> dict[str, Tensor]:
        lam = views.extra.get("lam", 5.0 if self.lam is None else self.lam)
        return losses.mart(views.logits_clean, views.logits_adv, views.labels, lam)
