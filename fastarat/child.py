"""How a process of `fastarat.children` begins: watching its parent first, and the command line after that.

Run as a file, and of the standard library alone: fastarat's own imports take seconds, in which a parent may be killed.
"""

from __future__ import annotations

import os
import runpy
import select
import signal
import sys
import threading
import time

PARTING_S = 2.0
"""Seconds that a child has to write a checkpoint in once its parent is gone."""


def end_with_parent() -> None:
    """Make this process end when standard input does, a pipe that the parent holds open; at once if it is gone already.

    A pipe rather than Linux's PR_SET_PDEATHSIG, which is tied to the thread that forked, and one system's alone.
    """
    pipe = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # nothing else reads from it
    os.close(null)
    if os.name == "posix" and select.select([pipe], [], [], 0)[0]:
        sys.exit(128 + signal.SIGTERM)  # before it writes anything
    threading.Thread(target=_watch, args=(pipe,), daemon=True, name="fastarat-parent").start()


def _watch(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PARTING_S)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


if __name__ == "__main__":
    end_with_parent()
    runpy.run_module("fastarat.cli", run_name="__main__", alter_sys=True)
