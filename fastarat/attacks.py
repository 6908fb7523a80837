"""PGD for everybody: the functions of `fastarat.ascent` with their inputs checked, and `PGD` on a network.

Source: Madry et al., ICLR 2018 (L-infinity PGD); the starts are those of each method's released code.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastarat import ascent
from fastarat.ascent import OBJECTIVES, Attacked, Maximised, bound, craft, kl, margin, starts_flat
from fastarat.checks import (
    check_classes,
    check_images,
    check_labels,
    check_logits,
    check_pixels,
    input_channels,
    logits_of,
)
from fastarat.device import readable, waits
from fastarat.errors import UserError
from fastarat.nets.attacker import HALF, Attacker, frozen, mode_of
from fastarat.specs import Attack, Start, checked_backend, none_left, spec_of
from fastarat.values import Norm, checked_budget, checked_length, coerce, named, shown, whole

__all__ = ["PGD", "Attacked", "kl", "margin", "objective_name", "pgd", "random_start", "strongest"]


def objective_name(objective: str | Callable) -> str | Callable:
    """Return the canonical name of an objective, or the function given. Raises: UserError for an unknown name."""
    return objective if callable(objective) else named("objective", objective, tuple(OBJECTIVES))


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
    return ascent.draw_start(images, epsilon=epsilon, kind=kind, norm=norm, generator=generator)


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
    if count:
        check_labels(labels, images)
    options = {"epsilon": epsilon, "step_size": step_size, "num_steps": num_steps, "norm": norm}
    options |= {"objective": objective, "count": count, "backend": backend}
    # One's own objective may want something else of one's own forward than logits.
    checked = forward if callable(objective) else partial(_checked_logits, forward, target, objective)
    return ascent.ascend(checked, images, labels, target, start, **options)


def _checked_logits(forward: Callable[[Tensor], Tensor], target: Tensor, objective: str, points: Tensor) -> Tensor:
    logits = forward(points)
    check_logits(logits, points)
    if objective == "kl" and target.shape != logits.shape:
        raise UserError(f"target is {list(target.shape)}, the logits {list(logits.shape)}: expected one shape")
    return logits


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
    objective: str | Maximised = "ce",
) -> Attacked:
    """Run several restarts and keep, image by image, the point of largest objective (one more forward each).

    attacks: callables without arguments, each a bound `pgd` with its own start. kappa is the smallest over restarts.
    Raises: UserError without attacks, for an unknown objective or a target of another type or shape.
    """
    objective = objective_name(objective)
    if not attacks:
        raise UserError("strongest got no attacks: expected at least one, such as a bound `pgd`")

    def checked(attack: Callable[[], Attacked]) -> Attacked:
        result = attack()
        _check_target(target, objective, result.images)
        return result

    return ascent.strongest(forward, [partial(checked, attack) for attack in attacks], target, objective)


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
        spec = self.attack
        checked_budget(spec.epsilon, spec.step_size, spec.norm, shape=images.shape, read=False)
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
