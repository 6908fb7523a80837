"""Damaged and hostile files, made by the million: whatever fastarat reads is read, or refused in one line.

python tools/fuzz.py [READER ...] --minutes 10 --corpus tests/corpus --out fuzz.json

An input is a finding when it raises anything but UserError (or one of several lines), takes over 5 seconds, kills the
process, writes outside its folder, starts a process, or unpickles a class. Mutations keep an input's structure and make
its checksums right (tools/readers.py); they are guided by coverage where atheris is installed (the extra `fuzz`), by
chance otherwise. Exit code 1 for a finding, whose input is kept beside --out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("config", "checkpoint", "safetensors", "archive", "beton", "metrics")
SLOW_S, HANGS_S = 5.0, 60.0
KEPT_BYTES, KEPT_FILES = 30_000, 40  # of grown inputs, of one reader
MEMORY = 3 << 30  # bytes that an input may take beyond what the process holds
INSTRUMENTED = ["fastarat", "yaml", "zipfile", "tarfile", "json", "safetensors", "torch.serialization", "PIL"]
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
WRITING = (
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
)


class Trespass(BaseException):
    """Something that no file may cause."""


class Guard:
    """Notices, while it is armed, what a reader does beyond reading: Python's audit events."""

    def __init__(self, allowed: Path) -> None:
        self.allowed, self.armed, self.seen = f"{allowed.resolve()}/", False, ""
        self.may: tuple[str, ...] = ()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in FORBIDDEN and event not in self.may:
            self._stop(f"{event} {args[:1]}")
        elif event in WRITING:
            self._check(event, *args[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1])
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._check(event, args[0])

    def _check(self, event: str, *paths: Any) -> None:
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                name = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path)))), "")
                if not name.startswith(self.allowed) and not name.startswith("/dev/"):
                    self._stop(f"{event} {os.fsdecode(path)!r}")

    def _stop(self, what: str) -> None:
        self.armed, self.seen = False, what
        raise Trespass(what)


class Trial:
    """Feeds inputs to one reader, in this process, and keeps what is a finding."""

    def __init__(self, name: str, work: Path) -> None:
        self.work, self.name = work, name
        self.private = work / "private"
        self.private.mkdir(parents=True)
        os.environ["XDG_CACHE_HOME"] = str(self.private / "cache")
        os.chdir(self.private)
        with _instrumented():
            from tools import readers

            self.user_error = readers.UserError
        self.reader = readers.READERS[name](self.private)
        self.counts = {"inputs": 0, "accepted": 0, "refused": 0}
        self.findings: dict[str, dict[str, str]] = {}
        self.guard, self.saved = Guard(self.private), 0.0
        self.guard.may = self.reader.may
        warnings.simplefilter("ignore")
        with contextlib.suppress(ValueError, OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)

    def feed(self, data: bytes) -> str:
        """Read one input; return "accepted", "refused", or what is wrong."""
        (self.work / "current").write_bytes(data)
        started, self.guard.armed, self.guard.seen = time.monotonic(), True, ""
        try:
            self.reader.read(data)
            outcome = "accepted"
        except self.user_error as error:
            outcome, text = "refused", str(error)
            if "\n" in text or len(text) > 3000 or text != text.encode("utf-8", "replace").decode():
                outcome = f"an error that is no single line of text: {text[:200]!r}"
        except Trespass as error:
            outcome = f"trespass: {error}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/fastarat/" in f.filename]
            at = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
            outcome = f"{type(error).__name__} in {at}: {str(error)[:200]}"
        finally:
            self.guard.armed = False
        if self.guard.seen and not outcome.startswith("trespass"):  # something took the exception for its own
            outcome = f"trespass: {self.guard.seen}"
        took = time.monotonic() - started
        if took > SLOW_S:
            outcome = f"slow: {took:.1f} s ({outcome})"
        self._count(outcome, data)
        return outcome

    def _count(self, outcome: str, data: bytes) -> None:
        self.counts["inputs"] += 1
        if outcome in self.counts:
            self.counts[outcome] += 1
        else:
            kind = re.sub(r"[\d'\"].*", "", outcome)[:80]
            if kind not in self.findings:
                file = self.work / f"finding-{self.name}-{hashlib.sha256(data).hexdigest()[:12]}"
                file.write_bytes(data)
                self.findings[kind] = {"what": outcome, "input": file.name}
                self.saved = 0.0
        if time.monotonic() - self.saved > 1:
            self.save()

    def save(self) -> None:
        self.saved = time.monotonic()
        partial = self.work / "counts.partial"
        partial.write_text(json.dumps({**self.counts, "findings": list(self.findings.values())}))
        partial.replace(self.work / "counts.json")


@contextlib.contextmanager
def _instrumented() -> Any:
    if importlib.util.find_spec("atheris") is None:
        yield
        return
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        yield


def by_chance(trial: Trial, corpus: list[bytes], until: float, seed: int, most: int | None = None) -> None:
    """Mutate inputs of the corpus until the time is up, or `most` were tried."""
    source = random.Random(seed)
    for data in corpus:
        trial.feed(data)
    count = 0
    while time.monotonic() < until and (most is None or count < most):
        trial.feed(trial.reader.mutate(source.choice(corpus), source))
        count += 1
    trial.save()


def by_coverage(trial: Trial, folders: list[Path], seconds: float) -> None:
    """The same, guided by which code an input reaches; ends the process."""
    import atheris

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        source = random.Random(seed)
        if source.random() < 0.2:
            return atheris.Mutate(data, max_size)
        return trial.reader.mutate(data, source)[:max_size]

    flags = [
        f"-max_total_time={int(seconds)}",
        "-rss_limit_mb=0",
        "-timeout=0",
        "-max_len=1048576",
        "-print_final_stats=1",
    ]
    argv = [sys.argv[0], *flags, f"-artifact_prefix={trial.work}/", *map(str, folders)]
    atheris.Setup(argv, lambda data: trial.feed(data) and None, custom_mutator=mutate)
    atheris.Fuzz()


def child(name: str, work: Path, corpus: Path, seconds: float, seed: int) -> None:
    """One reader in a process of its own, which an input may kill."""
    trial = Trial(name, work)
    grown, given = work / "corpus", corpus / name
    grown.mkdir(exist_ok=True)
    for data in trial.reader.seeds:
        (grown / hashlib.sha1(data).hexdigest()).write_bytes(data)
    folders = [grown, *([given] if given.is_dir() else [])]
    inputs = [path.read_bytes() for folder in folders for path in sorted(folder.iterdir())]
    if importlib.util.find_spec("atheris") is None:
        by_chance(trial, inputs, time.monotonic() + seconds, seed)
    else:
        by_coverage(trial, folders, seconds)


def fuzz(name: str, minutes: float, corpus: Path, work: Path, seed: int) -> dict[str, Any]:
    """Fuzz one reader for so long, starting again after each crash. Returns counts and findings."""
    until, total = time.monotonic() + 60 * minutes, {"inputs": 0, "accepted": 0, "refused": 0}
    findings: dict[str, dict[str, str]] = {}
    coverage, turn = 0, 0
    while (left := until - time.monotonic()) > 1 and turn < 50:
        here = work / f"{name}-{turn}"
        argv = ["--child", name, "--work", str(here), "--corpus", str(corpus), "--seconds", str(left)]
        with (work / f"{name}.log").open("ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                [sys.executable, __file__, *argv, "--seed", str(seed + turn)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            hung = _hung(process, here, until + 30)
        counts = _json(here / "counts.json")
        for key in total:
            total[key] += counts.get(key, 0)
        for finding in counts.get("findings", []):
            shutil.copy(here / finding["input"], work)
            findings.setdefault(finding["what"][:60], finding)
        said = (work / f"{name}.log").read_bytes()[start:].decode(errors="replace")
        coverage = max([coverage, *map(int, re.findall(r"\bcov: (\d+)", said))])
        if process.returncode and (here / "current").exists():
            file = work / f"finding-{name}-killed-{turn}"
            shutil.copy(here / "current", file)
            what = "hangs" if hung else f"exit code {process.returncode}: {said[-300:]}"
            findings.setdefault(what[:30], {"what": what, "input": file.name})
        elif process.returncode:
            findings["set-up"] = {"what": f"did not begin: {said[-1000:]}", "input": ""}
            break
        turn += 1
    return {"reader": name, "minutes": minutes, **total, "coverage": coverage, "findings": list(findings.values())}


def _hung(process: subprocess.Popen[bytes], work: Path, last: float) -> bool:
    """Wait for a child's end, and end it where one input takes for ever."""
    while process.poll() is None:
        time.sleep(0.5)
        with contextlib.suppress(FileNotFoundError):
            if time.time() - (work / "current").stat().st_mtime > HANGS_S:
                process.kill()
                process.wait()
                return True
        if time.monotonic() > last:
            process.kill()
            process.wait()
            process.returncode = 0  # libFuzzer looks at its clock between inputs
    return False


def _grown(work: Path, name: str) -> list[Path]:
    """Inputs that reached code which none before had, smallest first."""
    files = [path for folder in work.glob(f"{name}-*/corpus") for path in folder.iterdir()]
    return sorted({path.name: path for path in files}.values(), key=lambda path: path.stat().st_size)


def keep(files: list[Path], corpus: Path, most: int = KEPT_BYTES) -> None:
    """Copy inputs into a corpus until it holds `most` bytes."""
    corpus.mkdir(parents=True, exist_ok=True)
    held = sum(path.stat().st_size for path in corpus.iterdir())
    for path in files[:KEPT_FILES]:
        held += path.stat().st_size
        if held > most:
            return
        shutil.copy(path, corpus)


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def in_words(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = ["| reader | minutes | inputs | read | refused | edges covered | findings |", "|---|" + "---:|" * 6]
    lines += [
        f"| {r['reader']} | {r['minutes']:g} | {r['inputs']:,} | {r['accepted']:,} | {r['refused']:,} | "
        f"{r['coverage'] or '-'} | {len(r['findings'])} |"
        for r in results
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each reader (default: 10)")
    parser.add_argument("--corpus", type=Path, default=ROOT / "tests" / "corpus")
    parser.add_argument("--out", type=Path, help="JSON to write; findings' inputs go beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", action="store_true", help="add what reached new code to the corpus, the smallest first"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child, args.work, args.corpus, args.seconds, args.seed)
        return 0
    if wrong := [name for name in args.readers if name not in NAMES]:
        parser.error(f"no reader {wrong[0]!r}: {', '.join(NAMES)}")
    work = Path(tempfile.mkdtemp(prefix="fastarat-fuzz-"))
    results = []
    for name in args.readers or NAMES:
        results.append(fuzz(name, args.minutes, args.corpus.resolve(), work, args.seed))
        print(in_words(results[-1:]).splitlines()[-1], flush=True)
        if args.keep:
            keep(_grown(work, name), args.corpus / name)
    record = {
        "command": f"python tools/fuzz.py {' '.join(args.readers)} --minutes {args.minutes:g} --seed {args.seed}",
        "guided": importlib.util.find_spec("atheris") is not None,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "results": results,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n" + in_words(results))
    found = [f"{r['reader']}: {f['what']} ({f['input']})" for r in results for f in r["findings"]]
    print("\n".join(found))
    if found:
        where = args.out.parent if args.out else Path("fuzz-findings")
        where.mkdir(parents=True, exist_ok=True)
        for file in work.glob("finding-*"):
            shutil.copy(file, where)
        print(f"their inputs: {where}")
    shutil.rmtree(work)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
