"""The table: every run once, interrupted calls resumed, mean and deviation right, four formats."""

import csv
import errno
import json
import os
import statistics

import pytest
import torch
from archives import draw_classes

import fastarat
from fastarat import compare as module
from fastarat.cli import main
from fastarat.compare import compare
from fastarat.config import from_dict
from fastarat.runs import Run
from fastarat.schedules import ends_at, recipe_of
from fastarat.table import PUBLISHED, collapsed, overestimates
from fastarat.tuning import FINALISTS, parse_tune

BASE = {
    "limit_train": 64, "batch_size": 32, "epochs": 2, "tensorboard": False,
    "attack": {"epsilon": 0.1, "num_steps": 1}, "eval": {"val_images": 20, "num_steps": 1},
}  # fmt: skip


def run(out, defenses=("standard", "at"), seeds=(0, 1), **options):
    options = {"base": BASE, "attack": "clean,pgd-2", "limit": 40, "progress": False} | options
    return compare(defenses, seeds, out=out, **options)


def failing(monkeypatch, error: Exception, which) -> None:
    """Let training raise `error` for the configs of which `which(config)` is true."""
    own = module.train

    def train(config=None, **options):
        if which(config):
            raise error
        return own(config, **options)

    monkeypatch.setattr(module, "train", train)


DIVERGED = module.Diverged("training stopped: loss became NaN")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return run(tmp_path_factory.mktemp("compare") / "runs")


def test_rows_are_means_and_deviations_of_the_runs(table):
    for row in table.rows:
        for key in ("clean_acc", "robust_acc_pgd2"):
            values = [
                json.loads((table.out / f"{row['defense']}-seed{s}" / "compare-last.json").read_text())["accuracy"][key]
                for s in (0, 1)
            ]
            assert row[key]["values"] == values
            assert row[key]["mean"] == pytest.approx(statistics.fmean(values))
            assert row[key]["std"] == pytest.approx(statistics.stdev(values))
        assert row["epoch_s"] > 0
        assert row["published"] is None
    assert table.settings["num_images"] == 40


def test_four_formats(table):
    text = {suffix: (table.out / f"table.{suffix}").read_text() for suffix in ("md", "tex", "csv", "json")}
    mean = f"{100 * table.rows[1]['clean_acc']['mean']:.2f}"
    for suffix in ("md", "tex"):
        assert mean in text[suffix]
    assert "| at |" in text["md"]
    assert "| defense | clean | PGD-2 | s/epoch |" in text["md"], "no column that is empty in every row"
    assert "Sum" not in text["md"]
    assert "published" not in text["md"] + text["tex"]
    assert "\\begin{tabular}{lrrr" in text["tex"]
    assert "mean ± standard deviation over seeds 0, 1" in text["md"]
    assert "\\toprule" in text["tex"]
    assert json.loads(text["json"])["rows"] == table.rows
    lines = list(csv.reader(text["csv"].splitlines()))
    assert lines[0][:5] == ["defense", "seeds", "images", "clean_acc_mean", "clean_acc_std"]
    assert len(lines) == 3
    assert all(len(line) == len(lines[0]) for line in lines)
    assert lines[1][2] == "40"


def test_a_repeated_call_repeats_nothing(table, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("ran again")

    monkeypatch.setattr(module, "train", refuse)
    monkeypatch.setattr(module, "evaluate", refuse)
    assert run(table.out).rows == table.rows
    with pytest.raises(AssertionError, match="ran again"):
        run(table.out, limit=30)


def test_an_interrupted_call_is_resumed(table, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    calls = []
    with monkeypatch.context() as patch:
        failing(patch, Stop(), lambda config: calls.append(config) or len(calls) == 3)
        with pytest.raises(Stop):
            run(tmp_path / "runs")
    again = run(tmp_path / "runs")
    for a, b in zip(again.rows, table.rows, strict=True):
        assert a["clean_acc"] == b["clean_acc"]


def test_other_settings_in_the_folder_are_refused(table):
    with pytest.raises(fastarat.UserError, match=r"attack.epsilon=0.1, not as asked now"):
        run(table.out, base={**BASE, "attack": {"epsilon": 0.2, "num_steps": 1}})


def test_an_evaluation_with_another_budget_stays_out_of_the_table(table):
    run_folder = table.out / "at-seed0"
    argv = ["eval", str(run_folder), "--attack", "clean,pgd-2", "--limit", "40", "--epsilon", "0.02"]
    assert main(argv) == 0
    assert json.loads((run_folder / "eval.json").read_text())["settings"]["epsilon"] == 0.02
    assert json.loads((run_folder / "compare-last.json").read_text())["settings"]["epsilon"] == 0.1
    assert run(table.out).rows == table.rows


def test_two_defenses_of_one_file(tmp_path):
    body = "@dataclass(frozen=True, kw_only=True)\nclass {0}(fastarat.AT):\n    name = '{0}'\n\n\n"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        text = "from dataclasses import dataclass\nimport fastarat\n\n\n" + body.format("X") + body.format("Y")
        (tmp_path / folder / "mine.py").write_text(text)
    names = [f"{tmp_path}/a/mine.py:X", f"{tmp_path}/a/mine.py:Y"]
    table = run(tmp_path / "runs", names, (0,))
    assert [r["defense"] for r in table.rows] == names
    for cls in "XY":
        assert f"a/mine.py:{cls}" in (tmp_path / "runs" / f"mine-{cls}-seed0" / "config.yaml").read_text()
    with pytest.raises(fastarat.UserError, match="would share the folder mine-X-seed0"):
        run(tmp_path / "other", [names[0], f"{tmp_path}/b/mine.py:X"], (0,))


def test_swa_and_parallel_runs(tmp_path):
    table = run(tmp_path / "runs", ("ar-at", "ar-at+swa"), (0,), parallel=2)
    assert [r["defense"] for r in table.rows] == ["ar-at", "ar-at+swa"]
    assert (tmp_path / "runs" / "ar-at+swa-seed0" / "swa.safetensors").exists()
    assert (tmp_path / "runs" / "ar-at-seed0.log").exists()
    assert table.rows[0]["clean_acc"]["std"] is None
    assert "± " not in table.markdown().split("\n\n")[0]


def test_a_run_that_fails_keeps_the_others(tmp_path, monkeypatch):
    failing(monkeypatch, fastarat.UserError("boom"), lambda config: config.defense.name == "at")
    with pytest.raises(fastarat.UserError, match=r"1 of 2 runs failed \(at-seed0: boom\)"):
        run(tmp_path / "runs", seeds=(0,))
    assert (tmp_path / "runs" / "standard-seed0" / "eval.json").exists()


def test_defenses_that_start_from_a_standard_network_get_one(tmp_path):
    table = run(tmp_path / "runs", ("arrest",), (0,))
    assert [r["defense"] for r in table.rows] == ["arrest"]
    assert (tmp_path / "runs" / "standard-seed0" / "last.pt").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"defenses": ("atx",)}, "unknown defense 'atx'"),
        ({"defenses": ("at+ema2",)}, "only \\+swa"),
        ({"attack": "pdg-2"}, "did you mean"),
        ({"base": {**BASE, "epochz": 1}}, "did you mean 'epochs'"),
        ({"parallel": 0}, "1 or more"),
        ({"tune": {"optim.lr": [0.1, 0.2]}, "tune_seeds": (0, 5)}, "none of those reported"),
        ({"tune": {"att:optim.lr": [0.1, 0.2]}}, "no such row 'att'; did you mean 'at'"),
        ({"tune": {"optim.lrr": [0.1, 0.2]}}, "did you mean 'lr'"),
        ({"tune": {"optim.lr": ["a", "b"]}}, "expected a number"),
        ({"tune": {"optim.lr": []}}, "expected a list of values"),
        ({"tune": {"limit_train": [10, 20]}}, "only settings that leave rows comparable"),
        ({"tune": {"at:attack.epsilon": ["1/255", "32/255"]}}, "only settings that leave rows comparable"),
        ({"tune": {"at:eval.num_steps": [1, 10]}}, "only settings that leave rows comparable"),
        ({"tune": {"model": ["resnet18", "resnet-small"]}}, "only settings that leave rows comparable"),
        ({"tune": {"at:defense.name": ["trades", "at"]}}, "only settings that leave rows comparable"),
        ({"tune": {"at:defense": ["trades", "at"]}}, "only settings that leave rows comparable"),
        ({"tune": {"at:epochs": [1, 2]}}, "only settings that leave rows comparable"),
        ({"tune": {"optim.lr": ["0.1", "0.10"]}}, "at would try optim.lr 0.10 twice|standard would try"),
        ({"tune": {"optim.lr": [0.1, 0.2]}, "base": {**BASE, "eval": {"val_images": 0}}}, "there are none"),
        ({"base": {**BASE, "seed": 3}}, "base holds seed=3, which is each run's own: give seeds"),
        ({"base": {**BASE, "swa": True}}, r"NAME\+swa"),
        ({"base": {**BASE, "defense": {"name": "trades", "beta": 1}}}, "give defenses"),
        ({"base": [1]}, "expected a dict"),
        ({"defenses": ("at", "AT")}, "twice"),
        ({"tune": {"at:defense.gamma": [10, 20]}}, "unknown key 'defense.gamma'"),
    ],
)
def test_mistakes_come_before_any_training(options, words, tmp_path):
    with pytest.raises(fastarat.UserError, match=words):
        run(tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a", {})], r"rows=.*: expected \{NAME"),
        ({"a": ["at"]}, "rows: .*a.* stands for"),
        ({"a": {"defense": {"name": "at"}}}, "expected a name, and the settings beside it"),
        ({"a": {"defense": "at", "seed": 3}}, "holds seed, which is no setting of a row: give seeds"),
        ({"a": {"defense": "at"}, "b": {}}, "rows has 'b', which defenses does not name"),
        ({"a": {"defense": "at", 3: 4}}, "the key 3: expected a setting's name"),
        ({"a": {"defense": "at", "optim.learning": 4}}, "unknown key 'optim.learning'"),
        ({"a": {"defense": "at", "defense.gamma": 4}}, "unknown key 'defense.gamma'"),
        ({"a": {"defense": "trade"}}, "did you mean 'trades'"),
    ],
)
def test_rows_are_checked_before_any_training(rows, words, tmp_path):
    with pytest.raises(fastarat.UserError, match=words) as found:
        module.compare(["a"], [0], base=BASE, out=tmp_path / "runs", rows=rows)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "runs").exists()


def shown(table, attack: str, *changes: dict):
    """The table as if its one row, or one for each of `changes`, had been tested with `attack`."""
    keys = [a.key for a in module.parse_attacks(attack)]
    cells = {key: {"mean": 0.5, "std": None, "values": [0.5]} for key in (*keys, "sum", "nrr")}
    rows = [{**table.rows[0], **cells, **change} for change in changes or ({},)]
    return module.Comparison(rows, {**table.settings, "keys": keys, "seeds": [0]}, table.out)


@pytest.mark.parametrize(
    ("attack", "titles"),
    [
        ("clean,pgd-2,pgd-2-2,apgd-ce", "clean | PGD-2 | PGD-2 x2 restarts | APGD-CE"),
        ("clean,fab-t,square", "clean | FAB-T | Square"),
        ("autoattack", "AutoAttack"),
        ("clean,autoattack-fast", "clean | AutoAttack-fast | Sum | NRR"),
        (
            "clean,pgd-20,pgd-20-5,apgd-ce,apgd-t,fab-t,square,autoattack",
            "clean | PGD-20 | PGD-20 x5 restarts | APGD-CE | APGD-T | FAB-T | Square | AutoAttack | Sum | NRR",
        ),
    ],
)
def test_titles_and_captions_say_what_is_there_and_nothing_else(table, attack, titles):
    of = shown(table, attack)
    assert of.markdown().splitlines()[0] == f"| defense | {titles} | s/epoch |"
    assert ("Sum" in of.note()) == ("NRR = their harmonic mean" in of.note()) == ("Sum" in titles)
    assert "40 test images in every cell" in of.note()


def test_a_row_with_published_numbers_gives_all_rows_their_column(table):
    published = {"published": {"clean": 1.0, "autoattack": 2.0, "source": "paper"}}
    text = shown(table, "clean,autoattack", {}, published).markdown()
    assert "published clean / AutoAttack |" in text
    assert text.splitlines()[1].endswith("| ---: | --- |")


def test_a_folder_is_called_by_its_name(tmp_path):
    images = draw_classes(tmp_path / "pictures", 3)
    base = {**BASE, "dataset": str(images), "limit_train": 8, "batch_size": 4, "eval": {"val_images": 3, "num_steps": 1},
            "data_dir": str(tmp_path / "data")}  # fmt: skip
    table = run(tmp_path / "runs", ("standard",), (0,), base=base)
    assert table.settings["dataset"] == "pictures"
    assert str(tmp_path) not in table.markdown()


def test_published_numbers_belong_to_a_setting():
    assert PUBLISHED["cifar10", "resnet18", "ar-at"].autoattack == 49.02
    assert PUBLISHED["cifar100", "wrn-34-10", "ar-at+swa"].clean == 72.37


def test_rows_of_one_seed_share_data_order_and_initial_weights(tmp_path, monkeypatch):
    from fastarat.training import Trainer

    seen = {}
    for name in ("standard", "trades", "mart", "lbgat", "ar-at"):
        config = from_dict({**BASE, "defense": name, "seed": 3, "out": str(tmp_path / name)})
        training = Trainer(config)
        weights = {k: v for k, v in training.step.model.state_dict().items() if "weight" in k and v.dim() > 1}
        batch = next(iter(training.loader.epoch(1)))
        seen[name] = training.dataset, weights, batch
    data, weights, batch = seen.pop("standard")
    for other_data, other_weights, other_batch in seen.values():
        assert torch.equal(other_data.train.indices, data.train.indices)
        assert torch.equal(other_data.val.indices, data.val.indices)
        assert torch.equal(other_batch.index, batch.index)
        assert torch.equal(other_batch.images, batch.images)
        assert other_weights.keys() == weights.keys()
        assert all(torch.equal(other_weights[k], w) for k, w in weights.items())


@pytest.mark.parametrize("epochs", [4, 10, 20, 30, 50])
def test_the_recipes_of_trades_and_ar_at_end_alike_in_short_runs(epochs):
    ends = {name: ends_at(recipe_of(name), epochs=epochs) for name in ("arat", "trades", "lbgat")}
    assert len(set(ends.values())) == 1, ends


def test_rows_with_other_schedules_are_told_apart_and_warned_of(tmp_path):
    base = {**BASE, "epochs": 4, "limit_train": 40, "eval": {"val_images": 20, "num_steps": 1, "every": 4}}
    own = run(tmp_path / "own", ("at", "mart"), (0,), base=base)
    head = own.markdown().splitlines()[0]
    assert "| schedule |" in head
    assert "mart: 4 epochs, lr 0.01" in own.markdown()
    (warning,) = own.settings["warnings"]
    assert "at at 0.1 of it; mart at 0.001 of it" in warning
    assert "Warning: the rows end at different shares of their base learning rate" in own.markdown()
    same = run(tmp_path / "same", ("at", "mart"), (0,), base={**base, "optim": {"recipe": "arat"}})
    assert same.settings["warnings"] == []
    assert "| schedule |" not in same.markdown()
    assert "Schedule of every row: arat: 4 epochs, lr 0.02 in epoch 1, then 0.1, 0.01 from epoch 4" in same.markdown()
    rates = [
        [json.loads(line)["lr"] for line in (same.out / f"{name}-seed0" / "metrics.jsonl").read_text().splitlines()]
        for name in ("at", "mart")
    ]
    assert rates[0] == rates[1] == pytest.approx([0.02, 0.1, 0.1, 0.01])


def test_settings_are_chosen_on_validation_images_by_one_rule(tmp_path, monkeypatch):
    looked_at = []
    own = module.evaluate

    def watched(model, data, *args, **options):
        looked_at.append(data)
        return own(model, data, *args, **options)

    monkeypatch.setattr(module, "evaluate", watched)
    tune = {"optim.lr": ["0.05", "0.001", "1e-6"], "ar-at:defense.gamma": [5, 30]}
    options = {"tune": tune, "tune_seeds": (7, 8), "base": {**BASE, "epochs": 4}}
    table = run(tmp_path / "runs", ("at", "ar-at"), (0,), **options)
    record = json.loads((table.out / "tune.json").read_text())
    assert record["seeds"] == [7, 8]
    assert {row: len(r["tried"]) for row, r in record["rows"].items()} == {"at": 3, "ar-at": 6}
    for row, found in record["rows"].items():
        full = [t for t in found["tried"] if len(t["runs"]) == 2]
        assert len(full) == FINALISTS
        assert min(t["runs"][0]["score"] for t in full) >= max(
            t["runs"][0]["score"] for t in found["tried"] if len(t["runs"]) == 1
        )
        for t in found["tried"]:
            for r in t["runs"]:
                assert r["score"] == r["clean_acc"] + r["robust_acc"]
        (best,) = (t for t in found["tried"] if t["chosen"])
        assert best["mean"] == max(t["mean"] for t in full)
        assert found["settings"] == best["settings"]
        config = (table.out / f"{row}-seed0" / "config.yaml").read_text()
        assert f"lr: {float(best['settings']['optim.lr'])}" in config
    assert len(looked_at) == 2  # the two reported runs: no test image before the choice
    assert "| settings |" in table.markdown().splitlines()[0]
    assert "The test images chose nothing." in table.markdown()
    assert "gamma" in (table.out / "tune.md").read_text()

    monkeypatch.setattr(module, "train", None)
    assert run(table.out, ("at", "ar-at"), (0,), **options).rows == table.rows


def test_the_teachers_of_a_row_are_trained_with_what_was_chosen_for_standard(tmp_path):
    table = run(
        tmp_path / "runs",
        ("standard", "arrest"),
        (0,),
        base={**BASE, "limit_train": 400, "epochs": 5},
        tune={"standard:optim.lr": [1e-7, 0.05]},
        tune_seeds=(7,),
    )
    assert (table.rows[0]["settings"], table.rows[0]["tried"]) == ({"optim.lr": 0.05}, 2)
    assert (table.rows[1]["settings"], table.rows[1]["tried"]) == ({}, 0)
    assert "lr: 0.05" in (table.out / "standard-seed0" / "config.yaml").read_text()
    assert str(table.out / "standard-seed0") in (table.out / "arrest-seed0" / "config.yaml").read_text()


def test_a_folder_of_other_settings_is_refused_though_nothing_was_asked(tmp_path):
    """What this call leaves to defaults counts as much as what it names."""
    run(tmp_path / "runs", ("at",), (0,), base={**BASE, "optim": {"recipe": "constant", "weight_decay": 0.01}})
    with pytest.raises(fastarat.UserError, match=r"optim\.\w+=.*not as asked now"):
        run(tmp_path / "runs", ("at",), (0, 1))


def test_one_value_is_given_not_chosen(tmp_path):
    table = run(tmp_path / "new" / "runs", ("at", "mart"), (0,), tune={"at:optim.lr": [0.03]})
    assert (table.rows[0]["settings"], table.rows[0]["tried"]) == ({"optim.lr": 0.03}, 0)
    text = table.markdown()
    assert "| lr 0.03 |" in text
    assert "chosen" not in text
    assert "lr: 0.03" in (table.out / "at-seed0" / "config.yaml").read_text()


def test_a_row_whose_seeds_all_diverge_leaves_a_valid_table(tmp_path, monkeypatch):
    failing(monkeypatch, DIVERGED, lambda config: config.defense.name == "mart")
    for order in (("at", "mart"), ("mart", "at")):
        table = run(tmp_path / "-".join(order), order, (0,))
        row = table.rows[order.index("mart")]
        assert (row["clean_acc"], row["epoch_s"], row["diverged"]) == (None, None, [0])
        json.loads(table.to_json(), parse_constant=pytest.fail)
        assert "| mart | – | – | – | 1 of 1 |" in table.markdown()


def test_a_diverged_teacher_is_a_diverged_student(tmp_path, monkeypatch):
    failing(monkeypatch, DIVERGED, lambda config: config.defense.name == "standard")
    table = run(tmp_path / "runs", ("at", "arrest"), (0,))
    assert table.rows[1]["diverged"] == [0]


@pytest.mark.parametrize(
    ("robust", "seeds"),
    [({0: 0.4, 1: 0.1, 2: 0.3}, [1]), ({0: 0.05, 1: 0.06}, [0, 1]), ({0: 0.0}, [0]), ({0: 0.6, 1: 0.29}, [1])],
)
def test_collapsed_is_half_of_the_best_or_chance(robust, seeds):
    assert collapsed(robust, 10) == seeds


def test_rows_that_pgd_overestimates_are_named():
    row = {"defense": "gairat", "robust_acc_pgd20": {"mean": 0.6}, "robust_acc_aa": {"mean": 0.5}}
    close = {**row, "defense": "at", "robust_acc_aa": {"mean": 0.58}}
    (warning,) = overestimates([row, close, {**row, "defense": "trades"}])
    assert warning.startswith("PGD overestimates gairat by 10.0, trades by 10.0 points against AutoAttack")
    assert overestimates([close]) == []


def test_tune_flags():
    assert parse_tune(["optim.lr=0.1, 0.3", "ar-at:defense.center=clean"]) == {
        "optim.lr": ["0.1", "0.3"],
        "ar-at:defense.center": ["clean"],
    }
    for flags, words in ((["optim.lr"], "expected NAME=VALUE"), (["a=1", "a=2"], "twice")):
        with pytest.raises(fastarat.UserError, match=words):
            parse_tune(flags)


def test_collapsed_and_diverged_seeds_are_counted_in_the_open(tmp_path, monkeypatch):
    failing(monkeypatch, DIVERGED, lambda config: config.seed == 2)
    robust = {0: 0.4, 1: 0.1}
    monkeypatch.setattr(
        Run, "last_validation", lambda run: {"clean_acc": 0.9, "robust_acc": robust[int(run.path.name[-1])]}
    )
    table = run(tmp_path / "runs", ("at",), (0, 1, 2))
    (row,) = table.rows
    assert (row["collapsed"], row["diverged"], row["seeds"]) == ([1], [2], [0, 1, 2])
    assert len(row["clean_acc"]["values"]) == 2
    text = table.markdown()
    assert "| collapsed |" in text
    assert "| 2 of 3 |" in text
    assert "Collapsed: a seed that diverged" in text
    monkeypatch.setattr(module, "train", None)  # nothing is trained again, the diverged seed neither
    assert run(table.out, ("at",), (0, 1, 2)).rows == table.rows


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"one\ntwo\n", b"[" * 3000])
def test_a_damaged_note_of_divergence_is_still_one(tmp_path, monkeypatch, content):
    failing(monkeypatch, DIVERGED, lambda config: config.defense.name == "mart")
    out = run(tmp_path / "runs", ("at", "mart"), (0,)).out
    (out / "mart-seed0.diverged").write_bytes(content)
    monkeypatch.setattr(module, "train", None)
    assert run(out, ("at", "mart"), (0,)).rows[1]["diverged"] == [0]


def test_tuning_names_the_run_whose_metrics_are_damaged(tmp_path, monkeypatch):
    options = {"tune": {"optim.lr": [0.1, 0.05]}, "tune_seeds": (7,)}
    out = run(tmp_path / "runs", ("at",), (0,), **options).out
    damaged = next((out / "tune").glob("at-*/metrics.jsonl"))
    (out / "tune.json").write_bytes(b"\xff{")  # written, never read
    for content in (b"", b'{"epoch": 2, "val/clean_acc": 0.5}\n'):
        damaged.write_bytes(content)
        with pytest.raises(
            fastarat.UserError, match=r"metrics.jsonl does not say how the last epoch did.*delete .*/at-"
        ):
            run(out, ("at",), (0,), **options)


def test_a_damaged_precision_file_is_decided_by_the_runs(tmp_path):
    base = {**BASE, "precision": "fp32", "amp": True}
    out = run(tmp_path / "runs", ("standard",), (0,), base=base).out
    begun = Run(out / "standard-seed0")
    kept = {"precision": "fp32", "note": "as timed"}
    for content in (b"", b"\xff", b"[]", b"null", b'{"precision": "fp32"}', b"[" * 100000, json.dumps(kept).encode()):
        (out / "precision.json").write_bytes(content)
        precision, note = module.shared_precision(begun.read_config(), module.dataset_of(begun.read_config()), out)
        assert precision == "fp32"
        assert ("as timed" if b"timed" in content else "as standard-seed0, which had begun") in note


def test_a_disk_that_fills_up_at_the_table_loses_nothing(table, monkeypatch, capsys):
    own, before = os.replace, table.rows

    def full(source, target):
        if "table." in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(fastarat.UserError, match=r"cannot write .*table\.md: No space left on device"):
            run(table.out)
    assert not list(table.out.glob(".*"))
    monkeypatch.setattr(module, "train", None)
    assert run(table.out).rows == before


def test_command_line(table, capsys):
    argv = ["compare", "--defenses", "standard,at", "--seeds", "0,1", "--out", str(table.out), "--limit", "40",
            "--test-attack", "clean,pgd-2", "--limit-train", "64", "--batch-size", "32", "--epochs", "2", "--no-tensorboard",
            "--attack.epsilon", "0.1", "--attack.num-steps", "1", "--eval.val-images", "20", "--eval.num-steps", "1"]  # fmt: skip
    assert main(argv) == 0
    assert "4 finished already" in capsys.readouterr().out
    assert main([*argv, "--seed", "3"]) == 2
    assert "comma-separated" in capsys.readouterr().err
