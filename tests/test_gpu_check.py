"""The unattended GPU check, run dry: every part runs, and what it leaves is complete and few files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = [
    ("a", "machine"),
    ("a", "first"),
    ("a", "profile"),
    ("b", "ladder"),
    ("c", "train"),
    ("c", "eval"),
    ("d", "matrix"),
    ("e", "tests"),
]


SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"


def run(out: Path, *argv: str, **more: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment |= {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more}
    command = ["bash", str(SCRIPT), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent, check=False)


def steps(out: Path, outcome: str) -> list[tuple[str, str]]:
    """Part and name of the steps that ended so, in order."""
    return re.findall(rf"^\| ([a-e]) \| (\w+) \| {outcome} \|", (out / "summary.md").read_text(), re.MULTILINE)


def executable(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_dry_run_leaves_all_its_results(tmp_path):
    """By a Python in which fastarat is not installed: -S leaves out what an installation from here adds to the path."""
    out = tmp_path / "out"
    bare = executable(tmp_path / "python", f'exec {sys.executable} -S "$@"')
    packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    done = run(out, "--dry", PYTHON=bare, PYTHONPATH=os.pathsep.join(packages))
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout[-3000:] + log[-3000:]
    files = {p.name for p in out.iterdir()}
    assert len(files) <= 8
    assert all(p.is_file() and re.fullmatch(r"[A-Za-z0-9._-]+", p.name) for p in out.iterdir())
    assert files == {"log.txt", "summary.md", "tests.xml", "ladder.json", "matrix.json", "first.json", "profile.json", "train.json"}  # fmt: skip
    summary = (out / "summary.md").read_text()
    assert steps(out, "done") == STEPS
    assert re.search(r"Tests: [1-9]\d* passed, 0 failed", summary)
    assert "dry run" in summary
    assert "random images: accuracies mean nothing" in summary
    kinds = {"ladder": "ladder", "matrix": "ladder", "first": "pairs", "profile": "profile"}
    for name, kind in kinds.items():
        record = json.loads((out / f"{name}.json").read_text())
        assert record["kind"] == kind
        assert record["results"]
    assert [r["case"] for r in json.loads((out / "first.json").read_text())["results"]] == ["captured", "conv-relu", "launch-gap"]  # fmt: skip
    training = json.loads((out / "train.json").read_text())
    (row,) = training["metrics"]
    assert row["epoch"] == 1
    assert set(training["evaluation"]["accuracy"]) == {"clean_acc", "robust_acc_pgd2"}
    assert "- test images: clean_acc " in summary


def test_a_failing_step_is_recorded_and_the_rest_goes_on(tmp_path):
    """A Python that refuses to run tests: the tests fail, all other steps run, and the exit code says so."""
    out = tmp_path / "out"
    refused = '*pytest*|*fastarat.cli*|*"benchmarks ladder"*|*"benchmarks first"*|*"benchmarks profile"*'
    fake = executable(tmp_path / "python", f'case "$*" in {refused}) exit 3;; esac\nexec {sys.executable} "$@"')
    assert run(out, "--dry", PYTHON=fake).returncode == 1
    # Without a checkpoint there is nothing to evaluate.
    assert steps(out, "exit code 3") == [step for step in STEPS if step != ("c", "eval")]


@pytest.mark.parametrize(("only", "code"), [("a,b,d", 0), ("e", 1)])
def test_a_step_stopped_by_the_clock_fails_nothing_but_the_tests(only, code, tmp_path):
    out = tmp_path / "out"
    executable(tmp_path / "bin" / "timeout", "exit 124")
    assert run(out, "--only", only, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}").returncode == code
    assert steps(out, "stopped by the clock") == [step for step in STEPS if step[0] in only]


def test_a_part_alone_leaves_the_others_results(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("first.json", "tests.xml"):
        (out / name).write_text("of an earlier run")
    executable(tmp_path / "bin" / "timeout", "exit 1")
    done = run(out, "--only=e", "--dry", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert {p.name for p in out.iterdir()} == {"log.txt", "summary.md", "first.json"}
    assert (out / "first.json").read_text() == "of an earlier run"


def test_what_the_steps_are_allowed_adds_up():
    """Under nine minutes in all, whatever is stopped by the clock, and the first two parts under three each."""
    text = SCRIPT.read_text()
    of_parts = {part[0]: part for part in re.split(r"^if chosen ", text, flags=re.MULTILINE)[1:]}
    own = {part: sum(map(int, re.findall(r"^ +allow (\d+)", of, re.MULTILINE))) for part, of in of_parts.items()}
    assert list(own) == ["a", "b", "c", "d", "e"]
    (whole,) = map(int, re.findall(r"^deadline=.* \+ (\d+)\)\)$", text, re.MULTILINE))
    assert sum(own.values()) == whole <= 520  # the summary, and ending what is stopped, take a while too
    assert own["a"] < 175
    (most,) = map(int, re.findall(r"^  allow \d+ (\d+)\n  step b ", text, re.MULTILINE))
    assert own["b"] <= most <= 175


@pytest.mark.parametrize("only", [(), ("",), ("f",), ("a,",), ("ab",)])
def test_unknown_parts_are_refused(only, tmp_path):
    done = run(tmp_path / "out", "--dry", "--only", *only)
    assert done.returncode == 2
    assert "expected parts out of a to e" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_argument_is_refused(tmp_path):
    done = run(tmp_path / "out", "--dyr")
    assert done.returncode == 2
    assert "unknown argument --dyr" in done.stderr
