"""Averages of weights: AR-AT+SWA's uniform mean with re-estimated BatchNorm, and an exponential moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastarat.config import Config
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.nets.attacker import Attacker
from fastarat.specs import known


def swa_plan(config: Config, steps_per_epoch: int) -> tuple[int, int]:
    """Return the first epoch of snapshots (1-based) and the steps between them.

    Raises: UserError where averaging is asked for and no snapshot would be taken.
    """
    swa, epochs = config.swa_config, known(config.epochs)
    # Of a run that was extended the last part alone: what came before was averaged at its own end.
    first = max(math.floor(swa.start * epochs), *(config.extended or ()), 0) + 1
    few = (epochs - first + 1) * steps_per_epoch < 5 * 500
    every = swa.every or (steps_per_epoch if few else 500)
    taken = (epochs + 1) * steps_per_epoch - 1
    if config.swa and taken // every == (first * steps_per_epoch - 1) // every:
        raise UserError(
            f"swa-config.every={every}: no snapshot would be taken in the {epochs - first + 1} epoch(s) "
            f"of {steps_per_epoch} steps from epoch {first} on; leave it out, or choose a smaller one"
        )
    return first, every


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


class MovingAverage:
    """Exponential moving average of a network's parameters and running statistics, updated after every step.

    The decay is min(decay, (1 + n) / (10 + n)) at update n, so that the start is forgotten quickly. Integer buffers
    (batch counters) and those that hold infinity (masks) are copied. Source: Polyak and Juditsky, 1992; used with
    adversarial training by Gowal et al., 2020 (arXiv 2010.03593), whose averaged networks are the ones evaluated.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.averaged = [k for k, v in self.state.items() if v.is_floating_point() and v.isfinite().all()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        # Early on a short memory, so that the random initial weights are soon forgotten.
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        now = model.state_dict()
        torch._foreach_lerp_([self.state[k] for k in self.averaged], [now[k] for k in self.averaged], weight)
        for key in self.state.keys() - set(self.averaged):
            self.state[key].copy_(now[key])
        self.count += 1

    def state_dict(self) -> dict:
        return {"state": self.state, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        for key, saved in state["state"].items():
            self.state[key].copy_(saved)
        self.count = state["count"]


def averaged_model(
    step: TrainStep,
    average: WeightAverage,
    batches: Iterable,
    *,
    exact: bool = False,
    total: Callable[[int], int] | None = None,
) -> nn.Module:
    """Return a copy of the step's network holding the averaged weights, with BatchNorm re-estimated.

    All running statistics are reset; one pass over `batches` (augmented training images) crafts adversarial images
    on the averaged network and takes the exact cumulative mean of their batch statistics, on the adversarial branch.
    The clean branch of a split network stays reset and is unusable. With `exact` the attack's own forwards move the
    statistics too, with the previous batch's momentum, as the released code does. total: images in batch number i over
    all ranks, of which `batches` hold this one's; the statistics are then the mean of the ranks'.

    Source: AR-AT released code. For a defense without an attack the clean images are used.
    """
    model = copy.deepcopy(step.model)
    with torch.no_grad():
        for p, mean in zip(model.parameters(), average.parameters, strict=True):
            p.copy_(mean)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
    attacker, forward, spec = Attacker(model, precision=step.fast.precision), step.forward.but(model=model), step.spec
    seen = 0
    model.train()
    world, shares = step.shares.world, step.shares
    for number, batch in enumerate(batches):
        images = batch.images.to(memory_format=step.memory_format)
        count = len(images) if total is None else total(number)
        shares.enter_whole(len(images), count)
        if step.defense.attacks:
            images = step.defense.inputs(images, epsilon=spec.epsilon, norm=spec.norm, generator=step.generator)
            bn = "train" if exact else "train-frozen"
            images = step.attack(images, batch.labels, attacker=attacker, bn=bn).images
        # This momentum makes the running value the exact mean over all images so far, whatever the last batch's size.
        for m in norms:
            m.momentum = count / (seen + count)
        with torch.no_grad():
            forward(images, "adv")
        seen += count
    world.mean_([t for m in norms for t in (m.running_mean, m.running_var) if t is not None], "running statistics")
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()
