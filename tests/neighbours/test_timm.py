"""timm's networks: trained by the step and by the command, split where they have BatchNorm."""

import pytest
import torch
from beside import neighbour

import fastarat
from fastarat.cli import main
from fastarat.errors import UserError
from fastarat.interchange import export, import_checkpoint
from fastarat.nets.batchnorm import branches_of
from fastarat.nets.models import build_model
from fastarat.runs import load_network

VIT = "test_vit"  # timm's smallest vision transformer, of 160x160 unless it is told


@pytest.fixture
def timm():
    return neighbour("timm")


def vit(timm, size: int):
    return timm.create_model(VIT, img_size=size, patch_size=4, num_classes=4)


@pytest.mark.parametrize(("network", "defense"), [
    ("resnet", fastarat.ARAT()), ("resnet", fastarat.TRADES()),
    ("vit", fastarat.ARAT(split_bn=False)), ("vit", fastarat.AT()), ("vit", fastarat.TRADES()),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_steps(timm, network, defense, precision):
    torch.manual_seed(0)
    model = vit(timm, 16) if network == "vit" else timm.create_model("resnet10t", num_classes=4)
    images, labels = torch.rand(6, 3, 16, 16), torch.randint(4, (6,))
    step = fastarat.TrainStep(model, defense, images, epsilon=0.1, num_steps=2, precision=precision)
    before = [p.detach().clone() for p in step.parameters]
    for _ in range(2):
        assert all(torch.isfinite(term) for term in step(images, labels).values())
    moved = [not torch.equal(p, b) for p, b in zip(step.parameters, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    split = network == "resnet" and defense.splits
    assert bool(branches_of(step.model)) == split
    if split:
        step.model.eval()
        with torch.no_grad(), fastarat.branch(step.model, "clean"):
            clean = step.model(images)
        with torch.no_grad(), fastarat.branch(step.model, "adv"):
            assert not torch.equal(step.model(images), clean)
        # And a plain one of timm's takes what is exported: the adversarial branch has the ordinary names.
        plain = timm.create_model("resnet10t", num_classes=4)
        plain.load_state_dict(
            {k: v for k, v in step.model.state_dict().items() if k in plain.state_dict()}, strict=True
        )
        with torch.no_grad(), fastarat.branch(step.model, "adv"):
            torch.testing.assert_close(plain.eval()(images), step.model(images), rtol=1e-4, atol=1e-5)


SHORT = ["--epochs", "1", "--limit-train", "32", "--batch-size", "16", "--attack.num-steps", "1", "--eval.num-steps", "1",
         "--eval.val-images", "10", "--threads", "1", "--quiet"]  # fmt: skip


@pytest.mark.parametrize(("network", "defense"), [
    ("test_resnet", ["--defense", "ar-at"]), ("vit_tiny_patch16_224", ["--defense", "at"]),
    ("test_vit", ["--defense", "ar-at", "--no-defense.split-bn"]),
])  # fmt: skip
def test_from_train_to_export(timm, network, defense, cifar10, tmp_path, monkeypatch):
    """On images of 32x32, for which a vision transformer is made; the run is evaluated, exported and loaded by timm."""
    monkeypatch.chdir(tmp_path)
    words = [
        "train",
        "--dataset",
        "cifar10",
        "--model",
        f"timm:{network}",
        *defense,
        *SHORT,
        "--data-dir",
        str(cifar10),
    ]
    assert main([*words, "--out", "run"]) == 0
    assert main(["eval", "run", "--attack", "clean,pgd-2", "--limit", "10"]) == 0
    plain = timm.create_model(network, num_classes=10, **({} if network == "test_resnet" else {"img_size": 32}))
    plain.load_state_dict(torch.load(export("run", "a.pt", format="torch"), weights_only=True), strict=True)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), load_network("run")[0](images), rtol=1e-4, atol=1e-5)


def test_a_size_that_a_network_cannot_be_made_for_is_one_line(timm):
    words = (
        r"^timm:xcit_nano_12_p16_224 cannot be made for 3 classes and images of 8 pixels with 3 channel.*`patch_size`"
    )
    with pytest.raises(UserError, match=words) as told:
        build_model("timm:xcit_nano_12_p16_224", num_classes=3, image_size=8)
    assert "\n" not in str(told.value)


def test_a_file_of_timms_is_of_the_size_it_was_published_for(timm, tmp_path):
    torch.save(timm.create_model(VIT, num_classes=4).state_dict(), tmp_path / "file.pt")
    run = import_checkpoint(tmp_path / "file.pt", tmp_path / "run", model=f"timm:{VIT}", num_classes=4)
    assert load_network(run)[0](torch.rand(2, 3, 160, 160)).shape == (2, 4)
