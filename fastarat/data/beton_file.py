"""What a prepared folder's files may say: every field that FFCV follows, checked before FFCV sees it.

FFCV checks nothing. Its compiled reader takes addresses, sizes and modes from the file as they stand, and a wrong one
writes into memory that is not the file's. So a file passes here only if FFCV's own writer could have laid it out.
Nothing here needs FFCV.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np

from fastarat.errors import UserError

WriteMode = Literal["raw", "jpg", "proportion"]
WRITE_MODES: tuple[WriteMode, ...] = get_args(WriteMode)
LARGEST_SIDE = 4096  # pixels; a page holds 16 images, and FFCV's pages end at 2 GiB

# The file format, version 2: header, two field descriptors, a table row per image, pages of pixels, allocation table.
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ROW = np.dtype([("", _IMAGE), ("", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

FIELDS = (("image", 2), ("label", 1))  # in this order, which decides what a row looks like
MODES: dict[WriteMode, int] = {"jpg": 0, "raw": 1}  # of one image
SMALLEST_PAGE = 1 << 21  # FFCV's own minimum
_LARGEST_DESCRIPTION = 1 << 24  # bytes of a dataset.json: the names of the classes are all that may be long


def page_size(height: int, width: int) -> int:
    """Bytes of a page for images of this size: an image never spans pages, so at most 1/16 of a page is lost."""
    size = SMALLEST_PAGE
    while size < 16 * height * width * 3:
        size *= 2
    return size


class Stamp(NamedTuple):
    """What tells a file on disk from what it was."""

    size: int
    changed: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        """Take what `os.stat` found."""
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


class Checked(NamedTuple):
    """A file whose every field was checked. labels: int64 [N]. mode: of all images. stamp: of the file then."""

    labels: np.ndarray
    height: int
    width: int
    mode: WriteMode
    stamp: Stamp


class Survey(NamedTuple):
    """A file of images of any sizes whose tables were checked; row by row, in the order of the table.

    labels: int64 [N]. heights, widths: uint16 [N]. jpeg: bool [N], else plain pixels. places, sizes: int64 [N], bytes.
    pages: int64 [N], the page that an image lies in. page: bytes of one. stamp: of the file then.
    """

    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    jpeg: np.ndarray
    places: np.ndarray
    sizes: np.ndarray
    pages: np.ndarray
    page: int
    stamp: Stamp


class _Wrong(ValueError):
    """What does not fit in a .beton file."""


class _Tables(NamedTuple):
    """A file's tables, whose numbers fit in it; where its pages begin and end is in bytes."""

    rows: np.ndarray
    allocations: np.ndarray
    page: int
    start: int
    end: int
    stamp: Stamp


def check(path: Path, count: int | None = None, size: tuple[int, int] | None = None) -> Checked:
    """Check a .beton file's every field, whatever its length or content.

    count: images that it must hold. size: height and width that they must have. None for what it says itself.

    Raises: UserError naming the file and what does not fit.
    """
    try:
        with path.open("rb") as file:
            return _checked(file, count, size)
    except FileNotFoundError:
        raise unusable(path, "it does not exist") from None
    except (OSError, ValueError) as error:
        raise unusable(path, str(error)) from error


def survey(path: Path, count: int | None = None) -> Survey:
    """Check all of a .beton file that is read before its pixels, whatever the sizes of its images.

    What a JPEG says of itself is left to whoever decodes it (`jpeg_head`): there may be millions.

    Raises: UserError naming the file and what does not fit.
    """
    try:
        with path.open("rb") as file:
            tables = _tables(file, count)
            return _surveyed(tables)
    except FileNotFoundError:
        raise unusable(path, "it does not exist") from None
    except (OSError, ValueError) as error:
        raise unusable(path, str(error)) from error


def _surveyed(tables: _Tables) -> Survey:
    image, allocations = tables.rows["f0"], tables.allocations
    heights, widths = image["height"].copy(), image["width"].copy()
    if not (min(heights.min(), widths.min()) >= 1 and max(heights.max(), widths.max()) <= LARGEST_SIDE):
        raise _Wrong(f"it has images that are not 1 to {LARGEST_SIDE} pixels a side")
    _placed(image["data_ptr"], allocations, tables.start, tables.end, tables.page)
    sizes = np.empty(len(image), np.int64)
    sizes[allocations["sample_id"].astype(np.int64)] = allocations["size"]
    pixels = heights.astype(np.int64) * widths * 3
    if not np.isin(image["mode"], list(MODES.values())).all():
        raise _Wrong(f"its images' modes are {np.unique(image['mode']).tolist()}, not 0 or 1")
    jpeg = image["mode"] == MODES["jpg"]
    if (sizes[~jpeg] != pixels[~jpeg]).any():
        raise _Wrong("its table says another size of plain pixels than they take")
    if (sizes[jpeg] > 4 * pixels[jpeg] + (1 << 16)).any():
        raise _Wrong("a JPEG is larger than its pixels")
    places = image["data_ptr"].astype(np.int64)
    pages = (places - tables.start) // tables.page
    return Survey(
        tables.rows["f1"].copy(), heights, widths, jpeg, places, sizes, pages, tables.page, tables.stamp
    )  # fmt: skip


def unusable(path: Path, why: str) -> UserError:
    """Build the error for a file that must not be read."""
    return UserError(f"{path} is not a usable .beton file: {why}. Make it again with `fastarat data prepare`.")


def _tables(file: BinaryIO, expected_count: int | None) -> _Tables:
    stat = os.fstat(file.fileno())
    header = _rows(file, HEADER, 1)[0]
    version, num_fields, page, count, end = (int(header[name]) for name in HEADER.names or ())
    if version != 2 or num_fields != len(FIELDS):
        raise _Wrong("its header is not FFCV's")
    fields = _rows(file, FIELD, len(FIELDS))
    for field, (name, type_id) in zip(fields, FIELDS, strict=True):
        if int(field["type_id"]) != type_id or field["name"].tobytes() != name.encode().ljust(16, b"\0"):
            found = [(f["name"].tobytes().rstrip(b"\0"), int(f["type_id"])) for f in fields]
            raise _Wrong(f"its fields are {found}, not an image and a label")
        if field["arguments"].any():
            raise _Wrong(f"its {name} field has settings, which FFCV's writer leaves out")
    if expected_count is not None and count != expected_count:
        raise _Wrong(f"it holds {count} images and dataset.json says {expected_count}")
    # Before anything is read by these numbers: Python's integers, which do not wrap around.
    if (expected := end + count * ALLOCATION.itemsize) != stat.st_size:
        raise _Wrong(f"it is {stat.st_size} bytes long and its header says {expected}; it may be cut short")
    if not count:
        raise _Wrong("it holds no images")
    if page < SMALLEST_PAGE or page & (page - 1):
        raise _Wrong(f"its page size is {page}, not a power of two of {SMALLEST_PAGE} or more")
    table_end = file.tell() + count * ROW.itemsize
    start = -(-table_end // page) * page
    if end <= start or (end - start) % page:
        raise _Wrong(f"its {count} images are said to end at byte {end}, which is no end of a page")
    table = _rows(file, ROW, count)
    file.seek(end)
    return _Tables(table, _rows(file, ALLOCATION, count), page, start, end, Stamp.of(stat))


def _checked(file: BinaryIO, expected_count: int | None, expected_size: tuple[int, int] | None) -> Checked:
    table, allocations, page, start, end, stamp = _tables(file, expected_count)
    image = table["f0"]
    height, width = _one_size(image, expected_size, page)
    _placed(image["data_ptr"], allocations, start, end, page)
    mode: WriteMode | None = next((name for name, number in MODES.items() if (image["mode"] == number).all()), None)
    if mode is None:
        raise _Wrong(f"its images' modes are {np.unique(image['mode']).tolist()}, not all 0 or all 1")
    if mode == "raw":
        if (allocations["size"] != height * width * 3).any():
            raise _Wrong(f"plain pixels of {height}x{width} take {height * width * 3} bytes, its table says otherwise")
    else:
        _check_jpegs(file, allocations, height, width)
    # A copy: the table is a read-only view of the file's bytes, all of which the labels would keep alive.
    return Checked(table["f1"].copy(), height, width, mode, stamp)


def _one_size(image: np.ndarray, expected: tuple[int, int] | None, page: int) -> tuple[int, int]:
    """Return height and width of the images, which are the same for all."""
    height, width = expected or (int(image["height"][0]), int(image["width"][0]))
    if (image["height"] != height).any() or (image["width"] != width).any():
        raise _Wrong(f"its images are not all {height}x{width}" + (" as dataset.json says" if expected else ""))
    if not (1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE and height * width * 3 <= page):
        raise _Wrong(f"its images are {height}x{width}, not 1 to {LARGEST_SIDE} pixels a side and within a page")
    return height, width


def _placed(pointers: np.ndarray, allocations: np.ndarray, start: int, end: int, page: int) -> None:
    """Check that each image has a place of its own, packed into pages as FFCV's writer does."""
    outside = "its table points outside the stored images"
    owners = allocations["sample_id"]
    # In any order: FFCV's own writer has several processes.
    if not np.array_equal(np.sort(owners), np.arange(len(owners), dtype=np.uint64)):
        raise _Wrong("its allocation table does not name every image once")
    if not np.array_equal(pointers[owners.astype(np.int64)], allocations["ptr"]):
        raise _Wrong(outside)
    order = np.argsort(allocations["ptr"], kind="stable")
    first, sizes = allocations["ptr"][order], allocations["size"][order]
    # Each comparison leaves no room for the next to wrap around 2^64.
    if (first < start).any() or (first >= end).any() or (sizes > end - first).any() or (sizes == 0).any():
        raise _Wrong(outside)
    last = first + sizes
    pages, fresh = (first - start) // page, (first - start) % page == 0
    follows = np.concatenate(([first[0] == start], (first[1:] == last[:-1]) | fresh[1:]))
    turned = np.diff(pages.astype(np.int64))
    if (
        (pages != (last - 1 - start) // page).any()
        or (first[1:] < last[:-1]).any()
        or not follows.all()
        or (turned > 1).any()
        or start + (int(pages[-1]) + 1) * page != end
    ):
        raise _Wrong(f"{outside} or into one another: they are not packed as FFCV's writer packs them")


def _check_jpegs(file: BinaryIO, allocations: np.ndarray, height: int, width: int) -> None:
    """Check each JPEG's own size: FFCV ignores what its decoder says, and shows what was in memory before."""
    sizes = allocations["size"]
    if (sizes > 4 * height * width * 3 + (1 << 16)).any():
        raise _Wrong("a JPEG is larger than its pixels")
    content = np.memmap(file, np.uint8, "r")
    begin = int(allocations["ptr"][0])
    head = jpeg_head(bytes(content[begin : begin + min(int(sizes[0]), 4096)]), height, width)
    if (sizes <= len(head) + 2).any():
        raise _Wrong("a JPEG is cut short")
    # One encoder with one setting: the bytes up to the image's size are the same in all.
    steps = np.arange(len(head), dtype=np.int64)
    for rows in np.array_split(allocations, -(-len(allocations) // 8192)):
        at = rows["ptr"].astype(np.int64)
        if (content[at[:, None] + steps] != np.frombuffer(head, np.uint8)).any():
            raise _Wrong(f"a JPEG does not begin as the first does, or is not {height}x{width}")
        tail = at + rows["size"].astype(np.int64)
        if (content[tail - 2] != 0xFF).any() or (content[tail - 1] != 0xD9).any():
            raise _Wrong("a JPEG does not end as JPEGs do")


def jpeg_head(data: bytes, height: int, width: int) -> bytes:
    """Return a JPEG's bytes up to the end of its frame header, which must say this size and three components.

    Raises: ValueError.
    """
    at = 2
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):
            frame = data[at + 4 : at + 2 + length]
            wanted = bytes([8]) + height.to_bytes(2, "big") + width.to_bytes(2, "big") + bytes([3])
            if length != 17 or frame[:6] != wanted or len(frame) != length - 2:
                raise _Wrong(f"a JPEG's own header is not that of {height}x{width} colour pixels")
            return data[: at + 2 + length]
        # Tables and what an encoder says about itself; a scan before the frame would be no JPEG.
        if length < 2 or not (0xE0 <= marker <= 0xEF or marker in (0xDB, 0xC4, 0xDD, 0xFE)):
            break
        at += 2 + length
    raise _Wrong("a JPEG has no frame header")


def _rows(file: BinaryIO, dtype: np.dtype, count: int) -> np.ndarray:
    data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise _Wrong("it is cut short")
    return np.frombuffer(data, dtype)


class Description(NamedTuple):
    """What a dataset.json says, each value of its type and within its bounds.

    sha256: hex by part, or empty. varying: whether images have sizes or modes of their own; `shape` is the largest's.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    counts: dict[str, int]
    write_mode: WriteMode
    source: str
    notes: tuple[str, ...]
    sha256: dict[str, str]
    varying: bool = False


def describe(folder: Path) -> Description:
    """Read a prepared folder's dataset.json. Raises: UserError for one that `write_prepared` cannot have written."""
    path = folder / "dataset.json"

    def corrupt(why: object) -> UserError:
        line = " ".join(str(why).split())[:200].encode("ascii", "backslashreplace").decode()
        return UserError(f"{path} cannot be read ({line}): make it again with `fastarat data prepare`")

    try:
        if not path.is_file():
            raise FileNotFoundError
        if (size := path.stat().st_size) > _LARGEST_DESCRIPTION:
            raise corrupt(f"it is {size} bytes long")
        told = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: a .beton file is read together with the dataset.json that "
            "`fastarat data prepare` writes beside it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else corrupt(error) from error
    if not isinstance(told, dict) or isinstance(told.get("format"), bool) or told.get("format") not in (1, 2):
        raise corrupt("it is no description of format 1 or 2")
    if _strange(told):
        raise corrupt(f"{_strange(told)} is missing or not of the type it has there")
    counts, shape = {part: told["counts"][part] for part in ("train", "test")}, tuple(told["shape"])
    if shape[0] not in (1, 3) or len(told["classes"]) < 2:
        raise UserError(
            f"{path} says {shape[0]} channels and {len(told['classes'])} classes: expected 1 or 3, and 2 or more"
        )
    if max(shape[1:]) > LARGEST_SIDE or max(counts.values()) > 1 << 40:
        raise corrupt(f"images of {shape[1]}x{shape[2]}, {max(counts.values())} of them")
    return Description(
        told["name"], tuple(told["classes"]), shape, counts, told["write_mode"], told["source"],
        tuple(told.get("notes", ())), told.get("sha256", {}), told["format"] == 2,
    )  # fmt: skip


def _strange(told: dict[str, Any]) -> str | None:
    """Name the first entry of a dataset.json that is not of its type, or None."""

    def text(value: object) -> bool:
        # A lone surrogate cannot be printed or written; control characters could draw over the terminal.
        return isinstance(value, str) and not any(0xD800 <= ord(c) <= 0xDFFF or ord(c) < 32 for c in value)

    def texts(value: object) -> bool:
        return isinstance(value, list) and all(map(text, value))

    def whole(value: object) -> bool:
        return type(value) is int and value >= 1  # not a bool

    def parts(value: object, kind: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(kind(value.get(part)) for part in ("train", "test"))

    shape = told.get("shape")
    right = {
        "name": text(told.get("name")),
        "classes": texts(told.get("classes")),
        "shape": isinstance(shape, list) and len(shape) == 3 and all(map(whole, shape)),
        "counts": parts(told.get("counts"), whole),
        "write_mode": told.get("write_mode") in WRITE_MODES,
        "source": text(told.get("source")),
        "notes": texts(told.get("notes", [])),
        "sha256": "sha256" not in told
        or parts(told["sha256"], lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))),
    }
    return next((name for name, fits in right.items() if not fits), None)
