"""CA-AT's combined gradient: geometry by hand, the released flat form, and its one-cycle schedule against torch's."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from costs import Costs, counting
from literal import Transcription, base_net, small_step, some_batch, three_steps

import fastarat
from fastarat.defenses import CAAT
from fastarat.losses import conflict_aware
from fastarat.schedules import lr_at, momentum_at, recipe_of


class Literal(Transcription):
    """Two separate forwards and backwards, both gradients flattened, combined, and written back."""

    def __init__(self, net, defense):
        super().__init__(net, defense)
        self.aligned = []

    def combined(self, g_adv, g_clean):
        t = self.d.threshold
        if self.d.normalize:
            g_adv, g_clean = g_adv / g_adv.norm(), g_clean / g_clean.norm()
        phi = float(g_adv @ g_clean / (g_adv.norm() * g_clean.norm()))
        self.aligned.append(phi >= t)
        if phi >= t:
            return g_clean
        mu = g_adv.norm() * (t * math.sqrt(1 - phi**2) - phi * math.sqrt(1 - t**2))
        return g_adv + mu / (g_clean.norm() * math.sqrt(1 - t**2)) * g_clean

    def __call__(self, x, y):
        adv = self.slow_attack(x, y, start="uniform", objective="ce")
        parameters = list(self.net.parameters())
        clean_loss = F.cross_entropy(self.net(x.double()), y)
        g_clean = torch.autograd.grad(clean_loss, parameters)
        adv_loss = F.cross_entropy(self.net(adv.double()), y)
        g_adv = torch.autograd.grad(adv_loss, parameters)
        if self.d.per_tensor:
            pairs = zip(g_adv, g_clean, strict=True)
            flat = torch.cat([self.combined(a.flatten(), c.flatten()) for a, c in pairs])
        else:
            flat = self.combined(*(torch.cat([g.flatten() for g in grads]) for grads in (g_adv, g_clean)))
        for p in parameters:
            p.grad, flat = flat[: p.numel()].view_as(p), flat[p.numel() :]
        self.sgd.step()
        return (clean_loss + adv_loss).item(), adv


@pytest.mark.parametrize(
    ("options", "aligned"),
    [
        ({}, {False}),
        ({"threshold": 0.84}, {True, False}),
        ({"threshold": 0.0}, {True}),
        ({"threshold": 0.999}, {False}),
        ({"per_tensor": True}, {True, False}),
        ({"normalize": True, "threshold": 0.95}, {False}),
    ],
    ids=str,
)
def test_three_steps_equal_the_transcription(options, aligned):
    defense, net = CAAT(**options), base_net()
    literal = Literal(net, defense)
    three_steps(defense, net, literal)
    assert set(literal.aligned) == aligned


def cosine(a, b):
    return (sum((x * y).sum() for x, y in zip(a, b, strict=True)) / length(a) / length(b)).item()


def length(a):
    return math.sqrt(sum(x.square().sum().item() for x in a))


def test_combination_by_hand():
    """g_c = (1, 0), g_a = (0, 2): phi 0, t 0.6: mu = 2 * 0.6 / 0.8 = 1.5, g = (1.5, 2), cosine 1.5 / 2.5 = 0.6."""
    clean, adv = [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])]
    torch.testing.assert_close(conflict_aware(clean, adv, 0.6)[0], torch.tensor([1.5, 2.0]))
    # Opposite parts: g_a = (-3, 4), phi -0.6: mu = 5 (0.6 * 0.8 + 0.6 * 0.8) / 0.8 = 6, g = (3, 4).
    torch.testing.assert_close(conflict_aware(clean, [torch.tensor([-3.0, 4.0])], 0.6)[0], torch.tensor([3.0, 4.0]))
    # Agreement at the threshold or above it: g_c itself, not g_a and no mixture of them.
    assert conflict_aware(clean, [torch.tensor([8.0, 1.0])], 0.6)[0].tolist() == [1, 0]
    assert conflict_aware(clean, [torch.tensor([3.0, 4.0])], 0.59)[0].tolist() == [1, 0]
    # Unit lengths first: g_a = (0, 1), g_c = (1, 0), mu = 0.75; above the threshold g_c / |g_c|.
    unit = conflict_aware([torch.tensor([5.0, 0.0])], adv, 0.6, normalize=True)[0]
    torch.testing.assert_close(unit, torch.tensor([0.75, 1.0]))
    unit = conflict_aware([torch.tensor([5.0, 0.0])], [torch.tensor([1.0, 0.0])], 0.6, normalize=True)[0]
    torch.testing.assert_close(unit, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_the_cosine_is_the_threshold_exactly_below_it(threshold):
    g = torch.Generator().manual_seed(0)
    seen = set()
    for pull in (-3.0, -0.5, 0.0, 0.3, 0.8, 3.0, 30.0):
        clean = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 4), (7,))]
        adv = [torch.randn(c.shape, generator=g, dtype=torch.float64) + pull * c for c in clean]
        combined = conflict_aware(clean, adv, threshold)
        below = cosine(adv, clean) < threshold
        seen.add(below)
        if below:
            assert cosine(combined, clean) == pytest.approx(threshold, abs=1e-12)
            # Only along g_c has g moved away from g_a.
            moves = [x - a for x, a in zip(combined, adv, strict=True)]
            assert abs(cosine(moves, clean)) == pytest.approx(1)
        else:
            assert all(torch.equal(x, c) for x, c in zip(combined, clean, strict=True))
    assert seen == {True, False}


def test_degenerate_gradients_stay_finite():
    zero, some = [torch.zeros(3)], [torch.tensor([1.0, 2.0, 3.0])]
    assert torch.equal(conflict_aware(zero, some, 0.9)[0], some[0])
    assert conflict_aware(some, zero, 0.9)[0].abs().max() < 1e-20
    assert conflict_aware(zero, zero, 0.9)[0].tolist() == [0, 0, 0]
    # Parallel: the cosine of equal vectors may exceed 1 by rounding, and 1 - phi^2 must not turn negative.
    assert torch.equal(conflict_aware(some, some, 0.999999)[0], some[0])
    # Opposite: nothing is left once g_a is tilted; rounding puts some of these cosines below -1.
    for clean in torch.randn(50, 5):
        assert conflict_aware([clean], [-3 * clean], 0.9)[0].abs().max() < 1e-2
    for tiny in (1e-12, 1e12):
        combined = conflict_aware([tiny * some[0]], [tiny * torch.tensor([3.0, -2.0, 1.0])], 0.9)
        assert cosine(combined, some) == pytest.approx(0.9, abs=1e-5)
    # In half precision the norms are still float32: 300^2 would overflow float16.
    half = conflict_aware([torch.full((4,), 300.0).half()], [torch.tensor([300.0, -300, 300, -300]).half()], 0.6)[0]
    assert half.dtype == torch.float16
    assert half.isfinite().all()
    # A diverged gradient shows.
    assert conflict_aware(some, [torch.tensor([math.nan, 0.0, 0.0])], 0.9)[0].isnan().any()


def test_combination_compiles_whole():
    torch.manual_seed(0)
    clean, adv = ([torch.randn(3, 4), torch.randn(7)] for _ in range(2))
    compiled = torch.compile(conflict_aware, fullgraph=True, backend="aot_eager")(clean, adv, 0.9)
    torch.testing.assert_close(compiled, conflict_aware(clean, adv, 0.9))


def test_terms_by_hand():
    clean, adv = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    terms = CAAT().loss(fastarat.Views(torch.tensor([0]), logits_clean=clean, logits_adv=adv))
    assert terms["ce_clean"].item() == pytest.approx(math.log(2))
    assert terms["ce_adv"].item() == pytest.approx(math.log(4 / 3))


def test_a_compiled_loss_gives_the_same_step_at_the_same_cost():
    """It joins both halves in one node, through which each gradient would reach the other half as well."""

    class Joined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, clean, adv):
            return clean.clone(), adv.clone()

        @staticmethod
        def backward(ctx, of_clean, of_adv):
            return of_clean, of_adv

    batch, steps = some_batch(), [small_step(CAAT(), capture=False) for _ in range(2)]
    steps[1].load_state_dict(steps[0].state_dict())
    loss = steps[1].loss
    steps[1].loss = lambda views: dict(zip(("ce_clean", "ce_adv"), Joined.apply(*loss(views).values()), strict=True))
    for step in steps:
        with counting(step, 8) as counter:
            step(*batch)
        assert counter.costs == Costs(4, 2, 2)
    torch.testing.assert_close(steps[0].model.state_dict(), steps[1].model.state_dict())


@pytest.mark.parametrize("epochs", [200, 100, 80])
def test_one_cycle_is_torchs(epochs):
    recipe = recipe_of("ca-at")
    sgd_ = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9, nesterov=recipe.nesterov)
    reference = torch.optim.lr_scheduler.OneCycleLR(sgd_, max_lr=0.1, total_steps=epochs, pct_start=0.025)
    for epoch in range(1, epochs + 1):
        group = sgd_.param_groups[0]
        at = {"steps": 391, "epochs": epochs, "recipe": recipe}
        for step in (0, 390):
            assert lr_at(epoch, step, **at) == pytest.approx(group["lr"], rel=1e-9)
            assert momentum_at(epoch, step, **at) == pytest.approx(group["momentum"], rel=1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimiser step was taken
            if epoch < epochs:
                reference.step()


def test_one_cycle_of_short_runs_and_other_recipes():
    recipe = recipe_of("ca-at")
    for epochs in (1, 2, 3, 20):
        rates = [lr_at(e, 0, steps=5, epochs=epochs, recipe=recipe) for e in range(1, epochs + 1)]
        assert rates[0] == pytest.approx(0.1)
        assert rates == sorted(rates, reverse=True)
        assert all(
            0.85 <= momentum_at(e, 0, steps=5, epochs=epochs, recipe=recipe) <= 0.95 for e in range(1, epochs + 1)
        )
    peak = [momentum_at(e, 0, steps=5, epochs=200, recipe=recipe) for e in (1, 5, 200)]
    assert peak == pytest.approx([0.95, 0.85, 0.95])
    assert lr_at(5, 0, steps=5, epochs=200, recipe=recipe, lr=0.4) == pytest.approx(0.4)
    assert momentum_at(5, 0, steps=5, epochs=200, recipe=recipe, momentum=0.7) == 0.7
    assert momentum_at(5, 0, steps=5, epochs=100, recipe=recipe_of("arat")) == 0.9
    assert not recipe_of("arat").nesterov
