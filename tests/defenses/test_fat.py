"""FAT and GAIR-FAT: the early-stopped attack against one that removes images from the batch, and by hand."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from literal import EPSILON, STEP, STEPS, Moment, Transcription, base_net, small_step, some_batch, three_steps

import fastarat
from fastarat.attacks import pgd
from fastarat.defenses import DEFENSES, FAT, GAIRFAT
from fastarat.defenses.fat import early_stopped
from fastarat.nets.models import WideResNet


class Literal(Transcription):
    """The released loop: an image that is misclassified with no slack left goes out of the batch as it is."""

    def __init__(self, net, defense):
        super().__init__(net, defense)
        self.stopped = []

    def attack(self, x, y, start):
        tau = self.d.slack[0] if self.epoch <= 40 else self.d.slack[1] if self.epoch <= 70 else self.d.slack[2]
        left, finals, kappas = list(range(len(x))), {}, dict.fromkeys(range(len(x)), 0)
        points, slack = dict(enumerate(start)), dict.fromkeys(range(len(x)), tau)
        for _ in range(STEPS):
            if not left:
                break
            iterated = torch.stack([points[i] for i in left]).requires_grad_()
            logits = self.net(iterated.double())
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, y[left]), iterated)
            going = []
            for row, i in enumerate(left):
                if logits[row].argmax() != y[i]:
                    if slack[i] == 0:
                        finals[i] = points[i]
                        continue
                    slack[i] -= 1
                else:
                    kappas[i] += 1
                going.append(i)
                moved = points[i] + STEP * grad[row].sign()
                points[i] = torch.min(torch.max(moved, x[i] - EPSILON), x[i] + EPSILON).clamp(0, 1)
            left = going
        self.stopped.append(len(finals))
        return torch.stack([finals.get(i, points[i]) for i in range(len(x))]), [kappas[i] for i in range(len(x))]

    def __call__(self, x, y):
        self.net.eval()
        start = (x + self.noise(x)).clamp(0, 1)
        adv, kappas = self.attack(x, y, start)
        self.net.train()
        losses = F.cross_entropy(self.net(adv.double()), y, reduction="none")
        weights = [1.0] * len(x)
        if self.d.name == "gair-fat" and self.epoch >= 31:
            m = STEPS // 2
            weights = [(math.tanh(self.d.lam + 5 * (m - k) / m) + 1) / 2 for k in kappas]
        loss = sum(w * one for w, one in zip(weights, losses, strict=True)) / sum(weights)
        return self.learn(loss), adv


@pytest.mark.parametrize("name", ["fat", "gair-fat"])
def test_three_steps_equal_the_transcription(name):
    defense, net = DEFENSES[name](slack=(0, 1, 2)), base_net()
    literal = Literal(net, defense)
    three_steps(defense, net, literal, epochs=(40, 70, 71))
    assert all(0 < n < 6 for n in literal.stopped), "all or none stopped: nothing to compare"


def towards_one(points):
    """Two classes; an image of one pixel is classified as 0 while below 0.35, and any attack on 0 raises it."""
    pixel = points.flatten(1).sum(1)
    return torch.stack([0.35 - pixel, pixel - 0.35], 1)


STEPS_OF_TENTH = partial(pgd, epsilon=1.0, step_size=0.1, num_steps=4, backend="plain")


def attacked(slack, starts, forward=towards_one, attack=STEPS_OF_TENTH):
    images = torch.tensor(starts).view(-1, 1, 1, 1)
    labels = torch.zeros(len(starts), dtype=torch.int64)
    images, kappa, _ = early_stopped(attack, forward, images, labels, labels, images, torch.tensor(slack))
    return images.flatten().tolist(), kappa.tolist()


@pytest.mark.parametrize(
    ("slack", "finals"), [(0, [0.4, 0.9, 0.4]), (1, [0.5, 1.0, 0.5]), (2, [0.6, 1.0, 0.5]), (3, [0.6, 1.0, 0.5])]
)
def test_attack_by_hand(slack, finals):
    """From 0.2: 0.2 and 0.3 are right (kappa 2), 0.4 is the first wrong point. 0.9 is wrong at once. 0.1 has one more."""
    points, kappa = attacked(slack, [0.2, 0.9, 0.1])
    assert points == pytest.approx(finals)
    assert kappa == [2, 0, 3]


def test_much_slack_is_plain_pgd():
    torch.manual_seed(0)
    net = base_net().float().eval()
    images, labels = torch.rand(16, 3, 8, 8), torch.randint(4, (16,))
    start = (images + 0.1 * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    attack = partial(pgd, epsilon=EPSILON, step_size=STEP, num_steps=5, backend="plain")
    kept = start.clone()
    stopped = early_stopped(attack, net, images, labels, labels, start, torch.tensor(5))
    plain = attack(net, images, labels, labels, start, count=True)
    assert torch.equal(stopped.images, plain.images)
    assert torch.equal(stopped.kappa, plain.kappa)
    assert torch.equal(start, kept), "the start must not change"
    without = early_stopped(attack, net, images, labels, labels, start, torch.tensor(0))
    assert not torch.equal(without.images, plain.images)


def test_slack_may_differ_from_image_to_image():
    assert attacked([0, 2], [0.2, 0.2])[0] == pytest.approx([0.4, 0.6])


def test_an_image_that_left_stays_though_it_turns_right_again():
    """With statistics of the batch the same point may change its class: wrong at step 1, right from step 2 on."""
    calls = []

    def forward(points):
        calls.append(None)
        wrong = towards_one(points)
        return wrong if len(calls) == 1 else torch.stack([wrong[:, 1] + 1, wrong[:, 0]], 1)

    assert attacked(0, [0.5], forward) == (pytest.approx([0.5]), [0])


def always_wrong(points):
    return torch.stack([-points.flatten(1).sum(1) - 9, points.flatten(1).sum(1)], 1)


@pytest.mark.parametrize("name", ["fat", "gair-fat"])
@pytest.mark.parametrize(
    ("epoch", "epochs", "wide", "options", "slack"),
    [
        (1, 100, False, {}, 0), (40, 100, False, {}, 0), (41, 100, False, {}, 3), (70, 100, False, {}, 3),
        (71, 100, False, {}, 6), (100, 100, False, {}, 6), (8, 20, False, {}, 0), (9, 20, False, {}, 3),
        (15, 20, False, {}, 6), (40, 120, True, {}, 0), (41, 120, True, {}, 3), (71, 120, True, {}, 6),
        (5, 20, False, {"slack_epochs": (5, 6)}, 3), (6, 20, False, {"slack_epochs": (5, 6), "slack": (1, 2, 4)}, 4),
    ],
)  # fmt: skip
def test_slack_grows_with_the_epoch(name, epoch, epochs, wide, options, slack):
    """An image that is always wrong moves as often as it is forgiven."""
    run = Moment(epoch, epochs, model=WideResNet(10, 1, 4) if wide else None)
    image, label = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    attack = partial(pgd, epsilon=1.0, step_size=0.1, num_steps=8, backend="plain")
    result = DEFENSES[name](**options).attack(attack, always_wrong, image, label, label, image, run=run)
    assert result.images.item() == pytest.approx(0.1 * slack)


def test_epochs_change_inside_a_captured_step():
    """The schedule is read from device tensors: the same captured function serves every epoch."""
    step, (images, labels) = small_step(FAT(), capture="fake"), some_batch()
    moved = []
    for progress in (0.0, 0.5):
        step.forward.progress.fill_(progress)
        step.generator.manual_seed(0)
        moved.append(step.attack(images, labels).images)
    assert not torch.equal(*moved)


def test_losses_by_hand():
    """Logits (ln 3, 0) and (0, 0), label 0: CE ln(4/3) and ln 2. FAT: the mean. GAIR-FAT, lam 0: kappa 5 and 10 weigh
    1/2 and sigma(-10)."""
    logits, labels = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), torch.tensor([0, 0])
    extra = {"weighted": torch.tensor(True), "lam": torch.tensor(GAIRFAT().lam)}
    views = fastarat.Views(labels, logits_adv=logits, kappa=torch.tensor([5, 10]), num_steps=10, extra=extra)
    first, second = math.log(4 / 3), math.log(2)
    assert FAT().loss(views)["ce_adv"].item() == pytest.approx((first + second) / 2)
    weight = 1 / (1 + math.exp(10))
    expected = (first / 2 + second * weight) / (0.5 + weight)
    assert GAIRFAT().loss(views)["ce_adv"].item() == pytest.approx(expected)


def test_the_card_of_gair_fat_has_the_rows_of_both():
    assert set(GAIRFAT().describe("linf")) == {"kappa weights", "early stop"}
