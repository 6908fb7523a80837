"""What holds of every defense in the same way: losses, released settings, schedules, refusals, standard networks."""

import math

import pytest
import torch
import torch.nn.functional as F
from literal import CLASSES, Double, Moment, assert_same, base_net, saved, some_views, step_of

import fastarat
from fastarat.defenses import ARREST, CAAT, CURE, DEFENSES, DONE, FAT, GAIRAT, GAIRFAT, LBGAT, MART, TRADES, VIR
from fastarat.nets.models import WideResNet
from fastarat.runs import load_start
from fastarat.schedules import lr_at, recipe_of

LOSSES = {
    # the defense; the logits that its loss moves by all of their gradient; lam, where the loss reads it
    "trades": (TRADES(), ("clean", "adv"), {}),
    "mart": (MART(), ("clean", "adv"), {}),  # far from ties, where the most likely wrong class changes
    "lbgat": (LBGAT(), ("adv", "logits_teacher"), {}),
    "lbgat with the KL": (LBGAT(beta=6.0), ("clean", "adv", "logits_teacher"), {}),
    "gairat": (GAIRAT(), ("adv",), {"lam": -1.0}),
    "gairat discrete": (GAIRAT(kind="discrete"), ("adv",), {"lam": -1.0}),
    "fat": (FAT(), ("adv",), {}),
    "gair-fat": (GAIRFAT(), ("adv",), {"lam": -1.0}),
    "vir-at": (VIR(), (), {}),  # its weights and DONE's are constants
    "vir-trades": (VIR(mode="trades"), (), {}),
    "done": (DONE(), (), {}),
    "ca-at": (CAAT(), ("clean", "adv"), {}),
    "cure": (CURE(), ("adv",), {}),
    "cure rgp": (CURE(mode="rgp"), ("clean", "adv"), {}),
    "cure rgp_soft": (CURE(mode="rgp_soft"), ("adv",), {}),
}


def logits_of(views: fastarat.Views) -> dict[str, torch.Tensor]:
    logits = {name: v for name, v in views.extra.items() if v.dim() == 2}
    return {"clean": views.logits_clean, "adv": views.logits_adv, **logits}


def with_logits(views: fastarat.Views, **logits) -> fastarat.Views:
    """`views` with these logits in place of its own."""
    clean, adv = logits.pop("clean", views.logits_clean), logits.pop("adv", views.logits_adv)
    return views._replace(logits_clean=clean, logits_adv=adv, extra=views.extra | logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LOSSES)
def test_losses_compile_whole(case, dtype):
    defense, _, extra = LOSSES[case]
    views = some_views(dtype, **extra)
    compiled = torch.compile(defense.loss, fullgraph=True, backend="aot_eager")(views)
    torch.testing.assert_close(compiled, defense.loss(views))


@pytest.mark.parametrize("case", [case for case in LOSSES if LOSSES[case][1]])
def test_gradients_by_finite_differences(case):
    defense, moved, extra = LOSSES[case]
    views = some_views(torch.float64, **extra)

    def loss(*logits):
        return sum(defense.loss(with_logits(views, **dict(zip(moved, logits, strict=True)))).values())

    assert torch.autograd.gradcheck(loss, [logits_of(views)[name] for name in moved])


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("case", LOSSES)
def test_losses_are_float32_inside_and_survive_extremes(case, extreme):
    defense, _, extra = LOSSES[case]
    half = some_views(torch.bfloat16, **extra)
    if extreme:  # sure of one class, and of another under attack
        signs = {name: -1 if name.endswith("adv") else 1 for name in logits_of(half)}
        sure = torch.tensor([[80.0, -80.0, 0.0, 0.0]]).repeat(5, 1).bfloat16()
        half = with_logits(half, **{name: (sign * sure).requires_grad_() for name, sign in signs.items()})
    terms = defense.loss(half)
    assert all(t.dtype == torch.float32 and t.isfinite() for t in terms.values())
    single = with_logits(half, **{name: v.float() for name, v in logits_of(half).items()})
    torch.testing.assert_close(terms, defense.loss(single))
    sum(terms.values()).backward()
    assert all(v.grad is None or v.grad.isfinite().all() for v in logits_of(half).values())


@pytest.mark.parametrize("kind", [GAIRAT, GAIRFAT, DONE, VIR])
def test_burn_in_is_plain_adversarial_training(kind):
    burning, weighted = (some_views(weighted=value, lam=-1.0) for value in (False, True))
    plain = F.cross_entropy(burning.logits_adv, burning.labels).item()
    assert kind().loss(burning)["ce_adv"].item() == pytest.approx(plain, rel=1e-6)
    assert kind().loss(weighted)["ce_adv"].item() != pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize(
    ("made", "epochs", "first"),
    [
        *((kind(), epochs, first) for kind in (GAIRAT, DONE) for epochs, first in ((100, 31), (20, 7), (200, 61))),
        *((kind(begin_epoch=begin), 20, begin) for kind in (GAIRAT, DONE) for begin in (1, 5, 12)),
        (GAIRAT(begin_epoch=60), 100, 60),
        *((VIR(mode=mode), epochs, first) for mode in ("at", "trades") for epochs, first in ((115, 77), (230, 153))),
        (VIR(begin_epoch=3), 115, 3),
        *((kind(), epochs, -first) for kind in (GAIRAT, DONE) for epochs, first in ((120, 60), (240, 119))),
    ],
    ids=str,
)
def test_weights_begin_at(made, epochs, first):
    """From the first step of `first` on, and not at the last step before it; a negative one is a wide network's."""
    model, first = WideResNet(10, 1, 4) if first < 0 else None, abs(first)
    assert Moment(first, epochs, model=model).extra(made)["weighted"]
    if first > 1:
        assert not Moment(first - 1, epochs, step=390, model=model).extra(made)["weighted"]


@pytest.mark.parametrize(
    ("name", "released"),
    [
        ("trades", {"recipe": "trades"}),
        ("mart", {"lam": None, "recipe": "mart", "released_budget": (0.031, 0.007), "objective": "ce", "start": "gaussian",
                  "attack_bn": "eval"}),
        ("lbgat", {"beta": 0.0, "recipe": "lbgat", "released_budget": (0.031, 0.007), "objective": "kl", "start": "gaussian",
                   "attack_bn": "eval"}),
        ("gairat", {"lam": -1, "kind": "tanh", "recipe": "gairat", "released_budget": (0.031, 0.007), "objective": "ce",
                    "start": "uniform", "attack_bn": "eval"}),
        ("cure", {"objective": "kl", "start": "gaussian", "attack_bn": "eval", "recipe": "cure"}),
        ("vir", {"objective": "ce", "recipe": "vir", "start": "gaussian", "beta": 5.0}),
        ("done", {"recipe": "arat", "start": "uniform", "attack_bn": "eval", "r": 1.0}),
        ("ca-at", {"recipe": "ca-at", "start": "uniform", "attack_bn": "eval", "threshold": 0.9}),
    ],
)  # fmt: skip
def test_defaults_are_the_released_ones(name, released):
    assert {setting: getattr(DEFENSES[name](), setting) for setting in released} == released


@pytest.mark.parametrize(
    ("recipe", "epochs", "weight_decay", "rates"),
    [
        ("trades", 100, 2e-4, {1: 0.1, 74: 0.1, 75: 0.01, 76: 0.01}),
        ("trades-wrn", 76, 2e-4, {1: 0.1, 74: 0.1, 75: 0.01, 76: 0.01}),
        ("mart", 120, 3.5e-3, {1: 0.01, 74: 0.01, 75: 1e-3, 89: 1e-3, 90: 1e-4}),
        ("mart-wrn", 90, 7e-4, {1: 0.1, 74: 0.1, 75: 0.01, 89: 0.01, 90: 0.001}),
        ("lbgat", 100, 2e-4, {1: 0.02, 2: 0.1, 75: 0.1, 76: 0.01, 90: 0.01, 91: 0.001, 100: 0.001}),
        ("cure", 120, 7e-4, {1: 0.1, 99: 0.1, 100: 0.01, 120: 0.01}),
        ("cure-200", 200, 5e-4, {99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 200: 0.001}),
        ("vir", 115, 7e-4, {74: 0.1, 75: 0.01, 89: 0.01, 90: 0.001, 99: 0.001, 100: 1e-4, 115: 1e-4}),
    ],
)
def test_schedules(recipe, epochs, weight_decay, rates):
    recipe = recipe_of(recipe)
    assert (recipe.epochs, recipe.weight_decay) == (epochs, weight_decay)
    found = {epoch: lr_at(epoch, 0, steps=391, epochs=epochs, recipe=recipe) for epoch in rates}
    assert found == pytest.approx(rates)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        *((kind, {"lam_schedule": "linear", "lam_max": value}, "lam-max 10") for kind in (GAIRAT, GAIRFAT) for value in (None, math.inf)),
        *((kind, {"begin_epoch": 0}, "count from 1") for kind in (GAIRAT, VIR, DONE)),
        (DONE, {"r": 0.0}, "defense.r=0: expected a number above 0"),
        *((CAAT, {"threshold": value}, "it is a cosine") for value in (1.0, -0.1, 90.0)),
        (CURE, {"p": 30.0}, "defense.p=30 .*write 0.3 for 30 %"),
        *((CURE, {name: 1.5}, f"defense.{name}=1.5") for name in ("alpha", "r", "decay")),
        (CURE, {"warmup_epochs": -1}, "warmup_epochs"),
        *((kind, {"slack": (0, 3)}, "0,3,6") for kind in (FAT, GAIRFAT)),
        *((kind, {"slack_epochs": (3,)}, "41,71") for kind in (FAT, GAIRFAT)),
    ],
)  # fmt: skip
def test_options_are_checked(kind, options, words):
    with pytest.raises(fastarat.UserError, match=words):
        kind(**options)


@pytest.mark.parametrize(
    ("defense", "row", "words"),
    [
        (GAIRAT(), "kappa weights", "tanh, lambda -1 (fixed), from epoch 31 of 100 (WRN: 60 of 120), scaled"),
        (LBGAT(), "natural network", "resnet18-lbgat (resnet-small for images under 32 pixels), trained alongside, unused at test"),
        (ARREST(phi=None), "noisy replay", "off"),
        (ARREST(teacher="r"), "noisy replay", "images turned by more than 30 degrees"),
        (ARREST(nr_batch=True), "noisy replay", "the batch, when over 0.5 of it has turned by more than 30 degrees"),
        (CURE(pretrained="runs/std"), "starts from", "the standard run runs/std"),
        (CURE(warmup_epochs=40), "starts from", "40 natural epochs"),
        (CURE(), "gradient mask", "mode paper, 30% of each tensor, alpha 0.1"),
        (FAT(), "early stop", "forgives 0 misclassifications, 3 from epoch 41, 6 from 71, of 100 (of 120 for WRN), scaled"),
    ],
)  # fmt: skip
def test_cards_say(defense, row, words):
    assert defense.describe("linf")[row] == words


@pytest.mark.parametrize("kind", [ARREST, CURE])
def test_a_run_or_a_checkpoint_of_a_standard_network_is_the_start(kind, tmp_path):
    standard = base_net()
    folder = saved(tmp_path / "std", Double(standard))
    with pytest.raises(fastarat.UserError, match="is not loaded into this model"):
        fastarat.TrainStep(Double(base_net()), kind(**{kind.starts_from: folder}), torch.empty(2, 3, 8, 8))
    for path in (folder, f"{folder}/last.safetensors"):
        step = step_of(kind(**{kind.starts_from: path}), base_net(seed=9))
        assert_same(step.model.net, standard, "student")
        (companion,) = step.companions.values()
        assert_same(companion.network.net, standard, "companion")
        assert not any(p is q for p in step.model.parameters() for q in step.companions.parameters())


@pytest.mark.parametrize("kind", [ARREST, CURE])
@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (lambda folder, net: None, "names none"),
        (lambda folder, net: str(folder / "nowhere"), "no checkpoint"),
        (lambda folder, net: saved(folder / "at", net, "at"), "trained with at, not standard"),
        (lambda folder, net: saved(folder / "std", base_net()), "another architecture"),
        (lambda folder, net: str(folder / "notes.safetensors"), "cannot be read"),
    ],
)
def test_a_missing_standard_network_stops_before_training(kind, teacher, says, tmp_path):
    net = fastarat.build_model("resnet-small", num_classes=CLASSES)
    (tmp_path / "notes.safetensors").write_text("hello")
    with pytest.raises(fastarat.UserError, match=says) as error:
        load_start(kind(**{kind.starts_from: teacher(tmp_path, net)}), net)
    assert "fastarat train --defense standard" in str(error.value)
    assert ("--defense.warmup-epochs" in str(error.value)) == (kind is CURE)
