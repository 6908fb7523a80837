"""Two trained networks, once for all: one that neighbours attack, one in the shape that RobustBench's classes take."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import write_archive
from beside import EPSILON
from sklearn.datasets import load_digits
from torch import nn

import fastarat
from fastarat import data
from fastarat.config import Config, EvalConfig, OptimConfig
from fastarat.data import load_dataset
from fastarat.evaluation import collect
from fastarat.interchange import export
from fastarat.specs import Attack


class Block(nn.Module):
    def __init__(self, planes_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if planes_in != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(planes_in, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.shortcut(x)).relu()


class Plain(nn.Module):
    """What a person has who loads the exported file: PyTorch's own layers, and nothing of this package."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(i, o, s)) for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        out = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(out.mean((2, 3)))


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """AR-AT on the real digits, so that a branch of two is what is exported."""
    config = Config(
        epochs=5, batch_size=64, tensorboard=False, optim=OptimConfig(lr=0.1, warmup=2), threads=1,
        attack=Attack(epsilon=EPSILON, num_steps=2), eval=EvalConfig(val_images=40, num_steps=2),
        out=str(tmp_path_factory.mktemp("digits") / "run"),
    )  # fmt: skip
    return fastarat.train(config, progress=False).run


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    return collect(load_dataset("digits").test)[:2]


@pytest.fixture(scope="session")
def exported(digits_run) -> nn.Module:
    """The exported file, loaded strictly into a network of PyTorch's own layers."""
    file = export(digits_run, digits_run.parent / "exported.pt", format="torch")
    model = Plain()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


TRAIN = 1400


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory) -> tuple:
    """Digits in CIFAR-10's format (3x32x32), which RobustBench's classes need: they pool over 8x8 of their own."""
    folder, drawn = tmp_path_factory.mktemp("cifar"), load_digits()
    images = np.kron((drawn.images / 16 * 255).astype(np.uint8), np.ones((1, 4, 4), np.uint8))[:, None].repeat(3, 1)
    records = np.hstack([drawn.target[:, None], images.reshape(len(images), -1)]).astype(np.uint8)
    files = {f"data_batch_{n + 1}.bin": part.tobytes() for n, part in enumerate(np.split(records[:TRAIN], 5))}
    files |= {"test_batch.bin": records[TRAIN:].tobytes()}
    files |= {"batches.meta.txt": "".join(f"digit{n}\n" for n in range(10)).encode() + b"\n"}
    known = data.SETS["cifar10"]
    md5 = write_archive(folder / known.file_name, {f"cifar-10-batches-bin/{k}": v for k, v in files.items()})
    return folder, replace(known, md5=md5, train_images=TRAIN, test_images=len(records) - TRAIN)


@pytest.fixture
def cifar10(cifar_folder, monkeypatch) -> Path:
    """Where that archive lies, expected to be CIFAR-10's."""
    monkeypatch.setitem(data.SETS, "cifar10", cifar_folder[1])
    return cifar_folder[0]


@pytest.fixture(scope="session")
def cifar_run(cifar_folder) -> Path:
    """A wide ResNet on it, its export for RobustBench as entry.pt and the test images as test.pt beside it."""
    folder, made = cifar_folder
    config = Config(
        dataset="cifar10", data_dir=str(folder), model="wrn-10-1", defense=fastarat.Standard(), epochs=3, batch_size=32,
        augment=False, normalize=True, limit_train=800, tensorboard=False, threads=1, optim=OptimConfig(lr=0.1),
        eval=EvalConfig(val_images=20, num_steps=1), attack=Attack(epsilon=0.02), out=str(folder / "run"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SETS, "cifar10", made)
        run = fastarat.train(config, progress=False).run
        export(run, folder / "entry.pt", format="robustbench", num_images=50)
        torch.save(collect(load_dataset("cifar10", data_dir=folder).test)[:2], folder / "test.pt")
    return run
