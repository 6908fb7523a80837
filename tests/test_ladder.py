"""The ladder, the probes and the tables: rungs are equal where they should be, numbers follow, nothing is typed."""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from costs import Backwards

from fastarat.bench import Event
from fastarat.nets.models import build_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is run from a checkout, never installed
harness = importlib.import_module("benchmarks.__main__")
ladder = importlib.import_module("benchmarks.ladder")
probe = importlib.import_module("benchmarks.probe")
tables = importlib.import_module("benchmarks.tables")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(defense: str) -> ladder.Setup:
    return ladder.Setup(defense, "resnet-small", 4)


def run(*argv: object) -> int:
    return harness.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    """A dry ladder of TRADES, whose attack is in eval mode: every rung a CPU has."""
    out = tmp_path_factory.mktemp("ladder") / "l.json"
    assert (
        run(
            "ladder",
            "trades:resnet18:128",
            "--dry",
            "--device",
            "cpu",
            "--repeats",
            "3",
            "--threads",
            "1",
            "--out",
            out,
        )
        == 0
    )
    return json.loads(out.read_text())


def test_a_ladder_times_every_rung_this_machine_has(climbed):
    (found,) = climbed["results"]
    names = [r["name"] for r in found["rungs"]]
    assert names == ["released", "step", "channels-last", "bf16", "triton", "graph", "fold", "sgd", "compile"]
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
    setup = tiny(defense)
    for name, (found, limit) in ladder.equality(setup, ladder.rungs(setup, CPU)[0], CPU).items():
        assert found <= limit, name


@pytest.mark.parametrize("broken", ["beta", "attack_mode", "num_steps", "start"])
def test_the_equality_check_notices_a_wrong_loop(monkeypatch, broken):
    right = ladder.released_loop

    def wrong(*args):
        loop, network = right(*args)
        if broken == "start":
            call = loop.attack
            loop.attack = lambda images, labels, start=None: call(images, labels, images)
        else:
            values = {"beta": 5.5, "attack_mode": "train", "num_steps": loop.num_steps + 1}
            setattr(loop, broken, values[broken])
        return loop, network

    monkeypatch.setattr(ladder, "released_loop", wrong)
    setup = tiny("trades")
    found = ladder.equality(setup, ladder.rungs(setup, CPU)[0], CPU)
    assert any(value > limit for value, limit in found.values())


def test_times_of_an_unequal_rung_are_not_printed_and_fail_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ladder, "equality", lambda setup, rung, device: {"x": (float("nan"), 1.0)} if rung.name == "step" else {})  # fmt: skip
    out = tmp_path / "l.json"
    assert run("ladder", "at:resnet18:128", "--dry", "--device", "cpu", "--repeats", "1", "--out", out) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    rungs = {r["name"]: r for r in json.loads(out.read_text())["results"][0]["rungs"]}
    assert "ms" in rungs["channels-last"]
    gain = rungs["released"]["samples_s"][0] - rungs["channels-last"]["samples_s"][0]
    assert rungs["channels-last"]["gain_ms"]["median"] == pytest.approx(1e3 * gain)
    assert run("table", out) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "| our step, eager" in line]
    assert "NOT EQUAL: x nan | - |" in row


def test_a_failing_rung_leaves_the_others(monkeypatch, tmp_path):
    right = ladder._built

    def built(setup, rung, *args):
        if rung.name == "graph":
            raise RuntimeError("no graphs today\nand more")
        return right(setup, rung, *args)

    monkeypatch.setattr(ladder, "_built", built)
    out = tmp_path / "l.json"
    assert run("ladder", "at:resnet18:128", "--dry", "--device", "cpu", "--repeats", "1", "--out", out) == 1
    rungs = {r["name"]: r for r in json.loads(out.read_text())["results"][0]["rungs"]}
    assert rungs["graph"]["failed"] == "RuntimeError: no graphs today"
    assert "ms" in rungs["channels-last"]


def test_out_of_time_keeps_what_was_built_and_says_so(tmp_path):
    kept = []
    found = ladder.climb(tiny("at"), CPU, repeats=50, deadline=time.monotonic(), num_steps=1, dry=True,
                         on_rung=lambda found: kept.append(json.dumps(found)))  # fmt: skip
    timed = [r for r in found["rungs"] if "ms" in r]
    assert [r["name"] for r in timed] == ["graph"]  # the rung built first
    assert len(timed[0]["samples_s"]) == 3
    assert {r["skipped"] for r in found["rungs"] if r["name"] in ("released", "step")} == {"out of time"}
    assert '"alone_ms"' in kept[0]


def test_predictions_are_printed_beside_what_they_are_for():
    assert ladder._predictions_hold(ladder.Setup("trades", "resnet18", 128), 10)
    for other in (ladder.Setup("at", "resnet18", 256), ladder.Setup("at", "wrn-34-10", 128)):
        assert not ladder._predictions_hold(other, 10)
    assert set(ladder.PREDICTED) <= {r.name for r in ladder.rungs(tiny("trades"), CPU)}
    shown = tables.predicted(ladder.PREDICTED["compile"]._asdict())
    assert shown == "0.05 to 0.1 ms (item 16)"


@pytest.mark.parametrize("defense", list(ladder.DEFENSES))
def test_every_full_ladder_begins_with_the_released_structure_and_its_attack_makes_no_weight_gradient(defense):
    setup = tiny(defense)
    first = ladder.rungs(setup, CPU)[0]
    assert (first.name, first.options) == ("released", None)
    call, *_ = ladder._built(setup, first, CPU, ladder.random_batch(4, CPU), {}, 3)
    with Backwards() as full:
        call()
    few, *_ = ladder._built(setup, first, CPU, ladder.random_batch(4, CPU), {}, 1)
    with Backwards() as short:
        few()
    assert full.to_weight == short.to_weight > 0
    assert full.to_input - short.to_input == 2 * full.convolutions


def test_no_ratio_is_given_to_a_released_loop_that_is_unequal(monkeypatch, tmp_path):
    monkeypatch.setattr(ladder, "equality", lambda setup, rung, device: {"x": (1.0, 0.0)} if rung.name == "released" else {})  # fmt: skip
    out = tmp_path / "l.json"
    assert run("ladder", "at:resnet18:128", "--dry", "--device", "cpu", "--repeats", "1", "--out", out) == 1
    assert not any("ratio" in r for r in json.loads(out.read_text())["results"][0]["rungs"])


def test_rungs_add_one_thing_at_a_time():
    for defense in ladder.DEFENSES:
        options = [r.options for r in ladder.rungs(tiny(defense), CPU, dry=True) if r.options and not r.skipped]
        for before, after in itertools.pairwise(options):
            assert sum(before[k] != after[k] for k in before) == 1
    assert [r.name for r in ladder.rungs(tiny("ar-at")._replace(short=True), CPU)] == ["triton", "graph"]
    assert all(ladder.Setup.parse(text) for text in ladder.MATRIX)


def test_layers_are_those_of_the_network():
    layers = probe.layers_of("resnet18")
    assert sum(layer.count for layer in layers) == 20
    assert (layers[0].cin, layers[0].cout, layers[0].side) == (3, 64, 32)
    from fastarat.bench import forward_flops

    whole = forward_flops(build_model("resnet18", num_classes=10), torch.zeros(1, 3, 32, 32))
    assert sum(layer.count * layer.flop(1) for layer in layers) + 2 * 512 * 10 == whole


def test_convolution_gradients_are_the_right_ones():
    layer = probe.Layer("", 3, 5, 3, 2, 8)
    on = probe.Ground(CPU, torch.float64, 1, True, float("inf"))
    calls = probe._conv_calls(layer, 2, torch.float64, on, torch.channels_last)
    assert calls["forward"]().shape == (2, 5, 4, 4)
    to_input, none, _ = calls["input gradient"]()
    assert to_input.shape == (2, 3, 8, 8)
    assert none is None or not none.numel()
    none, to_weight, _ = calls["weight gradient"]()
    assert to_weight.shape == (5, 3, 3, 3)
    assert none is None or not none.numel()


@pytest.mark.parametrize("name", ["split_bn, one group", "nn.BatchNorm2d, add, ReLU"])
def test_batchnorm_peers_compute_the_same(name):
    on = probe.Ground(CPU, torch.float32, 1, True, float("inf"))
    tensors = probe._bn_tensors((4, 6, 5, 5), on)
    wanted = probe._bn_torch(6, on)(*tensors)
    found = probe._BN_PEERS[name](6, on)(*tensors)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-4, atol=1e-5)


def test_a_profile_counts_overlaps_once():
    events = [Event("kernel", "a", 0, 10), Event("kernel", "b", 5, 10), Event("kernel", "a", 20, 5)]
    whole, first, second = probe.profile_rows(events, "made")
    assert (whole["span_us"], whole["busy_us"], whole["events"]) == (25, 20, 3)
    assert whole["gap_share"] == pytest.approx(0.2)
    assert (first["what"], first["sum_us"], first["events"]) == ("a", 15, 2)
    assert second["share"] == pytest.approx(0.5)
    assert "failed" in probe.profile_rows([], "made")[0]


def test_every_probe_runs_and_names_what_it_cannot(tmp_path, capsys):
    out = tmp_path / "p.json"
    assert run("probe", "--dry", "--device", "cpu", "--threads", "1", "--out", out) == 0
    results = {r["probe"]: r for r in json.loads(out.read_text())["results"]}
    assert list(results) == list(probe.PROBES)
    for name, found in results.items():
        assert found.get("rows") or found["skipped"], name
        assert not any("failed" in row for row in found.get("rows", ())), name
    conv = results["conv"]["rows"]
    total = next(r["sum_us"] for r in conv if r["what"] == "all of resnet-small, forward")
    parts = [r["count"] * statistics.median(r["samples_s"]) for r in conv if r["what"].endswith(", forward") and "count" in r]  # fmt: skip
    assert total == pytest.approx(1e6 * sum(parts))
    capsys.readouterr()
    assert run("table", out) == 0
    assert "the stem" not in capsys.readouterr().err


def test_a_failing_probe_leaves_the_others(monkeypatch, tmp_path):
    def broken(on):
        raise RuntimeError("gone")

    monkeypatch.setitem(probe.PROBES, "stem", (broken, ""))
    out = tmp_path / "p.json"
    assert run("probe", "stem", "backend", "--dry", "--device", "cpu", "--out", out) == 1
    stem, backend = json.loads(out.read_text())["results"]
    assert stem["failed"] == "RuntimeError: gone"
    assert len(backend.get("rows", [{}])) in (1, 4)


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


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["ladder", "ar-at:resnet18"], "expected DEFENSE:MODEL:BATCH"),
        (["ladder", "ar-at:resnet18:1"], "expected DEFENSE:MODEL:BATCH"),
        (["ladder", "ar-tt:resnet18:8"], "did you mean 'ar-at'"),
        (["ladder", "--repeats", "0"], "expected 1 or more"),
        (["ladder", "--rounds", "3"], "unrecognized arguments"),
        (["probe", "stems"], "did you mean 'stem'"),
        (["probe", "--device", "tpu"], "expected auto, cpu, cuda"),
        (["readme", "--readme", "nowhere.md"], "cannot read nowhere.md"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, words, capsys):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
