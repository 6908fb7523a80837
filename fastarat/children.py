"""Commands in processes of their own, which end with the process that started them, however that ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fastarat import child as beginning
from fastarat.errors import UserError

# As `python FILE` would, but for the file's own folder, which that would put where modules are looked for.
_BEGIN = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
PATIENCE_S = 60.0
"""Seconds that a parent, told to end, waits for its children's checkpoints."""

Job = TypeVar("Job")
Done = TypeVar("Done")


class Terminated(KeyboardInterrupt):
    """SIGTERM, as `terminable` hands it on: like Ctrl-C, no `except Exception` holds it up."""


class Stopped(UserError):
    """A command that SIGTERM ended, and how it goes on."""

    exit_code = 143  # 128 + SIGTERM, as shells have it
    silent: bool | None = None  # whether another of several processes says so


@contextlib.contextmanager
def terminable(kept: str) -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, and raise Stopped saying `kept`, what is kept and how to go on.

    Nothing changes outside the main thread, or where SIGTERM has a handler already.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: children are being waited for
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Terminated as error:
        stopped = Stopped(f"ended by SIGTERM; {kept}")
        stopped.silent = getattr(error, "silent", None)  # of several processes one speaks
        raise stopped from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Children:
    """Runs fastarat's commands as processes, `at_once` of them at a time."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self._guard, self._running, self._ending = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def call(self, argv: Sequence[str | Path], log: Path, env: Mapping[str, str]) -> int:
        """Run `fastarat ARGV`, its output added to `log`; return its exit code, or minus the signal that killed it.

        env: added to this process's. Raises: UserError where the log cannot be written.
        """
        try:
            file = open(log, "ab")  # noqa: SIM115
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot write {log}: {why}. Free space or choose another --out.") from error
        with file:
            with self._guard:
                if self._ending:
                    return -signal.SIGTERM
                child = subprocess.Popen(
                    [sys.executable, "-c", _BEGIN, beginning.__file__, *map(str, argv)],
                    # Nothing is ever written to it: its end is this process's end, which no signal has to tell.
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **env},
                    # Ctrl-C reaches a whole group, and a second signal (`end`'s) would cut its checkpoint short.
                    start_new_session=True,
                )
                self._running.add(child)
            try:
                return child.wait()
            finally:
                with contextlib.suppress(OSError):
                    child.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
                self._running.discard(child)

    def map(self, call: Callable[[Job], Done], jobs: Sequence[Job]) -> list[Done]:
        """Call `call` on every job, `at_once` at a time, each in a thread; one alone in this thread.

        An error leaves the jobs not begun undone, and is raised when the begun ones are done. Ctrl-C and SIGTERM end
        those too, and wait for them.
        """
        if self.at_once == 1:
            return [call(job) for job in jobs]
        # Threads are enough: each of these jobs only waits for a process of its own.
        with ThreadPoolExecutor(self.at_once) as pool:
            futures = [pool.submit(call, job) for job in jobs]
            try:
                return [future.result() for future in futures]
            except Exception:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.end()
                raise

    def end(self) -> None:
        """End all that run: SIGTERM, time to write a checkpoint, then SIGKILL, at once on a second Ctrl-C."""
        with self._guard:
            self._ending, running = True, list(self._running)
        last = time.monotonic() + PATIENCE_S
        try:
            for child in running:
                child.terminate()
            for child in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, last - time.monotonic()))
        finally:
            for child in running:
                child.kill()  # nothing, for one that has ended


def last_line(log: Path) -> str:
    """What a command said last: its error, if it failed; "" for a file that cannot be read."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return "".join(lines[-1:]).removeprefix("fastarat: ")
