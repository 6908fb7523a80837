"""The readers of data that `tools/fuzz.py` feeds: image archives and FFCV's files."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastarat.data import beton_file, load_dataset, make_loader, prepare
from tools.mutations import Reader, havoc, json_mutated


class ArchiveReader(Reader):
    """Image archives. The first byte of an input chooses the suffix, and with it how the rest is packed."""

    suffixes = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")
    pack: tuple[Callable[[bytes], bytes], ...] = (
        bytes,
        gzip.compress,
        gzip.compress,
        lzma.compress,
        bz2.compress,
        bytes,
    )
    unpack: tuple[Callable[[bytes], bytes], ...] = (
        bytes, gzip.decompress, gzip.decompress, lzma.decompress, bz2.decompress, bytes
    )  # fmt: skip

    def __init__(self, private: Path) -> None:
        super().__init__(private)
        members = {}
        for kind, mode in (
            ("png", "RGB"),
            ("jpeg", "L"),
            ("bmp", "P"),
            ("tiff", "RGBA"),
            ("webp", "RGB"),
            ("gif", "P"),
        ):
            out = io.BytesIO()
            Image.new(mode, (4, 4), 3).save(out, "PNG" if (kind, mode) == ("jpeg", "RGBA") else kind)
            suffix = "png" if kind == "gif" else kind
            members |= {f"pets/{c}/{i}-{kind}.{suffix}": out.getvalue() for c in ("cat", "dog") for i in range(5)}
        few = {name: content for name, content in members.items() if "-png" in name}
        for chosen in (members, few):
            self.seeds += [bytes([0]) + self.tar(chosen.items()), bytes([5]) + self.zip(chosen.items())]
        self.seeds += [bytes([k]) + self.pack[k](self.tar(few.items())) for k in (1, 3, 4)]

    @staticmethod
    def tar(members: Any) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, content in members:
                info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
                info.size = len(content) if not isinstance(name, tarfile.TarInfo) else info.size
                archive.addfile(info, io.BytesIO(content))
        return out.getvalue()

    @staticmethod
    def zip(members: Any) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
        return out.getvalue()

    def mutate(self, data: bytes, source: random.Random) -> bytes:
        if not data or source.random() < 0.1:
            return havoc(data, source)
        kind = data[0] % 6
        try:
            inside = self.unpack[kind](data[1:])
            inside = self._zip_mutated(inside, source) if kind == 5 else self._tar_mutated(inside, source)
        except Exception:
            return data[:1] + havoc(data[1:], source)
        if source.random() < 0.15:
            inside = havoc(inside, source)
        if kind != 5 and source.random() < 0.1:
            kind = source.randrange(5)
        return bytes([kind]) + self.pack[kind](inside)

    def _tar_mutated(self, data: bytes, source: random.Random) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = [(m, (archive.extractfile(m) or io.BytesIO()).read() if m.isreg() else b"") for m in archive]
        at = source.randrange(len(members))
        info, content = members[at]
        match source.randrange(7):
            case 0:
                info.name = self._name(info.name, source)
            case 1:
                info.type = source.choice(
                    (b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"L", b"x", b"g", b"\0")
                )
                info.linkname = self._name("../../x", source)
            case 2:
                info.size = source.choice((0, 1, len(content) + 1, 2**30, 2**62, max(0, len(content) - 3)))
            case 3:
                key = source.choice(
                    ("path", "size", "linkpath", "GNU.sparse.map", "GNU.sparse.size", "hdrcharset", "mtime")
                )
                info.pax_headers = {key: self._name(str(source.choice((-1, 0, 2**70, "0,1,2,x", "a/b.png"))), source)}
            case 4:
                members[at] = (info, havoc(content, source))
                info.size = len(members[at][1])
            case 5:
                members.insert(source.randrange(len(members)), (info, content))
            case _:
                info.mode, info.uid, info.devmajor = source.randrange(2**12), 2**21 - 1, source.randrange(9)
        return self.tar(members)

    def _zip_mutated(self, data: bytes, source: random.Random) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(m, archive.read(m)) for m in archive.infolist()]
        at = source.randrange(len(members))
        info, content = members[at]
        match source.randrange(4):
            case 0:
                info.filename = self._name(info.filename, source)
            case 1:
                info.external_attr = source.choice((0o120777, 0o060777, 0o010777, 0o040755, 0)) << 16
            case 2:
                members[at] = (info, havoc(content, source))
            case _:
                members.insert(source.randrange(len(members)), (info, content))
        return self.zip(members)

    @staticmethod
    def _name(name: str, source: random.Random) -> str:
        parts = [
            "..",
            "/tmp/x.png",
            "",
            ".",
            "a" * 300,
            "C:\\x.png",
            "\udcff",
            "x\0y.png",
            "cat",
            "x.eps",
            "é.png",
            "a\nb",
        ]
        whole = source.choice(
            (f"{source.choice(parts)}/{name}", f"{name}/{source.choice(parts)}", source.choice(parts))
        )
        return whole if source.random() < 0.9 else "/".join(["d"] * 600)

    def read(self, data: bytes) -> None:
        for entry in self.private.iterdir():
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
        path = self.written(f"set{self.suffixes[data[0] % 6] if data else '.tar'}", data[1:])
        load_dataset(str(path), data_dir=self.private / "data")


class BetonReader(Reader):
    """FFCV's files. An input is a list of writes into a real one, or, after a 1, the text of dataset.json."""

    def __init__(self, private: Path) -> None:
        super().__init__(private)
        folder = private / "pets"
        for split, count in (("train", 8), ("test", 2)):
            for c in ("cat", "dog"):
                (folder / split / c).mkdir(parents=True)
                for i in range(count):
                    Image.new("RGB", (16, 16), (i, 9, 200)).save(folder / split / c / f"{i}.png")
        self.folder, self.base = private / "beton", {}
        self.may = ("pickle.find_class",)  # Numba's, of what it compiles
        for mode in ("raw", "jpg"):
            made = prepare(folder, private / mode, data_dir=private / "data", write_mode=mode)
            self.base[mode] = {
                name: (made / name).read_bytes() for name in ("train.beton", "test.beton", "dataset.json")
            }
        self.told = {}
        for mode, files in self.base.items():
            told = json.loads(files["dataset.json"])
            del told["sha256"]  # or nothing behind it would be reached
            self.told[mode] = json.dumps(told).encode()
        self.seeds = [b"\0", b"\2", b"\1" + self.told["raw"], b"\3" + self.told["jpg"]]
        content = self.base["raw"]["train.beton"]
        end = int(np.frombuffer(content, beton_file.HEADER, 1)["alloc_table_ptr"][0])
        # Where a table lies: header, fields, rows; allocations; the pixels' begin.
        self.places = [*range(0, 1500), *range(end, len(content)), *range(1 << 21, (1 << 21) + 200)]

    def mutate(self, data: bytes, source: random.Random) -> bytes:
        if not data or data[:1] in (b"\1", b"\3"):
            return (data[:1] or b"\1") + json_mutated(data[1:], source)
        writes = [data[i : i + 10] for i in range(1, len(data) - 9, 10)]
        value = source.choice(
            (0, 1, 2, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1, source.getrandbits(8), source.getrandbits(64))
        )
        new = struct.pack("<HQ", source.randrange(len(self.places)), value)
        writes = [*writes, new] if source.random() < 0.7 else [new, *writes[: source.randrange(3)]]
        return data[:1] + b"".join(writes[-8:])

    def read(self, data: bytes) -> None:
        kind = data[0] % 4 if data else 0
        mode = "jpg" if kind >= 2 else "raw"
        files = {**self.base[mode], "dataset.json": self.told[mode]}
        if kind % 2:
            files["dataset.json"] = data[1:]
        else:
            content = bytearray(files["train.beton"])
            for i in range(1, len(data) - 9, 10):
                place, value = struct.unpack("<HQ", data[i : i + 10])
                at, wide = self.places[place % len(self.places)], struct.pack("<Q", value).rstrip(b"\0") or b"\0"
                content[at : at + len(wide)] = wide[: len(content) - at]
            files["train.beton"] = bytes(content)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        dataset = load_dataset(str(self.folder), data_dir=self.private / "data", val_images=2)
        for batch in make_loader(dataset.train, batch_size=8, device="cpu", kind="ffcv").epoch(0):
            batch.images.sum()
