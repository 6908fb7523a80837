"""Standard training: cross-entropy on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from fastarat.defenses.base import Defense, Views
from fastarat.losses import wide


@dataclass(frozen=True, kw_only=True)
class Standard(Defense):
    """Minimise CE(f(x), y) in train mode; no attack. Not robust: the reference row, and ARREST's and CURE's start."""

    name: ClassVar[str] = "standard"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"
    formula: ClassVar[str] = "CE(f(x), y)"
    attacks: ClassVar[bool] = False
    chosen_by: ClassVar[Literal["robust", "clean"]] = "clean"

    def loss(self, views: Views) -> dict[str, Tensor]:
        return {"ce_clean": F.cross_entropy(wide(views.logits_clean), views.targets)}
