"""Feed the readers of files damaged and hostile inputs: python tools/fuzz.py [READER ...] --minutes 10.

An input is accepted, or refused with a UserError, within seconds of the processor's time and MEGABYTES of memory. All
else is a finding: another exception, a crash, a hang, a file outside its folder, a process, a connection, a pickled
class. Findings are saved with their input, and an input in the corpus is tried first in every run. Guided by coverage
where atheris is installed; else by the texts of the errors: inputs whose answer is new are kept and changed further.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("config", "checkpoint", "safetensors", "archive", "beton", "metrics")
MEGABYTES = 700
HANGS = 60.0
"""Seconds without an input finished after which a reader is taken to hang, for ever."""
_LARGEST = 1 << 20  # bytes of an input


HEADING = "| reader | minutes | inputs | per second | edges covered | findings |\n| --- |" + " ---: |" * 4 + " --- |"

_FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.find_class",
)  # fmt: skip
_WRITING = (
    "os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown",
)  # fmt: skip


class Guard:
    """Hears by Python's audit events, while it is armed, of what no file may cause, and remembers the first.

    may: events that a reader causes by itself.
    """

    def __init__(self, folder: Path, may: Sequence[str] = ()) -> None:
        self.folder, self.may = f"{folder.resolve()}/", may
        self.armed, self.heard = False, ""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed or event in self.may:
            return
        if event in _FORBIDDEN:
            self._tell(f"{event} {args[0]!r}")
        elif event in _WRITING:
            # Of a link the second is what is made; what it points to may lie anywhere.
            self._look(
                event, *{"os.rename": args[:2], "os.link": args[1:2], "os.symlink": args[1:2]}.get(event, args[:1])
            )
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._look(event, args[0])

    def _look(self, event: str, *paths: Any) -> None:
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                # Opening follows a link that is there already.
                whole = os.path.abspath(os.fsdecode(path))
                place = os.path.dirname(os.path.realpath(whole) if event == "open" else whole)
                place = os.path.realpath(place)
                if (
                    not f"{place}/".startswith(self.folder)
                    and not place.startswith("/dev")
                    and f"{whole}/" != self.folder
                ):
                    self._tell(f"{event} outside its folder: {os.fsdecode(path)!r}")

    def _tell(self, what: str) -> None:
        self.armed, self.heard = False, what
        raise AssertionError(what)


class Watched:
    """One reader and what its inputs led to. into: gets findings/, current (the input in hand) and stats.json."""

    def __init__(self, name: str, into: Path, folder: Path) -> None:
        from fuzz_readers import READERS

        self.into, self.name = into, name
        self.reader = READERS[name](folder)
        self.guard = Guard(folder, self.reader.may)
        self.inputs = self.refused = 0
        self.answers: set[str] = set()
        self.findings: set[str] = set()
        self.began = self.told = time.monotonic()
        (into / "findings").mkdir(parents=True, exist_ok=True)

    def one(self, data: bytes) -> bool:
        """Read an input. Returns: whether its answer is new."""
        from fastarat.errors import UserError

        (self.into / "current").write_bytes(data)
        memory, began, answer = _memory("VmRSS"), time.process_time(), "accepted"
        _forget_peak()
        self.guard.armed, self.guard.heard = True, ""
        try:
            try:
                self.reader.read(data)
            finally:
                self.guard.armed = False
        except UserError as error:
            self.refused += 1
            answer = re.sub(r"'.*?'|\".*?\"|\d+|/\S+", "", str(error))[:120]
            if "Traceback" in str(error) or len(str(error)) > 2000:
                self._found(data, "long text", str(error))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            self._found(
                data, f"{type(error).__name__} {Path(frame.filename).name}:{frame.name}", traceback.format_exc()
            )
        if self.guard.heard:  # whatever became of its exception
            self._found(data, self.guard.heard.split(":")[0], self.guard.heard)
        took, grew = time.process_time() - began, _memory("VmHWM") - memory
        if self.inputs and took > self.reader.seconds:  # the first one imports and compiles
            self._found(data, "slow " + answer, f"{took:.1f} s of processor time")
        if grew > MEGABYTES:
            self._found(data, "large " + answer, f"{grew:.0f} MB")
        self.inputs += 1
        new = answer not in self.answers
        self.answers.add(answer)
        if time.monotonic() - self.told > 1:
            self.tell()
        return new

    def _found(self, data: bytes, what: str, details: str) -> None:
        if what not in self.findings:
            self.findings.add(what)
            save_finding(self.into, self.name, data, what, details)

    def tell(self) -> None:
        self.told = time.monotonic()
        told = {"inputs": self.inputs, "refused": self.refused, "answers": len(self.answers)}
        (partial := self.into / "stats.partial").write_text(json.dumps(told | {"seconds": self.told - self.began}))
        partial.replace(self.into / "stats.json")


def save_finding(into: Path, name: str, data: bytes, what: str, details: str) -> None:
    stem = f"{name}-{hashlib.sha256(data).hexdigest()[:10]}"
    (into / "findings" / stem).write_bytes(data)
    (into / "findings" / f"{stem}.txt").write_text(f"{what}\n{details}\n", errors="backslashreplace")


def _memory(entry: str) -> float:
    """MB of this process, by the name of the entry in /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(entry))
    except (OSError, StopIteration):
        return 0.0


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def own_engine(watched: Watched, corpus: Sequence[bytes], seconds: float, seed: int, count: int | None) -> None:
    """Read the corpus, then changed inputs of it, for so many seconds, or `count` inputs if that is less."""
    rng, pool, ends = random.Random(seed), list(corpus), time.monotonic() + seconds
    for data in corpus:
        watched.one(data)
    done = 0
    while time.monotonic() < ends and (count is None or done < count):
        data = watched.reader.mutate(rng.choice(pool), rng)[:_LARGEST]
        done += 1
        if watched.one(data) and len(pool) < 2000:
            pool.append(data)


def atheris_engine(watched: Watched, atheris: Any, corpus: Sequence[bytes], seconds: float, seed: int) -> None:
    """The same, guided by the coverage of Python's bytecode. Ends the process."""
    started, kept = watched.into / "started", watched.into / "kept"
    for folder in (started, kept):
        folder.mkdir(exist_ok=True)
    for data in corpus:
        (started / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = atheris.Mutate(data, most) if rng.random() < 0.3 else watched.reader.mutate(data, rng)
        return changed[:most]

    def one(data: bytes) -> None:
        watched.one(data)

    flags = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-seed={seed + 1}",
        f"-max_len={_LARGEST}",
        "-rss_limit_mb=8000",
    ]
    flags += [f"-timeout={round(HANGS)}", "-detect_leaks=0", f"-artifact_prefix={watched.into}/"]
    atheris.Setup([sys.argv[0], *flags, str(kept), str(started)], one, custom_mutator=mutate)
    atheris.Fuzz()


def work(name: str, into: Path, corpus: Path, seconds: float, seed: int, engine: str, count: int | None) -> None:
    """What the worker process does: it may die of an input."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    torch.set_num_threads(1)
    atheris: Any = None
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["fastarat", "yaml"]):
            import fuzz_readers  # noqa: F401
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        (private := Path(folder) / name).mkdir()
        into, corpus = into.resolve(), corpus.resolve()
        os.chdir(private)  # whatever is relative lies in it
        watched = Watched(name, into, private)
        inputs = [path.read_bytes() for path in sorted((corpus / name).glob("*"))] + watched.reader.seeds()
        if atheris is None:
            own_engine(watched, inputs, seconds, seed, count)
            watched.tell()
        else:
            atheris_engine(watched, atheris, inputs, seconds, seed)


def fuzz(
    name: str, into: Path, corpus: Path, seconds: float, *, seed: int = 0, engine: str = "own", count: int | None = None
) -> dict[str, Any]:
    """Fuzz one reader in a process of its own, started again where an input kills it. Returns: what came of it."""
    into.mkdir(parents=True, exist_ok=True)
    total, inputs, answers, edges, began = seconds, 0, 0, 0, time.monotonic()
    for again in range(20):
        (into / "stats.json").unlink(missing_ok=True)
        log = into / f"log-{again}.txt"
        options = ["--engine", engine, "--seed", str(seed + again), "--corpus", str(corpus), "--out", str(into)]
        options += ["--count", str(count)] if count else []
        command = [sys.executable, str(Path(__file__).resolve()), name, "--worker", str(seconds), *options]
        died = _watch(command, log, into / "current")
        stats = json.loads((into / "stats.json").read_text()) if (into / "stats.json").exists() else {}
        inputs += stats.get("inputs", 0)
        answers = max(answers, stats.get("answers", 0))
        text = log.read_text(errors="replace")
        edges = max([edges, *map(int, re.findall(r"cov: (\d+)", text))])
        if not died:
            break
        data = (into / "current").read_bytes() if (into / "current").exists() else b""
        save_finding(into, name, data, died, text[-4000:])
        seconds = total - (time.monotonic() - began)
        if seconds < 1:
            break
    took = time.monotonic() - began
    findings = sorted(p.read_text().split("\n")[0] for p in (into / "findings").glob("*.txt"))
    return {
        "reader": name, "engine": engine, "inputs": inputs, "seconds": round(took, 1), "answers": answers,
        "per_second": round(inputs / max(took, 1e-9), 1), "edges": edges or None, "findings": findings,
    }  # fmt: skip


def _watch(command: list[str], log: Path, current: Path) -> str:
    """Run the worker. Returns: how it died, "" if it did not."""
    current.unlink(missing_ok=True)
    with open(log, "wb") as file:
        worker = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=_environment())
        try:
            while worker.poll() is None:
                time.sleep(0.2)
                if current.exists() and time.time() - current.stat().st_mtime > HANGS + 30:
                    return f"hangs: nothing finished in {HANGS + 30:.0f} s"
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
    return f"died with exit code {worker.returncode}" if worker.returncode else ""


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def row(result: dict[str, Any]) -> str:
    """A row of the table in docs/reliability.md."""
    edges = f"{result['edges']:,}" if result["edges"] else f"({result['answers']} answers)"
    found = ", ".join(result["findings"]) or "none"
    name, count, minutes = result["reader"], result["inputs"], result["seconds"] / 60
    return f"| {name} | {minutes:.0f} | {count:,} | {result['per_second']:,.0f} | {edges} | {found} |"


def main(argv: Sequence[str] | None = None) -> int:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--minutes", type=float, default=10, help="for each reader")
    parser.add_argument("--corpus", type=Path, default=root / "tests" / "corpus")
    parser.add_argument(
        "--out", type=Path, default=root / "runs" / "fuzz", help="folder of findings, logs and fuzz.json"
    )
    parser.add_argument("--json", type=Path, help="where fuzz.json goes instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("auto", "atheris", "own"), default="auto")
    parser.add_argument("--count", type=int, help="changed inputs at most (engine own)")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.readers) - {*NAMES}
    if unknown:
        parser.error(f"unknown reader {sorted(unknown)[0]}: expected some of {', '.join(NAMES)}")
    engine = args.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "own"
    if args.worker is not None:
        work(args.readers[0], args.out, args.corpus, args.worker, args.seed, engine, args.count)
        return 0
    results = []
    print(HEADING, flush=True)
    for name in args.readers or NAMES:
        options: dict[str, Any] = {"seed": args.seed, "engine": engine, "count": args.count}
        results.append(fuzz(name, args.out / name, args.corpus, 60 * args.minutes, **options))
        print(row(results[-1]), flush=True)
        (args.json or args.out / "fuzz.json").write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any(result["findings"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
