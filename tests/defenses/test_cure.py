"""CURE against a literal transcription of its three modes, its mask by hand, and where its networks come from."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from literal import BATCH, Double, Transcription, assert_same, saved, some_views, step_of, three_steps
from torch import nn

import fastarat
from fastarat.defenses import CURE
from fastarat.defenses.cure import Revision, maskable, quantile
from fastarat.runs import load_start


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """A network with the names that rgp_soft goes by."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.block = Block()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return self.linear(self.block(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def natural_net():
    torch.manual_seed(3)
    return Residual().double()


def kl(target, logits):
    """KL(softmax(target) || softmax(logits)), sum over classes / B, the target a constant."""
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(target.detach(), 1), reduction="sum") / len(logits)


class Literal(Transcription):
    """Forwards in the order f(x), rev(x), f(x'), rev(x'); scores and masks tensor by tensor in NumPy."""

    def __init__(self, net, defense):
        super().__init__(net, defense)
        self.rev, self.t, self.updates, self.zeroed = copy.deepcopy(net), 0, 0, {}

    def masked(self, name):
        if self.d.mode == "rgp_soft":
            return "block.conv1" in name
        return not name.startswith("linear.")

    def grads(self, loss):
        return torch.autograd.grad(loss, list(self.net.parameters()), retain_graph=True)

    def __call__(self, x, y):
        d, warm = self.d, self.epoch <= self.d.warmup_epochs
        adv = crafted = self.slow_attack(x, y, start="gaussian", objective="kl")
        if warm:
            adv = x
        draw = torch.rand((), generator=self.generator).item()
        clean_out = self.net(x.double())
        rev_clean = self.rev(x.double()).detach()
        adv_out = self.net(adv.double())
        rev_adv = self.rev(adv.double()).detach()
        ce_clean, ce_adv, loss_kl = F.cross_entropy(clean_out, y), F.cross_entropy(adv_out, y), kl(clean_out, adv_out)
        consistency = kl(rev_clean, clean_out) + kl(rev_adv, adv_out)
        if d.mode == "rgp":
            loss = d.alpha * ce_clean + (1 - d.alpha) * ce_adv + d.gamma * consistency
        else:
            loss = ce_clean + d.beta * loss_kl + d.gamma * consistency
        g_nat, g_adv, g_kl, total = (self.grads(part) for part in (ce_clean, ce_adv, loss_kl, loss))
        for (name, p), n, a, k, g in zip(self.net.named_parameters(), g_nat, g_adv, g_kl, total, strict=True):
            p.grad = g.clone()
            if not self.masked(name) or warm:
                continue
            score = {
                "paper": d.alpha * n.abs() + (1 - d.alpha) * a.abs(),
                "rgp": g.abs(),
                "rgp_soft": d.alpha * n + (1 - d.alpha) * k,
            }[d.mode].numpy()
            low = score < np.percentile(score, 100 * d.p)
            p.grad[torch.from_numpy(low)] = 0
            self.zeroed[name] = low.mean()
        self.sgd.step()
        self.t += 1
        if warm:
            self.rev.load_state_dict({**self.rev.state_dict(), **dict(self.net.named_parameters())})
        elif draw < d.r:
            self.updates += 1
            decay = min(1 - 1 / (self.t + 1), d.decay)
            for slow, fast in zip(self.rev.parameters(), self.net.parameters(), strict=True):
                slow.data = decay * slow.data + (1 - decay) * fast.data
        return loss.item(), crafted


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"r": 1.0}, 3),
        ({"r": 0.5}, 1),
        ({"r": 0.0, "p": 0.0}, 0),
        ({"mode": "rgp", "r": 1.0}, 3),
        ({"mode": "rgp_soft", "r": 1.0, "alpha": 0.4, "gamma": 0.5}, 3),
        ({"r": 1.0, "decay": 0.6, "alpha": 0.7, "beta": 1.0, "p": 0.5}, 3),
    ],
    ids=str,
)
def test_three_steps_equal_the_transcription(options, updates, tmp_path):
    net = natural_net()
    defense = CURE(pretrained=saved(tmp_path / "std", Double(net)), **options)
    literal = Literal(net, defense)
    # Another start than the natural network's: it must not matter.
    step = three_steps(defense, Residual().double(), literal)
    assert_same(step.companions["revision"].network.net, literal.rev, "revision")
    assert literal.updates == updates
    assert {"block.conv1.weight"} <= set(literal.zeroed)
    assert literal.zeroed["block.conv1.weight"] == pytest.approx(defense.p, abs=0.01)


@pytest.mark.parametrize("mode", ["paper", "rgp", "rgp_soft"])
def test_natural_epochs_come_first_without_a_checkpoint(mode):
    defense, net = CURE(warmup_epochs=2, mode=mode, r=1.0), natural_net()
    literal = Literal(net, defense)
    step = three_steps(defense, net, literal, epochs=(1, 2, 3))
    assert_same(step.companions["revision"].network.net, literal.rev, "revision")


def test_warm_up_is_standard_training(monkeypatch):
    from fastarat.defenses import Standard

    steps = [step_of(d, natural_net()) for d in (CURE(warmup_epochs=1), Standard())]
    for _ in range(3):
        images, labels = torch.rand(BATCH, 3, 8, 8), torch.randint(4, (BATCH,))
        for step in steps:
            step(images, labels)
    own, theirs = (dict(step.model.named_parameters()) for step in steps)
    for name in theirs:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-6, atol=1e-7)
    revision = dict(steps[0].companions["revision"].network.named_parameters())
    for name in own:
        torch.testing.assert_close(revision[name], own[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 10, 11, 1000, 4097])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 0.999])
def test_quantile_is_numpys_and_torchs(size, share):
    values = torch.randn(size, dtype=torch.float64)
    assert quantile(values, share).item() == pytest.approx(np.percentile(values.numpy(), 100 * share), rel=1e-12)
    assert quantile(values, share).item() == pytest.approx(torch.quantile(values, share).item(), rel=1e-12)


def test_quantile_by_hand():
    """Of 0, 1, 2, 4 the median lies at position 1.5: 1.5; 0.9 at position 2.7: 2 + 0.7 * 2 = 3.4."""
    values = torch.tensor([4.0, 0.0, 2.0, 1.0])
    assert quantile(values, 0.5).item() == 1.5
    assert quantile(values, 0.9).item() == pytest.approx(3.4)


def test_masked_gradients_by_hand(tmp_path):
    """p = 0.3: three of ten gradients are 0 in each masked tensor of ten, the classifier's are left alone."""
    net = natural_net()
    step = step_of(CURE(pretrained=saved(tmp_path / "std", Double(net))), net)
    step(torch.rand(BATCH, 3, 8, 8), torch.randint(4, (BATCH,)))
    for name, p in step.model.named_parameters():
        zeros = (p.grad == 0).double().mean().item()
        if "linear" in name:
            assert zeros == 0
        elif p.numel() == 6:  # position 1.5 of six: the two smallest scores lie below it
            assert zeros == pytest.approx(2 / 6)
        else:
            assert zeros == pytest.approx(0.3, abs=0.01)


def test_no_share_is_no_mask(tmp_path):
    net = natural_net()
    run = saved(tmp_path / "std", Double(net))
    images, labels = torch.rand(BATCH, 3, 8, 8), torch.randint(4, (BATCH,))
    for mode in ("paper", "rgp", "rgp_soft"):

        class Unmasked(CURE):
            def backward(self, terms, model, scale, views):
                scale(sum(terms.values())).backward()

        steps = [step_of(kind(pretrained=run, mode=mode, p=0.0), net) for kind in (CURE, Unmasked)]
        for step in steps:
            step(images, labels)
        torch.testing.assert_close(steps[0].model.state_dict(), steps[1].model.state_dict(), rtol=0, atol=0)


def test_masked_tensors_of_the_built_in_networks():
    net = fastarat.build_model("resnet18", num_classes=10)
    soft = set(maskable(net, "rgp_soft"))
    assert soft == {f"layer{s}.{b}.conv1.weight" for s in (1, 2, 3, 4) for b in (0, 1)}
    everything = {name for name, _ in net.named_parameters()}
    for mode in ("paper", "rgp"):
        assert everything - set(maskable(net, mode)) == {"linear.weight", "linear.bias"}
    with pytest.raises(fastarat.UserError, match="mode paper"):
        maskable(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), "rgp_soft")


def test_slow_copy_by_hand():
    """Weight 1 following 3: after step 1 halfway (1 - 1/2), after step 3 a quarter of the rest, then at the rate 0.1."""
    slow, fast = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    revision = Revision(slow)
    slow.weight.data.fill_(1.0)
    fast.weight.data.fill_(3.0)
    weight = slow.weight
    revision.follow(fast, torch.tensor(1), 0.1)
    assert weight.item() == 1, "not drawn"
    revision.due.fill_(1)
    for step, expected in ((1, 2.0), (3, 2.25), (99, 2.325)):
        revision.follow(fast, torch.tensor(step), 0.1)
        assert weight.item() == pytest.approx(expected)
    revision.due.fill_(0)
    revision.warm.fill_(1)
    revision.follow(fast, torch.tensor(99), 0.1)
    assert weight.item() == 3
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("options", "epoch", "share"), [({}, 1, 0.2), ({}, 200, 0.2), ({"r_halved_every": 20}, 120, 0.2),
                                    ({"r_halved_every": 20}, 121, 0.1), ({"r_halved_every": 20}, 145, 0.05)]
)  # fmt: skip
def test_the_copy_is_updated_with_probability_r(options, epoch, share):
    """Counted over 4000 draws of one generator, within four standard deviations."""
    net = natural_net()
    step = step_of(CURE(warmup_epochs=1, **options), net)
    step.forward.epoch.fill_(epoch)

    class Instant:
        epoch, generator = step.forward.epoch, step.generator

        def __call__(self, images, *branches):
            return images, ()

        companion = staticmethod(lambda module, images: images)
        views = staticmethod(fastarat.Views)

    attacked, drawn = fastarat.attacks.Attacked(torch.zeros(2), None), 0
    for _ in range(4000):
        step.defense.forward(Instant(), step.companions, torch.zeros(2), torch.zeros(2), attacked)
        drawn += step.companions["revision"].due.item()
    assert drawn / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))


def test_terms_by_hand():
    """p(x) = (1/2, 1/2), p(x') = (3/4, 1/4), copy (3/4, 1/4) and (1/2, 1/2), label 0."""
    even, tilted = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    extra = {"slow_clean": tilted, "slow_adv": even}
    views = fastarat.Views(torch.tensor([0]), logits_clean=even, logits_adv=tilted, extra=extra)
    ahead, back = math.log(4 / 3) / 2, 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    terms = CURE(gamma=2.0).loss(views)
    assert terms["ce_clean"].item() == pytest.approx(math.log(2))
    assert terms["kl"].item() == pytest.approx(5 * ahead)
    assert terms["consistency"].item() == pytest.approx(2 * (back + ahead))
    terms = CURE(mode="rgp", alpha=0.1).loss(views)
    assert terms["ce_clean"].item() == pytest.approx(0.1 * math.log(2))
    assert terms["ce_adv"].item() == pytest.approx(0.9 * math.log(4 / 3))
    assert set(terms) == {"ce_clean", "ce_adv", "consistency"}


def test_targets_are_constants():
    v = some_views(torch.float64)
    assert torch.autograd.grad(CURE().loss(v)["kl"], v.logits_clean, allow_unused=True) == (None,)
    slow = v.extra["slow_clean"].requires_grad_()
    assert torch.autograd.grad(sum(CURE().loss(v).values()), slow, allow_unused=True) == (None,)


def test_a_resumed_step_continues_as_an_unbroken_one(tmp_path):
    """The copy, its statistics and its counters are part of the saved state."""
    net = natural_net()
    defense = CURE(pretrained=saved(tmp_path / "std", Double(net)), r=1.0)
    batches = [(torch.rand(BATCH, 3, 8, 8), torch.randint(4, (BATCH,))) for _ in range(4)]
    whole = step_of(defense, net)
    for batch in batches[:2]:
        whole(*batch)
    state, noise = copy.deepcopy(whole.state_dict()), whole.generator.get_state()
    resumed = step_of(defense, net, seed=0)
    resumed.load_state_dict(state)
    resumed.generator.set_state(noise)
    for batch in batches[2:]:
        whole(*batch)
        resumed(*batch)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_captured_step_equals_the_eager_one(tmp_path):
    net = natural_net().float()
    run = saved(tmp_path / "std", net)
    load_start(CURE(pretrained=run), net)
    batches = [(torch.rand(BATCH, 3, 8, 8), torch.randint(4, (BATCH,))) for _ in range(3)]
    steps = [
        fastarat.TrainStep(copy.deepcopy(net), CURE(pretrained=run, r=0.5), torch.empty(2, 3, 8, 8), num_steps=2,
                           capture=capture)
        for capture in (False, "fake")
    ]  # fmt: skip
    for batch in batches:
        for step in steps:
            step(*batch)
    for part in ("model", "companions"):
        torch.testing.assert_close(*(step.state_dict()[part] for step in steps))
