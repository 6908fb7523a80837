"""FAT and GAIR-FAT: adversarial training on images whose attack stops soon after it succeeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastarat.ascent import Attacked
from fastarat.defenses.base import Defense, Forward, Settings, Views
from fastarat.defenses.gairat import GAIRAT, reached, released_epochs, stretched
from fastarat.errors import UserError
from fastarat.losses import cross_entropy
from fastarat.specs import known


def early_stopped(
    pgd: Callable[..., Attacked],
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    target: Tensor,
    start: Tensor,
    slack: Tensor,
) -> Attacked:
    """PGD in which an image stays where it is once it has been misclassified `slack` + 1 times.

    Every step runs on the whole batch and a mask decides who moves: shapes are static, and nothing is saved. With BN
    in eval mode the points are those of an attack from which stopped images are removed.

    Args:
        pgd: bound with its keywords, as in `Defense.attack`. slack: int64 0-d or [B], misclassifications forgiven.
    Returns: Attacked; kappa counts the steps whose point was still classified correctly.
    Source: Zhang et al., ICML 2020 (arXiv 2002.11242), algorithm 1, and GAIRAT's released code, without its noise
        term (0 there) and in the batch's order.
    """
    one_step = partial(pgd, num_steps=1, count=True)
    points, slack = start, slack.expand(len(images)).clone()
    moving = torch.ones(len(images), dtype=torch.bool, device=images.device)
    kappa = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    objectives = []
    for _ in range(pgd.keywords["num_steps"]):
        moved, right, objective = one_step(forward, images, labels, target, points)
        objectives.append(objective)
        right = known(right).bool()
        moving = moving & (right | (slack > 0))
        slack -= (moving & ~right).long()
        kappa += moving & right
        points = torch.where(moving[:, None, None, None], moved, points)
    return Attacked(points, kappa, torch.stack(objectives).sum() if objectives else None)


@dataclass(frozen=True, kw_only=True)
class EarlyStopped(Defense):
    """Base of FAT and GAIR-FAT: their attack."""

    start: ClassVar[str] = "uniform"
    released_budget: ClassVar[tuple[float, float]] = (0.031, 0.007)

    slack: tuple[int, ...] = field(
        default=(0, 3, 6), metadata={"help": "misclassifications forgiven in each of three phases"}
    )
    slack_epochs: tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "first epochs of the second and third phase (default: 41 and 71 of 100, of 120 for WRN, as a share "
            "of the run)",
            "range": "[1, inf)",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.slack) != 3 or min(self.slack) < 0:
            raise UserError(f"defense.slack={self.slack}: expected three counts of at least 0, such as 0,3,6")
        if self.slack_epochs is not None and len(self.slack_epochs) != 2:
            raise UserError(f"defense.slack_epochs={self.slack_epochs}: expected two epochs, such as 41,71")

    def equals_default(self, run: Settings) -> dict[str, object]:
        of = released_epochs(run.model)
        epochs = tuple(stretched(released, of, run.epochs) for released in (41, 71))
        return super().equals_default(run) | {"defense.slack_epochs": epochs}

    def describe(self, norm: str) -> dict[str, str]:
        second, third = self.slack_epochs or (41, 71)
        scaled = "" if self.slack_epochs else ", of 100 (of 120 for WRN), scaled"
        counts = (
            f"{self.slack[0]} misclassifications, {self.slack[1]} from epoch {second}, {self.slack[2]} from {third}"
        )
        return {**super().describe(norm), "early stop": f"forgives {counts}{scaled}"}

    def attack(
        self,
        pgd: Callable[..., Attacked],
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        target: Tensor,
        start: Tensor,
        *,
        run: Forward,
    ) -> Attacked:
        of = released_epochs(run.model)
        slack = torch.full_like(run.progress, self.slack[0], dtype=torch.int64)
        for value, given, released in zip(self.slack[1:], self.slack_epochs or (None, None), (41, 71), strict=True):
            slack = torch.where(reached(run, given, released, of), value, slack)
        return early_stopped(pgd, forward, images, labels, target, start, slack)


@dataclass(frozen=True, kw_only=True)
class FAT(EarlyStopped):
    """Minimise CE(f(x'), y) on PGD examples that stop once misclassified more often than a slack that grows.

    Source: Zhang et al., ICML 2020 (arXiv 2002.11242); slack and its epochs as in GAIRAT's released code.
    """

    name: ClassVar[str] = "fat"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "smoothed"
    formula: ClassVar[str] = "CE(f(x'), y), x' of early-stopped PGD"
    recipe: ClassVar[str] = "gairat"

    def loss(self, views: Views) -> dict[str, Tensor]:
        return {"ce_adv": cross_entropy(views.logits_adv, views.targets).mean()}


@dataclass(frozen=True, kw_only=True)
class GAIRFAT(EarlyStopped, GAIRAT):
    """GAIRAT on FAT's early-stopped images; kappa counts the steps an image took while still classified correctly.

    Source: Zhang et al., ICLR 2021 (arXiv 2010.01736), with the released lambda 0.
    """

    name: ClassVar[str] = "gair-fat"
    formula: ClassVar[str] = "sum_i omega(kappa_i) CE(f(x'_i), y_i) / sum_i omega(kappa_i), x' of early-stopped PGD"

    lam: float = field(
        default=0.0,
        metadata={"help": "shift of the weights (tanh, sigmoid); larger is flatter", "range": "(-inf, inf]"},
    )

    def departures(self, run: Settings) -> tuple[str, ...]:
        return (
            *super().departures(run),
            "after the burn-in the release pairs outputs in the attack's order with labels in the batch's (a bug): "
            "here both keep the batch's",
        )
