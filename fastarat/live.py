"""What a comparison is doing and how long it will take: a table redrawn in place on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import heapq
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastarat.bench.bench import forwards_of
from fastarat.children import last_line
from fastarat.files import parse_json
from fastarat.plans import Failure, Plan
from fastarat.texts import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LINE_S = 10.0
"""Seconds between two lines where no table can be redrawn."""
REDRAW_S = 1.0
"""Seconds between two looks at the runs' files, and drawings of the table."""

# Waiting to be trained, ..., trained and waiting to be evaluated, evaluated; kept: by an earlier call, all of it.
_OPEN = ("waiting", "training", "trained", "evaluating")
_FAILED = ("failed", "diverged")
_COLUMNS = ("run", "state", "clean", "robust", "images/s", "left")


class Left(NamedTuple):
    """Time that is left. seconds: what is known of it. exact: False where something cannot be estimated yet."""

    seconds: float
    exact: bool = True

    def __str__(self) -> str:
        if not self.exact and not self.seconds:
            return "time left unknown yet"
        return f"{'about' if self.exact else 'at least'} {duration(self.seconds)} left"


class Seen(NamedTuple):
    """What a run's files say. epochs: finished. at: wall clock of the last one. epoch_s: its steps' seconds, median."""

    epochs: int = 0
    at: float = 0.0
    epoch_s: float | None = None
    images_per_s: float | None = None
    clean: float | None = None
    robust: float | None = None


@dataclass
class _Line:
    plan: Plan
    phase: str = "waiting"
    why: str = ""
    since: float = 0.0  # wall clock at which the phase began
    before: int = 0  # epochs that were finished when this call began to train
    tested: bool = False
    took: float | None = None  # seconds of the evaluation
    first: tuple[int, float] | None = None  # epochs and wall clock when one of this call was first seen finished
    pace: float | None = None  # seconds per epoch of this call, what lies between epochs included
    begin_s: float | None = None  # seconds before the first step: a process starts, data are read
    seen: Seen = field(default_factory=lambda: Seen())
    stamp: tuple[int, int] | None = None


class Board:
    """The runs of a comparison and where each of them is, by their names. Called from several threads.

    at_once: trainings, and evaluations, at a time. more: whether runs will be added that nobody knows of yet.
    """

    def __init__(self, at_once: int = 1, clock: Callable[[], float] = time.time) -> None:
        self.at_once, self.more = at_once, False
        self._clock, self._lines, self._guard = clock, dict[str, _Line](), threading.RLock()

    def expect(self, plans: Sequence[Plan], *, tested: bool) -> None:
        """Add runs that will be trained, and evaluated where `tested`."""
        with self._guard:
            for plan in plans:
                line = self._lines.setdefault(plan.name, _Line(plan))
                line.tested |= tested

    def set(self, plan: Plan, phase: str, why: str = "") -> None:
        """Put a run into "training", "trained", "evaluating", "done", "kept" (evaluated earlier), "failed" ..."""
        with self._guard:
            line, now = self._lines.setdefault(plan.name, _Line(plan)), self._clock()
            self._look(line)
            if phase == "training":
                line.before = line.seen.epochs
            if line.phase == "evaluating" and phase == "done":
                line.took = now - line.since
            if line.phase == "waiting" and phase == "trained":  # nothing was left to train
                line.before = line.seen.epochs
            line.phase, line.why, line.since = phase, why, now

    def ended(self, plan: Plan, failure: Failure | None) -> None:
        """Note how a training ended."""
        phase = "trained" if failure is None else "diverged" if failure.diverged else "failed"
        self.set(plan, phase, failure.why if failure else "")

    def refresh(self) -> None:
        """Look at the files of the runs in progress."""
        with self._guard:
            for line in self._lines.values():
                if line.phase == "training" or line.stamp is None:
                    self._look(line)

    def _look(self, line: _Line) -> None:
        file = line.plan.run.metrics_file
        try:
            found = file.stat()
            if line.stamp != (found.st_mtime_ns, found.st_size):
                line.stamp, line.seen = (found.st_mtime_ns, found.st_size), _seen(line.plan, found.st_mtime)
        except OSError:  # none yet
            return
        seen, here = line.seen, line.seen.epochs - line.before
        if line.phase != "training" or here < 1 or seen.epoch_s is None:
            return
        if line.first is None:
            line.first, line.pace = (seen.epochs, seen.at), seen.epoch_s
            line.begin_s = max(0.0, seen.at - line.since - here * seen.epoch_s)
        elif seen.epochs > line.first[0]:
            line.pace = (seen.at - line.first[1]) / (seen.epochs - line.first[0])

    # --- how long it takes

    def pace_of(self, plan: Plan) -> float | None:
        """Seconds per epoch: the run's own so far, or its defense's, or another's by their forwards per image; None."""
        own = self._lines[plan.name]
        # What this call timed counts; what earlier calls wrote down is the steps' time alone, and better than nothing.
        for of in (lambda line: line.pace, lambda line: line.seen.epoch_s):
            timed = {name: pace for name, line in self._lines.items() if (pace := of(line)) is not None}
            if own.plan.name in timed:
                return timed[own.plan.name]
            alike = [pace for name, pace in timed.items() if self._lines[name].plan.defense == own.plan.defense]
            if alike:
                return statistics.fmean(alike)
            if timed:
                each = [pace / forwards_of(self._lines[name].plan.config) for name, pace in timed.items()]
                return statistics.fmean(each) * forwards_of(own.plan.config)
        return None

    def training_left(self, plan: Plan) -> float | None:
        """Seconds until a run is trained, once it is its turn; None where nothing is known."""
        line, pace = self._lines[plan.name], self.pace_of(plan)
        if pace is None or line.phase not in _OPEN[:2]:
            return None if line.phase in _OPEN[:2] else 0.0
        epochs = max(0, (plan.config.epochs or 0) - line.seen.epochs)
        begins = [other.begin_s for other in self._lines.values() if other.begin_s is not None]
        begin_s = statistics.fmean(begins) if begins else 0.0
        if line.phase == "waiting":
            return begin_s + epochs * pace
        if line.first is None:
            return max(0.0, begin_s + epochs * pace - (self._clock() - line.since))
        # Of the epoch that runs, at most one epoch's time has passed.
        passed = min(pace, self._clock() - max(line.since, line.seen.at))
        return max(0.0, epochs * pace - passed)

    def evaluation_left(self, plan: Plan) -> float | None:
        """Seconds of evaluation that are left, once it is the run's turn; None where none was finished yet."""
        line = self._lines[plan.name]
        if not line.tested or line.phase not in _OPEN:
            return 0.0
        known = [other.took for other in self._lines.values() if other.took is not None]
        if not known:
            return None
        passed = self._clock() - line.since if line.phase == "evaluating" else 0.0
        return max(0.0, statistics.fmean(known) - passed)

    def left(self) -> Left:
        """The time that all runs take together: trainings that others start from, the other ones, evaluations."""
        with self._guard:
            # As the runner does it: one after another, each with all its runs `at_once` at a time.
            lines = [line for line in self._lines.values() if line.phase in _OPEN]
            lines.sort(key=lambda line: line.phase not in ("training", "evaluating"))
            waves = [
                [self.training_left(line.plan) for line in lines if (line.plan.needs is not None) == wave]
                for wave in (False, True)
            ]
            waves.append([self.evaluation_left(line.plan) for line in lines])
            exact = not self.more and all(time_s is not None for wave in waves for time_s in wave)
            return Left(sum(makespan([t or 0.0 for t in wave], self.at_once) for wave in waves), exact)

    # --- in words

    def heading(self, plan: Plan) -> str:
        """A run's name and its place among all: `at-seed0 (run 3 of 12, about 14 min left for all)`."""
        with self._guard:
            self.refresh()
            place = list(self._lines).index(plan.name) + 1
            return f"{printable(plan.name)} (run {place} of {len(self._lines)}, {self.left()} for all)"

    def line(self) -> str:
        """What is going on, in one line; "" where nothing runs."""
        with self._guard:
            self.refresh()
            lines = list(self._lines.values())
            running = [line for line in lines if line.phase in ("training", "evaluating")]
            if not running:
                return ""
            told = [f"{printable(line.plan.name)} {self._state(line)}" for line in running[:3]]
            told += [f"and {len(running) - 3} more"] * (len(running) > 3)
            return f"{self._counts()}; {', '.join(told)}; {self.left()}"

    def table(self, most: int = 10**6) -> tuple[list[tuple[str, ...]], str]:
        """Rows of run, state, clean and robust validation accuracy, images/s, time left; and a line about all runs.

        most: rows. Where there are more runs those that run come first, and the last row counts what is left out.
        """
        with self._guard:
            self.refresh()
            lines = list(self._lines.values())
            first = sorted(lines, key=lambda line: _URGENCY.get(line.phase, 9))
            shown = lines if len(lines) <= most else first[: max(0, most - 1)]
            rows = [self._row(line) for line in lines if any(line is other for other in shown)]
            if len(shown) < len(lines):
                rows.append((f"and {len(lines) - len(shown)} more", *[""] * (len(_COLUMNS) - 1)))
            still = any(line.phase in _OPEN[:2] or (line.tested and line.phase in _OPEN) for line in lines)
            return rows, f"{self._counts()}; {self.left()}" if still or self.more else self._counts()

    def _counts(self) -> str:
        lines = list(self._lines.values())
        trained, evaluated, failed = (
            sum(line.phase in phases for line in lines)
            for phases in (("trained", "evaluating", "done", "kept"), ("done", "kept"), _FAILED)
        )
        text = f"{trained} of {len(lines)} runs trained"
        return text + f", {evaluated} evaluated" * bool(evaluated) + f", {failed} failed" * bool(failed)

    def _row(self, line: _Line) -> tuple[str, ...]:
        seen = line.seen
        left = {"training": self.training_left, "evaluating": self.evaluation_left}.get(line.phase)
        seconds = left(line.plan) if left else None
        return (
            printable(line.plan.name),
            self._state(line),
            "" if seen.clean is None else f"{seen.clean:.1%}",
            "" if seen.robust is None else f"{seen.robust:.1%}",
            f"{seen.images_per_s:,.0f}" if line.phase == "training" and seen.images_per_s is not None else "",
            "" if left is None else "?" if seconds is None else duration(seconds),
        )

    def _state(self, line: _Line) -> str:
        epochs = line.plan.config.epochs or 0
        if line.phase == "training":
            begun = line.seen.epochs + 1
            return f"epoch {begun} of {epochs}" if begun <= epochs else "ending"
        if line.phase == "evaluating":
            return f"evaluating {_evaluating(line.plan, line.since)}".rstrip()
        if line.phase in _FAILED:
            return f"{line.phase}: {printable(line.why)}"
        return {"kept": "finished before", "trained": "trained" if line.tested else "done"}.get(line.phase, line.phase)


_URGENCY = {"training": 0, "evaluating": 0, "failed": 1, "diverged": 1, "waiting": 2, "trained": 3}


def duration(seconds: float) -> str:
    """Seconds in words as rough as an estimate is: `45 s`, `14 min`, `2 h 05 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def makespan(times: Sequence[float], at_once: int) -> float:
    """How long jobs of `times` seconds take, each begun in this order as soon as one of `at_once` places is free."""
    ends = [0.0] * at_once
    for time_s in times:
        heapq.heappush(ends, heapq.heappop(ends) + time_s)
    return max(ends)


def _seen(plan: Plan, at: float) -> Seen:
    rows = plan.run.metrics()
    if not rows:
        return Seen()
    walls = [row["wall_s"] for row in rows if "wall_s" in row]
    found: dict[str, float] = {}
    for row in rows:  # validation may be every few epochs: the latest there is
        found |= {"clean": row["val/clean_acc"]} if "val/clean_acc" in row else {}
        robust = [value for key, value in row.items() if key.startswith("val/robust_acc_pgd")]
        found |= {"robust": robust[0]} if robust else {}
    return Seen(
        epochs=rows[-1]["epoch"],
        at=at,
        epoch_s=statistics.median(walls) if walls else None,
        images_per_s=rows[-1].get("images_per_s"),
        **found,
    )


def _evaluating(plan: Plan, since: float) -> str:
    """Where an evaluation that began at `since` is, as AutoAttack's state or its log tell; "" where neither does."""
    try:
        # A second's tolerance: some file systems keep times no finer.
        states = [(f.stat().st_mtime, f) for f in plan.run.state_dir.glob("*.json") if f.stat().st_mtime >= since - 1]
        if states:
            return _autoattack(max(states)[1])
        if plan.eval_log.stat().st_mtime >= since - 1:
            text = last_line(plan.eval_log)
            return "" if text.startswith("saved: ") else printable(text)  # its last words
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # as somebody else wrote it
        pass
    return ""


def _autoattack(state_file: Path) -> str:
    name = state_file.stem.rpartition("-")[0] or state_file.stem
    state = parse_json(state_file.read_bytes())
    left = [member for member in state["fingerprint"]["members"] if member not in state["done"]]
    if not left:
        return name
    pending = state["pending"]
    return f"{name} {left[0]}" + (f", {len(pending)} images left" if pending else "")


@contextlib.contextmanager
def shown(board: Board, *, drawn: bool) -> Iterator[None]:
    """Say what `board` does while the block runs; what is printed meanwhile stands above.

    A table of all runs on a terminal, where `drawn`; lines on stdout where that is none. Terminal and streams are as
    they were at the end, and an output that cannot be written ends the saying, not the block.
    """
    with contextlib.ExitStack() as stack:
        if not _is_terminal():
            stack.enter_context(_ticking(lambda: _say(board), LINE_S))
        elif drawn:
            stack.enter_context(_drawn(board))
        yield


def _is_terminal() -> bool:
    # Both: the table is one stream's and would be written over by what the other says on the same screen.
    return all(stream is not None and not stream.closed and stream.isatty() for stream in (sys.stdout, sys.stderr))


def _say(board: Board) -> None:
    if text := board.line():
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@contextlib.contextmanager
def _drawn(board: Board) -> Iterator[None]:
    # Imported where there is a terminal: nothing else needs it.
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        with _ticking(lambda: _say(board), LINE_S):
            yield
        return
    live = Live(get_renderable=lambda: render(board, console), console=console, auto_refresh=False)
    live.start(refresh=True)
    try:
        with _ticking(live.refresh, REDRAW_S):
            yield
    finally:
        with contextlib.suppress(OSError):  # the terminal may be gone, and what ended the block is what counts
            live.stop()


def render(board: Board, console: Console) -> Table:
    """The table as wide and high as the terminal is now; what does not fit is left out, the least telling first."""
    from rich.table import Table
    from rich.text import Text

    width, height = console.size
    columns = [0, 1, *([2, 3] if width >= 60 else []), *([4] if width >= 90 else []), *([5] if width >= 45 else [])]
    rows, text = board.table(most=max(1, height - 4))
    table = Table(
        box=None, caption=Text(text, no_wrap=True, overflow="ellipsis"), caption_justify="left", pad_edge=False
    )
    for number in columns:
        side = "left" if number < 2 else "right"
        table.add_column(_COLUMNS[number], justify=side, no_wrap=True, overflow="ellipsis", min_width=4)
    for row in rows:
        bad = row[1].startswith(_FAILED)
        table.add_row(*(Text(row[n], style="red" if bad and n == 1 else "") for n in columns))
    return table


@contextlib.contextmanager
def _ticking(tick: Callable[[], None], every: float) -> Iterator[None]:
    """Call `tick` every so many seconds, in a thread, until the block ends or nothing can be written any more."""
    over = threading.Event()

    def run() -> None:
        with contextlib.suppress(OSError, ValueError, SystemExit):
            while not over.wait(every):
                tick()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2)  # whoever reads a pipe may have stopped reading: the end does not wait for them
