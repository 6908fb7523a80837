"""Data that is hostile, damaged, or opened by two processes at once."""

import os

import pytest

from fastarat.data import checksums


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
