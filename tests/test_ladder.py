"""The ladder and the tables: rungs are equal where they should be, numbers follow, nothing is typed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time

import pytest
import torch
from costs import Backwards

from benchmarks import __main__ as harness, gates, rungs, tables
from fastarat.bench import BenchConfig, bench, harness as bench_harness
from fastarat.bench.harness import Clock, Marks
from fastarat.defenses import AT, TRADES
from fastarat.engine.graphs import Captured
from fastarat.specs import Attack


def tiny(defense: str, num_steps: int = 10) -> gates.Setup:
    return gates.Setup("resnet-small", 4, "cpu", dry=True, defense=defense, num_steps=num_steps)


def run(*argv: object) -> int:
    return harness.main([str(a) for a in argv])


def ladder(out, *argv: object, code: int = 0) -> dict:
    """The record of a dry ladder, which ends with this exit code."""
    assert run("ladder", *argv, "--dry", "--device", "cpu", "--out", out) == code
    return json.loads(out.read_text())


def rungs_of_a_bad_ladder(out) -> dict[str, dict]:
    (found,) = ladder(out, "at:resnet18:128", "--repeats", "1", code=1)["results"]
    return {r["name"]: r for r in found["rungs"]}


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    """A dry ladder of TRADES, whose attack is in eval mode: every rung a CPU has."""
    out = tmp_path_factory.mktemp("ladder") / "l.json"
    return ladder(out, "trades:resnet18:128", "--repeats", "3", "--threads", "1")


def test_a_ladder_times_every_rung_this_machine_has(climbed):
    (found,) = climbed["results"]
    names = [r["name"] for r in found["rungs"]]
    assert names == ["released", "step", "channels-last", "bf16", "triton", "graph", "fold", "compile"]
    timed = [r for r in found["rungs"] if "ms" in r]
    assert {"released", "step", "channels-last", "graph", "fold"} <= {r["name"] for r in timed}
    for r in found["rungs"]:
        assert ("ms" in r) != ("skipped" in r), r["name"]
    assert climbed["dry"]
    assert climbed["data"] == "random images"


def test_a_ladders_numbers_follow_from_its_samples(climbed):
    (found,) = climbed["results"]
    timed = [r for r in found["rungs"] if "ms" in r]
    flop = 4 * found["cost"]["flop_per_image"]
    assert found["cost"]["forwards"] == 2 * 2 + 1 + 6
    peaks = [2 * 256**3 / s for s in found["peak"]["samples_s"]]
    assert len(peaks) == found["rounds"] == 3
    for before, r in zip([None, *timed], timed, strict=False):
        times = r["samples_s"]
        assert len(times) == 3
        assert r["epoch_s"]["median"] == pytest.approx(statistics.median(times) * 50_000 / 4)
        assert r["tflops"] == pytest.approx(flop / statistics.median(times) / 1e12)
        assert r["mfu"] == pytest.approx(statistics.median(flop / s / p for s, p in zip(times, peaks, strict=True)))
        if before is not None:
            gains = [1e3 * (a - b) for a, b in zip(before["samples_s"], times, strict=True)]
            assert r["gain_ms"]["median"] == pytest.approx(statistics.median(gains))
        # Against what people run, however many rungs lie between.
        ratios = [a / b for a, b in zip(timed[0]["samples_s"], times, strict=True)]
        assert r["ratio"]["median"] == pytest.approx(statistics.median(ratios))
        assert "predicted" not in r  # the predictions are for ResNet-18 at batch 128
        assert r["launches"]["ops"] > 100


@pytest.mark.parametrize("defense", ["at", "at-eval", "trades"])
def test_loops_of_the_released_structure_take_the_engines_step(defense):
    for name, (found, limit) in gates.check_rung(tiny(defense), None).items():
        assert found <= limit, name


@pytest.mark.parametrize("broken", ["beta", "attack_mode", "num_steps", "start"])
def test_the_equality_check_notices_a_wrong_loop(monkeypatch, broken):
    right = gates.released_loop

    def wrong(*args):
        loop = right(*args)
        if broken == "start":
            call = loop.attack
            loop.attack = lambda images, labels, start=None: call(images, labels, images)
        else:
            values = {"beta": 5.5, "attack_mode": "train", "num_steps": loop.num_steps + 1}
            setattr(loop, broken, values[broken])
        return loop

    monkeypatch.setattr(gates, "released_loop", wrong)
    found = gates.check_rung(tiny("trades"), None)
    assert any(value > limit for value, limit in found.values())


def test_an_unequal_rung_is_not_timed_and_fails_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        gates, "check_rung", lambda setup, fast: {"x": (float("nan"), 1.0)} if fast == gates.PLAINEST else {}
    )
    found = rungs_of_a_bad_ladder(out := tmp_path / "l.json")
    assert "NOT EQUAL" in capsys.readouterr().out
    assert "samples_s" not in found["step"]
    gain = found["released"]["samples_s"][0] - found["channels-last"]["samples_s"][0]
    assert found["channels-last"]["gain_ms"]["median"] == pytest.approx(1e3 * gain)
    assert run("table", out) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "| our step, eager" in line]
    assert "NOT EQUAL, not timed: x nan | - |" in row


def test_a_failing_rung_leaves_the_others(monkeypatch, tmp_path):
    right = rungs.engine_step

    def built(setup, fast):
        if fast.capture == "fake":
            raise RuntimeError("no graphs today\nand more")
        return right(setup, fast)

    monkeypatch.setattr(rungs, "engine_step", built)
    found = rungs_of_a_bad_ladder(tmp_path / "l.json")
    assert found["graph"]["failed"] == "RuntimeError: no graphs today"
    assert "ms" in found["channels-last"]


def test_out_of_time_keeps_what_was_built_and_says_so(tmp_path):
    kept = []
    found = {}
    later = {"deadline": time.monotonic(), "on_rung": lambda: kept.append(json.dumps(found))}
    harness.climb(tiny("at", 1), found, repeats=50, **later)
    timed = [r for r in found["rungs"] if "ms" in r]
    assert [r["name"] for r in timed] == ["graph"]  # the rung built first
    assert len(timed[0]["samples_s"]) == 3
    assert {r["skipped"] for r in found["rungs"] if r["name"] in ("released", "step")} == {"out of time"}
    assert '"alone_ms"' in kept[0]


def test_nothing_new_starts_when_time_is_up(tmp_path, capsys):
    assert run("split-bn", "--dry", "--budget", "-1", "--out", tmp_path) == 0
    assert "skipped: out of time" in capsys.readouterr().out


def test_predictions_are_printed_beside_what_they_are_for():
    assert rungs.predictions_hold(gates.Setup.parse("trades:resnet18:128"))
    for other in ("at:resnet18:256", "at:wrn-34-10:128"):
        assert not rungs.predictions_hold(gates.Setup.parse(other))
    assert set(rungs.PREDICTED) <= {r.name for r in rungs.rungs(tiny("trades"))}
    shown = tables.predicted(rungs.PREDICTED["compile"]._asdict())
    assert shown == "0.05 to 0.1 ms (item 16)"


@pytest.mark.parametrize("defense", list(gates.DEFENSES))
def test_every_full_ladder_begins_with_the_released_structure_and_its_attack_makes_no_weight_gradient(defense):
    counts = []
    for num_steps in (3, 1):
        setup = tiny(defense, num_steps)
        first = rungs.rungs(setup)[0]
        assert (first.name, first.fast) == ("released", None)
        call = rungs.rung_contestant(setup, first).build()
        with Backwards() as counted:
            call()
        counts.append(counted)
    full, short = counts
    assert full.to_weight == short.to_weight > 0
    assert full.to_input - short.to_input == 2 * full.convolutions


def test_no_ratio_is_given_to_a_released_loop_that_is_unequal(monkeypatch, tmp_path):
    monkeypatch.setattr(gates, "check_rung", lambda setup, fast: {} if fast else {"x": (1.0, 0.0)})
    assert not any("ratio" in r for r in rungs_of_a_bad_ladder(tmp_path / "l.json").values())


def test_rungs_add_one_thing_at_a_time():
    for defense in gates.DEFENSES:
        options = [dataclasses.asdict(r.fast) for r in rungs.rungs(tiny(defense)) if r.fast and not r.skipped]
        for before, after in itertools.pairwise(options):
            assert sum(before[k] != after[k] for k in before) == 1
    assert [r.name for r in rungs.rungs(dataclasses.replace(tiny("ar-at"), short=True))] == ["triton", "graph"]
    assert all(gates.Setup.parse(text) for text in rungs.MATRIX)


def test_the_readme_is_made_from_the_results(climbed, tmp_path, capsys):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    (results / "here").mkdir(parents=True)
    readme.write_text("before\n<!-- benchmarks -->\nSTALE\n<!-- /benchmarks -->\nafter\n")
    flags = ("--results", results, "--readme", readme)
    (results / "here" / "l.json").write_text(json.dumps(climbed))
    assert run("readme", *flags) == 2
    assert "dry run" in capsys.readouterr().err
    (results / "here" / "l.json").write_text(json.dumps(climbed | {"dry": False}))
    assert run("readme", *flags, "--check") == 1
    assert "STALE" in readme.read_text()
    assert run("readme", *flags) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks -->\n")
    assert text.endswith("<!-- /benchmarks -->\nafter\n")
    assert "STALE" not in text
    rung = next(r for r in climbed["results"][0]["rungs"] if "ms" in r)
    assert f"{rung['ms']['median']:.3g} (" in text
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.count("|") == header.count("|") for row in rows)
    assert run("readme", *flags, "--check") == 0
    (results / "here" / "l.json").unlink()
    assert run("readme", *flags) == 0
    assert readme.read_text() == "before\n<!-- benchmarks -->\n<!-- /benchmarks -->\nafter\n"


def test_the_repositorys_readme_is_up_to_date(capsys):
    assert run("readme", "--check") == 0, capsys.readouterr().out


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """What happens in a process, in order: "timed", "profiled", and "replayed" for a replay that is being profiled."""
    happened = []
    clock, profile, replay, read = Clock.__call__, torch.profiler.profile, Captured.__call__, Marks.read
    profiling = False

    class Profile(profile):
        def __enter__(self):
            nonlocal profiling
            profiling = True
            happened.append("profiled")
            return super().__enter__()

        def __exit__(self, *error):
            nonlocal profiling
            profiling = False
            return super().__exit__(*error)

    def replayed(self, *tensors):
        happened.extend(["replayed"] * profiling)
        return replay(self, *tensors)

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(Clock, "__call__", lambda self, *a: (happened.append("timed"), clock(self, *a))[1])
    monkeypatch.setattr(Marks, "read", lambda self: (happened.append("timed"), read(self))[1])
    monkeypatch.setattr(Captured, "__call__", replayed)
    return happened


def nothing_timed_after_a_profile(seen: list[str]) -> bool:
    return "timed" in seen and "timed" not in seen[seen.index("profiled") :]


def test_a_ladder_profiles_eager_steps_after_the_last_rung_of_all_setups_is_timed(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_in_a_process", None)  # one process, in which cuDNN's plans are searched for once
    both = ladder(tmp_path / "l.json", "ar-at:resnet18:128:short", "at:resnet18:128:short", "--repeats", "1")["results"]
    assert nothing_timed_after_a_profile(seen)
    assert "replayed" not in seen
    graphs = [next(r for r in found["rungs"] if r["name"] == "graph") for found in both]
    assert all(r["launches"]["ops"] > 100 for r in graphs)
    assert seen.count("profiled") == sum("ms" in r for found in both for r in found["rungs"])


def test_a_graph_is_counted_by_its_eager_step_once(seen, tmp_path, climbed):
    (found,) = climbed["results"]
    by_name = {r["name"]: r for r in found["rungs"]}
    before = next(by_name[name] for name in ("triton", "bf16", "channels-last") if "ms" in by_name[name])
    assert by_name["graph"]["launches"] == before["launches"]
    rungs.count_rungs(tiny("trades", 1), [before, by_name["graph"]], time.monotonic() + 600, lambda: None)
    assert seen.count("profiled") == 1


def test_launches_that_cannot_be_counted_cost_no_times(monkeypatch, tmp_path):
    def broken(call, device):
        raise RuntimeError("no CUPTI today\nand more")

    monkeypatch.setattr(bench_harness, "profiled", broken)
    (found,) = ladder(out := tmp_path / "l.json", "at:resnet18:128:short", "--repeats", "1")["results"]
    timed = [r for r in found["rungs"] if "ms" in r]
    assert {r["not_counted"] for r in timed} == {"RuntimeError: no CUPTI today"}
    assert "| not counted |" in tables.markdown([tables.read(out)])


def test_bench_profiles_eager_steps_after_the_last_defense_is_timed(seen):
    config = BenchConfig(
        model="resnet-small", batch_size=4, image_size=8, repeats=1, steps=1, device="cpu", capture="fake",
        attack=Attack(num_steps=1),
    )  # fmt: skip
    written = []
    record = bench(config, [AT(), TRADES()], on_result=lambda r: written.append(json.dumps(r["results"])))
    assert nothing_timed_after_a_profile(seen)
    assert "replayed" not in seen
    assert all(r["captured"] and r["launches"]["ops"] > 100 for r in record["results"])
    assert seen.count("profiled") == 2
    assert "launches" not in written[1]  # what was measured is written before anything is profiled
