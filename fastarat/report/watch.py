"""A report that is written again whenever its runs have changed, until they are finished."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastarat.errors import UserError
from fastarat.files import write_text
from fastarat.locks import holder
from fastarat.report.page import refresh_line, report
from fastarat.resuming import finished
from fastarat.runs import Run
from fastarat.texts import printable

_QUIET_S = 300.0  # so long without a change is worth a line


class Abandoned(UserError):
    """A run that nobody trains any more, and that is not finished."""

    exit_code = 1


def watch(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    every: float = 30.0,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write the report of running runs, and again whenever one of them changed, until all are finished.

    Meanwhile the page reloads itself in the browser; the last one does not.

    Args:
        runs, out, options: as in `report`. every: seconds between two looks. progress: print what is done.
    Returns: the path of report.html.
    Raises: UserError for a folder that is no run, or what `report` raises; Abandoned, once the page shows all there is,
        when a run is unfinished and in two looks no process of this machine was training it.
    """
    if not (math.isfinite(every) and every > 0):
        raise UserError(f"--every {every:g}: expected seconds, more than 0")
    paths = [run for path in map(Path, runs) for run in _inside(path)]
    folders = list({path.resolve(): Run(path) for path in paths}.values())
    for run in folders:
        run.must_exist()
    look = _Look(folders, out, every, progress, options)
    try:
        while True:
            look.once()
            if look.over:
                return look.last_page()
            time.sleep(every)
    except KeyboardInterrupt:
        if look.page is not None:  # it would reload itself for ever
            text = look.page.read_text(encoding="utf-8")
            write_text(look.page, text.replace(refresh_line(every), ""))
        raise


def _inside(path: Path) -> list[Path]:
    """A run, or in place of a comparison's folder the runs that have begun in it."""
    inside = sorted(config.parent for config in path.glob("*/config.yaml"))
    return [path] if (path / "config.yaml").is_file() or not inside else inside


class _Look:
    """What was seen of the runs the last time."""

    def __init__(
        self, runs: Sequence[Run], out: str | Path | None, every: float, progress: bool, options: dict[str, Any]
    ) -> None:
        self.runs, self.out, self.every, self.progress, self.options = runs, out, every, progress, options
        self.page: Path | None = None
        self.over, self.alone = False, 0
        self._stamp: object = None
        self._changed = self._told = time.monotonic()
        self._waited = False

    def once(self) -> None:
        """Look at the runs, and write the page where something changed."""
        open_ = [run for run in self.runs if not finished(run)]
        self.alone = self.alone + 1 if open_ and not any(holder(run.path) for run in open_) else 0
        missing = [run for run in self.runs if not _has_epoch(run)]
        stamp = [_stamp(run) for run in self.runs]
        if missing:
            if not self._waited:
                self._say(f"waiting for the first epoch of {_names(missing)}")
            self._waited = True
        elif open_ and stamp != self._stamp:
            self._write(refresh_s=self.every)
        if stamp != self._stamp:
            self._stamp, self._changed, self._told = stamp, time.monotonic(), time.monotonic()
        elif open_ and time.monotonic() - self._told >= _QUIET_S:
            self._told = time.monotonic()
            self._say(f"nothing has changed for {(self._told - self._changed) / 60:.0f} min")
        if self.alone >= 2:
            if not missing:
                self._write()
            first = open_[0]
            raise Abandoned(
                f"{_names(open_)}: not finished, and no process is training it: fastarat train --resume "
                f"{shlex.quote(str(first.path))} goes on" + ("; the page shows what there is" if self.page else "")
            )
        self.over = not open_

    def last_page(self) -> Path:
        return self._write()

    def _write(self, **refresh: float) -> Path:
        self.page = report([run.path for run in self.runs], self.out, **refresh, **self.options)
        epochs = ", ".join(f"{printable(run.path.name)} epoch {run.metrics()[-1]['epoch']}" for run in self.runs)
        self._say(f"wrote {self.page} ({epochs})")
        return self.page

    def _say(self, text: str) -> None:
        if self.progress:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _has_epoch(run: Run) -> bool:
    # The line of an epoch is written before its weights.
    return bool(run.metrics()) and run.weights().is_file()


def _stamp(run: Run) -> list[tuple[str, int]]:
    files = [run.metrics_file, run.weights(), *run.path.glob("eval*.json")]
    return [(file.name, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(printable(str(run.path)) for run in runs)
