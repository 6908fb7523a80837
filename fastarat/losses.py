"""Losses of the defenses as pure functions of tensors, in float32 inside whatever comes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fastarat.errors import unknown

Align = Literal["x->y", "y->x", "x->y,y->x", "x<->y"]
Distance = Literal["cos", "mse", "kl"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 8 else x.float()


def cosine_distance(moving: Tensor, target: Tensor) -> Tensor:
    """1 - mean cosine similarity over the last dimension. moving, target: float [B, d]. Returns a scalar."""
    return 1 - F.cosine_similarity(_wide(moving), _wide(target), dim=-1, eps=1e-8).mean()


def mse_distance(moving: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference over B and d. moving, target: float [B, d]. Returns a scalar."""
    return F.mse_loss(_wide(moving), _wide(target))


def kl_distance(moving: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(moving / T)), batch mean. moving, target: float [B, d]."""
    log_target = F.log_softmax(_wide(target) / temperature, -1)
    log_moving = F.log_softmax(_wide(moving) / temperature, -1)
    return temperature**2 * (log_target.exp() * (log_target - log_moving)).sum(-1).mean()


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cos": cosine_distance,
    "mse": mse_distance,
    "kl": kl_distance,
}


def ar_at_invariance(
    z_adv: Tensor,
    z_clean: Tensor,
    *,
    distance: Distance | Callable[[Tensor, Tensor], Tensor] = "cos",
    align: Align = "x->y",
    predictor: Callable[[Tensor], Tensor] | None = None,
    predictor_clean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """AR-AT's invariance term for one layer: how far adversarial features are from clean ones.

    Args:
        z_adv, z_clean: float [B, d], pooled features of the adversarial and the clean batch.
        distance: "cos" (1 - cosine), "mse", "kl", or a function (moving, target) -> scalar.
        align: which side moves. "x->y": D(h(z'), sg z), the asymmetric default. "y->x": D(z, sg z').
            "x->y,y->x": the mean of both, each half with its own stop-gradient. "x<->y": D(z', z) without one,
            the same value and twice the gradient.
        predictor: h on the adversarial side, or None. Unused by "y->x", where that side is the stopped target.
        predictor_clean: h on the clean side, or None; in "x->y" it acts after the stop-gradient.
    Returns: scalar, float32 (float64 for float64 input), smaller is closer.
    Raises: UserError for an unknown distance or alignment.
    Source: Waseda, Chang and Echizen, ICLR 2025, equation 4 and the released code; where the release forgets a
        detach or a predictor, the target is always detached and each predictor acts on its moving side.
    """
    if isinstance(distance, str):
        if distance not in DISTANCES:
            raise unknown("feature distance", distance, DISTANCES)
        distance = DISTANCES[distance]
    h_adv = predictor or (lambda z: z)
    h_clean = predictor_clean or (lambda z: z)
    if align == "x->y":
        return distance(h_adv(z_adv), h_clean(z_clean.detach()))
    if align == "y->x":
        return distance(h_clean(z_clean), z_adv.detach())
    if align == "x->y,y->x":
        return (distance(h_adv(z_adv), z_clean.detach()) + distance(h_clean(z_clean), z_adv.detach())) / 2
    if align == "x<->y":
        return distance(h_adv(z_adv), h_clean(z_clean))
    raise unknown("alignment", align, Align.__args__)
