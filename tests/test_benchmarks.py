"""The harness: its pairs really agree, an unequal pair is refused, and its numbers follow from its samples."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace

import pytest
import torch
from costs import Backwards
from fastarat.kernels import conv

from benchmarks import __main__ as harness, contestants, gates, layers, plain, rungs, tables
from benchmarks.contestants import CASES, Case, Pairs, Setup, Work
from fastarat.bench.bench import forward_flops
from fastarat.bench.harness import Clock, Contestant
from fastarat.engine import shares
from fastarat.engine.graphs import Captured
from fastarat.nets.models import build_model
from fastarat.specs import Fast

TINY = Setup("resnet-small", 4, "cpu", "fp32", dry=True)


def run(*argv: str) -> int:
    return harness.main(argv)


def constant_pair(difference: float) -> Pairs:
    fast = Contestant("fast", lambda: lambda: sum(range(10_000)), lambda: {"x": (difference, 0.1)})
    return Pairs(Contestant("plain", lambda: lambda: sum(range(20_000))), [fast], Work(1, "image"))


def test_forward_flops_are_the_published_ones():
    images = torch.zeros(1, 3, 32, 32)
    assert forward_flops(build_model("resnet18", num_classes=10), images) == pytest.approx(1.111e9, rel=1e-3)
    # By hand: a 3x3 convolution 3 -> 2 on 5x5, then 50 -> 4; two operations per product, biases not counted.
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(50, 4))
    assert forward_flops(small, torch.zeros(1, 3, 5, 5)) == 2 * (25 * 2 * 27 + 50 * 4)
    assert contestants.STEP_FORWARDS == 26


def test_the_released_structure_and_the_engine_take_the_same_step_in_bf16():
    for name, (found, limit) in gates.check_step(replace(TINY, precision="bf16")).items():
        assert found <= limit, name


def test_the_bf16_band_is_held_against_enough_images(monkeypatch):
    """BatchNorm over two rows magnifies rounding: more images are compared than are timed."""
    compared = []

    def differences(setup: Setup, *, double: bool, **options: int) -> dict[str, float]:
        compared.append((double, setup.batch_size))
        return dict.fromkeys(gates.QUANTITIES, 0.0)

    monkeypatch.setattr(gates, "step_differences", differences)
    gates.check_step(Setup("resnet18", 2, "cpu", "bf16"))
    gates.check_step(Setup("resnet18", 2, "cpu", "fp32"))
    gates.check_step(Setup("resnet18", 64, "cpu", "bf16"))
    assert [n for double, n in compared if not double] == [16, 16, 2, 2, 64, 64]


def test_the_released_structure_and_the_engine_take_the_same_three_steps_in_float64():
    """Each from equal weights, momentum each side's own; the predictors and the loss of the engine are float32."""
    found = gates.step_differences(TINY, double=True, num_steps=gates.NUM_STEPS, steps=3)
    assert found.pop("adversarial pixels that differ by more than 1e-5, share") == 0
    for name, value in found.items():
        assert value < 1e-4, name


def released_backwards() -> Backwards:
    """What the first contestant of arat-step, as the harness gets it, asks of autograd in one step."""
    step = CASES["arat-step"].prepare(TINY).plain.build()
    with Backwards() as counted:
        step()
    return counted


def only_input_gradients(counted: Backwards) -> bool:
    """Whether there are 10 input gradients of each convolution in the attack and no weight gradients but the 2 after."""
    n = counted.convolutions
    return counted.to_weight == 2 * n and counted.to_input == 10 * n + 2 * (n - 1)


def test_the_released_structures_attack_makes_no_weight_gradient():
    assert released_backwards().convolutions == 9
    assert only_input_gradients(released_backwards())


def test_counting_notices_an_attack_that_makes_weight_gradients(monkeypatch):
    def wasteful(loss, inputs):
        loss.backward()
        return [adv.grad for adv in inputs]

    monkeypatch.setattr(plain.torch.autograd, "grad", wasteful)
    assert not only_input_gradients(released_backwards())


def test_the_released_structures_attack_changes_its_callers_batch_and_taps_features(monkeypatch):
    """The noise is added in place, and is the centre; every one of the attack's forwards pools the tapped features."""
    loop, (given, labels) = gates.released_loop(TINY), gates.random_batch(TINY)
    images = given.clone()
    noise = torch.empty_like(images).uniform_(-gates.EPSILON, gates.EPSILON)
    pooled = []
    pool = plain.F.adaptive_avg_pool2d
    monkeypatch.setattr(plain.F, "adaptive_avg_pool2d", lambda x, size: pooled.append(x) or pool(x, size))
    weights = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    budget = {"epsilon": gates.EPSILON, "step_size": gates.STEP_SIZE}
    adv = plain.pgd(loop.model.train(), images, labels, num_steps=10, noise=noise, **budget)
    assert torch.equal(images, given + noise)
    assert not adv.requires_grad
    assert (adv - images.clamp(0, 1)).abs().max() <= gates.EPSILON + 1e-6
    assert (adv - given).abs().max() > 1.2 * gates.EPSILON
    assert 0 <= adv.min() <= adv.max() <= 1
    assert len(pooled) == 10 * (1 + len(loop.predictors))
    for name, p in loop.model.named_parameters():
        assert p.grad is None, name
        assert torch.equal(p, weights[name]), name
    updates = {name: int(b) for name, b in loop.model.named_buffers() if name.endswith("num_batches_tracked")}
    assert {n for name, n in updates.items() if ".adv." in name} == {10}
    assert {n for name, n in updates.items() if ".clean." in name} == {0}


def test_the_harness_gives_the_released_structure_a_new_batch_at_every_step(monkeypatch):
    seen = []
    loop = plain.ARATLoop.__call__
    monkeypatch.setattr(plain.ARATLoop, "__call__", lambda self, images, *a, **k: seen.append(images.clone()) or loop(self, images, *a, **k))  # fmt: skip
    step = CASES["arat-step"].prepare(TINY).plain.build()
    step()
    step()
    assert torch.equal(*seen)


def break_twins(monkeypatch, broken: str, factor: float) -> None:
    right = gates.released_loop

    def wrong(*args, **options):
        loop = right(*args, **options)
        if broken in ("step_size", "gamma"):
            setattr(loop, broken, factor * getattr(loop, broken))
        elif broken == "lr":
            loop.optimizer.param_groups[0]["lr"] /= 2
        elif broken == "weight_decay":
            loop.optimizer.param_groups[0]["weight_decay"] = 0.5
        else:
            for module in loop.model.modules():
                if isinstance(module, plain.DualBatchNorm2d):
                    module.clean = module.adv
        return loop

    monkeypatch.setattr(gates, "released_loop", wrong)


@pytest.mark.parametrize(
    ("precision", "broken", "factor"),
    [*(("fp32", broken, 1.01) for broken in ("step_size", "gamma", "branch", "weight_decay")),
     *(("bf16", broken, 1.1 if broken == "gamma" else 1.5) for broken in ("gamma", "step_size", "lr", "branch"))],
)  # fmt: skip
def test_the_step_check_notices_a_wrong_loop(monkeypatch, precision, broken, factor):
    break_twins(monkeypatch, broken, factor)
    found = gates.check_step(replace(TINY, precision=precision))
    assert any(
        value > limit for name, (value, limit) in found.items() if precision == "fp32" or name.startswith("bf16")
    )


def test_the_released_structure_moves_a_real_loss():
    loop, (images, labels) = gates.released_loop(TINY, 1), gates.random_batch(TINY)
    losses = [loop(images.clone(), labels) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert loop.total_loss == pytest.approx(4 * sum(losses))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("loader-ffcv", "conv-relu")])
def test_every_pair_is_equal(name):
    for pair in CASES[name].prepare(TINY).fast:
        for quantity, (found, limit) in pair.check().items():
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


def test_a_step_needs_hardly_more_memory_than_the_released_structure():
    """One forward of [clean; adv] has gradients of both halves at once where two forwards have one half's: 3 %."""
    setup = Setup("resnet18", 16, "cpu", "fp32", num_steps=1)
    step, loop = gates.engine_step(setup, Fast(capture="off")), gates.released_loop(setup)
    batch = gates.random_batch(setup)
    images = batch.laid_out(channels_last=True)
    ours = allocated_at_most(lambda: step(images, batch.labels))
    theirs = allocated_at_most(lambda: loop(batch.images.clone(), batch.labels))
    assert theirs > 150e6
    assert ours <= 1.05 * theirs


def test_an_unequal_pair_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CASES, "broken", Case("broken", "", lambda setup: constant_pair(float("nan"))))
    assert run("broken", "--dry", "--out", str(tmp_path)) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    (result,) = json.loads(next(tmp_path.iterdir()).read_text())["results"]
    assert "samples_s" not in result


def test_numbers_follow_from_the_samples(monkeypatch):
    order = []
    # Once to size the sample, then three rounds.
    times = {"plain": iter([9, 8.0, 2.0, 6.0]), "fast": iter([9, 2.0, 1.0, 4.0]), "bf16": iter([9, 1.0, 1.0, 2.0])}

    def clock(self, call, calls):
        order.append(call())
        return next(times[order[-1]])

    monkeypatch.setattr(Clock, "__call__", clock)
    monkeypatch.setattr(harness, "_peak_memory", lambda *args: [{}] * len(args[-1]))
    ones = {name: Contestant(name, lambda name=name: lambda: name) for name in times}
    missing = Contestant("fp16", lambda: None, skipped="not today")
    pairs = Pairs(ones["plain"], [ones["fast"], missing, ones["bf16"]], Work(6.0, "image"))
    measured = harness.measure(Case("made", "", lambda setup: pairs), TINY, repeats=3)
    assert order[3:] == ["fast", "bf16", "plain", "bf16", "plain", "fast", "plain", "fast", "bf16"]
    found, skipped, other = measured
    assert skipped == {"case": "made", "skipped": "not today"}
    assert other["samples_s"] == {"fast": [1.0, 1.0, 2.0], "plain": [8.0, 2.0, 6.0], "ceiling": []}
    assert other["ratio"] == {"q1": 2.5, "median": 3.0, "q3": 5.5}
    assert found["samples_s"] == {"fast": [2.0, 1.0, 4.0], "plain": [8.0, 2.0, 6.0], "ceiling": []}
    assert found["ratio"] == {"q1": 1.75, "median": 2.0, "q3": 3.0}
    assert found["ms"]["fast"]["median"] == 2000
    assert "ratio_cpu" not in found  # a loader's work is not in this process's CPU time
    assert found["rate"]["fast"] == 3.0


def test_a_contestant_that_fails_leaves_the_others(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no call today\nand more")

    pairs = constant_pair(0.0)
    pairs = pairs._replace(fast=[*pairs.fast, Contestant("second", broken)])
    monkeypatch.setattr(harness, "_peak_memory", lambda *args: [{}] * len(args[-1]))
    first, second = harness.measure(Case("made", "", lambda setup: pairs), TINY)
    assert "ms" in first
    assert second["failed"] == "RuntimeError: no call today"
    assert tables.summary(second).endswith("failed: RuntimeError: no call today")
    pairs = pairs._replace(plain=Contestant("plain", broken), fast=pairs.fast[:1])
    (alone,) = harness.measure(Case("made", "", lambda setup: pairs), TINY)
    assert alone["failed"] == "baseline: RuntimeError: no call today"


def test_short_calls_are_repeated_within_a_sample(monkeypatch):
    asked = []
    # 0.4 ms a call, as measured by one call: a sample of 10 ms takes 25.
    monkeypatch.setattr(Clock, "__call__", lambda self, call, calls: asked.append(calls) or 0.0004)
    monkeypatch.setattr(harness, "_peak_memory", lambda *args: [{}] * len(args[-1]))
    (found,) = harness.measure(Case("made", "", lambda setup: constant_pair(0.0)), TINY, repeats=2)
    assert set(found["calls_per_sample"].values()) == {25}
    assert set(asked) == {1, 25}


def test_phases_add_up_to_the_step(monkeypatch, tmp_path):
    assert run("arat-phases", "--dry", "--threads", "1", "--out", str(tmp_path)) == 0
    (result,) = json.loads(next(tmp_path.iterdir()).read_text())["results"]
    for side in ("fast", "plain"):
        assert list(result["phase_ms"][side]) == ["attack", "forward", "backward", "optimiser", "metrics"]
        assert all(len(v) == result["repeats"] for v in result["phase_samples_s"][side].values())


def test_a_run_writes_what_its_numbers_depend_on_and_the_table_reads_it(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert run("split-bn", "--dry", "--repeats", "3", "--threads", str(threads + 1), "--out", str(tmp_path)) == 0
    assert torch.get_num_threads() == threads
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["machine"]["threads"] == threads + 1
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
    assert "| two nn.BatchNorm2d, float32 NCHW |" in row
    assert "| baseline, ms |" in header


@pytest.mark.parametrize("able", [True, False])
def test_one_command_measures_float32_and_bf16_against_the_released_structure(able, monkeypatch, tmp_path, capsys):
    if not able or not contestants.bf16_support("cpu")[0]:
        # A process of its own measures memory, and asks the machine itself.
        monkeypatch.setattr(harness, "_peak_memory", lambda *args: [{}] * len(args[-1]))
    monkeypatch.setattr(contestants, "bf16_support", lambda device: (able, "the CPU of this test"))
    argv = ["arat-step", "--dry", "--device", "cpu", "--threads", "1", "--out"]
    assert run(*argv, str(tmp_path)) == 0
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    single, half = json.loads(path.read_text())["results"]
    assert single["info"]["precision"] == "fp32"
    assert single["info"]["baseline"] == "released structure"
    assert any(name.startswith("float64") for name in single["equality"])
    if able:
        assert half["info"]["precision"] == "bf16"
        assert any(name.startswith("bf16") for name in half["equality"])
        assert half["samples_s"]["plain"] == single["samples_s"]["plain"]
        assert len(half["samples_s"]["fast"]) == len(half["samples_s"]["plain"]) == 2
        assert "bfloat16" in half["ceiling"]["name"]
        assert "float32" in single["ceiling"]["name"]
    else:
        assert half == {"case": "arat-step", "skipped": "no bf16 row: the CPU of this test"}
        assert "skipped: no bf16 row" in printed
        assert run(*argv, str(tmp_path), "--precision", "bf16") == 2
        assert "no bf16 row: the CPU of this test" in capsys.readouterr().err
    if "fast" in single["peak_memory"]:
        for result in (single, half):
            assert all(result["peak_memory"][side]["rise_bytes"] > 0 for side in ("fast", "plain"))
        assert "memory " in printed
    capsys.readouterr()
    assert run("table", str(path)) == 0
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "| released structure, ms | fastarat, ms | ratio |" in header
    assert [row.split(" | ")[3] for row in rows] == (["fp32", "bf16"] if able else ["fp32"])
    assert all(row.count("|") == header.count("|") for row in rows)
    # The loop is in float32: it has no share of the bf16 rate.
    assert ["(baseline: " in row for row in rows] == ([True, False] if able else [True])


def test_steps_are_timed_in_at_least_seven_rounds_unless_told(monkeypatch):
    monkeypatch.setattr(harness, "_peak_memory", lambda *args: [{}] * len(args[-1]))
    case = CASES["arat-step"]._replace(prepare=lambda setup: constant_pair(0.0))
    (found,) = harness.measure(case, replace(TINY, dry=False))
    assert found["repeats"] == len(found["samples_s"]["plain"]) >= 7


def made_result(case: str, plain_ms: float, **info: str) -> dict:
    q = {"q1": plain_ms, "median": plain_ms, "q3": plain_ms}
    half = {name: value / 2 for name, value in q.items()}
    info = {"what": "made", "plain": "of old", **info}
    rates = {"fast": 2.0, "plain": 1.0}
    return {"case": case, "info": info, "ms": {"plain": q, "fast": half}, "ratio": dict.fromkeys(q, 2.0), "rate": rates,
            "work": {"amount": 1.0, "unit": "image"}}  # fmt: skip


def test_the_released_structure_leads_the_tables_and_old_records_are_not_shown_as_it():
    machine = {"device": "A CPU", "threads": 1, "commit": "0123456789abcdef"}
    steps = {"baseline": plain.STRUCTURE, "precision": "bf16"}
    record = {
        "machine": machine,
        "results": [made_result("split-bn", 31.0), made_result("arat-step", 41.0), made_result("arat-step", 51.0, **steps)],
    }  # fmt: skip
    told = tables.markdown([record])
    lines = [line for line in told.splitlines() if line.startswith("| ")]
    header, row, other_header, other = [line for line in lines if not line.startswith("| ---")]
    assert "released structure, ms" in header
    assert "| bf16 | 51 (51 to 51) | 25.5 (25.5 to 25.5) | 2 (2 to 2) |" in row
    assert "released" not in other_header
    assert "| of old | 31 (31 to 31) |" in other
    assert "41" not in told
    del record["results"][2]
    fresh = {"machine": machine, "results": [made_result("arat-step", 51.0, **steps)]}
    told = tables.markdown([record])
    assert "41" not in told
    assert "`arat-step` on A CPU, 1 threads (commit 0123456789ab) is not shown" in told
    assert "python -m benchmarks arat-step" in told
    assert "not shown" not in tables.markdown([record, fresh])
    elsewhere = {**fresh, "machine": machine | {"cpu_capability": "AVX2"}}
    assert "not shown" in tables.markdown([record, elsewhere])
    assert "| A CPU, AVX2, 1 threads |" in tables.markdown([record, elsewhere])
    phases = {"case": "arat-phases", "info": {"what": "made"}, "phase_ms": {"plain": {"attack": {"q1": 1, "median": 1, "q3": 1}}}}  # fmt: skip
    assert "| attack |" not in tables.markdown([{"machine": machine, "results": [phases]}])
    phases["info"] |= steps
    assert "| released structure | A CPU, 1 threads | made | attack |" in tables.markdown(
        [{"machine": machine, "results": [phases]}]
    )


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
        (["ladder", "ar-at:resnet18"], "expected DEFENSE:MODEL:BATCH"),
        (["ladder", "ar-at:resnet18:1"], "expected DEFENSE:MODEL:BATCH"),
        (["ladder", "ar-tt:resnet18:8"], "did you mean 'ar-at'"),
        (["ladder", "--repeats", "0"], "expected 1 or more"),
        (["ladder", "--rounds", "3"], "unrecognized arguments"),
        (["ladder", "--cudnn-plans", "-1"], "expected 0 or more"),
        (["profile", "at:resnet18:8", "ar-at:resnet18:8"], "profile takes one setup"),
        (["readme", "--readme", "nowhere.md"], "cannot read nowhere.md"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, part, tmp_path, capsys):
    if argv[0] not in ("table", "readme"):
        argv = [*argv, "--out", str(tmp_path)]
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_list_names_every_case(capsys):
    assert run("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CASES)


def test_what_a_gpu_is_asked_first(monkeypatch, tmp_path, capsys):
    """On a CPU the graph is a fake one, and what needs cuDNN is skipped with its reason."""
    monkeypatch.setattr(harness, "_peak_memory", lambda *args: [{}] * len(args[-1]))
    out = tmp_path / "first.json"
    assert run("first", "--dry", "--device", "cpu", "--threads", "1", "--repeats", "2", "--out", str(out)) == 0
    record = json.loads(out.read_text())
    captured, conv, gap = record["results"]
    assert record["kind"] == "pairs"
    assert captured["info"]["autotuning_s"] > -1
    assert captured["equality"]
    assert all(value == 0 for value, _ in captured["equality"].values())
    assert conv == {"case": "conv-relu", "skipped": "cudnn_convolution_relu needs a GPU"}
    assert gap["rate"]["fast"] == pytest.approx(100 / statistics.median(gap["samples_s"]["fast"]))
    capsys.readouterr()
    assert run("table", str(out)) == 0
    assert "| the same step, eager |" in capsys.readouterr().out


def test_a_gpu_is_asked_in_processes_of_their_own(monkeypatch, tmp_path):
    """Both values of the variable that a process reads once, both limits of a search that a process makes once."""
    asked = []

    def elsewhere(name, setup, environment, *flags, timeout):
        asked.append((name, *environment.values(), *flags))
        return [{"case": name, "skipped": "not today"}]

    def broken(case, setup, repeats):
        asked.append((case.name,))
        raise RuntimeError("no card today\nand more")

    monkeypatch.setattr(harness, "_elsewhere", elsewhere)
    monkeypatch.setattr(harness, "measure", broken)
    args = harness._parser().parse_args(["first"])
    record = {"results": []}
    setup = replace(TINY, device="cuda")
    assert harness._run_cases(record, ["captured", "conv-relu", "launch-gap"], setup, args, tmp_path)
    assert asked == [
        ("captured", "--cudnn-plans", "10"),
        ("conv-relu", "0"),
        ("conv-relu", "1"),
        ("launch-gap",),
        ("captured", "--cudnn-plans", "0"),
    ]
    assert len(record["results"]) == 5
    assert record["results"][3] == {"case": "launch-gap", "failed": "RuntimeError: no card today"}


def test_a_case_asked_elsewhere_hands_back_its_results_or_says_why_not(capfd):
    (found,) = harness._elsewhere("launch-gap", TINY, {layers.RTC: "1"}, "--cudnn-plans", "0", "--repeats", "1")
    assert len(found["samples_s"]["fast"]) == 1
    (late,) = harness._elsewhere("launch-gap", TINY, {layers.RTC: "1"}, timeout=0.2)
    assert late == {"case": "launch-gap", "skipped": f"{layers.RTC}=1: not done after 0 s"}
    (broken,) = harness._elsewhere("launch-gap", TINY, {}, "--cudnn-plans", "-1")
    assert "--cudnn-plans -1: expected 0 or more" in broken["failed"]
    assert "--cudnn-plans -1: expected 0 or more" in capfd.readouterr().err  # what it said is not lost


def stand_in(x, weight, bias, residual, stride):
    """cuDNN as it may be: without an engine for the stem, off where a residual is added, else right."""
    if weight.shape[1] == 3:
        raise RuntimeError("no engine\nand more")
    y = layers.apart(x, weight, bias, residual, stride)
    return y if residual is None else 1.1 * y


def test_fused_convolutions_are_tried_layer_by_layer():
    cpu = torch.device("cpu")
    few = (layers.Layer(8, 8, 8, 1, False), layers.Layer(8, 8, 8, 1, True), layers.Layer(3, 8, 8, 2, False))
    plain, added, stem = (layers.tried(layer, 2, torch.float32, cpu, stand_in) for layer in few)
    assert "failed" not in plain
    assert plain["error"] < 1e-5
    assert min(plain["fused_ms"], plain["apart_ms"], plain["first_call_s"]) > 0
    assert added["failed"] == "off by 0.1"
    assert "fused_ms" not in added
    assert stem["failed"] == "RuntimeError: no engine"
    x, *_, stride = layers.drawn(few[2], 2, torch.float32, cpu)
    assert (x.shape, stride) == ((2, 3, 8, 8), 2)
    record = {"kind": "pairs", "machine": {"device": "A GPU", "driver_version": "1"}, "results": [{
        "case": "conv-relu", "skipped": "no engine", "info": {"rtc": "0", "layers": [plain, added, stem]},
    }]}  # fmt: skip
    told = tables.markdown([record])
    assert "| 0 | 3 to 8, 8x8, stride 2 | RuntimeError: no engine | - | - | - |" in told
    assert "| 0 | 8 to 8, 8x8, stride 1, residual added | off by 0.1 |" in told


def test_the_layers_tried_are_those_a_folded_resnet_has(monkeypatch):
    seen = set()

    def fused(x, weight, bias, residual, stride, padding):
        if weight.shape[-1] == 3:
            seen.add(layers.Layer(weight.shape[1], weight.shape[0], x.shape[-1], stride[0], residual is not None))
        return layers.apart(x, weight, bias, residual, stride[0])

    monkeypatch.setattr(conv, "_fused", fused)
    monkeypatch.setattr("fastarat.nets.attacker.why_not_conv_bias_relu", lambda device, dtype, kind=None: None)
    step = gates.engine_step(replace(TINY, model="resnet18", defense="at-eval"), Fast(capture="off"), 1)
    step.attack(*gates.random_batch(replace(TINY, batch_size=2)))
    assert seen == set(layers.LAYERS)


@pytest.mark.parametrize("broken", ["inputs", "steps", "generator"])
def test_the_check_of_a_captured_step_notices_a_wrong_replay(broken, monkeypatch):
    fake = Fast(capture="fake")
    assert all(value == 0 for value, _ in gates.check_captured(TINY, fake).values())
    if broken == "inputs":  # the graph goes on with the batch it was captured with
        call = Captured.__call__
        monkeypatch.setattr(Captured, "__call__", lambda self, *new: call(self, *self.inputs))
    elif broken == "steps":
        build = gates.engine_step
        monkeypatch.setattr(
            gates, "engine_step", lambda setup, fast, n: build(setup, fast, n + (fast.capture == "fake"))
        )
    else:  # what warming up draws is not given back
        preserved = shares.preserved
        monkeypatch.setattr(shares, "preserved", lambda changed, device, generators: preserved(changed, device, []))
    found = gates.check_captured(TINY, fake)
    for num_steps in ("1 attack step", f"{TINY.num_steps} attack step"):
        assert any(value > limit for name, (value, limit) in found.items() if num_steps in name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_case_runs_on_cuda(tmp_path):
    assert run("--dry", "--device", "cuda", "--out", str(tmp_path)) == 0
    assert run("first", "--dry", "--device", "cuda", "--out", str(tmp_path)) == 0


def test_a_profile_lists_what_an_eager_step_starts(tmp_path, capsys):
    out = tmp_path / "p.json"
    assert run("profile", "--dry", "--device", "cpu", "--threads", "1", "--out", str(out)) == 0
    record = json.loads(out.read_text())
    (found,) = record["results"]
    assert (record["kind"], record["dry"], record["cudnn_plans"]) == ("profile", True, 10)
    assert found["fast"]["capture"] == "off"
    assert found["first_call_s"] > 0
    kernels = found["kernels"]
    assert sum(row["count"] for row in kernels) > 100
    assert [row["us"] for row in kernels] == sorted((row["us"] for row in kernels), reverse=True)
    assert len({(row["kind"], row["name"]) for row in kernels}) == len(kernels)
    capsys.readouterr()
    assert run("table", str(out)) == 0
    told = capsys.readouterr().out
    assert f"| {kernels[0]['name']} | ops | {kernels[0]['count']:,} |" in told
    assert "Dry run at tiny sizes" in told


def test_a_profile_that_fails_leaves_its_times(monkeypatch, tmp_path):
    def broken(call, device):
        raise RuntimeError("no CUPTI today\nand more")

    monkeypatch.setattr(rungs, "profiled", broken)
    out = tmp_path / "p.json"
    assert run("profile", "--dry", "--device", "cpu", "--out", str(out)) == 1
    (found,) = json.loads(out.read_text())["results"]
    assert found["failed"] == "RuntimeError: no CUPTI today"
    assert found["ms"]["median"] > 0
