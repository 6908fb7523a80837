"""The loaders: batches that depend on (seed, epoch) and on nothing else.

`resident` keeps the pixels on the device, `ffcv` streams a .beton file of any size; they give the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastarat.data import beton
from fastarat.data.augmenting import Augment, augment, draw
from fastarat.data.beton_file import survey
from fastarat.data.crops import pagewise
from fastarat.data.mixing import CutMix
from fastarat.data.randaugment import RandAugment
from fastarat.data.splits import Batch, Split, derive_seed
from fastarat.distributed import World
from fastarat.errors import UserError, unknown
from fastarat.specs import known

LoaderKind = Literal["auto", "resident", "ffcv"]
LOADERS: tuple[LoaderKind, ...] = get_args(LoaderKind)
Order = Literal["random", "pages"]
ORDERS: tuple[Order, ...] = get_args(Order)

_STATISTICS = 16_384  # images whose mean and deviation stand for those of a set that is cut as it is read
# The other three quarters are for the activations; FFCV streams what is larger.
_RESIDENT_FRACTION = 0.25  # of the free device memory, or of the host's memory


@dataclass(eq=False, repr=False)
class Loader:
    """Batches of a split; `epoch(n)` depends on (seed, n) and on nothing else.

    kind: "resident" or "ffcv". reason: why, for people. recipe: the augmentation, None for the images as they are.
    randaugment, cutmix: what is done to a batch after it; with CutMix its labels are shares of the classes.
    world: each batch is divided among its ranks, and this one yields its own rows, of each of `accumulate`
    micro-batches; order and augmentation are those of the whole, but CutMix mixes a rank's rows with one another.
    len() is the number of batches.
    """

    kind: ClassVar[str]

    split: Split
    batch_size: int
    device: torch.device
    shuffle: bool
    seed: int
    recipe: Augment | None
    drop_last: bool
    reason: str
    randaugment: RandAugment | None = None
    cutmix: CutMix | None = None
    order_by: Order = "random"
    world: World = field(default_factory=World)
    accumulate: int = 1

    def __post_init__(self) -> None:
        self._labels = self.split.labels.to(self.device)

    @property
    def on_device(self) -> Augment | None:
        """What of the recipe is done to batches on the device: all, where it is not done as images are read."""
        return self.recipe

    def pages(self) -> np.ndarray:
        """Return the file's page in which each image lies: int64 [N]. Raises: UserError where there are none."""
        raise UserError("order 'pages' is of images that stream: use the ffcv loader, or the random order")

    def __len__(self) -> int:
        count = len(self.split)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """Return the positions that epoch number `epoch` visits: int64 [N], on the CPU."""
        count = len(self.split)
        if self.shuffle:
            # On the CPU, so that a run visits the same images in the same order on every device.
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            paged = self.order_by == "pages" and count
            order = pagewise(self.pages(), generator) if paged else torch.randperm(count, generator=generator)
        else:
            order = torch.arange(count)
        return order[: len(self) * self.batch_size]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of epoch number `epoch`, the last one short unless drop_last is set.

        first: batches to leave out at the start; no pixel of theirs is read, and the others are what they always are.
        """
        order = self.order(epoch)
        # On the device, for speed: a GPU's crops and flips are others than a CPU's, by the same seed.
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "augment", epoch))
        indices = order.to(self.device).split(self.batch_size) if len(order) else ()
        recipe = self.on_device
        if recipe is not None:
            for skipped in indices[:first]:
                draw(recipe, len(skipped), self.device, generator)
        order, indices = order[first * self.batch_size :], indices[first:]
        rows: list[Tensor | None] = [None] * len(indices)
        if self.world.size > 1:
            # One with nothing for some rank is left out.
            indices = [index for index in indices if len(index) >= self.world.size * self.accumulate]
            order = order[: sum(map(len, indices))]
            rows = [self._rows(len(index)) for index in indices]
            order = torch.cat([part[own] for part, own in zip(order.split(self.batch_size), rows, strict=True)])
            indices = [index[known(own).to(self.device)] for index, own in zip(indices, rows, strict=True)]
        pixels = self._pixels(order, indices, epoch)
        try:
            for number, (index, images, own) in enumerate(zip(indices, pixels, rows, strict=True), first):
                images = augment(images.permute(0, 3, 1, 2), recipe, generator, own, self.total(number))
                images = images if recipe is None else recipe(images)
                yield self.mixed(Batch(images, self._labels[index], index), epoch, number)
        finally:
            pixels.close()

    def total(self, index: int) -> int:
        """Images in batch number `index` of an epoch, over all ranks."""
        return min(self.batch_size, len(self.split) - index * self.batch_size)

    def _rows(self, total: int) -> Tensor:
        """This rank's rows of a batch of `total`, int64, on the CPU."""
        return torch.cat([torch.arange(part.start, part.stop) for part in self.world.parts(total, self.accumulate)])

    def mixed(self, batch: Batch, epoch: int, number: int) -> Batch:
        """What RandAugment and CutMix make of batch `number` (from 0) of an epoch, whatever was drawn before it."""
        images, labels, index = batch
        if self.randaugment is not None:
            images = self.randaugment(images, index, derive_seed(self.seed, "randaugment", epoch))
        if self.cutmix is not None:
            images, labels = self.cutmix(images, labels, derive_seed(self.seed, "cutmix", epoch, number))
        return Batch(images, labels, index)

    def _pixels(self, order: Tensor, indices: Sequence[Tensor], epoch: int) -> Generator[Tensor, None, None]:
        """Yield the pixels [B, H, W, C] on the device for each of `indices`: `order` in batches, on the device."""
        raise NotImplementedError


class ResidentLoader(Loader):
    """Keeps the whole split on the device as uint8 and gathers batches by index."""

    kind = "resident"

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self.split.images
        # uint8 takes a quarter of float32's room; the division by 255 belongs to `augment`, on the batch alone.
        self._images = (_read_whole(self.split) if images is None else images).to(self.device)

    def _pixels(self, order: Tensor, indices: Sequence[Tensor], epoch: int) -> Generator[Tensor, None, None]:
        for index in indices:
            yield self._images[index]


class FFCVLoader(Loader):
    """Streams a .beton file: FFCV reads, decodes and batches in the background, in the order given to it."""

    kind = "ffcv"

    def __post_init__(self) -> None:
        super().__post_init__()
        # A rank's rows of all batches but the last are as many.
        self._stream = _stream(self.split, max(1, len(self._rows(self.batch_size))))

    def pages(self) -> np.ndarray:
        """As said above."""
        assert self.split.beton is not None
        return survey(self.split.beton).pages[self.split.indices.numpy()]

    def _pixels(self, order: Tensor, indices: Sequence[Tensor], epoch: int) -> Generator[Tensor, None, None]:
        channels = self.split.shape[0]
        for pixels in self._stream.batches(self.split.indices[order]):
            pixels = pixels[..., :channels]  # one channel is stored three times
            if self.device.type == "cuda":
                # FFCV refills its buffers without waiting for the device; memory pinned by PyTorch is waited for.
                pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
                pixels = pinned.copy_(pixels).to(self.device, non_blocking=True)
            yield pixels


def _stream(split: Split, batch_size: int) -> beton.Stream:
    assert split.beton is not None
    return beton.Stream(split.beton, batch_size, raw=split.raw)


def _read_whole(split: Split) -> Tensor:
    """Decode a split's .beton file once, in stored order."""
    from fastarat.data.streaming import centres

    channels, height, width = split.shape
    images = torch.empty((len(split), height, width, channels), dtype=torch.uint8)
    start = 0
    for pixels in centres(split) if split.crop else _stream(split, 256).batches(split.indices):
        images[start : start + len(pixels)] = pixels[..., :channels]
        start += len(pixels)
    return images


def make_loader(
    split: Split,
    *,
    batch_size: int,
    device: torch.device | str,
    kind: LoaderKind = "auto",
    shuffle: bool = False,
    seed: int = 0,
    augment: Augment | None = None,
    drop_last: bool = False,
    randaugment: RandAugment | None = None,
    cutmix: CutMix | None = None,
    order: Order = "random",
    world: World | None = None,
    accumulate: int = 1,
) -> Loader:
    """Make the loader of a split.

    kind: "resident" keeps the pixels on the device, "ffcv" streams a .beton file; "auto" is resident when the pixels
    take at most a quarter of the free device memory (on a CPU: of the host's memory), else ffcv. Loader.reason says
    which. Of images that are cut as they are read, random crops are always streamed by "auto", from the whole images.
    order: of shuffled images: "random", or "pages", for a file larger than the memory (`crops.pagewise`).
    world, accumulate: who takes which rows of a batch (`Loader`); batch_size is that of all ranks.

    Raises: UserError.
    """
    if kind not in LOADERS:
        raise unknown("loader", kind, LOADERS)
    if order not in ORDERS:
        raise unknown("order", order, ORDERS)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not a number of images: write 1 or more")
    device = torch.device(device)
    options: dict[str, Any] = {
        "batch_size": batch_size, "device": device, "shuffle": shuffle, "seed": seed, "recipe": augment,
        "drop_last": drop_last, "randaugment": randaugment, "cutmix": cutmix, "order_by": order,
        "world": world or World(), "accumulate": accumulate,
    }  # fmt: skip
    if split.source is not None:
        return split.source.loader(split, **options)
    prepare_it = "convert the data set with `fastarat data prepare` and pass the folder it makes"
    if kind == "ffcv" and split.beton is None:
        raise UserError(f"the ffcv loader reads .beton files: {prepare_it}, or use the resident loader")
    reason = f"{kind} was asked for"
    if kind == "auto":
        fits, reason = _fits(split, device)
        if split.beton is not None and order == "pages":
            fits, reason = False, "order 'pages' was asked for"
        elif split.crop and augment is not None and augment.scale is not None:
            fits, reason = False, "crops are cut from the whole images"
        kind = "resident" if fits else "ffcv"
        if not fits and split.beton is None:
            raise UserError(f"{reason}, so the images must be streamed: {prepare_it}, or ask for the resident loader")
    from fastarat.data.streaming import CropLoader  # which builds upon this file

    chosen = ResidentLoader if kind == "resident" else CropLoader if split.crop else FFCVLoader
    made = chosen(split, **options, reason=reason)
    if order == "pages" and len(split):
        made.pages()  # says what is wrong before work starts
    return made


def _fits(split: Split, device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        room, where = torch.cuda.mem_get_info(device)[0], "free device memory"
    elif split.images is not None:
        return True, f"{_size(split.num_bytes)} of pixels, in host memory already"
    else:
        room, where = host_bytes(), "host memory"
    fits = split.num_bytes <= _RESIDENT_FRACTION * room
    relation = "at most" if fits else "more than"
    return fits, f"{_size(split.num_bytes)} of pixels, {relation} a quarter of the {_size(room)} of {where}"


def host_bytes() -> int:
    """Return the memory this process may use: the machine's, or the container's when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return total


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def mean_std(split: Split) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the pixels, per channel, in [0, 1].

    Of a set that is cut as it is read: of the centres of at most 16,384 images, evenly spread over its rows.
    """
    if split.crop and len(split) > _STATISTICS:
        split = split.take(torch.arange(_STATISTICS) * len(split) // _STATISTICS)
    loader = make_loader(split, batch_size=1024, device="cpu")
    # In float64: the variance is a small difference of two large sums, of which float32 keeps few digits.
    total, square, count = *torch.zeros(2, dtype=torch.float64), 0
    for batch in loader.epoch(0):
        pixels_ = batch.images.double()
        total = total + pixels_.sum((0, 2, 3))
        square = square + pixels_.square().sum((0, 2, 3))
        count += pixels_.numel() // pixels_.shape[1]
    mean = total / count
    return mean.tolist(), (square / count - mean.square()).sqrt().tolist()
