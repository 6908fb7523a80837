"""`--amp` is never slower than without: on a CPU a training step is timed both ways, and the choice moves nothing else."""

import re
import shutil
from importlib import import_module

import pytest
import small
import torch
from safetensors.torch import load_file

import fastarat
from fastarat import compare as compare_module, device as device_module
from fastarat.bench import BenchConfig, bench, render
from fastarat.cli import main
from fastarat.config import Config, from_dict, merge, read_yaml
from fastarat.device import fastest_precision
from fastarat.doctor import PARTS
from fastarat.released import resolve
from fastarat.runs import Run, dataset_of
from fastarat.specs import Attack
from fastarat.training import train

CPU = torch.device("cpu")
BASE = {
    "limit_train": 64, "batch_size": 32, "epochs": 1, "tensorboard": False, "amp": True,
    "attack": {"epsilon": 0.1, "num_steps": 1}, "eval": {"val_images": 20, "num_steps": 1},
}  # fmt: skip


class Machine:
    """A CPU that takes as long as it is told, by its own clock; what it is given to do is done all the same."""

    def __init__(self, monkeypatch, **seconds):
        self.now, self.seconds, self.calls, self.timings = 0.0, seconds, [], 0
        monkeypatch.setattr(device_module, "bf16_support", lambda device: (True, "the CPU of this test"))
        for module in ("fastarat.building", "fastarat.bench.bench"):
            monkeypatch.setattr(import_module(module), "fastest_precision", self.fastest)

    def fastest(self, device, build=None, **options):
        def timed(precision):
            call = build(precision) if build else lambda: None

            def run():
                call()
                took = self.seconds[precision]
                self.now += next(took) if hasattr(took, "__next__") else took
                self.calls.append(precision)

            return run

        self.timings += 1
        return fastest_precision(device, timed, clock=lambda: self.now, **options)


def weights(run):
    return load_file(run / "last.safetensors")


def assert_equal(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def line_of(run, row="precision"):
    (line,) = (line for line in (run / "card.txt").read_text().splitlines() if line.startswith(f"{row} "))
    return line.removeprefix(row).strip()


def stated(run):
    config = read_yaml(run / "config.yaml")
    return config["amp"], config["precision"]


@pytest.mark.parametrize(
    ("bf16", "fp32", "chosen", "said"),
    [
        (0.034, 0.026, "fp32", "float32: --amp was asked for, but here a step takes 34 ms in bf16 and 26 ms in float32 (the"),
        (0.026, 0.034, "bf16", "(--amp: here a step takes 26 ms in bf16 and 34 ms in float32, the least of 10, timed in "),
        (1 / 32, 1 / 32, "fp32", "a step takes 31.2 ms in bf16 and 31.2 ms in float32 (the least of 10"),
        (0.0245, 0.025, "fp32", "24.5 ms in bf16 and 25 ms in float32, less than 5% faster (the least of"),
        (2.363, 5.1, "bf16", "2.36 s in bf16 and 5.1 s in float32, once, timed in 7.46 s)"),
        (4.0, 5.1, "bf16", "4 s in bf16 and 5.1 s in float32, the least of 2, timed in 27.3 s)"),
        (5.1, 2.5, "fp32", "5.1 s in bf16 and 2.5 s in float32 (once, timed in 7.6 s)"),
        (0.9996, 0.9994, "fp32", "takes 1 s in bf16 and 999 ms in float32"),
    ],
)  # fmt: skip
def test_the_faster_of_the_two_is_kept_and_ties_go_to_float32(monkeypatch, bf16, fp32, chosen, said):
    precision, note = Machine(monkeypatch, bf16=bf16, fp32=fp32).fastest(CPU)
    assert precision == chosen
    assert said in note
    assert note.startswith("float32:" if chosen == "fp32" else "bf16 convolutions (--amp")


@pytest.mark.parametrize("seconds", [1e-4, 0.01, 0.1, 0.4, 1.0, 5.0])
def test_the_two_are_timed_in_turn_and_not_for_long(monkeypatch, seconds):
    machine = Machine(monkeypatch, bf16=seconds, fp32=seconds)
    machine.fastest(CPU)
    rounds = len(machine.calls) // 2 - 1
    assert machine.calls[:2] == ["fp32", "bf16"]  # each once, to warm up
    turns = [machine.calls[2 * n + 2 : 2 * n + 4] for n in range(rounds)]
    assert turns == [["fp32", "bf16"], ["bf16", "fp32"]] * (rounds // 2) + [["fp32", "bf16"]] * (rounds % 2)
    assert 2 <= rounds <= 10
    assert machine.now - 6 * seconds <= 1.0


def test_first_calls_and_a_burst_of_other_work_decide_nothing(monkeypatch):
    for chosen, bf16, fp32 in (("bf16", 0.02, 0.03), ("fp32", 0.03, 0.02)):
        slow_first = (iter([9.0, *[1.0] * 3, *[took] * 9]) for took in (bf16, fp32))
        machine = Machine(monkeypatch, **dict(zip(("bf16", "fp32"), slow_first, strict=True)))
        monkeypatch.setattr(device_module, "_BUDGET_S", 100)
        assert machine.fastest(CPU)[0] == chosen


@pytest.mark.parametrize(("able", "device"), [(False, "cpu"), (True, "cuda"), (False, "cuda")])
def test_nothing_is_timed_on_a_gpu_or_without_bf16(monkeypatch, able, device):
    monkeypatch.setattr(device_module, "bf16_support", lambda device: (able, "as this test says"))
    precision, note = fastest_precision(torch.device(device), build=pytest.fail, clock=pytest.fail, say=pytest.fail)
    assert (precision, note) == device_module.usable_precision("bf16", torch.device(device))
    assert precision == ("bf16" if able else "fp32")
    assert ("because bf16 would be slower here: as this test says" in note) is not able


def test_the_doctor_promises_no_more_than_a_timing(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert "--amp times a training step in both and keeps the faster" in PARTS["bf16 (--amp)"](CPU)[1]
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert "times a training step" not in PARTS["bf16 (--amp)"](CPU)[1]


def test_bf16_that_was_asked_for_is_neither_doubted_nor_praised(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, bf16=2.0, fp32=1.0)
    run = small.trained(tmp_path / "run", precision="bf16", epochs=1)
    assert machine.timings == 0
    assert stated(run) == (False, "bf16")
    assert line_of(run) == (
        "bf16 convolutions (asked for; --amp only where that is faster); statistics and losses float32"
    )


def test_the_real_choice_is_that_of_its_own_two_numbers(monkeypatch, tmp_path, capsys):
    """Digits, resnet-small, the machine's own clock; what it chooses here is this machine's affair."""
    monkeypatch.setattr(device_module, "bf16_support", lambda device: (True, "emulated, if it must be"))
    options = {"epochs": 2, "limit_train": None, "batch_size": 128}
    train(small.small_config(tmp_path / "amp", amp=True, **options))
    printed = capsys.readouterr().out
    assert printed.startswith("--amp: timing a training step in float32 and in bf16\n")
    note = line_of(tmp_path / "amp")
    assert note in printed
    found = re.search(r"here a step takes ([\d.]+) (m?s) in bf16 and ([\d.]+) (m?s) in float32", note)
    bf16, fp32 = (float(found[n]) * {"ms": 1e-3, "s": 1}[found[n + 1]] for n in (1, 3))
    chosen = "fp32" if note.startswith("float32:") else "bf16"
    assert bf16 <= 0.95 * 1.01 * fp32 if chosen == "bf16" else bf16 >= 0.95 * 0.99 * fp32  # of three digits
    assert stated(tmp_path / "amp") == (True, chosen)
    small.trained(tmp_path / "asked", precision=chosen, **options)
    assert_equal(tmp_path / "amp", tmp_path / "asked")


HARD = [
    {"swa": True, "swa_config": {"start": 0.4}, "ema": 0.9},
    {"defense": "trades", "awp": 0.01, "normalize": True},
    {"defense": "cure", "capture": "fake"},
    {"defense": "gairat", "compile_loss": False, "optim": {"recipe": "trades"}},
]


@pytest.mark.parametrize("options", HARD, ids=lambda o: o.get("defense", "ar-at"))
@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_a_run_that_chose_equals_the_run_that_was_told(monkeypatch, tmp_path, chosen, options):
    """Weights, BatchNorm statistics, averages, metrics: the timing leaves no trace."""
    if options.get("defense") == "cure":
        start = small.trained(tmp_path / "standard", defense=fastarat.Standard(), epochs=1)
        options = {**options, "defense": {"name": "cure", "pretrained": str(start)}}
    slower, faster = 0.03, 0.02
    machine = Machine(monkeypatch, **{"bf16": slower, "fp32": slower, chosen: faster})
    before = torch.get_rng_state()
    amp = small.trained(tmp_path / "amp", amp=True, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert machine.timings == 1
    told = small.trained(tmp_path / "told", precision=chosen, **options)
    assert machine.timings == 1
    for name in ("last", "best", "swa", "ema"):
        assert (amp / f"{name}.safetensors").exists() == (told / f"{name}.safetensors").exists()
        if (amp / f"{name}.safetensors").exists():
            a, b = (load_file(run / f"{name}.safetensors") for run in (amp, told))
            assert all(torch.equal(a[key], b[key]) for key in a)
    rows = [
        [{k: v for k, v in row.items() if k not in ("wall_s", "images_per_s")} for row in Run(run).metrics()]
        for run in (amp, told)
    ]
    assert rows[0] == rows[1]
    assert stated(amp) == (True, chosen)
    assert stated(told) == (False, chosen)
    for meta in (Run(amp).meta(), torch.load(amp / "last.pt")["meta"]):
        assert meta["precision"] == chosen
        assert "20 ms" in meta["precision_note"]
        assert line_of(amp).startswith(meta["precision_note"])
    assert ("precision bf16: the releases run in float32" in (amp / "card.txt").read_text()) is (chosen == "bf16")


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_a_resumed_run_keeps_what_its_first_part_ran_in(monkeypatch, tmp_path, chosen):
    Machine(monkeypatch, **{"bf16": 0.03, "fp32": 0.03, chosen: 0.02})
    whole = small.trained(tmp_path / "whole", amp=True)
    saved = {}
    own = Run.save

    def keep(folder, which, state, meta):
        own(folder, which, state, meta)
        if which == "last" and state["epoch"] == 1:
            saved["last.pt"] = (folder.path / "last.pt").read_bytes()

    monkeypatch.setattr(Run, "save", keep)
    run = small.trained(tmp_path / "run", amp=True)
    note = line_of(run)
    machine = Machine(monkeypatch, **{"bf16": 0.02, "fp32": 0.02, chosen: 0.03})  # now the other one would win
    for _ in range(2):
        (run / "last.pt").write_bytes(saved["last.pt"])
        train(resume=run, progress=False)
        assert_equal(run, whole)
        assert stated(run) == (True, chosen)
        assert line_of(run) == f"{note}; kept from when the run began"
    # Killed before its first checkpoint: what was chosen then still holds.
    (run / "last.pt").unlink()
    (run / "previous.pt").unlink()
    train(resume=run, progress=False)
    assert_equal(run, whole)
    assert line_of(run).startswith(
        {"fp32": "float32 (stated beside", "bf16": "bf16 convolutions (stated beside"}[chosen]
    )
    assert machine.timings == 0


def test_what_the_first_part_fell_back_to_is_kept_where_there_is_hardware(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(device_module, "bf16_support", lambda device: (False, "an old CPU"))
        run = small.trained(tmp_path / "run", precision="bf16", epochs=1)
    assert stated(run) == (False, "bf16")
    monkeypatch.setattr(device_module, "bf16_support", lambda device: (True, ""))
    assert train(resume=run, progress=False).config.precision == "bf16"
    assert line_of(run) == "float32, because bf16 would be slower here: an old CPU; kept from when the run began"
    assert Run(run).meta()["precision"] == "fp32"


def test_a_run_of_an_older_version_goes_on_in_bf16(monkeypatch, tmp_path):
    """It stated amp with precision bf16, and no precision in its metadata."""
    machine = Machine(monkeypatch, bf16=0.02, fp32=0.03)
    run = small.trained(tmp_path / "run", amp=True)
    whole = weights(run)
    state = torch.load(run / "last.pt")
    del state["meta"]["precision"], state["meta"]["precision_note"]
    torch.save(state, run / "last.pt")
    machine.seconds = {"bf16": 1.0, "fp32": 0.01}
    train(resume=run, progress=False)
    assert machine.timings == 1
    assert line_of(run).startswith("bf16")
    assert all(torch.equal(value, whole[name]) for name, value in weights(run).items())


def test_a_mistake_is_told_before_anything_is_timed(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, bf16=0.02, fp32=0.03)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for options, words in (
        ({"out": tmp_path / "taken"}, "exists already"),
        ({"swa": True, "swa_config": {"start": 0.4, "every": 500}}, "no snapshot would be taken"),
        ({"model": "resnet19"}, "unknown model"),
    ):
        with pytest.raises(fastarat.UserError, match=words):
            small.trained(**{"out": tmp_path / "new", "amp": True} | options)
    assert machine.calls == []


def test_what_flags_say_about_precision_stands_over_a_file():
    for file, flags, amp, precision in (
        ({"amp": True, "precision": "bf16"}, {"precision": "fp32"}, True, "fp32"),
        ({"amp": True, "precision": "fp32"}, {}, True, "fp32"),
        ({"amp": False, "precision": "fp32"}, {"amp": True}, True, None),
        ({"amp": True, "precision": "bf16"}, {"amp": False}, False, "fp32"),
        ({"amp": True, "precision": "fp32"}, {"amp": True, "precision": "bf16"}, True, "bf16"),
        ({}, {}, False, "fp32"),
    ):
        config = from_dict(merge(file, flags))
        config = resolve(config, dataset_of(config))
        assert (config.amp, config.precision) == (amp, precision), (file, flags)


def test_a_config_is_still_a_spec_of_a_step():
    assert Config(amp=True).fast.precision == "fp32"
    assert Config(precision="bf16").fast.precision == "bf16"
    assert small.step_of(fast=Config(amp=True, channels_last=False)).fast.precision == "fp32"


def table_of(out, defenses=("standard", "at"), **options):
    options = {"base": BASE, "attack": "clean,pgd-1", "limit": 20, "progress": False} | options
    return compare_module.compare(defenses, (0, 1), out=out, **options)


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_all_runs_of_a_comparison_compute_in_one_precision(monkeypatch, tmp_path, chosen):
    machine = Machine(monkeypatch, **{"bf16": 0.03, "fp32": 0.03, chosen: 0.02})
    seen, own = [], fastarat.building.build_step
    monkeypatch.setattr(
        fastarat.building,
        "build_step",
        lambda config, *args, **options: seen.append(config.defense.name) or own(config, *args, **options),
    )
    rows, tune = ("standard", "arrest", "at"), {"at:optim.lr": [0.1, 0.05]}
    table = table_of(tmp_path / "runs", rows, tune=tune, tune_seeds=(7,))
    assert machine.timings == 1
    assert set(seen) == {"arrest"}, "the row that takes longest is what is timed"
    configs = [*(tmp_path / "runs").glob("*/config.yaml"), *(tmp_path / "runs").glob("tune/*/config.yaml")]
    assert len(configs) == 8
    assert {stated(file.parent) for file in configs} == {(True, chosen)}
    assert {Run(file.parent).meta()["precision"] for file in configs} == {chosen}
    (said,) = (line for line in table.markdown().splitlines() if line.startswith("Precision of every row: "))
    assert {"fp32": "float32: --amp was asked for, but", "bf16": "bf16 convolutions"}[chosen] in said
    assert "20 ms" in said
    assert "one for all rows, found with arrest" in said
    # Another call, when the other one would win: nothing is timed, trained or said otherwise.
    machine.seconds = {"bf16": 0.02, "fp32": 0.02, chosen: 0.03}
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "train", pytest.fail)
        again = table_of(tmp_path / "runs", rows, tune=tune, tune_seeds=(7,))
    assert (again.rows, again.note()) == (table.rows, table.note())
    shutil.rmtree(tmp_path / "runs" / "at-seed1")
    (tmp_path / "runs" / "precision.json").unlink()
    table_of(tmp_path / "runs", rows, tune=tune, tune_seeds=(7,))
    assert machine.timings == 1
    assert stated(tmp_path / "runs" / "at-seed1") == (True, chosen)


def test_a_comparison_that_asks_for_nothing_says_nothing_of_precision(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, bf16=0.02, fp32=0.03)
    base = {**BASE, "amp": False}
    assert "Precision" not in table_of(tmp_path / "a", ("standard",), base=base).markdown()
    text = table_of(tmp_path / "b", ("standard",), base={**base, "precision": "bf16"}).markdown()
    assert "Precision of every row: bf16 convolutions (asked for" in text
    assert machine.timings == 0
    assert not (tmp_path / "b" / "precision.json").exists()


def test_processes_of_a_comparison_are_told(monkeypatch, tmp_path):
    threads = []
    machine = Machine(monkeypatch, bf16=0.03, fp32=0.02)
    own = machine.fastest
    monkeypatch.setattr(
        "fastarat.building.fastest_precision",
        lambda *args, **options: threads.append(torch.get_num_threads()) or own(*args, **options),
    )
    monkeypatch.setattr(compare_module.os, "cpu_count", lambda: 2)
    with device_module.threads(2):
        table_of(tmp_path / "runs", ("standard",), parallel=2)
    assert threads == [1], "timed with as many threads as each process will have"
    for seed in (0, 1):
        run = tmp_path / "runs" / f"standard-seed{seed}"
        assert stated(run) == (True, "fp32")
        assert line_of(run) == "float32 (stated beside --amp, not timed now)"
        assert "timing" not in (tmp_path / "runs" / f"standard-seed{seed}.log").read_text()


def test_the_bench_measures_what_train_would_choose(monkeypatch):
    tiny = {"model": "resnet-small", "image_size": 8, "batch_size": 2, "repeats": 1, "steps": 1, "threads": 1,
            "device": "cpu", "attack": Attack(num_steps=1)}  # fmt: skip
    machine = Machine(monkeypatch, bf16=0.03, fp32=0.02)
    record = bench(BenchConfig(amp=True, defense="at,standard", **tiny))
    assert machine.timings == 2
    assert [r["precision"] for r in record["results"]] == ["fp32"] * 2
    assert (record["config"]["amp"], record["config"]["precision"]) == (True, None)
    assert "20 ms" in record["results"][0]["precision_note"]
    assert record["results"][0]["precision_note"] in render(record)


def test_the_command_line_says_it_first(monkeypatch, tmp_path, capsys):
    Machine(monkeypatch, bf16=0.034, fp32=0.026)
    argv = ["train", "--amp", "--epochs", "1", "--limit-train", "64", "--batch-size", "32", "--attack.num-steps", "1",
            "--eval.val-images", "20", "--eval.num-steps", "1", "--no-tensorboard", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "float32: --amp was asked for, but here a step takes 34 ms in bf16 and 26 ms in float32 (" in printed
    places = [printed.index(words) for words in ("timing a training step", "float32: --amp was", "val clean")]
    assert places == sorted(places)
    assert main(["train", "--resume", str(tmp_path / "run"), "--amp"]) == 2
