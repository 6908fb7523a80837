"""What a data set is: splits of uint8 pixels and int64 labels; and how rows of one are chosen by a seed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """One batch on the device.

    images: float32 [B, C, H, W] in [0, 1], channels-last. labels: int64 [B], or float32 [B, K], shares of the classes,
    where images are mixed.
    index: int64 [B], position of each image in its split.
    """

    images: Tensor
    labels: Tensor
    index: Tensor


class Source:
    """What a split streams from that was given in Python.

    augmented: whether images differ from read to read, by an augmentation of its own. in_order: whether it chooses
    their order itself. num_batches: of an epoch, where it does, and batch_size: of the largest.
    """

    augmented: bool = False
    in_order: bool = False

    @property
    def num_batches(self) -> int:
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        raise NotImplementedError

    def loader(self, split: Split, **options: Any) -> Any:
        """Make the `Loader` of a split; the options are the fields of that."""
        raise NotImplementedError

    def take(self, split: Split, rows: Tensor) -> Split:
        """Return the images at `rows` of a split."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Split:
    """Some of a data set's images, not augmented.

    images: uint8 [N, H, W, C], or float32 in [0, 1] where 8 bits do not hold them, or None when they stream from
    `beton` or `source`. labels: int64 [N], on the CPU. indices: int64 [N], row of each image in the stored training or
    test set. shape: (C, H, W). beton: the .beton file, or None. raw: whether that file holds plain pixels, not JPEG.
    crop: whether that file's images have other sizes, from which squares of `shape` are cut as they are read.
    """

    images: Tensor | None
    labels: Tensor
    indices: Tensor
    shape: tuple[int, int, int]
    beton: Path | None = None
    raw: bool = True
    crop: bool = False
    source: Source | None = None

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray) -> Split:
        """Make a split of a whole stored set, without a copy.

        images: uint8 [N, H, W, C], perhaps a mapped file larger than the memory. labels: int64 [N].
        """
        _, height, width, channels = images.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a read-only map is not to be written to: nobody does
            pixels = torch.from_numpy(np.asarray(images))
        return cls(pixels, torch.from_numpy(labels), torch.arange(len(labels)), (channels, height, width))

    @classmethod
    def empty(cls, shape: tuple[int, int, int]) -> Split:
        """Make a split without images. shape: (C, H, W) that they would have."""
        channels, height, width = shape
        none = torch.empty(0, dtype=torch.int64)
        return cls(torch.empty((0, height, width, channels), dtype=torch.uint8), none, none, shape)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Split:
        """Copy the images at `rows` (int64 [M], positions in this split), in that order."""
        if self.source is not None:
            return self.source.take(self, rows)
        images = None if self.images is None else self.images[rows]
        return replace(self, images=images, labels=self.labels[rows], indices=self.indices[rows])

    @property
    def num_bytes(self) -> int:
        """Size of the decoded images."""
        channels, height, width = self.shape
        return len(self) * channels * height * width * (1 if self.images is None else self.images.element_size())


class Stored(NamedTuple):
    """A data set as a source hands it over, before the validation split. source: where it is from, for people."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set. `train` and `val` are cut from the training images; `test` chooses nothing.

    shape: (C, H, W). notes: what a reader of its results must know, such as a test set that we held out ourselves.
    held_out: whether `val` was cut from the training images.
    given: of one given in Python, its name and content as `Config.dataset` says them. transforms: float32
    [B, C, H, W] in [0, 1] -> the same, on the device, instead of our augmentation.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...] = ()
    held_out: bool = True
    given: str | None = None
    transforms: Callable[[Tensor], Tensor] | None = None


def derive_seed(seed: int, *parts: int | str) -> int:
    """Mix a seed and what it is for into a new seed of 63 bits.

    The parts are hashed (BLAKE2b) with their types and lengths, so neighbouring seeds and epochs give unrelated
    streams, ("a", "bc") and ("ab", "c") differ, and the value is the same on every machine and Python.
    """
    # As JSON, because joined strings would make ("a", "bc") and ("ab", "c") one stream; int() because NumPy's
    # integers are not JSON.
    text = json.dumps([int(seed), *(part if isinstance(part, str) else int(part) for part in parts)])
    # The sign bit goes, so that the seed fits an int64 wherever it is stored.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stratified_indices(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` positions with every class in proportion, by largest remainders; sorted.

    labels: int64 [N]. NumPy's RandomState is used because its stream is frozen for good: a split never moves.
    """
    order = np.random.RandomState(derive_seed(seed, "split") % 2**32).permutation(len(labels))
    sizes = np.bincount(labels)
    share = sizes * count / max(len(labels), 1)
    take = np.floor(share).astype(np.int64)
    # Stable: of equal remainders the lower class gets the image, on every platform; quicksort leaves that open.
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    by_class = order[np.argsort(labels[order], kind="stable")]  # once, not per class: there may be a thousand
    first = np.cumsum(sizes) - sizes
    chosen = [by_class[start : start + number] for start, number in zip(first, take, strict=True)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def held_out(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part the positions of `labels` into those kept and `count` stratified ones held out, each int64 and sorted."""
    chosen = stratified_indices(labels, count, seed)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
