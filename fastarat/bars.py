"""Progress for a pipe or a log file: now and then a line."""

from __future__ import annotations

import sys
import time
from typing import IO, Any

from tqdm import tqdm as plain_tqdm
from tqdm.auto import tqdm


class LineBar(plain_tqdm):
    """A progress bar that writes a line at most every `EVERY_S` seconds, and none before that; to stderr by default."""

    EVERY_S = 10.0

    def __init__(self, file: IO[str] | None = None, **options: Any) -> None:
        self._said, self._file = time.monotonic(), file or sys.stderr
        # Fixed, because the adaptive number of ticks between looks at the clock would outlast a member's slow part.
        super().__init__(**options, disable=False, mininterval=min(1.0, self.EVERY_S), miniters=1, file=self._file)

    def line(self) -> str:
        """Return what is to be said now."""
        return str(self)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the line, where one is due."""
        now = time.monotonic()
        if msg == "" or now - self._said < self.EVERY_S:
            return False
        self._said = now
        print(self.line(), file=self._file, flush=True)
        return True

    def clear(self, *args: Any, **options: Any) -> None:
        """Leave a line that is written: there is no bar to wipe away, for another's line say."""

    def close(self) -> None:
        """End without the escape sequences that clear a bar on a terminal."""
        self.leave = False
        self.display = lambda *args, **options: False  # type: ignore[method-assign]
        super().close()


class StepLines(LineBar):
    """The steps of a training: epoch 3/30: step 120/390, loss 1.230, 812 images/s, 4 min left.

    first: the epoch that `total` is counted from. epochs: the last one. steps: of an epoch.
    """

    def __init__(self, *, first: int, epochs: int, steps: int, **options: Any) -> None:
        self._first, self._epochs, self._steps, self._told = first, epochs, max(1, steps), dict[str, Any]()
        super().__init__(file=sys.stdout, **options)

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **more: Any) -> None:
        """Note what to say of the last steps."""
        self._told = {**(ordered_dict or {}), **more}

    def line(self) -> str:
        """Return the line."""
        before = max(0, int(self.n) - 1) // self._steps
        told = dict(self._told)
        rate = told.pop("images/s", None)
        parts = [
            f"step {int(self.n) - before * self._steps}/{self._steps}",
            *(f"{name.replace('_acc', '')} {v}" for name, v in told.items()),
        ]
        parts += [] if rate is None else [f"{rate} images/s"]
        done, elapsed = self.n - self.initial, self.format_dict["elapsed"]
        if done > 0:
            parts.append(f"{_in_words(elapsed / done * (self.total - self.n))} left")
        return f"epoch {self._first + before}/{self._epochs}: {', '.join(parts)}"


def step_bar(progress: bool, *, first: int, epochs: int, steps: int, initial: int) -> plain_tqdm:
    """Return the progress bar of a training: moving on a terminal, elsewhere a line every 10 seconds, on stdout.

    first: the epoch that is next. initial: its steps that are done. steps: of an epoch.
    """
    options = {"total": max(0, (epochs - first + 1) * steps), "initial": initial, "unit": "step", "smoothing": 0.05}
    if progress and not sys.stderr.isatty():
        return StepLines(first=first, epochs=epochs, steps=steps, **options)
    return tqdm(**options, disable=not progress)


def _in_words(seconds: float) -> str:
    """The time that is left, as exactly as it is known."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
