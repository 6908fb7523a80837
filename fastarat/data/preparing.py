"""Writing image files of any number and sizes as .beton files: in threads, bounded in memory, resumed after a kill.

Training images lie in the file in a seeded random order, so that those of one page are of any class
(`crops.pagewise`); their rows are in the order of the listing, as for every other source.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, get_args

import numpy as np

from fastarat.data import beton
from fastarat.data.beton_file import (
    LARGEST_SIDE,
    MODES,
    ROW,
    SMALLEST_PAGE,
    WRITE_MODES,
    Survey,
    WriteMode,
    page_size,
    survey,
)
from fastarat.data.checksums import checksum
from fastarat.data.crops import uniform
from fastarat.data.sources import Listing, decode, is_grey, whole_images
from fastarat.data.splits import derive_seed
from fastarat.data.writing import BetonWriter, Encoded
from fastarat.errors import UserError, unknown

_SAMPLE = 256  # images whose sizes stand for all when a page's size is chosen and the room is looked at
_CHUNK, _CHUNK_BYTES = 16, 1 << 20  # images that a thread takes at a time, and what they may be in all
_PIPE_EVERY, _TERMINAL_EVERY = 10.0, 0.5  # seconds between two lines of progress


@dataclass(frozen=True)
class PrepareOptions:
    """How images are stored.

    write_mode: "raw" keeps every pixel, "jpg" is smaller and lossy, "proportion" stores a share of the images, drawn
    by a seed, as JPEG (`jpeg_share`, 0 to 1) and the others raw. jpeg_quality: 1 to 100. image_size: resize the shorter
    side to this many pixels and cut out the centre square. max_resolution: scale down what has a longer side of more
    pixels, as FFCV's own option. workers: threads that decode and encode; None for the cores there are, at most 16.

    Raises: UserError.
    """

    write_mode: WriteMode = "raw"
    jpeg_quality: int = 90
    jpeg_share: float = 0.5
    image_size: int | None = None
    max_resolution: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.write_mode not in WRITE_MODES:
            raise unknown("write mode", self.write_mode, get_args(WriteMode))
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg_quality={self.jpeg_quality} is outside 1..100")
        if not 0 <= self.jpeg_share <= 1:
            raise UserError(f"jpeg_share={self.jpeg_share} is no share of the images: write 0 to 1")
        if self.image_size is not None and self.max_resolution is not None:
            raise UserError("image_size makes squares of one size and max_resolution caps them: give one of the two")
        if self.max_resolution is not None and not 8 <= self.max_resolution <= LARGEST_SIDE:
            raise UserError(f"max_resolution={self.max_resolution}: write 8 to {LARGEST_SIDE} pixels")
        if self.workers is not None and not 1 <= self.workers <= 256:
            raise UserError(f"workers={self.workers} is not a number of threads: write 1 to 256")

    @property
    def notes(self) -> list[str]:
        """What a reader of results must know of the pixels."""
        told = []
        if self.write_mode != "raw":
            share = "" if self.write_mode == "jpg" else f" of {self.jpeg_share:.0%} of the images"
            told.append(f"pixels{share} were re-encoded as JPEG, quality {self.jpeg_quality}")
        if self.max_resolution is not None:
            told.append(f"images were scaled down to {self.max_resolution} pixels on the longer side")
        return told


class Progress:
    """Says how far a long work is, on a terminal in place, else a line each ten seconds at most. show: at all."""

    def __init__(self, what: str, total: int, done: int, show: bool, stream: TextIO | None = None) -> None:
        self._what, self._total, self._done, self._show = what, total, done, show
        self._before, self._start = done, time.monotonic()
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._due = self._start + (_TERMINAL_EVERY if self._terminal else _PIPE_EVERY)
        if show and done:
            print(f"{what}: goes on after the {done:,} of {total:,} images that are written", file=self._stream)

    def add(self, count: int) -> None:
        """Count what was done since."""
        self._done += count
        now = time.monotonic()
        if self._show and (now >= self._due or (self._terminal and self._done == self._total)):
            self._due = now + (_TERMINAL_EVERY if self._terminal else _PIPE_EVERY)
            rate = (self._done - self._before) / max(now - self._start, 1e-9)
            left = round((self._total - self._done) / max(rate, 1e-9))
            clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            text = f"{self._what}: {self._done:,} of {self._total:,} images, {rate:,.0f} images/s, {clock} left"
            end = "\r" if self._terminal and self._done < self._total else "\n"
            print(f"{text:<78}", end=end, file=self._stream, flush=True)


class _Encoder:
    """Makes of a file what is stored of it. channels: 1 or 3, of all images; one is stored three times."""

    def __init__(self, options: PrepareOptions, channels: int) -> None:
        field = beton.ffcv_parts().RGBImageField
        self._options, self._channels = options, channels
        self._fields = {
            mode: field(write_mode=mode, jpeg_quality=options.jpeg_quality, max_resolution=options.max_resolution)
            for mode in MODES
        }

    def __call__(self, file: str, row: int) -> Encoded:
        pixels = decode(Path(file), self._options.image_size, self._channels)
        height, width = pixels.shape[:2]
        cap = self._options.max_resolution
        if max(height, width) > LARGEST_SIDE and (cap is None or min(height, width) * cap < max(height, width)):
            raise UserError(
                f"the pixels of {file} are {height}x{width}: a .beton file takes {LARGEST_SIDE} a side; "
                "write --max-resolution N or --image-size N"
            )
        mode = self._options.write_mode
        if mode == "proportion":
            mode = "jpg" if float(uniform(1, np.array([row]), 1)) < self._options.jpeg_share else "raw"
        field, stored, data = self._fields[mode], np.zeros(1, ROW["f0"]), []

        def place(size: int) -> tuple[int, np.ndarray]:
            data.append(np.empty(size, np.uint8))
            return 0, data[0]

        field.encode(stored, np.broadcast_to(pixels, (height, width, 3)), place)
        return Encoded(int(stored["height"][0]), int(stored["width"][0]), MODES[mode], data[0])


def write_listing(
    folder: Path, out: Path, listing: Listing, options: PrepareOptions, files_digest: str, *, progress: bool
) -> None:
    """Write train.beton, test.beton and dataset.json of image files into `folder`, and rename it to `out`.

    folder: of `beton.unfinished`; what an earlier process finished of it is not done again. Raises: UserError.
    """
    channels = 1 if all(is_grey(Path(file)) for file in listing.files) else 3  # no further than the first colour image
    encoder, sums, found = _Encoder(options, channels), {}, {}
    needed = None
    try:
        for part, rows in (("train", listing.train), ("test", listing.test)):
            path, done = folder / f"{part}.beton", folder / f"{part}.sha256"
            if not done.exists():
                page, needed = _room(folder, listing, rows, options)
                _write_part(path, listing, rows, encoder, page, options.workers or beton.workers(), progress)
                done.write_text(checksum(path), encoding="ascii")
            sums[part], found[part] = done.read_text(encoding="ascii"), survey(path, len(rows))
            if not np.array_equal(found[part].labels, listing.labels[rows]):
                raise UserError(f"{path} does not read back as it was written: start again")
        described = _described(listing, options, found, channels) | {"sha256": sums, "source_files": files_digest}
        # ASCII alone, so that a class name of any bytes is written and read back.
        (folder / "dataset.json").write_text(json.dumps(described, indent=1) + "\n", encoding="ascii")
        for left in (beton.WHAT, "train.sha256", "test.sha256"):
            (folder / left).unlink()
        folder.rename(out)
    except OSError as error:
        beton.cannot_write(out, error, needed)


def _described(listing: Listing, options: PrepareOptions, found: dict[str, Survey], channels: int) -> dict[str, Any]:
    heights, widths = (
        np.concatenate([getattr(part, name) for part in found.values()]) for name in ("heights", "widths")
    )
    smallest, largest = ([int(f(side)) for side in (heights, widths)] for f in (np.min, np.max))
    one = smallest == largest and options.write_mode != "proportion"
    return {
        "format": 1 if one else 2,
        "name": listing.name,
        "classes": list(listing.classes),
        "shape": [channels, *largest],
        "channels": channels,
        "counts": {part: len(table.labels) for part, table in found.items()},
        "per_class": {
            part: np.bincount(table.labels, minlength=len(listing.classes)).tolist() for part, table in found.items()
        },
        "sizes": {"smallest": smallest, "largest": largest},
        "write_mode": options.write_mode,
        **({} if options.write_mode == "raw" else {"jpeg_quality": options.jpeg_quality}),
        "source": str(listing.root),
        "notes": [*listing.notes, *options.notes],
    }


def _room(folder: Path, listing: Listing, rows: np.ndarray, options: PrepareOptions) -> tuple[int, int | None]:
    """Choose a page's bytes by a sample of the images' sizes, and see that raw pixels of that size have room."""
    from PIL import Image

    seen = []
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).round().astype(int))]:
        # Damaged ones are named when it is their turn.
        with suppress(Exception), Image.open(listing.files[row]) as image:
            width, height = image.size
            if options.image_size is not None:
                width = height = options.image_size
            shrink = min(1.0, (options.max_resolution or LARGEST_SIDE) / max(width, height))
            seen.append((max(1, int(height * shrink)), max(1, int(width * shrink))))
    if not seen:
        return page_size(1, 1), None
    page = page_size(max(h for h, _ in seen), max(w for _, w in seen))
    if options.write_mode == "jpg":
        return max(SMALLEST_PAGE, page // 4), None  # a JPEG is a small part of its pixels
    if options.write_mode == "proportion":
        return page, None
    needed = round(sum(h * w * 3 for h, w in seen) / len(seen) * len(rows)) + 2 * page
    sure = 1.0 if len(set(seen)) == 1 else 0.8  # of a sample the sum is an estimate
    begun = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    if sure * needed > shutil.disk_usage(folder).free + begun:
        beton.cannot_write(folder, OSError(28, os.strerror(28)), needed)
    return page, needed


def _write_part(
    path: Path, listing: Listing, rows: np.ndarray, encoder: _Encoder, page: int, workers: int, progress: bool
) -> None:
    """Write the files at `rows` of a listing as rows 0, 1, ... of a file; training images in a seeded random place."""
    count = len(rows)
    order = np.arange(count)
    if path.stem == "train":
        order = np.random.RandomState(derive_seed(0, "place") % 2**32).permutation(count)
    with BetonWriter(path, count, page) as writer, whole_images():
        shown = Progress(path.stem, count, writer.done, progress)
        chunk = max(1, min(_CHUNK, _CHUNK_BYTES // (page // 16)))  # a page holds 16 images or more
        for row, image in _encoded(listing, rows, order[writer.done :], encoder, workers, chunk):
            file = listing.files[rows[row]]
            try:
                writer.add(row, int(listing.labels[rows[row]]), image)
            except ValueError as error:
                raise UserError(
                    f"{file} is much larger than other images ({error}): write --max-resolution N"
                ) from error
            shown.add(1)
        writer.finish()


def _encoded(
    listing: Listing, rows: np.ndarray, order: np.ndarray, encoder: _Encoder, workers: int, chunk: int
) -> Iterator[tuple[int, Encoded]]:
    """Yield rows and images in `order`, encoded by threads; a few chunks a thread are held, however many come."""

    def some(part: np.ndarray) -> list[tuple[int, Encoded]]:
        return [(int(row), encoder(listing.files[rows[row]], int(row))) for row in part]

    begun: deque[Future[list[tuple[int, Encoded]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for first in range(0, len(order), chunk):
                begun.append(pool.submit(some, order[first : first + chunk]))
                if len(begun) > 2 * workers:
                    yield from begun.popleft().result()
            while begun:
                yield from begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
