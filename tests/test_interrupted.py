"""What ends, or is kept of, a run before an epoch's end, and a run that is extended: all to the same bits."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from archives import place_cifar
from small import assert_equal, assert_same, metrics, trained

import fastarat
from fastarat import training
from fastarat.cli import main
from fastarat.compare import compare
from fastarat.config import Config, OptimConfig, SwaConfig, from_dict
from fastarat.data import default_augment, load_dataset, make_loader, prepare
from fastarat.engine.step import TrainStep
from fastarat.files import load_checkpoint
from fastarat.interrupts import Interrupted, Pace, Signals
from fastarat.resuming import finished
from fastarat.runs import Run
from fastarat.training import train

# Everything that is state: averages, weight perturbation, a running mean in the companions, what an epoch began with.
FULL = {"swa": True, "swa_config": SwaConfig(start=0.3, every=2), "ema": 0.9, "awp": 0.01, "defense": fastarat.ARAT()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "unbroken", **FULL)


def after(monkeypatch, count: int, act) -> None:
    """Call `act` within step number `count`, from 1, of what is trained next."""
    call, calls = TrainStep.__call__, []

    def patched(self, images, labels):
        calls.append(None)
        if len(calls) == count:
            act()
        return call(self, images, labels)

    monkeypatch.setattr(TrainStep, "__call__", patched)


def sending(monkeypatch, count: int, signum: int = signal.SIGTERM) -> None:
    after(monkeypatch, count, lambda: signal.raise_signal(signum))


@contextmanager
def ended(step: int, signum: int = signal.SIGTERM, kind: type = Interrupted, match: str | None = None):
    """Send a signal within step number `step` of the block, which must end the block."""
    with pytest.MonkeyPatch.context() as patch:
        sending(patch, step, signum)
        with pytest.raises(kind, match=match) as raised:
            yield raised


def handlers():
    return [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def assert_same_run(run, wanted) -> None:
    assert_same(run, wanted)
    for which in ("best", "swa", "ema"):
        if Run(wanted).weights(which).is_file():
            assert_equal(Run(run).load_weights(which)[0], Run(wanted).load_weights(which)[0])
    found, expected = (load_checkpoint(Run(r).checkpoint()) for r in (run, wanted))
    assert found["best"] == expected["best"]
    momenta = [[s["momentum_buffer"] for s in c["step"]["optimizer"]["state"].values()] for c in (found, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*momenta, strict=True))
    assert not Run(run).checkpoint("unfinished").exists()


# Five steps an epoch: the first, in the middle, the last of one, the first of the next.
@pytest.mark.parametrize(
    ("step", "signum"), [(1, signal.SIGTERM), (8, signal.SIGTERM), (10, signal.SIGINT), (6, signal.SIGHUP)]
)
def test_a_signal_ends_a_run_after_the_step_and_the_epoch_goes_on(step, signum, unbroken, tmp_path, monkeypatch):
    before = handlers()
    with ended(step, signum, KeyboardInterrupt) as raised:
        trained(tmp_path / "run", **FULL)
    assert handlers() == before
    assert isinstance(raised.value, Interrupted)
    assert (raised.value.signum, raised.value.exit_code) == (signum, 128 + signum)
    assert f"step {(step - 1) % 5 + 1} of 5 in epoch {(step - 1) // 5 + 1} of 3; nothing is lost" in str(raised.value)
    state = load_checkpoint(tmp_path / "run" / "unfinished.pt")
    assert (state["epoch"], state["within"]["steps"]) == ((step - 1) // 5, (step - 1) % 5 + 1)
    train(resume=tmp_path / "run", progress=False)
    assert handlers() == before
    assert_same_run(tmp_path / "run", unbroken)


def test_a_run_interrupted_again_and_again_ends_the_same(unbroken, tmp_path, monkeypatch):
    with ended(2):
        trained(tmp_path / "run", **FULL)
    for steps in (1, 3, 4, 2):
        with ended(steps):
            train(resume=tmp_path / "run", progress=False)
    train(resume=tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("where", ["validation", "averaging", "set-up"])
def test_a_signal_outside_a_step_is_heard_at_once(where, unbroken, tmp_path, monkeypatch):
    begun, name = [], {"validation": "evaluate", "averaging": "averaged_model", "set-up": "build_step"}[where]

    def signalled(*args, **options):
        begun.append(None)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0)  # here a handler runs, in the middle
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr(training, name, signalled)
    with pytest.raises(Interrupted) as raised:
        trained(tmp_path / "run", **FULL)
    monkeypatch.undo()
    assert len(begun) == 1
    if where == "set-up":
        assert "before the first step" in str(raised.value)
        assert not (tmp_path / "run").exists()
        return
    train(resume=tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)


def test_a_second_signal_ends_at_once_and_leaves_the_checkpoint_before(unbroken, tmp_path, monkeypatch):
    def again(self, state, meta):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal was not heard")

    monkeypatch.setattr(Run, "save_unfinished", again)
    monkeypatch.setattr("fastarat.interrupts.APART_S", 0.0)
    with ended(8, match="at once by a second SIGINT"):
        trained(tmp_path / "run", **FULL)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1
    train(resume=tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)


def test_one_signal_that_comes_twice_is_one(unbroken, tmp_path, monkeypatch):
    """A terminal that is closed sends SIGHUP twice, and a group's end reaches a process from several sides."""

    def twice():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)

    after(monkeypatch, 8, twice)
    with pytest.raises(Interrupted, match="ended by SIGHUP after step 3 of 5 in epoch 2"):
        trained(tmp_path / "run", **FULL)
    monkeypatch.undo()
    train(resume=tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)


def test_a_signal_while_the_last_epoch_is_saved_finds_nothing_left_to_do(tmp_path, monkeypatch):
    save = Run.save

    def signalled(self, which, state, meta):
        save(self, which, state, meta)
        if which == "last" and state["epoch"] == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "save", signalled)
    with pytest.raises(Interrupted, match="ended by SIGTERM when all was done"):
        trained(tmp_path / "run")
    assert finished(Run(tmp_path / "run"))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "a"}, {"steps": -3}, {"steps": 10**9}, {"wall_s": "a"}, {"wall_s": float("nan")}, {"images": None},
        {"meter": 3}, {"rng": torch.zeros(3)}, {"generator": None}, {"device": 5, "meter": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_place_within_an_epoch_is_one_line(change, tmp_path, capsys):
    with ended(7):
        trained(tmp_path / "run")
    file = tmp_path / "run" / "unfinished.pt"
    state = load_checkpoint(file)
    state["within"] |= change
    torch.save(state, file)
    code = main(["train", "--resume", str(tmp_path / "run"), "--quiet"])
    said = capsys.readouterr().err
    if "device" in change:  # another kind of device: a stream of its own
        assert code == 0
        return
    assert code == 2
    assert "is not of this run, or damaged" in said
    assert said.count("\n") == 1


def test_the_checkpoint_before_is_kept_across_processes(tmp_path):
    """Runs that end within every epoch, as on machines that are taken away, keep the last two all the same."""
    with ended(6):
        trained(tmp_path / "run", epochs=4)
    for _ in range(2):
        with ended(6):
            train(resume=tmp_path / "run", progress=False)
    last, previous = (load_checkpoint(tmp_path / "run" / f"{name}.pt")["epoch"] for name in ("last", "previous"))
    assert (last, previous) == (3, 2)


def test_a_kill_while_the_config_was_written_leaves_a_folder_that_may_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.99.partial").write_text("half")
    trained(tmp_path / "run", epochs=1)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_caller_s_own_handler_is_called_after_the_checkpoint(tmp_path, monkeypatch):
    class Mine(BaseException):
        pass

    def mine(signum, frame):
        assert (tmp_path / "run" / "unfinished.pt").is_file()
        raise Mine

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with ended(3, kind=Mine):
            trained(tmp_path / "run")
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_training_in_another_thread_leaves_signals_alone(tmp_path):
    before, found = handlers(), []
    thread = threading.Thread(target=lambda: found.append(trained(tmp_path / "run", epochs=1)))
    thread.start()
    assert handlers() == before
    thread.join()
    assert found
    with Signals() as signals:
        assert signals.received is None


@pytest.mark.parametrize(("every", "kept"), [("2", 4), ("3", 3)])
def test_checkpoints_within_an_epoch_outlive_a_kill(every, kept, unbroken, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    after(monkeypatch, 10, kill)  # in the last step of the second epoch
    with pytest.raises(Killed):
        trained(tmp_path / "run", checkpoint_every=every, **FULL)
    monkeypatch.undo()
    state = load_checkpoint(tmp_path / "run" / "unfinished.pt")
    assert (state["epoch"], state["within"]["steps"]) == (1, kept)
    # The pace may change, as nothing of the run depends on it.
    train(resume=tmp_path / "run", overrides={"checkpoint_every": "1h"}, progress=False)
    assert_same_run(tmp_path / "run", unbroken)


def test_a_damaged_checkpoint_within_an_epoch_gives_way_to_the_one_before(unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with ended(7):
        trained(run, **FULL)
    content = bytearray((run / "unfinished.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "unfinished.pt").write_bytes(content)
    with pytest.warns(UserWarning, match=r"unfinished\.pt.*Going on after epoch 1 instead"):
        train(resume=run, progress=False)
    assert_same_run(run, unbroken)


def test_within_the_first_epoch_a_damaged_one_means_from_the_start(unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with ended(2):
        trained(run, **FULL)
    os.truncate(run / "unfinished.pt", 5000)
    with pytest.warns(UserWarning, match="Going on from the start instead"):
        train(resume=run, progress=False)
    assert_same_run(run, unbroken)


def test_one_left_behind_by_a_finished_epoch_is_not_gone_back_to(unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with ended(7):
        trained(run, **FULL)
    old = (run / "unfinished.pt").read_bytes()
    with ended(5):
        train(resume=run, progress=False)
    (run / "unfinished.pt").write_bytes(old)
    train(resume=run, progress=False)
    assert_same_run(run, unbroken)


def test_a_damaged_last_is_not_needed_within_an_epoch(unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with ended(13):
        trained(run, **FULL)
    os.truncate(run / "last.pt", 5000)
    with pytest.warns(UserWarning, match=r"last\.pt"):
        train(resume=run, progress=False)
    assert_same_run(run, unbroken)


def test_what_is_not_finite_is_not_kept_within_an_epoch(tmp_path, monkeypatch):
    def ruin():
        signal.raise_signal(signal.SIGTERM)
        next(iter(models)).running_mean.fill_(torch.inf)

    models, build = [], training.build_step

    def built(*args, **options):
        step = build(*args, **options)
        models.append(step.model.bn1)
        return step

    monkeypatch.setattr(training, "build_step", built)
    after(monkeypatch, 3, ruin)
    with pytest.raises(fastarat.training.Diverged, match="epoch 1, step 3 of 5"):
        trained(tmp_path / "run", defense=fastarat.AT())
    assert not (tmp_path / "run" / "unfinished.pt").exists()


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
@pytest.mark.parametrize("first", [1, 3, 5])
def test_an_epoch_from_its_middle_on_is_what_it_always_is(kind, first, tmp_path, monkeypatch, request):
    place_cifar(tmp_path / "data", monkeypatch)
    dataset = load_dataset("cifar10", data_dir=tmp_path / "data")
    if kind == "ffcv":
        request.getfixturevalue("ffcv")
        dataset = load_dataset(prepare("cifar10", tmp_path / "beton", data_dir=tmp_path / "data"))
    loader = make_loader(
        dataset.train, batch_size=7, device="cpu", kind=kind, shuffle=True, seed=3, augment=default_augment(dataset)
    )
    whole, part = list(loader.epoch(4)), list(loader.epoch(4, first))
    assert len(whole) > 5
    assert len(part) == len(whole) - first
    for one, other in zip(whole[first:], part, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_on_the_command_line_it_is_one_line_and_an_exit_code(signum, code, tmp_path, monkeypatch, capsys):
    run, flags = tmp_path / "a run", ["--limit-train", "160", "--batch-size", "32", "--epochs", "2", "--no-tensorboard"]
    sending(monkeypatch, 2, signum)
    assert main(["train", "--out", str(run), "--attack.num-steps", "1", "--eval.num-steps", "1", *flags]) == code
    found = capsys.readouterr()
    name = signal.Signals(signum).name
    assert found.err.strip() == (
        f"fastarat: ended by {name} after step 2 of 5 in epoch 1 of 2; nothing is lost: fastarat train --resume '{run}' "
        "goes on from there"
    )
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0
    assert "continuing after epoch 0, step 2 of 5 of epoch 1" in capsys.readouterr().out
    assert finished(Run(run))


def test_a_comparison_that_is_ended_goes_on_within_the_epoch(tmp_path):
    base = {"limit_train": 160, "batch_size": 32, "epochs": 2, "attack": {"num_steps": 1}, "eval": {"num_steps": 1}}
    options = {"base": base, "attack": "clean,pgd-2", "limit": 20, "progress": False}
    whole = compare(["at"], [0], out=tmp_path / "whole", **options)
    with ended(7, kind=fastarat.UserError, match="ended by SIGTERM; finished and begun"):
        compare(["at"], [0], out=tmp_path / "ended", **options)
    assert (tmp_path / "ended" / "at-seed0" / "unfinished.pt").is_file()
    again = compare(["at"], [0], out=tmp_path / "ended", **options)
    assert_same_run(tmp_path / "ended" / "at-seed0", tmp_path / "whole" / "at-seed0")
    found, expected = ([{**row, "epoch_s": 0} for row in comparison.rows] for comparison in (again, whole))
    assert found == expected


@pytest.mark.parametrize(
    ("every", "steps", "seconds"),
    [("1", 1, 0), ("500", 500, 0), ("90s", 0, 90), ("10min", 0, 600), ("1.5h", 0, 5400), (" 2 H ", 0, 7200)],
)
def test_a_pace(every, steps, seconds):
    assert (Pace(every).steps, Pace(every).seconds) == (steps, seconds)
    assert Config(checkpoint_every=every).checkpoint_every == every


@pytest.mark.parametrize("every", ["0", "-3", "", "0s", "0.1s", "10m", "1e9", "10 minutes", "9999999h", "1.5", "٣"])
def test_no_pace(every):
    with pytest.raises(fastarat.UserError, match=r"checkpoint_every=.*such as 500, or a time .* 10min"):
        Config(checkpoint_every=every)


def test_a_pace_goes_by_a_clock_that_nobody_sets():
    now = [1000.0]
    pace = Pace("10s", clock=lambda: now[0])
    found = []
    for moment in (1001, 1009, 1010, 1015, 1021, 1040):
        now[0] = moment
        found.append(pace.due())
    assert found == [False, False, True, False, True, True]
    assert Pace("10s")._clock is time.monotonic
    never, steps = Pace(None), Pace("3")
    assert not any(never.due() for _ in range(10))
    assert [steps.due() for _ in range(7)] == [False, False, True, False, False, True, False]


# --- runs that are extended


def lrs(run) -> list[float]:
    return [row["lr"] for row in metrics(run)]


@pytest.mark.parametrize(
    "options",
    [
        FULL,
        {"defense": fastarat.TRADES()},
        {"optim": OptimConfig(warmup=0)},
        {"optim": OptimConfig(recipe="rice", warmup=2)},
    ],
    ids=["full", "trades", "no warm-up", "per step"],
)
def test_an_extended_run_is_what_its_config_says(options, tmp_path, capsys):
    run = trained(tmp_path / "run", **options)
    train(resume=run, overrides={"epochs": 5})
    said = capsys.readouterr().out
    assert re.search(
        r"extended +epochs 1 to 3 by the schedule of 3 epochs \(lr .*\), 4 to 5 by the schedule of 5", said
    )
    assert Run(run).card_file.read_text() in said
    config = Run(run).read_config()
    assert (config.epochs, config.extended) == (5, (3,))
    assert finished(Run(run))
    assert len(metrics(run)) == 5
    assert_same_run(run, trained(tmp_path / "at-once", **{**options, "epochs": 5, "extended": (3,)}))
    assert lrs(run)[:3] == lrs(trained(tmp_path / "short", **options))
    first, last = re.findall(r"\(lr (\S+) to (\S+)\)", said)[0]
    assert float(last) == pytest.approx(lrs(run)[2], rel=1e-3)
    # What is logged is an epoch's last rate, and in a warm-up its first of five steps has a fifth of that.
    warms = "optim" in options and options["optim"].warmup
    assert float(first) == pytest.approx(lrs(run)[0] / (5 if warms else 1), rel=1e-3)
    assert lrs(run)[3:] == lrs(trained(tmp_path / "long", **{**options, "epochs": 5}))[3:]


def test_a_run_extended_before_its_end_or_twice_or_killed_meanwhile(tmp_path, monkeypatch):
    run, wanted = tmp_path / "run", trained(tmp_path / "wanted", epochs=4, extended=(2, 3))
    with ended(3):
        trained(run, epochs=2)
    with ended(4):
        train(resume=run, overrides={"epochs": 3}, progress=False)
    after(monkeypatch, 1, lambda: 1 / 0)  # before it writes a first checkpoint
    with pytest.raises(ZeroDivisionError):
        train(resume=run, overrides={"epochs": "4"}, progress=False)
    monkeypatch.undo()
    assert Run(run).read_config().extended == (2, 3)
    train(resume=run, progress=False)
    assert_same_run(run, wanted)


def test_which_runs_cannot_be_extended(tmp_path, capsys):
    run = trained(tmp_path / "run")
    before = {p: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(fastarat.UserError, match="a run of 3 epochs, which can be extended but not shortened"):
        train(resume=run, overrides={"epochs": 2}, progress=False)
    for flags in (["--epochs", "2"], ["--epochs", "many"], ["--epochs", "0"], ["--epochs", "5", "--seed", "2"]):
        assert main(["train", "--resume", str(run), *flags]) == 2
    assert {p: p.read_bytes() for p in run.iterdir()} == before
    config = yaml.safe_load((run / "config.yaml").read_text())
    for edit in ({"epochs": 9}, {"epochs": 9, "extended": [4]}, {"epochs": 9, "extended": [3], "seed": 5}):
        (run / "config.yaml").write_text(yaml.safe_dump({**config, **edit}))
        with pytest.raises(fastarat.UserError, match=r"config\.yaml was changed since"):
            train(resume=run, progress=False)


@pytest.mark.parametrize(("extended", "epochs"), [((5,), 5), ((3, 3), 5), ((4, 3), 5), ((0,), 5), ((7,), 5)])
def test_totals_of_an_extended_run_grow(extended, epochs):
    with pytest.raises(fastarat.UserError, match="extended"):
        from_dict({"extended": list(extended), "epochs": epochs})


def test_a_comparison_does_not_take_an_extended_run_for_a_plain_one(tmp_path):
    base = {"limit_train": 160, "batch_size": 32, "epochs": 1, "attack": {"num_steps": 1}, "eval": {"num_steps": 1}}
    options = {"attack": "clean", "limit": 20, "progress": False, "out": tmp_path / "runs"}
    compare(["at"], [0], base=base, **options)
    train(resume=tmp_path / "runs" / "at-seed0", overrides={"epochs": 2}, progress=False)
    for epochs in (1, 2):
        with pytest.raises(fastarat.UserError, match="was run with"):
            compare(["at"], [0], base={**base, "epochs": epochs}, **options)


# --- memory


def fails(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError("Unable to allocate 80. GiB for an array"),
    ],
    ids=["cuda", "cpu", "cudnn", "numpy"],
)
def test_out_of_memory_names_a_batch_size_to_try(error, tmp_path, monkeypatch, capsys):
    after(monkeypatch, 7, fails(error))
    flags = ["--limit-train", "160", "--batch-size", "32", "--epochs", "2", "--attack.num-steps", "1", "--quiet"]
    assert main(["train", "--out", str(tmp_path / "run"), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "out of memory with batch_size=32" in said
    assert "try batch_size=16, or a smaller network" in said
    assert ("2.00 GiB" in said) == isinstance(error, torch.OutOfMemoryError)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


def test_an_evaluation_out_of_memory_names_its_own_batch_size(tmp_path, monkeypatch, capsys):
    run = trained(tmp_path / "run", epochs=1)
    module = sys.modules["fastarat.evaluation.evaluate"]
    monkeypatch.setattr(module, "_measured", lambda *a: fails(torch.OutOfMemoryError("CUDA"))())
    assert main(["eval", str(run), "--batch-size", "64"]) == 2
    assert "out of memory with batch_size=64: try batch_size=32" in capsys.readouterr().err
    with pytest.raises(fastarat.UserError, match=r"validating took more memory .*--eval\.val-images 0"):
        trained(tmp_path / "other", epochs=1)


def test_other_errors_are_not_taken_for_it(tmp_path, monkeypatch):
    after(monkeypatch, 2, fails(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trained(tmp_path / "run")


# --- the real thing, from outside


def test_a_process_ended_from_outside(unbroken, tmp_path):
    """The wall clock is set back by a day meanwhile, which nothing goes by."""
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_interrupted import FULL, TrainStep, trained
call, clock = TrainStep.__call__, time.time
def slowly(self, *args):
    print("step", flush=True)
    time.sleep(0.2)
    time.time = lambda: clock() - 86400
    return call(self, *args)
TrainStep.__call__ = slowly
trained({str(tmp_path / "run")!r}, **FULL)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(7):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "Interrupted: ended by SIGTERM after step" in said
    assert (tmp_path / "run" / "unfinished.pt").is_file()
    train(resume=tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", unbroken)
