"""Long health: one training watched for as long as it runs, beside others killed at random and gone on with.

python tools/soak.py --minutes 30 --out soak.json

The watched one (FFCV where it is installed, SWA and EMA on) must keep its memory, open files, threads and checkpoints'
sizes. The killed ones (`train`, `compare --parallel 2`, `eval` with AutoAttack; SIGKILL, SIGTERM or SIGINT at a random
moment) must end, after --resume or the same command, with the bits of an unbroken one, no process running, no litter.
Exit code 1 where something did not, with the seed, and the folder kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from soak_watched import (
    LEAST_SLOPE,
    TOKEN,
    Found,
    environment,
    fastarat_command,
    place_of,
    promised_in,
    watching,
)

import fastarat
from fastarat.files import load_checkpoint

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TINY = [
    "--limit-train", "160", "--batch-size", "32", "--epochs", "3", "--attack.num-steps", "2", "--attack.epsilon", "0.1",
    "--eval.num-steps", "2", "--eval.val-images", "40", "--threads", "1",
]  # fmt: skip
TIMES = ("wall_s", "images_per_s", "epoch_s", "crc32")


@dataclass
class Scenario:
    """A command that is killed. argv: without the folder it writes. folder: flag that names it, or "" for an eval."""

    name: str
    argv: list[str]
    needs: Path | None = None

    def command(self, folder: Path) -> list[str]:
        if self.argv[0] == "eval":
            return fastarat_command("eval", folder, *self.argv[1:])
        if self.argv[0] == "train" and (folder / "config.yaml").is_file():
            return fastarat_command("train", "--resume", folder)
        return fastarat_command(*self.argv, "--out", folder)


# --- the killed ones


def scenarios(folder: Path, only: str) -> list[Scenario]:
    """Those whose names hold `only`; what an evaluation needs is trained first."""
    rows = ["--defenses", "at,arrest", "--parallel", "2", "--test-attack", "clean,pgd-2", "--limit", "40"]
    attack = ["--attack", "clean,autoattack", "--limit", "60", "--batch-size", "20"]
    trained = folder / "to-evaluate"
    found = [
        Scenario("train ar-at swa ema", ["train", *TINY, "--swa", "--swa-config.every", "2", "--ema", "0.9"]),
        Scenario(
            "train trades awp", ["train", *TINY, "--defense", "trades", "--awp", "0.005", "--checkpoint-every", "2"]
        ),
        Scenario("train fat", ["train", *TINY, "--defense", "fat", "--no-tensorboard", "--checkpoint-every", "1s"]),
        Scenario("train gairat bf16", ["train", *TINY, "--defense", "gairat", "--precision", "bf16"]),
        Scenario("compare", ["compare", *TINY, *rows]),
        Scenario("eval", ["eval", *attack], needs=trained),
    ]
    found = [scenario for scenario in found if only in scenario.name]
    if any(scenario.needs for scenario in found):
        finished(fastarat_command("train", *TINY, "--out", trained), "setup").check_returncode()
    return found


def finished(command: list[str], token: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(token), capture_output=True, text=True, check=False, timeout=600)


def running(token: str) -> list[int]:
    """Processes that were started with `token`, directly or by another."""
    found, wanted = [], f"{TOKEN}={token}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):  # empty, of one that has ended
                    found.append(int(entry.name))
    return found


def state_of(folder: Path) -> dict[str, Any]:
    """What must be equal: files, weights, metrics, evaluations and tables, without the times in them."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "tensorboard" in name or path.suffix in (".log", ".md", ".tex", ".csv"):
            continue
        if path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.name in ("last.pt", "best.pt"):
            kept = load_checkpoint(path)
            found[name] = {key: kept[key] for key in ("epoch", "step", "best", "average", "ema")}
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        else:
            found[name] = None
    # A run that was never killed after its first checkpoint keeps the one before; both are a run's own.
    return {name: value for name, value in found.items() if not name.endswith("previous.pt")}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        gone = (*TIMES, "seconds", "sha256", "out", "command", "standard", "started")
        return {k: _timeless(v) for k, v in value.items() if k not in gone and not k.endswith("_s")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


class Killer:
    """Kills scenarios and goes on with them, until time is up."""

    def __init__(self, folder: Path, found: Found) -> None:
        self.folder, self.found, self.random = folder, found, random.Random(found.seed)
        self.references: dict[str, tuple[dict[str, Any], float]] = {}

    def begin(self, scenario: Scenario, where: Path) -> None:
        if scenario.needs is not None:
            shutil.copytree(scenario.needs, where)

    def reference(self, scenario: Scenario) -> tuple[dict[str, Any], float]:
        """What the scenario leaves unbroken, and the seconds that it takes."""
        if scenario.name not in self.references:
            where = self.folder / "unbroken" / scenario.name.replace(" ", "-")
            self.begin(scenario, where)
            started = time.monotonic()
            done = finished(scenario.command(where), "reference")
            if done.returncode:
                raise RuntimeError(f"{scenario.name} failed unbroken: {done.stderr[-2000:]}")
            self.references[scenario.name] = state_of(where), time.monotonic() - started
        return self.references[scenario.name]

    def round(self, scenario: Scenario) -> None:
        """Kill a scenario one to four times, let it end, and compare it with the unbroken one."""
        found, number = self.found, self.found.rounds
        wanted, seconds = self.reference(scenario)
        where, token = self.folder / f"round-{number}", f"{os.getpid()}-{number}"
        self.begin(scenario, where)
        name = f"seed {found.seed}, round {number}, {scenario.name}"
        for _ in range(self.random.randint(1, 4)):
            self.kill(scenario, where, token, name, self.random.uniform(0, 0.8 * seconds))
        for _ in range(2):  # a folder that was left without a config is begun anew by the second
            done = finished(scenario.command(where), token)
            if done.returncode == 0:
                break
        found.expect(done.returncode == 0, f"{name}: did not go on: exit code {done.returncode}: {done.stderr[-500:]}")
        if done.returncode == 0:
            state = state_of(where)
            differing = [k for k in sorted({*state, *wanted}) if not equal(state.get(k, "-"), wanted.get(k, "-"))]
            differing = [k for k in differing if k not in state or k not in wanted or state[k] is not None]
            found.expect(not differing, f"{name}: not as unbroken: {', '.join(differing[:8])}")
        found.rounds += 1
        found.by_scenario[scenario.name] += 1
        if not any(name in text for text in found.violations):
            shutil.rmtree(where)

    def kill(self, scenario: Scenario, where: Path, token: str, name: str, after: float) -> None:
        found, signum = self.found, self.random.choice(SIGNALS)
        before = place_of(where)
        process = subprocess.Popen(
            scenario.command(where),
            env=environment(token),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        if process.poll() is None:
            process.send_signal(signum)
            found.kills[signal.Signals(signum).name] += 1
        try:
            said = process.communicate(timeout=90)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            found.expect(False, f"{name}: ran on for 90 s after {signal.Signals(signum).name}")
            said = process.communicate()[1]
        code = process.returncode
        found.endings[str(code)] += 1
        # 1 and 2: a run folder that is refused, or a mistake; neither is one here.
        found.expect(code in (0, -signum, 128 + signum), f"{name}: exit code {code} after {signum}: {said[-500:]}")
        found.expect("Traceback" not in said or code < 0, f"{name}: traceback after {signum}: {said[-1000:]}")
        now = place_of(where)
        found.expect(now >= before, f"{name}: kept {now}, less than before: {before}")
        if (promised := promised_in(said)) is not None:
            found.expect(now == promised, f"{name}: {promised} was to be kept, and is {now}")
        for log in where.rglob("*.log"):
            found.expect("Traceback" not in log.read_text(errors="replace"), f"{name}: a traceback in {log}")
        for _ in range(100):
            if not (left := running(token)):
                break
            time.sleep(0.1)
        found.expect(not left, f"{name}: processes {left} run on after {signal.Signals(signum).name}")
        litter = [str(p) for p in where.rglob("*.partial")] if where.exists() and signum != signal.SIGKILL else []
        found.expect(not litter or code == -signum, f"{name}: litter {litter} after {signal.Signals(signum).name}")


def soak(
    minutes: float, seed: int, folder: Path, *, least_slope: float = LEAST_SLOPE, only: str = ""
) -> dict[str, Any]:
    """Return what was found. only: scenarios whose names hold it."""
    found, until = Found(seed), time.monotonic() + 60 * minutes
    with watching(folder) as watched:
        killer = Killer(folder, found)
        chosen = scenarios(folder, only)
        while time.monotonic() < until:
            if not found.rounds % len(chosen):
                killer.random.shuffle(chosen)
            killer.round(chosen[found.rounds % len(chosen)])
        long = watched.end(found, least_slope)
    return {
        "command": f"python tools/soak.py --minutes {minutes:g} --seed {seed}",
        "fastarat": fastarat.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "watched": long,
        "killed": {
            "rounds": found.rounds,
            "kills": dict(found.kills),
            "by_scenario": dict(found.by_scenario),
            "endings": dict(found.endings),
        },
        "violations": found.violations,
    }


def in_words(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    long, killed = record["watched"], record["killed"]
    rows = {"violations": str(len(record["violations"]))}
    if long:
        slope, error = long["mb_per_100_epochs"]
        rows |= {
            f"watched training ({long['loader']} loader)": f"{long['epochs']:,} epochs",
            "resident memory": f"{long['rss_mb'][0]:.0f} to {long['rss_mb'][1]:.0f} MB, "
            f"{slope:+.2f} ± {error:.2f} MB per 100 epochs",
            "open files": " to ".join(map(str, long["files"])),
            "threads": " to ".join(map(str, long["threads"])),
            "last.pt": f"{long['last_pt_bytes'][0]:,} to {long['last_pt_bytes'][1]:,} bytes",
        }
    kills = ", ".join(f"{count} {name}" for name, count in sorted(killed["kills"].items()))
    by = ", ".join(f"{name} {count}" for name, count in sorted(killed["by_scenario"].items()))
    rows |= {"killed and gone on with": f"{killed['rounds']} ({by})", "signals": kills}
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the kills (default: the time)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--only", default="", help="scenarios whose names hold this")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="fastarat-soak-"))
    record = soak(args.minutes, args.seed, folder, only=args.only)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(in_words(record))
    if record["violations"]:
        print(f"seed {args.seed}; kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
