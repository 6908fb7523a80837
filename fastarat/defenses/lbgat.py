"""LBGAT: a natural classifier, trained alongside, guides the robust network's logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastarat import losses
from fastarat.ascent import Attacked
from fastarat.defenses.base import Defense, Forward, Passes, Settings, Views
from fastarat.nets.batchnorm import BatchNorm2d, grouped_batchnorm, set_backend
from fastarat.nets.models import Normalize, build_model


def natural_network(name: str | None, model: nn.Module, example: Tensor) -> nn.Module:
    """Build LBGAT's natural network g for student `model`: its classes, its input normalisation, its kernels.

    name: as in `build_model`; None: the released "resnet18-lbgat", or "resnet-small" for images under 32 pixels.
    """
    size = min(example.shape[2:])
    name = name or ("resnet18-lbgat" if size >= 32 else "resnet-small")
    training = model.training
    with torch.no_grad():
        num_classes = model.eval()(example).shape[1]
    model.train(training)
    normalize = next((m for m in model.modules() if isinstance(m, Normalize)), None)
    mean, std = (None, None) if normalize is None else (v.flatten().tolist() for v in (normalize.mean, normalize.std))
    teacher = grouped_batchnorm(
        build_model(name, num_classes=num_classes, in_channels=example.shape[1], image_size=size, mean=mean, std=std)
    )
    set_backend(teacher, next((m.backend for m in model.modules() if isinstance(m, BatchNorm2d)), "auto"))
    return teacher


@dataclass(frozen=True, kw_only=True)
class LBGAT(Defense):
    """Minimise MSE(f(x'), g(x)) + CE(g(x), y) + beta KL(p_f(x) || p_f(x')) over f and g together.

    x' maximises the KL of f, also when beta is 0. Both networks share one optimiser; only f is attacked and tested.
    f's running statistics see x' and then x: for beta 0 the forward of x serves them alone and carries no gradient.

    Source: Cui et al., ICCV 2021 (arXiv 2011.11164); its robust network is WRN-34-10, its natural one the default here.
    """

    name: ClassVar[str] = "lbgat"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"
    formula: ClassVar[str] = "MSE(f(x'), g(x)) + CE(g(x), y) + beta KL(p_f(x) || p_f(x'))"
    objective: ClassVar[str] = "kl"
    start: ClassVar[str] = "gaussian"
    needs_clean: ClassVar[bool] = True
    updates: ClassVar[tuple[str, ...]] = ("adv", "clean")
    recipe: ClassVar[str] = "lbgat"
    released_budget: ClassVar[tuple[float, float]] = (0.031, 0.007)
    also_released: ClassVar[dict[str, tuple]] = {"defense.beta": (6.0,), "defense.teacher": ("resnet18-lbgat",)}

    beta: float = field(
        default=0.0, metadata={"help": "weight of the KL: LBGAT0 and LBGAT6 are 0 and 6", "range": "[0, inf)"}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "natural network (default: resnet18-lbgat as released; resnet-small under 32 pixels)"},
    )
    detach_teacher: bool = field(
        default=False, metadata={"help": "keep the MSE's gradient out of the natural network (not as released)"}
    )

    def departures(self, run: Settings) -> tuple[str, ...]:
        found = super().departures(run)
        if self.teacher is None and run.image_size < 32:
            found += (
                "the natural network is resnet-small, for images under 32 pixels; the release's is a ResNet-18 "
                "(--defense.teacher resnet18-lbgat)",
            )
        if run.model != "wrn-34-10":
            found += (f"the release trains WRN-34-10; {run.model} is our choice (--model wrn-34-10)",)
        return found

    def describe(self, norm: str) -> dict[str, str]:
        teacher = self.teacher or "resnet18-lbgat (resnet-small for images under 32 pixels)"
        stopped = ", without the MSE's gradient" if self.detach_teacher else ""
        return {**super().describe(norm), "natural network": f"{teacher}, trained alongside{stopped}, unused at test"}

    def passes(self) -> Passes:
        # Without the KL the clean batch only moves running statistics.
        return Passes(2, 2 if self.beta else 1, 1, 1)

    def companions(self, model: nn.Module, example: Tensor) -> nn.ModuleDict:
        return nn.ModuleDict({"teacher": natural_network(self.teacher, model, example)})

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked
    ) -> Views:
        if self.beta:
            views = super().forward(run, companions, images, labels, attacked)
        else:
            adv, _ = run(attacked.images, "adv")
            with torch.no_grad():
                clean, _ = run(images, "clean")
            views = run.views(labels, logits_clean=clean, logits_adv=adv)
        return views._replace(extra={"logits_teacher": run.companion(companions["teacher"], images)})

    def loss(self, views: Views) -> dict[str, Tensor]:
        return losses.lbgat(
            views.logits_clean,
            views.logits_adv,
            views.extra["logits_teacher"],
            views.targets,
            self.beta,
            detach_teacher=self.detach_teacher,
        )
