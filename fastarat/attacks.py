"""Projected gradient descent as pure functions: randomness, BN mode and precision all come from the caller.

Source: Madry et al., ICLR 2018 (L-infinity PGD); the starts are those of each method's released code.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastarat.checks import (
    Norm,
    check_classes,
    check_images,
    check_labels,
    check_logits,
    check_pixels,
    checked_budget,
    checked_length,
    coerce,
    input_channels,
    logits_of,
    named,
    shown,
    whole,
    wide,
)
from fastarat.device import readable, waits
from fastarat.errors import UserError
from fastarat.kernels import interpreting, pgd_update, why_not_triton
from fastarat.nets.attacker import HALF, Attacker, frozen, mode_of
from fastarat.specs import Attack, Backend, Start, known, none_left, spec_of


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


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Per-image cross-entropy. logits: float [B, K]; target: int64 [B]. Returns float32 [B]."""
    return F.cross_entropy(wide(logits), target, reduction="none")


def kl(logits: Tensor, target: Tensor) -> Tensor:
    """Per-image KL(p_target || p). logits, target: float [B, K], target a constant. Returns float32 [B]."""
    log_target = F.log_softmax(wide(target), 1)
    return (log_target.exp() * (log_target - F.log_softmax(wide(logits), 1))).sum(1)


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """Per-image largest wrong logit minus the true one (Carlini and Wagner, 2017). Returns float32 [B]."""
    logits = wide(logits)
    true = logits.gather(1, target[:, None]).squeeze(1)
    is_true = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    return logits.masked_fill(is_true, -torch.inf).amax(1) - true


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "kl": kl, "cw": margin}


def objective_of(objective: str | Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the per-image loss an attack maximises, by name ("ce", "kl", "cw") or as given."""
    name = objective_name(objective)
    return name if callable(name) else OBJECTIVES[name]


def objective_name(objective: str | Callable) -> str | Callable:
    """Return the canonical name of an objective, or the function given. Raises: UserError for an unknown name."""
    return objective if callable(objective) else named("objective", objective, tuple(OBJECTIVES))


def checked_backend(key: str, backend: str, device: torch.device) -> str:
    """Return a kernel backend's canonical name. Raises: UserError for an unknown one, or Triton where it is not."""
    backend = named(key, backend, Backend.__args__)
    if backend == "triton" and not interpreting() and (reason := why_not_triton(device)) is not None:
        raise UserError(f"{key}=triton cannot be had here: {reason}; write {key}=auto")
    return backend


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
    Raises: UserError for an unknown kind or norm, a budget outside (0, 1], images of another type or shape.
    """
    kind, norm = named("start", kind, Start.__args__), named("norm", norm, Norm.__args__)
    check_images(images)
    epsilon = checked_length("epsilon", epsilon, norm, shape=images.shape)
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
    return _like(images).normal_(generator=generator).mul_(1e-3).add_(images)


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
    Raises: UserError for unknown names, budgets outside (0, 1], tensors of another type or shape. Values of tensors
        are not read, so that it can be called at every step and captured: images in [0, 1] and labels within the
        classes are the caller's to make sure of, as `PGD` and `TrainStep` do.
    Source: Madry et al., ICLR 2018, equation 2.
    """
    objective = objective_name(objective)
    num_steps, count = whole("num_steps", num_steps, 0), coerce(count, bool, "count")
    check_images(images)
    backend = checked_backend("backend", backend, images.device)
    epsilon, step_size, norm = checked_budget(epsilon, step_size, norm, shape=images.shape, read=False)
    check_images(start, "start")
    if start.shape != images.shape:
        raise UserError(f"start is {list(start.shape)}, images {list(images.shape)}: expected one shape")
    _check_target(target, objective, images)
    kappa = None
    if count:
        check_labels(labels, images)
        kappa = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)
    points, losses = start.detach(), []
    for _ in range(num_steps):
        logits, loss, grad = _gradient(forward, points, target, objective)
        losses.append(loss)
        if kappa is not None:
            kappa += logits.argmax(1) == labels
        step = pgd_update if norm == "linf" else _l2_update
        points = step(points, grad, images, epsilon=epsilon, step_size=step_size, backend=backend).detach()
    return Attacked(points, kappa, torch.stack(losses).sum() if losses else None)


def _gradient(
    forward: Callable[[Tensor], Tensor], points: Tensor, target: Tensor, objective: str | Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at `points`, the summed objective, and its gradient by the points."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        logits = forward(points)
        if not callable(objective):  # one's own may want something else of one's own forward
            check_logits(logits, points)
        if objective == "kl" and target.shape != logits.shape:
            raise UserError(f"target is {list(target.shape)}, the logits {list(logits.shape)}: expected one shape")
        loss = objective_of(objective)(logits, target).sum()
    (grad,) = torch.autograd.grad(loss, points)
    return logits.detach(), loss.detach(), grad


def _check_target(target: Tensor, objective: str | Callable, images: Tensor) -> None:
    if objective == "kl":
        if not isinstance(target, Tensor) or target.dim() != 2 or len(target) != len(images):
            raise UserError(
                f"target={shown(target)}: the objective kl takes the clean logits, float [{len(images)}, K]"
            )
    elif not callable(objective):
        check_labels(target, images, "target")


def strongest(
    forward: Callable[[Tensor], Tensor],
    attacks: Sequence[Callable[[], Attacked]],
    target: Tensor,
    objective: str | Callable[[Tensor, Tensor], Tensor] = "ce",
) -> Attacked:
    """Run several restarts and keep, image by image, the point of largest objective (one more forward each).

    attacks: callables without arguments, each a bound `pgd` with its own start. kappa is the smallest over restarts.
    Raises: UserError without attacks, for an unknown objective or a target of another type or shape.
    """
    objective = objective_name(objective)
    loss_of = objective_of(objective)
    if not attacks:
        raise UserError("strongest got no attacks: expected at least one, such as a bound `pgd`")

    def tried(attack: Callable[[], Attacked]) -> tuple[Attacked, Tensor]:
        result = attack()
        _check_target(target, objective, result.images)
        with torch.no_grad():
            return result, loss_of(forward(result.images), target)

    (kept, fewest, maximised), best = tried(attacks[0])
    objectives = [maximised]
    for attack in attacks[1:]:
        (images, kappa, maximised), loss = tried(attack)
        objectives.append(maximised)
        better = (loss > best)[:, None, None, None]
        kept, best = torch.where(better, images, kept), torch.maximum(best, loss)
        fewest = None if kappa is None or fewest is None else torch.minimum(kappa, fewest)
    sums = [value for value in objectives if value is not None]
    return Attacked(kept, fewest, torch.stack(sums).sum() if len(sums) == len(attacks) else None)


def starts_flat(objective: str | Callable, start: str) -> bool:
    """Whether an attack begins where half precision sees no gradient but rounding: KL a thousandth from its minimum.

    A first step in float32 (on a GPU, in TF32) leaves the place; from there on half precision attacks as well.
    """
    return objective == "kl" and start == "gaussian"


def first_then(first: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a forward that is `first` when it is called for the first time, and `rest` from then on."""
    forwards = itertools.chain((first,), itertools.repeat(rest))
    return lambda points: next(forwards)(points)


def craft(
    attack: Attack,
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    run: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Attacked],
    exact: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Attacked:
    """Attack once: what is climbed away from, a random start, `run`, and of several restarts the strongest.

    Args:
        attack: with start and objective set.
        logits: points -> logits [B, K], the network as the attack sees it.
        images, labels: as in `pgd`.
        run: (forward, target, start) -> Attacked, a bound `pgd` or a defense's own attack.
        exact: in full precision what `logits` is not, for an attack that `starts_flat`: it takes the first step, and
            makes the clean logits of its KL.
        generator: of the random start.
    """
    first = logits if exact is None else exact
    target = labels
    kind: Start = known(attack.start)
    if attack.objective == "kl":
        with torch.no_grad():
            target = first(images)

    def once() -> Attacked:
        start = random_start(images, epsilon=attack.epsilon, kind=kind, norm=attack.norm, generator=generator)
        return run(logits if first is logits else first_then(first, logits), target, start)

    if attack.num_restarts == 1:
        return once()
    return strongest(logits, [once] * attack.num_restarts, target, known(attack.objective))


def bound(attack: Attack, *, count: bool = False, backend: str = "auto") -> partial[Attacked]:
    """Return `pgd` with what `attack` says bound: a function (forward, images, labels, target, start)."""
    attack = attack.stepping()
    return partial(
        pgd,
        epsilon=attack.epsilon,
        step_size=known(attack.step_size),
        num_steps=attack.num_steps,
        objective=attack.objective or "ce",
        norm=attack.norm,
        count=count,
        backend=backend,
    )


class PGD:
    """PGD on a network as one function (images, labels) -> Attacked, ready to be captured.

    Parameters are frozen during the attack (input gradients only); the model's BatchNorm mode is `mode`.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] -> logits [B, K].
        attack: what is attacked; unset, its objective is "ce" and its start "uniform". `bn` is not read. Its fields
            may be given by name instead: PGD(model, epsilon=8 / 255, num_steps=20).
        mode: "eval" or "train" for the attack (the latter moves running statistics, as the model's own forward does),
            None leaves the model's own.
        precision: "fp32" leaves the model as it is; "bf16" and "fp16" cast its weights once per attack and run its
            forwards under autocast. Images, update and objective stay float32, and with objective="kl" from
            start="gaussian" the first step too.
        count: also count kappa.
        generator: source of the random start, on the model's device; default a new one with seed 0.
        backend: of the update kernel: "auto", "triton", "plain".
    Call: images float32 [B, C, H, W], labels int64 [B] -> Attacked. Every call (on a GPU the first of each
        shape) looks at the values: images in [0, 1], labels within the classes. During a capture nothing is read.
    Raises: UserError for unknown names, budgets and counts out of range, and (call) images or labels that are not so.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        attack: Attack | None = None,
        *,
        mode: Literal["eval", "train"] | None = "eval",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        count: bool = False,
        generator: torch.Generator | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise UserError(f"model={shown(model)}: expected an nn.Module; a function is attacked by `attacks.pgd`")
        self.precision = named("precision", precision, ("fp32", *HALF))
        attack = spec_of(Attack, attack, options).stepping()
        none_left(options, "PGD", Attack)
        start, objective = attack.start or "uniform", attack.objective or "ce"
        self.attack = dataclasses.replace(attack, start=start, objective=objective)
        self.model, self.mode = model, None if mode is None else named("mode", mode, ("eval", "train"))
        tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
        device = torch.device("cpu") if tensor is None else tensor.device
        self.generator = generator if generator is not None else torch.Generator(device).manual_seed(0)
        self.generators = (self.generator,)
        self._starts_exactly = self.precision != "fp32" and starts_flat(objective, start)
        self._count, self._seen = coerce(count, bool, "count"), set()
        self._pgd = bound(self.attack, count=self._count, backend=checked_backend("backend", backend, device))

    def _check(self, images: Tensor, labels: Tensor) -> bool:
        """Raise UserError for a batch that is not what the attack takes; whether its labels are still to be read."""
        check_images(images, channels=input_channels(self.model))
        reads_labels = self._count or self.attack.objective in ("ce", "cw")
        if reads_labels:
            check_labels(labels, images)
        if (waits(images) and images.shape in self._seen) or not readable(images):
            return False
        check_pixels(images)
        if not reads_labels:
            self._seen.add(images.shape)
        return reads_labels

    def __call__(self, images: Tensor, labels: Tensor) -> Attacked:
        unread = self._check(images, labels)
        training = self.model.training if self.mode is None else self.mode == "train"
        with frozen(self.model), mode_of(self.model, training):
            attacker = Attacker(self.model, precision=self.precision)
            attacker.refresh()

            first = True

            def checked(forward: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
                nonlocal first
                if not first:
                    return forward(points)
                first = False
                logits = logits_of(forward, points, self.model)
                if unread:  # how many classes there are is known from here on, before any loss
                    check_classes(labels, logits.shape[1])
                    self._seen.add(images.shape)
                return logits

            return craft(
                self.attack,
                partial(checked, attacker),
                images,
                labels,
                run=lambda forward, target, start: self._pgd(forward, images, labels, target, start),
                exact=partial(checked, self.model) if self._starts_exactly else None,
                generator=self.generator,
            )


def _l2_update(
    points: Tensor,
    grad: Tensor,
    centre: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    backend: str,
) -> Tensor:
    """`pgd_update`'s twin in the other norm, of which there is one kind: `backend` is not read."""
    grad = grad.float()
    moved = points + grad * (step_size / (_norm(grad) + 1e-10)) - centre
    length = _norm(moved)
    moved = moved * torch.clamp(epsilon / length.clamp_min(1e-12), max=1.0)
    return (centre + moved).clamp_(0, 1)


_like = partial(torch.empty_like, dtype=torch.float32, requires_grad=False)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
