"""Squares cut out of images of any sizes: where they lie, by a seed and a row, and how they are decoded in threads.

FFCV's own random crops come from a generator that cannot be seeded. Here a crop is a function of (seed, row): neither
the order of rows, nor who reads them, nor where an epoch is resumed changes it. FFCV's library decodes and resizes; the
threads and what is read ahead are ours, because its reader takes no crops from outside.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastarat.data.beton_file import Stamp, jpeg_head, survey, unusable

DRAWS = 22  # uniform numbers per crop: the area and the aspect ratio of ten tries, and where the chosen one lies
CENTRE = 224 / 256  # of the shorter side, in evaluation: as published ImageNet networks are tested
POOL = 16_384  # images that are shuffled among one another by `pagewise`
_TRIES = 10
_BATCHES_AHEAD = 3
_PAGES_AHEAD = 8  # batches before a page's first image is due that the system is asked to read it
_JPEG_HEAD = 4096  # bytes in which an encoder's tables and frame header lie

Boxes = Callable[[np.ndarray], Tensor]


def uniform(seed: int, rows: np.ndarray, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) for each row: float64 [N, count], by (seed, row) alone.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), of which the row chooses the place in the stream.
    """
    golden, one, two = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
    place = rows.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    mixed = np.array(seed % 2**64, np.uint64) + place * golden
    mixed = (mixed ^ (mixed >> np.uint64(30))) * one
    mixed = (mixed ^ (mixed >> np.uint64(27))) * two
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def random_boxes(
    draws: Tensor, heights: Tensor, widths: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Choose a rectangle in each image, as torchvision's RandomResizedCrop does (Szegedy et al., CVPR 2015).

    draws: uniform [B, DRAWS]. heights, widths: int64 [B]. scale: of the area. ratio: width to height, drawn evenly in
    its logarithm. The first of ten tries that fits is taken, else the largest centred one within `ratio`.

    Returns: int64 [4, B], top, left, height and width. Nothing is read back from a device.
    """
    high, wide = heights[:, None].to(draws.dtype), widths[:, None].to(draws.dtype)
    area = high * wide * (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES])
    low = math.log(ratio[0])
    aspect = (low + (math.log(ratio[1]) - low) * draws[:, _TRIES : 2 * _TRIES]).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width >= 1) & (height >= 1) & (width <= wide) & (height <= high)
    # Weighted, so that the largest is unique: which of several equal ones argmax finds is left open.
    first = (fits * torch.arange(_TRIES, 0, -1, device=draws.device)).argmax(1, keepdim=True)
    whole = torch.minimum(wide, (high * ratio[1]).round()), torch.minimum(high, (wide / ratio[0]).round())
    any_fits = fits.any(1, keepdim=True)
    width = torch.where(any_fits, width.gather(1, first), whole[0])
    height = torch.where(any_fits, height.gather(1, first), whole[1])
    place = torch.where(any_fits, draws[:, 2 * _TRIES :], 0.5)
    top = (place[:, :1] * (high - height + 1)).floor().minimum(high - height)
    left = (place[:, 1:] * (wide - width + 1)).floor().minimum(wide - width)
    return torch.cat([top, left, height, width], 1).t().long()


def centre_boxes(heights: Tensor, widths: Tensor, share: float = CENTRE) -> Tensor:
    """The centred squares of `share` of the shorter side: int64 [4, B], top, left, height and width."""
    side = (torch.minimum(heights, widths) * share).round().clamp_min(1).long()
    return torch.stack([(heights - side) // 2, (widths - side) // 2, side, side])


def resize_boxes(images: Tensor, boxes: Tensor, flipped: Tensor | None) -> Tensor:
    """Resize a rectangle of each image to the image's size, bilinearly, on the device, and flip some.

    images: float32 [B, C, H, W], channels-last. boxes: int64 [4, B]. flipped: bool [B]. Nothing is shrunk, so nothing
    has to be filtered first.
    """
    batch, _, height, width = images.shape
    top, left, high, wide = boxes.to(torch.float32)
    across = wide / width if flipped is None else torch.where(flipped, -wide, wide) / width
    none = torch.zeros_like(across)
    x, y = (2 * left + wide) / width - 1, (2 * top + high) / height - 1
    theta = torch.stack([across, none, x, none, high / height, y], 1).view(batch, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    found = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    return found.contiguous(memory_format=torch.channels_last)


def pagewise(pages: np.ndarray, generator: torch.Generator) -> Tensor:
    """Shuffle images so that each page of a file is read in one stretch: int64 [N], positions.

    pages: int64 [N], the page of each image. Pages are shuffled and taken together until they hold POOL images, and
    the images of such a pool are shuffled: a file larger than the memory is read once per epoch, page by page.
    """
    found = np.unique(pages, return_inverse=True)[1]
    rank = torch.randperm(int(found.max()) + 1, generator=generator)[torch.from_numpy(found)]
    counts = torch.bincount(rank)
    pool = ((counts.cumsum(0) - counts) // POOL)[rank]
    shuffled = torch.randperm(len(pages), generator=generator)
    return shuffled[pool[shuffled].argsort(stable=True)]


class CropStream:
    """Squares of a .beton file's images, in any order of rows, decoded in threads ahead of their use.

    side: pixels of the squares. library: FFCV's (`beton.ffcv_parts`). workers: threads.
    """

    def __init__(self, path: Path, side: int, library: Any, workers: int) -> None:
        self.path, self.side, self.survey = path, side, survey(path)
        self._library, self._workers = library, max(1, workers)
        self._own = threading.local()
        self._room = int((self.survey.heights.astype(np.int64) * self.survey.widths).max()) * 3

    def batches(
        self, batches: Sequence[np.ndarray], boxes: Boxes, *, pin: bool = False, ahead: bool = False
    ) -> Generator[Tensor, None, None]:
        """Yield uint8 [B, side, side, 3] on the CPU for each array of rows; every one is the caller's own.

        boxes: rows -> int64 [4, B], top, left, height, width. pin: page-locked memory, from which a GPU copies by
        itself. ahead: ask the system to read whole pages before they are due, for rows in the order of `pagewise`.

        Raises: UserError for an image that is damaged, and where the file changes while it is read.
        """
        with self.path.open("rb") as file, ThreadPoolExecutor(self._workers) as pool:
            self._unchanged(file.fileno())
            asked: set[int] = set()
            begun: deque[tuple[Tensor, list[Future[None]]]] = deque()
            try:
                for number, rows in enumerate(batches):
                    if ahead:
                        for later in batches[0 if not number else number + _PAGES_AHEAD :][: _PAGES_AHEAD + 1]:
                            self._ask(file.fileno(), later, asked)
                    out = torch.empty((len(rows), self.side, self.side, 3), dtype=torch.uint8, pin_memory=pin)
                    tasks, where, pixels = [], boxes(rows).t().tolist(), out.numpy()
                    for start in range(self._workers):
                        part = slice(start, None, self._workers)
                        task = pool.submit(self._some, file.fileno(), rows[part], where[part], pixels[part])
                        tasks.append(task)
                    begun.append((out, tasks))
                    if len(begun) > _BATCHES_AHEAD:
                        yield self._finished(file.fileno(), *begun.popleft())
                while begun:
                    yield self._finished(file.fileno(), *begun.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _finished(self, file: int, out: Tensor, tasks: list[Future[None]]) -> Tensor:
        for task in tasks:
            task.result()
        self._unchanged(file)
        return out

    def _unchanged(self, file: int) -> None:
        if Stamp.of(os.fstat(file)) != self.survey.stamp:
            raise unusable(self.path, "it changed while it was read")

    def _ask(self, file: int, rows: np.ndarray, asked: set[int]) -> None:
        """Have the system read the pages of rows that were not asked for yet."""
        for row in rows:
            page = int(self.survey.pages[row])
            if page not in asked and hasattr(os, "posix_fadvise"):
                asked.add(page)
                start = int(self.survey.places[row]) // self.survey.page * self.survey.page
                os.posix_fadvise(file, start, self.survey.page, os.POSIX_FADV_WILLNEED)

    def _some(self, file: int, rows: np.ndarray, boxes: list[list[int]], out: np.ndarray) -> None:
        for row, box, target in zip(rows.tolist(), boxes, out, strict=True):
            try:
                self._one(file, row, box, target)
            except (OSError, ValueError) as error:
                raise unusable(self.path, f"row {row}: {error}") from error

    def _one(self, file: int, row: int, box: list[int], target: np.ndarray) -> None:
        table = self.survey
        height, width, size = int(table.heights[row]), int(table.widths[row]), int(table.sizes[row])
        # Read, not mapped: a file cut short is an error and not the end of the process, pages that were read do not
        # count as this process's memory, and other threads go on meanwhile.
        data = np.frombuffer(os.pread(file, size, int(table.places[row])), np.uint8)
        if len(data) != size:
            raise ValueError("it is cut short")
        if table.jpeg[row]:
            # FFCV writes as many pixels as the JPEG itself says, wherever that ends.
            jpeg_head(data[:_JPEG_HEAD].tobytes(), height, width)
            if not hasattr(self._own, "room"):
                self._own.room = np.empty(self._room, np.uint8)
            image = self._own.room[: height * width * 3].reshape(height, width, 3)
            if self._library.imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False):
                raise ValueError("its JPEG is damaged")
        else:
            image = data.reshape(height, width, 3)
        top, left, high, wide = box
        self._library.resize_crop(image, top, top + high, left, left + wide, target)
