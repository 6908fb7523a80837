"""The export for RobustBench in its own classes, as the entry names them, and its own benchmark on it."""

import re
from importlib import import_module
from pathlib import Path

import beside
import pytest
import small
import torch
from archives import place_cifar
from torch import nn

import fastarat
from fastarat.config import Config, write_yaml
from fastarat.interchange import export
from fastarat.nets.models import build_model
from fastarat.runs import Run, load_network


@pytest.fixture
def robustbench(monkeypatch):
    return beside.robustbench(monkeypatch)


def in_their_class(file: Path) -> nn.Module:
    """Load an exported file strictly into the class that its entry names, with the normalisation that it tells of."""
    entry = file.with_suffix(".md").read_text()
    package, call = re.search(r"`(robustbench\.[\w.]+)\.(\w+\(.*\))`", entry).groups()
    model = eval(call, vars(import_module(package)))
    if "`mu` and `sigma` [1, 3, 1, 1]" in entry:
        model.register_buffer("mu", torch.empty(1, 3, 1, 1))
        model.register_buffer("sigma", torch.empty(1, 3, 1, 1))
        model.register_forward_pre_hook(lambda module, args: ((args[0] - module.mu) / module.sigma,))
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return model.eval()


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-16-2", "resnet18", "preactresnet18"])
def test_the_export_is_their_network(name, normalized, robustbench, tmp_path, monkeypatch):
    place_cifar(tmp_path / "data", monkeypatch)
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]} if normalized else {}
    net = fastarat.split_batchnorm(build_model(name, num_classes=3, **given)).train()
    for branch in ("clean", "adv"):  # statistics of its own for each
        with torch.no_grad(), fastarat.branch(net, branch):
            net(torch.rand(8, 3, 32, 32) * (0.5 if branch == "adv" else 1.0))
    meta = {"model": name, "num_classes": 3, "in_channels": 3, "image_size": 32, "normalized": normalized,
            "branches": ["clean", "adv"], "defense": "ar-at", "dataset": "cifar10", "classes": ["a", "b", "c"],
            "epsilon": 8 / 255, "norm": "linf", "epoch": 5}  # fmt: skip
    Run.create(tmp_path / "run").save_weights("last", net.state_dict(), meta)
    write_yaml(Config(dataset="cifar10", model=name, data_dir=str(tmp_path / "data")), tmp_path / "run" / "config.yaml")
    theirs = in_their_class(export(tmp_path / "run", tmp_path / "entry.pt", format="robustbench", num_images=10))

    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad(), fastarat.branch(net.eval(), "adv"):
        ours = net(images)
    with torch.no_grad():
        assert (theirs(images) - ours).abs().max() <= 1e-5 * ours.abs().max()
        theirs.conv1.weight += 0.01  # and a file that is not the network's is seen
        assert (theirs(images) - ours).abs().max() > 1e-3 * ours.abs().max()


def test_their_benchmark_gives_our_numbers(robustbench, cifar_run, monkeypatch):
    """Clean and AutoAttack accuracy of some test images, by `robustbench.benchmark` and by `evaluate`; both cut short."""
    small.shorten_autoattack(monkeypatch, square=5, apgd=3, fab=2)
    images, labels = (t[:24] for t in torch.load(cifar_run.parent / "test.pt", weights_only=True))
    sets = import_module("robustbench.data")._clean_dataset_loaders
    cifar10 = next(name for name in sets if name.value == "cifar10")
    monkeypatch.setitem(sets, cifar10, lambda count, *_: (images[:count], labels[:count]))  # theirs would download
    model = in_their_class(cifar_run.parent / "entry.pt")
    clean, robust = robustbench.benchmark(model, n_examples=24, dataset="cifar10", threat_model="Linf", eps=0.02)

    ours = fastarat.evaluate(
        load_network(cifar_run)[0], (images, labels), "clean,autoattack", epsilon=0.02, batch_size=32, progress=False
    ).accuracy  # fmt: skip
    assert ours["clean_acc"] == pytest.approx(clean)
    assert 0.1 < ours["robust_acc_aa"] < clean - 0.1
    # Of the same seed, in the same batches; an image whose margin is of the size of rounding may fall either way.
    assert ours["robust_acc_aa"] == pytest.approx(robust, abs=1.5 / 24)
    weaker = robustbench.benchmark(model, n_examples=24, dataset="cifar10", threat_model="Linf", eps=0.005)[1]
    assert weaker > robust + 2 / 24
