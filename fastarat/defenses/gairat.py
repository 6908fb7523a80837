"""GAIRAT: adversarial training weighted by how few attack steps fool the network on each image."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastarat.ascent import Attacked
from fastarat.defenses.base import Defense, Forward, Settings, Views, weighed
from fastarat.errors import UserError
from fastarat.losses import WeightKind, cross_entropy, gairat_weights, geometry, wide
from fastarat.nets.models import WideResNet
from fastarat.schedules import recipe_of
from fastarat.specs import Attack, known


def is_wide(model: nn.Module | str) -> bool:
    """Whether this network, or its name, is a wide ResNet: GAIRAT's release has a run of its own for it."""
    return model.startswith("wrn") if isinstance(model, str) else isinstance(model, WideResNet)


def released_epochs(model: nn.Module | str) -> int:
    """Length of GAIRAT's released run for this network, whose milestones scale with the run."""
    return recipe_of("gairat-wrn" if is_wide(model) else "gairat").epochs


def burn_in(model: nn.Module | str) -> int:
    """First epoch of the released run with weights."""
    return 60 if is_wide(model) else 31


def reached(run: Forward, epoch: int | None, released: int, of: int) -> Tensor:
    """Whether the run has come to `epoch` (as given), or to where `released` is in a run of `of` epochs; 0-d bool."""
    return run.progress >= (released - 1) / of if epoch is None else run.epoch >= epoch


def stretched(released: int, of: int, epochs: int) -> float:
    """First epoch, in a run of `epochs`, of what the release of `of` epochs begins in epoch `released`."""
    return (released - 1) * epochs / of + 1


def burn_in_ends(run: Settings) -> float:
    """First epoch with GAIRAT's weights where none is given."""
    return stretched(burn_in(run.model), released_epochs(run.model), run.epochs)


@dataclass(frozen=True, kw_only=True)
class GAIRAT(Defense):
    """Minimise mean_i omega~_i CE(f(x'_i), y_i), omega~ falling with kappa_i: the steps PGD took without success.

    Until the burn-in ends all weights are 1: the first 30 of 100 epochs, 59 of 120 for WRN, and the same share of a
    run of another length. Weighting by kappa hides gradients: AutoAttack finds far more than PGD does, so report it.

    Source: Zhang et al., ICLR 2021 (arXiv 2010.01736), released code; for the burn-in see `departures`.
    """

    name: ClassVar[str] = "gairat"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "smoothed"
    formula: ClassVar[str] = "sum_i omega(kappa_i) CE(f(x'_i), y_i) / sum_i omega(kappa_i)"
    counts_kappa: ClassVar[bool] = True
    weighs_batch: ClassVar[bool] = True
    recipe: ClassVar[str] = "gairat"
    released_budget: ClassVar[tuple[float, float]] = (0.031, 0.007)
    also_released: ClassVar[dict[str, tuple]] = {
        "defense.begin_epoch": (60,),
        "defense.kind": ("sigmoid", "discrete"),
    }

    kind: WeightKind = field(default="tanh", metadata={"help": "how weights fall with kappa"})
    lam: float = field(
        default=-1.0,
        metadata={"help": "shift of the weights (tanh, sigmoid); larger is flatter", "range": "(-inf, inf]"},
    )
    lam_schedule: Literal["fixed", "piecewise", "linear"] = field(
        default="fixed",
        metadata={
            "help": "fixed; piecewise: lam - 2 from epoch 60 of 100 (WRN: lam - 1 from 90 of 120, lam - 1.5 from 110); "
            "linear: from lam-max to lam over the run"
        },
    )
    lam_max: float | None = field(
        default=None, metadata={"help": "lam at the start of the linear schedule", "range": "(-inf, inf]"}
    )
    begin_epoch: int | None = field(
        default=None,
        metadata={"help": "first epoch with weights (default: 31 of 100, 60 of 120 for WRN, as a share of the run)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam_schedule == "linear" and not math.isfinite(math.inf if self.lam_max is None else self.lam_max):
            raise UserError(
                "defense.lam_schedule=linear needs a finite start: write --defense.lam-max 10 (the release's own "
                "default, infinity, gives NaN)"
            )
        if self.begin_epoch is not None and self.begin_epoch < 1:
            raise UserError(f"defense.begin_epoch={self.begin_epoch}: epochs count from 1")

    def equals_default(self, run: Settings) -> dict[str, object]:
        return super().equals_default(run) | {"defense.begin_epoch": burn_in_ends(run)}

    def departures(self, run: Settings) -> tuple[str, ...]:
        found = super().departures(run)
        if self.begin_epoch in (None, burn_in_ends(run)) and not run.model.startswith("wrn"):
            found += (
                "the burn-in is the paper's, 30 of 100 epochs; the released code weighs from epoch 60 on "
                "(--defense.begin-epoch 60)",
            )
        if self.lam_schedule == "piecewise":
            found += (
                "lambda falls where the release means it to: there the branches are unreachable and lambda stays "
                "(--defense.lam-schedule fixed)",
            )
        if self.lam_schedule == "linear":
            found += ("lambda moves with every step, in the release with every epoch",)
        return found

    def completed(self, attack: Attack) -> Attack:
        """As said above. Raises: UserError for weights that so few steps do not tell apart."""
        if self.kind != "discrete" and attack.num_steps < 2:
            raise UserError(
                f"GAIRAT weights of kind {self.kind} need at least 2 attack steps, got {attack.num_steps}: write "
                "--defense.kind discrete, or more --attack.num-steps"
            )
        return super().completed(attack)

    def describe(self, norm: str) -> dict[str, str]:
        of_lam = "" if self.kind == "discrete" else f", lambda {self.lam:g} ({self.lam_schedule})"
        begin = "31 of 100 (WRN: 60 of 120), scaled" if self.begin_epoch is None else str(self.begin_epoch)
        return {**super().describe(norm), "kappa weights": f"{self.kind}{of_lam}, from epoch {begin}"}

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked
    ) -> Views:
        of = released_epochs(run.model)
        lam = torch.full_like(run.progress, self.lam)
        if self.lam_schedule == "linear":
            start = known(self.lam_max)
            lam = start - run.progress * (start - self.lam)
        elif self.lam_schedule == "piecewise":
            drops = ((90, 1.0), (110, 1.5)) if is_wide(run.model) else ((60, 2.0),)
            for epoch, drop in drops:
                lam = torch.where(reached(run, None, epoch, of), self.lam - drop, lam)
        weighted = reached(run, self.begin_epoch, burn_in(run.model), of)
        views = super().forward(run, companions, images, labels, attacked)
        extra = {"lam": lam, "weighted": weighted}
        if run.batch_mean is not None:
            raw = geometry(views.kappa, views.num_steps, lam, self.kind, dtype=wide(views.logits_adv).dtype)
            extra |= run.share(torch.where(weighted, raw, 1.0))
        return views._replace(extra=extra)

    def loss(self, views: Views) -> dict[str, Tensor]:
        each = cross_entropy(views.logits_adv, views.targets)
        weights = gairat_weights(views.kappa, views.num_steps, views.extra["lam"], self.kind, dtype=each.dtype)
        weights = torch.where(views.extra["weighted"], weights, 1.0)
        return {"ce_adv": weighed((weights * each).mean(), views)}
