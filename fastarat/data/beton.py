"""FFCV's .beton files, and folders of them: write, check and stream.

FFCV reads, decodes and batches; the order of the images and the augmentation are ours (`loaders`), because
FFCV's own random transforms cannot be seeded. Labels are read straight from the file's table, so the image
decoder is all that is compiled: about 1 s, once per process, after an import of about 4 s.
Everything here that does not move pixels works without FFCV installed.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import warnings
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastarat.data.splits import Split, Stored
from fastarat.errors import UserError

WriteMode = Literal["raw", "jpg"]
WRITE_MODES: tuple[WriteMode, ...] = get_args(WriteMode)

INSTALL = (
    "install it with `pip install 'fastarat[ffcv]'` (it is built from source: on Debian and Ubuntu first "
    "`apt-get install libopencv-dev libturbojpeg0-dev pkg-config`)"
)

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
_TYPES = {"label": 1, "image": 2}
_RAW = 1

_SMALLEST_PAGE = 1 << 21  # FFCV's own minimum


@functools.cache
def ffcv_parts() -> SimpleNamespace:
    """Import the pieces of FFCV used here, once, and stop them from changing the rest of the process.

    Raises: UserError when FFCV cannot be imported.
    """
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import numba
            from ffcv.fields import IntField, RGBImageField
            from ffcv.fields.rgb_image import SimpleRGBImageDecoder
            from ffcv.loader import epoch_iterator
            from ffcv.loader.loader import Loader
            from ffcv.memory_allocator import MemoryAllocator
            from ffcv.pipeline.compiler import Compiler
            from ffcv.transforms import ToTensor
            from ffcv.writer import DatasetWriter, handle_sample
    except (ImportError, OSError) as error:
        raise UserError(f"FFCV cannot be imported ({error}): {INSTALL}, or use the resident loader.") from error
    finally:
        torch.set_num_threads(threads)  # importing FFCV sets PyTorch's thread count to 1

    def set_num_threads(cls, count: int) -> None:
        cls.num_threads = count
        numba.set_num_threads(count)

    # FFCV's version also sets PyTorch's thread count, from a background thread, in the middle of training.
    Compiler.set_num_threads = classmethod(set_num_threads)  # pyright: ignore[reportAttributeAccessIssue]
    # Batches are moved to the device by us. FFCV's own streams and events would meddle with graph capture,
    # and its reuse of a pinned buffer waits on the stream, not on the host that refills the buffer.
    epoch_iterator.IS_CUDA = False
    Epoch, Reader = _mended(epoch_iterator.EpochIterator, Loader)
    own = DatasetWriter, Epoch, IntField, MemoryAllocator, RGBImageField, Reader, SimpleRGBImageDecoder, ToTensor
    # Numba fills its config module in when it is imported, which the checker does not see.
    most = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    return SimpleNamespace(**{part.__name__: part for part in own}, handle_sample=handle_sample, max_workers=most)


def _mended(iterator: Any, loader: Any) -> tuple[type, type]:
    """Derive from FFCV's background reader and loader classes ones that neither hang nor compile twice."""

    class Epoch(iterator):
        """FFCV's background reader, except that an error in it ends the epoch instead of hanging it."""

        error: BaseException | None = None

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:
                self.error = error
                self.output_queue.put(None)

    class Reader(loader):
        """FFCV's loader; readers of equal image shape share one compiled pipeline."""

        compiled: dict[tuple, tuple] = {}

        def generate_code(self) -> None:
            image = self.reader.metadata["f0"][:1]
            # Numba compiles for the shape, and apart for one thread and for several: about a second each.
            key = (int(image["height"][0]), int(image["width"][0]), self.num_workers > 1)
            if key not in self.compiled:
                super().generate_code()
                self.compiled[key] = (self.graph, self.code)
            self.graph, self.code = self.compiled[key]

    return Epoch, Reader


def write(
    path: Path, images: np.ndarray, labels: np.ndarray, *, write_mode: WriteMode = "raw", jpeg_quality: int = 90
) -> None:
    """Write one .beton file with FFCV's own encoder.

    images: uint8 [N, H, W, C], C 1 or 3; one channel is stored three times. labels: int64 [N].
    write_mode: "raw" keeps every pixel value; "jpg" is smaller and lossy.

    FFCV's writer is driven in this process: its worker processes wait for ever when one of them fails (a full
    disk), and finish in a different order each time; this way equal input gives an equal file.
    """
    ffcv = ffcv_parts()
    _, height, width, _ = images.shape
    page_size = _SMALLEST_PAGE
    while page_size < 16 * height * width * 3:  # an image never spans pages: at most 1/16 of a page is lost
        page_size *= 2
    field = ffcv.RGBImageField(write_mode=write_mode, jpeg_quality=jpeg_quality)
    writer = ffcv.DatasetWriter(str(path), {"image": field, "label": ffcv.IntField()}, page_size=page_size)
    writer.num_samples = len(images)
    writer.prepare()
    # Not a view of the shared memory: that could not be closed while the traceback of an error holds the view.
    table = np.zeros(len(images), writer.metadata_type)
    try:
        allocator = ffcv.MemoryAllocator(str(path), writer.data_region_start, writer.page_size)
        with allocator:
            for row, (image, label) in enumerate(zip(images, labels, strict=True)):
                # FFCV's image field knows three channels only; `FFCVLoader` drops the copies again.
                sample = (np.broadcast_to(image, (height, width, 3)), int(label))
                ffcv.handle_sample(sample, row, table.dtype.names, table, allocator, writer.fields)
        writer.metadata_sm.buf[:] = table.tobytes()
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()


def write_prepared(out: Path, stored: Stored, *, write_mode: WriteMode, jpeg_quality: int) -> None:
    """Write train.beton, test.beton and dataset.json into a new folder, whole or not at all. Raises: UserError."""
    described: dict[str, Any] = {
        "format": 1,
        "name": stored.name,
        "classes": list(stored.classes),
        "shape": list(stored.train.shape),
        "channels": stored.train.shape[0],
        "counts": {"train": len(stored.train), "test": len(stored.test)},
        "write_mode": write_mode,
        "source": stored.source,
        "notes": list(stored.notes),
    }
    if write_mode == "jpg":
        described["jpeg_quality"] = jpeg_quality
        described["notes"].append(f"pixels were re-encoded as JPEG, quality {jpeg_quality}")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir()
        for name, split in (("train", stored.train), ("test", stored.test)):
            assert split.images is not None
            images, labels = split.images.numpy(), split.labels.numpy()
            write(unfinished / f"{name}.beton", images, labels, write_mode=write_mode, jpeg_quality=jpeg_quality)
        (unfinished / "dataset.json").write_text(json.dumps(described, indent=1) + "\n")
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def open_prepared(folder: Path, image_size: int | None) -> Stored:
    """Open what `write_prepared` wrote, once checked. image_size: None, or that of its images. Raises: UserError."""
    described = folder / "dataset.json"
    try:
        text = json.loads(described.read_text())
        channels, height, width = (int(side) for side in text["shape"])
        classes = tuple(str(name) for name in text["classes"])
        counts = {part: int(text["counts"][part]) for part in ("train", "test")}
        name, source, notes = str(text["name"]), str(text["source"]), tuple(text.get("notes", ()))
    except FileNotFoundError:
        raise UserError(
            f"{described} does not exist: a .beton file is read together with the dataset.json that "
            "`fastarat data prepare` writes beside it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{described} cannot be read ({error!r}): make it again with `fastarat data prepare`"
        ) from error
    if image_size not in (None, height if height == width else None):
        raise UserError(f"image_size={image_size}: the images in {folder} are {height}x{width}; prepare it again")
    if channels not in (1, 3) or len(classes) < 2:
        raise UserError(
            f"{described} says {channels} channels and {len(classes)} classes: expected 1 or 3, and 2 or more"
        )
    train, test = (
        read_split(folder / f"{part}.beton", count=count, shape=(channels, height, width), num_classes=len(classes))
        for part, count in counts.items()
    )
    return Stored(name, classes, train, test, source, notes)


def read_split(path: Path, *, count: int, shape: tuple[int, int, int], num_classes: int) -> Split:
    """Read the labels of a .beton file after checking that every image lies inside it.

    FFCV checks none of this, and its compiled reader follows a wrong address into memory that is not the file's.

    Raises: UserError naming the file and what does not fit.
    """
    _, height, width = shape

    def corrupt(why: str) -> UserError:
        return UserError(f"{path} is not a usable .beton file: {why}. Make it again with `fastarat data prepare`.")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _rows(file, HEADER, 1)[0]
            if header["version"] != 2 or header["num_fields"] != len(_TYPES):
                raise corrupt("its header is not FFCV's")
            fields = _rows(file, FIELD, len(_TYPES))
            found = {field["name"].tobytes().rstrip(b"\0"): int(field["type_id"]) for field in fields}
            if found != {name.encode(): type_id for name, type_id in _TYPES.items()}:
                raise corrupt(f"its fields are {found}, not an image and a label")
            if header["num_samples"] != count:
                raise corrupt(f"it holds {header['num_samples']} images and dataset.json says {count}")
            table = _rows(file, ROW, count)
            end = int(header["alloc_table_ptr"])
            if (expected := end + count * ALLOCATION.itemsize) != size:
                raise corrupt(f"it is {size} bytes long and its header says {expected}; it may be cut short")
            file.seek(end)
            allocations = _rows(file, ALLOCATION, count)
    except FileNotFoundError:
        raise corrupt("it does not exist") from None
    except (EOFError, OSError) as error:
        raise corrupt(str(error)) from error
    image, labels = table["f0"], table["f1"]
    if (image["height"] != height).any() or (image["width"] != width).any():
        raise corrupt(f"its images are not all {height}x{width} as dataset.json says")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise corrupt(f"its labels lie in {labels.min()}..{labels.max()}, outside the {num_classes} classes")
    raw = image["mode"] == _RAW
    # Allocations lie in the order of writing, rows in the order of images: they are matched by the rank of the
    # address.
    sizes = allocations["size"][np.argsort(allocations["ptr"])][np.argsort(np.argsort(image["data_ptr"]))]
    if (
        not np.array_equal(np.sort(allocations["ptr"]), np.sort(image["data_ptr"]))
        or (image["data_ptr"] > end).any()
        or (sizes > end - image["data_ptr"]).any()
        or (sizes[raw] != height * width * 3).any()
    ):
        raise corrupt("its table points outside the stored images")
    # A copy: the table is a read-only view of the file's bytes, all of which the labels would keep alive.
    return Split(None, torch.from_numpy(labels.copy()), torch.arange(count), shape, path, bool(raw.all()))


def _rows(file: BinaryIO, dtype: np.dtype, count: int) -> np.ndarray:
    data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise EOFError("it is cut short")
    return np.frombuffer(data, dtype)


class Stream:
    """Batches of a .beton file in any given order of rows. raw: whether it holds plain pixels, not JPEG."""

    def __init__(self, path: Path, batch_size: int, *, raw: bool) -> None:
        ffcv = ffcv_parts()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 1 if raw else min(8, cores)  # plain pixels are only copied
        self._epoch = ffcv.Epoch
        self._reader = ffcv.Reader(
            str(path),
            batch_size,
            num_workers=min(workers, ffcv.max_workers),
            os_cache=True,
            drop_last=False,
            pipelines={"image": [ffcv.SimpleRGBImageDecoder(), ffcv.ToTensor()], "label": None},
        )

    def batches(self, rows: Tensor) -> Generator[Tensor, None, None]:
        """Yield uint8 [B, H, W, 3] on the CPU for int64 `rows` [N]; the next batch may overwrite it."""
        if not len(rows):
            return
        epoch = self._epoch(self._reader, rows.numpy())
        try:
            for (pixels,) in epoch:
                yield pixels
            if epoch.error is not None:
                raise RuntimeError(f"FFCV failed while reading {self._reader.fname}") from epoch.error
        finally:
            epoch.close()
            epoch.join(timeout=2)  # it notices within half a second that nobody takes its batches
