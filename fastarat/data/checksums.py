"""SHA-256 of data files, verified in full once per machine and remembered after that."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path


def checksum(path: Path) -> str:
    """SHA-256 of a file's content in hex, read piece by piece. Raises: OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path, expected: str) -> Path | None:
    """The empty file whose presence says that `path`, as it is now, was once found to have the hash `expected`."""
    # An account without a home has no place to remember; /tmp is anyone's, who could then vouch for damaged files.
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        return None
    stat = path.stat()
    key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino, expected])
    return Path(base, "fastarat", "verified", hashlib.sha256(key.encode()).hexdigest())


def verified(path: Path, expected: str, *, full: bool = False) -> bool:
    """Whether a file has this SHA-256 (hex). Raises: OSError for a file that cannot be read.

    Read in full once per machine and user, after that only when its path, size, time of change or inode differ, or when
    `full`. What was found is remembered below $XDG_CACHE_HOME/fastarat (~/.cache/fastarat); where that cannot be
    written, each call reads in full.
    """
    path = Path(path)
    stamp = _stamp(path, expected)
    with suppress(OSError):
        if stamp and not full and stamp.exists():
            return True
    found = checksum(path)
    # Taken again: a file that changed while it was read is not the one that was hashed.
    if stamp and stamp == _stamp(path, expected):
        with suppress(OSError):
            if found == expected:
                stamp.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                stamp.touch(mode=0o600)
            else:
                stamp.unlink(missing_ok=True)
    return found == expected
