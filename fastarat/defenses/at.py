"""PGD adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from fastarat.defenses.base import Defense, Settings, Views
from fastarat.losses import wide


@dataclass(frozen=True, kw_only=True)
class AT(Defense):
    """Minimise CE(f(x'), y) on PGD examples (Madry et al., ICLR 2018).

    The attack runs in train mode and moves the running statistics at each of its forwards, as the robust-overfitting
    code and the AT path of AR-AT's research code do; `--attack.bn eval` gives the other convention. Schedules: "arat"
    (the default, for comparison with AR-AT) and "rice" (the robust-overfitting code's).
    """

    name: ClassVar[str] = "at"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"
    formula: ClassVar[str] = "CE(f(x'), y)"
    attack_bn: ClassVar[str] = "train"
    under_l2: ClassVar[str] = ""
    also_released: ClassVar[dict[str, tuple]] = {"optim.recipe": ("rice",), "normalize": (True,)}

    def departures(self, run: Settings) -> tuple[str, ...]:
        found = super().departures(run)
        if run.recipe != "rice":
            return found
        found += (
            "the robust-overfitting code forwards the final images once more in the attack and the clean ones after "
            "the update, which moves the running statistics: left out",
        )
        if not run.normalize:
            found += ("the robust-overfitting code normalises its input inside the model (--normalize)",)
        return found

    def loss(self, views: Views) -> dict[str, Tensor]:
        return {"ce_adv": F.cross_entropy(wide(views.logits_adv), views.targets)}
