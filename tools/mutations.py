"""Mutations of bytes and of trees of plain values, and what every reader of `tools/fuzz.py` is."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

TOKENS = (
    b"\x00", b"\xff" * 8, b"../", b"/etc/passwd", b"os\nsystem\n", b"\x80\x02", b"9" * 400, b"1e999", b"NaN",
    b"{", b'"', b"[" * 300, b"\xed\xa0\x80", b"\r\n", b"&a [*a,*a]", b"!!python/object:os.system", b"\xff\xd8\xff",
    b"%!PS-Adobe-3.0",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**200), 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "a",
    "8/255", "1/0", "\ud800", "a" * 5000, "../x", "x\ny", "resnet-small", "wrn-99994-1", "timm:x", [], {}, [[]],
    [1, "a"], {"name": "at"}, {"name": {"name": "at"}},
)  # fmt: skip


def havoc(data: bytes, source: random.Random) -> bytes:
    """A few small edits anywhere."""
    content = bytearray(data)
    for _ in range(source.randint(1, 6)):
        at = source.randrange(len(content) + 1)
        size = min(source.choice((1, 1, 4, 8, 64, 512)), len(content) - at)
        match source.randrange(6):
            case 0 if content:
                content[at % len(content)] ^= 1 << source.randrange(8)
            case 1:
                content[at : at + size] = bytes(size)
            case 2:
                del content[at : at + size]
            case 3:
                content[at:at] = content[at : at + size]
            case 4:
                content[at:at] = source.choice(TOKENS)
            case _:
                content[at : at + size] = source.choice(TOKENS)
    return bytes(content)


def disturbed(tree: Any, source: random.Random) -> Any:
    """A JSON or YAML value with one node replaced, removed, doubled or wrapped."""
    value = source.choice(VALUES)
    if source.random() < 0.01:
        for _ in range(500):
            value = [value]
    if not isinstance(tree, (dict, list)) or not tree or source.random() < 0.05:
        return value
    items = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
    key = source.choice(list(items))
    match source.randrange(8):
        case 0:
            del items[key]
        case 1:
            items[str(source.choice(VALUES))[:50]] = items[key]
        case 2:
            items[key] = [items[key]]
        case 3:
            items[key] = source.choice(list(items.values()))
        case _:
            items[key] = disturbed(items[key], source)
    return items if isinstance(tree, dict) else list(items.values())


def json_mutated(data: bytes, source: random.Random) -> bytes:
    with contextlib.suppress(ValueError, RecursionError):
        if source.random() < 0.8:
            return json.dumps(disturbed(json.loads(data), source)).encode()
    return havoc(data, source)


class Reader:
    """What all have. private: the folder that may be written to. seeds: inputs to begin with."""

    def __init__(self, private: Path) -> None:
        self.private = private
        self.seeds: list[bytes] = []
        self.may: tuple[str, ...] = ()  # what it may do though it is watched for

    def mutate(self, data: bytes, source: random.Random) -> bytes:
        return havoc(data, source)

    def read(self, data: bytes) -> None:
        """Read an input as fastarat does. Raises: UserError where it is refused."""
        raise NotImplementedError

    def written(self, name: str, data: bytes) -> Path:
        path = self.private / name
        path.write_bytes(data)
        return path
