"""What the tests of defenses share: for transcriptions a tiny network, a slow attack and the comparison; small steps."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastarat
from fastarat import attacks
from fastarat.runs import Run, load_start

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


class Transcription:
    """A released loop: its network `net` in plain PyTorch, SGD and noise; `__call__` is a step as `three_steps` wants."""

    def __init__(self, net: nn.Module, defense) -> None:
        self.net, self.d = copy.deepcopy(net), defense
        self.sgd = sgd(self.net.parameters())
        self.generator = torch.Generator().manual_seed(11)

    def begin(self, step: fastarat.TrainStep) -> None:
        """Take over what `step` drew by chance."""

    def noise(self, x: Tensor, gaussian: bool = False) -> Tensor:
        """Of the ball, or 0.001 N(0, 1). A generator fills memory in order, and the step's batches are channels-last."""
        memory = torch.empty_like(x, memory_format=torch.channels_last)
        if gaussian:
            return 0.001 * memory.normal_(generator=self.generator)
        return EPSILON * memory.uniform_(-1, 1, generator=self.generator)

    def slow_attack(self, x: Tensor, y: Tensor, *, start: str, objective: str) -> Tensor:
        """PGD of the released codes, in eval mode; "kl" recomputes the clean prediction at every step, as they do."""
        net = self.net.eval()
        adv = x + self.noise(x, gaussian=True) if start == "gaussian" else (x + self.noise(x)).clamp(0, 1)
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

    def learn(self, loss: Tensor) -> float:
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.item()


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

    literal.net: its network, as trained so far, with the keys of ours. epochs: in which epoch of 100 each step is done,
    which the transcription reads from its own `epoch`.
    """
    spy, seen = spied(defense)
    step = step_of(spy, net)
    literal.begin(step)
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
        kept = images.clone()
        terms = step(images, labels)
        assert torch.equal(images, kept), "the caller's batch must not change"
        loss, adv = literal(images, labels)
        torch.testing.assert_close(seen[-1], adv, rtol=0, atol=0)
        assert sum(t.item() for t in terms.values()) == pytest.approx(loss, rel=1e-12)
        assert_same(step.model.net, literal.net, "student")
    return step


class Moment:
    """A stand-in for the engine's forward at a moment of a run: step (from 0) of 391 in an epoch (from 1)."""

    batch_mean = None

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


def saved(folder, model: nn.Module, defense: str = "standard") -> str:
    """A run folder that holds `model` as trained with `defense`."""
    Run.create(folder).save_weights("last", model.state_dict(), {"defense": defense})
    return str(folder)


def small_step(defense, **options) -> fastarat.TrainStep:
    model = fastarat.build_model("resnet-small", num_classes=CLASSES)
    load_start(defense, model)
    return fastarat.TrainStep(model, defense, torch.empty(2, 3, 8, 8), **{"epsilon": EPSILON, "num_steps": 2} | options)


def some_batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(size, 3, 8, 8), torch.randint(CLASSES, (size,))


def some_views(dtype: torch.dtype = torch.float32, **extra) -> fastarat.Views:
    """What the losses of defenses without features read, of five images; all logits ask for gradients."""
    torch.manual_seed(0)
    names = ("clean", "adv", "logits_teacher", "slow_clean", "slow_adv")
    drawn = {name: torch.randn(5, CLASSES, dtype=dtype).requires_grad_() for name in names}
    return fastarat.Views(
        torch.tensor([0, 1, 2, 3, 0]), logits_clean=drawn.pop("clean"), logits_adv=drawn.pop("adv"),
        kappa=torch.tensor([0, 2, 5, 8, 10]), num_steps=10,
        extra=drawn | {name: torch.as_tensor(value) for name, value in ({"weighted": True} | extra).items()},
    )  # fmt: skip
