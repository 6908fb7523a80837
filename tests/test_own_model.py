"""Anybody's network in Python: a module, a class, a function; what a run says of it, and how it is loaded again."""

import numpy as np
import pytest
import small
import torch
from torch import nn

import fastarat
from fastarat.cli import main
from fastarat.config import EvalConfig
from fastarat.runs import load_network

PIXELS = np.random.RandomState(0).randint(0, 256, (64, 8, 8, 3)).astype(np.uint8)
DATA = {"train": (PIXELS, np.arange(64) % 4), "test": (PIXELS[:8], np.arange(8) % 4)}


class Net(nn.Module):
    def __init__(self, classes=4, channels=3, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(channels, 8, 3), norm(8), nn.Linear(8, classes)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))


class Flat(nn.Module):
    """BatchNorm1d on features."""

    def __init__(self, classes=4):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes)
        )

    def forward(self, images):
        return self.body(images)


def train(out, network, **options):
    options = {"limit_train": None, "epochs": 1, "eval": EvalConfig(num_steps=1)} | options
    return fastarat.train(small.small_config(out, **options), data=DATA, model=network, progress=False)


def test_a_module_is_copied_split_trained_resumed_and_loaded_again(tmp_path, capsys):
    torch.manual_seed(0)
    given = Net()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    result = train(tmp_path / "run", given, normalize=True)
    small.assert_equal(dict(given.state_dict()), before)
    assert fastarat.branch(result.model, "clean")
    assert result.config.model == "python:Net"
    assert any(key.endswith("norm.clean.weight") for key in small.weights(result.run))
    images = torch.rand(4, 3, 8, 8)
    for again in (given, Net, lambda classes: Net(classes)):
        loaded, meta, _ = load_network(result.run, model=again)
        assert torch.equal(loaded(images), result.model(images))
        assert meta["branches"] == ["clean", "adv"]
    assert main(["report", str(result.run)]) == 0  # without example images
    assert "python:Net" in (result.run / "report" / "report.html").read_text()
    longer = fastarat.train(resume=result.run, overrides={"epochs": 2}, data=DATA, model=given, progress=False)
    assert len(longer.metrics) == 2
    assert main(["eval", str(result.run), "--dataset", "digits"]) == 2
    assert "load_run(run, model=...)" in capsys.readouterr().err
    with pytest.raises(fastarat.UserError, match="asked for again"):
        fastarat.train(resume=result.run, data=DATA, progress=False)
    with pytest.raises(fastarat.UserError, match="of another architecture"):
        load_network(result.run, model=Flat)


@pytest.mark.parametrize("defense", ["ar-at", "trades", "gairat", "lbgat"])
def test_batchnorm_of_features_is_split_or_grouped_for_every_kind_of_defense(tmp_path, defense):
    result = train(tmp_path / "run", Flat, defense=defense)
    keys = small.weights(result.run)
    assert any(".clean." in key for key in keys) == (defense == "ar-at")


def test_a_class_makes_the_same_start_each_time(tmp_path):
    small.assert_same(train(tmp_path / "a", Net).run, train(tmp_path / "b", Net).run)


def test_without_batchnorm_the_card_says_what_the_defense_then_is(tmp_path):
    def bare(classes):
        return Net(classes, norm=lambda width: nn.GroupNorm(2, width))

    with pytest.raises(fastarat.UserError, match=r"no BatchNorm layer to split.*--no-defense.split-bn"):
        train(tmp_path / "refused", bare)
    run = train(tmp_path / "run", bare, defense=fastarat.ARAT(split_bn=False)).run
    card = (run / "card.txt").read_text()
    assert "none: the network has no BatchNorm, so that ar-at is its losses alone" in card


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Net(5), "python:Net returns 5 logits, and arrays has 4 classes"),
        (Net(4, channels=1), "python:Net does not take images of 8x8 with 3 channel"),
        (nn.Sequential(Net(), nn.Softmax(1)), "returned probabilities"),
        (lambda: Net(), "failed, called with 4 classes"),
        (lambda classes: "net", "returned 'net'"),
        ("resnet18", "a name belongs in the config"),
        (nn.Sequential(nn.Flatten(), nn.Identity()), "without parameters"),
    ],
    ids=["classes", "channels", "softmax", "arguments", "text", "name", "empty"],
)
def test_what_is_wrong_with_a_network_is_one_line(tmp_path, model, said):
    with pytest.raises(fastarat.UserError, match=said) as found:
        train(tmp_path / "run", model)
    assert "\n" not in str(found.value)


def test_a_network_named_and_given_is_refused(tmp_path):
    with pytest.raises(fastarat.UserError, match="the config names model=resnet18"):
        train(tmp_path / "run", Net, model="resnet18")
