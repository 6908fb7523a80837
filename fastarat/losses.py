"""Losses of the defenses as pure functions of tensors: float32 inside for half precision, float64 for float64.

One order everywhere: what belongs to clean images, what belongs to adversarial ones, the rest, labels, and then the
hyper-parameters. A distance takes (moving, target), as `torch.nn.functional.kl_div` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastarat.checks import check_same
from fastarat.errors import UserError, unknown
from fastarat.specs import known

Weight = float | Tensor
"""Of a term: a number, or a 0-d tensor that a captured step sees move."""
Align = Literal["x->y", "y->x", "x->y,y->x", "x<->y"]
Distance = Literal["cos", "mse", "kl"]
WeightKind = Literal["tanh", "sigmoid", "discrete"]
_TINY = 1e-30  # least divisor: above float32's smallest normal number, so that 0 / _TINY is 0 and not NaN


def wide(x: Tensor) -> Tensor:
    """Return x as it is when it is float64, and as float32 otherwise: nothing is summed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def cosine_distance(moving: Tensor, target: Tensor) -> Tensor:
    """1 - mean cosine similarity over the last dimension. moving, target: float [B, d]. Returns a scalar."""
    return 1 - F.cosine_similarity(wide(moving), wide(target), dim=-1, eps=1e-8).mean()


def mse_distance(moving: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference over B and d. moving, target: float [B, d]. Returns a scalar."""
    return F.mse_loss(wide(moving), wide(target))


def kl_distance(moving: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(moving / T)), batch mean. moving, target: float [B, d]."""
    log_target = F.log_softmax(wide(target) / temperature, -1)
    log_moving = F.log_softmax(wide(moving) / temperature, -1)
    return temperature**2 * (log_target.exp() * (log_target - log_moving)).sum(-1).mean()


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cos": cosine_distance,
    "mse": mse_distance,
    "kl": kl_distance,
}


def ar_at_invariance(
    z_clean: Tensor,
    z_adv: Tensor,
    *,
    distance: Distance | Callable[[Tensor, Tensor], Tensor] = "cos",
    align: Align = "x->y",
    predictor: Callable[[Tensor], Tensor] | None = None,
    predictor_clean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """AR-AT's invariance term for one layer: how far adversarial features are from clean ones.

    Args:
        z_clean, z_adv: float [B, d], pooled features of the clean and the adversarial batch.
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
        if z_adv.shape != z_clean.shape:
            raise UserError(f"z_adv is {list(z_adv.shape)}, z_clean {list(z_clean.shape)}: expected one shape, [B, d]")
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
    raise unknown("alignment", align, get_args(Align))


def hard(targets: Tensor) -> Tensor:
    """Return int64 [B]: labels as they are, of shares of the classes (float [B, K]) the largest."""
    return targets if targets.dim() == 1 else targets.argmax(1)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return bool [B, K], without the read of the values by which PyTorch's checks them. labels: int64 [B]."""
    return torch.arange(num_classes, device=labels.device) == labels[:, None]


def smoothed(targets: Tensor, smoothing: float, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (1 - s) y + s / K: targets that leave each class a share of s / K.

    targets: int64 [B], or shares of the classes, float [B, K]. smoothing: s in [0, 1). dtype: of the result.
    Returns: float [B, K], rows that sum to 1. Label 0 of two, s = 0.1: (0.95, 0.05).
    Source: Szegedy et al., CVPR 2016; with adversarial training Pang et al., ICLR 2021 (arXiv 2010.00467).
    """
    shares = one_hot(targets, num_classes) if targets.dim() == 1 else targets
    return shares.to(dtype) * (1 - smoothing) + smoothing / num_classes


def trades(logits_clean: Tensor, logits_adv: Tensor, labels: Tensor, beta: float) -> dict[str, Tensor]:
    """TRADES: CE(f(x), y) + beta KL(p(x) || p(x')), the KL summed over classes and averaged over images.

    Nothing is detached: the KL moves the clean and the adversarial logits.

    Args:
        logits_clean, logits_adv: float [B, K]. labels: int64 [B], or shares of the classes, float [B, K]. beta: weight
            of the KL.
    Returns: {"ce_clean", "kl"}, scalars already weighted, float32 (float64 for float64 logits); their sum is the loss.
        Logits (0, 0) and (ln 3, 0), label 0: ln 2 and beta ln(4/3) / 2.
    Source: Zhang et al., ICML 2019 (arXiv 1901.08573), equation 5 and the released code.
    """
    check_same(labels, soft=True, logits_clean=logits_clean, logits_adv=logits_adv)
    return {
        "ce_clean": F.cross_entropy(wide(logits_clean), labels),
        "kl": beta * kl_distance(logits_adv, logits_clean),
    }


def mart(logits_clean: Tensor, logits_adv: Tensor, labels: Tensor, lam: Weight) -> dict[str, Tensor]:
    """MART: boosted CE on x', plus lam KL(p(x) || p(x')) weighted per image by how badly x is classified.

    With p = p(x), p' = p(x') and k* the most likely wrong class under p' (an index: not differentiated):
    mean[-log p'_y - log(1.0001 - p'_k* + 1e-12)] + lam mean[(1.0000001 - p_y) sum_c p_c (log p_c - log(p'_c + 1e-12))].
    Nothing is detached: gradients flow through p and through the weight too.

    Args:
        logits_clean, logits_adv: float [B, K], K >= 2. labels: int64 [B]. lam: weight of the KL, a number or 0-d.
    Returns: {"bce_adv", "kl"}, scalars already weighted, float32 (float64 for float64 logits); their sum is the loss.
    Source: Wang et al., ICLR 2020, equation 11 and the released code, whose constants do not survive half precision.
    """
    check_same(labels, logits_clean=logits_clean, logits_adv=logits_adv)
    logits_clean, logits_adv = wide(logits_clean), wide(logits_adv)
    p_adv, log_p = F.softmax(logits_adv, 1), F.log_softmax(logits_clean, 1)
    p = log_p.exp()
    is_true = torch.arange(p.shape[1], device=labels.device) == labels[:, None]
    # Which class is most likely has no gradient, and -1 lies below every probability.
    wrong = p_adv.detach().masked_fill(is_true, -1.0).argmax(1, keepdim=True)
    boost = -torch.log(1.0001 - p_adv.gather(1, wrong) + 1e-12).mean()
    weight = 1.0000001 - p.gather(1, labels[:, None]).squeeze(1)
    kl = _released_kl(p, log_p, p_adv)
    return {"bce_adv": F.cross_entropy(logits_adv, labels) + boost, "kl": lam * (weight * kl).mean()}


def _released_kl(p: Tensor, log_p: Tensor, p_adv: Tensor) -> Tensor:
    """KL per image with log(p' + 1e-12), as in MART's and VIR's released codes: finite where p' underflows to 0."""
    return (p * (log_p - torch.log(p_adv + 1e-12))).sum(1)


def instance_kl(logits_clean: Tensor, logits_adv: Tensor) -> Tensor:
    """KL(p(x) || p(x')) per image, of MART's term and of VIR; nothing is detached.

    logits_clean, logits_adv: float [B, K]. Returns float32 [B] (float64 for float64 logits).
    """
    log_p = F.log_softmax(wide(logits_clean), 1)
    return _released_kl(log_p.exp(), log_p, F.softmax(wide(logits_adv), 1))


def lbgat(
    logits_clean: Tensor | None,
    logits_adv: Tensor,
    logits_teacher: Tensor,
    labels: Tensor,
    beta: float = 0.0,
    *,
    detach_teacher: bool = False,
) -> dict[str, Tensor]:
    """LBGAT: MSE(f(x'), g(x)) + CE(g(x), y) + beta KL(p_f(x) || p_f(x')), g a natural network trained jointly.

    The MSE is averaged over images and classes, and its gradient moves g as well as f.

    Args:
        logits_clean, logits_adv: float [B, K] of the robust network f; logits_clean is read only when beta is not 0.
        logits_teacher: float [B, K] of g on the clean images. labels: int64 [B], or shares, float [B, K]. beta: weight
            of the KL.
        detach_teacher: stop the MSE's gradient into g (another method than the released one).
    Returns: {"mse", "ce_teacher"} and, when beta is not 0, "kl": scalars already weighted, float32 (float64 for
        float64 logits); their sum is the loss.
    Source: Cui et al., ICCV 2021 (arXiv 2011.11164), released code.
    """
    check_same(labels, soft=True, logits_adv=logits_adv, logits_teacher=logits_teacher)
    guide = logits_teacher.detach() if detach_teacher else logits_teacher
    terms = {
        "mse": F.mse_loss(wide(logits_adv), wide(guide)),
        "ce_teacher": F.cross_entropy(wide(logits_teacher), labels),
    }
    if beta:
        check_same(labels, soft=True, logits_adv=logits_adv, logits_clean=logits_clean)
        terms["kl"] = beta * kl_distance(logits_adv, known(logits_clean))
    return terms


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle between feature vectors, in half turns: 0 parallel, 1/2 orthogonal, 1 opposite.

    The cosine is clipped to +-(1 - 1e-6), which bounds the arccosine's gradient at 707 and makes it 0 beyond.

    Args: a, b: float [B, d].
    Returns: float32 [B] (float64 for float64 input), in [4.5e-4, 1 - 4.5e-4]; times 180 for degrees.
    Source: Suzuki et al., ICCV 2023 (arXiv 2308.16454) names the distance; clipping and unit are ours.
    """
    cosine = F.cosine_similarity(wide(a), wide(b), dim=-1, eps=1e-8)
    return torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6)) / math.pi


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-image cross-entropy. logits: float [B, K]. Returns float32 [B] (float64 for float64).

    labels: int64 [B], or shares of the classes, float [B, K].
    """
    logits = wide(logits)
    return F.cross_entropy(logits, labels.to(logits) if labels.is_floating_point() else labels, reduction="none")


def gairat_weights(
    kappa: Tensor,
    num_steps: int,
    lam: Weight = -1.0,
    kind: WeightKind = "tanh",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Geometry-aware instance weights: large for an image that PGD fools in few of its steps, mean 1 over the batch.

    With m = num_steps // 2: tanh (1 + tanh(lam + 5 (m - kappa) / m)) / 2; sigmoid sigma(lam + 5 (m - kappa) / m);
    discrete (num_steps + 1 - kappa) / (num_steps + 1), without lam.

    Args:
        kappa: int64 [B], steps 0..num_steps whose point (before the step) was still classified correctly.
        num_steps: PGD steps, at least 2 for tanh and sigmoid. lam: float or 0-d tensor; +inf gives unit weights.
        kind: "tanh", "sigmoid" or "discrete". dtype: of the result: that of the losses it weighs.
    Returns: float [B], omega_i B / sum_j omega_j, without gradient; all 0 where the sum is. Ten steps, tanh, lam -1,
        kappa 4 and 5: 0.5 and 0.1192 before normalisation.
    Raises: UserError for an unknown kind, or too few steps.
    Source: Zhang et al., ICLR 2021 (arXiv 2010.01736), equations 6 and 7 and the released code.
    """
    weights = geometry(kappa, num_steps, lam, kind, dtype=dtype)
    return weights * (len(weights) / weights.sum().clamp_min(_TINY))


def geometry(
    kappa: Tensor, num_steps: int, lam: Weight, kind: WeightKind, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`gairat_weights` before they are normalised over the batch: float [B], without gradient."""
    if kind == "discrete":
        return (num_steps + 1 - kappa).to(dtype) / (num_steps + 1)
    if kind in ("tanh", "sigmoid"):
        if num_steps < 2:
            raise UserError(
                f"GAIRAT weights of kind {kind} need at least 2 attack steps, got {num_steps}: use discrete"
            )
        half = num_steps // 2
        steepness = lam + 5 * (half - kappa).to(dtype) / half
        # (1 + tanh x) / 2 = sigma(2 x), which keeps its digits where tanh is near -1 (kappa 10: 6e-6).
        return torch.sigmoid(2 * steepness if kind == "tanh" else steepness)
    raise unknown("GAIRAT weight", kind, get_args(WeightKind))


def vir_weights(
    logits_clean: Tensor, logits_adv: Tensor, labels: Tensor, *, scale: float, sharpness: float, offset: float
) -> Tensor:
    """VIR's weights: scale exp(-sharpness p_y(x)) KL(p(x) || p(x')) + offset, not normalised and without gradient.

    Args: logits_clean, logits_adv: float [B, K]. labels: int64 [B].
    Returns: float32 [B] (float64 for float64 logits). A clean image with p_y = 1/2 left where it is: offset.
    Source: Fakorede et al., 2023 (arXiv 2307.07167), and the released code.
    """
    true = F.softmax(wide(logits_clean), 1).gather(1, labels[:, None]).squeeze(1)
    return (scale * torch.exp(-sharpness * true) * instance_kl(logits_clean, logits_adv) + offset).detach()


def done_weights(losses: Tensor, r: float) -> Tensor:
    """DONE's closed-form weights exp(l_i / r) / sum_j exp(l_j / r) of a KL-regularised worst case, without gradient.

    losses: float [B]. r: strength of the regularisation; large r tends to 1/B each, small r to the worst image alone.
    Returns: float32 [B] (float64 for float64 losses), sum 1. Losses (ln 3, 0), r = 1: (3/4, 1/4).
    Source: Sow, Lin, Wang and Liang, ICLR 2024 (arXiv 2308.00311).
    """
    return F.softmax(wide(losses).detach() / r, 0)


def conflict_aware(
    grads_clean: Sequence[Tensor],
    grads_adv: Sequence[Tensor],
    threshold: float,
    *,
    per_tensor: bool = False,
    normalize: bool = False,
) -> list[Tensor]:
    """Combine clean and adversarial gradients so that the result never points too far from the clean one.

    With phi = cos(g_a, g_c): g_c alone when phi >= threshold (not g_a, and no mixture); otherwise g_a + mu g_c with
    mu = |g_a| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (|g_c| sqrt(1 - t^2)), for which cos(g, g_c) = t exactly.
    All on the device, without a host read.

    Args:
        grads_clean, grads_adv: one float tensor per parameter, same shapes.
        threshold: t in [0, 1).
        per_tensor: apply the rule to each tensor by itself instead of to all of them flattened together.
        normalize: scale both gradients to unit length first.
    Returns: list of tensors like `grads_adv`. Where g_c is zero the result is g_a.
    Source: Xue, Wang, Qin and Pedarsani, 2024 (arXiv 2410.16579), and the released code.
    """
    clean, adv = [wide(g) for g in grads_clean], [wide(g) for g in grads_adv]
    dot = torch.stack([(a * c).sum() for a, c in zip(adv, clean, strict=True)])
    square_clean = torch.stack(torch._foreach_norm(clean)).square()
    square_adv = torch.stack(torch._foreach_norm(adv)).square()
    if not per_tensor:
        dot, square_clean, square_adv = (s.sum().expand(len(clean)) for s in (dot, square_clean, square_adv))
    length_clean, length_adv = square_clean.sqrt().clamp_min(_TINY), square_adv.sqrt().clamp_min(_TINY)
    phi = (dot / length_clean / length_adv).clamp(-1, 1)
    sine = math.sqrt(1 - threshold**2)
    mix = (threshold * (1 - phi.square()).sqrt() - phi * sine) / sine
    aligned = phi >= threshold
    of_adv = torch.where(aligned, 0.0, 1.0)
    of_clean = torch.where(aligned, 1.0, mix)
    if normalize:
        of_adv, of_clean = of_adv / length_adv, of_clean / length_clean
    else:
        of_clean = torch.where(aligned, of_clean, of_clean * length_adv / length_clean)
    return [
        (wa * a + wc * c).to(g.dtype) for a, c, wa, wc, g in zip(adv, clean, of_adv, of_clean, grads_adv, strict=True)
    ]
