"""Callbacks: when they are called, what ends a run and what is kept of it, early stopping, results and loading."""

import dataclasses
import json
import os
import struct
import sys
import types
import warnings
from pathlib import Path

import pytest
import small
import torch
from beside import neighbour
from torch import Tensor

import fastarat
from fastarat import Callback, CallbackError, UserError, loggers, resuming
from fastarat.cli import main
from fastarat.config import EvalConfig


class Told(Callback):
    """Notes what it is told, and raises or stops where asked."""

    def __init__(self, *, stop: int | None = None, fail: str = "", at: int = 1):
        self.calls, self.stop, self.fail, self.at = [], stop, fail, at

    def _note(self, name, *what):
        self.calls.append((name, *what))
        if self.fail == name and sum(call[0] == name for call in self.calls) == self.at:
            raise RuntimeError("mine")

    def on_start(self, run):
        self._note("on_start", run.epochs, run.steps_per_epoch, run.epoch)

    def on_step(self, run, info):
        assert all(
            isinstance(term, Tensor) and not term.requires_grad and not term.dim() for term in info.terms.values()
        )
        self._note("on_step", info.epoch, info.step, info.total, info.images)
        if info.total == self.stop:
            run.stop("seen enough")

    def on_epoch(self, run, row):
        assert run.metrics[-1] == row
        self._note("on_epoch", row["epoch"])

    def on_checkpoint(self, run, path):
        assert path.is_file()
        self._note("on_checkpoint", path.name)

    def on_end(self, run, outcome):
        self._note("on_end", type(outcome).__name__)

    def without_steps(self):
        return [call for call in self.calls if call[0] != "on_step"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    return small.trained(tmp_path_factory.mktemp("callbacks") / "unbroken")


def test_callbacks_are_told_of_everything_and_change_nothing(tmp_path, unbroken):
    told = Told()
    result = fastarat.train(small.small_config(tmp_path / "run"), progress=False, callbacks=[told])
    steps = [call[1:] for call in told.calls if call[0] == "on_step"]
    assert steps == [(e, s, 5 * (e - 1) + s, 32) for e in (1, 2, 3) for s in (1, 2, 3, 4, 5)]
    each = [call for e in (1, 2, 3) for call in (("on_checkpoint", "last.pt"), ("on_epoch", e))]
    assert told.without_steps() == [("on_start", 3, 5, 0), *each, ("on_end", "Result")]
    assert result.stopped is None
    small.assert_same(tmp_path / "run", unbroken)


def test_a_callback_ends_a_run_after_its_step_and_it_goes_on_bit_for_bit(tmp_path, unbroken, capsys):
    told = Told(stop=7)
    result = fastarat.train(small.small_config(tmp_path / "run"), callbacks=[told])
    assert result.stopped == "seen enough"
    assert told.calls[-3:] == [("on_step", 2, 2, 7, 32), ("on_checkpoint", "unfinished.pt"), ("on_end", "Result")]
    assert "ended by a callback (seen enough) after step 2 of 5 in epoch 2 of 3" in capsys.readouterr().out
    assert "1 epoch of 3, stopped: seen enough" in repr(result)
    told = Told()
    assert fastarat.train(resume=result.run, progress=False, callbacks=[told]).stopped is None
    assert told.calls[:2] == [("on_start", 3, 5, 1), ("on_step", 2, 3, 8, 32)]
    small.assert_same(result.run, unbroken)


def test_a_stop_at_an_epochs_end_and_one_after_the_last_step(tmp_path):
    class AtEpoch(Callback):
        def __init__(self, epoch):
            self.epoch = epoch

        def on_epoch(self, run, row):
            if row["epoch"] == self.epoch:
                run.stop("done")

    config = small.small_config(tmp_path / "run")
    result = fastarat.train(config, progress=False, callbacks=[AtEpoch(1)])
    assert (result.stopped, result.epochs) == ("done", 1)
    assert not (result.run / "unfinished.pt").exists()
    result = fastarat.train(resume=result.run, progress=False, callbacks=[AtEpoch(3)])
    assert (result.stopped, result.epochs) == (None, 3)  # there was nothing left to end


@pytest.mark.parametrize(
    ("hook", "at", "kept"),
    [
        ("on_start", 1, "before the first step"),
        ("on_step", 7, "after step 2 of 5 in epoch 2 of 3; nothing is lost: fastarat train --resume"),
        ("on_checkpoint", 1, "after epoch 1 of 3; nothing is lost"),
        ("on_epoch", 3, "when all was done"),
        ("on_end", 1, "when all was done"),
    ],
)
def test_what_a_callback_raises_is_named_and_the_run_is_kept(tmp_path, unbroken, hook, at, kept):
    bad, other = Told(fail=hook, at=at), Told()
    with pytest.raises(CallbackError, match=rf"Told\.{hook} raised RuntimeError: mine {kept}") as caught:
        fastarat.train(small.small_config(tmp_path / "run"), progress=False, callbacks=[bad, other])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "\n" not in str(caught.value)
    # Whoever opened something can close it: all are told of the end.
    assert (bad.calls[-1][0], other.calls[-1][0]) == ("on_end", "on_end")
    if hook != "on_start":
        fastarat.train(resume=tmp_path / "run", progress=False)
        small.assert_same(tmp_path / "run", unbroken)


def test_an_error_of_on_end_does_not_hide_what_ended_the_run(tmp_path):
    class Both(Callback):
        def on_step(self, run, info):
            raise ValueError("first")

        def on_end(self, run, outcome):
            raise KeyError("second")

    with pytest.raises(CallbackError, match=r"Both\.on_step raised ValueError: first") as caught:
        fastarat.train(small.small_config(tmp_path / "run"), progress=False, callbacks=[Both()])
    assert caught.value.__notes__ == ["Both.on_end raised KeyError: 'second'"]


def test_what_is_no_callback_is_refused_before_any_work(tmp_path):
    class Misspelt(Callback):
        def on_epochs(self, run, row): ...

    for wrong, said in (
        (print, "expected a list of them"),
        (Told(), "expected a list of them"),
        ([print], "holds a builtin_function_or_method: expected instances of subclasses of fastarat.Callback"),
        ([Told], r"holds the class Told: write Told\(\)"),
        ([Misspelt()], r"Misspelt\.on_epochs: no hook has that name; did you mean 'on_epoch'"),
    ):
        with pytest.raises(UserError, match=said):
            fastarat.train(small.small_config(tmp_path / "run"), progress=False, callbacks=wrong)
    assert not (tmp_path / "run").exists()


def no_better(monkeypatch, best_epoch: int, metrics=("clean_acc", "robust_acc_pgd2")) -> None:
    """Validation that says the same after `best_epoch`, and less before."""
    from fastarat.training import Trainer

    def validated(self, epoch):
        return {f"val/{name}": 0.5 if epoch >= best_epoch else 0.1 for name in metrics}

    monkeypatch.setattr(Trainer, "_validate", validated)


def test_early_stop_ends_where_validation_stops_improving_resumed_or_not(tmp_path, monkeypatch, capsys):
    no_better(monkeypatch, 2)
    options = {"epochs": 9, "early_stop": 2, "limit_train": 64}
    run = small.trained(tmp_path / "run", **options)
    rows = small.metrics(run)
    assert [row["since_best"] for row in rows] == [0, 0, 1, 2]
    assert resuming.finished(fastarat.runs.Run(run))
    card = (run / "card.txt").read_text()
    assert "early stop" in card
    assert "stopped early  after epoch 4 of 9: the best is that of epoch 2" in card
    # Killed within the third epoch, it ends at the same place with the same weights.
    broken = fastarat.train(small.small_config(tmp_path / "b", **options), progress=False, callbacks=[Told(stop=5)])
    assert broken.stopped is not None
    again = fastarat.train(resume=broken.run, progress=False)
    assert (again.stopped, again.epochs, again.best["epoch"]) == (None, 4, 2)
    small.assert_same(again.run, run)
    # More patience that was written down before a kill, and no step done with it, is not taken for damage.
    folder = fastarat.runs.Run(run)
    folder.write_config(dataclasses.replace(folder.read_config(), early_stop=3))
    assert resuming.config_to_resume(folder, {}).early_stop == 3
    folder.write_config(dataclasses.replace(folder.read_config(), early_stop=2))
    # Finished, until it is asked for more patience.
    assert fastarat.train(resume=run).epochs == 4
    assert "is finished: stopped early" in capsys.readouterr().out
    assert fastarat.train(resume=run, overrides={"early_stop": "3"}, progress=False).epochs == 5
    assert fastarat.train(resume=run, overrides={"early_stop": "none"}, progress=False).epochs == 9
    assert "stopped early" not in (run / "card.txt").read_text()


def test_early_stop_waits_for_the_first_snapshot_of_swa_and_averages(tmp_path, monkeypatch):
    no_better(monkeypatch, 1)
    swa = fastarat.config.SwaConfig(start=0.5)
    run = small.trained(tmp_path / "run", epochs=8, early_stop=1, limit_train=64, swa=True, swa_config=swa)
    assert len(small.metrics(run)) == 5
    assert fastarat.load_run(run, "swa").meta["epoch"] == 5
    assert resuming.finished(fastarat.runs.Run(run))


def test_early_stop_is_refused_without_validation_images(capsys):
    assert main(["train", "--early-stop", "2", "--eval.val-images", "0"]) == 2
    assert "there are no validation images to stop by" in capsys.readouterr().err
    assert main(["train", "--early-stop", "0"]) == 2
    assert "early_stop=0: expected 1 or more" in capsys.readouterr().err


def test_a_result_is_short_and_load_run_finds_the_network(tmp_path, unbroken):
    result = fastarat.train(resume=unbroken, progress=False)
    assert len(repr(result)) < 300
    assert f"Result({unbroken}; 3 epochs; best (epoch " in repr(result)
    assert result.last == result.metrics[-1]
    best = torch.load(unbroken / "best.pt", weights_only=True)["best"]
    assert (result.best["epoch"], result.best["val/robust_acc_pgd2"]) == (best["epoch"], best["value"])
    assert result.seconds == pytest.approx(sum(row["wall_s"] for row in result.metrics))
    assert fastarat.load_run(unbroken).meta["epoch"] == best["epoch"]
    model, meta = fastarat.load_run(unbroken, "last")
    assert meta["epoch"] == 3
    assert not model.training
    small.assert_equal(model.state_dict(), small.weights(unbroken))
    with pytest.raises(UserError, match="has no swa weights"):
        fastarat.load_run(unbroken, "swa")
    no_val = small.trained(tmp_path / "run", epochs=1, eval=EvalConfig(val_images=0))
    assert fastarat.load_run(no_val).meta["epoch"] == 1
    assert fastarat.train(resume=no_val, progress=False).best is None


def test_csv_has_a_line_per_epoch_resumed_too(tmp_path):
    options = {"loggers": ("csv",), "eval": EvalConfig(val_images=40, num_steps=2, every=2)}
    result = fastarat.train(small.small_config(tmp_path / "run", **options), progress=False, callbacks=[Told(stop=12)])
    fastarat.train(resume=result.run, progress=False)
    head, *lines = (result.run / "metrics.csv").read_text().splitlines()
    assert head.startswith("epoch,lr,wall_s,images_per_s,train/loss")
    assert [line.split(",")[0] for line in lines] == ["1", "2", "3"]
    row = dict(zip(head.split(","), lines[1].split(","), strict=True))
    assert float(row["val/clean_acc"]) == small.metrics(result.run)[1]["val/clean_acc"]
    assert lines[0].endswith(",,")  # no validation after the first epoch


def test_loggers_are_checked_before_any_work(tmp_path, monkeypatch, capsys):
    run = ["train", "--out", str(tmp_path / "run"), "--loggers"]
    assert main([*run, "wanbd"]) == 2
    assert "did you mean 'wandb'?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert main([*run, "wandb"]) == 2
    assert "pip install 'fastarat[wandb]', or leave it out" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))  # what a folder of logs is imported as
    assert main([*run, "mlflow"]) == 2
    assert "the package is not installed, and a folder mlflow/ stands for it here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Broken(loggers._Logger):
    """A logger whose server is gone from the second epoch on, until the end."""

    name = "broken"

    def __init__(self):
        super().__init__()
        self.rows, self.attempts, self.ended = [], 0, None

    def begin(self, run, kept):
        return {"id": "x"}

    def send(self, rows):
        self.attempts += 1
        os.environ["LEFT_BEHIND"] = "1"
        if self.attempts == 2:
            raise ConnectionError("no\nroute")
        self.rows += [row["epoch"] for row in rows]

    def end(self, summary, how):
        self.ended = summary, how


def test_a_logger_that_fails_warns_once_and_changes_nothing(tmp_path, unbroken, monkeypatch):
    broken = Broken()
    monkeypatch.setitem(loggers._LOGGERS, "csv", lambda: broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = small.trained(tmp_path / "run", loggers=("csv",))
    assert [str(w.message).split(";")[0] for w in caught if "logging" in str(w.message)] == [
        "logging to broken failed (ConnectionError: no route)"
    ]
    assert (broken.rows, broken.attempts) == ([1, 2, 3], 3)
    assert broken.ended[1] == "finished"
    assert "LEFT_BEHIND" not in os.environ
    small.assert_same(run, unbroken)


def records(file):
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that no header fits in
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield b"".join(parts)
            parts = []


def test_weights_and_biases_offline_is_one_run_across_a_resume(tmp_path, monkeypatch):
    wandb = neighbour("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    config = small.small_config(tmp_path / "run", loggers=("wandb",))
    result = fastarat.train(config, progress=False, callbacks=[Told(stop=7)])
    assert wandb.run is None
    fastarat.train(resume=result.run, progress=False)
    kept = json.loads((result.run / "wandb.json").read_text())
    files = sorted((result.run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    history, runs, summary = [], [], {}
    for file in files:
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            history += [{(i.key or ".".join(i.nested_key)): i.value_json for i in record.history.item}] * record.HasField("history")  # fmt: skip
            runs += [record.run] * record.HasField("run")
            summary |= {(i.key or ".".join(i.nested_key)): i.value_json for i in record.summary.update}
    assert {(run.run_id, run.project) for run in runs} == {(kept["id"], "mine")}
    rows = small.metrics(result.run)
    assert [json.loads(row["epoch"]) for row in history] == [1, 2, 3]
    assert [json.loads(row["train/loss"]) for row in history] == [row["train/loss"] for row in rows]
    assert json.loads(summary["last/robust_acc_pgd2"]) == rows[-1]["val/robust_acc_pgd2"]
    config = {item.key: item.value_json for item in runs[0].config.update}
    assert json.loads(config["batch_size"]) == 32
    assert "PGD-2 linf" in runs[0].notes


def test_mlflow_is_one_run_across_a_resume(tmp_path, monkeypatch):
    mlflow = neighbour("mlflow")
    monkeypatch.chdir(tmp_path)  # where artifacts go by default
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config = small.small_config(tmp_path / "run", loggers=("mlflow",))
    result = fastarat.train(config, progress=False, callbacks=[Told(stop=7)])
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fastarat").experiment_id
    assert client.search_runs([experiment])[0].info.status == "KILLED"
    fastarat.train(resume=result.run, progress=False)
    assert mlflow.active_run() is None
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert (run.data.params["defense.name"], run.data.params["attack.epsilon"]) == ("ar-at", "0.1")
    rows = small.metrics(result.run)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(row["epoch"], row["train/loss"]) for row in rows]
    assert run.data.metrics["last/robust_acc_pgd2"] == rows[-1]["val/robust_acc_pgd2"]
    assert "PGD-2 linf" in next(tmp_path.glob("mlruns/**/card.txt")).read_text()
