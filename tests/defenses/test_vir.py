"""VIR against a literal transcription of its published formulas, and its weights by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from literal import Transcription, base_net, some_views, three_steps

from fastarat import losses
from fastarat.defenses import VIR

CONSTANTS = {"at": (7.0, 10.0, 0.007), "trades": (8.0, 3.0, 1.7)}


class Literal(Transcription):
    def __call__(self, x, y):
        objective = "ce" if self.d.mode == "at" else "kl"
        adv = self.slow_attack(x, y, start="gaussian", objective=objective)
        nat, out = self.net(x.double()), self.net(adv.double())
        nat_probs, adv_probs = F.softmax(nat, dim=1), F.softmax(out, dim=1)
        kl = (nat_probs * (nat_probs.log() - torch.log(adv_probs + 1e-12))).sum(1)
        s, c, o = CONSTANTS[self.d.mode]
        true = nat_probs[torch.arange(len(y)), y]
        weight = (s * torch.exp(-c * true) * kl + o).detach() if self.epoch >= 77 else torch.ones(len(y))
        if self.d.mode == "at":
            loss = (weight * F.cross_entropy(out, y, reduction="none")).mean()
        else:
            loss = (F.cross_entropy(nat, y, reduction="none") + 5 * weight * kl).mean()
        return self.learn(loss), adv


@pytest.mark.parametrize("mode", ["at", "trades"])
def test_three_steps_equal_the_transcription(mode):
    # Weights begin at epoch 77 here, as in the release: the first step has none.
    defense, net = VIR(mode=mode, begin_epoch=77), base_net()
    three_steps(defense, net, Literal(net, defense), epochs=(76, 77, 78))


def test_weights_by_hand():
    """p = (1/2, 1/2), p' = (3/4, 1/4): KL = ln(4/3)/2, weight 7 e^-5 KL + 0.007; an image that stays weighs 0.007."""
    clean, adv = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    weights = losses.vir_weights(clean, adv, torch.tensor([0, 1]), scale=7.0, sharpness=10.0, offset=0.007)
    moved = 7 * math.exp(-5) * math.log(4 / 3) / 2 + 0.007
    torch.testing.assert_close(weights, torch.tensor([moved, 0.007]), rtol=1e-6, atol=1e-9)
    # The less sure the clean prediction, the larger the weight: p_y = 1/4 instead of 3/4, with one KL.
    clean = torch.tensor([[math.log(3), 0.0]] * 2)
    adv = torch.zeros(2, 2)
    sure, unsure = losses.vir_weights(clean, adv, torch.tensor([0, 1]), scale=1.0, sharpness=2.0, offset=0.0)
    assert (unsure / sure).item() == pytest.approx(math.e)


def test_weights_carry_no_gradient():
    v = some_views()
    weights = losses.vir_weights(v.logits_clean, v.logits_adv, v.labels, scale=7.0, sharpness=10.0, offset=0.007)
    assert not weights.requires_grad
    assert torch.autograd.grad(VIR().loss(v)["ce_adv"], v.logits_clean, allow_unused=True) == (None,)
    # The trades form moves both sides through its KL, with the weights as constants.
    terms = VIR(mode="trades").loss(v)
    kl = losses.instance_kl(v.logits_clean, v.logits_adv)
    weights = losses.vir_weights(v.logits_clean, v.logits_adv, v.labels, scale=8.0, sharpness=3.0, offset=1.7)
    expected = torch.autograd.grad(5 * (weights * kl).mean(), (v.logits_clean, v.logits_adv))
    torch.testing.assert_close(torch.autograd.grad(terms["kl"], (v.logits_clean, v.logits_adv)), expected)


def test_burn_in_is_trades():
    v = some_views(weighted=False)
    torch.testing.assert_close(
        VIR(mode="trades").loss(v), losses.trades(v.logits_clean, v.logits_adv, v.labels, 5.0), rtol=1e-5, atol=1e-6
    )


def test_gradients_by_finite_differences():
    """Of the KL of both sides; the weighted losses as functions of what their weights do not see."""
    v = some_views(torch.float64)
    assert torch.autograd.gradcheck(lambda c, a: losses.instance_kl(c, a), (v.logits_clean, v.logits_adv))
    weights = losses.vir_weights(v.logits_clean, v.logits_adv, v.labels, scale=7.0, sharpness=10.0, offset=0.007)
    mine = torch.autograd.grad(VIR().loss(v)["ce_adv"], v.logits_adv)[0]
    theirs = weights[:, None] * (v.logits_adv.softmax(1) - F.one_hot(v.labels, 4)) / 5
    torch.testing.assert_close(mine, theirs.detach())


def test_modes_set_the_attack_and_the_constants():
    assert (VIR().objective, VIR(mode="trades").objective) == ("ce", "kl")
    assert tuple(VIR().constants().values()) == CONSTANTS["at"]
    assert tuple(VIR(mode="trades").constants().values()) == CONSTANTS["trades"]
    assert VIR(offset=0.0).constants() == {"scale": 7.0, "sharpness": 10.0, "offset": 0.0}
