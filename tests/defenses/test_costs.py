"""What each defense's step costs, against the counts its publication implies (PGD-10)."""

import pytest
import torch
from costs import Costs, counting
from small import batch, step_of
from torch import nn
from torch.nn import functional as F

from fastarat.defenses import (
    ARAT,
    ARREST,
    AT,
    CAAT,
    CURE,
    DONE,
    FAT,
    GAIRAT,
    GAIRFAT,
    LBGAT,
    MART,
    TRADES,
    VIR,
    Standard,
)

# defense and options: forwards, input-only backwards, full backwards; teacher's forwards and backwards.
TABLE = [
    (Standard, {}, Costs(1, 0, 1)),
    (AT, {}, Costs(11, 10, 1)),
    (ARAT, {}, Costs(12, 10, 2)),
    (TRADES, {}, Costs(13, 10, 2)),
    (TRADES, {"exact": False}, Costs(13, 10, 2)),
    (MART, {}, Costs(12, 10, 2)),
    (LBGAT, {}, Costs(13, 10, 1, 1, 1)),
    (LBGAT, {"beta": 6.0}, Costs(13, 10, 2, 1, 1)),
    (ARREST, {}, Costs(12, 10, 1, 1, 0)),
    (ARREST, {"phi": None}, Costs(11, 10, 1, 1, 0)),
    (GAIRAT, {}, Costs(11, 10, 1)),
    (FAT, {}, Costs(11, 10, 1)),
    (GAIRFAT, {}, Costs(11, 10, 1)),
    # The score takes a backward of f(x) and one of f(x'), the loss one of each; rgp needs the loss's alone. Those of
    # rgp_soft's score stop before the stem, by which backwards are counted.
    (CURE, {"warmup_epochs": 1}, Costs(13, 10, 4, 2, 0)),
    (CURE, {"warmup_epochs": 1, "mode": "rgp"}, Costs(13, 10, 2, 2, 0)),
    (CURE, {"warmup_epochs": 1, "mode": "rgp_soft"}, Costs(13, 10, 2, 2, 0)),
    (VIR, {}, Costs(12, 10, 1)),
    (VIR, {"mode": "trades"}, Costs(13, 10, 2)),
    (DONE, {}, Costs(11, 10, 1)),
    (CAAT, {}, Costs(12, 10, 2)),
]


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    TABLE,
    ids=[f"{kind.name}{'' if not options else f'-{options}'}" for kind, options, _ in TABLE],
)
def test_cost_of_a_step(kind, options, expected):
    step = step_of(kind(**options), num_steps=10)
    # The second step: the first one also builds optimiser state and metrics.
    step(*batch(6))
    with counting(step, 6) as counter:
        step(*batch(6, seed=1))
    assert counter.costs == expected
    assert counter.host_reads == [], "the step waits for the device"


class Counted:
    """The two attributes of a TrainStep that the counter reads."""

    def __init__(self):
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 16, 4))
        self.companions = nn.ModuleDict({"t": nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten()), "h": nn.Linear(2, 2)})


def test_the_counter_by_hand():
    """Three forwards (one of 2B), one input-only backward, one full one of 2B, and a teacher that is trained."""
    step, images, labels = Counted(), torch.rand(5, 3, 8, 8), torch.randint(4, (5,))
    with counting(step, 5) as counter:
        step.model.requires_grad_(False)
        points = images.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(step.model(points), labels), points)
        step.model.requires_grad_(True)
        F.cross_entropy(step.model(torch.cat([images, images])), torch.cat([labels, labels])).backward()
        step.companions["t"](images).sum().backward()
    assert counter.costs == Costs(3, 1, 2, 1, 1)
    assert counter.host_reads == []


def test_the_counter_sees_waste_and_host_reads():
    step, images, labels = Counted(), torch.rand(5, 3, 8, 8), torch.randint(4, (5,))
    with counting(step, 5) as counter:
        points = images.clone().requires_grad_()
        loss = F.cross_entropy(step.model(points), labels)
        loss.backward()  # weight gradients in an attack
        images[labels == labels[0]]
        loss.item()
    assert counter.costs == Costs(1, 0, 1)
    assert len(counter.host_reads) == 2
