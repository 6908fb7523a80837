"""Adversarial weight perturbation: the training loss is taken a step up in weight space (Wu et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WeightPerturbation:
    """Moves convolution and classifier weights up the loss by gamma of their norm, and back.

    gamma: gamma_w, a share of each weight's norm. warmup: epochs without. Source: Wu et al., NeurIPS 2020
    (arXiv 2004.05884), equation 9 and its released code, which discards the buffers of its proxy network: so no
    running statistic and no buffer of the companions moves here.
    """

    def __init__(self, gamma: float, warmup: int) -> None:
        self.gamma, self.warmup = gamma, warmup
        self._pushed: tuple[list[Tensor], list[Tensor]] = ([], [])

    def push(self, model: nn.Module, companions: nn.Module, loss: Callable[[], Tensor], epoch: Tensor) -> None:
        """Perturb `model`. loss: the training loss, moving no statistic. epoch: 0-d, from 1, on the device."""
        weights: list[Tensor] = [p for p in model.parameters() if p.dim() >= 2 and p.requires_grad]
        buffers = list(companions.buffers())
        kept = [b.clone() for b in buffers]
        grads = torch.autograd.grad(loss(), weights)
        with torch.no_grad():
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
