"""Small networks, batches, steps and runs that several test files share."""

import json
from pathlib import Path

import pyautoattack
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastarat
from fastarat.checkpoints import Checkpoints
from fastarat.config import Config, EvalConfig
from fastarat.specs import Attack


def shorten_autoattack(monkeypatch, *, square: int, apgd: int | None = None, fab: int | None = None) -> None:
    """Cut the iterations of AutoAttack's members, and Square's queries; None leaves a member's own."""
    original = pyautoattack.AutoAttack._set_version

    def set_version(self, version="standard"):
        original(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = apgd or self.apgd.n_iter
        self.fab.n_iter, self.square.n_queries = fab or self.fab.n_iter, square

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", set_version)


def small_model(device="cpu"):
    """Always the same network of four classes on 8x8 colour images."""
    torch.manual_seed(0)
    model = fastarat.build_model("resnet-small", num_classes=4).to(device)
    model.started_from = "memory"  # taken for a trained one, by the defenses that start from one
    return model


def batch(n: int = 8, seed: int = 0, device="cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, 8, 8, generator=g).to(memory_format=torch.channels_last)
    return images.to(device), torch.randint(4, (n,), generator=g).to(device)


def step_of(defense: fastarat.Defense | None = None, device="cpu", **options) -> fastarat.TrainStep:
    options = {"epsilon": 0.1, "num_steps": 1} | options
    return fastarat.TrainStep(small_model(device), defense or fastarat.ARAT(), torch.empty(2, 3, 8, 8), **options)


def small_config(out: Path, **options) -> Config:
    """Three epochs of five steps."""
    options = {
        "limit_train": 160, "batch_size": 32, "epochs": 3, "tensorboard": False,
        "attack": Attack(epsilon=0.1, num_steps=2), "eval": EvalConfig(val_images=40, num_steps=2),
    } | options  # fmt: skip
    return Config(out=str(out), **options)


def trained(out: Path, **options) -> Path:
    """The folder of a small run."""
    return fastarat.train(small_config(out, **options), progress=False).run


def stop_within(monkeypatch, *, epoch: int) -> None:
    """Let a run end, as by a kill, after its first checkpoint within an epoch."""
    save = Checkpoints.save_within

    def save_and_stop(self, place):
        save(self, place)
        if place.epoch == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save_within", save_and_stop)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("wall_s", "images_per_s", "crc32")} for row in rows]


def assert_same(a: Path, b: Path) -> None:
    assert_equal(weights(a), weights(b))
    assert without_times(metrics(a)) == without_times(metrics(b))
