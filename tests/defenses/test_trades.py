"""TRADES against a literal transcription of the released loss, and its loss by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from literal import Transcription, base_net, three_steps

from fastarat import losses
from fastarat.config import from_dict, to_dict
from fastarat.defenses import TRADES


class Literal(Transcription):
    """trades.py as released: KL attack in eval mode; then CE(f(x)), and the KL of f(x') from a second f(x).

    Without `exact`, later re-implementations: the first f(x) serves both.
    """

    def __call__(self, x, y):
        adv = self.slow_attack(x, y, start="gaussian", objective="kl")
        logits = self.net(x.double())
        loss_natural = F.cross_entropy(logits, y)
        loss_robust = (1.0 / len(x)) * torch.nn.KLDivLoss(reduction="sum")(
            F.log_softmax(self.net(adv.double()), dim=1),
            F.softmax(self.net(x.double()) if self.d.exact else logits, dim=1),
        )
        loss = loss_natural + self.d.beta * loss_robust
        return self.learn(loss), adv


@pytest.mark.parametrize("options", [{}, {"beta": 1.0}, {"exact": False}], ids=str)
def test_three_steps_equal_the_transcription(options):
    """The default is the release: three forwards, three moves of the running statistics a step."""
    defense = TRADES(**options)
    net = base_net()
    step = three_steps(defense, net, Literal(net, defense))
    assert step.model.net[1].num_batches_tracked == (6 if options == {"exact": False} else 9)


def test_run_folders_from_before_the_default_keep_their_meaning():
    """They hold `exact` in full: what was False then is False now; a config that is silent follows the release."""
    for exact in (False, True):
        config = from_dict({"defense": {"name": "trades", "beta": 6.0, "exact": exact}})
        assert config.defense.exact is exact
        assert from_dict(to_dict(config)) == config
    assert from_dict({"defense": "trades"}).defense.updates == ("clean", "adv", "clean")


def test_loss_by_hand():
    """p = (1/2, 1/2), p' = (3/4, 1/4): CE = ln 2, KL = ln(1/2 / 3/4)/2 + ln(1/2 / 1/4)/2 = ln(4/3)/2."""
    clean, adv = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    terms = losses.trades(clean, adv, torch.tensor([0]), 6.0)
    assert terms["ce_clean"].item() == pytest.approx(math.log(2))
    assert terms["kl"].item() == pytest.approx(3 * math.log(4 / 3))
    # The other direction would be KL(p' || p) = ln(27/16)/4.
    assert terms["kl"].item() != pytest.approx(6 * math.log(27 / 16) / 4, rel=1e-2)
    # Two copies of an image have the loss of one: a mean over images, a sum over classes.
    twice = losses.trades(clean.repeat(2, 1), adv.repeat(2, 1), torch.tensor([0, 0]), 6.0)
    assert twice["kl"].item() == pytest.approx(terms["kl"].item())
    # Sure of one class and then of the other, in half precision: log(1 + e^160) is 160.
    sure = torch.tensor([[80.0, -80.0]]).bfloat16()
    assert losses.trades(sure, -sure, torch.tensor([0]), 6.0)["kl"].item() == pytest.approx(6 * 160)


def test_gradients_reach_both_sides():
    """d KL / d clean logit c = p_c (log p_c/p'_c - KL), d KL / d adv logit c = p'_c - p_c, here with p, p' as above."""
    clean = torch.tensor([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    grad_clean, grad_adv = torch.autograd.grad(losses.trades(clean, adv, torch.tensor([0]), 1.0)["kl"], (clean, adv))
    kl = math.log(4 / 3) / 2
    torch.testing.assert_close(
        grad_clean, torch.tensor([[(math.log(2 / 3) - kl) / 2, (math.log(2) - kl) / 2]]).double()
    )
    torch.testing.assert_close(grad_adv, torch.tensor([[0.25, -0.25]]).double())


def test_beta_zero_is_standard_training():
    torch.manual_seed(0)
    clean, adv = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 1, 2])
    loss = sum(losses.trades(clean, adv, labels, 0.0).values())
    assert loss.item() == F.cross_entropy(clean, labels).item()
    assert not torch.autograd.grad(loss, adv)[0].any()
