"""Images per second of one process or several, one thread each: torchrun -m benchmarks.processes.

Prints one line on rank 0: processes, images per second, and what a step sent. Start it once alone and once under
torchrun, in turn, where other work shares the cores.
"""

from __future__ import annotations

import argparse
import time

import torch

import fastarat
from fastarat.data import load_dataset, make_loader
from fastarat.distributed import joined


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast several processes train on digits.")
    parser.add_argument("--defense", default="at")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sync-bn", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with joined("cpu") as world:
        train = load_dataset("digits").train
        loader = make_loader(train, batch_size=args.batch_size, device="cpu", shuffle=True, world=world)
        torch.manual_seed(0)
        model = fastarat.build_model("resnet-small", num_classes=10, in_channels=1)
        defense = fastarat.DEFENSES[args.defense]()
        step = fastarat.TrainStep(model, defense, torch.empty(2, 1, 8, 8), world=world, sync_bn=args.sync_bn)
        batch = next(iter(loader.epoch(1)))
        step(batch.images, batch.labels, loader.total(0))
        world.sent.clear()
        world.barrier()
        began = time.perf_counter()
        for _ in range(args.steps):
            step(batch.images, batch.labels, loader.total(0))
        world.barrier()
        took = time.perf_counter() - began
        if world.first_one:
            sent = {kind: [n // args.steps for n in counts] for kind, counts in world.sent.items()}
            rate = args.steps * loader.total(0) / took
            print(
                f"{world.size} process(es): {rate:.0f} images/s, {1e3 * took / args.steps:.0f} ms a step, sent {sent}"
            )


if __name__ == "__main__":
    main()
