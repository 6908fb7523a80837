"""AR-AT against a slow literal transcription: separate forwards, two BatchNorms, in-place noise, float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from literal import CLASSES, EPSILON, STEP, STEPS, Transcription, assert_same, sgd, small_step, some_batch, three_steps
from torch import nn

import fastarat
from fastarat.losses import ar_at_invariance


class TwoBN(nn.BatchNorm2d):
    """A plain BatchNorm for x' and a second one, `clean`, for x; the same twice when shared."""

    def __init__(self, bn: nn.BatchNorm2d, shared: bool) -> None:
        super().__init__(bn.num_features, dtype=torch.float64)
        self.use = "adv"
        if not shared:
            self.clean = copy.deepcopy(bn)

    def forward(self, x):
        return self.clean(x) if self.use == "clean" and hasattr(self, "clean") else super().forward(x)


def base_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, CLASSES),
    ).double()  # fmt: skip


TAPPED = (4, 7)


class Literal(Transcription):
    """methods as written: attack with in-place noise, forward x, forward x', loss, backward, SGD."""

    def begin(self, step):
        for i in (1, 4, 7):
            self.net[i] = TwoBN(self.net[i], shared=not self.d.split_bn)
        step.companions["balance"].adv.fill_(0.3)
        step.companions["balance"].clean.fill_(0.7)
        heads = copy.deepcopy({name: m for name, m in step.companions.items() if name != "balance"})
        self.h_adv, self.h_clean = heads.get("predictor_adv"), heads.get("predictor_clean")
        self.sgd = sgd(p for m in (self.net, *heads.values()) for p in m.parameters())

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
        noise = self.noise(x)
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
        return self.learn(loss), adv


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
    literal = Literal(net, defense)
    step = three_steps(defense, net, literal)
    for name in ("predictor_adv", "predictor_clean"):
        if name in step.companions:
            assert_same(step.companions[name], getattr(literal, name.replace("predictor", "h")), name)


def test_noisy_center_reaches_two_epsilon_and_clean_center_one():
    images, labels = torch.full((16, 3, 8, 8), 0.5), torch.randint(4, (16,))
    for center, furthest in (("noisy", 2 * EPSILON), ("clean", EPSILON)):
        defense = fastarat.ARAT(center=center)
        step = small_step(defense, num_steps=12)
        clean = defense.inputs(images, epsilon=EPSILON, norm="linf", generator=step.generator)
        distance = (step.attack(clean, labels).images - images).abs().max().item()
        assert furthest * 0.95 < distance <= furthest + 1e-6
        assert ((clean - images).abs().max() > 0) == (center == "noisy")


def test_eleven_updates_of_the_adversarial_branch_and_one_of_the_clean():
    step = small_step(fastarat.ARAT(), num_steps=10)
    step(*some_batch())
    assert step.model.bn1.num_batches_tracked == 11
    assert step.model.bn1.clean.num_batches_tracked == 1
    frozen = small_step(fastarat.ARAT(), num_steps=10, attack_bn="train-frozen")
    frozen(*some_batch())
    assert frozen.model.bn1.num_batches_tracked == 1


def test_balance_comes_from_the_clean_branch():
    defense = fastarat.ARAT(balance_power=2.0)
    step = small_step(defense)
    asked = []

    def probe(name, count):
        asked.append((name, count))
        return torch.tensor(0.8)

    defense.before_epoch(step.companions, probe, 1)
    assert asked == [("clean", 1000)]
    assert step.companions["balance"].adv.item() == pytest.approx(0.64)
    assert step.companions["balance"].clean.item() == pytest.approx(0.04)
    fixed = fastarat.ARAT(balance="fixed")
    step = small_step(fixed)
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
    assert small_step(fastarat.ARAT()).companions["balance"].gamma == 30
    assert small_step(fastarat.ARAT(gamma=1.5)).companions["balance"].gamma == 1.5


def test_predictor_sizes_of_resnet18():
    net = fastarat.build_model("resnet18", num_classes=10)
    companions = fastarat.ARAT().companions(net, torch.rand(2, 3, 8, 8))
    assert sum(p.numel() for p in companions.parameters()) == 527_360


def test_l2_follows_the_released_convention():
    defense = fastarat.ARAT()
    assert (defense.start_kind("l2"), defense.bn_mode("l2")) == ("l2", "eval")
    images = torch.rand(2, 3, 8, 8)
    assert defense.inputs(images, epsilon=0.5, norm="l2", generator=None) is images
    step = small_step(defense, norm="l2", epsilon=0.5)
    assert all(math.isfinite(t.item()) for t in step(*some_batch()).values())


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
    for option, words in (("align", "x->y"), ("distance", "cos")):
        with pytest.raises(fastarat.UserError, match=words):
            ar_at_invariance(a, b, **{option: "x-y"})
