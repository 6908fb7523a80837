"""Projected gradient descent as pure functions: randomness, BN mode and precision all come from the caller.

Source: Madry et al., ICLR 2018 (L-infinity PGD); the starts are those of each method's released code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fastarat.errors import unknown
from fastarat.kernels import pgd_update

Norm = Literal["linf", "l2"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that store weights and activations in 16 bits, by name."""
Start = Literal["none", "uniform", "uniform-unclamped", "gaussian", "l2"]


class Attacked(NamedTuple):
    """Result of an attack.

    images: float32 [B, C, H, W], within epsilon of the centre and within [0, 1].
    kappa: int64 [B], steps whose current point (before that step) was still classified correctly, or None.
    objective: float [], what was maximised, summed over images and steps, or None. Where it is not finite the attack
        has stood still at some step, since a NaN has no sign: a caller that does not look trains on weak attacks.
    """

    images: Tensor
    kappa: Tensor | None
    objective: Tensor | None = None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Per-image cross-entropy. logits: float [B, K]; target: int64 [B]. Returns float32 [B]."""
    return F.cross_entropy(_wide(logits), target, reduction="none")


def kl(logits: Tensor, target: Tensor) -> Tensor:
    """Per-image KL(p_target || p). logits, target: float [B, K], target a constant. Returns float32 [B]."""
    log_target = F.log_softmax(_wide(target), 1)
    return (log_target.exp() * (log_target - F.log_softmax(_wide(logits), 1))).sum(1)


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """Per-image largest wrong logit minus the true one (Carlini and Wagner, 2017). Returns float32 [B]."""
    logits = _wide(logits)
    true = logits.gather(1, target[:, None]).squeeze(1)
    is_true = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    return logits.masked_fill(is_true, -torch.inf).amax(1) - true


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "kl": kl, "cw": margin}


def objective_of(objective: str | Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the per-image loss an attack maximises, by name ("ce", "kl", "cw") or as given."""
    if callable(objective):
        return objective
    if objective not in OBJECTIVES:
        raise unknown("attack objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]


def random_start(
    images: Tensor,
    *,
    epsilon: float | Tensor,
    kind: Start = "uniform",
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a random point near `images`, which stay unchanged.

    Args:
        images: float32 [B, C, H, W] in [0, 1].
        epsilon: budget in pixel units, 1.0 the full range.
        kind: "none"; "uniform" (U(-epsilon, epsilon), clamped to [0, 1]); "uniform-unclamped" (AR-AT's released
            code); "gaussian" (1e-3 N(0, 1), unclamped: TRADES, MART, LBGAT, CURE); "l2" (a Gaussian direction of
            length U(0, 1) epsilon, clamped). With norm="l2", "uniform" means "l2".
        generator: on the device of `images`; None uses torch's default one.
    Returns: float32 [B, C, H, W], same memory format.
    Raises: UserError for an unknown kind.
    """
    if kind == "none":
        return images.clone()
    if kind in ("l2", "uniform") and (norm == "l2" or kind == "l2"):
        direction = _like(images).normal_(generator=generator)
        length = torch.rand(images.shape[0], 1, 1, 1, device=images.device, generator=generator) * epsilon
        return (images + direction * (length / _norm(direction))).clamp_(0, 1)
    if kind in ("uniform", "uniform-unclamped"):
        noise = _like(images).uniform_(-1, 1, generator=generator)
        start = noise.mul_(epsilon).add_(images)
        return start.clamp_(0, 1) if kind == "uniform" else start
    if kind == "gaussian":
        return _like(images).normal_(generator=generator).mul_(1e-3).add_(images)
    raise unknown("attack start", kind, Start.__args__)


def pgd(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor | None,
    target: Tensor,
    start: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: int,
    objective: str | Callable[[Tensor, Tensor], Tensor] = "ce",
    norm: Norm = "linf",
    count: bool = False,
    backend: str = "auto",
) -> Attacked:
    """Ascend `objective` by projected gradient steps from `start`, staying within epsilon of `images`.

    Pure: writes to none of its inputs, touches no `.grad`, mode flag or global generator; a running statistic moves
    only if `forward` moves it. The per-image objectives are summed: only the direction of each image's gradient
    matters, and a sum cannot underflow the way a mean can in half precision.

    Args:
        forward: images -> logits [B, K]; decides BN mode, branch and precision.
        images: float32 [B, C, H, W], the centre of the ball.
        labels: int64 [B], read only when `count`.
        target: labels for "ce" and "cw", clean logits [B, K] for "kl".
        start: float32 [B, C, H, W], first point; need not lie in the ball, every later point does.
        epsilon, step_size: pixel units, float or 0-d float32 tensor on the device.
        num_steps: gradient steps; 0 returns the start.
        norm: "linf": x <- clip01(clip_eps(x + step sign(g))). "l2": step along g / (||g|| + 1e-10), then scale back
            onto the ball, then clip to [0, 1].
        count: also count kappa, the steps at which each image was still classified correctly (GAIRAT).
        backend: of the update kernel: "auto", "triton", "plain".
    Returns: Attacked(images, kappa, objective).
    Source: Madry et al., ICLR 2018, equation 2.
    """
    loss_of = objective_of(objective)
    kappa = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device) if count else None
    points, losses = start, []
    for _ in range(num_steps):
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = forward(points)
            loss = loss_of(logits, target).sum()
        (grad,) = torch.autograd.grad(loss, points)
        losses.append(loss.detach())
        if count:
            kappa += logits.detach().argmax(1) == labels
        if norm == "linf":
            points = pgd_update(points.detach(), grad, images, epsilon=epsilon, step_size=step_size, backend=backend)
        else:
            points = _l2_update(points.detach(), grad, images, epsilon, step_size)
    return Attacked(points.detach(), kappa, torch.stack(losses).sum() if losses else None)


def strongest(
    forward: Callable[[Tensor], Tensor],
    attacks: Sequence[Callable[[], Attacked]],
    target: Tensor,
    objective: str | Callable[[Tensor, Tensor], Tensor] = "ce",
) -> Attacked:
    """Run several restarts and keep, image by image, the point of largest objective (one more forward each).

    attacks: callables without arguments, each a bound `pgd` with its own start. kappa is the smallest over restarts.
    """
    loss_of = objective_of(objective)
    best: Tensor | None = None
    objectives = []
    for attack in attacks:
        images, kappa, objective = attack()
        objectives.append(objective)
        with torch.no_grad():
            loss = loss_of(forward(images), target)
        if best is None:
            best, kept, fewest = loss, images, kappa
            continue
        better = (loss > best)[:, None, None, None]
        kept, best = torch.where(better, images, kept), torch.maximum(best, loss)
        fewest = None if kappa is None else torch.minimum(kappa, fewest)
    return Attacked(kept, fewest, None if None in objectives else torch.stack(objectives).sum())


def starts_flat(objective: str | Callable, start: str) -> bool:
    """Whether an attack begins where half precision sees no gradient but rounding: KL a thousandth from its minimum.

    A first step in float32 (on a GPU, in TF32) leaves the place; from there on half precision attacks as well.
    """
    return objective == "kl" and start == "gaussian"


def first_then(first: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a forward that is `first` when it is called for the first time, and `rest` from then on."""
    forwards = itertools.chain((first,), itertools.repeat(rest))
    return lambda points: next(forwards)(points)


class PGD:
    """PGD on a network as one function (images, labels) -> Attacked, ready to be captured.

    Parameters are frozen during the attack (input gradients only); the model's BatchNorm mode is `mode`.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] -> logits [B, K].
        epsilon, step_size: pixel units; step_size defaults to epsilon / 4.
        num_steps, objective, norm, backend: as in `pgd`. start: as in `random_start`.
        mode: "eval" or "train" for the attack (the latter moves running statistics, as the model's own forward does),
            None leaves the model's own.
        precision: "fp32" leaves the model as it is; "bf16" and "fp16" cast its weights once per attack and run its
            forwards under autocast. Images, update and objective stay float32, and with objective="kl" from
            start="gaussian" the first step too.
        count: also count kappa.
        generator: source of the random start, on the model's device; default a new one with seed 0.
    Call: images float32 [B, C, H, W], labels int64 [B] -> Attacked.
    Raises: UserError for an unknown precision.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        epsilon: float | Tensor,
        step_size: float | Tensor | None = None,
        num_steps: int = 10,
        objective: str | Callable[[Tensor, Tensor], Tensor] = "ce",
        norm: Norm = "linf",
        start: Start = "uniform",
        mode: Literal["eval", "train"] | None = "eval",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        count: bool = False,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> None:
        if precision not in ("fp32", *HALF):
            raise unknown("precision", precision, ("fp32", *HALF))
        self.dtype = HALF.get(precision)
        self.model, self.epsilon, self.norm, self.start, self.mode = model, epsilon, norm, start, mode
        self.objective = objective
        device = next(model.parameters()).device
        self.generator = generator if generator is not None else torch.Generator(device).manual_seed(0)
        self.generators = (self.generator,)
        step_size = epsilon / 4 if step_size is None else step_size
        self._pgd = partial(
            pgd,
            epsilon=epsilon,
            step_size=step_size,
            num_steps=num_steps,
            objective=objective,
            norm=norm,
            count=count,
            backend=backend,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> Attacked:
        with (
            frozen(self.model),
            mode_of(self.model, self.model.training if self.mode is None else self.mode == "train"),
        ):
            forward = self._forward()
            flat = self.dtype is not None and starts_flat(self.objective, self.start)
            target = labels
            if self.objective == "kl":
                with torch.no_grad():
                    target = (self.model if flat else forward)(images)
            if flat:
                forward = first_then(self.model, forward)
            start = random_start(
                images, epsilon=self.epsilon, kind=self.start, norm=self.norm, generator=self.generator
            )
            return self._pgd(forward, images, labels, target, start)

    def _forward(self) -> Callable[[Tensor], Tensor]:
        if self.dtype is None:
            return self.model
        # Once for all forwards: autocast alone would cast every weight at each of them, or keep a cast of old ones.
        weights = {n: p.detach().to(self.dtype) for n, p in self.model.named_parameters() if p.dim() >= 2}

        def forward(points: Tensor) -> Tensor:
            with torch.autocast(points.device.type, dtype=self.dtype, cache_enabled=False):
                return functional_call(self.model, weights, (points,))

        return forward


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Take gradients away from the parameters inside the block: an attack needs input gradients only."""
    moving = [p for p in model.parameters() if p.requires_grad]
    for p in moving:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in moving:
            p.requires_grad_(True)


@contextmanager
def mode_of(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """Put `model` into train or eval mode inside the block."""
    before = model.training
    if before != training:
        model.train(training)
    try:
        yield
    finally:
        if before != training:
            model.train(before)


def _l2_update(points: Tensor, grad: Tensor, centre: Tensor, epsilon, step_size) -> Tensor:
    grad = grad.float()
    moved = points + grad * (step_size / (_norm(grad) + 1e-10)) - centre
    length = _norm(moved)
    moved = moved * torch.clamp(epsilon / length.clamp_min(1e-12), max=1.0)
    return (centre + moved).clamp_(0, 1)


_like = partial(torch.empty_like, dtype=torch.float32, requires_grad=False)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
