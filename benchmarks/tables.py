"""Results as Markdown, and the tables of docs/measuring.md, which nobody types: they are made from the JSON files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plain import STRUCTURE
from fastarat.bench.bench import cell, launched, render
from fastarat.bench.harness import FORMAT
from fastarat.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = {"benchmarks": ("pairs", "bench", "ladder", "profile"), "structure": ("structure",)}
"""Kinds of result that a page has between `<!-- name -->` and `<!-- /name -->`."""
Record = dict[str, Any]


def markdown(records: Sequence[Record]) -> str:
    """Return records of every kind as Markdown; median and, in brackets, quartiles. First the ratios."""
    of_kind: dict[str, list[Record]] = {}
    for record in records:
        of_kind.setdefault(record.get("kind", "pairs"), []).append(record)
    unknown = set(of_kind) - {kind for kinds in BLOCKS.values() for kind in kinds}
    if unknown:
        raise UserError(f"a result is of kind {sorted(unknown)[0]!r}, which this version cannot read")
    parts = _pairs(of_kind.get("pairs", ()))
    parts += [_bench(r) for r in of_kind.get("bench", ())]
    parts += [_ladder(r) for r in of_kind.get("ladder", ())]
    parts += [_structure(r) for r in of_kind.get("structure", ())]
    parts += [_profile(r) for r in of_kind.get("profile", ())]
    return "\n\n".join(part for part in parts if part)


_OF_STEPS = ("arat-step", "arat-phases", "pgd10")


def _pairs(records: Sequence[Record]) -> list[str]:
    """Tables of the harness's pairs: those with the released structure, then the others, each with its baseline."""
    released, others, phases = [], [], []
    stale: dict[tuple[str, str], str] = {}
    for record in records:
        machine = record["machine"]
        where = machine["device"] + ("" if "driver_version" in machine else _of_cpu(machine))
        for r in record["results"]:
            if "ms" not in r and "phase_ms" not in r:
                continue
            info = r["info"]
            if r["case"] in _OF_STEPS and info.get("baseline") != STRUCTURE:
                commit = (machine.get("commit") or "of no known commit")[:12]
                stale[r["case"], where] = (
                    f"`{r['case']}` on {where} (commit {commit}) is not shown: it was measured against another loop "
                    f"than the {STRUCTURE}'s. Measure it again: `python -m benchmarks {r['case']}`."
                )
                continue
            for side, by in r.get("phase_ms", {}).items():
                name = f"fastarat, {info['precision']}" if side == "fast" else STRUCTURE
                phases += [[name, where, info["what"], phase, cell(q)] for phase, q in by.items()]
            if "ms" not in r:
                continue
            share = r.get("share_of_ceiling")
            share = f"{share['fast']:.0%} of {r['ceiling']['name']}" if share else "-"
            if "share_of_ceiling" in r and info.get("precision") != "bf16":  # the float32 side has another ceiling
                share += f" (baseline: {r['share_of_ceiling']['plain']:.0%})"
            times = [cell(r["ms"]["plain"]), cell(r["ms"]["fast"]), cell(r["ratio"])]
            about = [r["case"], where, info["what"]]
            rates = [rate(r["rate"]["fast"], r["work"]["unit"]), share]
            if r["case"] in _OF_STEPS:
                memory = [rise(r, side) for side in ("plain", "fast")]
                released.append([*about, info["precision"], *times, *memory, *rates])
            else:
                others.append([*about, info["plain"], *times, *rates])
    ends = ["rate of fastarat", "share of the machine's rate"]
    parts = []
    if released:
        header = ["case", "device", "what", "fastarat's precision", f"{STRUCTURE}, ms", "fastarat, ms", "ratio"]
        memory = [f"{STRUCTURE}, memory", "fastarat, memory"]
        parts.append(
            f"Against a loop with the structure of AR-AT's released code, in float32 (`benchmarks/plain.py`). Ratio: "
            f"how many times as fast fastarat is. Memory: how far a call raises its peak.\n\n"
            f"{_rows([*header, *memory, *ends], released)}"
        )
    if phases:
        parts.append(_rows(["side", "device", "what", "phase", "ms"], phases))
    again = {(case, where) for case, where, *_ in released}
    parts += [text for measured, text in stale.items() if measured not in again]
    if others:
        header = ["case", "device", "what", "baseline", "baseline, ms", "fastarat, ms", "ratio"]
        parts.append(_rows([*header, *ends], others))
    return parts + _layers(records)


def _layers(records: Sequence[Record]) -> list[str]:
    """Of cases that tried a network's layers one by one: which of them cuDNN's fused convolution serves, and when."""
    rows = []
    for info in (r.get("info", {}) for record in records for r in record["results"]):
        for found in info.get("layers", ()):
            layer = f"{found['inputs']} to {found['outputs']}, {found['side']}x{found['side']}"
            layer += f", stride {found['stride']}{', residual added' if found['add'] else ''}"
            numbers = [f"{found[key]:.3g}" if key in found else "-" for key in ("first_call_s", "fused_ms", "apart_ms")]
            rows.append([info["rtc"], layer, found.get("failed", "equal"), *numbers])
    header = ["compiling when it runs", "layer", "fused convolution", "first call, s", "fused, ms", "apart, ms"]
    return [_rows(header, rows)] if rows else []


def rate(value: float, unit: str) -> str:
    """Format what is done per second: FLOP, bytes, images or kernels."""
    if unit == "FLOP":
        return f"{value / 1e12:.3g} TFLOP/s"
    return f"{value / 1e9:.3g} GB/s" if unit == "byte" else f"{value:,.0f} {unit}s/s"


def rise(result: dict[str, Any], side: str) -> str:
    """Format how far one call of a side raises memory."""
    found = result.get("peak_memory", {}).get(side)
    return "-" if found is None else f"{found['rise_bytes'] / 2**20:,.0f} MiB"


def _where(record: Record) -> str:
    found = record["machine"]
    cpu = "driver_version" not in found
    place = found["device"] + (_of_cpu(found) if cpu else f", driver {found['driver_version']}")
    dry = " **Dry run at tiny sizes: proves the machinery, says nothing about speed.**" if record.get("dry") else ""
    commit = f", commit {found['commit'][:12]}" if found.get("commit") else ""
    return f"{place}, torch {found['torch']}{commit}; {record['data']}.{dry}"


def _of_cpu(found: dict[str, Any]) -> str:
    """What a CPU's numbers hang on beside its name: the vector instructions PyTorch uses, and threads."""
    return "".join(f", {part}" for part in (found.get("cpu_capability"), f"{found['threads']} threads") if part)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    # A bar ends a cell, and GitHub's escape for it is not everybody's.
    return "\n".join("| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in lines)


def _bench(record: Record) -> str:
    title = f"**Training loop, data included** (`fastarat bench`): {_where(record)}"
    return f"{title}\n\n```\n{render(record)}\n```"


def _ladder(record: Record) -> str:
    title = f"**One speed-up at a time, step alone** (`python -m benchmarks ladder`): {_where(record)}"
    return "\n\n".join([title, *(rungs_of(found) for found in record["results"] if found.get("rungs"))])


def _profile(record: Record) -> str:
    title = f"**What one step starts** (`python -m benchmarks profile`): {_where(record)}"
    return "\n\n".join([title, *map(profile, record["results"])])


def profile(found: dict[str, Any], most: int = 25) -> str:
    """Return what took longest of a profiled step as a table of at most so many rows."""
    about = found.get("what", str(found["setup"])) + (f": failed: {found['failed']}" if "failed" in found else "")
    if "ms" in found:
        about += f": {cell(found['ms'])} ms before it was profiled"
    kernels = found.get("kernels", ())
    if not kernels:
        return about + "; nothing was listed"
    count, us = (sum(row[key] for row in kernels) for key in ("count", "us"))
    about += f"; {count:,} started, {us / 1e3:.3g} ms of work"
    shown = [
        [r["name"][:100], r["kind"], f"{r['count']:,}", f"{r['us']:,.0f}", f"{r['us'] / (us or 1):.1%}"]
        for r in kernels
    ]
    rows = _rows(["name", "kind", "count", "us in all", "share"], shown[:most])
    rest = f"\n\n{len(shown) - most} more names are in the JSON file." if len(shown) > most else ""
    return f"{about}.\n\n{rows}{rest}"


def rungs_of(found: dict[str, Any]) -> str:
    """Return the rungs of one setup as a table."""
    header = ["rung", "ms per step", "s per 50,000 images", "images/s", "TFLOP/s", "MFU", "memory", "per step, eager"]
    header += [f"ratio to the {STRUCTURE}", "saves, ms", "predicted for an H200"]
    rows = []
    for r in found["rungs"]:
        if "ms" not in r or "unequal" in r:
            state = _state(r) or (f"{cell(r['alone_ms'])}, not interleaved" if "alone_ms" in r else "")
            rows.append([r["adds"], state, *["-"] * (len(header) - 2)])
            continue
        memory = r["memory"].get("peak_bytes")
        row = [r["adds"], cell(r["ms"]), cell(r["epoch_s"]), f"{r['images_per_s']:,.0f}", f"{r['tflops']:.3g}"]
        row += [f"{r['mfu']:.1%}", "-" if memory is None else f"{memory / 2**20:,.0f} MiB"]
        row.append(launched(r))
        row += [cell(r[key]) if key in r else "-" for key in ("ratio", "gain_ms")]
        rows.append([*row, predicted(r["predicted"]) if "predicted" in r else "-"])
    about = found.get("what", str(found["setup"])) + (f": failed: {found['failed']}" if "failed" in found else "")
    if "cost" in found:
        about += f": {found['cost']['forwards']:g} forwards per image; MFU against {found['peak']['name']}"
    return f"{about}. Each rung keeps what the ones before it added.\n\n{_rows(header, rows)}"


def _structure(record: Record) -> str:
    title = (
        f"**Kernels and bytes of one training step** (`python -m benchmarks structure`, torch {record['torch']}): "
        "counted without a GPU. **No GPU has measured anything of this.**"
    )
    header = ["case", "operations", "kernels", "fills", "casts", "layouts", "GB", "TFLOP"]
    header += ["at least, ms, H100", "at least, ms, H200"]
    keys = ["operations", "kernels", "fills", "casts", "layouts", "gb", "tflop", "h100_ms", "h200_ms"]
    before = record.get("before", {"commit": "", "cases": {}})
    named = {**record["cases"], **{f"{case}, commit {before['commit']}": r for case, r in before["cases"].items()}}
    rows = [[case, *(f"{r[key]:,}" for key in keys)] for case, r in named.items()]
    return f"{title}\n\n{_rows(header, rows)}\n\nHow kernels and bytes are counted. {record['how']}"


def _state(r: dict[str, Any]) -> str:
    """Say what keeps a contestant's times from being printed, if anything does."""
    if "unequal" in r:
        return "NOT EQUAL, not timed: " + ", ".join(f"{name} {value:.3g}" for name, value in r["unequal"].items())
    return next((f"{key}: {r[key]}" for key in ("skipped", "failed") if key in r), "")


def predicted(p: dict[str, Any]) -> str:
    """Format a prediction, with its number in the ranked list of speed-ups."""
    if p["low"] is None:
        return f"item {p['item']}: {p['note']}"
    value = f"{p['low']:g}" if p["low"] == p["high"] else f"{p['low']:g} to {p['high']:g}"
    return f"{value} ms (item {p['item']}{': ' + p['note'] if p['note'] else ''})"


def summary(result: dict[str, Any]) -> str:
    """Say the outcome of one pair in a line (one per phase for phases)."""
    name = f"{result['case']:<16}"
    if state := _state(result):
        return f"{name} {state}"
    if "phase_ms" in result:
        return "\n".join(
            f"{name} {side}: " + ", ".join(f"{phase} {q['median']:.1f} ms" for phase, q in by.items())
            for side, by in result["phase_ms"].items()
        )
    info, ratio, fast, plain = result["info"], result["ratio"], result["ms"]["fast"], result["ms"]["plain"]
    share = result.get("share_of_ceiling", {}).get("fast")
    rises = [rise(result, side) for side in ("plain", "fast")]
    return (
        f"{name} {info.get('baseline', 'baseline')} {plain['median']:.3f} ms, "
        f"fastarat {info.get('precision', '')} {fast['median']:.3f} ms, "
        f"ratio {ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f}), "
        f"{rate(result['rate']['fast'], result['work']['unit'])}"
        + (f", {share:.0%} of {result['ceiling']['name']}" if share else "")
        + (f", memory {rises[0]} and {rises[1]}" if "-" not in rises else "")
        + (f", autotuning {info['autotuning_s']:.1f} s" if "autotuning_s" in info else "")
    )


def read(path: Path) -> Record:
    """Read a result file. Raises: UserError for anything else, or another format."""
    try:
        record = json.loads(path.read_text())
        found = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of this harness ({type(error).__name__})") from error
    if found != FORMAT:
        raise UserError(f"{path} has format {found}, this harness reads {FORMAT}")
    return record


def _filled(text: str, block: str, body: str, page: Path) -> str:
    """Return `text` with `body` between the markers of a block. Raises: UserError where they are not there once."""
    begin, end = f"<!-- {block} -->", f"<!-- /{block} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{page} needs the lines {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return before + begin + (f"\n{body}\n" if body else "\n") + end + rest.split(end)[1]


def readme(argv: Sequence[str]) -> int:
    """Run `python -m benchmarks readme`: put the tables of the result files between a page's markers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=ROOT / "docs/measuring.md", help="page (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    args = parser.parse_args(argv)
    files = sorted(args.results.rglob("*.json"))
    records = [read(path) for path in files]
    for path, record in zip(files, records, strict=True):
        if record.get("dry") or record.get("config", {}).get("dry"):
            raise UserError(f"{path} is of a dry run, which says nothing about speed: remove it")
    try:
        text = args.readme.read_text()
    except OSError as error:
        raise UserError(f"cannot read {args.readme}: {error.strerror}") from error
    new = text
    for block, kinds in BLOCKS.items():
        of_block = [record for record in records if record.get("kind", "pairs") in kinds]
        if of_block or block == "benchmarks":
            new = _filled(new, block, markdown(of_block), args.readme)
    if args.check:
        print("up to date" if new == text else f"{args.readme} is not what {args.results} gives")
        return int(new != text)
    args.readme.write_text(new)
    print(f"wrote {args.readme} from {len(files)} file(s)")
    return 0
