"""PGD adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastarat.defenses.base import Defense, Views
from fastarat.losses import wide


@dataclass(frozen=True, kw_only=True)
class AT(Defense):
    """Minimise CE(f(x'), y) on PGD examples (Madry et al., ICLR 2018).

    The attack runs in train mode and moves the running statistics at each of its forwards, as the robust-overfitting
    code and the AT path of AR-AT's research code do; `--attack.bn eval` gives the other convention. Schedules: "arat"
    (the default, for comparison with AR-AT) and "rice". The robust-overfitting code also forwards the final images
    once more in the attack and the clean ones after the update, which only moves running statistics: not offered.
    """

    name: ClassVar[str] = "at"
    formula: ClassVar[str] = "CE(f(x'), y)"
    attack_bn: ClassVar[str] = "train"

    def loss(self, views: Views) -> dict[str, Tensor]:
        return {"ce_adv": F.cross_entropy(wide(views.logits_adv), views.labels)}
