"""`fastarat bench`: the work it credits, and that its numbers follow from its samples."""

import dataclasses
import json
import statistics
import time

import pytest
import torch
from defenses.test_costs import TABLE

import fastarat
from fastarat.bench import BenchConfig, bench, make_step, render
from fastarat.bench.bench import asked_precision, cost_of, forward_flops, phase_samples, step_flops
from fastarat.bench.harness import Clock, Marks, launches, profiled, quartiles
from fastarat.card import fast_paths
from fastarat.cli import main
from fastarat.defenses import ARAT, AT, TRADES, Standard
from fastarat.specs import Attack

CPU = torch.device("cpu")
TINY = BenchConfig(
    model="resnet-small",
    batch_size=4,
    image_size=8,
    repeats=3,
    steps=1,
    threads=1,
    device="cpu",
    attack=Attack(num_steps=2),
)


@pytest.fixture(scope="module")
def record():
    return bench(TINY, [ARAT(), TRADES()], command="made")


@pytest.mark.parametrize(("kind", "options", "counted"), TABLE)
def test_costs_are_those_that_are_counted(kind, options, counted):
    """Against what test_costs sees the steps do: a backward to the input is 1 F, a full one 2 F."""
    options = {"teacher": "a run", **options} if kind.name == "arrest" else options
    cost = cost_of(kind(**options))
    wanted = counted.forwards + counted.input_backwards + 2 * counted.full_backwards
    if options.get("mode") == "rgp_soft":  # its score's two backwards stop just before the layer they are counted by
        wanted += 4
    assert cost.forwards == wanted
    assert cost.teacher == counted.teacher_forwards + 2 * counted.teacher_backwards


def test_costs_by_hand():
    assert cost_of(AT(), num_steps=3).forwards == 3 * 2 + 3
    assert cost_of(AT(), num_restarts=4).forwards == 4 * 20 + 4 + 3
    assert cost_of(AT(), awp=True).forwards == 20 + 6
    assert cost_of(AT(), objective="kl").forwards == 24
    assert cost_of(Standard(), awp=True).forwards == 3

    class Mine(fastarat.Defense):
        needs_clean = True

    assert cost_of(Mine()).forwards == 26
    assert "2 x 10 attack + 2 forward + 2 x 2 backward" in cost_of(Mine()).formula


def test_flops_of_a_step_include_its_teacher():
    lbgat = fastarat.DEFENSES["lbgat"](teacher="resnet-small")
    step = make_step(TINY, lbgat, CPU, "fp32")
    forward = forward_flops(step.model, torch.zeros(1, 3, 8, 8))
    found, cost, one = step_flops(step, torch.zeros(1, 3, 8, 8))
    assert one == forward
    assert cost.teacher == 3
    # Two attack steps, the clean logits, two forwards, one backward; the teacher is the same network.
    assert found == forward * (2 * 2 + 1 + 2 + 2) + forward * 3


def test_numbers_follow_from_the_samples(record):
    for r in record["results"]:
        loop, matmul = r["samples_s"]["loop"], r["samples_s"]["matmul"]
        assert len(loop) == len(matmul) == r["repeats"] == 3
        middle = statistics.median(loop)
        assert r["ms"]["median"] == pytest.approx(1e3 * middle)
        assert r["epoch_s"]["median"] == pytest.approx(middle / 4 * 50_000)
        assert r["images_per_s"]["median"] == pytest.approx(4 / middle)
        flop = 4 * r["cost"]["flop_per_image"]
        assert r["tflops"]["median"] == pytest.approx(flop / middle / 1e12)
        shares = [flop / s / (2 * 2048**3 / m) for s, m in zip(loop, matmul, strict=True)]
        assert r["mfu"]["median"] == pytest.approx(statistics.median(shares))
        assert r["warmup_s"] > r["first_call_s"] > 0
        assert r["memory"]["peak_bytes"] > 2**20
        assert r["launches"]["ops"] > 100
    at, trades = record["results"]
    assert at["cost"]["forwards"] == 2 * 2 + 6
    assert trades["cost"]["forwards"] == 2 * 2 + 1 + 6
    assert record["data"] == "random images"


def test_phases_are_in_order_and_make_up_the_step(record):
    for r in record["results"]:
        assert list(r["phase_ms"]) == ["data", "attack", "forward", "backward", "optimiser", "metrics"]
        assert all(len(v) == 3 for v in r["phase_samples_s"].values())
        whole = sum(q["median"] for q in r["phase_ms"].values())
        assert 0.3 * r["ms"]["median"] < whole < 3 * r["ms"]["median"]


@pytest.mark.parametrize(
    ("defense", "capture", "first", "told"),
    [(Standard(), "off", [], "the same step uncaptured"), (AT(), "fake", ["attack"], "the captured step")],
)
def test_phases_of_a_step(defense, capture, first, told):
    phases, of = phase_samples(dataclasses.replace(TINY, capture=capture), defense, CPU, "fp32")
    assert list(phases) == [*first, "forward", "backward", "optimiser", "metrics"]
    assert of == told


def test_reporting_phases_changes_nothing():
    images, labels = torch.rand(4, 3, 8, 8), torch.randint(10, (4,))
    plain, marked = (make_step(TINY, ARAT(), CPU, "fp32") for _ in "ab")
    marked.mark = Marks(CPU)
    for step in (plain, marked):
        step(images, labels)
    for p, q in zip(plain.model.state_dict().values(), marked.model.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_a_gpu_is_told_why_its_loss_is_not_compiled():
    step = make_step(TINY, AT(), CPU, "fp32")
    assert "compiled loss" not in " ".join(fast_paths(step)[1])
    step.device = torch.device("cuda")
    assert "compiled loss (not yet measured to pay on a GPU; --compile-loss)" in fast_paths(step)[1]
    step.fast = dataclasses.replace(step.fast, compile_loss=True)
    on, off = fast_paths(step)
    assert "compiled loss" in on
    assert "compiled loss" not in " ".join(off)


def test_marks_measure_what_lies_between_them():
    marks = Marks(CPU)
    marks("forgotten")
    marks("start")
    time.sleep(0.02)
    marks("slept")
    marks("nothing")
    (first, slept), (second, nothing) = marks.read()
    assert (first, second) == ("slept", "nothing")
    assert 0.02 <= slept < 1
    assert nothing < 0.02


def test_clock_gives_the_time_of_one_call():
    assert 0.005 <= Clock(CPU)(lambda: time.sleep(0.005), 4) < 0.1


def test_quartiles_by_hand():
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0], 10) == {"q1": 20, "median": 30, "q3": 40}
    assert quartiles([7.0]) == {"q1": 7, "median": 7, "q3": 7}


def test_outermost_operations_are_counted():
    a, b = torch.randn(3, 4), torch.randn(4)

    def call():
        torch.nn.functional.linear(a, b[None])  # linear calls others, which are its own business; [] is one
        a.add_(1)

    assert launches(call, CPU) == {"ops": 3}
    (one,) = profiled(lambda: a.mul_(2), CPU)
    assert (one.kind, one.name) == ("ops", "aten::mul_")
    assert 0 < one.us < 1e6


def test_the_command_writes_every_sample(tmp_path, capsys):
    out = tmp_path / "deep" / "b.json"
    argv = ["bench", "--model", "resnet-small", "--batch-size", "2", "--image-size", "8", "--repeats", "2", "--steps",
            "1", "--threads", "1", "--device", "cpu", "--attack.num-steps", "1", "--defense", "lbgat", "--defense.beta", "6",
            "--out", str(out)]  # fmt: skip
    assert main(argv) == 0
    printed = capsys.readouterr().out
    for words in ("random images", "epoch of 50,000 images", "MFU", "machine's rate", "no: cpu has no CUDA graphs"):
        assert words in printed
    found = json.loads(out.read_text())
    assert "--attack.num-steps 1" in found["command"]
    assert found["config"]["attack"]["num_steps"] == 1
    assert len(found["results"][0]["samples_s"]["loop"]) == 2
    assert found["results"][0]["cost"]["training"] == 6  # 4 without the KL
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("able", [True, False])
def test_amp_means_what_it_means_to_train(able, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fastarat.device.bf16_support", lambda device: (able, "a CPU of this test"))
    monkeypatch.setattr("fastarat.device._MARGIN", 1e9)  # whatever the clock says, bf16 is the faster
    out = tmp_path / "b.json"
    tiny = ["--model", "resnet-small", "--batch-size", "2", "--image-size", "8", "--repeats", "1", "--steps", "1",
            "--threads", "1", "--device", "cpu", "--attack.num-steps", "1", "--out", str(out)]  # fmt: skip
    assert main(["bench", *tiny, "--amp"]) == 0
    record = json.loads(out.read_text())
    assert (record["config"]["amp"], record["config"]["precision"]) == (True, None)
    (result,) = record["results"]
    assert result["precision"] == ("bf16" if able else "fp32")
    printed = capsys.readouterr().out
    assert result["precision_note"] in printed
    assert ("because bf16 would be slower here: a CPU of this test" in printed) is not able
    assert main(["bench", *tiny, "--no-amp"]) == 0
    assert json.loads(out.read_text())["config"]["precision"] == "fp32"


def test_amp_gives_way_to_a_precision_that_was_asked_for():
    for cuda, default in ((False, "fp32"), (True, "bf16")):
        assert asked_precision(BenchConfig(), cuda=cuda) == default
        assert asked_precision(BenchConfig(amp=True), cuda=cuda) == ("bf16" if cuda else None)  # a CPU is timed
        assert asked_precision(BenchConfig(amp=False), cuda=cuda) == "fp32"
        for amp in (None, True, False):
            assert asked_precision(BenchConfig(amp=amp, precision="tf32"), cuda=cuda) == "tf32"
        assert asked_precision(BenchConfig(amp=True, precision="fp32"), cuda=cuda) == "fp32"  # as in train
        assert asked_precision(BenchConfig(amp=False, precision="bf16"), cuda=cuda) == "bf16"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-size", "1"], "--batch-size 1: expected 2 or more"),
        (["--defense", "tardes"], "did you mean 'trades'"),
        (["--model", "resnet19"], "unknown model"),
        (["--capture", "on"], "cpu has no CUDA graphs"),
        (["--precision", "fp8"], "Expected one of: fp32"),
        (["--repeat", "3"], "unknown flag --repeat"),
        (["--defense", "arrest"], "defense.teacher names none"),
        (["--defense", "mart,trades", "--defense.beta", "3"], "unknown flag --defense.beta"),
        (["--defense"], "expected one argument"),
    ],
)
def test_mistakes_are_one_line(argv, words, capsys):
    small = ["--model", "resnet-small", "--batch-size", "2", "--device", "cpu"]
    assert main(["bench", *small, *argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_render_names_the_reference_rate_only_on_an_h200(record):
    assert "790" not in render(record)
    told = render(record | {"machine": record["machine"] | {"device": "NVIDIA H200", "driver_version": "1"}})
    assert "share of 790 TFLOP/s" in told
