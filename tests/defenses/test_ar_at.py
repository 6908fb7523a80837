"""AR-AT against a slow literal transcription: separate forwards, two BatchNorms, in-place noise, float64."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastarat
from fastarat.losses import ar_at_invariance

EPSILON, STEP, STEPS = 0.1, 0.03, 3


class Double(nn.Module):
    """Runs a float64 network on float32 images, so that only the attack's update is single precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.double())


class TwoBN(nn.Module):
    def __init__(self, bn: nn.Module, shared: bool) -> None:
        super().__init__()
        self.adv = copy.deepcopy(bn)
        self.clean = self.adv if shared else copy.deepcopy(bn)
        self.use = "adv"

    def forward(self, x):
        return getattr(self, self.use)(x)


def base_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).double()  # fmt: skip


TAPPED = (4, 7)


class Literal:
    """methods as written: attack with in-place noise, forward x, forward x', loss, backward, SGD."""

    def __init__(self, net, step, defense):
        self.net = copy.deepcopy(net)
        for i in (1, 4, 7):
            self.net[i] = TwoBN(self.net[i], shared=not defense.split_bn)
        self.d = defense
        self.h_adv = copy.deepcopy(step.companions["predictor_adv"]) if "predictor_adv" in step.companions else None
        self.h_clean = (
            copy.deepcopy(step.companions["predictor_clean"]) if "predictor_clean" in step.companions else None
        )
        modules = [self.net, *(m for m in (self.h_adv, self.h_clean) if m is not None)]
        self.parameters = [p for m in modules for p in m.parameters()]
        self.sgd = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.generator = torch.Generator().manual_seed(11)

    def use(self, name):
        for i in (1, 4, 7):
            self.net[i].use = name

    def features(self, x):
        taken = []
        for i, layer in enumerate(self.net):
            x = layer(x)
            if i in TAPPED:
                taken.append(F.relu(x).mean((2, 3)))
        return x, taken

    def attack(self, bx, by):
        x = bx.detach()
        # A generator fills memory in order, and the step's batches are channels-last.
        noise = torch.empty_like(x, memory_format=torch.channels_last)
        noise = noise.uniform_(-1, 1, generator=self.generator) * EPSILON
        if self.d.center == "noisy":
            x.add_(noise)  # the alias: the caller's batch changes
            adv = x.clone()
        else:
            adv = x + noise
        center = x.clone()
        self.use("adv")
        for _ in range(STEPS):
            adv.requires_grad_()
            loss = F.cross_entropy(self.net(adv.double()), by, reduction="sum")
            (grad,) = torch.autograd.grad(loss, adv)
            adv = adv.detach() + STEP * grad.sign()
            adv = torch.min(torch.max(adv, center - EPSILON), center + EPSILON).clamp(0, 1)
        return adv

    def __call__(self, images, labels):
        bx = images.clone()
        adv = self.attack(bx, labels)
        self.use("clean")
        logits_clean, z_clean = self.features(bx.double())
        self.use("adv")
        logits_adv, z_adv = self.features(adv.double())
        total = 0.0
        for layer, (za, zc) in enumerate(zip(z_adv, z_clean, strict=True)):
            ha = self.h_adv[layer] if self.h_adv is not None else (lambda z: z)
            hc = self.h_clean[layer] if self.h_clean is not None else (lambda z: z)
            if self.d.shared_predictor:
                hc = ha

            def cos(a, b):
                return 1 - (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean()

            if self.d.align == "x->y":
                total = total + cos(ha(za), hc(zc.detach()))
            elif self.d.align == "y->x":
                total = total + cos(hc(zc), za.detach())
            elif self.d.align == "x<->y":
                total = total + cos(ha(za), hc(zc))
            else:
                total = total + (cos(ha(za), zc.detach()) + cos(hc(zc), za.detach())) / 2
        a, b = 0.3, 0.7
        loss = a * F.cross_entropy(logits_adv, labels) + b * F.cross_entropy(logits_clean, labels)
        loss = loss + self.d.gamma / len(TAPPED) * total
        self.sgd.zero_grad()
        loss.backward()
        grads = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        self.sgd.step()
        return loss.item(), adv, grads


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center": "clean"},
        {"split_bn": False},
        {"align": "y->x", "predictor_clean": True},
        {"align": "x->y,y->x", "predictor_clean": True},
        {"align": "x<->y", "predictor_clean": True, "shared_predictor": True},
        {"align": "x->y", "shared_predictor": True},
        {"align": "x->y,y->x", "predictor_adv": False, "split_bn": False, "center": "clean"},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default",
)
def test_three_steps_equal_the_transcription(options):
    defense = fastarat.ARAT(gamma=5.1, layers=("net.4", "net.7"), **options)
    net = base_net()
    seen = []

    class Spy(fastarat.ARAT):
        def forward(self, run, companions, images, labels, attacked):
            seen.append(attacked.images)
            return super().forward(run, companions, images, labels, attacked)

    spy = Spy(**{f.name: getattr(defense, f.name) for f in dataclasses.fields(defense)})
    step = fastarat.TrainStep(
        Double(copy.deepcopy(net)), spy, torch.empty(2, 3, 8, 8), epsilon=EPSILON, step_size=STEP, num_steps=STEPS,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4), seed=11,
    )  # fmt: skip
    step.companions["balance"].adv.fill_(0.3)
    step.companions["balance"].clean.fill_(0.7)
    literal = Literal(net, step, spy)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        images, labels = torch.rand(6, 3, 8, 8, generator=g), torch.randint(4, (6,), generator=g)
        kept = images.clone()
        terms = step(images, labels)
        loss, adv, _ = literal(images, labels)
        assert torch.equal(images, kept), "the caller's batch must not change"
        torch.testing.assert_close(seen[-1], adv, rtol=0, atol=0)
        assert sum(t.item() for t in terms.values()) == pytest.approx(loss, rel=1e-12)
    mine = dict(step.model.named_parameters())
    for i in (0, 3, 6, 11):
        torch.testing.assert_close(mine[f"net.{i}.weight"], literal.net[i].weight, rtol=1e-10, atol=1e-12)
    for i in (1, 4, 7):
        ours = step.model.net[i]
        for name in ("adv", "clean") if spy.split_bn else ("adv",):
            theirs = getattr(literal.net[i], name)
            for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                torch.testing.assert_close(
                    getattr(ours.branch_set(name), key),
                    getattr(theirs, key),
                    rtol=1e-10,
                    atol=1e-12,
                    msg=f"{i}.{name}.{key}",
                )


def step_for(defense, **options):
    net = fastarat.build_model("resnet-small", num_classes=4)
    options = {"epsilon": EPSILON, "num_steps": 2} | options
    return fastarat.TrainStep(net, defense, torch.empty(2, 3, 8, 8), **options)


def test_noisy_center_reaches_two_epsilon_and_clean_center_one():
    images, labels = torch.full((16, 3, 8, 8), 0.5), torch.randint(4, (16,))
    for center, furthest in (("noisy", 2 * EPSILON), ("clean", EPSILON)):
        defense = fastarat.ARAT(center=center)
        step = step_for(defense, num_steps=12)
        clean = defense.inputs(images, epsilon=EPSILON, norm="linf", generator=step.generator)
        distance = (step.attack(clean, labels).images - images).abs().max().item()
        assert furthest * 0.95 < distance <= furthest + 1e-6
        assert ((clean - images).abs().max() > 0) == (center == "noisy")


def test_eleven_updates_of_the_adversarial_branch_and_one_of_the_clean():
    step = step_for(fastarat.ARAT(), num_steps=10)
    step(torch.rand(8, 3, 8, 8), torch.randint(4, (8,)))
    assert step.model.bn1.num_batches_tracked == 11
    assert step.model.bn1.clean.num_batches_tracked == 1
    frozen = step_for(fastarat.ARAT(), num_steps=10, attack_bn="train-frozen")
    frozen(torch.rand(8, 3, 8, 8), torch.randint(4, (8,)))
    assert frozen.model.bn1.num_batches_tracked == 1


def test_balance_comes_from_the_clean_branch():
    defense = fastarat.ARAT(balance_power=2.0)
    step = step_for(defense)
    asked = []

    def probe(name, count):
        asked.append((name, count))
        return torch.tensor(0.8)

    defense.before_epoch(step.companions, probe, 1)
    assert asked == [("clean", 1000)]
    assert step.companions["balance"].adv.item() == pytest.approx(0.64)
    assert step.companions["balance"].clean.item() == pytest.approx(0.04)
    fixed = fastarat.ARAT(balance="fixed")
    step = step_for(fixed)
    fixed.before_epoch(step.companions, probe, 1)
    assert (step.companions["balance"].adv, step.companions["balance"].clean) == (1, 1)


def test_terms_by_hand():
    """Logits (ln 3, 0), label 0: CE = ln(4/3); with a = 0.25, b = 0.75, gamma = 2, distances 0.1 and 0.3."""
    views = fastarat.Views(
        labels=torch.tensor([0]), logits_clean=torch.tensor([[0.0, 0.0]]), logits_adv=torch.tensor([[math.log(3), 0.0]]),
        extra={"a": torch.tensor(0.25), "b": torch.tensor(0.75), "gamma": torch.tensor(2.0),
               "distances": torch.tensor([0.1, 0.3])},
    )  # fmt: skip
    terms = fastarat.ARAT().loss(views)
    assert terms["ce_adv"].item() == pytest.approx(0.25 * math.log(4 / 3))
    assert terms["ce_clean"].item() == pytest.approx(0.75 * math.log(2))
    assert terms["invariance"].item() == pytest.approx(0.4)


def test_gamma_defaults_to_the_networks():
    assert step_for(fastarat.ARAT()).companions["balance"].gamma == 30
    assert step_for(fastarat.ARAT(gamma=1.5)).companions["balance"].gamma == 1.5


def test_predictor_sizes_of_resnet18():
    net = fastarat.build_model("resnet18", num_classes=10)
    companions = fastarat.ARAT().companions(net, torch.rand(2, 3, 8, 8))
    assert sum(p.numel() for p in companions.parameters()) == 527_360


def test_l2_follows_the_released_convention():
    defense = fastarat.ARAT()
    assert (defense.start_kind("l2"), defense.bn_mode("l2")) == ("l2", "eval")
    images = torch.rand(2, 3, 8, 8)
    assert defense.inputs(images, epsilon=0.5, norm="l2", generator=None) is images
    step = step_for(defense, norm="l2", epsilon=0.5)
    assert all(math.isfinite(t.item()) for t in step(torch.rand(8, 3, 8, 8), torch.randint(4, (8,))).values())


@pytest.mark.parametrize("metric", ["cos", "mse", "kl"])
def test_distances(metric):
    torch.manual_seed(0)
    a = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert ar_at_invariance(a, a, distance=metric).item() == pytest.approx(0, abs=1e-12)
    by_hand = {
        "cos": 1 - sum((x @ y / (x.norm() * y.norm())).item() for x, y in zip(a, b, strict=True)) / 5,
        "mse": ((a - b) ** 2).sum().item() / 35,
        "kl": sum(
            (y.softmax(0) * (y.log_softmax(0) - x.log_softmax(0))).sum().item() for x, y in zip(a, b, strict=True)
        )
        / 5,
    }
    assert ar_at_invariance(b, a, distance=metric).item() == pytest.approx(by_hand[metric])
    assert torch.autograd.gradcheck(lambda a, b: ar_at_invariance(b, a, distance=metric, align="x<->y"), (a, b))


def test_alignment_values_and_gradients():
    """Symmetric D: all alignments share one value; 'x<->y' has twice the gradient of 'x->y,y->x'."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    grads, values = {}, {}
    for align in ("x->y", "y->x", "x->y,y->x", "x<->y"):
        z_adv, z_clean = a.clone().requires_grad_(), b.clone().requires_grad_()
        value = ar_at_invariance(z_clean, z_adv, align=align)
        grads[align] = torch.autograd.grad(value, (z_adv, z_clean), allow_unused=True)
        values[align] = value.item()
    assert len({round(v, 12) for v in values.values()}) == 1
    assert grads["x->y"][1] is None
    assert grads["y->x"][0] is None
    for side in (0, 1):
        torch.testing.assert_close(grads["x<->y"][side], 2 * grads["x->y,y->x"][side])
    with pytest.raises(fastarat.UserError, match="x->y"):
        ar_at_invariance(a, b, align="x-y")
    with pytest.raises(fastarat.UserError, match="cos"):
        ar_at_invariance(a, b, distance="cosine")
