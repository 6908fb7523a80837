"""What each process of test_distributed.py's pairs does; started by torchrun, or called in the test itself."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fastarat
from fastarat.data import Augment, derive_seed, load_dataset, make_loader
from fastarat.distributed import World, joined

DEFENSES = {
    "ar-at": lambda: fastarat.ARAT(layers=("2.body",), gamma=1.0),
    "at": fastarat.AT,
    "trades": fastarat.TRADES,
    "gairat": lambda: fastarat.GAIRAT(begin_epoch=1),
    "done": lambda: fastarat.DONE(begin_epoch=1),
}


class Block(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x))


class Wide(nn.Module):
    """Take images in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def tiny() -> nn.Module:
    """In float64, so that no sign of a gradient hangs on the order of a sum."""
    torch.manual_seed(0)
    layers = (Wide(), Block(1, 6), Block(6, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    return nn.Sequential(*layers).double()


def steps(name: str, world: World, count: int = 20, batch_size: int = 31, **options):
    """Train on real digits, in uneven shards; return the meter's reading after each step, and the weights."""
    train = load_dataset("digits").train
    loader = make_loader(
        train, batch_size=batch_size, device="cpu", shuffle=True, augment=Augment(1, flip=True), world=world,
        accumulate=options.get("accumulate", 1),
    )  # fmt: skip
    step = fastarat.TrainStep(
        tiny(), DEFENSES[name](), torch.empty(2, 1, 8, 8), epsilon=0.1, num_steps=3, seed=derive_seed(0, "attack"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), world=world, **options,
    )  # fmt: skip
    step.at(epoch=2, progress=0.9)
    readings = []
    for index, batch in enumerate(loader.epoch(1)):
        if index == count:
            break
        step.meter.reset()
        step(batch.images, batch.labels, loader.total(index))
        readings.append(step.meter.read())
    state = {**step.model.state_dict(), **{f"companions.{k}": v for k, v in step.companions.state_dict().items()}}
    return readings, state, world.sent


def main(out: Path) -> None:
    with joined("cpu") as world:
        torch.set_num_threads(1)
        found = {name: steps(name, world, sync_bn=True) for name in DEFENSES}
        found["awp"] = steps("trades", world, 6, sync_bn=True, awp=0.01)
        found["both"] = steps("trades", world, 6, sync_bn=True, accumulate=2, batch_size=33)
        found["own"] = steps("at", world, 6)
        torch.save(found, out / f"rank{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
