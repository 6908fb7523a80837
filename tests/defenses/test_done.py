"""DONE's weights against their closed form and the objective they come from."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from literal import Moment, base_net, sgd, slow_attack, three_steps

import fastarat
from fastarat.defenses import DONE
from fastarat.losses import done_weights
from fastarat.nets.models import WideResNet


class Literal:
    def __init__(self, net, defense):
        self.net, self.d = copy.deepcopy(net), defense
        self.sgd = sgd(self.net.parameters())
        self.generator = torch.Generator().manual_seed(11)

    def __call__(self, x, y):
        adv = slow_attack(self.net, x, y, self.generator, start="uniform", objective="ce")
        losses = F.cross_entropy(self.net(adv.double()), y, reduction="none")
        powers = [math.exp(one / self.d.r) for one in losses.tolist()]
        weights = [p / sum(powers) for p in powers] if self.epoch >= 31 else [1 / len(x)] * len(x)
        loss = sum(w * one for w, one in zip(weights, losses, strict=True))
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.item(), adv


@pytest.mark.parametrize("r", [1.0, 0.2])
def test_three_steps_equal_the_transcription(r):
    defense, net = DONE(r=r), base_net()
    step = three_steps(defense, net, Literal(net, defense), epochs=(30, 31, 32))
    assert step.model.net[1].num_batches_tracked == 3


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


def views(weighted=True, dtype=torch.float64):
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    return fastarat.Views(torch.tensor([0, 1, 2, 3, 0]), logits_adv=logits, extra={"weighted": torch.tensor(weighted)})


def test_gradient_is_that_of_the_regularised_worst_case():
    """d/dz of r log mean exp(l_i / r), the DRO objective the weights solve; its own gradient by finite differences."""
    v = views()

    def objective(logits):
        each = F.cross_entropy(logits, v.labels, reduction="none")
        return 0.5 * torch.logsumexp(each / 0.5, 0)

    mine = torch.autograd.grad(DONE(r=0.5).loss(v)["ce_adv"], v.logits_adv)
    torch.testing.assert_close(mine, torch.autograd.grad(objective(v.logits_adv), v.logits_adv))
    assert torch.autograd.gradcheck(objective, v.logits_adv)


def test_burn_in_is_plain_adversarial_training():
    v = views(weighted=False)
    assert DONE().loss(v)["ce_adv"].item() == pytest.approx(F.cross_entropy(v.logits_adv, v.labels).item())
    wide = WideResNet(10, 1, 4)
    for epoch, epochs, model, options in (
        (31, 100, None, {}), (60, 120, wide, {}), (7, 20, None, {}), (5, 20, None, {"begin_epoch": 5}),
    ):  # fmt: skip
        assert Moment(epoch, epochs, model=model).extra(DONE(**options))["weighted"]
        assert not Moment(epoch - 1, epochs, step=390, model=model).extra(DONE(**options))["weighted"]


def test_loss_compiles_whole_in_float32():
    v = views(dtype=torch.bfloat16)
    compiled = torch.compile(DONE().loss, fullgraph=True, backend="aot_eager")(v)
    torch.testing.assert_close(compiled, DONE().loss(v))
    assert compiled["ce_adv"].dtype == torch.float32


def test_options():
    with pytest.raises(fastarat.UserError, match=r"defense.r=0: expected a number above 0"):
        DONE(r=0.0)
    with pytest.raises(fastarat.UserError, match="count from 1"):
        DONE(begin_epoch=0)
    assert (DONE.recipe, DONE.start, DONE.attack_bn, DONE().r) == ("arat", "uniform", "eval", 1.0)
