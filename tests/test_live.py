"""What a comparison says while it runs: states, time left by hand, a pipe, a terminal."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from fastarat import live
from fastarat.bench.bench import forwards_of
from fastarat.config import from_dict
from fastarat.live import Board, duration, makespan
from fastarat.plans import Failure, Plan

COMPARE = [
    "compare", "--defenses", "at", "--seeds", "0", "--limit-train", "64", "--batch-size", "32", "--epochs", "2",
    "--no-tensorboard", "--attack.epsilon", "0.1", "--attack.num-steps", "1", "--eval.val-images", "20",
    "--eval.num-steps", "1", "--test-attack", "clean,pgd-2", "--limit", "20", "--threads", "1", "--parallel", "2",
]  # fmt: skip
CODE = "import sys, fastarat.live as l; l.LINE_S = l.REDRAW_S = 0.2; from fastarat.cli import main; sys.exit(main())"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plan_of(folder: Path, defense="at", seed=0, epochs=10, needs=None) -> Plan:
    out = folder / f"{defense}-seed{seed}"
    config = from_dict({"defense": defense, "epochs": epochs, "out": str(out), "attack": {"num_steps": 4}})
    return Plan(out.name, defense, seed, config, needs)


def wrote(plan: Plan, epochs: int, *, at: float, wall_s: float = 10.0) -> None:
    """The run's metrics after so many epochs, the last of which ended at `at`."""
    plan.run.path.mkdir(exist_ok=True)
    rows = [
        {"epoch": e, "wall_s": wall_s, "images_per_s": 1234.4, "val/clean_acc": 0.5, "val/robust_acc_pgd2": 0.25}
        for e in range(1, epochs + 1)
    ]
    plan.run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(plan.run.metrics_file, (at, at))


def test_jobs_take_the_places_that_are_free():
    assert makespan([5, 3, 2, 2], 2) == 7  # 5 | 3 2, then 2 after either at 5
    assert makespan([5, 3, 2, 2], 1) == 12
    assert makespan([], 3) == 0


def test_durations_are_as_rough_as_estimates():
    assert [duration(s) for s in (0.2, 59, 60, 840, 7500)] == ["0 s", "59 s", "1 min", "14 min", "2 h 05 min"]


def test_time_left_by_hand(tmp_path):
    clock, board = Clock(), Board(2)
    board = Board(2, clock)
    first, second, third = (plan_of(tmp_path, seed=seed) for seed in range(3))
    board.expect([first, second, third], tested=True)
    assert str(board.left()) == "time left unknown yet"
    board.set(first, "training")
    board.set(second, "training")
    assert str(board.left()) == "time left unknown yet"

    # An epoch of 10 s after 15 s: 5 s went by before it.
    clock.now = 1015
    wrote(first, 1, at=1015)
    board.refresh()
    assert board.training_left(first) == pytest.approx(90)
    assert board.training_left(second) == pytest.approx(5 + 100 - 15)
    assert board.training_left(third) == pytest.approx(5 + 100)
    assert board.left() == (pytest.approx(90 + 105), False), "no evaluation was finished: at least"
    assert str(board.left()) == "at least 3 min left"

    # The second epoch came 12 s later, validation included: that is the pace now. 3 s have passed since.
    clock.now = 1030
    wrote(first, 2, at=1027)
    board.refresh()
    assert board.training_left(first) == pytest.approx(8 * 12 - 3)

    for plan in (first, second, third):
        board.ended(plan, None)
    board.set(first, "evaluating")
    clock.now = 1050
    board.set(first, "done")
    assert board.left() == (pytest.approx(20), True), "two evaluations of 20 s, two at a time"
    board.set(second, "evaluating")
    clock.now = 1056
    assert board.evaluation_left(second) == pytest.approx(14)
    assert "3 of 3 runs trained, 1 evaluated; at-seed1 evaluating; about 20 s left" in board.line()
    board.more = True
    assert str(board.left()) == "at least 20 s left"


def test_a_defense_nobody_timed_takes_what_its_forwards_say(tmp_path):
    clock = Clock()
    board = Board(1, clock)
    at, trades = plan_of(tmp_path), plan_of(tmp_path, "trades")
    board.expect([at, trades], tested=False)
    board.set(at, "training")
    wrote(at, 1, at=1010)
    board.refresh()
    ratio = forwards_of(trades.config) / forwards_of(at.config)
    assert ratio > 1
    assert board.pace_of(trades) == pytest.approx(10 * ratio)
    assert board.left().exact, "nothing is evaluated"


def test_states_of_all_kinds(tmp_path):
    clock = Clock()
    board = Board(2, clock)
    plans = [plan_of(tmp_path, seed=seed) for seed in range(6)]
    board.expect(plans, tested=True)
    running, failed, diverged, kept, evaluated, _ = plans
    board.set(running, "training")
    wrote(running, 3, at=1040)
    board.ended(failed, Failure("no\x1b[2Jspace", False))
    board.ended(diverged, Failure("loss became NaN", True))
    board.set(kept, "kept")
    board.set(evaluated, "evaluating")
    state = {"fingerprint": {"members": ["apgd-ce", "apgd-t"]}, "done": {"apgd-ce": {}}, "pending": [1, 2, 3]}
    evaluated.run.state_dir.mkdir(parents=True)
    (evaluated.run.state_dir / "autoattack-fast-0123.json").write_text(json.dumps(state))
    rows, text = board.table()
    assert [row[1] for row in rows] == [
        "epoch 4 of 10", "failed: no\\x1b[2Jspace", "diverged: loss became NaN", "finished before",
        "evaluating autoattack-fast apgd-t, 3 images left", "waiting",
    ]  # fmt: skip
    assert rows[0][2:5] == ("50.0%", "25.0%", "1,234")
    assert text.startswith("2 of 6 runs trained, 1 evaluated, 2 failed; at least ")
    for content in ("", "[", "[]", '{"fingerprint": 3}', "[" * 5000):
        (evaluated.run.state_dir / "autoattack-fast-0123.json").write_text(content)
        assert board.table()[0][4][1] == "evaluating"


@pytest.mark.parametrize("size", [(200, 50), (80, 24), (50, 6), (20, 3), (8, 2)])
def test_a_table_fits_its_terminal(size, tmp_path):
    board = Board(2)
    plans = [plan_of(tmp_path, seed=seed) for seed in range(9)]
    board.expect(plans, tested=True)
    board.set(plans[7], "training")
    console = Console(width=size[0], height=size[1], color_system=None, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(live.render(board, console))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= size[0]
    assert len(lines) <= max(size[1], 3)
    if size == (50, 6):
        assert "at-seed7" in lines[1], "what runs comes first"
        assert "and 8 more" in lines[2]


def run_in(out: Path, **options) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", CODE, *COMPARE, "--out", str(out)], env=env, **options)


def test_a_pipe_is_told_what_goes_on(tmp_path):
    done = run_in(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = done.communicate(timeout=120)
    assert (done.returncode, err) == (0, "")
    told = [line for line in out.splitlines() if re.match(r"\[\d\d:\d\d:\d\d\] ", line)]
    assert any("at-seed0 epoch 1 of 2; time left unknown yet" in line for line in told)
    assert any("evaluating" in line for line in told)
    assert "\x1b" not in out
    assert "| at |" in out


def everything(terminal: int) -> str:
    """What was written to a terminal whose other end is closed; closes it."""
    said = b""
    with contextlib.suppress(OSError):
        while more := os.read(terminal, 4096):
            said += more
    os.close(terminal)
    return said.decode()


def interrupted(board: Board, plan: Plan) -> None:
    with live.shown(board, drawn=True):
        time.sleep(0.3)
        print("said meanwhile")
        wrote(plan, 3, at=time.time())
        time.sleep(0.3)
        raise KeyboardInterrupt


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_shows_a_table_and_is_left_as_it_was(term, tmp_path, monkeypatch):
    for name, value in {"TERM": term, "NO_COLOR": "1", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(live, "LINE_S", 0.1)
    monkeypatch.setattr(live, "REDRAW_S", 0.1)
    main, own = pty.openpty()
    board, plan = Board(2), plan_of(tmp_path)
    board.expect([plan, plan_of(tmp_path, seed=1)], tested=False)
    board.set(plan, "training")
    with open(own, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        with pytest.raises(KeyboardInterrupt):
            interrupted(board, plan)
        assert (sys.stdout, sys.stderr) == (terminal, terminal)
    text = everything(main)
    assert "said meanwhile" in text
    if term == "dumb":
        assert "\x1b" not in text
        assert "at-seed0 epoch 1 of 10; time left unknown yet" in text
        return
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is shown again"
    assert "\x1b[1A" in text, "it is redrawn in place"
    assert not re.search(r"\x1b\[(\d+;)*3\dm", text), "NO_COLOR"
    assert re.search(r"at-seed0 +epoch 1 of 10", text)
    assert re.search(r"at-seed0 +epoch 4 of 10 +50\.0% +25\.0%", text)


@pytest.mark.parametrize("stream", ["closed", "full", None])
def test_an_output_that_cannot_be_written_ends_the_saying_alone(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "LINE_S", 0.05)
    board, plan = Board(2), plan_of(tmp_path)
    board.set(plan, "training")
    # Neither buffer nor newline of its own keeps what cannot be written for the end.
    file = None if stream is None else os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    if file is not None and stream == "closed":
        file.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        patch.setattr(sys, "stderr", file)
        with live.shown(board, drawn=True):
            time.sleep(0.2)
    if file is not None and stream == "full":
        with pytest.raises(OSError, match="No space"):
            file.close()
