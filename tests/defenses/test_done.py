"""DONE's weights against their closed form and the objective they come from."""

import math

import pytest
import torch
import torch.nn.functional as F
from literal import Transcription, base_net, some_views, three_steps

from fastarat.defenses import DONE
from fastarat.losses import done_weights


class Literal(Transcription):
    def __call__(self, x, y):
        adv = self.slow_attack(x, y, start="uniform", objective="ce")
        losses = F.cross_entropy(self.net(adv.double()), y, reduction="none")
        powers = [math.exp(one / self.d.r) for one in losses.tolist()]
        weights = [p / sum(powers) for p in powers] if self.epoch >= 31 else [1 / len(x)] * len(x)
        loss = sum(w * one for w, one in zip(weights, losses, strict=True))
        return self.learn(loss), adv


@pytest.mark.parametrize("r", [1.0, 0.2])
def test_three_steps_equal_the_transcription(r):
    defense, net = DONE(r=r), base_net()
    three_steps(defense, net, Literal(net, defense), epochs=(30, 31, 32))


def test_weights_by_hand():
    """Losses ln 3 and 0: 3/4 and 1/4 with r = 1; with r = 1/2 nine to one."""
    losses = torch.tensor([math.log(3), 0.0])
    torch.testing.assert_close(done_weights(losses, 1.0), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(done_weights(losses, 0.5), torch.tensor([0.9, 0.1]))
    # Losses that would overflow exp: the largest is subtracted first.
    assert done_weights(torch.tensor([1000.0, 0.0]), 0.5).tolist() == [1, 0]


def test_limits_of_r():
    losses = torch.tensor([3.0, 1.0, 0.5])
    torch.testing.assert_close(done_weights(losses, 1e6), torch.full((3,), 1 / 3), rtol=1e-5, atol=0)
    assert done_weights(losses, 1e-3).tolist() == [1, 0, 0]


def test_gradient_is_that_of_the_regularised_worst_case():
    """d/dz of r log mean exp(l_i / r), the DRO objective the weights solve; its own gradient by finite differences."""
    v = some_views(torch.float64)

    def objective(logits):
        each = F.cross_entropy(logits, v.labels, reduction="none")
        return 0.5 * torch.logsumexp(each / 0.5, 0)

    mine = torch.autograd.grad(DONE(r=0.5).loss(v)["ce_adv"], v.logits_adv)
    torch.testing.assert_close(mine, torch.autograd.grad(objective(v.logits_adv), v.logits_adv))
    assert torch.autograd.gradcheck(objective, v.logits_adv)
