"""VIR and DONE: adversarial training that weights images by how vulnerable, or how costly, they are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastarat.ascent import Attacked
from fastarat.defenses.base import Defense, Forward, Passes, Settings, Views, weighed
from fastarat.defenses.gairat import burn_in, burn_in_ends, reached, released_epochs, stretched
from fastarat.errors import UserError
from fastarat.losses import cross_entropy, done_weights, instance_kl, vir_weights


@dataclass(frozen=True, kw_only=True)
class VIR(Defense):
    """Weight each image by omega_i = scale exp(-sharpness p_y(x_i)) KL(p(x_i) || p(x'_i)) + offset, without gradient.

    mode "at": mean omega_i CE(f(x'_i), y_i). mode "trades": mean [CE(f(x_i), y_i) + beta omega_i KL_i], attacked by
    the KL. All weights are 1 (plain AT or TRADES) in the first 76 of 115 epochs, and the same share of another run.

    Source: Fakorede et al., 2023 (arXiv 2307.07167), by its formulas.
    """

    name: ClassVar[str] = "vir"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "smoothed"
    formula: ClassVar[str] = "mean omega_i CE(f(x'_i), y_i), or mean [CE(f(x_i), y_i) + beta omega_i KL_i]"
    start: ClassVar[str] = "gaussian"
    recipe: ClassVar[str] = "vir"
    released_budget: ClassVar[tuple[float, float]] = (0.031, 0.007)
    also_released: ClassVar[dict[str, tuple]] = {"defense.mode": ("trades",)}
    regularizers: ClassVar[tuple[str, ...]] = ("kl",)

    mode: Literal["at", "trades"] = field(default="at", metadata={"help": "which loss is weighted"})
    scale: float | None = field(
        default=None, metadata={"help": "of the KL in the weight (default: at 7, trades 8)", "range": "[0, inf)"}
    )
    sharpness: float | None = field(
        default=None,
        metadata={"help": "of the fall with the clean probability (default: at 10, trades 3)", "range": "[0, inf)"},
    )
    offset: float | None = field(
        default=None, metadata={"help": "smallest weight (default: at 0.007, trades 1.7)", "range": "[0, inf)"}
    )
    beta: float = field(default=5.0, metadata={"help": "weight of the KL in mode trades", "range": "[0, inf)"})
    begin_epoch: int | None = field(
        default=None, metadata={"help": "first epoch with weights (default: 77 of 115, as a share of the run)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin_epoch is not None and self.begin_epoch < 1:
            raise UserError(f"defense.begin_epoch={self.begin_epoch}: epochs count from 1")

    @property
    def objective(self) -> str:
        return "ce" if self.mode == "at" else "kl"

    @property
    def needs_clean(self) -> bool:
        return self.mode == "trades"

    def constants(self) -> dict[str, float]:
        """Scale, sharpness and offset of the weights, the released ones of this mode where unset."""
        released = (7.0, 10.0, 0.007) if self.mode == "at" else (8.0, 3.0, 1.7)
        own = (self.scale, self.sharpness, self.offset)
        values = (r if v is None else v for v, r in zip(own, released, strict=True))
        return dict(zip(("scale", "sharpness", "offset"), values, strict=True))

    def equals_default(self, run: Settings) -> dict[str, object]:
        released = dataclasses.replace(self, scale=None, sharpness=None, offset=None).constants()
        return {
            **{f"defense.{name}": value for name, value in released.items()},
            "defense.begin_epoch": stretched(77, 115, run.epochs),
        }

    def departures(self, run: Settings) -> tuple[str, ...]:
        bug = (
            "the released driver asks for a mode its loss does not know, and so trains VIR-AT with the loss of mode "
            "trades; here the loss is the formula's"
            if self.mode == "at"
            else "the attack maximises the KL, as the formula says; the released driver takes the cross-entropy "
            "(--attack.objective ce)"
        )
        return (*super().departures(run), bug)

    def describe(self, norm: str) -> dict[str, str]:
        begin = "77 of 115, scaled" if self.begin_epoch is None else str(self.begin_epoch)
        numbers = ", ".join(f"{k} {v:g}" for k, v in self.constants().items())
        return {**super().describe(norm), "vulnerability weights": f"mode {self.mode}, {numbers}, from epoch {begin}"}

    def passes(self) -> Passes:
        return super().passes() if self.needs_clean else Passes(2, 1)  # the clean logits only make weights

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked
    ) -> Views:
        extra = {"weighted": reached(run, self.begin_epoch, 77, 115)}
        if self.mode == "trades":
            return super().forward(run, companions, images, labels, attacked)._replace(extra=extra)
        with torch.no_grad():  # the clean logits only make weights
            clean, _ = run(images, "clean")
        adv, _ = run(attacked.images, "adv")
        return run.views(labels, logits_clean=clean, logits_adv=adv, extra=extra)

    def loss(self, views: Views) -> dict[str, Tensor]:
        weights = vir_weights(views.logits_clean, views.logits_adv, views.labels, **self.constants())
        weights = torch.where(views.extra["weighted"], weights, 1.0)
        if self.mode == "at":
            each = cross_entropy(views.logits_adv, views.targets)
            return {"ce_adv": (weights * each).mean()}
        return {
            "ce_clean": cross_entropy(views.logits_clean, views.targets).mean(),
            "kl": self.beta * (weights * instance_kl(views.logits_clean, views.logits_adv)).mean(),
        }


@dataclass(frozen=True, kw_only=True)
class DONE(Defense):
    """Minimise sum_i w_i CE(f(x'_i), y_i), w = softmax(CE / r) over the batch, without gradient.

    The closed-form weights of the KL-regularised worst case over the batch's images; its gradient is that of
    r log mean exp(CE / r). All weights are equal until GAIRAT's burn-in ends (30 of 100 epochs; WRN 59 of 120).

    Source: Sow, Lin, Wang and Liang, ICLR 2024 (arXiv 2308.00311), of which no code is public.
    """

    name: ClassVar[str] = "done"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"
    formula: ClassVar[str] = "sum_i softmax(CE / r)_i CE(f(x'_i), y_i), weights without gradient"
    weighs_batch: ClassVar[bool] = True

    r: float = field(default=1.0, metadata={"help": "strength of the regularisation: large r weights all alike"})
    begin_epoch: int | None = field(
        default=None,
        metadata={"help": "first epoch with weights (default: 31 of 100, 60 of 120 for WRN, as a share of the run)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.r > 0:
            raise UserError(f"defense.r={self.r:g}: expected a number above 0, such as 0.5, 1, 2 or 5")
        if self.begin_epoch is not None and self.begin_epoch < 1:
            raise UserError(f"defense.begin_epoch={self.begin_epoch}: epochs count from 1")

    def equals_default(self, run: Settings) -> dict[str, object]:
        return {"defense.begin_epoch": burn_in_ends(run)}

    def departures(self, run: Settings) -> tuple[str, ...]:
        return (
            *super().departures(run),
            "no code is public: attack, r, burn-in and schedule are our choices (--defense.r, --defense.begin-epoch, "
            "--optim.recipe); the gradient through the attack and the running normaliser are left out",
        )

    def describe(self, norm: str) -> dict[str, str]:
        begin = "31 of 100 (WRN: 60 of 120), scaled" if self.begin_epoch is None else str(self.begin_epoch)
        return {**super().describe(norm), "worst-case weights": f"r {self.r:g}, from epoch {begin}"}

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked
    ) -> Views:
        weighted = reached(run, self.begin_epoch, burn_in(run.model), released_epochs(run.model))
        views = super().forward(run, companions, images, labels, attacked)
        extra = {"weighted": weighted}
        if run.batch_mean is not None:
            # In float64, where exp does not overflow: a largest value to subtract would have to be all ranks'.
            raw = (cross_entropy(views.logits_adv, labels).detach().double() / self.r).exp()
            extra |= run.share(torch.where(weighted, raw, 1.0))
        return views._replace(extra=extra)

    def loss(self, views: Views) -> dict[str, Tensor]:
        each = cross_entropy(views.logits_adv, views.targets)
        weights = torch.where(views.extra["weighted"], done_weights(each, self.r), 1 / len(each))
        return {"ce_adv": weighed((weights * each).sum(), views)}
