"""The harness: its pairs really agree, an unequal pair is refused, and its numbers follow from its samples."""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastarat.models import build_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is run from a checkout, never installed
cases = importlib.import_module("benchmarks.cases")
harness = importlib.import_module("benchmarks.__main__")
plain = importlib.import_module("benchmarks.plain")
CASES, Case, Pair, Size, Work = cases.CASES, cases.Case, cases.Pair, cases.Size, cases.Work

TINY = Size("resnet-small", 4, "cpu", "fp32", dry=True)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*argv: str) -> int:
    return harness.main(argv)


def constant_pair(difference: float) -> Pair:
    return Pair(
        lambda: sum(range(10_000)), lambda: sum(range(20_000)), lambda: {"x": (difference, 0.1)}, Work(1, "image"), {}
    )


def test_forward_flops_are_the_published_ones():
    images = torch.zeros(1, 3, 32, 32)
    assert cases.forward_flops(build_model("resnet18", num_classes=10), images) == pytest.approx(1.111e9, rel=1e-3)
    # By hand: a 3x3 convolution 3 -> 2 on 5x5, then 50 -> 4; two operations per product, biases not counted.
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(50, 4))
    assert cases.forward_flops(small, torch.zeros(1, 3, 5, 5)) == 2 * (25 * 2 * 27 + 50 * 4)
    assert cases.STEP_FORWARDS == 26


def test_the_plain_loop_and_the_engine_take_the_same_step():
    for name, (found, limit) in cases._check_step(TINY).items():
        assert found <= limit, name


@pytest.mark.parametrize("broken", ["step_size", "gamma", "branch", "weight_decay"])
def test_the_step_check_notices_a_wrong_loop(monkeypatch, broken):
    twins = cases._twins

    def wrong(*args, **options):
        made = twins(*args, **options)
        loop = made.loop
        if broken == "step_size":
            loop.step_size *= 1.01
        elif broken == "gamma":
            loop.gamma *= 1.01
        elif broken == "weight_decay":
            loop.optimizer.param_groups[0]["weight_decay"] = 0.5
        else:
            for module in loop.model.modules():
                if isinstance(module, plain.DualBatchNorm2d):
                    module.clean = module.adv
        return made

    monkeypatch.setattr(cases, "_twins", wrong)
    found = cases._check_step(TINY)
    assert any(value > limit for value, limit in found.values())


def test_the_plain_loop_moves_a_real_loss():
    twins = cases._twins(TINY, num_steps=1)
    losses = [twins.loop(twins.images_nchw, twins.labels) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert twins.loop.seen == 8 * 4


@pytest.mark.parametrize("name", [name for name in CASES if name != "loader-ffcv"])
def test_every_pair_is_equal(name):
    for quantity, (found, limit) in CASES[name].prepare(TINY).check().items():
        assert found <= limit, quantity


def allocated_at_most(call) -> int:
    """Bytes that PyTorch holds at most during the second of two calls, above those it held before it."""
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held)


def test_a_step_needs_no_more_memory_than_the_plain_loop():
    twins = cases._twins(cases.Size("resnet18", 16, "cpu", "fp32"), num_steps=1)
    ours = allocated_at_most(lambda: twins.step(twins.images, twins.labels))
    theirs = allocated_at_most(lambda: twins.loop(twins.images_nchw, twins.labels))
    assert theirs > 150e6
    assert ours <= theirs


def test_an_unequal_pair_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CASES, "broken", Case("broken", "", lambda size: constant_pair(float("nan"))))
    assert run("broken", "--dry", "--out", str(tmp_path)) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    (result,) = json.loads(next(tmp_path.iterdir()).read_text())["results"]
    assert "samples_s" not in result


def test_numbers_follow_from_the_samples(monkeypatch):
    order = []
    times = {"fast": iter([9, 9, 9, 2.0, 1.0, 4.0]), "plain": iter([9, 9, 9, 8.0, 2.0, 6.0])}

    def clock(self, call, calls):
        order.append(call())
        return next(times[order[-1]])

    pair = replace(constant_pair(0.0), fast=lambda: "fast", plain=lambda: "plain", work=Work(6.0, "image"))
    monkeypatch.setattr(harness.Clock, "__call__", clock)
    monkeypatch.setattr(harness, "_peak_memory", lambda *args: {})
    found = harness.measure(Case("made", "", lambda size: pair), TINY, repeats=3)
    assert order[6:] == ["fast", "plain", "plain", "fast", "fast", "plain"]
    assert found["samples_s"] == {"fast": [2.0, 1.0, 4.0], "plain": [8.0, 2.0, 6.0], "ceiling": []}
    assert found["ratio"] == {"q1": 1.75, "median": 2.0, "q3": 3.0}
    assert found["ms"]["fast"]["median"] == 2000
    assert "ratio_cpu" not in found  # a loader's work is not in this process's CPU time
    assert found["rate"]["fast"] == 3.0


def test_short_calls_are_repeated_within_a_sample(monkeypatch):
    monkeypatch.setattr(harness, "_peak_memory", lambda *args: {})
    found = harness.measure(Case("made", "", lambda size: constant_pair(0.0)), TINY, repeats=2)
    for side, calls in found["calls_per_sample"].items():
        assert calls * statistics.median(found["samples_s"][side]) > 0.002


def test_phases_add_up_to_the_step(monkeypatch, tmp_path):
    assert run("arat-phases", "--dry", "--threads", "1", "--out", str(tmp_path)) == 0
    (result,) = json.loads(next(tmp_path.iterdir()).read_text())["results"]
    for side in ("fast", "plain"):
        assert list(result["phase_ms"][side]) == ["attack", "forward", "backward", "optimiser", "metrics"]
        assert all(len(v) == result["repeats"] for v in result["phase_samples_s"][side].values())


def test_a_run_writes_what_its_numbers_depend_on_and_the_table_reads_it(tmp_path, capsys):
    assert run("split-bn", "--dry", "--repeats", "3", "--threads", "1", "--out", str(tmp_path)) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["machine"]["threads"] == 1
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["device"]
    assert {"python", "triton", "commit", "cores"} <= set(record["machine"])
    assert "--repeats 3" in record["command"]
    (result,) = record["results"]
    assert {side: len(v) for side, v in result["samples_s"].items()} == {"fast": 3, "plain": 3, "ceiling": 3}
    assert result["peak_memory"]["fast"]["rise_bytes"] > 0
    cpu = result["samples_cpu_s"]
    assert result["ratio_cpu"]["median"] == statistics.median(
        p / f for p, f in zip(cpu["plain"], cpu["fast"], strict=True)
    )
    capsys.readouterr()
    assert run("table", str(path)) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert row.count("|") == header.count("|")
    assert f"{result['ratio']['median']:.3g}" in row


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["split-bm"], "did you mean 'split-bn'"),
        (["--device", "tpu"], "expected auto, cpu, cuda"),
        (["--batch-size", "1"], "expected 2 or more"),
        (["--precision", "fp8"], "unknown precision"),
        (["--rounds", "3"], "unrecognized arguments"),
        (["arat-step", "--model", "wrn-34-10"], "choose --model resnet18"),
        (["table"], "no file given"),
        (["table", "nowhere.json"], "not a result"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, part, tmp_path, capsys):
    if argv[0] != "table":
        argv = [*argv, "--out", str(tmp_path)]
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_list_names_every_case(capsys):
    assert run("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CASES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_case_runs_on_cuda(tmp_path):
    assert run("--dry", "--device", "cuda", "--out", str(tmp_path)) == 0
