"""Compare `autoattack-fast` with plain AutoAttack, image by image, and by the CPU time of each member.

Run `python -m benchmarks.autoattack RUN --dataset FOLDER --out FILE.json`. Members are timed in CPU seconds of one
thread, which other work on the machine stretches less than the wall clock.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pyautoattack
import torch
from torch import Tensor

from fastarat.bench.harness import opened
from fastarat.data import load_dataset
from fastarat.device import threads
from fastarat.evaluation import collect
from fastarat.evaluation.autoattack import AutoAttackRun
from fastarat.evaluation.search import fast_members
from fastarat.evaluation.task import STANDARD, Task, share
from fastarat.files import write_text
from fastarat.runs import load_network
from fastarat.values import checked_budget


def main(argv: list[str]) -> None:
    """Run plain AutoAttack, the searches and the confirmation in turn; write JSON after each member."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoattack", description=__doc__)
    parser.add_argument("run", help="run folder or checkpoint")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="I N: of N processes, this one's share")
    parser.add_argument("--epsilon", type=float, default=8 / 255)
    parser.add_argument("--queries", type=int, default=5000, help="of Square; other than 5000 is not the standard")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.queries != 5000:
        _shorten(args.queries)
    model, meta, _ = load_network(args.run, "last")
    images, labels = collect(load_dataset(args.dataset, data_dir=args.data_dir).test, limit=args.images)
    part, parts = args.part
    images, labels = images[part::parts].contiguous(), labels[part::parts]
    cpu = torch.device("cpu")
    task = Task(model, images, labels, checked_budget(args.epsilon), 512, 0, "adv", False, cpu, True)
    command = shlex.join(["python", "-m", "benchmarks.autoattack", *argv])
    record = opened("autoattack", command, cpu, data=args.dataset, model=meta["model"], square_queries=args.queries)
    with threads(1), task.lent():
        with torch.no_grad():
            correct = task.forward(images).argmax(1) == labels
        record |= {"images": len(labels), "clean": share(correct)}
        plain = _timed(task, STANDARD, correct, record, "plain", args.out)
        first = fast_members(STANDARD, confirm=True)[: -len(STANDARD)]
        found = _timed(task, first, correct, record, "search", args.out)
        rest = fast_members(STANDARD, confirm=False)[len(first) :]
        searched = _timed(task, rest, found, record, "search_to_its_end", args.out)
        confirmed = _timed(task, STANDARD, found, record, "confirmation", args.out)
    parts = ("plain", "search", "search_to_its_end", "confirmation")
    taken = {name: sum(m["cpu_s"] for m in record[name].values()) for name in parts}
    record |= {
        "cpu_s": taken,
        "ratio_unconfirmed": taken["plain"] / (taken["search"] + taken["search_to_its_end"]),
        "ratio_confirmed": taken["plain"] / (taken["search"] + taken["confirmation"]),
        "differ_unconfirmed": (plain != searched).nonzero().flatten().tolist(),
        "differ_confirmed": (plain != confirmed).nonzero().flatten().tolist(),
    }
    write_text(args.out, json.dumps(record, indent=2) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k.startswith(("ratio", "differ", "cpu", "robust"))}, indent=2))


def _timed(
    task: Task, members: tuple[str, ...], robust: Tensor, record: dict[str, Any], name: str, out: Path
) -> Tensor:
    """Run members in turn on what the ones before left; returns bool [N]."""
    rows = record[name] = {}
    for member in members:
        run = AutoAttackRun(task, name, (member,), 10, robust.clone())
        cpu, wall = time.process_time(), time.perf_counter()
        run.play()
        robust = run.robust
        rows[member] = {
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - wall,
            "robust": int(robust.sum()),
        }
        print(name, member, rows[member], file=sys.stderr, flush=True)
        write_text(out, json.dumps(record, indent=2) + "\n")
    record[f"robust_{name}"] = share(robust)
    return robust


def _shorten(queries: int) -> None:
    original = pyautoattack.AutoAttack._set_version

    def set_version(self: Any, version: str = "standard") -> None:
        original(self, version)
        self.square.n_queries = queries

    pyautoattack.AutoAttack._set_version = set_version


if __name__ == "__main__":
    main(sys.argv[1:])
