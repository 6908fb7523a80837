"""Run contestants interleaved in one process, and write every sample to JSON.

A contestant must pass its equality test before it is timed; the loop that times them is `fastarat.bench.harness.race`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import fake_cuda, loaders, tables
from benchmarks.contestants import CASES, FIRST, PHASES, Case, Pairs
from benchmarks.gates import PLAINEST, Setup, Unavailable, engine_step
from benchmarks.rungs import MATRIX, PREDICTED, count_rungs, predictions_hold, profile_step, rung_contestant, rungs
from fastarat.bench.bench import EPOCH_IMAGES, step_flops
from fastarat.bench.harness import (
    Ceiling,
    Clock,
    Race,
    admit,
    copy_ceiling,
    first_line,
    matmul_ceiling,
    opened,
    placed,
    quartiles,
    race,
    race_phases,
    write_record,
)
from fastarat.device import backend_flags, pick_device
from fastarat.errors import UserError, unknown

ROOT = Path(__file__).resolve().parent.parent
_SUBCOMMANDS = """In place of a CASE: `ladder [DEFENSE:MODEL:BATCH[:short]...]` adds one speed-up at a time, `first` \
asks a GPU what must be known before all else, `profile [DEFENSE:MODEL:BATCH]` lists the kernels of one eager step, \
`structure [CASE...]` counts a step's kernels and bytes without a GPU, `table FILE.json...` prints results as \
Markdown, `readme` puts those of benchmarks/results/ into docs/measuring.md."""
SUBCOMMANDS = ("ladder", "first", "profile")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 when a contestant is unequal or fails, or 2 for a mistake to mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["table"]:
            if not argv[1:]:
                raise UserError("table: no file given; write `python -m benchmarks table FILE.json...`")
            print(tables.markdown([tables.read(Path(name)) for name in argv[1:]]))
            return 0
        if argv[:1] == ["readme"]:
            return tables.readme(argv[1:])
        if argv[:1] == ["loaders"]:
            return loaders.main(argv[1:])
        if argv[:1] == ["structure"]:
            return fake_cuda.started(argv[1:])
        return _run(_parser().parse_intermixed_args(argv), shlex.join(["python", "-m", "benchmarks", *argv]))
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see python -m benchmarks --help)")


def _parser() -> argparse.ArgumentParser:
    about = "Measure fastarat against what people run: a loop with the structure of released code, or PyTorch's parts."
    parser = _Parser(prog="python -m benchmarks", allow_abbrev=False, description=f"{about} {_SUBCOMMANDS}")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--repeats", type=int, help="rounds (default: 20; 10 for whole steps; a ladder on a CPU: 5)")
    parser.add_argument("--batch-size", type=int, help="images per batch (default: 128 on CUDA, 16 on a CPU)")
    parser.add_argument("--model", default="resnet18", help="network of the step and the attack (default: resnet18)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", help="of the fast side (default: bf16 on CUDA, fp32 on a CPU; arat-step: both)")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    parser.add_argument("--cudnn-plans", type=int, default=10, help="that autotuning times; 0: all (default: 10)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing new starts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="FILE.json, or a folder of such files")
    parser.add_argument("--dry", action="store_true", help="tiny sizes and two rounds, to prove the machinery")
    # Peak memory of a CPU side is measured in a process of its own, which is started with this.
    parser.add_argument("--memory-of", choices=("fast", "plain"), help=argparse.SUPPRESS)
    return parser


def _run(args: argparse.Namespace, command: str) -> int:
    if args.list:
        print("\n".join(f"{case.name:<16} {case.help}" for case in CASES.values()))
        return 0
    kind = next((word for word in args.cases[:1] if word in SUBCOMMANDS), "pairs")
    device, steps = pick_device(args.device), kind in ("ladder", "profile")
    texts = args.cases[1:] or (MATRIX if kind == "ladder" else MATRIX[:1])
    setups = [Setup.parse(text, str(device), dry=args.dry) for text in texts] if steps else []
    if kind == "profile" and len(setups) > 1:
        raise UserError("profile takes one setup: what is timed after a profile, in the same process, is off")
    names = [] if steps else [c.name for c in CASES.values() if c.first] if kind == "first" else args.cases
    _check(args, names)
    model = "resnet-small" if args.dry else args.model
    batch_size = args.batch_size or (4 if args.dry else 128 if device.type == "cuda" else 16)
    setup = Setup(model, batch_size, str(device), args.precision, args.dry)
    # Both sides gain from cuDNN's autotuning: the trainer sets it, and so does most research code. A ladder runs as the
    # trainer does; TF32 is PyTorch's default for convolutions, and the float32 forms of the checks switch it off.
    autotuning = {"benchmark": device.type == "cuda", "benchmark_limit": args.cudnn_plans}
    flags = partial(torch.backends.cudnn.flags, enabled=True, allow_tf32=True, **autotuning)
    with placed(device, args.threads), backend_flags(device, "tf32", args.cudnn_plans) if steps else flags():
        if args.memory_of:
            pairs = CASES[names[0]].prepare(setup)
            one = pairs.plain if args.memory_of == "plain" else pairs.fast[0]
            print(json.dumps(_host_peak(one.build())))
            return 0
        about: dict[str, Any] = {"config": dataclasses.asdict(setup) | {"repeats": args.repeats}}
        if steps:
            about = {"dry": args.dry, "cudnn_plans": args.cudnn_plans}
        if kind == "ladder":
            about |= {"predictions": {name: p._asdict() for name, p in PREDICTED.items()}}
        record = opened(kind if steps else "pairs", command, device, data="random images", **about)
        out = args.out
        if out.suffix != ".json":
            stamp = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"
            out = out / f"{kind if steps else stamp}.json"
        run = {"ladder": _run_ladder, "profile": _run_profile}.get(kind, _run_cases)
        failed = run(record, setups or names or [c.name for c in CASES.values() if not c.first], setup, args, out)
    write_record(record, out)
    print(f"wrote {out}")
    return int(failed)


def _check(args: argparse.Namespace, names: Sequence[str]) -> None:
    for name in names:
        if name not in CASES:
            raise unknown("case", name, (*CASES, *SUBCOMMANDS))
    for flag, least in (("repeats", 1), ("batch_size", 2), ("threads", 1), ("cudnn_plans", 0)):
        if (value := getattr(args, flag)) is not None and value < least:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected {least} or more")
    if args.precision not in (None, "fp32", "tf32", "bf16"):
        raise unknown("precision", args.precision, ("fp32", "tf32", "bf16"))


def _run_cases(record: dict[str, Any], names: Sequence[str], setup: Setup, args: argparse.Namespace, out: Path) -> bool:
    deadline, first = time.monotonic() + args.budget, args.cases[:1] == ["first"]
    # On a GPU most of what is asked first has a process of its own: PyTorch reads the variable once and remembers the
    # plans of the first search, and an error of CUDA's then takes nothing else along.
    asked = FIRST if first and setup.device != "cpu" else [(name, {}, ()) for name in names]
    for name, environment, flags in asked:
        if time.monotonic() > deadline:
            found = [{"case": name, "skipped": "out of time"}]
        elif environment or flags:
            found = _elsewhere(name, setup, environment, *flags, timeout=deadline - time.monotonic())
        else:
            try:
                found = measure(CASES[name], setup, args.repeats)
            except Unavailable as reason:
                if args.cases and not first:
                    raise UserError(f"{name} cannot run here: {reason}") from reason
                found = [{"case": name, "skipped": str(reason)}]
            except RuntimeError as error:
                traceback.print_exc()
                found = [{"case": name, "failed": first_line(error)}]
        print("\n".join(map(tables.summary, found)), flush=True)
        record["results"] += found
        if out == args.out:  # a file that was named: a run stopped by the clock leaves something
            write_record(record, out)
    return any("unequal" in result or "failed" in result for result in record["results"])


def _in_a_process(
    name: str, setup: Setup, environment: dict[str, str], *more: str, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a case in a process of its own, in this environment. Raises: subprocess.TimeoutExpired."""
    flags = ["--model", setup.model, "--batch-size", setup.batch_size, "--device", setup.device]
    flags += ["--precision", setup.precision] if setup.precision else []
    flags += ["--threads", torch.get_num_threads(), *(["--dry"] if setup.dry else []), *more]
    command = [sys.executable, "-m", "benchmarks", name, *map(str, flags)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": timeout, "check": False}
    return subprocess.run(command, env=os.environ | environment, **options)


def _elsewhere(
    name: str, setup: Setup, environment: dict[str, str], *flags: str, timeout: float = math.inf
) -> list[dict[str, Any]]:
    """Measure a case apart, for what a process does or reads from its environment once."""
    what = " ".join([*(f"{key}={value}" for key, value in environment.items()), *flags])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        try:
            limit = timeout if timeout < math.inf else None
            done = _in_a_process(name, setup, environment, *flags, "--out", str(out), timeout=limit)
        except subprocess.TimeoutExpired as late:
            said = late.stderr or b""  # bytes, though text was asked for
            print(said.decode(errors="replace") if isinstance(said, bytes) else said, file=sys.stderr)
            return [{"case": name, "skipped": f"{what}: not done after {timeout:.0f} s"}]
        print(done.stderr, end="", file=sys.stderr)  # tracebacks, of which the record has the last line
        if not out.exists():
            return [{"case": name, "failed": f"{what}: {done.stderr.strip()[-500:]}"}]
        return json.loads(out.read_text())["results"]


def measure(case: Case, setup: Setup, repeats: int | None = None) -> list[dict[str, Any]]:
    """Admit a case's contestants and time them: what the JSON records about each of `fast`.

    Those of one case have the plain side's samples in common.
    """
    device = torch.device(setup.device)
    # Recorded before and after: numbers taken while others worked on the machine can be told from the file.
    load = [_load()]
    pairs = case.prepare(setup)
    results = {
        one.name: {"case": case.name} | ({"info": one.info} if one.info or not one.skipped else {})
        for one in pairs.fast
    }
    base: dict[str, Any] = {}
    calls = admit([*pairs.fast, pairs.plain], {**results, "plain": base}, device)
    timed = [one for one in pairs.fast if one.name in calls]
    if "failed" in base:
        for one in timed:
            results[one.name]["failed"] = f"baseline: {base['failed']}"
    elif timed:
        rounds = repeats or (2 if setup.dry else 10 if case.long else 20)
        if pairs.plain.marks is not None:
            (one,) = timed
            of = {"fast": (calls[one.name], one.marks), "plain": (calls["plain"], pairs.plain.marks)}
            samples = race_phases(of, rounds=rounds)
            medians = {side: {phase: quartiles(by[phase], 1e3) for phase in PHASES} for side, by in samples.items()}
            results[one.name] |= {"repeats": rounds, "phase_samples_s": samples, "phase_ms": medians}
        else:
            ceilings = {one.name: c for one in timed if (c := _ceiling(pairs, one.precision, setup))}
            # By name: two pairs in one precision have one ceiling.
            unique = list({c.name: c for c in ceilings.values()}.values())
            found = race(calls, Clock(device), rounds=rounds, ceilings=unique)
            memory = _peak_memory(case, setup, [calls["plain"], *(calls[one.name] for one in timed)], timed)
            for one, peak in zip(timed, memory, strict=True):
                about = _numbers(found, one.name, pairs, ceilings.get(one.name), device)
                results[one.name] |= {"repeats": rounds, **about, "peak_memory": peak}
        for one in timed:
            results[one.name]["load"] = [*load, _load()]
    return list(results.values())


def _numbers(found: Race, name: str, pairs: Pairs, ceiling: Ceiling | None, device: torch.device) -> dict[str, Any]:
    """What follows from the samples of one pair."""
    sides = {"fast": name, "plain": "plain"}
    samples = {side: found.samples[who] for side, who in sides.items()}
    result: dict[str, Any] = {
        "calls_per_sample": {side: found.calls[who] for side, who in sides.items()},
        "samples_s": samples | {"ceiling": []},
        "ms": {side: quartiles(times, 1e3) for side, times in samples.items()},
        "ratio": found.gain("plain", name),
        "work": dataclasses.asdict(pairs.work),
        "rate": {side: pairs.work.amount / statistics.median(times) for side, times in samples.items()},
    }
    if device.type == "cpu" and pairs.work.unit != "image":  # loaders work in processes and threads of their own
        # Time the process had a core: on a busy machine, and with one thread, steadier than the clock on the wall.
        result["samples_cpu_s"] = {side: found.cpu[who] for side, who in sides.items()}
        result["ratio_cpu"] = found._replace(samples=found.cpu).gain("plain", name)
    if ceiling is not None:
        result["samples_s"]["ceiling"] = found.samples[ceiling.name]
        rates = [ceiling.amount / s for s in found.samples[ceiling.name]]
        result["ceiling"] = {"name": ceiling.name, "median": statistics.median(rates), "best": max(rates)}
        shares = {side: found.share(who, pairs.work.amount, ceiling)["median"] for side, who in sides.items()}
        result["share_of_ceiling"] = shares
    return result


def _ceiling(pairs: Pairs, precision: str, setup: Setup) -> Ceiling | None:
    """Return the machine's rate that bounds this work, if one does."""
    device = torch.device(setup.device)
    if pairs.work.unit == "FLOP":
        return matmul_ceiling(device, torch.bfloat16 if precision == "bf16" else torch.float32, small=setup.dry)
    return copy_ceiling(device, small=setup.dry) if pairs.work.unit == "byte" else None


def _peak_memory(case: Case, setup: Setup, calls: Sequence[Callable], timed: Sequence[Any]) -> list[dict[str, Any]]:
    """Measure, for each of `timed`, how far one call of each side raises memory above what rests before it.

    calls: of the plain side, then theirs.
    """
    device = torch.device(setup.device)
    if device.type == "cuda":
        method = "CUDA caching allocator: peak allocated bytes above those before the call"
        plain, *fast = (_device_rise(call, device) for call in calls)
    elif not Path("/proc/self/clear_refs").exists():
        return [{"method": "not measured: needs Linux's /proc"}] * len(timed)
    else:
        method = "fresh process per side: peak resident bytes of its second call above those before it"
        try:
            first = dataclasses.replace(setup, precision=timed[0].precision)
            plain = _host_rise(case, first, "plain")
            fast = [_host_rise(case, dataclasses.replace(setup, precision=one.precision), "fast") for one in timed]
        except Unavailable as reason:
            return [{"method": str(reason)}] * len(timed)
    return [{"method": method, "fast": own, "plain": plain} for own in fast]


def _device_rise(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return {"rise_bytes": torch.cuda.max_memory_allocated(device) - before}


def _host_rise(case: Case, setup: Setup, side: str) -> dict[str, int]:
    # glibc keeps what is freed; told to give large blocks back at once, the second call shows a side's need.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = _in_a_process(case.name, setup, environment, "--memory-of", side)
    if done.returncode:
        raise Unavailable(f"not measured: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


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


def _run_ladder(record: dict[str, Any], setups: Sequence[Setup], _: Setup, args: argparse.Namespace, out: Path) -> bool:
    deadline, repeats = time.monotonic() + args.budget, args.repeats
    for setup in dict.fromkeys(setups):
        repeats = args.repeats or (2 if setup.dry else 5 if setup.device == "cpu" else 20)
        found: dict[str, Any] = {"setup": dataclasses.asdict(setup), "rungs": []}
        record["results"].append(found)
        if time.monotonic() > deadline:
            found["skipped"] = "out of time"
            print(f"{setup}: out of time", flush=True)
            continue
        try:
            climb(setup, found, repeats=repeats, deadline=deadline, on_rung=lambda: write_record(record, out))
        except RuntimeError as error:  # a GPU that has failed once fails every later call as well
            traceback.print_exc()
            found["failed"] = first_line(error)
        print(tables.rungs_of(found), flush=True)
        gc.collect()
    # After the last setup's rounds: a profiler's hooks outlive it, and slow down what is timed later.
    for setup, found in zip(dict.fromkeys(setups), record["results"], strict=True):
        count_rungs(setup, found["rungs"], deadline, lambda: write_record(record, out))
    rungs = [r for found in record["results"] for r in (found, *found["rungs"])]
    return any("unequal" in r or "failed" in r for r in rungs)


def _run_profile(
    record: dict[str, Any], setups: Sequence[Setup], _: Setup, args: argparse.Namespace, out: Path
) -> bool:
    (setup,) = setups
    found: dict[str, Any] = {"setup": dataclasses.asdict(setup)}
    record["results"].append(found)
    try:
        profile_step(setup, found, lambda: write_record(record, out))
    except RuntimeError as error:
        traceback.print_exc()
        found["failed"] = first_line(error)
    print(tables.profile(found), flush=True)
    return "failed" in found


def climb(
    setup: Setup,
    found: dict[str, Any],
    *,
    repeats: int,
    deadline: float = math.inf,
    on_rung: Callable[[], None] = lambda: None,
) -> None:
    """Build, check and time every rung of `setup` into `found`.

    deadline: of time.monotonic(); after it no rung is built and, from the third on, no round begins. on_rung: called
    whenever a rung has been built or a round is done, so that a run stopped by the clock leaves its last one.
    """
    device, ladder = torch.device(setup.device), rungs(setup)
    found["what"] = f"{setup.defense}, {setup.model}, {setup.batch_size} images, PGD-{setup.num_steps}"
    results = {rung.name: {"name": rung.name, "adds": rung.adds} for rung in ladder}
    found["rungs"] = list(results.values())
    contestants = [rung_contestant(setup, rung) for rung in ladder]
    calls = admit(contestants, results, device, deadline=deadline, on_admitted=on_rung)
    if not calls:
        return
    # Of the plainest step: what a fast path saves is no less work done, or its TFLOP/s would fall as it gets faster.
    flops, cost, _ = step_flops(engine_step(setup, PLAINEST), torch.zeros(1, 3, 32, 32, device=device))
    found["cost"] = cost._asdict() | {"forwards": cost.forwards, "flop_per_image": flops}
    ceiling, work = matmul_ceiling(device, small=setup.dry), flops * setup.batch_size

    def on_round(timed: Race) -> None:
        peaks = timed.samples[ceiling.name]
        rates = quartiles([ceiling.amount / s / 1e12 for s in peaks])
        found["peak"] = {"name": ceiling.name, "samples_s": peaks, "tflops": rates}
        found["rounds"] = len(peaks)
        before = None
        for name in calls:
            times = timed.samples[name]
            results[name] |= {
                "steps_per_sample": timed.calls[name],
                "samples_s": times,
                "ms": quartiles(times, 1e3),
                "epoch_s": quartiles(times, EPOCH_IMAGES / setup.batch_size),
                "images_per_s": setup.batch_size / statistics.median(times),
                "tflops": work / statistics.median(times) / 1e12,
                "mfu": timed.share(name, work, ceiling)["median"],
            }
            if "released" in calls:
                results[name]["ratio"] = timed.gain("released", name)
            if before is not None:
                results[name]["gain_ms"] = quartiles([a - b for a, b in zip(before, times, strict=True)], 1e3)
            if name in PREDICTED and predictions_hold(setup):
                results[name]["predicted"] = PREDICTED[name]._asdict()
            before = times
        on_rung()

    shortest_s = 0.1 if device.type == "cuda" else 0.0
    clock, ceilings = Clock(device), [ceiling]
    race(calls, clock, rounds=repeats, shortest_s=shortest_s, ceilings=ceilings, deadline=deadline, on_round=on_round)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="fastarat-bench-") as scratch:
        tempfile.tempdir = scratch  # what the loader cases write goes away with the run
        code = main()
    sys.exit(code)
