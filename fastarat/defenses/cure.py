"""CURE: update only the weights that matter to both distributions, and stay consistent with a slow copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastarat.ascent import Attacked
from fastarat.defenses.base import Defense, Forward, Passes, Settings, Views, network_dtype, part_of, total
from fastarat.errors import UserError
from fastarat.losses import cross_entropy, kl_distance
from fastarat.nets.batchnorm import branch
from fastarat.specs import known


def quantile(values: Tensor, share: float) -> Tensor:
    """Quantile with linear interpolation, as `torch.quantile`, by selection instead of a whole sort.

    values: float, any shape and size. share: in [0, 1). Returns a 0-d tensor on the same device.
    """
    position = share * (values.numel() - 1)
    below = int(position)
    if values.numel() == 1:
        return values.flatten()[0]
    smallest = values.flatten().topk(below + 2, largest=False, sorted=False).values
    upper, lower = smallest.topk(2).values
    return torch.lerp(lower, upper, position - below)


def maskable(model: nn.Module, mode: str) -> dict[str, nn.Parameter]:
    """Return the parameters CURE masks, by name.

    rgp_soft: the first convolution of each residual block (its name holds "conv1" and it is not the stem); paper and
    rgp: everything but the classifier, the last nn.Linear. Raises: UserError when nothing is left.
    """
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    classifier = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    spared = stem if mode == "rgp_soft" else classifier
    spared = {id(p) for p in spared.parameters()} if spared is not None else set()
    kept = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in spared and (mode != "rgp_soft" or "conv1" in name)
    }
    if not kept:
        raise UserError(
            f"{type(model).__name__} has no parameter for defense.mode={mode} to mask (rgp_soft looks for conv1 inside "
            "residual blocks): write --defense.mode paper"
        )
    return kept


class Revision(nn.Module):
    """The slow copy of the student, always in train mode and without gradients.

    due, warm: 0-d float, 1 when this step's update is drawn, and during the natural epochs.
    forward: images float32 [2B, C, H, W], [clean; adv], each half normalised by itself -> logits [2B, K].
    """

    due: Tensor
    warm: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        dtype = network_dtype(network)
        self.register_buffer("due", torch.zeros((), dtype=dtype))
        self.register_buffer("warm", torch.zeros((), dtype=dtype))

    def forward(self, images: Tensor) -> Tensor:
        with branch(self.network, "clean", "adv"):
            return self.network(images)

    @torch.no_grad()
    def follow(self, student: nn.Module, step: Tensor, rate: float) -> None:
        """Move the parameters towards the student's: by max(rate, 1/(step + 1)) if due, wholly while warm."""
        towards = self.due * torch.clamp(1 / (step + 1).to(self.due), min=rate)
        towards = torch.maximum(towards, self.warm)
        own: list[Tensor] = [*self.network.parameters()]
        theirs: list[Tensor] = [*student.parameters()]
        moves = torch._foreach_sub(theirs, own)
        torch._foreach_mul_(moves, towards)
        torch._foreach_add_(own, moves)


_OF_PAPER = {"wrn-34-10": (0.5, 0.3, 0.5), "preactresnet18": (0.2, 0.2, 1.0)}
"""The paper's p, alpha and gamma for networks other than ResNet-18."""


@dataclass(frozen=True, kw_only=True)
class CURE(Defense):
    """Minimise CE(f(x), y) + beta KL(p(x) || p(x')) + gamma L_CR with a share p of each tensor's gradients set to 0.

    L_CR = KL(p_rev(x) || p(x)) + KL(p_rev(x') || p(x')), rev a slow copy updated at random steps. The first argument
    of each KL is a constant. Of each tensor, the gradients whose score lies below its p-quantile become 0:

    - mode "paper": score alpha |dCE(x)/dw| + (1 - alpha) |dCE(x')/dw|, every tensor but the classifier's.
    - "rgp" (released): minimise alpha CE(x) + (1 - alpha) CE(x') + gamma L_CR, score |its gradient|, same tensors.
    - "rgp_soft" (released): score alpha dCE(x)/dw + (1 - alpha) dKL/dw, signed, first convolution of each block only.

    A zero gradient is no frozen weight: momentum and weight decay still move it, as released. Student and copy start
    from a `standard` run; without one, `warmup_epochs` of natural training come first (CURE-Eff): the attack's result
    is then replaced by the clean images and no gradient is masked, so those epochs cost what the others do. With a
    `TrainStep` of your own, load the standard run first: `fastarat.runs.load_start(defense, model)`.

    Source: Gowda, Zonooz and Arani, ICLR 2024 (arXiv 2401.14948), p, alpha, gamma of ResNet-18 on CIFAR (for SVHN
    alpha 0.2). Which mode made the paper's numbers is not established.
    """

    name: ClassVar[str] = "cure"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"
    starts_from: ClassVar[str] = "pretrained"
    start_otherwise: ClassVar[str] = "; or spend the run's first epochs on it: --defense.warmup-epochs 40 (CURE-Eff)"
    formula: ClassVar[str] = (
        "CE(f(x), y) + beta KL(p(x) || p(x')) + gamma [KL(p_rev(x) || p(x)) + KL(p_rev(x') || p(x'))], gradients masked"
    )
    objective: ClassVar[str] = "kl"
    regularizers: ClassVar[tuple[str, ...]] = ("kl", "consistency")
    start: ClassVar[str] = "gaussian"
    recipe: ClassVar[str] = "cure"
    released_budget: ClassVar[tuple[float, float]] = (0.031, 0.007)
    also_released: ClassVar[dict[str, tuple]] = {
        "defense.mode": ("rgp", "rgp_soft"),
        "optim.recipe": ("cure-200",),
        "defense.p": (0.0,),
    }

    mode: Literal["paper", "rgp", "rgp_soft"] = field(default="paper", metadata={"help": "which gradients are masked"})
    p: float = field(default=0.3, metadata={"help": "share of each tensor's gradients set to 0 (0.3: the paper's 30)"})
    alpha: float = field(default=0.1, metadata={"help": "share of the clean images in the score (rgp: in the loss)"})
    beta: float = field(default=5.0, metadata={"help": "weight of the KL (paper and rgp_soft)", "range": "[0, inf)"})
    gamma: float = field(
        default=1.0, metadata={"help": "weight of the consistency with the slow copy", "range": "[0, inf)"}
    )
    r: float = field(default=0.2, metadata={"help": "probability of updating the slow copy at a step"})
    decay: float = field(default=0.999, metadata={"help": "of the slow copy, at an update"})
    r_halved_every: int | None = field(
        default=None,
        metadata={"help": "halve r at every so many epochs after epoch 100, such as 20 (default: constant)"},
    )
    pretrained: str | None = field(
        default=None, metadata={"help": "run folder or checkpoint of a `standard` run to start from"}
    )
    warmup_epochs: int = field(default=0, metadata={"help": "natural epochs first, in place of `pretrained`"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p < 1:
            raise UserError(
                f"defense.p={self.p:g} is outside [0, 1): it is a share; write {self.p / 100:g} for {self.p:g} %"
            )
        for name in ("alpha", "r", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"defense.{name}={getattr(self, name):g} is outside [0, 1]")
        if self.warmup_epochs < 0 or (self.r_halved_every is not None and self.r_halved_every < 1):
            raise UserError("defense.warmup_epochs counts from 0 and defense.r_halved_every from 1")

    @property
    def needs_clean(self) -> bool:
        return self.mode == "rgp"

    @property
    def needs_start(self) -> bool:
        return self.pretrained is not None or self.warmup_epochs == 0

    def equals_default(self, run: Settings) -> dict[str, object]:
        names = ("defense.p", "defense.alpha", "defense.gamma")
        return dict(zip(names, _OF_PAPER[run.model], strict=True)) if run.model in _OF_PAPER else {}

    def departures(self, run: Settings) -> tuple[str, ...]:
        found = super().departures(run)
        if self.mode == "paper" and self.p:
            found += (
                "the mask is the paper's; the released command masks nothing (--defense.p 0), and the masks in "
                "its code are other ones (--defense.mode rgp, or rgp_soft)",
            )
        of_paper = _OF_PAPER.get(run.model)
        if of_paper and self.p and (self.p, self.alpha, self.gamma) != of_paper:
            p, alpha, gamma = of_paper
            found += (
                f"p, alpha and gamma are not the paper's for {run.model} (--defense.p {p:g} --defense.alpha "
                f"{alpha:g} --defense.gamma {gamma:g})",
            )
        if self.r_halved_every:
            found += (
                f"r is halved every {self.r_halved_every} epochs after epoch 100; the release's option halves it "
                "at every step",
            )
        return found

    def describe(self, norm: str) -> dict[str, str]:
        begin = f"the standard run {self.pretrained}" if self.pretrained else f"{self.warmup_epochs} natural epochs"
        masks = f"mode {self.mode}, {self.p:.0%} of each tensor, alpha {self.alpha:g}"
        return {**super().describe(norm), "starts from": begin, "gradient mask": masks}

    def passes(self) -> Passes:
        # The score takes a gradient of each loss; the slow copy sees both halves.
        return Passes(2, 2 if self.mode == "rgp" else 4, 2)

    def companions(self, model: nn.Module, example: Tensor) -> nn.ModuleDict:
        maskable(model, self.mode)
        return nn.ModuleDict({"revision": Revision(copy.deepcopy(model))})

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked
    ) -> Views:
        revision = part_of(companions, "revision", Revision)
        warm = run.epoch <= self.warmup_epochs
        images_adv = attacked.images
        if self.warmup_epochs:
            # Two equal halves: the KL and, the copy being the student, L_CR vanish, and no statistic sees an attack.
            images_adv = torch.where(warm, images, images_adv)
        both = torch.cat([images, images_adv])
        if self.mode == "rgp":
            clean, adv = run(both, "clean", "adv")[0].chunk(2)
        else:
            # Two forwards, so that the gradients for the score go back through their own half only.
            clean, adv = run(images, "clean")[0], run(images_adv, "adv")[0]
        with torch.no_grad():
            slow_clean, slow_adv = run.companion(revision, both).chunk(2)
            r = torch.full_like(run.epoch, self.r)
            if self.r_halved_every:
                r = r * 0.5 ** ((run.epoch - 101) / self.r_halved_every).floor().clamp(min=0)
            revision.due.copy_(torch.rand((), generator=run.generator, device=images.device) < r)
            revision.warm.copy_(warm)
        extra = {"slow_clean": slow_clean, "slow_adv": slow_adv, "warm": warm}
        return run.views(labels, logits_clean=clean, logits_adv=adv, extra=extra)

    def loss(self, views: Views) -> dict[str, Tensor]:
        clean, adv = views.logits_clean, views.logits_adv
        ce_clean = cross_entropy(clean, views.targets).mean()
        if self.mode == "rgp":
            ce_adv = cross_entropy(adv, views.targets).mean()
            terms = {"ce_clean": self.alpha * ce_clean, "ce_adv": (1 - self.alpha) * ce_adv}
        else:
            terms = {"ce_clean": ce_clean, "kl": self.beta * kl_distance(adv, clean.detach())}
        slow_clean, slow_adv = views.extra["slow_clean"], views.extra["slow_adv"]
        consistency = kl_distance(clean, slow_clean.detach()) + kl_distance(adv, slow_adv.detach())
        return {**terms, "consistency": self.gamma * consistency}

    def backward(
        self, terms: dict[str, Tensor], model: nn.Module, scale: Callable[[Tensor], Tensor], views: Views
    ) -> None:
        masked = list(maskable(model, self.mode).values())
        scores: list[Tensor] = []
        if self.mode != "rgp":
            second = kl_distance(views.logits_adv, views.logits_clean.detach())
            if self.mode == "paper":
                second = cross_entropy(views.logits_adv, views.targets).mean()
            first = cross_entropy(views.logits_clean, views.targets).mean()
            of_clean, of_adv = (torch.autograd.grad(scale(loss), masked, retain_graph=True) for loss in (first, second))
            size = torch.abs if self.mode == "paper" else torch.Tensor.detach
            scores = [self.alpha * size(c) + (1 - self.alpha) * size(a) for c, a in zip(of_clean, of_adv, strict=True)]
        scale(total(terms)).backward()
        with torch.no_grad():
            gradients = [known(p.grad) for p in masked]
            for gradient, score in zip(gradients, scores or [g.abs() for g in gradients], strict=True):
                keep = score >= quantile(score, self.p)
                if self.warmup_epochs:
                    keep = keep | views.extra["warm"]
                # A product, so that an overflow in half precision still shows in what is masked.
                gradient.mul_(keep)

    def after_step(self, companions: nn.ModuleDict, model: nn.Module, step: Tensor) -> None:
        part_of(companions, "revision", Revision).follow(model, step, 1 - self.decay)
