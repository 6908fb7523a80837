"""A folder has one writer, and children end with their parent: with real processes, really killed."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small import small_config, trained

import fastarat
from fastarat import child as child_module, locks
from fastarat.child import PARTING_S
from fastarat.children import Children, Stopped, terminable
from fastarat.cli import main
from fastarat.locks import held
from fastarat.runs import Run

HOLD = """
import sys, types
# The package's own __init__ loads torch, which takes seconds and is not looked at here.
package = types.ModuleType("fastarat"); package.__path__ = [sys.argv[2]]; sys.modules["fastarat"] = package
from fastarat import locks
if sys.argv[3:]:
    locks.fcntl = None
with locks.held(sys.argv[1], "fastarat train"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path, *flags: str) -> subprocess.Popen:
    argv = [sys.executable, "-c", HOLD, str(folder), str(Path(fastarat.__file__).parent), *flags]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    return child


def end(child: subprocess.Popen, how: int | None = None) -> None:
    if how is not None:
        child.send_signal(how)
    child.communicate()


@pytest.fixture(params=["flock", "plain"])
def kind(request, monkeypatch):
    """Also as on a file system, or a machine, without flock."""
    if request.param == "plain":
        monkeypatch.setattr(locks, "fcntl", None)
        return ["plain"]
    return []


def test_the_second_process_is_told_who_holds_the_folder(tmp_path, kind):
    child = holder(tmp_path / "run", *kind)
    words = rf"run is being written by process {child.pid} on host {socket.gethostname()} since .*\(fastarat train\)"
    with pytest.raises(fastarat.UserError, match=words), held(tmp_path / "run", "this"):
        pytest.fail("it was not refused")
    end(child)
    with held(tmp_path / "run", "this"):
        pass
    assert not list(tmp_path.iterdir()), "an empty folder that was made for the lock goes with it"


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path, kind):
    run = tmp_path / "run"
    end(holder(run, *kind), signal.SIGKILL)
    assert [p.name for p in run.iterdir()] == [locks.LOCK_FILES[bool(kind)]]
    assert Run.check_new(run).path == run
    with held(run, "this"):
        (run / "file").touch()
    assert [p.name for p in run.iterdir()] == ["file"]


def test_a_file_system_without_flock_has_the_plain_file(tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with held(tmp_path, "this"):
        assert [p.name for p in tmp_path.iterdir()] == [".lock.pid"]
    (tmp_path / ".lock.pid").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "noon", "doing": "x"}))
    with pytest.raises(fastarat.UserError, match=r"host elsewhere.*if it is gone, delete .*\.lock\.pid"):
        held(tmp_path, "this").__enter__()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 4000, b"[]", b'{"pid": 1e999}', b"null"])
def test_what_a_lock_file_holds_is_only_words(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with held(tmp_path, "this"):
        assert json.loads((tmp_path / ".lock").read_text())["doing"] == "this"
    with open(tmp_path / ".lock", "wb") as other:
        locks.fcntl.flock(other, locks.fcntl.LOCK_EX)
        other.write(content)
        other.flush()
        with pytest.raises(fastarat.UserError, match="written by another process: wait for it"):
            held(tmp_path, "this").__enter__()


def test_a_thread_goes_on_within_its_lock_and_another_is_refused(tmp_path):
    told = []

    def other():
        with pytest.raises(fastarat.UserError) as error:
            held(tmp_path, "that").__enter__()
        told.append(str(error.value))

    with held(tmp_path, "this"):
        with held(tmp_path / ".." / tmp_path.name, "that"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / ".lock").is_file()
    assert "another thread of this process (this)" in told[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch, code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.os, "open", refuse)
    with held(tmp_path, "this"):
        pass


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks.os, "open", refuse)
    with pytest.raises(fastarat.UserError, match=r"cannot write .*\.lock: No space left on device"):
        held(tmp_path, "this").__enter__()


def test_train_and_resume_refuse_a_folder_that_is_held(tmp_path, capsys):
    run = trained(tmp_path / "runs" / "run")
    before = (run / "metrics.jsonl").read_bytes()
    child = holder(run)
    assert main(["train", "--resume", str(run), "--quiet"]) == 2
    assert f"written by process {child.pid}" in capsys.readouterr().err
    end(child)
    assert (run / "metrics.jsonl").read_bytes() == before
    child = holder(tmp_path / "new")
    with pytest.raises(fastarat.UserError, match=f"written by process {child.pid}"):
        fastarat.train(small_config(tmp_path / "new"), progress=False)
    end(child)
    assert not (tmp_path / "new").exists()


COMPARE = [
    "--defenses", "standard,at", "--seeds", "0", "--limit-train", "320", "--batch-size", "16", "--epochs", "6",
    "--no-tensorboard", "--attack.epsilon", "0.1", "--attack.num-steps", "1", "--eval.val-images", "20",
    "--eval.num-steps", "1", "--test-attack", "clean,pgd-2", "--limit", "40", "--threads", "1", "--parallel", "2",
]  # fmt: skip


def begun(out: Path) -> subprocess.Popen:
    """A comparison with two trainings under way, an epoch of each done."""
    argv = [sys.executable, "-m", "fastarat.cli", "compare", *COMPARE, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    last = time.monotonic() + 120
    while len([f for f in out.glob("*/metrics.jsonl") if f.stat().st_size]) < 2:
        assert parent.poll() is None, parent.communicate()[1]
        assert time.monotonic() < last, "nothing was trained"
        time.sleep(0.05)
    return parent


def children_of(parent: subprocess.Popen) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")  # nobody in a container may collect the dead


def epochs(out: Path) -> dict[str, list[int]]:
    return {f.parent.name: [row["epoch"] for row in Run(f.parent).metrics()] for f in out.glob("*/metrics.jsonl")}


def accuracies(out: Path) -> list[dict]:
    rows = json.loads((out / "table.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "epoch_s"} for row in rows]


def test_a_killed_comparison_leaves_nothing_running_and_is_finished_by_the_same_command(tmp_path, capsys):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    parent = begun(killed)
    children = children_of(parent)
    assert len(children) == 2
    assert main(["compare", *COMPARE, "--out", str(killed)]) == 2
    assert f"killed is being written by process {parent.pid} on host" in capsys.readouterr().err
    end(parent, signal.SIGKILL)
    last = time.monotonic() + PARTING_S + 3
    while any(map(alive, children)):
        assert time.monotonic() < last, "a training outlived its comparison"
        time.sleep(0.05)
    assert max(map(max, epochs(killed).values())) < 6, "it was killed too late to show anything"
    assert main(["compare", *COMPARE, "--out", str(killed)]) == 0
    assert main(["compare", *COMPARE[:-1], "1", "--out", str(whole)]) == 0
    assert epochs(killed) == epochs(whole) == {f"{name}-seed0": [1, 2, 3, 4, 5, 6] for name in ("standard", "at")}
    assert accuracies(killed) == accuracies(whole)
    assert not list(killed.rglob(".lock*"))


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_comparison_that_is_told_to_end_waits_for_its_trainings(tmp_path, how, code):
    parent = begun(tmp_path)
    children = children_of(parent)
    parent.send_signal(how)
    said = parent.communicate(timeout=90)[1]
    assert parent.returncode == code
    assert said.count("\n") == 1
    assert "finished and begun runs are kept: the same command goes on from there" in said
    assert len(children) == 2
    assert not any(map(alive, children))


def test_a_training_whose_parent_is_gone_before_it_begins_writes_nothing(tmp_path):
    argv = [
        sys.executable,
        "-c",
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')",
        child_module.__file__,
    ]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == 143


def test_sigterm_is_as_it_was_after_a_comparison():
    with pytest.raises(Stopped, match="ended by SIGTERM; all is kept") as error, terminable("all is kept"):
        signal.raise_signal(signal.SIGTERM)
    assert error.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "x.log").mkdir()
    with pytest.raises(fastarat.UserError, match=r"cannot write .*x\.log: Is a directory"):
        Children(1).call(["train"], tmp_path / "x.log", {})
