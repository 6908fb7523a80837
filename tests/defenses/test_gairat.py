"""GAIRAT against a slow transcription that counts kappa image by image, and its weights by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from literal import EPSILON, STEP, STEPS, Moment, Transcription, base_net, three_steps

import fastarat
from fastarat.defenses import GAIRAT
from fastarat.losses import gairat_weights
from fastarat.nets.models import WideResNet


class Literal(Transcription):
    """One image at a time: x + U clamped, K steps in eval mode, kappa of the points before each step; then omega CE."""

    def __init__(self, net, defense):
        super().__init__(net, defense)
        self.kappas = []

    def attack(self, x, y, center):
        kappa = 0
        for _ in range(STEPS):
            x.requires_grad_()
            logits = self.net(x.double())
            kappa += int(logits.argmax(1) == y)
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, y), x)
            x = x.detach() + STEP * grad.sign()
            x = torch.min(torch.max(x, center - EPSILON), center + EPSILON).clamp(0, 1)
        return x, kappa

    def omega(self, kappa):
        m = STEPS // 2
        if self.d.kind == "discrete":
            return (STEPS + 1 - kappa) / (STEPS + 1)
        z = self.d.lam + 5 * (m - kappa) / m
        return (math.tanh(z) + 1) / 2 if self.d.kind == "tanh" else 1 / (1 + math.exp(-z))

    def weights(self, kappas):
        if self.epoch < 31:
            return [1.0] * len(kappas)
        omegas = [self.omega(k) for k in kappas]
        return [w * len(omegas) / sum(omegas) for w in omegas]

    def __call__(self, x, y):
        self.net.eval()
        start = (x + self.noise(x)).clamp(0, 1)
        crafted = [self.attack(start[i : i + 1], y[i : i + 1], x[i : i + 1]) for i in range(len(x))]
        adv, kappas = torch.cat([c[0] for c in crafted]), [c[1] for c in crafted]
        self.kappas.append(kappas)
        self.net.train()
        losses = F.cross_entropy(self.net(adv.double()), y, reduction="none")
        loss = sum(w * one for w, one in zip(self.weights(kappas), losses, strict=True)) / len(x)
        return self.learn(loss), adv


@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "sigmoid"}, {"kind": "sigmoid", "lam": 0.3}, {"kind": "discrete"}, {"lam": 3.0}],
    ids=str,
)
def test_three_steps_equal_the_transcription(options):
    """Weights in float32 once rounded each image's share by 6e-8: the loss was right to 1e-7 and each tensor's update
    to 3e-7, but an element in which the images' gradients nearly cancel was off by up to 7e-4 (sigmoid), 1e-3 (tanh)
    and 5e-3 (discrete) of its update. They are computed in the dtype of the losses they weigh.
    """
    defense, net = GAIRAT(**options), base_net()
    literal = Literal(net, defense)
    # The first step is still in the burn-in.
    three_steps(defense, net, literal, epochs=(30, 31, 32))
    assert all(len(set(kappas)) > 1 for kappas in literal.kappas[1:]), "equal kappas test no weights"


@pytest.mark.parametrize("lam", [-1.0, 0.3])
@pytest.mark.parametrize("kind", ["tanh", "sigmoid", "discrete"])
def test_terms_and_gradients_equal_the_released_reweighting(kind, lam):
    """The released function, tensor by tensor, in float64; its weights carry no gradient and sum to the batch."""
    torch.manual_seed(0)
    logits = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    labels, kappa, num_steps = torch.randint(4, (11,)), torch.arange(11), 10
    count = kappa.double()
    if kind == "discrete":
        reweight = ((num_steps + 1) - count) / (num_steps + 1)
    else:
        steepness = lam + (int(num_steps / 2) - count) * 5 / (int(num_steps / 2))
        reweight = (steepness.tanh() + 1) / 2 if kind == "tanh" else steepness.sigmoid()
    normalized = reweight * len(reweight) / reweight.sum()
    released = F.cross_entropy(logits, labels, reduction="none").mul(normalized).mean()
    extra = {"weighted": torch.tensor(True), "lam": torch.tensor(lam, dtype=torch.float64)}
    v = fastarat.Views(labels, logits_adv=logits, kappa=kappa, num_steps=num_steps, extra=extra)
    ours = GAIRAT(kind=kind, lam=lam).loss(v)["ce_adv"]
    close = {"rtol": 1e-12, "atol": 1e-14}
    # Where tanh is near -1, 1 + tanh has lost the digits that sigma(2 x) keeps: 1e-16 of 1, whatever the weight.
    torch.testing.assert_close(gairat_weights(kappa, 10, lam, kind, dtype=torch.float64), normalized, **close)
    torch.testing.assert_close(ours, released, **close)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(released, logits), **close)


def test_weights_of_a_batch_that_is_hardly_fooled_sum_to_it():
    """All kappa 10 but one, lam -3: shares of 1e-7, which an epsilon in the denominator would bend."""
    kappa = torch.tensor([10] * 5 + [9])
    weights = gairat_weights(kappa, 10, -3.0, dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(6, rel=1e-14)


def test_weights_by_hand():
    """Ten steps, m = 5: tanh, lam -1, kappa 4 gives tanh 0, so 1/2; kappa 9 gives (tanh(-5) + 1)/2."""
    one = gairat_weights(torch.tensor([4, 9]), 10, -1.0)
    ratio = (math.tanh(-5) + 1) / 2 / 0.5
    torch.testing.assert_close(one, torch.tensor([2 / (1 + ratio), 2 * ratio / (1 + ratio)]), rtol=1e-5, atol=0)
    # sigmoid(0) = 1/2 and sigmoid(ln 3) = 3/4: lam = ln 3 at kappa 5 and, five steps later, ln 3 - 5.
    sigmoid = gairat_weights(torch.tensor([5, 10]), 10, math.log(3), "sigmoid")
    small = 3 / (3 + math.exp(5))
    torch.testing.assert_close(sigmoid, torch.tensor([0.75, small]) * 2 / (0.75 + small))
    # Eleven, six and one eleventh.
    torch.testing.assert_close(
        gairat_weights(torch.tensor([0, 5, 10]), 10, 0.0, "discrete"), torch.tensor([11, 6, 1]) / 6
    )
    # An odd number of steps: m = 3 of 7, kappa 6 gives 5 (3 - 6)/3 = -5, as kappa 0 gives 5.
    odd = gairat_weights(torch.tensor([0, 6]), 7, 0.0)
    torch.testing.assert_close(odd[1] / odd[0], torch.tensor(math.exp(-10)), rtol=1e-5, atol=0)


def test_weights_at_the_extremes():
    """Float32 tanh rounds near -1; kappa 10 with lam -1 is (tanh(-6) + 1)/2 = 6.1442e-6, kept to its last digits."""
    weights = gairat_weights(torch.tensor([0, 10]), 10, -1.0).double()
    expected = (1 / (1 + math.exp(12))) / (1 / (1 + math.exp(-8)))
    assert (weights[1] / weights[0]).item() == pytest.approx(expected, rel=1e-6)
    for kappa in (0, 10):
        torch.testing.assert_close(gairat_weights(torch.full((4,), kappa), 10, -1.0), torch.ones(4), rtol=1e-6, atol=0)
    # No weight at all would be 0/0.
    assert gairat_weights(torch.tensor([10, 10]), 10, -math.inf).tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_infinite_lam_is_plain_adversarial_training(kind):
    kappa = torch.tensor([0, 3, 10])
    assert gairat_weights(kappa, 10, math.inf, kind).tolist() == [1, 1, 1]
    assert gairat_weights(kappa, 10, torch.tensor(math.inf), kind).tolist() == [1, 1, 1]


def test_lambda_schedules():
    wide = WideResNet(10, 1, 4)

    def lam(epoch, epochs=100, model=None, **options):
        return Moment(epoch, epochs, model=model).extra(GAIRAT(**options))["lam"].item()

    assert lam(100) == -1
    assert lam(1) == -1
    piecewise = {"lam_schedule": "piecewise"}
    assert [lam(e, **piecewise) for e in (31, 59, 60, 100)] == [-1, -1, -3, -3]
    assert [lam(e, 200, **piecewise) for e in (118, 119)] == [-1, -3]
    assert [lam(e, 120, wide, **piecewise) for e in (60, 89, 90, 109, 110, 120)] == [-1, -1, -2, -2, -2.5, -2.5]
    linear = {"lam_schedule": "linear", "lam_max": 9.0}
    assert [lam(e, **linear) for e in (1, 51, 91)] == pytest.approx([9, 4, 0])


def test_options_of_the_weights_are_checked():
    with pytest.raises(fastarat.UserError, match="did you mean 'tanh'"):
        gairat_weights(torch.tensor([0]), 10, 0.0, "tan")
    with pytest.raises(fastarat.UserError, match="at least 2 attack steps, got 1"):
        gairat_weights(torch.tensor([0]), 1)
    assert gairat_weights(torch.tensor([0, 1]), 1, kind="discrete").tolist() == pytest.approx([4 / 3, 2 / 3])
