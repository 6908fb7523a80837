"""Other packages' PGD on an exported network finds what `fastarat.evaluate` finds on the run, within chance."""

import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from beside import EPSILON, neighbour
from torch import Tensor, nn

import fastarat
from fastarat.data import load_dataset
from fastarat.evaluation import collect
from fastarat.runs import load_network

STEPS = 20  # of epsilon / 4, as `evaluate` takes them unless told otherwise


def torchattacks(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str) -> Tensor:
    package = neighbour("torchattacks")
    attack = package.PGD if norm == "linf" else package.PGDL2
    return attack(model, eps=epsilon, alpha=epsilon / 4, steps=STEPS, random_start=True)(images, labels)


def foolbox(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str) -> Tensor:
    package = neighbour("foolbox")
    kind = package.attacks.LinfPGD if norm == "linf" else package.attacks.L2PGD
    wrapped = package.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = kind(abs_stepsize=epsilon / 4, steps=STEPS, random_start=True)
    return attack(wrapped, images, labels, epsilons=epsilon)[1]


def art(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str) -> Tensor:
    classifiers, evasion = neighbour("art.estimators.classification"), neighbour("art.attacks.evasion")
    wrapped = classifiers.PyTorchClassifier(
        model, loss=nn.CrossEntropyLoss(), input_shape=tuple(images.shape[1:]), nb_classes=10, clip_values=(0, 1),
        device_type="cpu",
    )  # fmt: skip
    attack = evasion.ProjectedGradientDescent(
        wrapped, norm=np.inf if norm == "linf" else 2, eps=epsilon, eps_step=epsilon / 4, max_iter=STEPS,
        num_random_init=1, batch_size=512, verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(images.numpy(), np.eye(10)[labels.numpy()]))


ATTACKERS = [torchattacks, foolbox, art]


@torch.no_grad()
def withstood(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(images).argmax(1) == labels


def interval(share: float, count: int) -> float:
    """Half the 95 % binomial interval (Wald) of a share of `count` images."""
    return 1.96 * math.sqrt(share * (1 - share) / count)


@functools.cache
def ours_of(run: Path, norm: str, epsilon: float) -> tuple[float, float]:
    """Clean and PGD-20 accuracy of the run on the test set, by `evaluate`."""
    found = fastarat.evaluate(
        load_network(run)[0], collect(load_dataset("digits").test)[:2], "clean,pgd-20", epsilon=epsilon, norm=norm,
        alarms=False, progress=False,
    )  # fmt: skip
    return found.accuracy["clean_acc"], found.accuracy["robust_acc_pgd20"]


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", EPSILON), ("l2", 0.6)])
@pytest.mark.parametrize("attacker", ATTACKERS, ids=lambda f: f.__name__)
def test_pgd_20_of_others_agrees(attacker, norm, epsilon, digits_run, exported, digits):
    images, labels = digits
    clean, ours = ours_of(digits_run, norm, epsilon)
    assert 0.2 < ours < clean - 0.1  # else any two attacks would agree

    adversarial = attacker(exported, images, labels, epsilon, norm)
    moved = (adversarial - images).flatten(1)
    size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert size.max() <= epsilon * (1 + 1e-4)
    assert size.median() > 0.9 * epsilon
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    robust = withstood(exported, adversarial, labels)
    allowed = interval(ours, len(labels))
    assert abs(robust.float().mean().item() - ours) < allowed, (robust.float().mean().item(), ours, allowed)

    # The same images are ours to judge: what theirs fooled the file with fools the run's own network.
    with torch.no_grad():
        own = load_network(digits_run)[0](adversarial).argmax(1) == labels
    assert torch.equal(own, robust)


@pytest.mark.parametrize("attacker", ATTACKERS, ids=lambda f: f.__name__)
def test_another_network_or_budget_disagrees(attacker, digits_run, exported, digits):
    """The comparison can fail: with weights that were disturbed, and with half the budget."""
    images, labels = digits
    _, ours = ours_of(digits_run, "linf", EPSILON)
    allowed = interval(ours, len(labels))
    weaker = attacker(exported, images, labels, EPSILON / 2, "linf")
    assert abs(withstood(exported, weaker, labels).float().mean().item() - ours) > allowed

    other = copy.deepcopy(exported)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.3 * p.std() * torch.randn_like(p)
    adversarial = attacker(other, images, labels, EPSILON, "linf")
    assert abs(withstood(other, adversarial, labels).float().mean().item() - ours) > allowed
