"""When a run stops, or is saved, before an epoch's end: signals, and the pace of checkpoints."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from fastarat.errors import UserError

_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_LONGEST = 366 * 24 * 3600.0


APART_S = 1.0
"""Seconds between two signals that are a person's two."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run, and what it has done is kept. signum: which. exit_code: as shells have it."""

    def __init__(self, text: str, signum: int = signal.SIGINT) -> None:
        super().__init__(text, signum)
        self.signum = signum

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


class Signals:
    """SIGINT, SIGTERM and SIGHUP while a block runs: the first is noted, for the run to end where nothing is lost.

    A second one, APART_S later or more, raises Interrupted at once, and so does the first within `at_once`. Whoever
    ends on one calls `end`. As a context it puts the handlers back at its end; outside the main thread, for a signal
    that is ignored (nohup's SIGHUP) or one that a handler outside Python has, it changes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._raises = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                signum = getattr(signal, name, None)  # no SIGHUP on Windows
                if signum is not None and signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if kind is None and self.received is not None:  # it came too late to be looked at
            self.end("when all was done")

    def _note(self, signum: int, frame: object) -> None:
        # A closing terminal, and who ends a whole group, send the same one twice within moments: that is one.
        now = time.monotonic()
        again = self.received is not None and now - self._since >= APART_S
        if self.received is None:
            self._since = now
        self.received = signum
        if again or self._raises:
            raise Interrupted(f"ended at once by a second {self.name}; the last checkpoint stands", signum)

    @property
    def name(self) -> str:
        """Of the signal received."""
        return "" if self.received is None else signal.Signals(self.received).name

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal, or one noted before, raise Interrupted within the block: where nothing can be half done."""
        self._raises = True
        try:
            if self.received is not None:
                raise Interrupted(f"ended by {self.name}", self.received)
            yield
        finally:
            self._raises = False

    def end(self, text: str) -> NoReturn:
        """End on the signal received: by its handler before this block, if that raises, or else by Interrupted.

        text: where, and what is kept.
        """
        assert self.received is not None
        signum = self.received
        before = self._before.get(signum)
        if callable(before) and before is not signal.default_int_handler:
            before(signum, None)
        raise Interrupted(f"ended by {self.name} {text}", signum)


class Pace:
    """How often something is due: every so many steps, or so much time by a clock that nobody sets.

    every: "500" (steps), "90s", "10min", "2h"; None: never. Raises: UserError for anything else.
    """

    def __init__(self, every: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self.seconds = _parsed(every) if every is not None else (0, 0.0)
        self._clock, self._since, self._last = clock, 0, clock()

    def due(self) -> bool:
        """Count a step, and say whether it is time; then the count starts anew."""
        self._since += 1
        if self.steps:
            due = self._since >= self.steps
        else:
            due = bool(self.seconds) and self._clock() - self._last >= self.seconds
        if due:
            self.restart()
        return due

    def restart(self) -> None:
        """Begin to count anew, after something was written for another reason."""
        self._since, self._last = 0, self._clock()


def _parsed(every: str) -> tuple[int, float]:
    """Return steps, or seconds; the other one is 0."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?([a-z]*)", every.strip().lower(), re.ASCII)
    if found:
        number, unit = found[1], found[2]
        if not unit and number.isdigit() and int(number) >= 1:
            return int(number), 0.0
        if unit in _SECONDS and 1 <= (seconds := float(number) * _SECONDS[unit]) <= _LONGEST:
            return 0, seconds
    raise UserError(
        f"checkpoint_every={every[:50]!r}: expected a number of steps, such as 500, or a time of at least a second, "
        "such as 90s, 10min or 2h"
    )
