"""Data sets given in Python that are read while training: one read by index, and a DataLoader taken as it is."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from fastarat.data.augmenting import augment
from fastarat.data.items import label, labels, parted, pixels, stacked
from fastarat.data.loaders import Loader
from fastarat.data.splits import Batch, Source, Split, derive_seed
from fastarat.errors import UserError

_SOON_S = 3.0  # reading that takes no longer is not worth starting processes for
_END = object()


class Streams:
    """Random numbers of its own for PyTorch (CPU), NumPy and `random` inside the block; outside nothing has moved.

    A second block goes on where the first one ended.
    """

    def __init__(self, seed: int) -> None:
        outside = self._now()
        seed_all(seed)
        self._own, self._outside = self._now(), outside
        self._set(outside)

    def __enter__(self) -> None:
        self._outside = self._now()
        self._set(self._own)

    def __exit__(self, *error: object) -> None:
        self._own = self._now()
        self._set(self._outside)

    @staticmethod
    def _now() -> tuple[Any, ...]:
        return torch.get_rng_state(), np.random.get_state(), random.getstate()

    @staticmethod
    def _set(state: tuple[Any, ...]) -> None:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


def seed_all(seed: int) -> None:
    """Seed what an augmentation on the host draws from."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class _Items(torch_data.Dataset):
    """Items of a person's data set as ([H, W, C], label); an error is an item's text, and crosses processes whole.

    seed: item number i draws from (seed, i), in whatever process it is read.
    """

    def __init__(self, data: Any, what: str, seed: int) -> None:
        self.data, self.what, self.seed = data, what, seed

    def __getitem__(self, row: int) -> tuple[Tensor, int] | str:
        who = f"item {row} of the {self.what}"
        if torch_data.get_worker_info() is None:
            with Streams(derive_seed(self.seed, row)):
                return self._read(row, who)
        seed_all(derive_seed(self.seed, row))
        return self._read(row, who)

    def _read(self, row: int, who: str) -> tuple[Tensor, int] | str:
        try:
            image, number = parted(self.data[row], who)
            return pixels(image, who), label(number, who)
        except UserError as error:
            return str(error)
        except Exception as error:  # anybody's code fails in its own ways
            first = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
            return f"{who} cannot be read ({type(error).__name__}: {first}): mend the data set's __getitem__"


def _check_random(options: dict[str, Any]) -> None:
    if options["order_by"] != "random":
        raise UserError(
            f"order={options['order_by']} is of .beton files, not of data given in Python: leave --order out"
        )


def _deaf(worker: int) -> None:
    """Let a terminal's Ctrl-C, which reaches all processes, end the run and not those that read for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Indexed(Source):
    """A data set with a length whose items are read by index, in the order of our own seed.

    data: anything with __getitem__. what: its name in errors. shape: (C, H, W) of every image. dtype: uint8, or
    float32 for pixels in [0, 1]. seconds: that one item takes. workers: processes that read; None: as many as pay.
    """

    data: Any
    what: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    augmented: bool = False
    seconds: float = 0.0
    workers: int | None = None

    def loader(self, split: Split, **options: Any) -> StreamLoader:
        """Make the loader that streams a split of it."""
        _check_random(options)
        processes = self._processes(len(split))
        by = f"{processes} processes" if processes else "this process"
        return StreamLoader(split, **options, reason=f"the items of a {type(self.data).__name__}, read by {by}")

    def take(self, split: Split, rows: Tensor) -> Split:
        """Return a split of those rows, which streams as well."""
        return dataclasses.replace(split, labels=split.labels[rows], indices=split.indices[rows])

    def _processes(self, count: int) -> int:
        if self.workers is not None:
            return self.workers
        return 0 if count * self.seconds < _SOON_S else min(8, max(1, (os.cpu_count() or 2) - 1))

    def batches(self, rows: Sequence[Sequence[int]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read each of `rows` as pixels [B, H, W, C] and labels int64 [B]. Raises: UserError naming the item."""
        reading = torch_data.DataLoader(
            _Items(self.data, self.what, seed),
            batch_sampler=list(rows),  # pyright: ignore[reportArgumentType]
            num_workers=self._processes(sum(map(len, rows))),
            collate_fn=list,
            worker_init_fn=_deaf,
            generator=torch.Generator(),  # the global one would move
        )
        channels, height, width = self.shape
        for batch, items in zip(rows, reading, strict=True):
            images = torch.empty((len(batch), height, width, channels), dtype=self.dtype)
            for place, (row, item) in enumerate(zip(batch, items, strict=True)):
                if isinstance(item, str):
                    raise UserError(item)
                images[place] = self._checked(item[0], row)
            yield images, torch.tensor([item[1] for item in items], dtype=torch.int64)

    def read(self, rows: Sequence[int], seed: int) -> list[tuple[Tensor, int]]:
        """Read items here and now, each ([H, W, C], label) as it is. Raises: UserError naming the item."""
        items = _Items(self.data, self.what, seed)
        found = []
        for row in rows:
            item = items[row]
            if isinstance(item, str):
                raise UserError(item)
            found.append(item)
        return found

    def _checked(self, image: Tensor, row: int) -> Tensor:
        height, width, channels = image.shape
        if (channels, height, width) != self.shape:
            raise UserError(
                f"item {row} of the {self.what} is {[channels, height, width]}, others are {list(self.shape)}: "
                "expected one shape; resize, or convert to one number of channels, in the data set's transform"
            )
        if self.dtype == torch.uint8 != image.dtype:
            raise UserError(f"item {row} of the {self.what} is floating point, others are 8 bits: expected one type")
        return image if self.dtype == image.dtype else image.to(self.dtype) / 255


@dataclass(eq=False, repr=False)
class StreamLoader(Loader):
    """Reads items by index while training; what they draw themselves depends on the seed, the epoch and the item."""

    kind = "stream"

    def _pixels(self, order: Tensor, indices: Sequence[Tensor], epoch: int) -> Generator[Tensor, None, None]:
        source, places = self.split.source, order.split([len(index) for index in indices])
        assert isinstance(source, Indexed)
        rows = [self.split.indices[place].tolist() for place in places]
        batches = source.batches(rows, derive_seed(self.seed, "items", epoch))
        for place, (images, found) in zip(places, batches, strict=True):
            expected = self.split.labels[place]
            if not torch.equal(found, expected):
                wrong = int((found != expected).nonzero()[0])
                raise UserError(
                    f"item {int(self.split.indices[place[wrong]])} of the {source.what} has the label "
                    f"{int(found[wrong])}, and had {int(expected[wrong])} before: expected labels that stay"
                )
            yield to_device(images, self.device)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Bring pixels from host memory to a device; to a GPU without waiting for it."""
    return images.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else images


@dataclass(frozen=True)
class Passes(Source):
    """A DataLoader taken as it is: its batches, its order, its augmentation; an epoch is one pass.

    data: the DataLoader. shape: (C, H, W) of every image; None: of the first. sizes: images of each batch.
    """

    data: Any
    what: str
    shape: tuple[int, int, int] | None = None
    sizes: tuple[int, ...] = ()
    augmented = True
    in_order = True

    @property
    def num_batches(self) -> int:
        """Batches to train on: a last one of a single image, which has no batch statistics, is left out."""
        return len(self.sizes) - (self.sizes[-1] == 1)

    @property
    def batch_size(self) -> int:
        """Images of the largest batch."""
        return max(self.sizes)

    def loader(self, split: Split, **options: Any) -> PassLoader:
        """Make the loader that passes through it."""
        _check_random(options)
        return PassLoader(split, **options, reason="batches and their order are a DataLoader's own")

    def take(self, split: Split, rows: Tensor) -> Split:
        """Return as many images as `rows`, the first ones of a pass, in memory: there is no other way to them."""
        found: list[tuple[Tensor, Tensor]] = []
        for images, numbers in self.batches(0):
            found.append((images, numbers))
            if sum(len(numbers) for _, numbers in found) >= len(rows):
                break
        images, numbers = (torch.cat(parts)[: len(rows)] for parts in zip(*found, strict=True))
        return Split(images, numbers, torch.arange(len(numbers)), split.shape)

    def batches(self, seed: int, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Pass through it once: pixels [B, H, W, C] and labels int64 [B]. Raises: UserError naming the batch.

        Order and augmentation, as far as they draw from global generators or the DataLoader's own, come from `seed`.
        """
        number, shape = -1, self.shape
        for number, item in enumerate(self._drawn(seed, epoch)):
            images, found = batch_of(item, f"batch {number} of the {self.what}", shape)
            shape = shape or (images.shape[3], images.shape[1], images.shape[2])
            yield images, found
        if number + 1 != len(self.data):
            raise UserError(
                f"the {self.what} said it has {len(self.data)} batches, and gave {number + 1}: expected as many as it "
                "says"
            )

    def _drawn(self, seed: int, epoch: int) -> Iterator[Any]:
        streams, passing, number = Streams(seed), None, 0
        if (own := getattr(self.data, "generator", None)) is not None:
            own.manual_seed(seed)
        if (set_epoch := getattr(getattr(self.data, "sampler", None), "set_epoch", None)) is not None:
            set_epoch(epoch)
        while True:
            try:
                with streams:
                    passing = iter(self.data) if passing is None else passing
                    item = next(passing, _END)
            except Exception as error:  # anybody's code fails in its own ways; a worker's text ends with the reason
                last = (str(error).strip() or type(error).__name__).split("\n")[-1][:200]
                kind = type(error).__name__
                raise UserError(f"batch {number} of the {self.what} cannot be read ({kind}: {last})") from error
            if item is _END:
                return
            number += 1
            yield item


def batch_of(item: Any, who: str, shape: tuple[int, int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Return a DataLoader's batch as pixels [B, H, W, C] and labels int64 [B]. shape: expected. Raises: UserError."""
    images, numbers = parted(item, who)
    images = stacked(images, who)
    count, height, width, channels = images.shape
    if shape not in (None, (channels, height, width)):
        raise UserError(
            f"{who} is of {[channels, height, width]}, others are of {list(shape or ())}: expected one shape"
        )
    return images, labels(numbers, count, who)


@dataclass(eq=False, repr=False)
class PassLoader(Loader):
    """The batches of a DataLoader in its own order; `index` counts them through."""

    kind = "dataloader"

    def __len__(self) -> int:
        assert isinstance(self.split.source, Passes)
        return len(self.split.source.data)

    def total(self, index: int) -> int:
        """Images in batch number `index` of an epoch."""
        assert isinstance(self.split.source, Passes)
        return self.split.source.sizes[index]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of a pass. first: batches to leave out, which are read all the same."""
        source, start, classes = self.split.source, 0, int(self.split.labels.max()) + 1
        assert isinstance(source, Passes)
        for number, (images, found) in enumerate(source.batches(derive_seed(self.seed, "pass", epoch), epoch)):
            if number >= first:
                if int(found.max()) >= classes:
                    raise UserError(
                        f"batch {number} of the {source.what} has the label {int(found.max())}: expected 0 to "
                        f"{classes - 1}, as in the first pass"
                    )
                ready = augment(to_device(images, self.device).permute(0, 3, 1, 2), None)
                ready = ready if self.recipe is None else self.recipe(ready)
                index = torch.arange(start, start + len(found), device=self.device)
                yield self.mixed(Batch(ready, found.to(self.device), index), epoch, number)
            start += len(found)
