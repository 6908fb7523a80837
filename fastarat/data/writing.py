"""One .beton file, written image by image in any number, and gone on with where an earlier process was ended.

What FFCV's own writer makes of the same images in the same order, byte for byte; but its table of what goes where is
kept beside the file as it grows, so that neither the memory nor a killed process sets a limit.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from fastarat.data.beton_file import ALLOCATION, FIELD, FIELDS, HEADER, ROW

_ENTRY = np.dtype(
    [
        ("row", "<u8"),
        ("place", "<u8"),
        ("size", "<u8"),
        ("label", "<i8"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("mode", "u1"),
    ]
)
_PIECE = 1 << 16  # rows of the tables that are put in order at a time


class Encoded(NamedTuple):
    """An image as it is stored. mode: as in `beton_file.MODES`. data: uint8 [bytes]."""

    height: int
    width: int
    mode: int
    data: np.ndarray


class BetonWriter:
    """Writes images to `path` in the order they come; `done` is how many an earlier process wrote for good.

    count: images in all. page: bytes of a page, a power of two. What was written is certain after each page: it is on
    the disk before PATH.journal says so. Raises: OSError.
    """

    def __init__(self, path: Path, count: int, page: int) -> None:
        self._path, self._count, self._page = path, count, page
        self._journal_path = path.with_suffix(".journal")
        self._start = -(-(HEADER.itemsize + len(FIELDS) * FIELD.itemsize + count * ROW.itemsize) // page) * page
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        entries = self._entries()
        # The last page may be there in part, and the entries of it too: that page is written again.
        last = (int(entries["place"][-1]) - self._start) // page if len(entries) else 0
        self.done = int(np.searchsorted(entries["place"], np.uint64(self._start + last * page)))
        os.ftruncate(self._journal, self.done * _ENTRY.itemsize)
        os.ftruncate(self._file, self._start + last * page)
        self._number, self._used = last, 0
        self._pixels, self._pending = bytearray(page), np.zeros(1024, _ENTRY)
        self._waiting = 0

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)
        os.close(self._journal)

    def _entries(self) -> np.ndarray:
        size = os.fstat(self._journal).st_size // _ENTRY.itemsize
        return np.fromfile(self._journal_path, _ENTRY, size)

    def add(self, row: int, label: int, image: Encoded) -> None:
        """Store an image as `row` of the table. Raises: ValueError for one larger than a page."""
        size = len(image.data)
        if size > self._page:
            raise ValueError(f"it takes {size:,} bytes, more than the {self._page:,} of a page")
        if self._used + size > self._page:
            self._flush()
        if self._waiting == len(self._pending):
            self._pending = np.concatenate([self._pending, np.zeros_like(self._pending)])
        place = self._start + self._number * self._page + self._used
        self._pending[self._waiting] = (row, place, size, label, image.height, image.width, image.mode)
        self._waiting += 1
        self._pixels[self._used : self._used + size] = image.data.data
        self._used += size

    def _flush(self) -> None:
        if not self._used:
            return
        self._write(memoryview(self._pixels)[: self._used], self._start + self._number * self._page)
        # What is not written of a page is zeros that take no room.
        os.ftruncate(self._file, self._start + (self._number + 1) * self._page)
        os.fsync(self._file)
        content = self._pending[: self._waiting].tobytes()
        if os.write(self._journal, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._journal)
        self._number, self._used, self._waiting = self._number + 1, 0, 0

    def _write(self, content: bytes | memoryview, place: int) -> None:
        # A disk that is almost full takes a part.
        while content:
            content = content[(written := os.pwrite(self._file, content, place)) :]
            place += written

    def finish(self) -> None:
        """Write the tables, once all images were added, and remove the journal. Raises: OSError."""
        self._flush()
        entries = self._entries()
        if len(entries) != self._count:
            raise OSError(errno.EIO, f"{len(entries):,} of {self._count:,} images were written")
        header, fields = np.zeros(1, HEADER), np.zeros(len(FIELDS), FIELD)
        for field, (name, kind) in zip(fields, FIELDS, strict=True):
            field["type_id"] = kind
            field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        end = self._start + self._number * self._page
        header[0] = (2, len(FIELDS), self._page, self._count, end)
        table_at = HEADER.itemsize + fields.nbytes
        order = np.argsort(entries["row"], kind="stable")
        for first in range(0, self._count, _PIECE):
            part = entries[order[first : first + _PIECE]]
            rows = np.zeros(len(part), ROW)
            image = rows["f0"]
            for target, source in (("mode", "mode"), ("width", "width"), ("height", "height"), ("data_ptr", "place")):
                image[target] = part[source]
            rows["f1"] = part["label"]
            self._write(rows.tobytes(), table_at + first * ROW.itemsize)
            told = np.zeros(len(part), ALLOCATION)
            written = entries[first : first + _PIECE]  # in the order of the images in the file
            told["sample_id"], told["ptr"], told["size"] = written["row"], written["place"], written["size"]
            self._write(told.tobytes(), end + first * ALLOCATION.itemsize)
        self._write(fields.tobytes(), HEADER.itemsize)
        self._write(header.tobytes(), 0)  # last: a file without it is none
        os.fsync(self._file)
        self._journal_path.unlink()
