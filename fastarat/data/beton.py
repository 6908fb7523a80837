"""FFCV's .beton files, and folders of them: write, check and stream.

FFCV reads, decodes and batches; the order of the images and the augmentation are ours (`loaders`), because
FFCV's own random transforms cannot be seeded. Labels are read straight from the file's table, so the image
decoder is all that is compiled: about 1 s, once per process, after an import of about 4 s.
Everything here that does not move pixels works without FFCV installed.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import queue
import shutil
import time
import warnings
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastarat.data.beton_file import LARGEST_SIDE, Stamp, WriteMode, check, describe, page_size, survey, unusable
from fastarat.data.checksums import checksum, verified
from fastarat.data.crops import CropStream
from fastarat.data.splits import Split, Stored
from fastarat.errors import UserError

WHAT = "being-prepared.json"  # in an unfinished folder: what is written there
INSTALL = (
    "install it with `pip install 'fastarat[ffcv]'` (it is built from source: on Debian and Ubuntu first "
    "`apt-get install libopencv-dev libturbojpeg0-dev pkg-config`)"
)


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
            from ffcv.libffcv import imdecode, resize_crop
            from ffcv.loader import epoch_iterator
            from ffcv.loader.loader import Loader
            from ffcv.memory_allocator import MemoryAllocator
            from ffcv.memory_managers import OSCacheManager
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
    _compile_once(OSCacheManager)
    Epoch, Reader = _mended(epoch_iterator.EpochIterator, Loader)
    own = DatasetWriter, Epoch, IntField, MemoryAllocator, RGBImageField, Reader, SimpleRGBImageDecoder, ToTensor
    # Numba fills its config module in when it is imported, which the checker does not see.
    most = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    functions = imdecode, resize_crop, handle_sample
    return SimpleNamespace(**{part.__name__: part for part in (*own, *functions)}, max_workers=most)


def _compile_once(manager: Any) -> None:
    """Let all readers of a process share the one function that every one of them compiled for itself.

    It is the same for every file, which it gets as an argument. Numba never gives compiled code back: every validation
    on a .beton file, which opens a reader, cost 0.1 s and 2 to 3 MB for good.
    """
    compiling, compiled = manager.compile_reader, []

    def compile_reader(self: Any) -> Any:
        if not compiled:
            compiled.append(compiling(self))
        return compiled[0]

    manager.compile_reader = compile_reader


def _mended(iterator: Any, loader: Any) -> tuple[type, type]:
    """Derive from FFCV's background reader and loader classes ones that neither hang, compile twice nor linger."""

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

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            # What refers back to its owner would keep the file mapped and open until the garbage collector comes by.
            # The order of rows is always given here, and the owner outlives its memory's context.
            self.traversal_order = None
            self.memory_manager.context.manager = weakref.proxy(self.memory_manager)

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
    image_field = ffcv.RGBImageField(write_mode=write_mode, jpeg_quality=jpeg_quality)
    fields = {"image": image_field, "label": ffcv.IntField()}
    writer = ffcv.DatasetWriter(str(path), fields, page_size=page_size(height, width))
    writer.num_samples = len(images)
    writer.prepare()
    # Its table in shared memory is for its worker processes. Writing to that where /dev/shm is full ends the process.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    table = np.zeros(len(images), writer.metadata_type)
    allocator = ffcv.MemoryAllocator(str(path), writer.data_region_start, writer.page_size)
    with allocator:
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            # FFCV's image field knows three channels only; `FFCVLoader` drops the copies again.
            sample = (np.broadcast_to(image, (height, width, 3)), int(label))
            ffcv.handle_sample(sample, row, table.dtype.names, table, allocator, writer.fields)
    writer.metadata_sm = SimpleNamespace(buf=table.tobytes())
    writer.finalize(allocator.allocations)
    try:
        checked = check(path, len(images), (height, width))
    except UserError as error:
        # FFCV overlooks that a disk that is almost full takes a part of a page.
        raise OSError(errno.ENOSPC, f"not all of it arrived on the disk ({error})") from error
    if checked.mode != write_mode or not np.array_equal(checked.labels, labels):
        raise OSError(errno.EIO, "what was written does not read back the same")
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def unfinished(out: Path, keep: str | None = None) -> Generator[Path]:
    """Make the folder beside `out` in which it is written; it is gone at the end, however that comes.

    What a killed process left there is removed. keep: what is written, in words: what a killed or interrupted process
    left of the very same stays, for it to be gone on with.

    Raises: UserError where another process writes `out`, or nobody can.
    """
    import fcntl  # not on Windows, where there is no FFCV either

    folder = out.with_name(f".{out.name}.unfinished")
    handle = None
    try:
        try:
            while handle is None:
                folder.mkdir(exist_ok=True)
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                # Of a process that died, the lock is gone.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not folder.exists() or folder.stat().st_ino != os.fstat(handle).st_ino:
                    os.close(handle)  # the one before has finished just now, and taken the folder away
                    handle = None
            _clear(folder, keep)
        except BlockingIOError:
            raise UserError(
                f"another `fastarat data prepare` is writing {out}: wait for it, or choose another folder"
            ) from None
        except OSError as error:
            cannot_write(out, error, None)
        going_on = False
        try:
            yield folder
        except BaseException as error:
            going_on = keep is not None and not isinstance(error, Exception)  # somebody ended it; nothing is wrong
            raise
        finally:
            # Only ours: after the renaming, what is here of this name is another's.
            if not going_on and folder.exists() and folder.stat().st_ino == os.fstat(handle).st_ino:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        if handle is not None:
            os.close(handle)


def _clear(folder: Path, keep: str | None) -> None:
    """Remove what an earlier process left in a folder, unless it was writing what `keep` says."""
    told = folder / WHAT
    if keep is not None and told.exists() and told.read_text(encoding="utf-8") == keep:
        return
    for left in folder.iterdir():
        left.unlink()
    if keep is not None:
        told.write_text(keep, encoding="utf-8")


def cannot_write(out: Path, error: OSError, needed: int | None) -> NoReturn:
    """Raise the UserError for a folder that takes no more. needed: bytes, where they are known."""
    why, mend = error.strerror or str(error), "free space there or choose another --out"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        mend = "choose another --out, or make its folder writable"
    elif needed is not None:
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(out.parent).free / 1e6:,.1f} MB are free"
        why += f" (it needs about {needed / 1e6:,.1f} MB{free})"
    raise UserError(f"cannot write {out}: {why}; nothing is left of it: {mend}") from error


def write_prepared(folder: Path, out: Path, stored: Stored, *, write_mode: WriteMode, jpeg_quality: int) -> None:
    """Write train.beton, test.beton and dataset.json into `folder` (`unfinished`), and rename it. Raises: UserError."""
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
        "sha256": {},
    }
    if write_mode == "jpg":
        described["jpeg_quality"] = jpeg_quality
        described["notes"].append(f"pixels were re-encoded as JPEG, quality {jpeg_quality}")
    _, height, width = stored.train.shape
    if max(height, width) > LARGEST_SIDE:
        raise UserError(
            f"the images of {stored.name} are {height}x{width}: a .beton file takes {LARGEST_SIDE} pixels a side; "
            "write --image-size N"
        )
    needed = None
    if write_mode == "raw":
        page, image = page_size(height, width), height * width * 3
        needed = sum(page * (2 + len(split) // (page // image)) for split in (stored.train, stored.test))
    try:
        if needed is not None and needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, split in (("train", stored.train), ("test", stored.test)):
            assert split.images is not None
            path = folder / f"{name}.beton"
            write(path, split.images.numpy(), split.labels.numpy(), write_mode=write_mode, jpeg_quality=jpeg_quality)
            described["sha256"][name] = checksum(path)
        # ASCII alone, so that a class name of any bytes is written and read back.
        (folder / "dataset.json").write_text(json.dumps(described, indent=1) + "\n", encoding="ascii")
        folder.rename(out)
    except OSError as error:
        cannot_write(out, error, needed)


def open_prepared(folder: Path, image_size: int | None, *, full: bool = False) -> Stored:
    """Open what `write_prepared` wrote, once checked: its checksums too, once per machine.

    image_size: None, or that of its images; of another, squares are cut from them as they are read. full: whether files
    whose checksums were verified are read again.

    Raises: UserError. Warns: where there are no checksums.
    """
    told = describe(folder)
    channels, height, width = told.shape
    crop = told.varying or image_size not in (None, height if height == width else None)
    read = read_crops if crop else partial(read_split, write_mode=told.write_mode)
    shape = told.shape if image_size is None else (channels, image_size, image_size)
    train, test = (
        read(folder / f"{part}.beton", count=count, shape=shape, num_classes=len(told.classes))
        for part, count in told.counts.items()
    )
    if not told.sha256:
        warnings.warn(
            f"{folder} carries no checksums, so damaged pixels would pass unseen: preparing it again adds them",
            stacklevel=4,
        )
    for part, expected in told.sha256.items():
        path = folder / f"{part}.beton"
        try:
            if not verified(path, expected, full=full):
                raise unusable(path, "its content is not what its checksum in dataset.json says: it is damaged")
        except OSError as error:
            raise unusable(path, str(error)) from error
    return Stored(told.name, told.classes, train, test, told.source, told.notes)


def read_split(
    path: Path, *, count: int, shape: tuple[int, int, int], num_classes: int, write_mode: WriteMode | None = None
) -> Split:
    """Read the labels of a .beton file after checking all that FFCV would follow.

    shape: (C, H, W). write_mode: how the pixels must be stored; None for either.

    Raises: UserError naming the file and what does not fit.
    """
    _, height, width = shape
    checked = check(path, count, (height, width))
    labels = _within(path, checked.labels, num_classes)
    if write_mode not in (None, checked.mode):
        raise unusable(path, f"its images are stored as {checked.mode} and dataset.json says {write_mode}")
    return Split(None, torch.from_numpy(labels), torch.arange(count), shape, path, checked.mode == "raw")


def read_crops(path: Path, *, count: int, shape: tuple[int, int, int], num_classes: int) -> Split:
    """Read the labels of a .beton file whose images are cut to `shape` as they are read. Raises: UserError."""
    surveyed = survey(path, count)
    labels = torch.from_numpy(_within(path, surveyed.labels, num_classes))
    return Split(None, labels, torch.arange(count), shape, path, not surveyed.jpeg.any(), crop=True)


def _within(path: Path, labels: np.ndarray, num_classes: int) -> np.ndarray:
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise unusable(path, f"its labels lie in {labels.min()}..{labels.max()}, outside the {num_classes} classes")
    return labels


def workers() -> int:
    """Threads that decode: the cores this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def crops_of(split: Split) -> CropStream:
    """Open what cuts the images of a split out of its file. Raises: UserError."""
    assert split.beton is not None
    return CropStream(split.beton, split.shape[1], ffcv_parts(), workers())


class Stream:
    """Batches of a .beton file in any given order of rows. raw: whether it holds plain pixels, not JPEG."""

    def __init__(self, path: Path, batch_size: int, *, raw: bool) -> None:
        ffcv = ffcv_parts()
        threads = 1 if raw else min(8, workers())  # plain pixels are only copied
        self._epoch = ffcv.Epoch
        self._path = path
        # Again: FFCV reads the file's tables now, and it may be another than the one that was opened.
        self._checked = check(path)
        try:
            self._reader = ffcv.Reader(
                str(path),
                batch_size,
                num_workers=min(threads, ffcv.max_workers),
                os_cache=True,
                drop_last=False,
                pipelines={"image": [ffcv.SimpleRGBImageDecoder(), ffcv.ToTensor()], "label": None},
            )
        finally:
            self._unchanged()

    def _unchanged(self) -> None:
        """Raise UserError when the file is not the one that was checked: FFCV maps it, and would follow it anywhere."""
        try:
            now = Stamp.of(self._path.stat())
        except OSError as error:
            raise unusable(self._path, f"it went away while it was read ({error.strerror})") from error
        if now != self._checked.stamp:
            raise unusable(self._path, "it changed while it was read")

    def batches(self, rows: Tensor) -> Generator[Tensor, None, None]:
        """Yield uint8 [B, H, W, 3] on the CPU for int64 `rows` [N]; the next batch may overwrite it.

        Raises: UserError when the file changes while it is read. IndexError for a row that it does not have.
        """
        if not len(rows):
            return
        if not 0 <= int(rows.min()) <= int(rows.max()) < len(self._checked.labels):
            raise IndexError(f"{self._path} holds rows 0 to {len(self._checked.labels) - 1}")
        self._unchanged()
        epoch = self._epoch(self._reader, rows.numpy())
        try:
            for (pixels,) in epoch:
                self._unchanged()
                yield pixels
            if epoch.error is not None:
                self._unchanged()
                raise RuntimeError(f"FFCV failed while reading {self._reader.fname}") from epoch.error
        finally:
            self._stop(epoch)

    @staticmethod
    def _stop(epoch: Any) -> None:
        """End the background reader: one that waits for room in its queue would never see that nobody reads on."""
        epoch.iter_ixes = iter(())
        epoch.close()
        end = time.monotonic() + 5
        while epoch.is_alive() and time.monotonic() < end:
            with suppress(queue.Empty):
                epoch.output_queue.get_nowait()
            epoch.join(timeout=0.01)
