"""Small data sets for tests: archives in the formats of the real ones, and image folders."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastarat import data

CLASSES = ("airplane", "automobile", "bird")
TRAIN, TEST = 150, 30
FOLDER = {"train/cat": 20, "train/dog": 10, "test/cat": 3, "test/dog": 2}


def images_of(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Planar uint8 [N, 3, 32, 32] and labels in which every class is present."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), np.uint8), rng.permutation(np.arange(count) % len(CLASSES))


def write_archive(path: Path, files: dict[str, bytes]) -> str:
    """Write a .tar.gz and return its md5."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar_files(label_bytes: int = 1) -> dict[str, bytes]:
    """The files of a small CIFAR archive in its authors' format; a coarse label, where there is one, is wrong."""
    folder, names, parts = {
        1: ("cifar-10-batches-bin", "batches.meta.txt", [f"data_batch_{n}.bin" for n in range(1, 6)]),
        2: ("cifar-100-binary", "fine_label_names.txt", ["train.bin"]),
    }[label_bytes]
    files = {f"{folder}/{names}": ("\n".join(CLASSES) + "\n\n").encode()}

    def records(images: np.ndarray, labels: np.ndarray) -> bytes:
        columns = [np.full_like(labels, 77)] * (label_bytes - 1) + [labels]
        return np.hstack([np.stack(columns, 1).astype(np.uint8), images.reshape(len(images), -1)]).tobytes()

    images, labels = images_of(0, TRAIN)
    size = TRAIN // len(parts)
    for number, part in enumerate(parts):
        rows = slice(number * size, (number + 1) * size)
        files[f"{folder}/{part}"] = records(images[rows], labels[rows])
    files[f"{folder}/{'test_batch.bin' if label_bytes == 1 else 'test.bin'}"] = records(*images_of(1, TEST))
    return files


def place_cifar(folder: Path, monkeypatch, name: str = "cifar10", files=None) -> Path:
    """Put a small archive where a download would be, and expect its checksum."""
    folder.mkdir(exist_ok=True)
    archive = data.SETS[name]
    path = folder / archive.file_name
    md5 = write_archive(path, cifar_files(archive.label_bytes) if files is None else files)
    monkeypatch.setitem(data.SETS, name, replace(archive, md5=md5, train_images=TRAIN, test_images=TEST))
    return path


def draw_folder(root: Path, layout: dict[str, int], size=(12, 12), mode: str = "RGB", suffix: str = ".png") -> Path:
    """Write `count` random images into each folder of `layout`."""
    rng = np.random.default_rng(0)
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode).save(root / folder / f"{number}{suffix}")
    return root


def draw_classes(root: Path, classes: int) -> Path:
    """An image folder of that many classes, six training and six test images of each."""
    return draw_folder(
        root, {f"{split}/class{c}": 6 for split in ("train", "test") for c in range(classes)}, size=(8, 8)
    )
