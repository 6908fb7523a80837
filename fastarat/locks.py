"""One writer per folder: who holds it, and a line for the second comer that says so."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastarat.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: the plain file below alone
    fcntl = None

# .lock is flock's. .lock.pid is the plain file that stands in for it where the file system has no flock: it alone can
# outlive its process without the kernel's taking it back, and there its process is looked for.
LOCK_FILES = (".lock", ".lock.pid")
"""Names in a folder that are no content of it; a kill may leave them behind, and they hold nobody up."""

_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_GUARD = threading.Lock()
_HELD: dict[tuple[int, Path], tuple[int, str]] = {}  # by process, which a fork is another of, and folder: its thread


class _Busy(UserError):
    pass


@contextlib.contextmanager
def held(folder: str | Path, doing: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold `folder` as its one writer while the block runs; the thread that holds it already goes on within.

    The folder is made if it is missing, and removed again if it is still empty at the end. The kernel gives up the
    lock with its process, however that ends. Where nothing can be written there is nothing to hold, and the block runs:
    its own writing fails in its own words.

    doing: the command in words, for the other one's error. patience: seconds to wait for somebody else's end.
    Raises: UserError when somebody else holds the folder, naming the process, its host, since when, and what it does;
        or where the disk is full.
    """
    folder = Path(folder)
    key = os.getpid(), folder.resolve()
    with _GUARD:
        thread, other = _HELD.get(key, (0, ""))
        if not thread:
            _HELD[key] = threading.get_ident(), doing
    if thread == threading.get_ident():
        yield
        return
    if thread:
        raise UserError(f"{folder} is being written by another thread of this process ({other}): wait for it")
    made = _missing(folder)
    try:
        with contextlib.ExitStack() as stack:
            _take(folder, doing, stack, time.monotonic() + patience)
            yield
    finally:
        with _GUARD:
            _HELD.pop(key, None)
        for path in made:
            with contextlib.suppress(OSError):  # it holds something by now
                path.rmdir()


def holder(folder: str | Path) -> dict[str, Any] | None:
    """Return who holds `folder` (pid, host, since, doing), or None; looking takes no lock, so it is in nobody's way.

    A process of another host is taken to be alive, and one of this host by its number.
    """
    for name in LOCK_FILES:
        path = Path(folder) / name
        found = _read(path) if path.is_file() else {}
        if found and (found.get("host") != socket.gethostname() or _alive(found.get("pid"))):
            return found
    return None


def _missing(folder: Path) -> list[Path]:
    """The folders that making `folder` will make, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _take(folder: Path, doing: str, stack: contextlib.ExitStack, last: float) -> None:
    for _ in range(1000):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if _flocked(folder, doing, stack):
                return
        except _Busy:
            if time.monotonic() >= last:
                raise
            time.sleep(0.1)
        except FileNotFoundError:  # the one before removed the folder that it had made: once more
            continue
        except OSError as error:
            if error.errno in _UNWRITABLE:
                return
            raise UserError(
                f"cannot write {folder / LOCK_FILES[0]}: {error.strerror or error}. Free space or choose another --out."
            ) from error
    raise UserError(f"{folder} is being made and removed by somebody else: choose another --out")


def _flocked(folder: Path, doing: str, stack: contextlib.ExitStack) -> bool:
    """Take the lock, or its stand-in; False if the file was removed meanwhile, by the one who held it before."""
    path = folder / LOCK_FILES[0]
    if fcntl is None:
        return _pid_file(folder, doing, stack)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _refuse(folder, path)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            path.unlink(missing_ok=True)
            return _pid_file(folder, doing, stack)
        try:
            if not os.path.samestat(os.fstat(fd), os.stat(path)):
                return False
        except FileNotFoundError:
            return False
        # The words are for people; the lock holds without them, on a full disk too.
        with contextlib.suppress(OSError):
            os.truncate(fd, 0)
            os.write(fd, _holder(doing))
        stack.push(opened.pop_all())
        stack.callback(_remove, path)  # while it is held: an opener who comes now looks again
        return True


def _pid_file(folder: Path, doing: str, stack: contextlib.ExitStack) -> bool:
    path = folder / LOCK_FILES[1]
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        holder = _read(path)
        if holder.get("host") != socket.gethostname() or _alive(holder.get("pid")):
            _refuse(folder, path, f"; if it is gone, delete {path}")
        path.unlink(missing_ok=True)  # of a process that was killed
        return False
    stack.callback(_remove, path)
    with os.fdopen(fd, "wb") as file:
        file.write(_holder(doing))
    return True


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or os.name == "nt":  # os.kill ends a process there, whatever the signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _holder(doing: str) -> bytes:
    since = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since, "doing": doing}).encode()


def _read(path: Path) -> dict[str, Any]:
    for _ in range(20):  # it may be about to write its name
        try:
            found = json.loads(path.read_bytes()[:4096])
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError, RecursionError):
            time.sleep(0.02)
    return {}


def _refuse(folder: Path, path: Path, more: str = "") -> NoReturn:
    holder = _read(path)
    if {"pid", "host", "since", "doing"} <= holder.keys():
        who = "process {pid} on host {host} since {since} ({doing})".format(**holder)
    else:
        who = "another process"
    raise _Busy(f"{folder} is being written by {who}: wait for it, or end it{more}")
