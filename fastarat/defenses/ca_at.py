"""CA-AT: conflict-aware adversarial training, which keeps the update near the clean gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastarat.ascent import Attacked
from fastarat.defenses.base import Defense, Forward, Passes, Settings, Views
from fastarat.errors import UserError
from fastarat.losses import conflict_aware, cross_entropy


@dataclass(frozen=True, kw_only=True)
class CAAT(Defense):
    """Follow g_c = grad CE(f(x), y) when g_a = grad CE(f(x'), y) agrees with it, else g_a tilted until it does.

    With phi = cos(g_a, g_c): phi >= threshold takes g_c alone; otherwise g_a + mu g_c, with mu such that its cosine to
    g_c is the threshold. Norms and phi are float32, and nothing is read on the host.

    Source: Xue, Wang, Qin and Pedarsani, 2024 (arXiv 2410.16579), released CIFAR-10 script.
    """

    name: ClassVar[str] = "ca-at"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"
    formula: ClassVar[str] = "CE(f(x), y) and CE(f(x'), y), their gradients combined at a bounded angle"
    recipe: ClassVar[str] = "ca-at"
    also_released: ClassVar[dict[str, tuple]] = {"batch_size": (1024,), "optim.lr": (0.4,)}

    threshold: float = field(default=0.9, metadata={"help": "smallest cosine of the update to the clean gradient"})
    per_tensor: bool = field(default=False, metadata={"help": "apply the rule to each parameter tensor by itself"})
    normalize: bool = field(default=False, metadata={"help": "scale both gradients to unit length first"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise UserError(f"defense.threshold={self.threshold:g} is outside [0, 1): it is a cosine, such as 0.9")

    def departures(self, run: Settings) -> tuple[str, ...]:
        found = super().departures(run)
        if (run.batch_size, run.lr) != (1024, 0.4):
            found += (
                f"batches of {run.batch_size} with a peak learning rate of {run.lr:g}; the release has 1024 and "
                "0.4 (--batch-size 1024 --optim.lr 0.4)",
            )
        return (*found, "the release replaces NaN in the gradient by 0, which hides a diverged run: left out")

    def passes(self) -> Passes:
        return Passes(2, 2)

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked
    ) -> Views:
        # Two forwards, so that each gradient goes back through its own half only.
        clean, _ = run(images, "clean")
        adv, _ = run(attacked.images, "adv")
        return run.views(labels, logits_clean=clean, logits_adv=adv)

    def loss(self, views: Views) -> dict[str, Tensor]:
        return {
            "ce_clean": cross_entropy(views.logits_clean, views.targets).mean(),
            "ce_adv": cross_entropy(views.logits_adv, views.targets).mean(),
        }

    def backward(
        self, terms: dict[str, Tensor], model: nn.Module, scale: Callable[[Tensor], Tensor], views: Views
    ) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        # Made again from the logits: a compiled loss is one node, and each gradient would go back through both halves.
        terms = self.loss(views)
        clean = torch.autograd.grad(scale(terms["ce_clean"]), parameters, materialize_grads=True)
        adv = torch.autograd.grad(scale(terms["ce_adv"]), parameters, materialize_grads=True)
        combined = conflict_aware(clean, adv, self.threshold, per_tensor=self.per_tensor, normalize=self.normalize)
        for p, g in zip(parameters, combined, strict=True):
            p.grad = g
