"""Stochastic weight averaging as AR-AT+SWA uses it: a uniform mean of parameters, BatchNorm re-estimated after."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastarat.engine import TrainStep


class WeightAverage:
    """Running uniform mean of a network's parameters; buffers and companions are not averaged.

    The first update copies (weight 1/(n+1) with n = 0). Source: AR-AT released code (methods of Izmailov et al., 2018).
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: list[Tensor] = [p.detach().clone() for p in model.parameters()]
        self.count = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        torch._foreach_lerp_(self.parameters, [p.detach() for p in model.parameters()], 1.0 / (self.count + 1))
        self.count += 1

    def state_dict(self) -> dict:
        return {"parameters": self.parameters, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        for own, saved in zip(self.parameters, state["parameters"], strict=True):
            own.copy_(saved)
        self.count = state["count"]


def averaged_model(step: TrainStep, average: WeightAverage, batches: Iterable, *, exact: bool = False) -> nn.Module:
    """Return a copy of the step's network holding the averaged weights, with BatchNorm re-estimated.

    All running statistics are reset; one pass over `batches` (augmented training images) crafts adversarial images
    on the averaged network and takes the exact cumulative mean of their batch statistics, on the adversarial branch.
    The clean branch of a split network stays reset and is unusable. With `exact` the attack's own forwards move the
    statistics too, with the previous batch's momentum, as the released code does.

    Source: AR-AT released code. For a defense without an attack the clean images are used.
    """
    own_model, own_forward = step.model, step.forward.model
    model = copy.deepcopy(step.model)
    with torch.no_grad():
        for p, mean in zip(model.parameters(), average.parameters, strict=True):
            p.copy_(mean)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
    step.model = step.forward.model = model
    try:
        seen = 0
        model.train()
        for batch in batches:
            images = batch.images.to(memory_format=step.memory_format)
            if step.defense.attacks:
                images = step.defense.inputs(images, epsilon=step.epsilon, norm=step.norm, generator=step.generator)
                images = step.attack(images, batch.labels, "train" if exact else "train-frozen").images
            for m in norms:
                m.momentum = len(images) / (seen + len(images))
            with torch.no_grad():
                step.forward(images, "adv")
            seen += len(images)
    finally:
        step.model, step.forward.model = own_model, own_forward
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
    return model.eval()
