"""Both loaders and the augmentation they share: batches that depend on (seed, epoch) and on nothing else.

`resident` keeps the pixels on the device, `ffcv` streams a .beton file of any size; they give the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastarat.data import beton
from fastarat.data.splits import Batch, Dataset, Split, derive_seed
from fastarat.errors import UserError, unknown

LoaderKind = Literal["auto", "resident", "ffcv"]
LOADERS: tuple[LoaderKind, ...] = get_args(LoaderKind)

# The other three quarters are for the activations; FFCV streams what is larger.
_RESIDENT_FRACTION = 0.25  # of the free device memory, or of the host's memory


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding (pixels on each side), then a fair coin's horizontal flip."""

    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.padding, int) or self.padding < 0:
            raise UserError(f"padding={self.padding!r} is not a number of pixels: write 0 or more")


def default_augment(dataset: Dataset) -> Augment:
    """Choose the usual augmentation for a data set's shape.

    Sides of 16 and more are padded by 4 (CIFAR's custom), smaller ones by 1 (digits); colour images are flipped,
    grey ones, which are mostly characters, are not.
    """
    channels, height, width = dataset.shape
    return Augment(padding=4 if min(height, width) >= 16 else 1, flip=channels == 3)


def augment(images: Tensor, recipe: Augment | None, generator: torch.Generator | None = None) -> Tensor:
    """Convert pixels to float32 in [0, 1] and apply a seeded random crop and flip to each image.

    images: uint8 or float32 [B, C, H, W], pixels 0..255 or [0, 1]; channels-last is fastest. recipe: None converts
    only. generator: of the images' device. Shapes are fixed and nothing is read back, so a CUDA graph can hold it.

    Returns: float32 [B, C, H, W], channels-last; never a view of `images`.
    """
    batch, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1)
    if recipe is not None and (recipe.padding or recipe.flip):
        device, padding = images.device, recipe.padding
        # Crop and flip are one gather of whole pixels: slicing per image is a Python loop, and grid_sample
        # interpolates.
        flipped, offsets = _draw(recipe, batch, device, generator)
        rows = torch.arange(height, device=device).expand(batch, height)
        columns = torch.arange(width, device=device).expand(batch, width)
        if flipped is not None:
            columns = torch.where(flipped, width - 1 - columns, columns)
        if offsets is not None:
            rows, columns = rows + offsets[0], columns + offsets[1]
            pixels = F.pad(pixels, (0, 0, padding, padding, padding, padding))
        high, wide = height + 2 * padding, width + 2 * padding
        rows = rows + high * torch.arange(batch, device=device)[:, None]
        # Whole pixels are copied by one flat index: on a CPU four times faster than indexing with three tensors.
        flat = (rows[:, :, None] * wide + columns[:, None, :]).reshape(-1)
        pixels = pixels.reshape(-1, channels).index_select(0, flat).view(batch, height, width, channels)
    scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if images.dtype == torch.uint8:
        scaled.div_(255)
    return scaled.permute(0, 3, 1, 2)


def _draw(
    recipe: Augment, batch: int, device: torch.device, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor | None]:
    """Draw who of a batch is flipped, bool [B, 1], and the crops' offsets, int64 [2, B, 1]; None where there is none.

    All that `augment` draws, so that a batch can be passed over without its pixels.
    """
    draw = partial(torch.randint, generator=generator, device=device)
    flipped = draw(2, (batch, 1), dtype=torch.bool) if recipe.flip else None
    return flipped, draw(2 * recipe.padding + 1, (2, batch, 1)) if recipe.padding else None


@dataclass(eq=False, repr=False)
class Loader:
    """Batches of a split; `epoch(n)` depends on (seed, n) and on nothing else.

    kind: "resident" or "ffcv". reason: why, for people. recipe: the augmentation, None for the images as they are.
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

    def __post_init__(self) -> None:
        self._labels = self.split.labels.to(self.device)

    def __len__(self) -> int:
        count = len(self.split)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """Return the positions that epoch number `epoch` visits: int64 [N], on the CPU."""
        count = len(self.split)
        if self.shuffle:
            # On the CPU, so that a run visits the same images in the same order on every device.
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            order = torch.randperm(count, generator=generator)
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
        if self.recipe is not None:
            for skipped in indices[:first]:
                _draw(self.recipe, len(skipped), self.device, generator)
        order, indices = order[first * self.batch_size :], indices[first:]
        pixels = self._pixels(order, indices)
        try:
            for index, images in zip(indices, pixels, strict=True):
                images = augment(images.permute(0, 3, 1, 2), self.recipe, generator)
                yield Batch(images, self._labels[index], index)
        finally:
            pixels.close()

    def _pixels(self, order: Tensor, indices: Sequence[Tensor]) -> Generator[Tensor, None, None]:
        """Yield uint8 [B, H, W, C] on the device for each of `indices`: `order` in batches, on the device."""
        raise NotImplementedError


class ResidentLoader(Loader):
    """Keeps the whole split on the device as uint8 and gathers batches by index."""

    kind = "resident"

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self.split.images
        # uint8 takes a quarter of float32's room; the division by 255 belongs to `augment`, on the batch alone.
        self._images = (_read_whole(self.split) if images is None else images).to(self.device)

    def _pixels(self, order: Tensor, indices: Sequence[Tensor]) -> Generator[Tensor, None, None]:
        for index in indices:
            yield self._images[index]


class FFCVLoader(Loader):
    """Streams a .beton file: FFCV reads, decodes and batches in the background, in the order given to it."""

    kind = "ffcv"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stream = _stream(self.split, self.batch_size)

    def _pixels(self, order: Tensor, indices: Sequence[Tensor]) -> Generator[Tensor, None, None]:
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
    channels, height, width = split.shape
    images = torch.empty((len(split), height, width, channels), dtype=torch.uint8)
    start = 0
    for pixels in _stream(split, 256).batches(split.indices):
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
) -> Loader:
    """Make the loader of a split.

    kind: "resident" keeps the pixels on the device, "ffcv" streams a .beton file; "auto" is resident when the pixels
    take at most a quarter of the free device memory (on a CPU: of the host's memory), else ffcv. Loader.reason says
    which.

    Raises: UserError.
    """
    if kind not in LOADERS:
        raise unknown("loader", kind, LOADERS)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not a number of images: write 1 or more")
    device = torch.device(device)
    prepare_it = "convert the data set with `fastarat data prepare` and pass the folder it makes"
    if kind == "ffcv" and split.beton is None:
        raise UserError(f"the ffcv loader reads .beton files: {prepare_it}, or use the resident loader")
    reason = f"{kind} was asked for"
    if kind == "auto":
        fits, reason = _fits(split, device)
        kind = "resident" if fits else "ffcv"
        if not fits and split.beton is None:
            raise UserError(f"{reason}, so the images must be streamed: {prepare_it}, or ask for the resident loader")
    chosen = ResidentLoader if kind == "resident" else FFCVLoader
    return chosen(split, batch_size, device, shuffle, seed, augment, drop_last, reason)


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
    """Return mean and standard deviation of the pixels, per channel, in [0, 1]."""
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
