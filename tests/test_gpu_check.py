"""The unattended GPU check, run dry: every part runs, and what it leaves is complete and few files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["machine", "tests", "ladder", "bench", "first", "train", "matrix"]


def run(out: Path, *argv: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment |= {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent, check=False)


def test_the_dry_run_leaves_all_its_results(tmp_path):
    out = tmp_path / "out"
    done = run(out, "--dry")
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout[-3000:] + log[-3000:]
    files = {p.name for p in out.iterdir()}
    assert len(files) <= 8
    assert all(p.is_file() and re.fullmatch(r"[A-Za-z0-9._-]+", p.name) for p in out.iterdir())
    assert files == {"log.txt", "summary.md", "tests.xml", "ladder.json", "matrix.json", "first.json", "bench.json", "train.json"}  # fmt: skip
    summary = (out / "summary.md").read_text()
    assert re.findall(r"^\| (\w+) \| done \|", summary, re.MULTILINE) == PARTS
    assert re.search(r"Tests: [1-9]\d* passed, 0 failed", summary)
    assert "dry run" in summary
    assert "random images: accuracies mean nothing" in summary
    for name, kind in (("ladder", "ladder"), ("matrix", "ladder"), ("first", "pairs"), ("bench", "bench")):
        record = json.loads((out / f"{name}.json").read_text())
        assert record["kind"] == kind
        assert record["results"]
    (row,) = json.loads((out / "train.json").read_text())["metrics"]
    assert row["epoch"] == 1


def test_a_failing_part_is_recorded_and_the_rest_goes_on(tmp_path):
    """A Python that refuses to run tests: the tests fail, all other parts run, and the exit code says so."""
    out, fake = tmp_path / "out", tmp_path / "python"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *pytest*|*fastarat.cli*|*"benchmarks ladder"*|*"benchmarks first"*) exit 3;; esac\nexec {sys.executable} "$@"\n')  # fmt: skip
    fake.chmod(0o755)
    environment = os.environ | {"OUT": str(out), "PYTHON": str(fake)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    summary = (out / "summary.md").read_text()
    assert re.findall(r"^\| (\w+) \| exit code 3 \|", summary, re.MULTILINE) == PARTS


def test_an_unknown_argument_is_refused(tmp_path):
    done = run(tmp_path / "out", "--dyr")
    assert done.returncode == 2
    assert "unknown argument --dyr" in done.stderr
