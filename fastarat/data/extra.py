"""Extra, generated training images beside a data set's own: an .npz file of them, and batches of a fixed share of both.

The format is that of the sets of Gowal et al. (NeurIPS 2021, arXiv 2110.09468) and Wang et al. (ICML 2023, arXiv
2302.04638): `image` uint8 [N, H, W, C] and `label` int64 [N].
"""

from __future__ import annotations

import os
import struct
import tempfile
import zipfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastarat.data.loaders import Loader, make_loader
from fastarat.data.splits import Split, derive_seed
from fastarat.data.streams import to_device
from fastarat.distributed import World
from fastarat.errors import UserError

_EXPECTED = "expected `image` uint8 [N, H, W, C] and `label` int64 [N], as numpy.savez(FILE, image=..., label=...)"
_FIXED = 30  # bytes of a zip member's own header, before its name


def open_extra(file: str | os.PathLike, shape: tuple[int, int, int], num_classes: int, data_dir: Path) -> Split:
    """Open an .npz file of extra training images; pixels are mapped, and read when their batch comes.

    shape: (C, H, W) that is expected. data_dir: a compressed file, which cannot be mapped, is unpacked there once.
    Raises: UserError for another format, pixels or labels that do not fit, or Python objects in it: none are loaded.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"extra data {path} is no file: {_EXPECTED}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if not {"image", "label"} <= names:
                raise UserError(f"extra data {path} holds {', '.join(sorted(names)) or 'nothing'}: {_EXPECTED}")
            labels = _labels(archive, path, num_classes)
            images = _images(archive, path, data_dir)
    except UserError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, struct.error, NotImplementedError) as error:
        raise UserError(
            f"extra data {path} cannot be read ({error}): it is no .npz, or damaged; {_EXPECTED}"
        ) from error
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(f"extra data {path}: image is {images.dtype} {list(images.shape)}: expected uint8 [N, H, W, C]")
    count, height, width, channels = images.shape
    if (channels, height, width) != shape:
        raise UserError(
            f"extra data {path} is of images {[channels, height, width]}, the data set of {list(shape)}: expected one "
            "shape"
        )
    if count != len(labels) or not count:
        raise UserError(f"extra data {path}: {count} images but {len(labels)} labels: expected one each, and some")
    return Split.of(images, labels)


def _labels(archive: zipfile.ZipFile, path: Path, num_classes: int) -> np.ndarray:
    with archive.open("label.npy") as member:
        shape, dtype, _ = _header(member, "label", path)
        if len(shape) != 1 or dtype.kind not in "iu":
            raise UserError(f"extra data {path}: label is {dtype} {list(shape)}: expected int64 [N]")
        labels = np.frombuffer(member.read(), dtype)
    if len(labels) != shape[0]:
        raise ValueError("label is cut short")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f"extra data {path}: labels span {labels.min()} to {labels.max()}, the data set has {num_classes} classes: "
            f"expected 0 to {num_classes - 1}"
        )
    return labels.astype(np.int64)


def _header(member: IO[bytes], name: str, path: Path) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Read an array's header: shape, type, and whether it lies column by column."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if dtype.hasobject:
        raise UserError(f"extra data {path}: {name} holds Python objects, whose loading runs code: {_EXPECTED}")
    return shape, dtype, fortran


def _images(archive: zipfile.ZipFile, path: Path, data_dir: Path) -> np.ndarray:
    """Map the pixels: in the file itself, or where a compressed one was unpacked to."""
    info = archive.getinfo("image.npy")
    with archive.open(info) as member:
        shape, dtype, fortran = _header(member, "image", path)
        start = member.tell()
    if info.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(info.header_offset)
            name, extra = struct.unpack("<HH", file.read(_FIXED)[26:])
        start += info.header_offset + _FIXED + name + extra
        if start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize > path.stat().st_size:
            raise ValueError("image is cut short")
        return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
    stat = path.stat()
    kept = data_dir / "extra" / f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns}.npy"
    if not kept.is_file():
        _unpack(archive, info, kept)
    return np.load(kept, mmap_mode="r", allow_pickle=False)


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kept: Path) -> None:
    """Write a member as a file, whole or not at all."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as folder:
            os.replace(archive.extract(info, folder), kept)
    except OSError as error:
        raise UserError(
            f"cannot unpack the extra images to {kept} ({error}): make room, or name another --data-dir"
        ) from error


@dataclass(eq=False, repr=False)
class MixedLoader(Loader):
    """Batches of which a fixed number are extra images, in a place drawn anew for each.

    An epoch has the steps that the data set alone would give, as in the code of Wang et al. The data set's images and
    the extra ones each come in a seeded order that goes on from epoch to epoch: all are seen once before any is seen
    again. (Theirs begins a new order of the former in every epoch, and draws the latter with replacement.) Positions
    from len(split) on are of the extra images.

    base: reads the data set's own images, as many as are in a batch. count: of extra images in a batch.
    """

    kind = "mixed"
    base: Loader | None = None
    extra: Split | None = None
    count: int = 0

    def __post_init__(self) -> None:
        assert self.extra is not None
        self._labels = torch.cat([self.split.labels, self.extra.labels]).to(self.device)

    def order(self, epoch: int) -> Tensor:
        """Return the positions that epoch number `epoch` visits: int64 [steps * batch_size], on the CPU."""
        assert self.extra is not None
        steps, own = len(self), self.batch_size - self.count
        mine = passes(len(self.split), epoch * steps * own, steps * own, derive_seed(self.seed, "own"))
        theirs = passes(
            len(self.extra), epoch * steps * self.count, steps * self.count, derive_seed(self.seed, "extra")
        )
        rows = torch.cat([mine.view(steps, own), len(self.split) + theirs.view(steps, self.count)], 1)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "mixed", epoch))
        # Without it the first images of every batch would be of one kind, and so the shard of a process.
        places = torch.rand(rows.shape, generator=generator).argsort(1)
        return rows.gather(1, places).flatten()

    def total(self, index: int) -> int:
        """Images in batch number `index` of an epoch: all are whole."""
        return self.batch_size

    def _pixels(self, order: Tensor, indices: Sequence[Tensor], epoch: int) -> Generator[Tensor, None, None]:
        assert self.base is not None
        assert self.extra is not None
        assert self.extra.images is not None
        batches = order.split([len(index) for index in indices])
        own = order[order < len(self.split)]
        parts = own.to(self.device).split(self.base.batch_size) if len(own) else ()
        mine = self.base._pixels(own, parts, epoch)
        try:
            shares = dealt(mine, [int((rows < len(self.split)).sum()) for rows in batches])
            for rows, images in zip(batches, shares, strict=True):
                places = rows >= len(self.split)
                added = to_device(self.extra.images[rows[places] - len(self.split)], self.device)
                if images is None:
                    yield added
                    continue
                if images.dtype != added.dtype:  # the data set's are floating point
                    added = added.to(images.dtype) / 255
                batch = torch.empty((len(rows), *images.shape[1:]), dtype=images.dtype, device=self.device)
                batch[(~places).nonzero().flatten().to(self.device)] = images
                batch[places.nonzero().flatten().to(self.device)] = added
                yield batch
        finally:
            mine.close()


def dealt(chunks: Iterator[Tensor], counts: Sequence[int]) -> Iterator[Tensor | None]:
    """Yield as many rows as each of `counts` says, None for 0, of rows that come in chunks of another size.

    A process's rows of a batch hold more extra images than the next one's do.
    """
    left: Tensor | None = None
    for count in counts:
        while count and (left is None or len(left) < count):
            chunk = next(chunks)
            left = chunk if left is None or not len(left) else torch.cat([left, chunk])
        yield None if left is None or not count else left[:count]
        left = None if left is None else left[count:]


def passes(size: int, start: int, count: int, seed: int) -> Tensor:
    """Return `count` positions of an endless seeded order, from `start` on: pass after pass over `size` positions."""
    first, last = start // size, (start + count - 1) // size
    orders = []
    for number in range(first, last + 1):
        generator = torch.Generator().manual_seed(derive_seed(seed, "pass", number))
        orders.append(torch.randperm(size, generator=generator))
    return torch.cat(orders)[start - first * size :][:count]


def mixed_loader(
    split: Split, extra: Split, ratio: float, *, world: World | None = None, accumulate: int = 1, **options: Any
) -> MixedLoader:
    """Make the loader of a split and extra images. ratio: their share of a batch. The rest is `make_loader`'s.

    Raises: UserError for a share that leaves one of the two out, and for a DataLoader, whose batches are its own.
    """
    size = options["batch_size"]
    count = int(size * ratio + 1e-9)  # as released; 0.7 of 10 is 7
    if not 0 < count < size:
        raise UserError(f"extra_ratio={ratio:g} of {size} images is {count}: expected at least 1 of either kind")
    if options.get("order", "random") != "random":
        raise UserError(f"order={options['order']}: extra images come in random order beside others; leave --order out")
    if split.crop:
        raise UserError("extra data beside images that are cut as they are read: prepare those with --image-size first")
    if split.source is not None and split.source.in_order:
        raise UserError("extra data beside a DataLoader, whose batches are its own: mix them there, or give a Dataset")
    base = make_loader(split, **{**options, "batch_size": size - count, "randaugment": None, "cutmix": None})
    recipe = options.get("augment")
    return MixedLoader(
        split, size, base.device, True, base.seed, recipe, False,
        f"{base.kind} ({base.reason}), and {count} of {size} images of a batch extra ones, of {len(extra):,}",
        base=base, extra=extra, count=count, randaugment=options.get("randaugment"), cutmix=options.get("cutmix"),
        world=world or World(), accumulate=accumulate,
    )  # fmt: skip
