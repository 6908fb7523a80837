"""What a checkpoint says of its network, checked before a network is built of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastarat.errors import UserError
from fastarat.values import shown

# What each entry of a checkpoint's metadata is, in words, and whether a value is that. The bounds keep a network that
# nobody trained from being built.
_META: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a name", lambda v: isinstance(v, str) and 0 < len(v) <= 100),
    "num_classes": ("a whole number from 1 to 1000000", lambda v: _is_whole(v, 1, 10**6)),
    "in_channels": ("a whole number from 1 to 1024", lambda v: _is_whole(v, 1, 1024)),
    "image_size": ("a whole number from 1 to 4096", lambda v: _is_whole(v, 1, 4096)),
    "normalized": ("true or false", lambda v: isinstance(v, bool)),
    "branches": (
        "up to 8 names",
        lambda v: (
            isinstance(v, (list, tuple))
            and len(v) <= 8
            and all(isinstance(b, str) and b.isidentifier() and len(b) <= 40 for b in v)
            and len(set(v)) == len(v)
        ),
    ),
    "defense": ("a name", lambda v: isinstance(v, str)),
    "dataset": ("a name", lambda v: v is None or isinstance(v, str)),
    "classes": ("names", lambda v: isinstance(v, (list, tuple)) and all(isinstance(c, str) for c in v)),
    "epsilon": ("a number from 0 to 1000", lambda v: isinstance(v, (int, float)) and 0 <= v <= 1000),
    "norm": ("linf or l2", lambda v: v in ("linf", "l2")),
    "epoch": ("a whole number", lambda v: _is_whole(v, 0, 2**63)),
    "best": (
        "epoch, by and value",
        lambda v: (
            isinstance(v, dict)
            and _is_whole(v.get("epoch"), 0, 2**63)
            and isinstance(v.get("by"), str)
            and isinstance(v.get("value"), (int, float))
        ),
    ),
}
_OPTIONAL = ("best", "classes", "dataset")


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_meta(meta: Any, file: str | Path) -> None:
    """Raise UserError unless metadata of the weights in `file` is what `meta_of` makes: types, and sane sizes."""
    if not isinstance(meta, dict):
        raise UserError(f"{file}: its metadata is {shown(meta)}: expected a mapping; it is damaged, get it again")
    for key, (expected, holds) in _META.items():
        if key not in meta and key not in _OPTIONAL:
            raise UserError(f"{file}: its metadata lacks {key}; it is damaged, or not written by fastarat")
        if key in meta and not holds(meta[key]):
            raise UserError(
                f"{file}: its metadata says {key}={shown(meta[key])}: expected {expected}; it is damaged, get it again"
            )
