"""What the literal transcriptions of defenses share: a tiny float64 network, a slow attack, and the comparison."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastarat
from fastarat import attacks
from fastarat.runs import load_start

EPSILON, STEP, STEPS, BATCH, CLASSES = 0.1, 0.03, 3, 6, 4


class Double(nn.Module):
    """Runs a float64 network on float32 images, so that only the attack's update is single precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.double())


def base_net(seed: int = 3) -> nn.Sequential:
    """Two convolutions with plain BatchNorm; the input of the last layer is the penultimate feature."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    ).double()  # fmt: skip


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), lr=0.1, momentum=0.9, weight_decay=5e-4)


def drawn(x: Tensor) -> Tensor:
    """Memory for noise: a generator fills memory in order, and the step's batches are channels-last."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def slow_attack(net: nn.Module, x: Tensor, y: Tensor, generator, *, start: str, objective: str) -> Tensor:
    """PGD of the released codes, in eval mode; "kl" recomputes the clean prediction at every step, as they do."""
    net.eval()
    if start == "gaussian":
        adv = x + 0.001 * drawn(x).normal_(generator=generator)
    else:
        adv = (x + EPSILON * drawn(x).uniform_(-1, 1, generator=generator)).clamp(0, 1)
    for _ in range(STEPS):
        adv.requires_grad_()
        logits = net(adv.double())
        if objective == "kl":
            loss = F.kl_div(F.log_softmax(logits, 1), F.softmax(net(x.double()), 1).detach(), reduction="sum")
        else:
            loss = F.cross_entropy(logits, y)
        (grad,) = torch.autograd.grad(loss, adv)
        adv = adv.detach() + STEP * grad.sign()
        adv = torch.min(torch.max(adv, x - EPSILON), x + EPSILON).clamp(0, 1)
    net.train()
    return adv


def spied(defense):
    """The same defense, and a list that collects what its attack returned."""
    seen: list[Tensor] = []

    class Spy(type(defense)):
        def forward(self, run, companions, images, labels, attacked):
            seen.append(attacked.images)
            return super().forward(run, companions, images, labels, attacked)

    return Spy(**{f.name: getattr(defense, f.name) for f in dataclasses.fields(defense)}), seen


def step_of(defense, net: nn.Module, seed: int = 11) -> fastarat.TrainStep:
    model = Double(copy.deepcopy(net))
    load_start(defense, model)
    return fastarat.TrainStep(
        model, defense, torch.empty(2, 3, 8, 8), epsilon=EPSILON, step_size=STEP, num_steps=STEPS,
        optimizer=sgd, seed=seed,
    )  # fmt: skip


def assert_same(module: nn.Module, reference: nn.Module, what: str) -> None:
    """Weights, running statistics and update counts agree to float64's rounding: no float32 lies on the way."""
    own, theirs = module.state_dict(), reference.state_dict()
    assert own.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(
            own[key], theirs[key], rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{what} {k}: {m}"
        )


def three_steps(defense, net: nn.Module, literal, epochs=(1, 1, 1)) -> fastarat.TrainStep:
    """Run our step and `literal(images, labels) -> (loss, adversarial images)` side by side and compare.

    literal.net: its network, as trained so far, in plain PyTorch. epochs: in which epoch of 100 each step is done,
    which the transcription reads from its own `epoch`.
    """
    spy, seen = spied(defense)
    step = step_of(spy, net)
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 5, 4, generator=g, dtype=torch.float64).unbind()
    by_hand = (target.softmax(1) * (target.log_softmax(1) - logits.log_softmax(1))).sum(1)
    # In float64 throughout: near the Gaussian start float32's rounding of the KL would pick the gradient's signs.
    torch.testing.assert_close(attacks.kl(logits, target), by_hand)
    for epoch in epochs:
        step.forward.epoch.fill_(epoch)
        step.forward.progress.fill_((epoch - 1) / 100)
        literal.epoch = epoch
        images, labels = torch.rand(BATCH, 3, 8, 8, generator=g), torch.randint(CLASSES, (BATCH,), generator=g)
        terms = step(images, labels)
        loss, adv = literal(images, labels)
        torch.testing.assert_close(seen[-1], adv, rtol=0, atol=0)
        assert sum(t.item() for t in terms.values()) == pytest.approx(loss, rel=1e-12)
        assert_same(step.model.net, literal.net, "student")
    return step


class Moment:
    """A stand-in for the engine's forward at a moment of a run: step (from 0) of 391 in an epoch (from 1)."""

    def __init__(self, epoch: int, epochs: int, *, step: int = 0, model: nn.Module | None = None) -> None:
        self.epoch, self.model = torch.tensor(float(epoch)), model
        self.progress = torch.tensor(((epoch - 1) * 391 + step) / (epochs * 391))

    def __call__(self, images, *branches, **options):
        return images, ()

    def views(self, labels, **tensors):
        return fastarat.Views(labels, **tensors)

    def extra(self, defense) -> dict[str, Tensor]:
        """What `defense.forward` hands to the loss beside the logits."""
        images, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
        return defense.forward(self, nn.ModuleDict(), images, labels, attacks.Attacked(images, labels)).extra
