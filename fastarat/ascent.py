"""The attack itself: a random start, projected gradient ascent, the strongest of several restarts.

Pure functions: randomness, BatchNorm mode and precision all come from the caller, and nothing is checked, because this
runs inside every training step. `fastarat.attacks` has the same for everybody else, with its inputs checked.

Source: Madry et al., ICLR 2018 (L-infinity PGD); the starts are those of each method's released code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastarat.distributed import drawn
from fastarat.kernels import pgd_update
from fastarat.losses import cross_entropy, wide
from fastarat.specs import Attack, Start, known
from fastarat.values import Norm

Forward = Callable[[Tensor], Tensor]
"""points float32 [B, C, H, W] -> logits [B, K]; decides BatchNorm mode, branch and precision."""
Maximised = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, K], target) -> float [B], what an attack maximises for each image."""


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


OBJECTIVES: dict[str, Maximised] = {"ce": cross_entropy, "kl": kl, "cw": margin}


def objective_of(objective: str | Maximised) -> Maximised:
    """Return the per-image loss an attack maximises, by its canonical name or as given."""
    return objective if callable(objective) else OBJECTIVES[objective]


def draw_start(
    images: Tensor,
    *,
    epsilon: float | Tensor,
    kind: Start,
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a random point near `images`: `attacks.random_start`, unchecked."""
    if kind == "none":
        return images.clone()
    normal = partial(Tensor.normal_, generator=generator)
    if kind in ("l2", "uniform") and (norm == "l2" or kind == "l2"):
        direction = drawn(normal, images, generator)
        length = drawn(lambda t: t.uniform_(0, 1, generator=generator), images[:, :1, :1, :1], generator) * epsilon
        return (images + direction * (length / _norm(direction))).clamp_(0, 1)
    if kind in ("uniform", "uniform-unclamped"):
        noise = drawn(lambda t: t.uniform_(-1, 1, generator=generator), images, generator)
        start = noise.mul_(epsilon).add_(images)
        return start.clamp_(0, 1) if kind == "uniform" else start
    return drawn(normal, images, generator).mul_(1e-3).add_(images)


def ascend(
    forward: Forward,
    images: Tensor,
    labels: Tensor | None,
    target: Tensor,
    start: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: int,
    objective: str | Maximised = "ce",
    norm: Norm = "linf",
    count: bool = False,
    backend: str = "auto",
) -> Attacked:
    """Ascend `objective` from `start`, staying within epsilon of `images`: `attacks.pgd`, unchecked."""
    kappa = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device) if count else None
    loss_of, update = objective_of(objective), pgd_update if norm == "linf" else _l2_update
    points, losses, ones = start.detach(), [], None
    for _ in range(num_steps):
        points = points.requires_grad_()
        with torch.enable_grad():
            logits = forward(points)
            loss = loss_of(logits, target)
        # Of the sum, not the mean: only each image's own gradient's direction matters, and a mean underflows in fp16.
        ones = torch.ones_like(loss) if ones is None else ones
        (grad,) = torch.autograd.grad(loss, points, ones)
        losses.append(loss.detach().sum())
        if kappa is not None:
            kappa += logits.detach().argmax(1) == labels
        # Detached before the update, not only after: the update itself must leave no trace in autograd.
        points = points.detach()
        points = update(points, grad, images, epsilon=epsilon, step_size=step_size, backend=backend).detach()
    return Attacked(points, kappa, torch.stack(losses).sum() if losses else None)


def strongest(
    forward: Forward, attacks: Sequence[Callable[[], Attacked]], target: Tensor, objective: str | Maximised
) -> Attacked:
    """Run several restarts and keep, image by image, the point of largest objective: `attacks.strongest`, unchecked."""
    loss_of = objective_of(objective)

    def tried(attack: Callable[[], Attacked]) -> tuple[Attacked, Tensor]:
        result = attack()
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
    if attack.objective == "kl":  # labels may be shares of the classes: the cross-entropy takes either
        with torch.no_grad():
            target = first(images)

    def once() -> Attacked:
        start = draw_start(images, epsilon=attack.epsilon, kind=kind, norm=attack.norm, generator=generator)
        return run(logits if first is logits else first_then(first, logits), target, start)

    if attack.num_restarts == 1:
        return once()
    return strongest(logits, [once] * attack.num_restarts, target, known(attack.objective))


def bound(attack: Attack, *, count: bool = False, backend: str = "auto") -> partial[Attacked]:
    """Return `ascend` with what `attack` says bound: a function (forward, images, labels, target, start)."""
    attack = attack.stepping()
    return partial(
        ascend,
        epsilon=attack.epsilon,
        step_size=known(attack.step_size),
        num_steps=attack.num_steps,
        objective=attack.objective or "ce",
        norm=attack.norm,
        count=count,
        backend=backend,
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


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
