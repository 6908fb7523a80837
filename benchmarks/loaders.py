"""Loaders of many large images against a plain DataLoader, and the memory that a growing set takes.

Throughput: a JPEG folder is written and prepared, and both loaders give epochs of it in turns, random resized crops
drawn the same way. The plain one is a `torch.utils.data.DataLoader` of as many worker processes that decode and resize
with Pillow, as torchvision's ImageFolder and RandomResizedCrop do. Memory: the peak of preparing and of an epoch, at
several sizes of a set, each in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastarat.bench.harness import opened, write_record
from fastarat.data import Augment, beton, load_dataset, make_loader, prepare
from fastarat.data.crops import DRAWS, random_boxes, uniform

_RECIPE = Augment(flip=True, scale=(0.08, 1.0))
_CHILD = """
import json, resource, sys
from pathlib import Path
from fastarat.data import default_augment, load_dataset, make_loader, prepare, beton
import fastarat
beton.ffcv_parts()
def now(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
before, folder, what = now("VmRSS:"), Path(sys.argv[1]), sys.argv[2]
if what == "prepare":
    prepare(folder / "images", folder / "beton", data_dir=folder / "data", workers=2)
else:
    data = load_dataset(folder / "beton", image_size=12, val_images=0)
    loader = make_loader(data.train, batch_size=256, device="cpu", kind="ffcv", shuffle=True,
                         augment=default_augment(data), order="pages")
    for _ in loader.epoch(0):
        pass
print(json.dumps({"before": before, "peak": now("VmHWM:")}))
"""


def main(argv: Sequence[str]) -> int:
    """Run `python -m benchmarks loaders ...`. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks loaders", description=__doc__)
    parser.add_argument("--images", type=int, default=2000, help="JPEG images of 300 to 500 pixels (default: 2000)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loader, in turns (default: 5)")
    parser.add_argument("--memory", default="", metavar="N,N", help="sizes of sets of tiny images to measure instead")
    parser.add_argument("--out", default="loaders.json", help="default: %(default)s")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks", "loaders", *argv])
    versions = {name: version(name) for name in ("numpy", "pillow", "opencv-python")}
    record = opened("loaders", command, torch.device("cpu"), versions=versions, load_before=os.getloadavg())
    if args.memory:
        record["results"] = [memory(int(count)) for count in args.memory.split(",")]
    else:
        with tempfile.TemporaryDirectory() as folder:
            record["results"] = [throughput(Path(folder), args)]
    record["load_after"] = os.getloadavg()
    write_record(record, Path(args.out))
    print(json.dumps(record["results"], indent=1))
    return 0


class Plain(Dataset):
    """Image files decoded by Pillow, and crops resized by it: those that ours are, by the same numbers."""

    def __init__(self, files: list[Path], labels: list[int], side: int, seed: int) -> None:
        self.files, self.labels, self.side, self.seed = files, labels, side, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """As PyTorch's own: uint8 [3, side, side] and the label."""
        with Image.open(self.files[row]) as opened:
            image = opened.convert("RGB")
        draws = uniform(self.seed, np.array([row]), DRAWS + 1)
        height, width = torch.tensor([image.height]), torch.tensor([image.width])
        boxes = random_boxes(draws[:, :DRAWS], height, width, (0.08, 1.0), (3 / 4, 4 / 3))
        top, left, high, wide = boxes[:, 0].tolist()
        box = (left, top, left + wide, top + high)
        image = image.resize((self.side, self.side), Image.Resampling.BILINEAR, box=box)
        if draws[0, DRAWS] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.labels[row]


def plain_epochs(files: list[Path], labels: list[int], args: argparse.Namespace) -> Iterator[int]:
    """Yield the images of an epoch, one after the other, of workers that stay."""
    seen = DataLoader(
        Plain(files, labels, args.image_size, 0), args.batch_size, shuffle=True, num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )  # fmt: skip
    while True:
        yield sum(len(images.float().div_(255)) for images, _ in seen)


def throughput(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return images/s of both loaders, every sample, and of preparing."""
    files, labels = _photographs(folder / "images", args.images)
    source = sum(file.stat().st_size for file in files)
    found: dict[str, Any] = {"images": len(files), "source_bytes": source, "samples_images_per_s": {}}
    beton.ffcv_parts()  # its import is not of preparing
    loaders: dict[str, Iterator[int]] = {"plain": plain_epochs(files, labels, args)}
    threads = max(1, args.workers)
    for mode in ("jpg", "raw"):
        began = time.perf_counter()
        out = prepare(folder / "images", folder / mode, data_dir=folder / "data", write_mode=mode, workers=threads)
        whole = len(files) + 4
        found[f"prepare_{mode}"] = {
            "images_per_s": whole / (time.perf_counter() - began),
            "bytes": sum(file.stat().st_size for file in out.iterdir()),
        }
        loaders[f"ours_{mode}"] = _ours(out, args)
    samples: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(args.rounds + 1):
        for name, epochs in loaders.items():
            began = time.perf_counter()
            count = next(epochs)
            if number:  # the first starts workers and fills the page cache
                samples[name].append(count / (time.perf_counter() - began))
    found["samples_images_per_s"] = samples
    found["median_images_per_s"] = {name: statistics.median(values) for name, values in samples.items()}
    plain = found["median_images_per_s"]["plain"]
    found["times_plain"] = {name: value / plain for name, value in found["median_images_per_s"].items()}
    return found


def _ours(folder: Path, args: argparse.Namespace) -> Iterator[int]:
    data = load_dataset(folder, image_size=args.image_size, val_images=0)
    loader = make_loader(
        data.train, batch_size=args.batch_size, device="cpu", kind="ffcv", shuffle=True, augment=_RECIPE
    )  # fmt: skip
    number = 0
    while True:
        yield sum(len(batch.images) for batch in loader.epoch(number))
        number += 1


def _photographs(root: Path, count: int) -> tuple[list[Path], list[int]]:
    """Write JPEGs with a photograph's falling spectrum, of 300 to 500 pixels a side, quality 90."""
    rng, files, labels = np.random.default_rng(0), [], []
    for c in range(2):
        for part, number in (("train", count // 2), ("test", 2)):
            (root / part / f"class{c}").mkdir(parents=True)
            for i in range(number):
                height, width = rng.integers(300, 501, 2)
                pixels = np.zeros((height, width, 3))
                for octave in range(2, 10):
                    coarse = rng.normal(0, 60 / 1.25**octave, (2**octave, 2**octave, 3)) + (128 if octave == 2 else 0)
                    planes = [Image.fromarray(coarse[..., plane].astype(np.float32)) for plane in range(3)]
                    size = int(width), int(height)
                    pixels += np.stack([np.asarray(p.resize(size, Image.Resampling.BICUBIC)) for p in planes], -1)
                file = root / part / f"class{c}" / f"{i:06}.jpg"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)
                if part == "train":
                    files.append(file)
                    labels.append(c)
    return files, labels


def memory(count: int) -> dict[str, Any]:
    """Return peak resident bytes of preparing `count` tiny images of several sizes, and of an epoch of them."""
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        contents = []
        for _ in range(256):
            file = io.BytesIO()
            Image.fromarray(
                rng.integers(0, 256, (int(rng.integers(12, 21)), int(rng.integers(12, 21)), 3), np.uint8)
            ).save(file, "PNG")
            contents.append(file.getvalue())
        for part, number in (("train", count), ("test", 100)):
            for c in range(100):
                (folder / "images" / part / f"class{c:02}").mkdir(parents=True)
            for i in range(number):
                (folder / "images" / part / f"class{i % 100:02}" / f"{i:07}.png").write_bytes(contents[i % 256])
        told: dict[str, Any] = {"images": count}
        for what in ("prepare", "epoch"):
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _CHILD, name, what], capture_output=True, text=True, check=True
            )  # fmt: skip
            peak = json.loads(done.stdout.splitlines()[-1])
            told[what] = peak | {"rise": peak["peak"] - peak["before"], "seconds": time.perf_counter() - began}
        return told
