"""Config: one tree for flags, YAML and Python; every mistake one clear line."""

import math
import re
from typing import Literal

import pytest
import torch
import yaml

import fastarat
from fastarat.cli import main
from fastarat.config import Config, OptimConfig, from_dict, merge, to_dict
from fastarat.schedules import RECIPES, ends_at, in_words, lr_at, recipe_of
from fastarat.specs import Attack
from fastarat.values import coerce


def test_round_trip_through_yaml():
    config = Config(
        defense=fastarat.ARAT(gamma=3.0, layers=("a", "b"), split_bn=False),
        epochs=7,
        attack=Attack(epsilon=4 / 255),
        optim=OptimConfig(recipe="trades", lr=0.05),
    )
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    for name, kind in fastarat.DEFENSES.items():
        assert from_dict({"defense": name}) == Config(defense=kind())


def test_another_defense_drops_the_files_hyper_parameters():
    merged = merge({"defense": {"name": "ar-at", "gamma": 3}}, {"defense": {"name": "at"}})
    assert from_dict(merged).defense == fastarat.AT()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"zzzz": 1}, r"unknown key 'zzzz'\. Known here: accumulate, amp, "),
        ({"epochz": 3}, r"unknown key 'epochz'; did you mean 'epochs'\? Known here: "),
        ({"defense": {"name": "at", "exact": True}}, r"unknown key 'defense.exact'\. Known here: none\."),
        ({"attack": {"epsilon": 8}}, "attack.epsilon=8 .*write 8/255"),
        ({"attack": {"epsilon": "1/0"}}, "expected a number"),
        ({"attack": {"bn": "evl"}}, "did you mean 'eval'"),
        ({"attack": 3}, "attack must hold"),
        ({"batch_size": 1.5}, "a whole number"),
        ({"amp": "perhaps"}, "true or false"),
        ({"defense": "missing.py:Mine"}, "no such file: missing.py"),
        ({"optim": {"recipe": "tradez"}}, "did you mean 'trades'"),
        ({"defense": "ca-at", "optim": {"momentum": 0.8}}, "optim.momentum=0.8: the recipe ca-at moves the momentum"),
        ({"optim": {"recipe": "ca-at", "momentum": 0.9}}, "optim.momentum=0.9: the recipe ca-at"),
        ({"defense": "standard", "awp": 0.01}, "awp=0.01: the defense standard has no attack"),
        ({"awp": 0.01, "awp_warmup": 3, "epochs": 3}, "awp_warmup=3: weights would never be perturbed"),
        ({"awp_warmup": 3}, "awp_warmup=3: there is no weight perturbation"),
        ({"epochs": 1, "optim": {"warmup": 2}}, "the run of 1 epoch$"),
        ({"dataset": ""}, "dataset='': expected a name or path"),
        ({"model": " "}, "model=' ': expected a name or path"),
        ({"out": ""}, "out='': expected a name or path"),
        ({"data_dir": ""}, "data_dir='': expected a name or path"),
        ([1, 2], "key: value"),
        ({"precision": 32}, "precision=32; did you mean 'fp32'"),
        ({"attack": {"step_size": -0.1, "norm": "l2"}}, "attack.step_size=-0.1 .*such as 32/255"),
        (
            {"optim": {"optimizer": "apx"}},
            r"optim.optimizer='apx'; did you mean 'apex'\? Expected one of: torch, apex\.",
        ),
        ({"defense": None}, "expected a name"),
    ],
)
def test_mistakes(values, words):
    """Values out of range: test_threat_model. The same through flags and files: test_cli."""
    with pytest.raises(fastarat.UserError, match=words):
        from_dict(values)


def test_names_in_other_spellings():
    config = from_dict({"optim": {"optimizer": "fastarat", "recipe": "Arat"}, "attack": {"norm": "infty"}})
    assert (config.optim.optimizer, config.optim.recipe, config.attack.norm) == ("torch", "arat", "linf")
    assert recipe_of("TRADES-wrn") is RECIPES["trades-wrn"]
    assert OptimConfig().optimizer == "torch"


def test_optional_values():
    assert coerce("none", str | None, "k") is None
    assert coerce("none", Literal["none", "x"] | None, "k") == "none"
    assert coerce(None, int | None, "k") is None


def test_a_defense_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nimport fastarat\n\n@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(fastarat.Defense):\n    beta: float = 2.0\n    def loss(self, views):\n        return {}\n"
    )
    config = from_dict({"defense": {"name": f"{file}:Mine", "beta": 3}})
    assert type(config.defense).__name__ == "Mine"
    assert config.defense.beta == 3.0
    assert from_dict(to_dict(config)).defense.beta == 3.0
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(fastarat.UserError, match=r"mine.txt is no Python file"):
        from_dict({"defense": f"{tmp_path / 'mine.txt'}:Mine"})
    with pytest.raises(fastarat.UserError, match="did you mean 'Mine'"):
        from_dict({"defense": f"{file}:Mime"})
    file.write_text("import nothing_like_this\n")
    with pytest.raises(fastarat.UserError, match=r"mine.py does not import: ModuleNotFoundError"):
        from_dict({"defense": f"{file}:Mine"})


def epochs_at(recipe: str, total: int, steps: int = 10) -> dict[float, tuple[int, int]]:
    """Learning rate -> (first, last) epoch at whose first step it holds."""
    spans: dict[float, tuple[int, int]] = {}
    for epoch in range(1, total + 1):
        lr = round(lr_at(epoch, 0, steps=steps, epochs=total, recipe=recipe_of(recipe)), 8)
        spans[lr] = (spans.get(lr, (epoch, 0))[0], epoch)
    return spans


@pytest.mark.parametrize(
    ("recipe", "total", "expected"),
    [
        ("arat", 100, {0.02: (1, 1), 0.1: (2, 76), 0.01: (77, 91), 0.001: (92, 100)}),
        ("arat-intended", 100, {0.02: (1, 1), 0.1: (2, 75), 0.01: (76, 90), 0.001: (91, 100)}),
        ("trades", 76, {0.1: (1, 74), 0.01: (75, 76)}),
        ("trades", 100, {0.1: (1, 74), 0.01: (75, 89), 0.001: (90, 99), 0.0001: (100, 100)}),
        ("mart", 120, {0.01: (1, 74), 0.001: (75, 89), 0.0001: (90, 99), 0.00001: (100, 120)}),
        ("rice", 200, {0.1: (1, 100), 0.01: (101, 150), 0.001: (151, 200)}),
        ("gairat", 100, {0.1: (1, 29), 0.01: (30, 59), 0.001: (60, 100)}),
        ("gairat-wrn", 120, {0.1: (1, 59), 0.01: (60, 89), 0.001: (90, 109), 0.0005: (110, 120)}),
        ("arat", 20, {0.02: (1, 1), 0.1: (2, 15), 0.01: (16, 18), 0.001: (19, 20)}),
        ("trades", 20, {0.1: (1, 15), 0.01: (16, 18), 0.001: (19, 20)}),
        ("arat", 4, {0.02: (1, 1), 0.1: (2, 3), 0.01: (4, 4)}),
        ("trades", 4, {0.1: (1, 3), 0.01: (4, 4)}),
    ],
)
def test_schedules(recipe, total, expected):
    assert epochs_at(recipe, total) == expected


def test_rice_drops_at_the_last_step_before_the_milestone():
    rice = recipe_of("rice")
    assert lr_at(100, 8, steps=10, epochs=200, recipe=rice) == pytest.approx(0.1)
    assert lr_at(100, 9, steps=10, epochs=200, recipe=rice) == pytest.approx(0.01)


def test_every_recipe_says_where_it_comes_from():
    assert all(recipe.source for recipe in RECIPES.values())


@pytest.mark.parametrize(
    ("recipe", "epochs", "warmup", "words"),
    [
        ("arat", 30, None, "lr 0.02 in epoch 1, then 0.1, 0.01 from epoch 24, 0.001 from 28"),
        ("arat", 1, None, "lr 0.02 in epoch 1"),
        ("arat", 1, 0, "lr 0.1"),
        ("arat", 2, None, "lr 0.02 in epoch 1, then 0.1"),
        ("arat", 4, 1, "lr 0 to 0.1 in 1 epoch, 0.01 from epoch 4"),
        ("mart", 2, None, "lr 0.01, 0.0001 from epoch 2"),
        ("gairat", 1, None, "lr 0.01"),
        ("rice", 3, None, "lr 0.1, 0.01 from 50% into epoch 2, 0.001 from 25% into epoch 3"),
        ("rice", 200, None, "lr 0.1, 0.01 from epoch 101, 0.001 from 151"),
        ("ca-at", 200, None, "lr 0.004 up to 0.1 and down to 4e-07"),
        ("ca-at", 30, None, "lr 0.1 and down to 4e-07"),
        ("ca-at", 1, None, "lr 0.1"),
    ],
)
def test_a_schedule_in_words_is_what_the_steps_get(recipe, epochs, warmup, words):
    recipe = recipe_of(recipe)
    assert in_words(recipe, epochs=epochs, lr=recipe.lr, warmup=warmup) == words
    last = lr_at(epochs, 0, steps=1, epochs=epochs, recipe=recipe, warmup=warmup)
    assert ends_at(recipe, epochs=epochs, warmup=warmup) * recipe.lr == pytest.approx(last)


def test_a_run_of_one_epoch_ends_in_its_warm_up():
    assert ends_at(recipe_of("arat"), epochs=1) == 0.2
    assert ends_at(recipe_of("arat"), epochs=1, warmup=0) == ends_at(recipe_of("trades"), epochs=1) == 1.0


def rates(recipe: str, total: int, steps: int = 4, warmup: int | None = None) -> list[float]:
    """The learning rate of every step of a run, as a share of the base rate."""
    found = recipe_of(recipe)
    where = {"steps": steps, "epochs": total, "recipe": found, "lr": 1.0, "warmup": warmup}
    return [lr_at(epoch, step, **where) for epoch in range(1, total + 1) for step in range(steps)]


def test_cosine_is_torchs_step_by_step_after_a_linear_rise():
    weight = torch.nn.Parameter(torch.zeros(()))
    sgd = torch.optim.SGD([weight], lr=1.0)
    steps = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=3 * 4)
    torchs = []
    for _ in range(12):
        torchs.append(sgd.param_groups[0]["lr"])
        sgd.step()
        steps.step()
    assert rates("cosine", 3) == pytest.approx(torchs)
    assert rates("cosine", 5, warmup=2) == pytest.approx([i / 8 for i in range(1, 9)] + torchs)
    assert rates("rebuffi", 40)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])  # 10 of 400 epochs
    assert rates("rebuffi", 40)[4:8] == pytest.approx([(1 + math.cos(math.pi * i / 156)) / 2 for i in range(4)])
    assert ends_at(recipe_of("cosine"), epochs=5) == 0.0
    assert (
        in_words(recipe_of("rebuffi"), epochs=400, lr=0.4) == "lr 0 to 0.4 in 10 epochs, then along half a cosine to 0"
    )
    assert in_words(recipe_of("cosine"), epochs=9, lr=0.1) == "lr 0.1, along half a cosine to 0"


def test_milestones_are_torchs_and_no_length_scales_them():
    recipe = OptimConfig(recipe="constant", milestones=(2, 5), gamma=0.2).schedule()
    weight = torch.nn.Parameter(torch.zeros(()))
    sgd = torch.optim.SGD([weight], lr=0.1)
    epochs = torch.optim.lr_scheduler.MultiStepLR(sgd, [2, 5], gamma=0.2)
    for epoch in range(1, 8):
        assert lr_at(epoch, 1, steps=3, epochs=7, recipe=recipe) == pytest.approx(sgd.param_groups[0]["lr"])
        sgd.step()
        epochs.step()
    # In place of another recipe's drops, the rest of which stays.
    config = from_dict({"optim": {"recipe": "arat", "milestones": "20,25"}})
    words = in_words(config.optim.schedule(), epochs=30, lr=0.1)
    assert words == "lr 0.02 in epoch 1, then 0.1, 0.01 from epoch 21, 0.001 from 26"


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ({"milestones": "90,75"}, "optim.milestones=90,75: expected numbers of epochs that grow"),
        ({"milestones": "0"}, "optim.milestones=0: expected 1 or more"),
        ({"gamma": 0.5}, "optim.gamma=0.5 has no milestones"),
        ({"recipe": "cosine", "milestones": "75"}, "the recipe cosine falls along a cosine"),
        ({"recipe": "ca-at", "milestones": "75"}, "the recipe ca-at falls along a cosine"),
    ],
)
def test_milestones_that_cannot_be(optim, words):
    with pytest.raises(fastarat.UserError, match=re.escape(words)):
        from_dict({"optim": optim})


def test_milestones_that_a_run_never_comes_to_are_refused():
    with pytest.raises(fastarat.UserError, match="a run of 2 epochs never comes to"):
        Config(epochs=2, optim={"milestones": (1, 5)})


@pytest.mark.parametrize("defense", ["gairat", "gair-fat"])
def test_gairat_needs_two_steps_before_anything_is_written(defense, tmp_path, capsys):
    out = tmp_path / "run"
    argv = (
        f"train --dataset digits --limit-train 64 --batch-size 32 --epochs 1 --defense {defense} --attack.num-steps 1"
    )
    assert main([*argv.split(), "--out", str(out)]) == 2
    assert "at least 2 attack steps" in capsys.readouterr().err
    assert not out.exists()
