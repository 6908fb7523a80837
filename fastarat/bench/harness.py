"""What every measurement shares: clocks, memory, launches, the machine, and the loop that times contestants in turn."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastarat.device import threads
from fastarat.doctor import version_of
from fastarat.files import make_writable, write_text

FORMAT = 1
_SHORTEST_S = 0.01  # of a sample: below it, clocks and launches are what is measured
Call = Callable[[], object]
Equality = dict[str, tuple[float, float]]
"""Quantity -> difference found, largest accepted."""


class Clock:
    """Seconds of one of `calls` calls: CUDA events on a GPU, the clock on the wall elsewhere.

    cpu_s: what the last measurement took of the process's CPU time, all threads together; 0 on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu_s = 0.0

    def __call__(self, call: Call, calls: int) -> float:
        if self.device.type != "cuda":
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                call()
            took, self.cpu_s = time.perf_counter() - start, (time.process_time() - start_cpu) / calls
            return took / calls
        # Events, because a launch returns before its work is done: the clock on the wall would time the queue.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


class Marks:
    """Call it with "start", then with the name of each phase as it ends; `read` gives the seconds of each.

    It serves as `TrainStep.mark`. No wait in between on CUDA; marks set while a CUDA graph is being captured become
    nodes of it, and are set again by every replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.points: list[tuple[str, Any]] = []

    def __call__(self, name: str) -> None:
        if name == "start":
            self.points = []
        if self.device.type == "cuda":
            # External: only such an event is recorded at a replay, and can be timed from outside the graph.
            external = torch.cuda.is_current_stream_capturing()
            point = torch.cuda.Event(enable_timing=True, external=external)
            point.record()
        else:
            point = time.perf_counter()
        self.points.append((name, point))

    def read(self) -> Iterator[tuple[str, float]]:
        synchronize(self.device)
        for (_, before), (name, after) in zip(self.points, self.points[1:], strict=False):
            yield name, before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before


def quartiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return {"q1", "median", "q3"} of `values`, each times `scale`."""
    # Inclusive: the samples are all there is, and with few of them the default reaches beyond the extremes.
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"q1": low * scale, "median": middle * scale, "q3": high * scale}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ceiling(NamedTuple):
    """Something that exercises the machine's own rate: call it, `amount` FLOP or bytes each time."""

    name: str
    call: Call
    amount: float


def matmul_ceiling(device: torch.device, dtype: torch.dtype | None = None, *, small: bool = False) -> Ceiling:
    """A large matrix product; dtype: default the machine's fast one, bf16 on a GPU that has it and float32 elsewhere.

    Random data: zeros draw less power and clock higher than any real network does.
    """
    if dtype is None:
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = torch.bfloat16 if fast else torch.float32
    n = 256 if small else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    name = f"matmul {n}x{n}x{n} {str(dtype).removeprefix('torch.')}"
    # Into a matrix of its own: an allocation per call is not the machine's rate.
    return Ceiling(name, lambda: torch.mm(a, b, out=out), 2.0 * n**3)


def copy_ceiling(device: torch.device, *, small: bool = False) -> Ceiling:
    """A large copy, read and write counted."""
    count = 2**16 if small else 2**28 if device.type == "cuda" else 2**25
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    name = f"copy of {4 * count / 1e6:.0f} MB, read and write counted"
    return Ceiling(name, lambda: target.copy_(source), 8.0 * count)


def _nothing(*args: object) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Contestant:
    """One of those that are timed.

    build: makes the call that is timed. check: its equality test. after: told the result and the call once that is
    warm; others are timed later, so it does not profile. skipped: why it cannot run here. least_s: seconds that must be
    left for it to be built. order: of building. marks: what the call tells the ends of its phases. info: shapes, dtypes
    and settings for the record.
    """

    name: str
    build: Callable[[], Call]
    check: Callable[[], Equality] = dict
    after: Callable[[dict[str, Any], Call], None] = _nothing
    info: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    skipped: str = ""
    least_s: float = 0.0
    order: int = 0
    marks: Marks | None = None


def warmed(build: Callable[[], Call], device: torch.device) -> tuple[Call, dict[str, float]]:
    """Build a call and make it twice; return it, and for the record its seconds: {"warmup_s", "first_call_s"}.

    warmup_s: of everything. first_call_s: of the first call alone, which autotunes, compiles and captures; cuDNN's
    search for plans is in that of whoever meets a shape first in this process, and in no later one.
    """
    gc.collect()  # those built before, and their graphs
    started = time.perf_counter()
    call = build()
    synchronize(device)
    built = time.perf_counter()
    call()
    synchronize(device)
    first = time.perf_counter()
    call()
    synchronize(device)
    return call, {"warmup_s": time.perf_counter() - started, "first_call_s": first - built}


def admit(
    contestants: Sequence[Contestant],
    results: Mapping[str, dict[str, Any]],
    device: torch.device,
    *,
    deadline: float = math.inf,
    on_admitted: Callable[[], None] = _nothing,
) -> dict[str, Call]:
    """Hold each contestant to its equality test, then build it and warm it up; return the calls that may be timed.

    results: by name, is told of each: its equality, and whether it is skipped, unequal or has failed. deadline: of
    time.monotonic(); after the first contestant, none is built that would not be done by then.
    """
    calls: dict[str, Call] = {}
    for one in sorted(contestants, key=lambda one: one.order):
        result = results[one.name]
        if one.skipped or (calls and time.monotonic() + one.least_s > deadline):
            result["skipped"] = one.skipped or "out of time"
            continue
        try:
            result["equality"] = one.check()
            if broken := {name: value for name, (value, limit) in result["equality"].items() if not value <= limit}:
                result["unequal"] = broken
            else:
                call, seconds = warmed(one.build, device)
                result |= seconds
                one.after(result, call)
                calls[one.name] = call
        except Exception as error:  # whatever one contestant runs into, the others are worth having
            traceback.print_exc()
            result["failed"] = first_line(error)
        on_admitted()
    return {one.name: calls[one.name] for one in contestants if one.name in calls}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Race(NamedTuple):
    """What `race` measured, by the name of each contestant and ceiling.

    samples: seconds of one call, one a round. cpu: of them, the process's CPU time. calls: per sample.
    """

    samples: dict[str, list[float]]
    cpu: dict[str, list[float]]
    calls: dict[str, int]

    def gain(self, before: str, after: str) -> dict[str, float]:
        """Quartiles, over the rounds, of how many times as fast `after` is."""
        return quartiles([b / a for b, a in zip(self.samples[before], self.samples[after], strict=True)])

    def share(self, name: str, work: float, ceiling: Ceiling) -> dict[str, float]:
        """Quartiles, over the rounds, of the share of a ceiling that `work` a call comes to."""
        pairs = zip(self.samples[name], self.samples[ceiling.name], strict=True)
        return quartiles([work / s / (ceiling.amount / peak) for s, peak in pairs])


def race(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    rounds: int,
    shortest_s: float = _SHORTEST_S,
    calls_per_sample: int | None = None,
    ceilings: Sequence[Ceiling] = (),
    deadline: float = math.inf,
    on_round: Callable[[Race], None] = _nothing,
) -> Race:
    """Time every call in each round, and the machine's own rates beside them.

    Who goes first rotates, so that nobody always finds the caches warm; ratios taken round by round are robust against
    a busy machine. deadline: of time.monotonic(); after it no round begins, from the third on.
    """
    inner = {name: calls_per_sample or max(1, math.ceil(shortest_s / clock(call, 1))) for name, call in calls.items()}
    # The least of three: the first call also loads the library and chooses its algorithm.
    peaks = {c.name: (c.call, max(1, math.ceil(_SHORTEST_S / min(clock(c.call, 1) for _ in "abc")))) for c in ceilings}
    found = Race({name: [] for name in (*calls, *peaks)}, {name: [] for name in calls}, inner)
    names = list(calls)
    for number in range(rounds):
        if time.monotonic() > deadline and number >= min(3, rounds):
            break
        for name, (call, count) in peaks.items():
            found.samples[name].append(clock(call, count))
        # A rotation and not a shuffle: over the rounds everybody is first equally often.
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found.samples[name].append(clock(calls[name], inner[name]))
            found.cpu[name].append(clock.cpu_s)
        on_round(found)
    return found


def race_phases(calls: Mapping[str, tuple[Call, Marks]], *, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time the phases that each call tells its marks, in turn: {name: {phase: [seconds, one a round]}}."""
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
    for number in range(-2, rounds):  # two to warm up
        for name, (call, marks) in calls.items():
            call()
            # Read after each call: a replayed graph sets the same marks again.
            for phase, seconds in marks.read():
                if number >= 0:
                    samples[name].setdefault(phase, []).append(seconds)
    return samples


class Started(NamedTuple):
    """Something a call started. kind: "kernels" or "copies" on a GPU, "ops" elsewhere. us: microseconds it took."""

    kind: str
    name: str
    us: float


def profiled(call: Call, device: torch.device) -> list[Started]:
    """List what `call` starts: kernels and copies on a GPU, outermost ATen ops elsewhere.

    Only after everything that is timed in this process: on CUDA the profiler's hooks stay in the driver when it has
    ended, and later timings have been 10 to 20 % slower for it (pytorch/pytorch#146604). And only of a call that runs
    eagerly: what is recorded of a CUDA graph's replay is not reliable (pytorch/kineto#1165).
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as prof:
        call()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "copies"} if cuda else {"cpu_op": "ops"}
    found, ends = [], {}
    for e in sorted((e for e in events if e.get("cat") in kinds), key=lambda e: (e["ts"], -e.get("dur", 0))):
        if not cuda:
            if not e["name"].startswith("aten::") or e["ts"] < ends.get(e["tid"], 0):
                continue
            # An op that begins before the last outermost one of its thread has ended was called by it.
            ends[e["tid"]] = e["ts"] + e.get("dur", 0)
        found.append(Started(kinds[e["cat"]], e["name"], e.get("dur", 0)))
    return found


def launches(call: Call, device: torch.device) -> dict[str, int]:
    """Count what one `call` starts, as `profiled` lists it: {"kernels", "copies"} on a GPU, {"ops"} elsewhere."""
    kinds = [one.kind for one in profiled(call, device)]
    return {kind: kinds.count(kind) for kind in (("kernels", "copies") if device.type == "cuda" else ("ops",))}


def count_launches(build: Callable[[], Call], device: torch.device) -> dict[str, Any]:
    """Build a call that runs eagerly and count what it starts: {"launches": ...}, or why not: {"not_counted": ...}.

    Once nothing is left to be timed: see `profiled`.
    """
    try:
        call, _ = warmed(build, device)  # what is compiled or made once shall not be counted
        return {"launches": launches(call, device)}
    except Exception as error:  # the times are measured, and worth having without it
        traceback.print_exc()
        return {"not_counted": first_line(error)}


def peak_memory(call: Call, device: torch.device) -> dict[str, Any]:
    """Memory the process holds at most while `call` runs, weights, optimiser state and graphs included."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()  # what autotuning and warming up left behind
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return {
            "method": "CUDA caching allocator: bytes reserved at most, after its cache was emptied",
            "peak_bytes": torch.cuda.max_memory_reserved(device),
        }
    try:
        import resource
    except ImportError:
        return {"method": "not measured on this system", "peak_bytes": None}
    call()
    # ru_maxrss counts bytes on macOS and kibibytes on Linux, whatever the manual says.
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"method": "resident bytes of the whole process at most since it began", "peak_bytes": peak}


@contextlib.contextmanager
def placed(device: torch.device, count: int | None) -> Iterator[None]:
    """Make `device` the current GPU if it is one, and PyTorch use `count` threads, inside the block."""
    with threads(count), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def opened(kind: str, command: str, device: torch.device, **more: Any) -> dict[str, Any]:
    """Return the head of a record: what was asked for, when, on which machine."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    head = {"format": FORMAT, "kind": kind, "command": command, "started_utc": started}
    return {**head, **more, "machine": machine(device), "results": []}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what the numbers depend on: device, versions, threads, commit."""
    found: dict[str, Any] = {
        "device": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton") or None,
        "ffcv": version_of("ffcv") or None,
        "commit": _commit(),
    }
    if device.type == "cuda":
        found["host"] = found["device"]
        found["device"] = torch.cuda.get_device_name(device)
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), **_nvidia(device)}
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _said(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _nvidia(device: torch.device) -> dict[str, str]:
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = ["-i", f"GPU-{uuid}"] if uuid else []
    said = _said("nvidia-smi", *chosen, f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    values = said.splitlines()[0].split(", ") if said else []
    return {f.replace(".", "_"): v for f, v in zip(fields, values, strict=False)}


def _commit() -> str | None:
    """The checkout this package runs from, or None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    head = _said("git", "rev-parse", "HEAD", cwd=root) if (root / "kernels").is_dir() else None
    return head and head + ("+changes" if _said("git", "status", "--porcelain", cwd=root) else "")


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write JSON whole or not at all, so that a run stopped by the clock leaves its last complete state."""
    make_writable(path.parent, path)
    write_text(path, json.dumps(record, indent=1) + "\n")
