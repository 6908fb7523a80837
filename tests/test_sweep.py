"""Sweeps: how rows are laid out and named, what is refused before any training, and one through `compare`."""

import json

import pytest

from fastarat import UserError
from fastarat.cli import main
from fastarat.config import Config
from fastarat.sweep import MOST_ROWS, check_distinct, read_sweep, rows_of_sweep


def test_rows_are_every_combination_named_by_what_differs():
    rows = rows_of_sweep({"defense": ["at", "trades"], "defense.beta": [1, 6], "optim.lr": [0.1], "ema": [None, 0.9]})
    assert rows == {
        "at, ema None": {"defense": "at", "optim.lr": 0.1, "ema": None},
        "at, ema 0.9": {"defense": "at", "optim.lr": 0.1, "ema": 0.9},
        "trades, beta 1, ema None": {"defense": "trades", "defense.beta": 1, "optim.lr": 0.1, "ema": None},
        "trades, beta 1, ema 0.9": {"defense": "trades", "defense.beta": 1, "optim.lr": 0.1, "ema": 0.9},
        "trades, beta 6, ema None": {"defense": "trades", "defense.beta": 6, "optim.lr": 0.1, "ema": None},
        "trades, beta 6, ema 0.9": {"defense": "trades", "defense.beta": 6, "optim.lr": 0.1, "ema": 0.9},
    }
    # One defense's own list stands before the one for all, wherever it is written.
    rows = rows_of_sweep({"defense": ["at", "mart"], "at:optim.lr": [0.3], "optim": {"lr": [0.1, 0.2]}})
    assert list(rows) == ["at", "mart, lr 0.1", "mart, lr 0.2"]
    assert list(rows_of_sweep({"defense": ["at+swa"], "attack.start": ["none"], "swa-config.start": [0.5, 0.7]})) == [
        "at+swa, swa config start 0.5",
        "at+swa, swa config start 0.7",
    ]


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"optim.lr": [0.1]}, "it names no defense"),
        ({"defense": []}, r"defense=\[\]: expected a list of values"),
        ({"defense": ["at", "at"]}, "one is named twice"),
        ({"defense": ["at"], "optim.lr": 0.1}, r"optim.lr=0.1: expected a list of values, such as \[0.1, 0.05\]"),
        ({"defense": ["at"], "optim.lrr": [1]}, "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ({"defense": ["at", "mart"], "defense.beta": [1]}, "no row can have it: at, mart have no 'beta'"),
        ({"defense": ["at"], "trades:defense.beta": [1]}, "no such defense 'trades'"),
        ({"defense": ["at"], "attack.epsilon": [0.1, 0.2]}, "give --attack.epsilon beside the sweep"),
        ({"defense": ["at"], "seed": [0, 1]}, "give --seeds beside the sweep"),
        ({"defense": ["at"], "dataset": ["digits"]}, "give --dataset beside the sweep"),
        ({"defense": ["at"], "device": ["cpu"]}, "it is every run's: give --device"),
        ({"defense": ["at"], "optim.lr": [0.1, 0.1]}, "would have the row lr 0.1 twice|optim.lr 0.1 twice"),
        ({"defense": ["at"], "optim.lr": list(range(50)), "epochs": [1, 2, 3]}, f"150 rows, and {MOST_ROWS} are"),
        ({"defense": ["att"]}, "unknown defense 'att'; did you mean 'at'"),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(lists, said):
    with pytest.raises(UserError, match=said) as caught:
        rows_of_sweep(lists)
    assert "\n" not in str(caught.value)


def test_rows_that_are_one_run_are_refused():
    one, other = Config(epochs=3, out="a"), Config(epochs=3, out="b")
    with pytest.raises(UserError, match="'x' and 'y' are the same run"):
        check_distinct({"x": one, "y": other})
    check_distinct({"x": one, "y": Config(epochs=4)})


def test_a_file_runs_no_code_that_the_command_line_does_not_name(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("defense: [own.py:Mine]\n")
    with pytest.raises(UserError, match="runs only where the command line names it"):
        read_sweep(file)
    file.write_text("defense: [at]\n")
    with pytest.raises(UserError, match="--defenses does too: give one"):
        read_sweep(file, ["at"])


def test_a_sweep_through_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sweep.yaml"
    common = ["compare", "--sweep", str(file), "--out", "out", "--epochs", "1", "--limit-train", "32", "--batch-size",
              "16", "--attack.num-steps", "1", "--eval.num-steps", "1", "--eval.val-images", "10", "--limit", "10",
              "--test-attack", "clean,pgd-1", "--seeds", "3", "--no-tensorboard"]  # fmt: skip
    for text, flags, said in (
        ("optim.lr: [0.1, oops]", ["--defenses", "at"], "optim.lr='oops': expected a number"),
        ("optim.lr: [0.1, 1e-1]", ["--defenses", "at"], "are the same run: leave one out"),
        ("optim.lr: [0.1]", [], "it names no defense"),
        ("optim.lr: [0.1]", ["--defenses", "at", "--tune", "optim.lr=1,2"], "--tune chooses among values"),
    ):
        file.write_text(text + "\n")
        assert main([*common, *flags]) == 2
        assert said in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "--defenses at,trades,..., or --sweep FILE" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*-seed3"))
    file.write_text("defense: [standard, trades]\ndefense.beta: [1, 6]\n")
    assert main(common) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["defense"] for row in table["rows"]] == ["standard", "trades, beta 1", "trades, beta 6"]
    assert table["rows"][2]["settings"] == {"defense.beta": 6}
    assert {path.name for path in (tmp_path / "out").glob("*-seed3")} == {
        "standard-seed3", "trades-beta-1-seed3", "trades-beta-6-seed3"
    }  # fmt: skip
    assert "beta: 6.0" in (tmp_path / "out" / "trades-beta-6-seed3" / "config.yaml").read_text()


def test_a_flag_of_what_the_sweep_lists_is_refused(tmp_path, capsys):
    """The flag was dropped without a word."""
    file = tmp_path / "sweep.yaml"
    file.write_text("defense: [at]\noptim.lr: [0.1, 0.05]\n")
    assert main(["compare", "--sweep", str(file), "--optim.lr", "0.3", "--out", str(tmp_path / "out")]) == 2
    assert "lists `optim.lr`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
