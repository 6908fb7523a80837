"""Run pairs (fast, plain) interleaved in one process, and write every sample to JSON.

A pair must pass its equality test before anything is timed. Each round times the plain side, every fast side that is
compared with it and, where it bounds the case, the machine's own matmul or copy rate; who goes first rotates, so that
nobody always finds the caches warm. Ratios are taken round by round, which makes them robust against a busy machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.cases import CASES, Case, Pair, Size, Unavailable
from fastarat.bench import FORMAT, Ceiling, Clock, machine, quartiles
from fastarat.errors import UserError, unknown
from fastarat.training import pick_device

ROOT = Path(__file__).resolve().parent.parent
_SHORTEST_S = 0.01  # a sample is at least this long: below it, clocks and launches are what is measured


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 when a pair is unequal, or 2 for a mistake to mend (one line on stderr)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["table"]:
            if not argv[1:]:
                raise UserError("table: no file given; write `python -m benchmarks table FILE.json...`")
            print(tables.markdown([_read(Path(name)) for name in argv[1:]]))
            return 0
        if argv[:1] == ["readme"]:
            return tables.readme(argv[1:], _read)
        if argv[:1] in (["ladder"], ["probe"]):
            return importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
        return _run(_parser().parse_args(argv), argv)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see python -m benchmarks --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks",
        allow_abbrev=False,
        description="Measure fastarat against what people run: a loop with the structure of AR-AT's released code, or "
        "PyTorch's own parts. In place of a CASE: `ladder` adds one speed-up at a time, "
        "`probe` measures the pieces (each with --help), `table FILE.json...` prints results as Markdown, `readme` "
        "puts those of benchmarks/results/ into docs/measuring.md.",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--repeats", type=int, help="rounds per case (default: 20, 10 for whole training steps)")
    parser.add_argument("--batch-size", type=int, help="images per batch (default: 128 on CUDA, 16 on a CPU)")
    parser.add_argument("--model", default="resnet18", help="network of the step and the attack (default: resnet18)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", help="of the fast side (default: bf16 on CUDA, fp32 on a CPU; arat-step: both)")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the JSON files")
    parser.add_argument("--dry", action="store_true", help="tiny sizes and two rounds, to prove the machinery")
    # Peak memory of a CPU side is measured in a process of its own, which is started with this.
    parser.add_argument("--memory-of", choices=("fast", "plain"), help=argparse.SUPPRESS)
    return parser


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    if args.list:
        for case in CASES.values():
            print(f"{case.name:<16} {case.help}")
        return 0
    for name in args.cases:
        if name not in CASES:
            raise unknown("case", name, CASES)
    for flag in ("repeats", "batch_size", "threads"):
        value, least = getattr(args, flag), 2 if flag == "batch_size" else 1
        if value is not None and value < least:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected {least} or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    size = _size(args)
    if args.memory_of:
        pair = CASES[args.cases[0]].prepare(size)[0]
        print(json.dumps(_host_peak(getattr(pair, args.memory_of))))
        return 0
    # Both sides gain: the trainer sets it, and so does most research code.
    torch.backends.cudnn.benchmark = torch.device(size.device).type == "cuda"
    results, failed = [], False
    for name in args.cases or CASES:
        try:
            found = measure(CASES[name], size, args.repeats)
        except Unavailable as reason:
            if args.cases:
                raise UserError(f"{name} cannot run here: {reason}") from reason
            found = [{"case": name, "skipped": str(reason)}]
        failed |= any("unequal" in result for result in found)
        print("\n".join(map(summary, found)), flush=True)
        results += found
    record = {
        "format": FORMAT,
        "command": shlex.join(["python", "-m", "benchmarks", *argv]),
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": dataclasses.asdict(size) | {"repeats": args.repeats},
        "machine": machine(torch.device(size.device)),
        "results": results,
    }
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror}. Choose another --out.") from error
    print(f"wrote {path}")
    return int(failed)


def _size(args: argparse.Namespace) -> Size:
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.precision not in (None, "fp32", "tf32", "bf16"):
        raise unknown("precision", args.precision, ("fp32", "tf32", "bf16"))
    model = "resnet-small" if args.dry else args.model
    batch_size = args.batch_size or (4 if args.dry else 128 if device.type == "cuda" else 16)
    return Size(model, batch_size, str(device), args.precision, args.dry)


def measure(case: Case, size: Size, repeats: int | None = None) -> list[dict[str, Any]]:
    """Check a case's pairs, warm them up, time them interleaved.

    Returns, for each pair, everything the JSON records about it. Pairs of one case have the plain side's samples in
    common.
    """
    device = torch.device(size.device)
    load_before = _load()
    results: list[dict[str, Any]] = []
    timed: list[tuple[Pair, dict[str, Any]]] = []
    for pair in case.prepare(size):
        if isinstance(pair, Unavailable):
            results.append({"case": case.name, "skipped": str(pair)})
            continue
        result: dict[str, Any] = {"case": case.name, "info": pair.info, "equality": pair.check()}
        broken = {name: value for name, (value, limit) in result["equality"].items() if not value <= limit}
        if broken:
            result["unequal"] = broken
        else:
            timed.append((pair, result))
        results.append(result)
    if not timed:
        return results
    pairs = [pair for pair, _ in timed]
    repeats = repeats or (2 if size.dry else 10 if case.long else 20)
    clock = Clock(device)
    if pairs[0].phases is not None:
        results[0] |= _measure_phases(pairs[0], clock, repeats) | {"load": [load_before, _load()]}
        return results
    calls: dict[Any, Callable[[], object]] = {"plain": pairs[0].plain, **{i: p.fast for i, p in enumerate(pairs)}}
    inner = {}
    for name, call in calls.items():
        for _ in range(2 if case.long else 3):
            took = clock(call, 1)
        inner[name] = max(1, math.ceil(_SHORTEST_S / took))
    # By name: two pairs in one precision have one ceiling.
    bounds = [_ceiling(pair, size) for pair in pairs]
    ceilings = {c.name: c for c in bounds if c}
    for ceiling in ceilings.values():
        clock(ceiling.call, 1)
    samples: dict[Any, list[float]] = {name: [] for name in (*calls, *ceilings)}
    cpu: dict[Any, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(repeats):
        for name, ceiling in ceilings.items():
            samples[name].append(clock(ceiling.call, 1))
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(clock(calls[name], inner[name]))
            cpu[name].append(clock.cpu_s)
    load = [load_before, _load()]
    memory = _peak_memory(case, size, pairs, device)
    for i, (pair, result) in enumerate(timed):
        sides = {"fast": samples[i], "plain": samples["plain"]}
        result |= {
            "repeats": repeats,
            "calls_per_sample": {"fast": inner[i], "plain": inner["plain"]},
            "samples_s": sides | {"ceiling": []},
            "ms": {side: quartiles(times, 1e3) for side, times in sides.items()},
            "ratio": _ratio(sides),
            "work": dataclasses.asdict(pair.work),
            "rate": {side: pair.work.amount / statistics.median(times) for side, times in sides.items()},
            "load": load,
            "peak_memory": memory[i],
        }
        if device.type == "cpu" and pair.work.unit != "image":  # loaders work in processes and threads of their own
            # Time the process had a core: on a busy machine, and with one thread, steadier than the clock on the wall.
            result["samples_cpu_s"] = {"fast": cpu[i], "plain": cpu["plain"]}
            result["ratio_cpu"] = _ratio(result["samples_cpu_s"])
        if (ceiling := bounds[i]) is not None:
            result["samples_s"]["ceiling"] = samples[ceiling.name]
            rates = [ceiling.amount / s for s in samples[ceiling.name]]
            result["ceiling"] = {"name": ceiling.name, "median": statistics.median(rates), "best": max(rates)}
            result["share_of_ceiling"] = {
                side: statistics.median(pair.work.amount / s / r for s, r in zip(times, rates, strict=True))
                for side, times in sides.items()
            }
    return results


def _ratio(sides: dict[str, list[float]]) -> dict[str, float]:
    """Quartiles, over the rounds, of how many times as fast the fast side was."""
    return quartiles([p / f for p, f in zip(sides["plain"], sides["fast"], strict=True)])


def _measure_phases(pair: Pair, clock: Clock, repeats: int) -> dict[str, Any]:
    """Time the named phases of both sides' steps, interleaved."""
    samples: dict[str, dict[str, list[float]]] = {side: {} for side in pair.phases}
    for number in range(-1, repeats):
        for side, run in pair.phases.items():
            marks = clock.marks()
            run(marks)
            for phase, seconds in marks.read():
                if number >= 0:
                    samples[side].setdefault(phase, []).append(seconds)
    medians = {side: {phase: quartiles(v, 1e3) for phase, v in by.items()} for side, by in samples.items()}
    return {"repeats": repeats, "phase_samples_s": samples, "phase_ms": medians}


def _ceiling(pair: Pair, size: Size) -> Ceiling | None:
    """Return the machine's rate that bounds this work, if one does."""
    device = torch.device(size.device)
    cuda = device.type == "cuda"
    if pair.work.unit == "FLOP":
        dtype = torch.bfloat16 if pair.precision == "bf16" else torch.float32
        n = 256 if size.dry else 8192 if cuda else 2048
        # Random data: on a GPU, zeros draw less power and clock higher than any real network does.
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        name = f"matmul {n}x{n}x{n} {str(dtype).removeprefix('torch.')}"
        return Ceiling(name, lambda: torch.mm(a, b, out=out), 2.0 * n**3)
    if pair.work.unit == "byte":
        count = 2**16 if size.dry else 2**28 if cuda else 2**25
        source = torch.randn(count, device=device)
        target = torch.empty_like(source)
        name = f"copy of {4 * count / 1e6:.0f} MB, read and write counted"
        return Ceiling(name, lambda: target.copy_(source), 8.0 * count)
    return None


def _peak_memory(case: Case, size: Size, pairs: Sequence[Pair], device: torch.device) -> list[dict[str, Any]]:
    """Measure, for each pair, how far one call of each side raises memory above what rests before it."""
    if device.type == "cuda":
        method = "CUDA caching allocator: peak allocated bytes above those before the call"

        def rise(pair: Pair, side: str) -> dict[str, int]:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            getattr(pair, side)()
            torch.cuda.synchronize(device)
            return {"rise_bytes": torch.cuda.max_memory_allocated(device) - before}

    elif not Path("/proc/self/clear_refs").exists():
        return [{"method": "not measured: needs Linux's /proc"}] * len(pairs)
    else:
        method = "fresh process per side: peak resident bytes of its second call above those before it"

        def rise(pair: Pair, side: str) -> dict[str, int]:
            flags = ["--model", size.model, "--batch-size", size.batch_size, "--device", size.device]
            flags += ["--precision", pair.precision, "--threads", torch.get_num_threads()]
            flags += ["--dry"] if size.dry else []
            # glibc keeps what is freed; told to give large blocks back at once, the second call shows a side's need.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            command = [sys.executable, "-m", "benchmarks", case.name, *map(str, flags), "--memory-of", side]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
            if done.returncode:
                raise Unavailable(f"not measured: {done.stderr.strip().splitlines()[-1:]}")
            return json.loads(done.stdout.splitlines()[-1])

    try:
        shared = rise(pairs[0], "plain")
        return [{"method": method, "fast": rise(pair, "fast"), "plain": shared} for pair in pairs]
    except Unavailable as reason:
        return [{"method": str(reason)}] * len(pairs)


def _host_peak(call: Callable[[], object]) -> dict[str, int]:
    def resident(field: str) -> int:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
        return int(line.split()[1]) * 1024

    call()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    call()
    return {"rise_bytes": max(0, resident("VmHWM") - before), "total_bytes": resident("VmHWM")}


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def summary(result: dict[str, Any]) -> str:
    """Say the outcome of one case in a line (one per phase for phases)."""
    name = result["case"]
    if "skipped" in result:
        return f"{name:<16} skipped: {result['skipped']}"
    if "unequal" in result:
        return f"{name:<16} NOT EQUAL, not timed: " + ", ".join(f"{k} {v:.3g}" for k, v in result["unequal"].items())
    if "phase_ms" in result:
        return "\n".join(
            f"{name:<16} {side}: " + ", ".join(f"{phase} {q['median']:.1f} ms" for phase, q in by.items())
            for side, by in result["phase_ms"].items()
        )
    ratio, fast, plain = result["ratio"], result["ms"]["fast"], result["ms"]["plain"]
    share = result.get("share_of_ceiling", {}).get("fast")
    baseline = result["info"].get("baseline", "baseline")
    rise = [tables.rise(result, side) for side in ("plain", "fast")]
    return (
        f"{name:<16} {baseline} {plain['median']:.3f} ms, "
        f"fastarat {result['info'].get('precision', '')} {fast['median']:.3f} ms, "
        f"ratio {ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f}), "
        f"{tables.rate(result['rate']['fast'], result['work']['unit'])}"
        + (f", {share:.0%} of {result['ceiling']['name']}" if share else "")
        + (f", memory {rise[0]} and {rise[1]}" if "-" not in rise else "")
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        found = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of this harness ({type(error).__name__})") from error
    if found != FORMAT:
        raise UserError(f"{path} has format {found}, this harness reads {FORMAT}")
    return record


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="fastarat-bench-") as scratch:
        tempfile.tempdir = scratch  # what the loader cases write goes away with the run
        code = main()
    sys.exit(code)
