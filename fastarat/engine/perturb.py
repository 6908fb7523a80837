"""Adversarial weight perturbation: the training loss is taken a step up in weight space (Wu et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fastarat.values import coerce, whole, within


def perturbation(gamma: float | None, warmup: int) -> WeightPerturbation | None:
    """Return what perturbs by `gamma`, from after `warmup` epochs on; None for None. Raises: UserError for others."""
    warmup = whole("awp_warmup", warmup, 0)
    if gamma is None:
        return None
    share = within("awp", coerce(gamma, float, "awp"), "(0, 1)", "a share of each weight's norm, such as 0.005")
    return WeightPerturbation(share, warmup)


class WeightPerturbation:
    """Moves convolution and classifier weights up the loss by gamma of their norm, and back.

    gamma: gamma_w, a share of each weight's norm. warmup: epochs without. Source: Wu et al., NeurIPS 2020
    (arXiv 2004.05884), equation 9 and its released code, which discards the buffers of its proxy network: so no
    running statistic and no buffer of the companions moves here.
    """

    def __init__(self, gamma: float, warmup: int) -> None:
        self.gamma, self.warmup = gamma, warmup
        self._pushed: tuple[list[Tensor], list[Tensor]] = ([], [])

    def push(
        self,
        model: nn.Module,
        companions: nn.Module,
        losses: Iterable[Callable[[], Tensor]],
        epoch: Tensor,
        sum_: Callable[[Sequence[Tensor]], None],
    ) -> None:
        """Perturb `model`.

        losses: what sums to the training loss, a micro-batch each, moving no statistic. epoch: 0-d, from 1, on the
        device. sum_: sums gradients over all processes, in place.
        """
        weights: list[Tensor] = [p for p in model.parameters() if p.dim() >= 2 and p.requires_grad]
        buffers = list(companions.buffers())
        kept = [b.clone() for b in buffers]
        grads: Sequence[Tensor] = ()
        for loss in losses:
            found = torch.autograd.grad(loss(), weights)
            grads = torch._foreach_add(grads, found) if grads else found
        with torch.no_grad():
            sum_(grads)
            if buffers:
                torch._foreach_copy_(buffers, kept)
            # Switched on the device, so that a captured step starts to perturb without being captured again.
            on = (epoch > self.warmup).to(epoch) * self.gamma
            # Norms per tensor, not over the whole network: weights of all sizes move by the same share.
            moves = [on * p.norm() / (g.norm() + 1e-20) * g for p, g in zip(weights, grads, strict=True)]
            torch._foreach_add_(weights, moves)
        self._pushed = weights, moves

    @torch.no_grad()
    def pull(self) -> None:
        """Take the perturbation back, after the optimiser's step."""
        if self._pushed[0]:
            torch._foreach_sub_(*self._pushed)
        self._pushed = ([], [])
