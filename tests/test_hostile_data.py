"""Data that is hostile, damaged, or opened by two processes at once."""

import errno
import gzip
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archives import FOLDER, draw_folder
from PIL import Image, ImageFile

from fastarat.data import archives, checksums, load_dataset
from fastarat.errors import UserError


@pytest.fixture(autouse=True)
def remembered(tmp_path_factory, monkeypatch):
    """Where checksums are remembered, of each test's own."""
    place = tmp_path_factory.mktemp("remembered")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return place


@pytest.mark.parametrize("writable", [True, False])
def test_checksums_are_read_in_full_once_and_then_remembered(writable, tmp_path, monkeypatch):
    if not writable:
        (tmp_path / "a file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    path = tmp_path / "data"
    path.write_bytes(b"a" * 1000)
    expected = checksums.checksum(path)
    reads: list[int] = []
    monkeypatch.setattr(checksums, "checksum", lambda p, of=checksums.checksum: reads.append(1) or of(p))
    assert checksums.verified(path, expected)
    assert checksums.verified(path, expected)
    assert len(reads) == (1 if writable else 2)
    assert not checksums.verified(path, "0" * 64)
    # A flip that keeps size and time is what a disk does, not a program: full finds it, and forgets what it knew.
    stat = path.stat()
    path.write_bytes(b"a" * 999 + b"b")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not checksums.verified(path, expected, full=True)
    assert not checksums.verified(path, expected)
    path.write_bytes(b"a" * 1000)
    assert checksums.verified(path, expected)


def png(value: int = 0, size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def training_images(path: Path, data_dir: Path) -> np.ndarray:
    images = load_dataset(path, data_dir=data_dir, val_images=0).train.images
    assert images is not None
    return images.numpy()


GOOD = {f"{split}/{name}/{n}.png": png(n) for split in ("train", "test") for name in ("cat", "dog") for n in range(3)}


def tar_of(path: Path, members: dict[str, bytes], *more: tarfile.TarInfo, mode: str = "w") -> Path:
    """A tar archive of files, then of `more`, members without content."""
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more:
            tar.addfile(member)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def escaping_realpath() -> list[tarfile.TarInfo]:
    """CVE-2025-4517: links whose resolved path is longer than PATH_MAX, past which resolving stops to check."""
    made, path, part = [], "", "d" * 247
    for letter in "abcdefghijklmnop":
        made += [member(path + part, tarfile.DIRTYPE), member(path + letter, tarfile.SYMTYPE, part)]
        path += part + "/"
    short = "/".join("abcdefghijklmnop") + "/" + "l" * 254
    made.append(member(short, tarfile.SYMTYPE, "../" * 16))
    made.append(member("escape", tarfile.SYMTYPE, short + "/../../../outside"))
    made.append(member("escape/x.png"))
    return made


MEMBERS: dict[str, tuple[list[tarfile.TarInfo], str]] = {
    "realpath": (escaping_realpath(), "neither a plain file|lie outside|is too long"),
    "parent": ([member("a/../../../x.png")], "lie outside"),
    "absolute": ([member("/tmp/x.png")], "lie outside"),
    "drive": ([member("C:x.png")], "another system"),
    "backslash": ([member("..\\..\\x.png")], "another system"),
    "empty part": ([member("a//x.png")], "empty part"),
    "control": ([member("a\nb/x.png")], "control characters"),
    "not UTF-8": ([member("a\udcff/x.png")], "not UTF-8"),
    "symlink": ([member("train/cat/l.png", tarfile.SYMTYPE, "/etc/passwd")], "neither a plain file"),
    "symlink, then through it": ([member("l", tarfile.SYMTYPE, "/tmp"), member("l/x.png")], "neither a plain file"),
    "hard link": ([member("train/cat/h.png", tarfile.LNKTYPE, "train/cat/0.png")], "neither a plain file"),
    "fifo": ([member("train/cat/f.png", tarfile.FIFOTYPE)], "neither a plain file"),
    "device": ([member("train/cat/d.png", tarfile.CHRTYPE, devmajor=1, devminor=5)], "neither a plain file"),
    "block device": ([member("b", tarfile.BLKTYPE)], "neither a plain file"),
    "GNU sparse": ([member("train/cat/s.png", tarfile.GNUTYPE_SPARSE)], "neither a plain file"),
    "PAX sparse": (
        [member("s.png", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9" * 15})],
        "neither a plain file",
    ),
    "link by another name": ([member("README", tarfile.SYMTYPE, "/etc/passwd")], "neither a plain file"),
    "twice": ([member("train/cat/0.png")], "is in it twice"),
    "a file as a folder": ([member("train/cat/0.png/x.png")], "cannot unpack"),
    "PAX size huge": ([member("x.png", pax_headers={"size": "9" * 30})], "cannot unpack|allowed here"),
    "PAX size negative": ([member("x.png", pax_headers={"size": "-5120"})], "below zero"),
    "deep": ([member("d/" * 40 + "x.png")], "is too long"),
    "long": ([member("d" * 300 + "/x.png")], "is too long"),
    "header bomb": ([member("x" * (2 << 20) + ".png")], "header larger"),
    "PAX bomb": ([member("x.png", pax_headers={"comment": "x" * (2 << 20)})], "header larger"),
}


def outcome(archive: Path, match: str) -> None:
    """Opening fails with one line that names the archive, and leaves nothing anywhere."""
    before = set(archive.parent.rglob("*"))
    with pytest.raises(UserError, match=match) as raised:
        load_dataset(archive, data_dir=archive.parent / "data")
    assert str(archive) in str(raised.value)
    assert "\n" not in str(raised.value)
    str(raised.value).encode()
    left = {p for p in archive.parent.rglob("*") if p.is_file() and ".locks" not in p.parts} - before
    assert not left
    assert not list((archive.parent / "data/unpacked").iterdir())


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("kind", MEMBERS)
def test_a_tar_archive_of_anything_but_plain_files_is_refused(kind, format, tmp_path, monkeypatch):
    added, match = MEMBERS[kind]
    if format == tarfile.GNU_FORMAT and kind.startswith("PAX"):
        format = tarfile.PAX_FORMAT
    monkeypatch.setattr(tarfile.TarFile, "format", format)
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/x.tar", "w", errors="surrogateescape") as tar:
        for name, content in GOOD.items():
            made = member(name, size=len(content))
            tar.addfile(made, io.BytesIO(content))
        for made in added:
            tar.addfile(made)
    outcome(tmp_path / "in/x.tar", match)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("packed", ["w:gz", "w:xz", "w:bz2", "w", "zip"])
def test_an_archive_cut_anywhere_is_an_error(packed, tmp_path):
    suffix = {"w:gz": ".tar.gz", "w:xz": ".tar.xz", "w:bz2": ".tar.bz2", "w": ".tar", "zip": ".zip"}[packed]
    whole = tmp_path / f"whole{suffix}"
    if packed == "zip":
        with zipfile.ZipFile(whole, "w") as archive:
            for name, content in GOOD.items():
                archive.writestr(name, content)
    else:
        tar_of(whole, GOOD, mode=packed)
    assert len(load_dataset(whole, data_dir=tmp_path / "good", val_images=0).train) == 6
    content = whole.read_bytes()
    folder = tmp_path / "cut"
    folder.mkdir()
    # Of a tar archive the 10 kB block's zeros at the end may be missing: the end mark comes before.
    cuts = [0, 1, 511, 512, 1024, 1536, 3000, len(content) // 2]
    for cut in [c for c in cuts if c < len(content)] + ([len(content) - 1, len(content) - 5] if packed != "w" else []):
        archive = folder / f"c{cut}{suffix}"
        archive.write_bytes(content[:cut])
        outcome(archive, "cannot unpack")


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path):
    content = bytearray(tar_of(tmp_path / "x.tar", GOOD).read_bytes())
    content[5 * 1024 + 150] ^= 0x10  # the checksum field of the sixth header
    (tmp_path / "x.tar").write_bytes(content)
    outcome(tmp_path / "x.tar", "end mark is missing")


def zip_of(path: Path, change: Callable[[zipfile.ZipFile], None]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in GOOD.items():
            archive.writestr(name, content)
        change(archive)
    return path


def zip_link(archive: zipfile.ZipFile, kind: int = 0o120777) -> None:
    info = zipfile.ZipInfo("train/cat/link.png")
    info.create_system, info.external_attr = 3, kind << 16
    archive.writestr(info, "/etc/passwd")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a.writestr("../../x.png", b"x"), "lie outside"),
        (lambda a: a.writestr("/tmp/x.png", b"x"), "lie outside"),
        (lambda a: a.writestr("c:/x.png", b"x"), "another system"),
        (lambda a: a.writestr("a\\x.png", b"x"), "another system"),
        (lambda a: a.writestr("train/cat/0.png/x.png", b"x"), "both a file and a folder|cannot unpack"),
        (lambda a: a.writestr("d/" * 50 + "x.png", b"x"), "too long"),
        (zip_link, "neither a plain file"),
        (lambda a: zip_link(a, 0o010644), "neither a plain file"),
        (lambda a: zip_link(a, 0o020644), "neither a plain file"),
    ],
)
def test_a_zip_archive_of_anything_but_plain_files_is_refused(change, match, tmp_path):
    outcome(zip_of(tmp_path / "x.zip", change), match)


def patched(path: Path, offset: int, value: bytes, local: bool = False) -> Path:
    """Change a field of the first entry of the central directory (and of its local header)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + offset
    content[at : at + len(value)] = value
    if local:
        content[offset - 2 : offset - 2 + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("offset", "value", "match"),
    [
        (8, b"\x01\x00", "encrypted"),
        (10, b"\x63\x00", "cannot unpack"),  # a method that nobody knows
        (16, b"\x00\x00\x00\x00", "cannot unpack .*CRC"),
        (24, struct.pack("<I", 5), "cannot unpack"),  # sizes that lie
        (24, struct.pack("<I", 0xFFFFFFF0), "allowed here|holds"),
        (24, struct.pack("<I", 0xFFFFFFFF), "cannot unpack"),  # zip64, without its field
        (42, struct.pack("<I", 0x7FFFFFFF), "cannot unpack"),
        (28, struct.pack("<H", 60000), "cannot unpack"),
    ],
)
def test_a_zip_archive_whose_directory_lies_is_refused(offset, value, match, tmp_path):
    outcome(patched(zip_of(tmp_path / "x.zip", lambda a: None), offset, value, offset in (8, 10)), match)


def test_a_zip_name_does_not_end_at_a_nul(tmp_path):
    archive = zip_of(tmp_path / "x.zip", lambda a: a.writestr("train/cat/n.png_", b"x"))
    archive.write_bytes(archive.read_bytes().replace(b"n.png_", b"n.png\0"))
    outcome(archive, "control characters")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.xz", ".tar.bz2", ".zip"])
def test_a_bomb_writes_no_more_than_is_allowed(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 20)
    archive, big = tmp_path / f"x{suffix}", bytes(64 << 20)
    if suffix == ".zip":
        zip_of(archive, lambda a: a.writestr("train/cat/b.png", big))
    else:
        tar_of(archive, {**GOOD, "train/cat/b.png": big}, mode=f"w:{suffix[5:]}")
    monkeypatch.setattr(archives, "MAX_RATIO", 2)
    outcome(archive, "take more than the .* allowed here")
    # Not an image, it is not written; to go past it would take as long.
    if suffix != ".zip":
        outcome(tar_of(archive, {"big.bin": big}, mode=f"w:{suffix[5:]}"), "too large")


def test_what_a_disk_holds_in_blocks_is_counted_in_blocks(tmp_path, monkeypatch):
    """Folders and files of a byte take a block each, and ten thousand of them are a small archive."""
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(archives, "MAX_RATIO", 1)
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "PNG")
    many = [(f"a/{i}.png", image.getvalue()) for i in range(400)]
    deep = [("/".join([f"{i}", *30 * "d"]) + "/x.png", image.getvalue()) for i in range(20)]
    for name, members in (("many", many), ("deep", deep)):
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        with pytest.raises(UserError, match=r"more than the .* allowed"):
            load_dataset(str(path), data_dir=tmp_path / name)
        assert not list((tmp_path / name / "unpacked").iterdir())
    folders = tmp_path / "folders.tar"
    with tarfile.open(folders, "w") as tar:
        for i in range(2000):
            info = tarfile.TarInfo(f"{i}/" + "b/" * 25)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
    with pytest.raises(UserError, match="it holds no images"):
        load_dataset(str(folders), data_dir=tmp_path / "folders")


def test_what_is_passed_over_is_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 20)
    with tarfile.open(tmp_path / "x.tar.bz2", "w:bz2") as tar:
        for i in range(20):
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = 1 << 17
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(UserError, match=r"8\.txt in it is too large, or there is too much that is no image"):
        load_dataset(str(tmp_path / "x.tar.bz2"), data_dir=tmp_path / "data")


def test_global_headers_do_not_pile_up(tmp_path):
    """Each of them may hold a megabyte, and their sum is what a tar reader keeps."""
    content = bytearray()
    for i in range(60):
        info = tarfile.TarInfo(f"a/{i}.txt")
        content += tarfile.TarInfo.create_pax_global_header({f"key{i}": "v" * 900_000}) + info.tobuf()
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(bytes(content) + bytes(1024)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="it holds no images"):
            load_dataset(str(path), data_dir=tmp_path / "data")
        assert tracemalloc.get_traced_memory()[1] < 30e6, "of 54 MB where they pile up"
    finally:
        tracemalloc.stop()


def test_want_of_memory_is_not_called_damage(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a"))

    def greedy(path, target):
        raise MemoryError

    monkeypatch.setattr(archives, "_untar", greedy)
    with pytest.raises(UserError, match="not enough memory"):
        load_dataset(str(tmp_path / "x.tar"), data_dir=tmp_path / "data")


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 11)
    outcome(tar_of(tmp_path / "x.tar", GOOD), "more than 11 members")
    outcome(zip_of(tmp_path / "x.zip", lambda a: None), "more than 11 members")


def test_what_is_no_image_is_left_out_and_modes_are_ours(tmp_path):
    files = {"pets/README": b"x", "pets/labels.csv": b"x", "pets/.hidden.png": b"x", "__MACOSX/pets/a.png": b"x"}
    files |= {f"pets/{name}": content for name, content in GOOD.items()}
    for path in (tmp_path / "x.tar", tmp_path / "x.zip"):
        if path.suffix == ".tar":
            with tarfile.open(path, "w") as tar:
                for name, content in files.items():
                    tar.addfile(member("./" + name, size=len(content), mode=0o6777), io.BytesIO(content))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        data_dir = tmp_path / path.suffix[1:]
        assert len(load_dataset(path, data_dir=data_dir, val_images=0).train) == 6
        (unpacked,) = (data_dir / "unpacked").iterdir()
        written = [p for p in unpacked.rglob("*") if p.is_file()]
        assert {p.relative_to(unpacked / "pets").as_posix() for p in written} == set(GOOD)
        assert not any(p.stat().st_mode & 0o7133 for p in written)


def test_what_a_killed_unpacking_left_is_taken_away(tmp_path):
    archive = tar_of(tmp_path / "x.tar", GOOD)
    load_dataset(archive, data_dir=tmp_path / "data")
    (folder,) = (tmp_path / "data/unpacked").iterdir()
    folder.rename(folder.with_name(f".{folder.name}.tmp"))
    load_dataset(archive, data_dir=tmp_path / "data")
    assert list((tmp_path / "data/unpacked").iterdir()) == [folder]


def bomb_png(width: int, height: int) -> bytes:
    """A PNG whose header claims that many pixels."""
    import zlib

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def jpeg(path: Path, cut: Callable[[bytes], bytes]) -> None:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    path.write_bytes(cut(buffer.getvalue()))


def animated(path: Path, format: str) -> None:
    frames = [Image.new("RGB", (12, 12), (n * 90, 0, 0)) for n in range(3)]
    frames[0].save(path, format, save_all=True, append_images=frames[1:])


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "PostScript": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n"), "cannot identify"),
    "GIF": (lambda p: Image.new("P", (12, 12)).save(p, "GIF"), "cannot identify"),
    "PDF": (lambda p: Image.new("RGB", (12, 12)).save(p, "PDF"), "cannot identify"),
    "wide": (lambda p: p.write_bytes(bomb_png(16_385, 1)), "16385x1 pixels, more than"),
    "many pixels": (lambda p: p.write_bytes(bomb_png(9000, 9000)), "9000x9000 pixels, more than"),
    "bomb": (lambda p: p.write_bytes(bomb_png(2**31 - 1, 2**31 - 1)), "cannot read image"),
    "no pixels": (lambda p: p.write_bytes(bomb_png(0, 0)), "cannot read image"),
    "empty": (lambda p: p.write_bytes(b""), "cannot identify"),
    "PNG cut": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "cannot read image"),
    "PNG flipped": (lambda p: p.write_bytes(p.read_bytes()[:60] + b"\xff\xff" + p.read_bytes()[62:]), "cannot read"),
    "JPEG cut": (lambda p: jpeg(p, lambda c: c[: len(c) // 2]), "cannot read image"),
    "JPEG end": (lambda p: jpeg(p, lambda c: c[:-2]), "cannot read image"),
    "JPEG zeros": (lambda p: jpeg(p, lambda c: c[:-100] + bytes(100)), "no end mark"),
    "APNG": (lambda p: animated(p, "PNG"), "more than one picture"),
    "TIFF": (lambda p: animated(p, "TIFF"), "more than one picture"),
    "WebP": (lambda p: animated(p, "WEBP"), "more than one picture"),
    "fifo": (lambda p: (p.unlink(), os.mkfifo(p)), "not a plain file"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_that_is_hostile_or_damaged_is_named(kind, tolerant, tmp_path, monkeypatch):
    """tolerant: other code of the process has told Pillow to take images that are cut."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    folder = draw_folder(tmp_path / "pets", FOLDER)
    damage, match = IMAGES[kind]
    damage(folder / "train/dog/3.png")
    began = time.monotonic()
    with pytest.raises(UserError, match=match) as raised:
        load_dataset(folder, data_dir=tmp_path / "data")
    assert "dog/3.png" in str(raised.value)
    assert time.monotonic() - began < 5
    assert tolerant == ImageFile.LOAD_TRUNCATED_IMAGES
    assert not list((tmp_path / "data/decoded").iterdir() if (tmp_path / "data/decoded").exists() else ())


def test_garbage_after_an_image_and_thumbnails_do_no_harm(tmp_path):
    folder = draw_folder(tmp_path / "pets", FOLDER)
    jpeg(folder / "train/dog/3.png", lambda c: c + b"\xff\xda garbage")
    load_dataset(folder, data_dir=tmp_path / "data")
    # A thumbnail has an end of its own, which is not that of the image.
    inner: list[bytes] = []
    jpeg(folder / "train/dog/3.png", lambda c: inner.append(c) or c)
    app = b"\xff\xe5" + struct.pack(">H", len(inner[0]) + 2) + inner[0]
    (folder / "train/dog/3.png").write_bytes(b"\xff\xd8" + app + inner[0][2:-100] + bytes(100))
    with pytest.raises(UserError, match="no end mark"):
        load_dataset(folder, data_dir=tmp_path / "data")


def test_class_folders_not_in_utf8_are_named(tmp_path):
    folder = draw_folder(tmp_path / "pets", FOLDER)
    try:
        os.rename(folder / "train/dog", os.fsencode(folder) + b"/train/d\xffg")
    except OSError:
        pytest.skip("the file system takes UTF-8 names alone")
    with pytest.raises(UserError, match=r"class folder .*d\\udcffg is not named in UTF-8") as raised:
        load_dataset(folder, data_dir=tmp_path / "data")
    str(raised.value).encode()


def flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def zero(content: bytearray) -> None:
    content[512:1024] = bytes(512)


def edit_header(content: bytearray) -> None:
    at = content.index(b"(35, 12")
    content[at : at + 7] = b"(34, 12"


@pytest.mark.parametrize("damage", [flip, zero, edit_header, lambda c: c.__delitem__(slice(-1, None)), bytearray.clear])
def test_a_damaged_cache_is_decoded_again_with_a_warning(damage, tmp_path):
    folder = draw_folder(tmp_path / "pets", FOLDER)
    first = training_images(folder, tmp_path / "data")
    (kept,) = (tmp_path / "data/decoded").iterdir()
    content = bytearray(kept.read_bytes())
    damage(content)
    kept.write_bytes(content)
    with pytest.warns(UserWarning, match=r"\.npy is damaged: its images are decoded again"):
        again = training_images(folder, tmp_path / "data")
    assert np.array_equal(first, again)
    assert list((tmp_path / "data/decoded").iterdir()) == [kept]


def test_a_cache_made_to_fit_its_hash_is_still_bounded(tmp_path):
    folder = draw_folder(tmp_path / "pets", FOLDER)
    first = training_images(folder, tmp_path / "data")
    (kept,) = (tmp_path / "data/decoded").iterdir()
    for content in (b"\x80\x04.", *(kept.read_bytes().replace(b"(35, 12", b"(%d, 12" % n) for n in (99, 34))):
        kept.write_bytes(content)
        kept.rename(kept.with_name(f"{kept.stem[:-64]}{checksums.checksum(kept)}.npy"))
        with pytest.warns(UserWarning, match="is damaged"):
            assert np.array_equal(training_images(folder, tmp_path / "data"), first)
        (kept,) = (tmp_path / "data/decoded").iterdir()


OPEN = """
import hashlib, sys
from fastarat.data import load_dataset
print("ready", flush=True); sys.stdin.readline()
try:
    images = load_dataset(sys.argv[1], data_dir=sys.argv[2], val_images=0).train.images
    print(hashlib.sha256(images.numpy().tobytes()).hexdigest())
except Exception as error:
    print(type(error).__name__, error)
"""


def test_processes_that_open_one_data_set_at_once_all_get_it(tmp_path):
    folder = draw_folder(tmp_path / "pets", {f"{s}/{c}": 60 for s in ("train", "test") for c in ("cat", "dog")})
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(folder, arcname="pets")
    processes = [subprocess.Popen([sys.executable, "-c", OPEN, str(tmp_path / name), str(tmp_path / "data")],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
              for name in ("pets.tar", "pets.tar", "pets", "pets")]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outcomes = {process.communicate(timeout=60)[0] for process in processes}
    assert len(outcomes) == 1
    assert len(outcomes.pop()) == 65
    assert not list((tmp_path / "data").rglob("*.tmp"))


LIMITED = """
import resource, sys
from fastarat.data import load_dataset
from fastarat.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    load_dataset(sys.argv[1], data_dir=sys.argv[2])
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["pets", "pets.tar"])
def test_a_disk_that_takes_no_more_is_named_and_left_clean(what, tmp_path):
    folder = draw_folder(tmp_path / "pets", FOLDER)
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(folder, arcname="pets")
    arguments = [str(tmp_path / what), str(tmp_path / "data"), "100"]
    done = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout
    assert "GB" in done.stdout
    assert "data_dir" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file() and p.parent.name != ".locks"]


def test_a_full_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    archive = tar_of(tmp_path / "x.tar", GOOD)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda p: usage._replace(free=0))
    outcome(archive, r"no more than is free.*make room")


def test_a_disk_that_fills_up_while_images_are_decoded_is_named(tmp_path, monkeypatch):
    """Room is taken before the file is mapped: to write to a mapped file on a full disk would kill the process."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    folder = draw_folder(tmp_path / "pets", FOLDER)
    with pytest.raises(UserError, match=r"cannot write .*No space left.* needs 0\.000 GB .*set another data_dir"):
        load_dataset(folder, data_dir=tmp_path / "data")
    assert not list((tmp_path / "data/decoded").iterdir())


def test_a_data_folder_that_is_read_only_serves_what_it_holds(tmp_path, monkeypatch):
    archive = tar_of(tmp_path / "x.tar", GOOD)
    first = training_images(archive, tmp_path / "data")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for module, name in ((archives.os, "open"), (Path, "mkdir"), (archives, "FileLock")):
        monkeypatch.setattr(module, name, refuse)
    assert np.array_equal(training_images(archive, tmp_path / "data"), first)
    with pytest.raises(UserError, match=r"cannot write to .*Read-only file system; choose another"):
        load_dataset(archive, data_dir=tmp_path / "elsewhere")
