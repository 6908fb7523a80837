"""Where images come from: downloads and image folders, and the cache of what was decoded."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from fastarat.data.archives import IMAGE_SUFFIXES, make_folder, one_at_a_time, shown
from fastarat.data.checksums import checksum, verified
from fastarat.data.splits import Split, Stored, derive_seed, held_out
from fastarat.errors import UserError

_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # never EPS, which runs Ghostscript
LARGEST_SIDE, LARGEST_PIXELS = 16_384, 1 << 26  # of one image, bounded before it is decoded

_TEST_SEED = 0  # of the test images held out of sets that come without any
_DIGITS_TEST = 360
_FOLDER_TEST_FRACTION = 0.2
_CHUNK = 128  # images that a decoding thread takes at a time


def _with_test(images: np.ndarray, labels: np.ndarray, count: int) -> tuple[Split, Split]:
    """Training and test images of a set that comes without a test set."""
    train, test = held_out(labels, count, _TEST_SEED)
    return Split.of(images[train], labels[train]), Split.of(images[test], labels[test])


def open_digits(name: str, data_dir: Path, download: bool) -> Stored:
    """scikit-learn's 1,797 handwritten digits of 8x8 grey pixels; they come with it, so nothing is downloaded."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # its pixels count 0..16
    parts = _with_test(images, digits.target.astype(np.int64), _DIGITS_TEST)
    return Stored(name, tuple(str(label) for label in digits.target_names), *parts, "scikit-learn's load_digits")


def fetched(url: str, md5: str, data_dir: Path, download: bool) -> Path:
    """Return a published file in the data folder, downloaded where it is not there. Raises: UserError."""
    path = data_dir / url.rsplit("/", 1)[-1]
    by_hand = f"download {url} by other means and place it at {path}"
    if not path.exists():
        if not download:
            raise UserError(f"{path} does not exist and downloading is off: {by_hand}")
        import pooch
        from tqdm.auto import tqdm

        make_folder(data_dir)
        try:
            # A bar without a total has no truth value, which pooch asks for before it sets the total.
            with tqdm(total=1, unit="B", unit_scale=True, disable=None) as bar:
                shown_bar: Any = bar  # pooch takes a bar, too, and declares True and False alone
                pooch.retrieve(url, f"md5:{md5}", fname=path.name, path=data_dir, progressbar=shown_bar)
        except (OSError, ValueError) as error:  # requests' and pooch's; a wrong checksum is a ValueError
            raise UserError(f"cannot download {url} ({type(error).__name__}): {by_hand}") from error
    check_md5(path, md5)
    return path


def check_md5(path: Path, md5: str) -> None:
    """Raise UserError for a file that is not the published one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise UserError(f"{path} has md5 {found}, expected {md5}: delete it to download it again")


@dataclass(frozen=True)
class CifarArchive:
    """A CIFAR archive in its authors' binary format: records of label bytes, then 3,072 bytes of planar RGB.

    label_bytes: labels before the pixels; the last of them, the fine one, is used. Calling it opens the archive.
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

    def __call__(self, name: str, data_dir: Path, download: bool) -> Stored:
        path = fetched(self.url, self.md5, data_dir, download)
        wanted = {*self.train, *self.test, self.class_names}
        files: dict[str, bytes] = {}
        try:
            # Read member by member and never extracted: no name in the archive can write outside the folder.
            with tarfile.open(path, "r:gz") as tar:
                for member in tar:
                    file_name = PurePosixPath(member.name).name
                    if file_name in wanted and member.isfile() and (content := tar.extractfile(member)):
                        files[file_name] = content.read()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path} is damaged or cut short ({error}): delete it to download it again") from error
        if missing := wanted - files.keys():
            raise UserError(f"{path} does not hold {sorted(missing)[0]}: it is not the {name} binary archive")
        classes = tuple(files[self.class_names].decode().split())
        train, test = (
            self._parsed(path, {file: files[file] for file in names}, count, len(classes))
            for names, count in ((self.train, self.train_images), (self.test, self.test_images))
        )
        return Stored(name, classes, train, test, self.url)

    def _parsed(self, path: Path, files: dict[str, bytes], count: int, num_classes: int) -> Split:
        record = self.label_bytes + 3 * 32 * 32
        content = b"".join(files.values())
        if len(content) != count * record:
            raise UserError(
                f"{path}: {', '.join(files)} hold {len(content)} bytes, not {count} records of {record}; "
                "delete the archive to download it again"
            )
        records = np.frombuffer(content, np.uint8).reshape(count, record)
        labels = records[:, self.label_bytes - 1].astype(np.int64)
        if labels.max() >= num_classes:
            raise UserError(f"{path} has label {labels.max()} but names only {num_classes} classes: it is damaged")
        images = records[:, self.label_bytes :].reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)
        return Split.of(np.ascontiguousarray(images), labels)


def _subfolders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def class_files(folder: Path) -> dict[str, list[str]]:
    """List the images of each class folder, at any depth in it; classes and files in order of their names.

    Names and not Path objects: of millions, those would take most of the memory. Raises: UserError.
    """
    # Labels are positions in the sorted names, as in torchvision's ImageFolder: checkpoints of either agree.
    found: dict[str, list[str]] = {}
    for class_folder in _subfolders(folder):
        if shown(class_folder.name) != class_folder.name:
            raise UserError(f"class folder {shown(class_folder)} is not named in UTF-8 text: rename it")
        files = [
            os.path.join(parent, name)
            for parent, _, names in os.walk(class_folder)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
        if not files:
            raise UserError(
                f"class folder {class_folder} holds no images ({' '.join(IMAGE_SUFFIXES)}): fill or delete it"
            )
        found[class_folder.name] = sorted(files, key=lambda file: file.split(os.sep))
    if len(found) < 2:
        raise UserError(f"{folder} holds {len(found)} class folders; expected two or more: {folder}/CLASS/image.png")
    return found


class Listing(NamedTuple):
    """The image files of a data set, before any is read.

    files: paths; labels: int64 [N]. train, test: int64, which of the files; `own_test` where the test ones were held
    out by us. root: what the paths lie below.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    files: list[str]
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray
    own_test: bool
    notes: tuple[str, ...]

    def digest(self) -> str:
        """Hash names, sizes and times of the files. Raises: UserError for what is no plain file."""
        # Not contents: hashing those would mean reading every image at each start.
        listing, root = hashlib.blake2b(digest_size=8), str(self.root)
        for file in self.files:
            found = os.stat(file)
            if not stat.S_ISREG(found.st_mode):  # opening a FIFO waits for ever
                raise UserError(f"{shown(file)} is not a plain file: delete it")
            listing.update(os.fsencode(f"{os.path.relpath(file, root)}\0{found.st_size}\0{found.st_mtime_ns}\n"))
        return listing.hexdigest()


def list_folder(root: Path, name: str) -> Listing:
    """List PATH/train/CLASS/*.png with PATH/test or PATH/val beside it, or PATH/CLASS/*.png. Raises: UserError."""
    if shown(root) != str(root):
        raise UserError(f"{shown(root)} is not named in UTF-8 text: rename it")
    notes: tuple[str, ...] = ()
    named = [folder for folder in ("test", "val") if (root / folder).is_dir()]
    train, test = class_files(root / "train" if (root / "train").is_dir() else root), {}
    if (root / "train").is_dir() and named:
        test = class_files(root / named[0])
        if len(named) == 2:
            notes = (f"{root / 'val'} is not used: validation images are cut from the training images",)
    if test and (differing := sorted(set(test) ^ set(train))):
        odd = differing[0]
        where = ("train", named[0]) if odd in train else (named[0], "train")
        raise UserError(f"class {odd!r} has a folder in {root / where[0]} but none in {root / where[1]}")
    return listing_of(name, root, train, test, notes)


def listing_of(
    name: str, root: Path, train: dict[str, list[str]], test: dict[str, list[str]], notes: tuple[str, ...] = ()
) -> Listing:
    """List files by class; without a test set a fifth of each class is held out. Raises: UserError."""
    if not test and min(len(listed) for listed in train.values()) < 2:
        raise UserError(f"{root} has a class of one image: none is left to train on once a test set is held out")
    # Equal sets of names in order: a class has the same label in both.
    files = [file for part in (train, test) for listed in part.values() for file in listed]
    labels = np.array([n for part in (train, test) for n, listed in enumerate(part.values()) for _ in listed], np.int64)
    if test:
        count = sum(len(listed) for listed in train.values())
        rows = np.arange(count), np.arange(count, len(files))
    else:
        count = round(len(labels) * _FOLDER_TEST_FRACTION)
        rows = held_out(labels, count, _TEST_SEED)
        notes = (f"it has no test images of its own: {count} of {len(labels)} images are held out for testing",)
        name = f"{name} (own test split)"
    return Listing(name, root, tuple(train), files, labels, *rows, not test, notes)


def open_listing(listing: Listing, data_dir: Path, image_size: int | None) -> Stored:
    """Decode the images of a listing into the data folder, once. Raises: UserError."""
    images, labels = _decoded(listing, data_dir, image_size), listing.labels
    if listing.own_test:
        train, test = (Split.of(images[rows], labels[rows]) for rows in (listing.train, listing.test))
        warnings.warn(f"{listing.root}: {listing.notes[0]}", stacklevel=4)
    else:  # one after the other in the file, of which they are views
        count = len(listing.train)
        train, test = Split.of(images[:count], labels[:count]), Split.of(images[count:], labels[count:])
    return Stored(listing.name, listing.classes, train, test, str(listing.root), listing.notes)


def _decoded(listing: Listing, data_dir: Path, image_size: int | None) -> np.ndarray:
    """Decode images into uint8 [N, H, W, C], kept in data_dir until a file's name, size or time changes.

    The SHA-256 of what is kept stands in its name: a damaged one is decoded again, with a warning.
    """
    digest, root, files = listing.digest(), listing.root, [Path(file) for file in listing.files]
    place = f"{shown(root.resolve().name)[:40]}-{derive_seed(1, str(root.resolve()), image_size or 0):016x}"
    cache, key = data_dir / "decoded", f"{place}-{digest}-"
    if (images := _kept(cache, key, len(files))) is not None:
        return images
    with one_at_a_time(data_dir, place):
        if (images := _kept(cache, key, len(files), warn=True)) is not None:
            return images
        make_folder(cache)
        unfinished = cache / f".{place}.tmp"  # alone here: what lies there was left by a killed process
        try:
            _write_decoded(unfinished, files, image_size)
            for stale in cache.iterdir():
                if stale.name.startswith(f"{place}-"):
                    stale.unlink(missing_ok=True)
            kept = cache / f"{key}{checksum(unfinished)}.npy"
            unfinished.rename(kept)
        except OSError as error:
            raise UserError(
                f"cannot write {unfinished}: {error.strerror or error}; make room or set another data_dir"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
        return np.load(kept, mmap_mode="r")


def _kept(cache: Path, key: str, count: int, warn: bool = False) -> np.ndarray | None:
    """The decoded images of a cache, mapped; None where there are none or they are damaged."""
    for path in sorted(cache.iterdir()) if cache.is_dir() else ():
        if not path.name.startswith(key) or path.suffix != ".npy":
            continue
        try:
            if verified(path, path.stem.removeprefix(key)):
                images = np.load(path, mmap_mode="r")
                if images.dtype == np.uint8 and images.ndim == 4 and len(images) == count:
                    return images
        except FileNotFoundError:
            continue  # another process found it stale
        except Exception:  # whatever its header says
            pass
        if warn:
            warnings.warn(f"{path} is damaged: its images are decoded again", stacklevel=6)
    return None


def _write_decoded(path: Path, files: Sequence[Path], image_size: int | None) -> None:
    path.unlink(missing_ok=True)
    channels = 1 if all(map(is_grey, files)) else 3  # asks no further than the first colour image
    height, width = decode(files[0], image_size, channels).shape[:2]
    needed = len(files) * height * width * channels
    short = f"{path.parent} needs {needed / 1e9:.3f} GB for the decoded images and has less: set another data_dir"
    if shutil.disk_usage(path.parent).free < needed:
        raise UserError(short)
    try:
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (len(files), height, width, channels))
        # A disk that fills up under a mapped file kills the process: the room is taken first.
        if hasattr(os, "posix_fallocate"):
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {short}") from error
    with whole_images():
        _decode_into(images, files, image_size)
    images.flush()


@contextmanager
def whole_images() -> Iterator[None]:
    """Have Pillow refuse what is cut short, whatever the process has it do elsewhere."""
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _decode_into(images: np.ndarray, files: Sequence[Path], image_size: int | None) -> None:
    """Fill `images`, uint8 [N, H, W, C], from as many files."""
    _, height, width, channels = images.shape

    def some(start: int) -> None:
        for row in range(start, min(start + _CHUNK, len(files))):
            pixels = decode(files[row], image_size, channels)
            if pixels.shape[:2] != (height, width):
                raise UserError(
                    f"images differ in size: {files[row]} is {pixels.shape[1]}x{pixels.shape[0]} and "
                    f"{files[0]} is {width}x{height}; set image_size to resize and crop them all"
                )
            images[row] = pixels

    # Decoding small images is mostly Python: measured at 32x32, two threads are slower than one.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1) if height * width >= 128 * 128 else 1)
    try:
        list(pool.map(some, range(0, len(files), _CHUNK)))  # the list waits, and raises what a thread raised
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image, its pixels still to be read. Raises: UserError, also for what goes wrong while it is open."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if max(image.size) > LARGEST_SIDE or image.width * image.height > LARGEST_PIXELS:
                raise ValueError(
                    f"it has {image.width}x{image.height} pixels, more than {LARGEST_SIDE} a side or {LARGEST_PIXELS:,}"
                )
            # A telephone's .jpg of several pictures (MPO) begins with the one that is meant.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ValueError("it holds more than one picture")
            # Converting 16 bits to 8, Pillow clips at 255 without a word: a dark image would come out white.
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {image.mode}, more than 8 bits")
            yield image
    except Exception as error:  # Pillow raises many kinds, depending on the format
        raise UserError(f"cannot read image {shown(path)}: {shown(error)}") from error


def is_grey(path: Path) -> bool:
    """Whether an image has one channel. Raises: UserError."""
    with _opened(path) as image:
        return image.mode in ("1", "L")


def _has_end(jpeg: bytes) -> bool:
    """Whether a JPEG's pixels have an end; the decoder makes grey of zeros that a disk left in their place."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and jpeg[at : at + 2] != b"\xff\xda":
        # A marker may be filled up with 0xff. Segments are skipped: a thumbnail in one has an end of its own.
        at += 1 if jpeg[at + 1 : at + 2] == b"\xff" else 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg.find(b"\xff\xd9", at) >= 0


def decode(path: Path, image_size: int | None, channels: int) -> np.ndarray:
    """Read one image as uint8 [H, W, C] of 1 or 3 channels; image_size: as for `load_dataset`. Raises: UserError."""
    with _opened(path) as opened:
        if opened.format in ("JPEG", "MPO") and not _has_end(path.read_bytes()):
            raise ValueError("it has no end mark: it is damaged or cut short")
        image = opened.convert("L" if channels == 1 else "RGB")
    if image_size is not None:
        width, height = image.size
        scale = image_size / min(width, height)
        if scale != 1:
            size = max(image_size, round(width * scale)), max(image_size, round(height * scale))
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image).reshape(image.height, image.width, channels)
