"""What the run card says of the release: each departure when it applies, and only then."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

import fastarat
from fastarat import released
from fastarat.config import Config, OptimConfig, SwaConfig
from fastarat.defenses import DEFENSES
from fastarat.specs import Attack
from fastarat.training import resolve


def attack(**options):
    return {"attack": Attack(**options)}


def optim(**options):
    return {"optim": OptimConfig(**options)}


OLD = attack(epsilon=0.031, step_size=0.007)
L2 = attack(norm="l2", epsilon=0.5, step_size=0.2)
WRN = {"model": "wrn-34-10"}


def rows(kind: str | type, fields: dict | None = None, size: int = 32, held_out: int = 0, **options) -> list[str]:
    """Sentences on the card of a run on CIFAR-10's shapes, or ["as released"]."""
    dataset = SimpleNamespace(name="cifar10", shape=(3, size, size), val=range(held_out))
    config = resolve(Config(defense=DEFENSES.get(kind, kind)(**(fields or {})), **options), dataset)
    found = list(released.card_rows(config, size, num_train=50_000 - held_out).items())
    if [key for key, _ in found] == ["release"]:
        return ["as released"]
    assert [key for key, _ in found] == [f"departs from release {i}" for i in range(1, len(found) + 1)]
    return [sentence for _, sentence in found]


@pytest.mark.parametrize("name", DEFENSES)
def test_every_defense_is_as_released_or_says_where_not(name):
    """At the released budget and length: these have a reason to depart, the others have none."""
    departs = {
        "trades": ["76 epochs; 100 epochs of resnet18 are our choice"],
        "lbgat": ["the release trains WRN-34-10; resnet18 is our choice"],
        "arrest": ["no code is public.*lam, phi, tau, the replay test"],
        "gairat": ["burn-in.*--defense.begin-epoch 60"],
        "gair-fat": ["burn-in", "a bug.*both keep the batch's"],
        "cure": ["the mask is the paper's"],
        "vir": ["VIR-AT"],
        "done": ["no code is public.*r, burn-in and schedule are our choices"],
        "ca-at": ["1024", "replaces NaN"],
    }
    options = OLD if DEFENSES[name].released_budget == (0.031, 0.007) else {}
    found = rows(name, **options)
    if name not in departs:
        assert found == ["as released"]
    else:
        assert len(found) == len(departs[name])
        for sentence, part in zip(found, departs[name], strict=True):
            assert re.search(part, sentence)


def test_released_variants_are_as_released():
    for name, fields, options in (
        ("trades", {}, OLD | WRN),
        ("trades", {}, {"attack": Attack(norm="l2", epsilon=0.5, step_size=0.1, start="gaussian")} | WRN),
        ("mart", {}, OLD | WRN),
        ("mart", {"lam": 5.0}, OLD),
        ("lbgat", {"beta": 6.0}, OLD | WRN),
        ("lbgat", {}, OLD | WRN),
        ("gairat", {}, OLD | WRN),
        ("gairat", {"begin_epoch": 60, "kind": "sigmoid"}, OLD),
        ("cure", {"mode": "rgp", "pretrained": "RUN"}, OLD),
        ("ar-at", {}, WRN),
        ("at", {}, {"seed": 3}),
        ("ar-at", {"gamma": 30.0}, {}),
        ("ar-at", {"gamma": 100.0}, WRN),
        ("ar-at", {"layers": tuple(f"layer4.{b}.bn{k}" for b in (0, 1) for k in (1, 2))}, {}),
        ("ar-at", {}, attack(norm="l2", epsilon=128 / 255, step_size=32 / 255)),
        ("gairat", {"begin_epoch": 60}, OLD | WRN),
        ("fat", {"slack_epochs": (41, 71)}, OLD),
        ("cure", {"mode": "rgp", "p": 0.5, "alpha": 0.3, "gamma": 0.5}, OLD | WRN),
        ("cure", {"p": 0.0}, OLD | WRN),
        ("trades", {}, OLD | WRN | optim(warmup=0)),
        ("standard", {}, attack(epsilon=0.15, num_steps=3)),
    ):
        assert rows(name, fields, **options) == ["as released"], (name, fields, options)


CASES = {
    # name, fields and settings of a run that departs; the same without; what the card says of it.
    "budget": ("trades", {}, {}, {}, OLD, "epsilon 8/255, step 2/255: published with 0.031 and 0.007"),
    "budget of AT": ("at", {}, attack(epsilon=0.15), {}, {}, "published with 8/255 and 2/255"),
    "TRADES' third update": ("trades", {"exact": False}, {}, {}, {}, "move twice a step"),
    "TRADES' network": ("trades", {}, optim(recipe="trades-wrn"), {}, WRN, "for 76 epochs; resnet18 is our choice"),
    "TRADES' width": ("trades", {}, {"model": "wrn-28-10"}, {}, WRN, "for 76 epochs; wrn-28-10 is our choice"),
    "MART's gamma": ("mart", {}, {"awp": 0.3}, {}, {}, "gamma_w 0.3 is our choice"),
    "precision": ("ar-at", {}, {"precision": "bf16"}, {}, {}, "precision bf16: the releases run in float32"),
    "validation": ("ar-at", {}, {"held_out": 1000}, {}, {}, "1,000 of 50,000 training images are held out"),
    "fewer images": ("ar-at", {}, {"limit_train": 500}, {}, {}, "limit_train 500 (default unset)"),
    "a warm-up": ("trades", {}, optim(warmup=1), {}, optim(warmup=0), "optim.warmup 1 (default unset)"),
    "no warm-up": ("ar-at", {}, optim(warmup=0), {}, {}, "optim.warmup 0 (default unset)"),
    "AR-AT's other gamma": ("ar-at", {"gamma": 30.0}, WRN, {"gamma": 30.0}, {}, "defense.gamma 30 (default unset)"),
    "the burn-in, given": ("gairat", {"begin_epoch": 31}, {}, {"begin_epoch": 60}, {}, "the burn-in is the paper's"),
    "the burn-in, moved": ("gairat", {"begin_epoch": 30}, {}, {"begin_epoch": 31}, {}, "begin_epoch 30 (default"),
    "VIR's scale": ("vir", {"scale": 7.0, "mode": "trades"}, {}, {"scale": 7.0}, {}, "defense.scale 7 (default"),
    "TRADES' L2 start": ("trades", {}, attack(norm="l2", epsilon=0.5, start="none"), {}, L2, "and the start none"),
    "TRADES' L2": ("trades", {}, L2, {}, attack(norm="l2", epsilon=0.5, step_size=0.1, start="gaussian"), "steps of 2 epsilon / steps"),
    "L2": ("mart", {}, L2, {}, {}, "published for L-infinity"),
    "AR-AT's L2": ("ar-at", {}, L2, {}, {}, "whose attack runs in eval mode"),
    "AT's extra forwards": ("at", {}, optim(recipe="rice"), {}, {}, "forwards the final images once more"),
    "AT's input": ("at", {}, optim(recipe="rice"), {}, optim(recipe="rice") | {"normalize": True}, "--normalize"),
    "MART's lam": ("mart", {"lam": 5.0}, WRN, {"lam": 5.0}, {}, "the other driver's"),
    "LBGAT's natural network": ("lbgat", {}, {"size": 8}, {}, {"size": 32}, "the natural network is resnet-small"),
    "AR-AT's centre": ("ar-at", {"center": "clean"}, {}, {}, {}, "in the release the image plus uniform noise"),
    "AR-AT's y->x": ("ar-at", {"align": "y->x"}, {}, {}, {}, "forgets a stop-gradient"),
    "AR-AT's two ways": ("ar-at", {"align": "x->y,y->x", "predictor_clean": True}, {}, {}, {}, "forgets a stop-gradient"),
    "AR-AT's no way": ("ar-at", {"align": "x<->y"}, {}, {}, {}, "defense.align x<->y (default x->y)"),
    "AR-AT's KL": ("ar-at", {"metric": "kl"}, {}, {}, {}, "temperature"),
    "AR-AT's layers, given": ("ar-at", {"layers": ("layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2", "bn")}, {"model": "preactresnet18"}, {}, {}, "chosen by analogy"),
    "AR-AT's layers": ("ar-at", {}, {"model": "preactresnet18"}, {}, {}, "chosen by analogy"),
    "GAIRAT's piecewise": ("gairat", {"lam_schedule": "piecewise"}, {}, {}, {}, "unreachable"),
    "GAIRAT's linear": ("gairat", {"lam_schedule": "linear", "lam_max": 9.0}, {}, {}, {}, "with every step"),
    "CURE's shares": ("cure", {}, WRN, {"p": 0.5, "alpha": 0.3, "gamma": 0.5}, WRN, "not the paper's for wrn-34-10"),
    "CURE's r": ("cure", {"r_halved_every": 20}, {}, {}, {}, "halves it at every step"),
    "VIR-AT's loss": ("vir", {}, {}, {"mode": "trades"}, {}, "trains VIR-AT with the loss of mode trades"),
    "VIR-TRADES' attack": ("vir", {"mode": "trades"}, {}, {}, {}, "takes the cross-entropy"),
    "CA-AT's batch": ("ca-at", {}, {}, {}, optim(lr=0.4) | {"batch_size": 1024}, "batches of 128 with a peak"),
    "SWA": ("ar-at", {}, {"swa": True}, {}, {"swa": True, "swa_config": SwaConfig(exact=True)}, "--swa-config.exact"),
    "SWA's start": ("ar-at", {}, {"swa": True, "swa_config": SwaConfig(start=0.5)}, {}, {"swa": True}, "from 50% of"),
    "SWA of others": ("at", {}, {"swa": True}, {}, {}, "on clean images"),
    "EMA": ("ar-at", {}, {"ema": 0.995}, {}, {}, "no release here keeps one"),
    "AWP of others": ("ar-at", {}, {"awp": 0.005}, {}, {}, "our combination"),
    "AWP's gamma": ("at", {}, {"awp": 0.005}, {}, {"awp": 0.01}, "has 0.01 after 0 for at"),
    "AWP's warm-up": ("trades", {}, {"awp": 0.005}, {}, {"awp": 0.005, "awp_warmup": 10}, "0.005 after 10 for trades"),
    "AWP's schedule": ("at", {}, {"awp": 0.01}, {}, {"awp": 0.01} | optim(recipe="rice"), "--optim.recipe rice"),
    "AWP's order": ("trades", {}, {"awp": 0.005}, {}, {}, "adv, clean, clean"),
    "a field": ("trades", {"beta": 3.0}, {}, {}, {}, "defense.beta 3 (default 6)"),
    "attack.bn": ("at", {}, attack(bn="eval"), {}, attack(bn="train"), "attack.bn eval (default train)"),
    "attack.start": ("at", {}, attack(start="none"), {}, attack(start="uniform"), "attack.start none (default uniform)"),
    "steps": ("at", {}, attack(num_steps=7), {}, {}, "attack.num_steps 7 (default 10)"),
    "schedule": ("ar-at", {}, optim(recipe="arat-intended"), {}, {}, "optim.recipe arat-intended (default arat)"),
    "rate": ("ar-at", {}, optim(lr=0.01), {}, optim(lr=0.1), "optim.lr 0.01 (default 0.1)"),
    "length": ("ar-at", {}, {"epochs": 20}, {}, {"epochs": 100}, "epochs 20 (default 100)"),
    "batch": ("ar-at", {}, {"batch_size": 64}, {}, {}, "batch_size 64 (default 128)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_departure_is_on_the_card_when_it_applies_and_not_otherwise(case):
    name, fields, options, other_fields, other_options, says = CASES[case]
    assert sum(says in sentence for sentence in rows(name, fields, **options)) == 1
    assert not any(says in sentence for sentence in rows(name, other_fields, **other_options))


@pytest.mark.parametrize("name", DEFENSES)
def test_every_released_value_is_a_setting(name):
    """A misspelt key of `also_released` would silently do nothing."""
    known = {f"{part}.{f.name}" for part, cls in (("attack", Attack), ("optim", OptimConfig), ("defense", DEFENSES[name]))
             for f in dataclasses.fields(cls)} | {f.name for f in dataclasses.fields(Config)}  # fmt: skip
    assert set(DEFENSES[name].also_released) <= known


def test_a_defense_of_ones_own_has_no_release():
    class Mine(fastarat.AT):
        pass

    assert rows(Mine, held_out=1000, epochs=3) == []
    assert "--swa-config.exact" in rows(Mine, held_out=1000, swa=True)[0]


def test_the_run_card_holds_the_lines(tmp_path):
    common = {"epochs": 1, "limit_train": 32, "batch_size": 16, "tensorboard": False}
    short = Attack(num_steps=1)
    fastarat.train(Config(**common, swa=True, attack=short, out=str(tmp_path / "swa")), progress=False)
    card = (tmp_path / "swa" / "card.txt").read_text()
    assert "departs from release 1" in card
    assert "attack.num_steps 1 (default 10)" in card
    assert "--swa-config.exact" in card
    assert "every 2 steps" in card
    fastarat.train(
        Config(epochs=1, limit_train=128, tensorboard=False, defense=DEFENSES["at"](), attack=short,
               out=str(tmp_path / "at")), progress=False,
    )  # fmt: skip
    card = (tmp_path / "at" / "card.txt").read_text()
    assert "attack.num_steps 1 (default 10), epochs 1 (default 100)" in card
    assert "SWA" not in card
    assert "training images are held out for validation" in card
