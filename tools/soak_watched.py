"""The training that `tools/soak.py` watches for as long as it runs, and what both parts of the soak note down."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastarat
from fastarat.errors import UserError
from fastarat.files import load_checkpoint

LEAST_SLOPE = 3.0  # MB per 100 epochs: what must be ruled out. The growth that was found and mended was 227.
WARM_UP = 0.25  # of the watched time: caches fill, the allocator finds its size
TOKEN = "FASTARAT_SOAK"


def fastarat_command(*argv: str | Path) -> list[str]:
    return [sys.executable, "-m", "fastarat", *map(str, argv)]


def environment(token: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", TOKEN: token}


def place_of(folder: Path) -> tuple[int, int]:
    """How far a run is kept: whole epochs, and steps of the next."""
    places = [(0, 0)]
    for name in ("last.pt", "unfinished.pt"):
        if (folder / name).is_file():
            kept = load_checkpoint(folder / name)
            places.append((kept["epoch"], kept.get("within", {}).get("steps", 0)))
    return max(places)


def promised_in(said: str) -> tuple[int, int] | None:
    """The place, as `place_of` has it, that a run ended by a signal said it keeps; None where it said nothing."""
    told = re.search(r"after (?:step (\d+) of \d+ in )?epoch (\d+) of \d+; nothing is lost", said)
    if told is None:
        return None
    return (int(told[2]) - 1, int(told[1])) if told[1] else (int(told[2]), 0)


@dataclass
class Found:
    """What was seen. violations: in words, none if all is well."""

    seed: int
    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    by_scenario: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.violations.append(text)
            print(f"VIOLATION: {text}", flush=True)


class Watched:
    """A training that is measured from outside until it is ended."""

    def __init__(self, folder: Path) -> None:
        self.run, self.log = folder / "watched", folder / "watched.log"
        data = self._data(folder)
        argv = [
            "train", "--dataset", data, "--model", "resnet-small", "--limit-train", "320", "--batch-size", "32",
            "--epochs", "100000", "--optim.recipe", "constant", "--optim.lr", "0.01", "--attack.num-steps", "1",
            "--attack.epsilon", "0.1", "--eval.num-steps", "1", "--eval.val-images", "40", "--swa",
            "--swa-config.start", "0", "--swa-config.every", "10", "--ema", "0.99", "--threads", "1",
            "--checkpoint-every", "7", "--out", self.run,
        ]  # fmt: skip
        if data != "digits":
            argv += ["--loader", "ffcv"]
        self.loader = "resident" if data == "digits" else "ffcv"
        self.samples: list[dict[str, float]] = []
        self.sizes: list[dict[str, int]] = []
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                fastarat_command(*argv), env=environment("watched"), stdout=file, stderr=file, start_new_session=True
            )

    @staticmethod
    def _data(folder: Path) -> str:
        try:
            fastarat.data.beton.ffcv_parts()
        except UserError:
            return "digits"
        return str(fastarat.data.prepare("digits", folder / "digits", data_dir=folder / "data"))

    def sample(self) -> None:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        metrics = self.run / "metrics.jsonl"
        epochs = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if not epochs:
            return
        self.samples.append({
            "epoch": epochs,
            "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
            "anonymous_mb": int(status["RssAnon"].split()[0]) / 1024,
            "files": len(os.listdir(f"/proc/{self.process.pid}/fd")),
            "threads": int(status["Threads"]),
        })  # fmt: skip
        with contextlib.suppress(FileNotFoundError):  # replaced this moment
            self.sizes.append({p.name: p.stat().st_size for p in self.run.iterdir() if p.is_file()})

    def end(self, found: Found, least_slope: float) -> dict[str, Any]:
        """End it by SIGTERM, and say what it held."""
        alive = self.process.poll() is None
        found.expect(alive, f"the watched training ended by itself: {self.log.read_text()[-500:]}")
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        found.expect(code == 143, f"the watched training: exit code {code} after SIGTERM")
        # It may have ended just after an epoch's last step, which leaves last.pt alone.
        kept, promised = place_of(self.run), promised_in(self.log.read_text())
        found.expect(not alive or kept == promised, f"the watched training said it kept {promised}, and kept {kept}")
        steady = self.samples[int(WARM_UP * len(self.samples)) :]
        if len(steady) < 10:
            found.expect(False, f"the watched training was seen {len(steady)} times only: more minutes are needed")
            return {}
        slope, error = slope_of([(s["epoch"], s["rss_mb"]) for s in steady])
        rise = f"{slope:.2f} ± {error:.2f} MB per 100 epochs"
        found.expect(slope + 2 * error < least_slope, f"a growth of memory is not ruled out: {rise}")
        result: dict[str, Any] = {
            "loader": self.loader,
            "epochs": steady[-1]["epoch"],
            "rss_mb": [steady[0]["rss_mb"], steady[-1]["rss_mb"]],
            "mb_per_100_epochs": [slope, error],
        }
        for what in ("files", "threads"):
            seen = [s[what] for s in steady]
            result[what] = [min(seen), max(seen)]
            ends = [sorted(part)[len(part) // 2] for part in (seen[: len(seen) // 3], seen[-len(seen) // 3 :])]
            found.expect(
                ends[1] <= ends[0] + 1, f"open {what} of the watched training rise from {ends[0]} to {ends[1]}"
            )
        first, last = self.sizes[int(WARM_UP * len(self.sizes))], self.sizes[-1]
        for name in ("last.pt", "last.safetensors", "best.pt", "ema.safetensors"):
            if name in first:
                found.expect(
                    abs(last[name] - first[name]) < 4096, f"{name} grew from {first[name]} to {last[name]} bytes"
                )
        rows = (last["metrics.jsonl"] - first["metrics.jsonl"]) / max(1, steady[-1]["epoch"] - steady[0]["epoch"])
        found.expect(rows < 1000, f"metrics.jsonl grows by {rows:.0f} bytes an epoch")
        return {**result, "last_pt_bytes": [first["last.pt"], last["last.pt"]], "metrics_bytes_per_epoch": rows}


def slope_of(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return MB per 100 epochs by least squares, and its standard error."""
    # Of ten blocks' means: neighbouring samples are not independent.
    blocks = [block for block in np.array_split(np.array(points), 10) if len(block)]
    x, y = np.array([block.mean(0) for block in blocks]).T
    if x[-1] == x[0]:
        return 0.0, math.inf
    x = x - x.mean()
    slope = (x * y).sum() / (x * x).sum()
    rest = y - y.mean() - slope * x
    error = math.sqrt((rest**2).sum() / max(1, len(x) - 2) / (x * x).sum())
    return 100 * slope, 100 * error


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[Watched]:
    """A watched training, looked at once a second."""
    watched, done = Watched(folder), threading.Event()

    def look() -> None:
        while not done.wait(1.0):
            with contextlib.suppress(OSError, KeyError):  # it is just beginning, or just ended
                watched.sample()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        done.set()
        thread.join()
        if watched.process.poll() is None:
            watched.process.kill()
