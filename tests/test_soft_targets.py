"""Smoothed and mixed targets: what the losses and the attack get of them, and which defenses take them."""

import re

import pytest
import small
import torch
import torch.nn.functional as F

import fastarat
from fastarat.config import from_dict
from fastarat.defenses import DEFENSES
from fastarat.defenses.base import Views
from fastarat.losses import cross_entropy, smoothed, trades

SMOOTHED = {"standard", "at", "trades", "lbgat", "arrest", "ar-at", "gairat", "fat", "gair-fat", "cure", "vir", "done", "ca-at"}  # fmt: skip
MIXED = SMOOTHED - {"gairat", "fat", "gair-fat", "vir"}
STARTED = {"cure": {"pretrained": "memory"}, "arrest": {"teacher": "memory"}}


def defense(name: str, **fields) -> fastarat.Defense:
    return DEFENSES[name](**STARTED.get(name, {}), **fields)


def mixed(labels: torch.Tensor, share: float = 0.7) -> torch.Tensor:
    hot = F.one_hot(labels, 4).float()
    return share * hot + (1 - share) * hot.roll(1, 0)


def test_smoothed_targets_are_those_of_pytorchs_label_smoothing():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 5, generator=g), torch.randint(5, (9,), generator=g)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, smoothed(labels, 0.1, 5)), expected)
    shares = torch.softmax(torch.randn(9, 5, generator=g), 1)
    expected = F.cross_entropy(logits, shares, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, smoothed(shares, 0.1, 5)).mean(), expected)
    assert smoothed(torch.tensor([0]), 0.1, 2).tolist() == [[pytest.approx(0.95), pytest.approx(0.05)]]


@pytest.mark.parametrize("name", sorted(DEFENSES))
def test_every_cross_entropy_is_smoothed_or_the_defense_refuses(name):
    """By hand: of each defense's loss, smoothed, the terms that classify change by exactly what smoothing says."""
    images, labels = small.batch()
    if name not in SMOOTHED:
        with pytest.raises(fastarat.UserError, match=f"label_smoothing=0.1: the loss of {name} is of one class"):
            small.step_of(defense(name), label_smoothing=0.1)
        return
    plain, soft = (small.step_of(defense(name), num_steps=2, label_smoothing=s) for s in (0.0, 0.2))
    found, smooth = plain(images, labels), soft(images, labels)
    assert any(term.startswith("ce") for term in found)
    for term in found:
        assert term.startswith("ce") != torch.equal(found[term], smooth[term]), term


def test_each_smoothed_term_by_hand():
    g = torch.Generator().manual_seed(0)
    clean, adv = torch.randn(2, 6, 4, generator=g)
    labels = torch.randint(4, (6,), generator=g)
    views = Views(labels, logits_clean=clean, logits_adv=adv, soft=smoothed(labels, 0.2, 4))

    def ce(logits):
        return F.cross_entropy(logits, labels, label_smoothing=0.2)

    torch.testing.assert_close(defense("at").loss(views)["ce_adv"], ce(adv))
    torch.testing.assert_close(defense("standard").loss(views)["ce_clean"], ce(clean))
    torch.testing.assert_close(defense("trades").loss(views)["ce_clean"], ce(clean))
    torch.testing.assert_close(defense("trades").loss(views)["kl"], trades(clean, adv, labels, 6.0)["kl"])
    torch.testing.assert_close(defense("ca-at").loss(views), {"ce_clean": ce(clean), "ce_adv": ce(adv)})


def test_the_attack_sees_no_smoothing_but_does_see_a_mixture():
    images, labels = small.batch()
    points = [small.step_of(fastarat.AT(), label_smoothing=s).attack(images, labels).images for s in (0.0, 0.5)]
    assert torch.equal(*points)
    step = small.step_of(fastarat.AT(), num_steps=3)
    whole = step.attack(images, F.one_hot(labels, 4).float()).images
    # A mixture of one image with itself is that image; with another it is not.
    assert (whole - small.step_of(fastarat.AT(), num_steps=3).attack(images, labels).images).abs().max() < 1e-6
    other = small.step_of(fastarat.AT(), num_steps=3).attack(images, mixed(labels)).images
    assert (whole - other).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted(DEFENSES))
def test_a_mixture_of_an_image_with_itself_trains_like_the_image(name):
    images, labels = small.batch()
    if name not in MIXED:
        step = small.step_of(defense(name), num_steps=2)
        with pytest.raises(fastarat.UserError, match=r"labels are torch.float32 \[8, 4\], but .*: write int64 \[B\]"):
            step(images, mixed(labels))
        return
    hot = F.one_hot(labels, 4).float()
    found, expected = (small.step_of(defense(name))(images, target) for target in (hot, labels))
    for term, value in expected.items():
        torch.testing.assert_close(found[term], value, msg=term)
    step = small.step_of(defense(name))
    with step.probe(images, mixed(labels)) as probed:  # what --diagnostics looks at
        probed = {term: value.detach() for term, value in probed.items()}
    blended = step(images, mixed(labels))
    torch.testing.assert_close(probed, blended)
    assert not torch.equal(sum(blended.values()), sum(expected.values()))


def test_one_hot_attacks_and_double_precision():
    """CW asks for the one class; a float64 network gets float64 targets."""
    images, labels = small.batch()
    with pytest.raises(fastarat.UserError, match="the attack's objective cw is a margin to the one class"):
        small.step_of(fastarat.AT(), objective="cw")(images, mixed(labels))
    step = small.step_of(fastarat.TRADES())
    step.forward.progress = step.forward.progress.double()
    views = step.forward.views(mixed(labels), logits_clean=torch.zeros(8, 4, dtype=torch.float64))
    assert views.soft.dtype == torch.float64
    assert torch.equal(views.labels, mixed(labels).argmax(1))


@pytest.mark.parametrize("change", [lambda t: t * 2, lambda t: t[:, :3], lambda t: t - 0.25])
def test_rows_that_are_no_shares(change):
    images, labels = small.batch()
    with pytest.raises(fastarat.UserError, match="or rows of 4 shares that sum to 1"):
        small.step_of(fastarat.AT())(images, change(mixed(labels)))


class Own(fastarat.AT):
    """A loss of one's own, which says nothing of soft targets: taken for one of hard labels."""

    def loss(self, views):
        return {"ce": F.cross_entropy(views.logits_adv, views.labels)}


class Same(fastarat.AT):
    """Another name, the same loss."""


def test_a_subclass_with_its_own_loss_says_itself_what_it_takes():
    assert "is of one class per image" in Own().why_hard(mixed=False)
    assert Same().why_hard(mixed=True) == ""


def test_a_config_refuses_before_any_work():
    words = "label_smoothing=0.1: the loss of mart is of one class per image, not of shares of classes; leave it out"
    with pytest.raises(fastarat.UserError, match=re.escape(words)):
        from_dict({"defense": "mart", "label_smoothing": 0.1})
    with pytest.raises(fastarat.UserError, match=re.escape("label_smoothing=1 is outside [0, 1)")):
        from_dict({"label_smoothing": 1})


def test_a_compiled_and_a_captured_step_take_soft_targets():
    images, labels = small.batch()
    plain, captured = (small.step_of(fastarat.ARAT(), capture=c, label_smoothing=0.1) for c in ("off", "fake"))
    for shift in range(3):
        target = mixed(labels, 0.5 + 0.1 * shift)
        found, expected = captured(images, target), plain(images, target)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    seen = []
    plain.loss = lambda views: seen.append(views) or plain.eager_loss(views)
    plain(images, mixed(labels))
    torch._dynamo.reset()
    compiled = torch.compile(plain.eager_loss, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(seen[0]), plain.eager_loss(seen[0]), rtol=1e-4, atol=1e-5)
