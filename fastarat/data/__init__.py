"""Data sets, the validation split, both loaders and the augmentation they share.

A data set is uint8 pixels and int64 labels, wherever it comes from. Two loaders give the same batches:
`resident` keeps the pixels on the device, `ffcv` streams a .beton file of any size. The order of an epoch and
its augmentation come from our own generators, so both depend on (seed, epoch) and on nothing else.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sys
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastarat.data import beton
from fastarat.errors import UserError, unknown

NAMES = ("digits", "cifar10", "cifar100")
LOADERS = ("auto", "resident", "ffcv")
WRITE_MODES = ("raw", "jpg")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")

_SPLIT_SEED = 0  # of the test images held out of sets that come without any
_DIGITS_TEST = 360
_LARGEST_SIDE = 4096
_FOLDER_TEST_FRACTION = 0.2
_RESIDENT_FRACTION = 0.25  # of the free device memory, or of the host's memory


class Batch(NamedTuple):
    """One batch on the device.

    images: float32 [B, C, H, W] in [0, 1], channels-last. labels: int64 [B].
    index: int64 [B], position of each image in its split.
    """

    images: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Some of a data set's images, not augmented.

    images: uint8 [N, H, W, C], or None when they stream from `beton`. labels: int64 [N], on the CPU.
    indices: int64 [N], row of each image in the stored training or test set.
    shape: (C, H, W). beton: the .beton file, or None. raw: whether that file holds plain pixels, not JPEG.
    """

    images: Tensor | None
    labels: Tensor
    indices: Tensor
    shape: tuple[int, int, int]
    beton: Path | None = None
    raw: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_bytes(self) -> int:
        """Size of the decoded images."""
        channels, height, width = self.shape
        return len(self) * channels * height * width


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set. `train` and `val` are cut from the training images; `test` chooses nothing.

    shape: (C, H, W). notes: what a reader of its results must know, such as a test set that we held out
    ourselves.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding (pixels on each side), then a fair coin's horizontal flip."""

    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.padding, int) or self.padding < 0:
            raise UserError(f"padding={self.padding!r} is not a number of pixels: write 0 or more")


def derive_seed(seed: int, *parts: int | str) -> int:
    """Mix a seed and what it is for into a new seed of 63 bits.

    The parts are hashed (BLAKE2b) with their types and lengths, so neighbouring seeds and epochs give
    unrelated streams, ("a", "bc") and ("ab", "c") differ, and the value is the same on every machine and
    Python.
    """
    text = json.dumps([int(seed), *(part if isinstance(part, str) else int(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class _Part(NamedTuple):
    """The stored training or test images: uint8 [N, H, W, C] (perhaps a mapped file) or a .beton file."""

    images: np.ndarray | None
    labels: np.ndarray
    beton: Path | None = None
    raw: bool = True


class _Stored(NamedTuple):
    """A data set as it is stored, before the validation split."""

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: _Part
    test: _Part
    source: str
    notes: tuple[str, ...] = ()


def load_dataset(
    name_or_path: str | os.PathLike,
    *,
    data_dir: str | os.PathLike = "data",
    val_images: int | None = None,
    val_seed: int = 0,
    download: bool = True,
    image_size: int | None = None,
) -> Dataset:
    """Load a data set by name or path, and cut a validation split from its training images.

    name_or_path: digits, cifar10, cifar100; a folder PATH/train/CLASS/*.png with PATH/test or PATH/val beside
    it, or PATH/CLASS/*.png; a tar archive of such a folder; a folder made by `prepare`, or a .beton file in it.
    data_dir: downloads, unpacked archives and decoded folders are kept here.
    val_images: size of the validation split, stratified by class and fixed by `val_seed`; None is 1,000 of
    10,000 training images or more, else a tenth. 0 leaves it empty.
    image_size: folders only: resize the shorter side to this many pixels and cut out the centre square.

    Except from .beton files the training images are held in memory.

    Raises: UserError.
    """
    stored = _open(name_or_path, Path(data_dir), download, image_size)
    count = len(stored.train.labels)
    if val_images is None:
        val_images = 1000 if count >= 10_000 else count // 10
    if not 0 <= val_images < count:
        raise UserError(
            f"val_images={val_images} does not fit: {stored.name} has {count} training images to cut from: "
            f"write 0 to {count - 1}"
        )
    held_out = stratified_indices(stored.train.labels, val_images, val_seed)
    kept = np.setdiff1d(np.arange(count), held_out)
    return Dataset(
        name=stored.name,
        classes=stored.classes,
        shape=stored.shape,
        train=_split(stored.train, kept, stored.shape),
        val=_split(stored.train, held_out, stored.shape),
        test=_split(stored.test, np.arange(len(stored.test.labels)), stored.shape),
        notes=stored.notes,
    )


def stratified_indices(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` positions with every class in proportion, by largest remainders; sorted.

    labels: int64 [N]. NumPy's RandomState is used because its stream is frozen for good: a split never moves.
    """
    order = np.random.RandomState(derive_seed(seed, "split") % 2**32).permutation(len(labels))
    sizes = np.bincount(labels)
    share = sizes * count / max(len(labels), 1)
    take = np.floor(share).astype(np.int64)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    chosen = [order[labels[order] == label][:number] for label, number in enumerate(take)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def info(
    name_or_path: str | os.PathLike,
    *,
    data_dir: str | os.PathLike = "data",
    download: bool = True,
    image_size: int | None = None,
) -> dict[str, object]:
    """Describe a data set in a few plain values, for a person or for JSON.

    Raises: UserError.
    """
    stored = _open(name_or_path, Path(data_dir), download, image_size)
    channels, height, width = stored.shape
    images = len(stored.train.labels) + len(stored.test.labels)
    per_class = np.bincount(stored.train.labels, minlength=len(stored.classes))
    return {
        "name": stored.name,
        "source": stored.source,
        "classes": list(stored.classes),
        "shape": list(stored.shape),
        "train_images": len(stored.train.labels),
        "test_images": len(stored.test.labels),
        "train_images_per_class": [int(per_class.min()), int(per_class.max())],
        "decoded_bytes": images * channels * height * width,
        "notes": list(stored.notes),
    }


def prepare(
    name_or_path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    data_dir: str | os.PathLike = "data",
    write_mode: beton.WriteMode = "raw",
    jpeg_quality: int = 90,
    download: bool = True,
    image_size: int | None = None,
) -> Path:
    """Write a data set as a folder of train.beton, test.beton and dataset.json, whole or not at all.

    write_mode: "raw" keeps every pixel value; "jpg" is smaller and lossy (`jpeg_quality` 1 to 100).
    The validation split is not stored: `load_dataset` cuts it by row, the same way as for every other source.

    Returns: `out`. Raises: UserError, also when `out` exists already.
    """
    if write_mode not in WRITE_MODES:
        raise unknown("write mode", write_mode, WRITE_MODES)
    if not 1 <= jpeg_quality <= 100:
        raise UserError(f"jpeg_quality={jpeg_quality} is outside 1..100")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: delete it or choose another folder")
    _make_folder(out.parent)
    beton.ffcv_parts()  # a missing FFCV should be known before the images are decoded
    stored = _open(name_or_path, Path(data_dir), download, image_size)
    if stored.train.beton is not None:
        raise UserError(f"{name_or_path} is in .beton format already")
    described = {
        "format": 1,
        "name": stored.name,
        "classes": list(stored.classes),
        "shape": list(stored.shape),
        "channels": stored.shape[0],
        "counts": {"train": len(stored.train.labels), "test": len(stored.test.labels)},
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
        for name, part in (("train", stored.train), ("test", stored.test)):
            file = unfinished / f"{name}.beton"
            beton.write(file, part.images, part.labels, write_mode=write_mode, jpeg_quality=jpeg_quality)
        (unfinished / "dataset.json").write_text(json.dumps(described, indent=1) + "\n")
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _open(name_or_path: str | os.PathLike, data_dir: Path, download: bool, image_size: int | None) -> _Stored:
    name, path = str(name_or_path), Path(name_or_path)
    if image_size is not None and not 1 <= image_size <= _LARGEST_SIDE:
        raise UserError(
            f"image_size={image_size} is not a side of images to train on: write 1 to {_LARGEST_SIDE} pixels"
        )
    if name in NAMES:
        if image_size is not None:
            raise UserError(f"image_size={image_size} is for image folders; the images of {name} have one size")
        return _digits() if name == "digits" else _cifar(name, data_dir, download)
    if not path.exists():
        if path.parent == Path() and not path.suffix:
            raise unknown("dataset", name, NAMES)
        raise UserError(
            f"data set {name} does not exist: give a folder, a tar archive, a .beton file or one of {NAMES}"
        )
    if path.suffix == ".beton" or (path / "dataset.json").exists():
        folder = path.parent if path.suffix == ".beton" else path
        return _prepared(folder, image_size)
    if path.is_dir():
        return _image_folder(path, path.resolve().name, data_dir, image_size)
    if path.name.endswith(TAR_SUFFIXES):
        return _image_folder(_unpacked(path, data_dir), path.name.split(".")[0], data_dir, image_size)
    raise UserError(
        f"{name} is not a data set: give a folder, a tar archive ({', '.join(TAR_SUFFIXES)}) or a .beton file"
    )


def _split(part: _Part, rows: np.ndarray, shape: tuple[int, int, int]) -> Split:
    return Split(
        images=None if part.images is None else torch.from_numpy(np.asarray(part.images[rows])),
        labels=torch.from_numpy(part.labels[rows]),
        indices=torch.from_numpy(rows.astype(np.int64)),
        shape=shape,
        beton=part.beton,
        raw=part.raw,
    )


def _hold_out(images: np.ndarray, labels: np.ndarray, count: int) -> tuple[_Part, _Part]:
    test = stratified_indices(labels, count, _SPLIT_SEED)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return _Part(images[train], labels[train]), _Part(images[test], labels[test])


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {path}: permission denied; choose another folder")
    return path


def _digits() -> _Stored:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # its pixels count 0..16
    train, test = _hold_out(images, digits.target.astype(np.int64), _DIGITS_TEST)
    classes = tuple(str(name) for name in digits.target_names)
    return _Stored("digits", classes, (1, 8, 8), train, test, "scikit-learn's load_digits")


@dataclass(frozen=True)
class Archive:
    """A CIFAR archive in its authors' binary format: records of label bytes, then 3,072 bytes of planar RGB.

    label_bytes: labels before the pixels; the last of them, the fine one, is used.
    """

    url: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    class_names: str
    label_bytes: int
    train_images: int = 50_000
    test_images: int = 10_000

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


ARCHIVES = {
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test=("test_batch.bin",),
        class_names="batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        train=("train.bin",),
        test=("test.bin",),
        class_names="fine_label_names.txt",
        label_bytes=2,
    ),
}


def _cifar(name: str, data_dir: Path, download: bool) -> _Stored:
    archive = ARCHIVES[name]
    path = _fetched(archive, data_dir, download)
    wanted = {*archive.train, *archive.test, archive.class_names}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                file_name = PurePosixPath(member.name).name
                if file_name in wanted and member.isfile():
                    files[file_name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): delete it to download it again") from error
    if missing := wanted - files.keys():
        raise UserError(f"{path} does not hold {sorted(missing)[0]}: it is not the {name} binary archive")
    classes = tuple(files[archive.class_names].decode().split())

    def part(file_names: tuple[str, ...], count: int) -> _Part:
        record = archive.label_bytes + 3 * 32 * 32
        data = b"".join(files[file_name] for file_name in file_names)
        if len(data) != count * record:
            raise UserError(
                f"{path}: {', '.join(file_names)} hold {len(data)} bytes, not {count} records of {record}; "
                "delete the archive to download it again"
            )
        records = np.frombuffer(data, np.uint8).reshape(count, record)
        labels = records[:, archive.label_bytes - 1].astype(np.int64)
        if labels.max() >= len(classes):
            raise UserError(f"{path} has label {labels.max()} but names only {len(classes)} classes: it is damaged")
        images = records[:, archive.label_bytes :].reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)
        return _Part(np.ascontiguousarray(images), labels)

    train, test = part(archive.train, archive.train_images), part(archive.test, archive.test_images)
    return _Stored(name, classes, (3, 32, 32), train, test, archive.url)


def _fetched(archive: Archive, data_dir: Path, download: bool) -> Path:
    path = data_dir / archive.file_name
    by_hand = f"download {archive.url} by other means and place it at {path}"
    if not path.exists():
        if not download:
            raise UserError(f"{path} does not exist and downloading is off: {by_hand}")
        import pooch

        _make_folder(data_dir)
        try:
            pooch.retrieve(
                archive.url,
                f"md5:{archive.md5}",
                fname=path.name,
                path=data_dir,
                progressbar=sys.stderr.isatty(),
            )
        except (
            OSError,
            ValueError,
        ) as error:  # what requests and pooch raise; a wrong checksum is a ValueError
            raise UserError(f"cannot download {archive.url} ({type(error).__name__}): {by_hand}") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != archive.md5:
        raise UserError(f"{path} has md5 {found}, expected {archive.md5}: delete it to download it again")
    return path


def _prepared(folder: Path, image_size: int | None) -> _Stored:
    described = folder / "dataset.json"
    try:
        text = json.loads(described.read_text())
        channels, height, width = shape = tuple(int(side) for side in text["shape"])
        classes = tuple(str(name) for name in text["classes"])
        counts = {name: int(text["counts"][name]) for name in ("train", "test")}
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
    parts = {}
    for part, count in counts.items():
        file = folder / f"{part}.beton"
        table = beton.read_table(file, count=count, height=height, width=width, num_classes=len(classes))
        parts[part] = _Part(None, table.labels, file, table.raw)
    return _Stored(name, classes, shape, parts["train"], parts["test"], source, notes)


def _unpacked(path: Path, data_dir: Path) -> Path:
    """Unpack an archive into data_dir once and return the image folder in it."""
    stat = path.stat()
    key = derive_seed(0, str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    folder = data_dir / "unpacked" / f"{path.name.split('.')[0]}-{key:016x}"
    if not folder.exists():
        _make_folder(folder.parent)
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            with tarfile.open(path) as tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extractall(unfinished, filter="data")
                else:  # Python before 3.11.4, Debian 12's among them
                    tar.extractall(unfinished, members=_harmless(tar, unfinished))
            unfinished.rename(folder)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UserError(f"cannot unpack {path} ({error}): it is damaged, or {folder.parent} is full") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    inside = _subfolders(folder)
    return inside[0] if len(inside) == 1 else folder  # an archive of one folder, which is the usual way to pack


def _harmless(tar: tarfile.TarFile, folder: Path) -> Iterator[tarfile.TarInfo]:
    """Members of `tar`, all of them files and folders inside `folder`. Raises: TarError for any other."""
    for member in tar:
        if not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is neither a file nor a folder")
        if not (folder / member.name).resolve().is_relative_to(folder.resolve()):
            raise tarfile.TarError(f"{member.name} would lie outside")
        member.mode = 0o755 if member.isdir() else 0o644
        yield member


def _subfolders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """List the images of each class folder, at any depth in it."""
    found: dict[str, list[Path]] = {}
    for class_folder in _subfolders(folder):
        files = [
            Path(parent, name)
            for parent, _, names in os.walk(class_folder)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
        if not files:
            raise UserError(
                f"class folder {class_folder} holds no images ({' '.join(IMAGE_SUFFIXES)}): fill or delete it"
            )
        found[class_folder.name] = sorted(files)
    if len(found) < 2:
        raise UserError(f"{folder} holds {len(found)} class folders; expected two or more: {folder}/CLASS/image.png")
    return found


def _image_folder(root: Path, name: str, data_dir: Path, image_size: int | None) -> _Stored:
    notes: tuple[str, ...] = ()
    named = [folder for folder in ("test", "val") if (root / folder).is_dir()]
    if (root / "train").is_dir():
        train = _class_files(root / "train")
        test = _class_files(root / named[0]) if named else {}
        if len(named) == 2:
            notes = (f"{root / 'val'} is not used: validation images are cut from the training images",)
    else:
        train, test = _class_files(root), {}
    classes = tuple(train)
    if test and set(test) != set(classes):
        odd = sorted(set(test) ^ set(classes))[0]
        where = ("train", named[0]) if odd in train else (named[0], "train")
        raise UserError(f"class {odd!r} has a folder in {root / where[0]} but none in {root / where[1]}")

    files, labels = [], []
    for listing in (train, test):
        for label, class_name in enumerate(classes):
            files += listing.get(class_name, [])
            labels += [label] * len(listing.get(class_name, []))
    images, all_labels = _decoded(root, files, data_dir, image_size), np.array(labels, np.int64)
    shape = (images.shape[3], *images.shape[1:3])
    if test:
        count = sum(len(listed) for listed in train.values())
        parts = _Part(images[:count], all_labels[:count]), _Part(images[count:], all_labels[count:])
    else:
        count = round(len(files) * _FOLDER_TEST_FRACTION)
        if min(len(listed) for listed in train.values()) < 2:
            raise UserError(f"{root} has a class of one image: none is left to train on once a test set is held out")
        parts = _hold_out(images, all_labels, count)
        notes = (f"it has no test images of its own: {count} of {len(files)} images are held out for testing",)
        warnings.warn(f"{root}: {notes[0]}", stacklevel=4)
        name = f"{name} (own test split)"
    return _Stored(name, classes, shape, *parts, str(root), notes)


def _decoded(root: Path, files: Sequence[Path], data_dir: Path, image_size: int | None) -> np.ndarray:
    """Decode images into uint8 [N, H, W, C], kept in data_dir until a file's name, size or time changes."""
    listing = hashlib.blake2b(digest_size=8)
    for file in files:
        stat = file.stat()
        listing.update(f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    place = f"{root.resolve().name}-{derive_seed(1, str(root.resolve()), image_size or 0):016x}"
    cache = data_dir / "decoded"
    kept = cache / f"{place}-{listing.hexdigest()}.npy"
    if kept.exists():
        try:
            return np.load(kept, mmap_mode="r")
        except (ValueError, OSError, EOFError):
            pass  # cut short by something outside: it is decoded again below
    _make_folder(cache)
    first, grey = _decode(files[0], image_size, None)
    height, width = first.shape[:2]
    needed = len(files) * height * width * 3
    if shutil.disk_usage(cache).free < needed:  # a full disk under a mapped file would kill the process
        raise UserError(
            f"{cache} needs {needed / 1e9:.1f} GB for the decoded images and has less: set another data_dir"
        )
    unfinished = cache / f".{kept.name}.{os.getpid()}.tmp"
    try:
        for channels in (1, 3) if grey else (3,):
            images = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (len(files), height, width, channels))
            if _decode_into(images, files, image_size):
                break
        images.flush()
        for stale in cache.glob(f"{glob.escape(place)}-*.npy"):
            stale.unlink(missing_ok=True)
        unfinished.rename(kept)
    finally:
        unfinished.unlink(missing_ok=True)
    return np.load(kept, mmap_mode="r")


def _decode_into(images: np.ndarray, files: Sequence[Path], image_size: int | None) -> bool:
    """Fill `images`; False when a colour image turns up in an array of one channel."""
    _, height, width, channels = images.shape

    def some(start: int) -> bool:
        for row in range(start, min(start + 128, len(files))):
            pixels, grey = _decode(files[row], image_size, channels)
            if channels == 1 and not grey:
                return False
            if pixels.shape[:2] != (height, width):
                raise UserError(
                    f"images differ in size: {files[row]} is {pixels.shape[1]}x{pixels.shape[0]} and "
                    f"{files[0]} is {width}x{height}; set image_size to resize and crop them all"
                )
            images[row] = pixels
        return True

    # Decoding small images is mostly Python: measured at 32x32, two threads are slower than one.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1) if height * width >= 128 * 128 else 1)
    try:
        return all(pool.map(some, range(0, len(files), 128)))
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(path: Path, image_size: int | None, channels: int | None) -> tuple[np.ndarray, bool]:
    """Read one image as uint8 [H, W, C], and whether it is stored grey; channels None keeps its own."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {image.mode}, more than 8 bits")
            grey = image.mode in ("1", "L")
            image = image.convert("L" if grey and channels != 3 else "RGB")
    except Exception as error:  # Pillow raises many kinds, depending on the format
        raise UserError(f"cannot read image {path}: {error}") from error
    if image_size is not None:
        width, height = image.size
        scale = image_size / min(width, height)
        if scale != 1:
            size = max(image_size, round(width * scale)), max(image_size, round(height * scale))
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    pixels = np.asarray(image)
    return (pixels[..., None] if pixels.ndim == 2 else pixels), grey


def default_augment(dataset: Dataset) -> Augment:
    """Choose the usual augmentation for a data set's shape.

    Sides of 16 and more are padded by 4 (CIFAR's custom), smaller ones by 1 (digits); colour images are
    flipped, grey ones, which are mostly characters, are not.
    """
    channels, height, width = dataset.shape
    return Augment(padding=4 if min(height, width) >= 16 else 1, flip=channels == 3)


def augment(images: Tensor, recipe: Augment | None, generator: torch.Generator | None = None) -> Tensor:
    """Convert pixels to float32 in [0, 1] and apply a seeded random crop and flip to each image.

    images: uint8 or float32 [B, C, H, W], pixels 0..255 or [0, 1]; channels-last is fastest. recipe: None
    converts only.
    generator: of the images' device. Shapes are fixed and nothing is read back, so a CUDA graph can hold it.

    Returns: float32 [B, C, H, W], channels-last; never a view of `images`.
    """
    batch, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1)
    if recipe is not None and (recipe.padding or recipe.flip):
        device, padding = images.device, recipe.padding
        draw = {"generator": generator, "device": device}
        rows = torch.arange(height, device=device).expand(batch, height)
        columns = torch.arange(width, device=device).expand(batch, width)
        if recipe.flip:
            flipped = torch.randint(2, (batch, 1), dtype=torch.bool, **draw)
            columns = torch.where(flipped, width - 1 - columns, columns)
        if padding:
            offsets = torch.randint(2 * padding + 1, (2, batch, 1), **draw)
            rows, columns = rows + offsets[0], columns + offsets[1]
            pixels = F.pad(pixels, (0, 0, padding, padding, padding, padding))
        high, wide = height + 2 * padding, width + 2 * padding
        rows = rows + high * torch.arange(batch, device=device)[:, None]
        # Whole pixels are copied by one flat index: on a CPU four times faster than indexing with three
        # tensors.
        flat = (rows[:, :, None] * wide + columns[:, None, :]).reshape(-1)
        pixels = pixels.reshape(-1, channels).index_select(0, flat).view(batch, height, width, channels)
    scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if images.dtype == torch.uint8:
        scaled.div_(255)
    return scaled.permute(0, 3, 1, 2)


class Loader:
    """Batches of a split; `epoch(n)` depends on (seed, n) and on nothing else.

    kind: "resident" or "ffcv". reason: why, for people. len() is the number of batches.
    """

    kind: str

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        device: torch.device,
        shuffle: bool,
        seed: int,
        recipe: Augment | None,
        drop_last: bool,
        reason: str,
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.device = device
        self.shuffle = shuffle
        self.seed = seed
        self.recipe = recipe
        self.drop_last = drop_last
        self.reason = reason
        self._labels = split.labels.to(device)

    def __len__(self) -> int:
        count = len(self.split)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """Return the positions that epoch number `epoch` visits: int64 [N], on the CPU."""
        count = len(self.split)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            order = torch.randperm(count, generator=generator)
        else:
            order = torch.arange(count)
        return order[: len(self) * self.batch_size]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch number `epoch`, the last one short unless drop_last is set."""
        order = self.order(epoch)
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "augment", epoch))
        indices = order.to(self.device).split(self.batch_size) if len(order) else ()
        pixels = self._pixels(order, indices)
        try:
            for index, images in zip(indices, pixels, strict=True):
                images = augment(images.permute(0, 3, 1, 2), self.recipe, generator)
                yield Batch(images, self._labels[index], index)
        finally:
            pixels.close()

    def _pixels(self, order: Tensor, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield uint8 [B, H, W, C] on the device for each of `indices`: `order` in batches, on the device."""
        raise NotImplementedError


class ResidentLoader(Loader):
    """Keeps the whole split on the device as uint8 and gathers batches by index."""

    kind = "resident"

    def __init__(self, split: Split, **options) -> None:
        super().__init__(split, **options)
        images = split.images if split.images is not None else _read_whole(split)
        self._images = images.to(self.device)

    def _pixels(self, order: Tensor, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        for index in indices:
            yield self._images[index]


class FFCVLoader(Loader):
    """Streams a .beton file: FFCV reads, decodes and batches in the background, in the order given to it."""

    kind = "ffcv"

    def __init__(self, split: Split, **options) -> None:
        super().__init__(split, **options)
        self._stream = beton.Stream(split.beton, self.batch_size, raw=split.raw)

    def _pixels(self, order: Tensor, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        channels = self.split.shape[0]
        for pixels in self._stream.batches(self.split.indices[order]):
            pixels = pixels[..., :channels]  # one channel is stored three times
            if self.device.type == "cuda":
                # FFCV refills its buffers without waiting for the device; memory pinned by PyTorch is waited
                # for.
                pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
                pixels = pinned.copy_(pixels).to(self.device, non_blocking=True)
            yield pixels


def make_loader(
    split: Split,
    *,
    batch_size: int,
    device: torch.device | str,
    kind: Literal["auto", "resident", "ffcv"] = "auto",
    shuffle: bool = False,
    seed: int = 0,
    augment: Augment | None = None,
    drop_last: bool = False,
) -> Loader:
    """Make the loader of a split.

    kind: "resident" keeps the pixels on the device, "ffcv" streams a .beton file; "auto" is resident when the
    pixels take at most a quarter of the free device memory (on a CPU: of the host's memory), else ffcv.
    Loader.reason says which.

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
    return {"resident": ResidentLoader, "ffcv": FFCVLoader}[kind](
        split,
        batch_size=batch_size,
        device=device,
        shuffle=shuffle,
        seed=seed,
        recipe=augment,
        drop_last=drop_last,
        reason=reason,
    )


def _fits(split: Split, device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        room, where = torch.cuda.mem_get_info(device)[0], "free device memory"
    elif split.images is not None:
        return True, f"{_size(split.num_bytes)} of pixels, in host memory already"
    else:
        room, where = _host_bytes(), "host memory"
    fits = split.num_bytes <= _RESIDENT_FRACTION * room
    relation = "at most" if fits else "more than"
    return fits, f"{_size(split.num_bytes)} of pixels, {relation} a quarter of the {_size(room)} of {where}"


def _host_bytes() -> int:
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


def _read_whole(split: Split) -> Tensor:
    """Decode a split's .beton file once, in stored order."""
    channels, height, width = split.shape
    images = torch.empty((len(split), height, width, channels), dtype=torch.uint8)
    start = 0
    for pixels in beton.Stream(split.beton, 256, raw=split.raw).batches(split.indices):
        images[start : start + len(pixels)] = pixels[..., :channels]
        start += len(pixels)
    return images
