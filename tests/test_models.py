"""Networks: published sizes, taps. Key names and normalisation: test_interchange."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastarat
from fastarat.nets.models import WideResNet, build_model
from fastarat.nets.taps import PENULTIMATE, Taps, forward_with_features, tap_names, tappable


@pytest.mark.parametrize(
    ("name", "classes", "split", "parameters"),
    [
        ("resnet18", 10, False, 11_173_962),
        ("resnet18", 100, False, 11_220_132),
        ("preactresnet18", 10, False, 11_172_170),
        ("preactresnet18", 100, False, 11_218_340),
        ("wrn-34-10", 10, False, 46_160_474),
        ("wrn-34-10", 100, False, 46_218_164),
        ("resnet18", 10, True, 11_183_562),
        ("wrn-34-10", 10, True, 46_182_906),
    ],
)
def test_published_parameter_counts(name, classes, split, parameters):
    with torch.device("meta"):
        model = build_model(name, num_classes=classes)
        model = fastarat.split_batchnorm(model) if split else model
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "resnet-small"])
def test_taps_change_nothing_and_are_what_they_say(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=5).eval()
    x = torch.rand(2, 3, 16, 16)
    seen = {}
    layers = [n for n in tappable(model) if n != PENULTIMATE]
    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(lambda m, a, out, n=n: seen.__setitem__(n, out)) for n in layers]
    taps = Taps([*layers, PENULTIMATE])
    logits = model(x, taps)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits, model(x))
    for layer in layers:
        torch.testing.assert_close(taps.features[layer], F.relu(seen[layer]).mean((2, 3)))
    torch.testing.assert_close(model.linear(taps.features[PENULTIMATE]), logits)
    raw = Taps(tap_names(model)[:1], relu=False, pool=False)
    model(x, raw)
    assert raw.ordered()[0].min() < 0


def test_arat_layers_of_resnet18_are_before_the_residual_add():
    """layer4.*.bn2 is tapped before the addition: zeroing its affine empties the tap but not the block."""
    model = build_model("resnet18", num_classes=5).eval()
    assert tap_names(model) == ("layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2")
    with torch.no_grad():
        model.layer4[1].bn2.weight.zero_()
        model.layer4[1].bn2.bias.fill_(-1)
    taps = Taps(["layer4.1.bn2", PENULTIMATE])
    model(torch.rand(2, 3, 16, 16), taps)
    assert taps.features["layer4.1.bn2"].abs().max() == 0


def test_wrn_taps():
    with torch.device("meta"):
        assert len(build_model("wrn-34-10", num_classes=10).tap_names) == 11
    model = WideResNet(10, 1, 4).eval()
    taps = Taps(model.tap_names)
    logits = model(torch.rand(2, 3, 8, 8), taps)
    torch.testing.assert_close(logits, model.fc(taps.features["avgpool"]))
    assert [f.shape[1] for f in taps.ordered()] == [32, 64, 64]


def test_foreign_networks_are_tapped_by_hooks():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.rand(2, 3, 6, 6)
    taps = Taps(["0", PENULTIMATE])
    logits = forward_with_features(net, x, taps)
    torch.testing.assert_close(logits, net(x))
    torch.testing.assert_close(taps.features[PENULTIMATE], net[:4](x))
    torch.testing.assert_close(taps.features["0"], F.relu(net[0](x)).mean((2, 3)))
    assert not net[0]._forward_hooks
    for name in ("9", ""):  # "" is what PyTorch calls the whole model
        with pytest.raises(fastarat.UserError, match=f"unknown feature layer '{name}'"):
            forward_with_features(net, x, Taps([name]))


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("resnet19", 32, "did you mean 'resnet18'"),
        ("resnet-small", 4, "at least 8x8"),
        ("timm:resnet18", 32, "timm"),
        ("wrn-30-4", 32, r"6n \+ 4"),
        ("wrn-4-2", 32, "WRN-4-2"),
        ("wrn-10-0", 32, "width of 1"),
        ("wrn-28", 32, "unknown model"),
    ],
)
def test_errors(name, size, words, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(fastarat.UserError, match=words):
        build_model(name, num_classes=3, image_size=size)
