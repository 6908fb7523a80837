"""MART against a literal transcription of the released loss, and its loss by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from literal import Moment, Transcription, base_net, three_steps

from fastarat import losses
from fastarat.defenses import MART
from fastarat.nets.models import WideResNet


def released_loss(logits, logits_adv, y, lam):
    """mart.py as released."""
    kl = torch.nn.KLDivLoss(reduction="none")
    adv_probs = F.softmax(logits_adv, dim=1)
    tmp1 = torch.argsort(adv_probs, dim=1)[:, -2:]
    new_y = torch.where(tmp1[:, -1] == y, tmp1[:, -2], tmp1[:, -1])
    loss_adv = F.cross_entropy(logits_adv, y) + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), new_y)
    nat_probs = F.softmax(logits, dim=1)
    true_probs = torch.gather(nat_probs, 1, y.unsqueeze(1)).squeeze()
    loss_robust = (1.0 / len(y)) * torch.sum(
        torch.sum(kl(torch.log(adv_probs + 1e-12), nat_probs), dim=1) * (1.0000001 - true_probs)
    )
    return loss_adv + float(lam) * loss_robust


class Literal(Transcription):
    def __call__(self, x, y):
        adv = self.slow_attack(x, y, start="gaussian", objective="ce")
        logits = self.net(x.double())
        loss = released_loss(logits, self.net(adv.double()), y, 5.0 if self.d.lam is None else self.d.lam)
        return self.learn(loss), adv


@pytest.mark.parametrize("options", [{}, {"lam": 6.0}], ids=str)
def test_three_steps_equal_the_transcription(options):
    defense = MART(**options)
    net = base_net()
    three_steps(defense, net, Literal(net, defense))


@pytest.mark.parametrize(
    ("label", "wrong"),
    [(0, 1 / 3), (1, 1 / 2), (2, 1 / 2)],
    ids=["top-1 is right: the second", "top-1 is wrong", "top-2 are wrong"],
)
def test_loss_by_hand(label, wrong):
    """p = (1/4, 1/4, 1/2), p' = (1/2, 1/3, 1/6). KL = (1/4) ln(1/2) + (1/4) ln(3/4) + (1/2) ln 3."""
    p, p_adv = [1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 3, 1 / 6]
    clean, adv = (torch.tensor([q], dtype=torch.float64).log() for q in (p, p_adv))
    kl = 0.25 * math.log(1 / 2) + 0.25 * math.log(3 / 4) + 0.5 * math.log(3)
    terms = losses.mart(clean, adv, torch.tensor([label]), 5.0)
    assert terms["bce_adv"].item() == pytest.approx(-math.log(p_adv[label]) - math.log(1.0001 - wrong), rel=1e-9)
    assert terms["kl"].item() == pytest.approx(5 * (1.0000001 - p[label]) * kl, rel=1e-9)


def test_loss_and_gradient_equal_the_released_ones():
    torch.manual_seed(0)
    labels = torch.randint(5, (64,))
    inputs = [torch.randn(64, 5, dtype=torch.float64).mul_(3).requires_grad_() for _ in range(2)]
    mine, theirs = sum(losses.mart(*inputs, labels, 6.0).values()), released_loss(*inputs, labels, 6.0)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_lam_zero_leaves_the_clean_side_alone():
    torch.manual_seed(0)
    clean, adv = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    loss = sum(losses.mart(clean, adv, torch.tensor([0, 1, 2]), 0.0).values())
    assert not torch.autograd.grad(loss, clean, retain_graph=True)[0].any()
    assert torch.autograd.grad(loss, adv)[0].any()


def test_one_wrong_class_and_certainty():
    """Two classes, p'_wrong = 1 - p'_y -> 1: BCE = -log p'_y - log(0.0001), which only float32 constants keep finite."""
    clean, adv = torch.tensor([[50.0, -50.0]]).bfloat16(), torch.tensor([[-50.0, 50.0]]).bfloat16()
    terms = losses.mart(clean.requires_grad_(), adv.requires_grad_(), torch.tensor([0]), 5.0)
    assert all(t.dtype == torch.float32 and t.isfinite() for t in terms.values())
    assert terms["bce_adv"].item() == pytest.approx(100 - math.log(1e-4), rel=1e-3)
    # p_y = 1: the weight is 1.0000001 - 1, about 1.2e-7 in float32, and log(1e-12) bounds the KL.
    assert 0 < terms["kl"].item() < 5 * 1.3e-7 * 28
    sum(terms.values()).backward()
    assert clean.grad.isfinite().all()
    assert adv.grad.isfinite().all()


@pytest.mark.parametrize(("wide", "options", "lam"), [(False, {}, 5), (True, {}, 6), (True, {"lam": 2.0}, 2)], ids=str)
def test_lam_follows_the_network_as_the_schedule_does(wide, options, lam):
    """The released drivers: 5 for ResNet-18, 6 for WRN-34-10."""
    run = Moment(1, 100, model=WideResNet(10, 1, 4) if wide else None)
    assert run.extra(MART(**options))["lam"] == lam
