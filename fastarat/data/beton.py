"""FFCV's .beton files: write, check and stream them.

FFCV reads, decodes and batches; the order of the images and the augmentation are ours (`fastarat.data`),
because FFCV's own random transforms cannot be seeded. Labels are read straight from the file's table, so the
image decoder is all that is compiled: about 1 s, once per process, after an import of about 4 s.
Everything here that does not move pixels works without FFCV installed.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastarat.errors import UserError

WriteMode = Literal["raw", "jpg"]

INSTALL = (
    "install it with `pip install 'fastarat[ffcv]'` (it is built from source: on Debian and Ubuntu first "
    "`apt-get install libopencv-dev libturbojpeg0-dev pkg-config`)"
)

# The file format, version 2: header, two field descriptors, one table row per image, pages of pixels,
# allocation table.
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_ROW = np.dtype([("", _IMAGE), ("", "<i8")], align=True)
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
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
    Compiler.set_num_threads = classmethod(set_num_threads)
    # Batches are moved to the device by us. FFCV's own streams and events would meddle with graph capture,
    # and its reuse of a pinned buffer waits on the stream, not on the host that refills the buffer.
    epoch_iterator.IS_CUDA = False

    class Epoch(epoch_iterator.EpochIterator):
        """FFCV's background reader, except that an error in it ends the epoch instead of hanging it."""

        error: BaseException | None = None

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:
                self.error = error
                self.output_queue.put(None)

    class Reader(Loader):
        """FFCV's loader; readers of equal image shape share one compiled pipeline."""

        compiled: dict[tuple, tuple] = {}

        def generate_code(self) -> None:
            image = self.reader.metadata["f0"][:1]
            key = (int(image["height"][0]), int(image["width"][0]), self.num_workers > 1)
            if key not in self.compiled:
                super().generate_code()
                self.compiled[key] = (self.graph, self.code)
            self.graph, self.code = self.compiled[key]

    return SimpleNamespace(
        DatasetWriter=DatasetWriter,
        Epoch=Epoch,
        IntField=IntField,
        MemoryAllocator=MemoryAllocator,
        RGBImageField=RGBImageField,
        Reader=Reader,
        SimpleRGBImageDecoder=SimpleRGBImageDecoder,
        ToTensor=ToTensor,
        handle_sample=handle_sample,
        max_workers=numba.config.NUMBA_NUM_THREADS,
    )


def write(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    write_mode: WriteMode = "raw",
    jpeg_quality: int = 90,
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
    # Not a view of the shared memory: that could not be closed while the traceback of an error holds the
    # view.
    table = np.zeros(len(images), writer.metadata_type)
    try:
        allocator = ffcv.MemoryAllocator(str(path), writer.data_region_start, writer.page_size)
        with allocator:
            for row, (image, label) in enumerate(zip(images, labels, strict=True)):
                sample = (np.broadcast_to(image, (height, width, 3)), int(label))
                ffcv.handle_sample(sample, row, table.dtype.names, table, allocator, writer.fields)
        writer.metadata_sm.buf[:] = table.tobytes()
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()


class Table(NamedTuple):
    """What a checked .beton file says about its images."""

    labels: np.ndarray  # int64 [N]
    raw: bool  # every image is stored as plain pixels


def read_table(path: Path, *, count: int, height: int, width: int, num_classes: int) -> Table:
    """Read the labels of a .beton file after checking that every image lies inside it.

    FFCV checks none of this, and its compiled reader follows a wrong address into memory that is not the
    file's.

    Raises: UserError naming the file and what does not fit.
    """

    def corrupt(why: str) -> UserError:
        return UserError(f"{path} is not a usable .beton file: {why}. Make it again with `fastarat data prepare`.")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(_exactly(file, _HEADER.itemsize), _HEADER)[0]
            if header["version"] != 2 or header["num_fields"] != len(_TYPES):
                raise corrupt("its header is not FFCV's")
            fields = np.frombuffer(_exactly(file, len(_TYPES) * _FIELD.itemsize), _FIELD)
            found = {field["name"].tobytes().rstrip(b"\0"): int(field["type_id"]) for field in fields}
            if found != {name.encode(): type_id for name, type_id in _TYPES.items()}:
                raise corrupt(f"its fields are {found}, not an image and a label")
            if header["num_samples"] != count:
                raise corrupt(f"it holds {header['num_samples']} images and dataset.json says {count}")
            table = np.frombuffer(_exactly(file, count * _ROW.itemsize), _ROW)
            end = int(header["alloc_table_ptr"])
            if end + count * _ALLOCATION.itemsize != size:
                expected = end + count * _ALLOCATION.itemsize
                raise corrupt(f"it is {size} bytes long and its header says {expected}; it may be cut short")
            file.seek(end)
            allocations = np.frombuffer(_exactly(file, count * _ALLOCATION.itemsize), _ALLOCATION)
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
    sizes = allocations["size"][np.argsort(allocations["ptr"])][np.argsort(np.argsort(image["data_ptr"]))]
    if (
        not np.array_equal(np.sort(allocations["ptr"]), np.sort(image["data_ptr"]))
        or (image["data_ptr"] > end).any()
        or (sizes > end - image["data_ptr"]).any()
        or (sizes[raw] != height * width * 3).any()
    ):
        raise corrupt("its table points outside the stored images")
    return Table(labels.copy(), bool(raw.all()))


def _exactly(file, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError("it is cut short")
    return data


class Stream:
    """Batches of a .beton file in any given order of rows.

    workers: threads that decode; 0 chooses 1 for plain pixels, which are only copied, and up to 8 for JPEG.
    """

    def __init__(self, path: Path, batch_size: int, *, raw: bool, workers: int = 0) -> None:
        ffcv = ffcv_parts()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = workers or (1 if raw else min(8, cores))
        self._epoch = ffcv.Epoch
        self._reader = ffcv.Reader(
            str(path),
            batch_size,
            num_workers=min(workers, ffcv.max_workers),
            os_cache=True,
            drop_last=False,
            pipelines={"image": [ffcv.SimpleRGBImageDecoder(), ffcv.ToTensor()], "label": None},
        )

    def batches(self, rows: Tensor) -> Iterator[Tensor]:
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
