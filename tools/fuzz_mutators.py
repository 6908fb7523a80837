"""Mutations that fuzzers make: of bytes, of trees of plain values, and of the members of archives."""

from __future__ import annotations

import copy
import io
import random
import tarfile
import zipfile
from typing import Any

import numpy as np

from fastarat.data import beton_file

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 255, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308,
    float("inf"), float("nan"), "", " ", "x" * 2000, "\0", "\ud800", "\u202e", "../../../outside/x",
    "/etc/passwd", "$(id)", "<script>",
    "1e999", ".inf", "2020-99-99", "file.py:Class", "wrn-99994-1", "nan", [], {}, [[]], {"": None}, [0] * 300,
)  # fmt: skip
_WHOLE = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with one to four changes: flipped bits, set numbers, blocks zeroed, cut, moved or repeated."""
    content = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, length = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 16, 64, 512))
        kind = rng.randrange(7)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(_WHOLE) & (1 << 8 * width) - 1
            content[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 2:
            content[at : at + length] = bytes(len(content[at : at + length]))
        elif kind == 3:
            del content[at : at + length]
        elif kind == 4:
            content[at:at] = content[at : at + length]
        elif kind == 5:
            content[at:at] = rng.randbytes(length)
        else:
            del content[at:]
        content = content or bytearray(b"\0")
    return bytes(content)


def changed_tree(tree: Any, rng: random.Random) -> Any:
    """Return a copy of plain values with one to three of its nodes replaced, removed, added, renamed or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return _nasty(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "name", "\0", "a.b", "__class__"))] = holder.pop(key)
        elif kind == 2:
            for _ in range(rng.choice((1, 3, 30))):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"name": holder[key]}
        elif kind == 3 and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 10)) + rng.choice((0, 1, -1, 0.5))
        elif kind == 4:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name % len(other)])
        else:
            holder[key] = _nasty(rng)
    return tree


def _nasty(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(NASTY))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [(tree, key) for key in keys] + [place for key in keys for place in _places(tree[key])]


def changed_zip(data: bytes, rng: random.Random) -> bytes:
    """Return a zip archive with some members' content changed and its checksums right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        at = rng.randrange(len(members))
    except Exception:
        return changed_bytes(data, rng)
    name, content = members[at]
    kind = rng.randrange(8)
    if kind == 0:
        del members[at]
    elif kind == 1:
        members.append((rng.choice((name, name + "x", "../../outside/x.png")), content))
    elif kind == 2:
        members[at] = changed_bytes(name.encode(), rng).decode("latin-1").replace("\0", "?") or "x", content
    else:
        # The pickle says how everything else is read.
        at = next((i for i, (n, _) in enumerate(members) if n.endswith("data.pkl") and rng.random() < 0.7), at)
        members[at] = members[at][0], changed_bytes(members[at][1], rng)
    archive = zipped(members)
    if kind == 3 and members:  # a size in the directory, or beside the content, that is another's
        content = bytearray(archive)
        start = content.rfind(b"PK\1\2") if rng.random() < 0.5 else content.find(b"PK\3\4")
        place = start + rng.choice((20, 24) if content[start + 2] == 1 else (18, 22))
        content[place : place + 4] = rng.choice((0, 1, 2**16, 2**31, 2**32 - 1)).to_bytes(4, "little")
        return bytes(content)
    return archive


def zipped(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


_NAMES = (
    "/tmp/outside/x.png", "../../outside/x.png", "train/../../../outside/x.png",
    "train/a/\u0000x.png", "train//a/x.png", "train/a",
    "train/" + "d/" * 40 + "x.png", "train/" + "n" * 300 + ".png", "C:\\x.png",
    "train/a/x.PNG", "./train/a/x.png",
)  # fmt: skip


def changed_tar(data: bytes, rng: random.Random) -> bytes:
    """Return a tar archive with a member renamed, made a link or another kind, or damaged; its checksums are right."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = [
                (m, f.read() if (f := archive.extractfile(m)) else b"") for m in archive if m.isfile() or m.isdir()
            ]
        at = rng.randrange(len(members))
    except Exception:
        return changed_bytes(data, rng)
    member, content = members[at]
    kind = rng.randrange(7)
    if kind == 6:
        return _lying(members, at, rng)
    if kind == 0:
        member.name = rng.choice(_NAMES)
    elif kind == 1:
        link = tarfile.TarInfo(rng.choice((member.name, "train/link", "train")))
        link.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE))
        link.linkname = rng.choice((*_NAMES, "..", "/", "train"))
        members.insert(rng.randrange(len(members)), (link, b""))
    elif kind == 2:
        members[at] = member, changed_bytes(content, rng)
    elif kind == 3:
        members.append((copy.copy(member), content))
    elif kind == 4:
        member.pax_headers = {"GNU.sparse.realsize": "99999999999", "path": rng.choice(_NAMES)}
    else:
        del members[at]
    try:
        return tarred(members)
    except (ValueError, UnicodeError, OSError):  # a name or size that this writer cannot write
        return changed_bytes(data, rng)


def _lying(members: list[tuple[tarfile.TarInfo, bytes]], at: int, rng: random.Random) -> bytes:
    """Return the archive with a size in one header that its content does not have; `addfile` would refuse to."""
    out = b""
    for i, (member, content) in enumerate(members):
        member.size = len(content)
        if i == at:
            member.size = rng.choice((0, 1, len(content) + 1, len(content) + 512, 2**31, 2**35, 2**62))
        out += member.tobuf(rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)))
        out += content + bytes(-len(content) % tarfile.BLOCKSIZE)
    return out + bytes(2 * tarfile.BLOCKSIZE)


def tarred(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in members:
            if member.type == tarfile.REGTYPE:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def tables(content: bytearray) -> dict[str, np.ndarray]:
    """Views of a pristine file's tables: writing to them changes `content`."""
    header = np.frombuffer(content, beton_file.HEADER, 1)
    count, end = int(header["num_samples"][0]), int(header["alloc_table_ptr"][0])
    first = beton_file.HEADER.itemsize + 2 * beton_file.FIELD.itemsize
    rows = np.frombuffer(content, beton_file.ROW, count, first)
    found = {"header": header, "field": np.frombuffer(content, beton_file.FIELD, 2, beton_file.HEADER.itemsize)}
    found |= {"image": rows["f0"], "label": rows[["f1"]]}
    return found | {"allocation": np.frombuffer(content, beton_file.ALLOCATION, -1, end)}
