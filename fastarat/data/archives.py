"""Image archives (tar and zip), unpacked so that nothing in them can write outside a folder, fill a disk, or run."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import unicodedata
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from fastarat.data.splits import derive_seed
from fastarat.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")

MAX_MEMBERS = 5_000_000  # ImageNet has 1.4 million
MAX_BYTES = 4 << 30  # unpacked of a small archive; of a large one MAX_RATIO times its size
MAX_RATIO = 250  # images hardly compress; deflate ends at 1,032, xz far beyond
_MAX_HEADER = 1 << 20  # bytes of one tar member before its content, long names and extended headers included
_MAX_DIRECTORY = 256 << 20  # of a zip archive; read as a whole
_MAX_DEPTH, _MAX_PATH, _MAX_PART = 32, 1024, 255
_CHUNK = 1 << 20
_BLOCK = 4096  # bytes that a file or folder takes at least, however little is in it
_SPARE = 64 << 20  # free bytes that are left on the disk


class _Refused(Exception):
    """What is wrong with an archive, in words."""


def make_folder(path: Path) -> Path:
    """Make a folder, its parents too, or say that it cannot be written to. Raises: UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {path}: permission denied; choose another folder")
    return path


def shown(path: object) -> str:
    """A name as text that can be printed and encoded: what is no UTF-8, and control characters, escaped."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs") else ascii(c)[1:-1] for c in str(path))


@contextmanager
def one_at_a_time(data_dir: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` of a data folder; processes that fill the same place wait for each other."""
    path = make_folder(data_dir / ".locks") / f"{name}.lock"
    lock = FileLock(path, mode=0o666)  # users who share the folder share the lock
    try:
        try:
            lock.acquire(timeout=5)
        except Timeout:
            warnings.warn(f"waiting for another process that fills {data_dir} (it holds {path})", stacklevel=5)
            lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another data_dir") from error
    try:
        yield
    finally:
        lock.release()


def unpacked(path: Path, data_dir: Path) -> Path:
    """Unpack the images of a tar or zip archive into data_dir once and return the image folder in it.

    Files other than images are left out. Raises: UserError for archives that are damaged, that hold anything but plain
    files and folders below one place, or more than MAX_MEMBERS or max(MAX_BYTES, MAX_RATIO times their size).
    """
    found = path.stat()
    # 2: folders that earlier versions unpacked may hold links.
    key = derive_seed(2, str(path.resolve()), found.st_size, found.st_mtime_ns)
    folder = data_dir / "unpacked" / f"{path.name.split('.')[0][:40]}-{key:016x}"
    if not folder.exists():
        with one_at_a_time(data_dir, folder.name):
            if not folder.exists():
                make_folder(folder.parent)
                _unpack(path, folder)
    inside = [entry for entry in folder.iterdir() if entry.is_dir()]
    return inside[0] if len(inside) == 1 else folder  # an archive of one folder, which is the usual way to pack


def unpack_tar(path: Path, folder: Path, data_dir: Path, *, nested: bool = False) -> None:
    """Unpack the images of a tar file into `folder` once; nested: those of the tar files in it, each into its own.

    Raises: UserError, as `unpacked` does.
    """
    with one_at_a_time(data_dir, folder.name):
        if not folder.exists():
            make_folder(folder.parent)
            _unpack(path, folder, nested)


def _unpack(path: Path, folder: Path, nested: bool = False) -> None:
    # Whoever holds the lock is alone here: what lies there was left by a killed process. Nobody else may enter it.
    private = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(private, ignore_errors=True)
        if os.path.lexists(private):
            raise UserError(f"{private} is in the way and cannot be removed: delete it")
        with _told(private, path):
            private.mkdir(mode=0o700)
        room = min(max(MAX_BYTES, MAX_RATIO * path.stat().st_size), shutil.disk_usage(private).free - _SPARE)
        target = _Target(private / folder.name, path, room, nested)
        (_unzip if path.name.endswith(".zip") else _untar)(path, target)
        if not target.files:
            raise _Refused(f"it holds no images ({' '.join(IMAGE_SUFFIXES)})")
        target.folder.rename(folder)
    except UserError:
        raise
    except _Refused as error:
        raise UserError(f"cannot unpack {path}: {error}") from error
    except MemoryError as error:
        raise UserError(f"cannot unpack {path}: not enough memory") from error
    except Exception as error:  # tarfile and zipfile raise many kinds for what is damaged, KeyError among them
        why = shown(f"{type(error).__name__}: {error}")[:200]
        raise UserError(f"cannot unpack {path} ({why}): it is damaged or cut short; get it again") from error
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextmanager
def _told(place: Path, archive: Path, needed: int = 0) -> Iterator[None]:
    """Say of what cannot be written which file it is, how much room it takes and what to do."""
    try:
        yield
    except OSError as error:
        needed = max(needed, archive.stat().st_size)
        raise UserError(
            f"cannot write {shown(place)}: {error.strerror or error}; the images of {archive} need "
            f"{needed / 1e9:.3f} GB or more: make room or choose another data_dir"
        ) from error


@dataclass
class _Target:
    """The folder that an archive's images go to. room: bytes that may be written, and that may be passed over.

    nested: whether tar files in the archive are unpacked too.
    """

    folder: Path
    archive: Path
    room: int
    nested: bool = False
    members: int = 0
    files: int = 0
    written: int = 0
    passed: int = 0
    made: set[tuple[str, ...]] = field(default_factory=set)

    def count(self, size: int, name: str) -> None:
        """Raise for a member that is too much, before anything of it is written."""
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise _Refused(f"it holds more than {MAX_MEMBERS:,} members; give a folder of images instead")
        if size < 0:
            raise _Refused(f"{shown(name)} has a size below zero: it is damaged")
        self.bound(size)

    def pass_over(self, size: int, name: str) -> None:
        """Count a member that is not written: what is compressed has to be decompressed all the same."""
        self.passed += max(size, 0)
        if self.passed > self.room:
            raise _Refused(f"{shown(name)} in it is too large, or there is too much that is no image")

    def bound(self, more: int) -> None:
        if self.written + more > self.room:
            raise _Refused(
                f"its images take more than the {max(self.room, 0) / 1e9:.1f} GB allowed here ({MAX_BYTES >> 30} "
                f"GiB or {MAX_RATIO} times its size, and no more than is free): make room, or give a folder of images"
            )

    def take(self, size: int) -> None:
        self.bound(size)
        self.written += size

    def add_folder(self, parts: tuple[str, ...]) -> None:
        for depth in range(len(parts) + 1):
            if parts[:depth] not in self.made:
                place = self.folder.joinpath(*parts[:depth])
                try:
                    self.take(_BLOCK)
                    with _told(place, self.archive, self.written):
                        place.mkdir()
                except UserError as error:
                    if isinstance(error.__cause__, FileExistsError):
                        raise _Refused(f"{shown(place.name)} is both a file and a folder in it") from error
                    raise
                self.made.add(parts[:depth])

    def add_file(self, parts: tuple[str, ...], size: int, content: Any) -> None:
        """Write `size` bytes of a reader. What is written is counted: declared sizes may lie."""
        self.add_folder(parts[:-1])
        self.take(_BLOCK)
        place = self.folder.joinpath(*parts)
        try:
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileExistsError as error:
            raise _Refused(f"{shown('/'.join(parts))} is in it twice") from error
        except OSError as error:
            with _told(place, self.archive, self.written + size):
                raise error
        got = 0
        with open(descriptor, "wb", buffering=0) as file:
            while chunk := content.read(_CHUNK):
                got += len(chunk)
                self.take(len(chunk))
                with _told(place, self.archive, self.written + size):
                    while chunk := chunk[file.write(chunk) :]:
                        pass
        if got != size:
            raise _Refused(f"{shown('/'.join(parts))} holds {got} of {size} bytes: it is damaged or cut short")
        self.files += 1


def _parts(name: str) -> tuple[str, ...]:
    """The checked parts of a member's name. Raises: _Refused for all that is no plain path below the folder."""

    def refuse(why: str) -> _Refused:
        return _Refused(f"the name {shown(name)[:100]!r} in it {why}")

    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise refuse("is not UTF-8 or has control characters")
    if name.startswith("/") or "\\" in name or re.match("[A-Za-z]:", name):
        raise refuse("is absolute or of another system: it would lie outside")
    # "./a" and "a/" are what tar itself writes.
    parts = tuple(part for part in name.removesuffix("/").split("/") if part != ".")
    if ".." in parts:
        raise refuse("would lie outside")
    if "" in parts:
        raise refuse("has an empty part")
    if len(name.encode()) > _MAX_PATH or len(parts) > _MAX_DEPTH or any(len(p.encode()) > _MAX_PART for p in parts):
        raise refuse(f"is too long: more than {_MAX_DEPTH} parts of {_MAX_PART} bytes, {_MAX_PATH} in all")
    return parts


def _wanted(parts: tuple[str, ...]) -> bool:
    """Whether a member can be part of a data set: no hidden file, nor the folder that macOS adds to zip archives."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)


class _Bounded:
    """A file whose single reads, and whose reads between two `allow`, are bounded: headers may lie."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._limit = file, limit
        self._left = limit
        self.tell, self.seek, self.seekable, self.close = file.tell, file.seek, file.seekable, file.close
        self.header = b""  # what the last read of a tar header gave

    def allow(self, more: int) -> None:
        self._left = self._limit + more

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(content)
        if self._left < 0:
            raise _Refused("it has a header larger than any real one")
        if size == tarfile.BLOCKSIZE:
            self.header = content
        return content


@contextmanager
def _decompressed(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        head = file.read(6)
        file.seek(0)
        openers: dict[bytes, Any] = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\0": lzma.LZMAFile}
        opener = next((opener for magic, opener in openers.items() if head.startswith(magic)), None)
        if opener is None:
            yield file
        elif opener is gzip.GzipFile:
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream
        else:
            with opener(file) as stream:
                yield stream


def _untar(path: Path, target: _Target) -> None:
    with _decompressed(path) as stream:
        _untar_stream(stream, target)
        # The checksum of a compressed file comes after its end.
        left = target.room
        while left > 0 and (chunk := stream.read(_CHUNK)):
            left -= len(chunk)


def _untar_stream(stream: Any, target: _Target, below: tuple[str, ...] = ()) -> None:
    bounded = _Bounded(stream, _MAX_HEADER)
    opened: Any = bounded
    # Names are of UTF-8 whatever the locale is; others become surrogates, which are refused.
    with tarfile.open(fileobj=opened, mode="r:", encoding="utf-8") as tar:
        held: Any = tar
        for member in tar:
            held.members, held.pax_headers = [], {}  # or millions would be
            # Before anything else: an archive of links is refused even where they have no image's name.
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise _Refused(f"{shown(member.name)} in it is neither a plain file nor a folder")
            parts = _parts(member.name)
            if target.nested and not below and member.isreg() and parts[-1].endswith(".tar"):
                target.count(0, member.name)
                bounded.allow(member.size)
                _untar_stream(tar.extractfile(member), target, (parts[-1].removesuffix(".tar"),))
                bounded.allow(0)
                continue
            image = member.isreg() and _wanted(parts) and member.name.lower().endswith(IMAGE_SUFFIXES)
            target.count(member.size if image else min(member.size, 0), member.name)
            # Folders are made as their images come: an empty one is no class.
            if image:
                bounded.allow(member.size)
                target.add_file((*below, *parts), member.size, tar.extractfile(member))
            else:
                target.pass_over(member.size, member.name)
            bounded.allow(0)
        # Tarfile takes a damaged header, and an archive cut at one, for the end.
        if bounded.header != bytes(tarfile.BLOCKSIZE):
            raise _Refused("it is damaged or cut short: its end mark is missing")


def _unzip(path: Path, target: _Target) -> None:
    with path.open("rb") as file:
        bounded = _Bounded(file, _MAX_DIRECTORY)
        opened: Any = bounded
        with zipfile.ZipFile(opened) as archive:
            members = []
            for member in archive.infolist():
                name = member.orig_filename  # `filename` ends at a NUL
                kind = stat.S_IFMT(member.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _Refused(f"{shown(name)} in it is neither a plain file nor a folder")
                if member.flag_bits & 1:
                    raise _Refused(f"{shown(name)} in it is encrypted: unpack it and give the folder")
                parts = _parts(name)
                folder = name.endswith("/")
                image = not folder and _wanted(parts) and name.lower().endswith(IMAGE_SUFFIXES)
                target.count(member.file_size if image else 0, name)
                if image:
                    members.append((member, parts))
            target.bound(sum(member.file_size for member, _ in members))
            for member, parts in members:
                bounded.allow(member.compress_size)
                with archive.open(member) as content:  # reading to the end compares the checksum
                    target.add_file(parts, member.file_size, content)
