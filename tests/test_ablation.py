"""The paper's ablation: which rows, what they train, and the published numbers beside them."""

import json

import pytest

from fastarat import diagnostics
from fastarat.ablation import PUBLISHED, ablate, rows_of
from fastarat.cli import main
from fastarat.errors import UserError
from fastarat.runs import Run

SMALL = {
    "limit_train": 160, "batch_size": 32, "epochs": 1, "tensorboard": False,
    "attack": {"epsilon": 0.1, "num_steps": 2}, "eval": {"val_images": 40, "num_steps": 2},
}  # fmt: skip


def test_rows_are_in_the_papers_order_and_differ_in_their_factors_alone():
    rows = rows_of(["stop-gradient", "split-bn"], {"gamma": 10})
    assert list(rows) == [
        f"stop-gradient {stop}, split-bn {split}" for split in ("no", "yes") for stop in ("no", "yes")
    ]
    switched = {(row.pop("defense.align"), row.pop("defense.split_bn")) for row in rows.values()}
    assert switched == {(align, split) for align in ("x->y", "x->y,y->x") for split in (False, True)}
    assert len({json.dumps(row) for row in rows.values()}) == 1
    assert rows["stop-gradient no, split-bn no"] == {
        "defense": "ar-at", "defense.layers": ("penultimate",), "defense.predictor_adv": False,
        "defense.balance": "fixed", "defense.gamma": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("factors", "own", "said"),
    [
        (["stop-grad"], {}, "stop-gradient"),
        (["predictor"], {"predictor_adv": True}, "factor predictor"),
        (["center", "center"], {}, "each once"),
        ([], {}, "one or more"),
    ],
)
def test_mistakes_are_named(factors, own, said):
    with pytest.raises(UserError, match=said):
        rows_of(factors, own)
    with pytest.raises(UserError, match="AR-AT"):
        ablate(base={"defense": {"name": "trades"}})


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diagnostics, "EVERY", 2)
    found = ablate((0, 1), base=SMALL, out=tmp_path, attack="clean,pgd-2", limit=40, progress=False)
    assert next(row["defense"] for row in found.rows) == "stop-gradient no, split-bn no"
    assert len(found.rows) == 4
    for row in found.rows:
        values = []
        for seed in (0, 1):
            run = Run(tmp_path / f"{row['defense'].replace(', ', '-').replace(' ', '-')}-seed{seed}")
            config = run.read_config()
            assert config.diagnostics
            assert config.defense.split_bn == row["defense"].endswith("yes")
            assert config.defense.align == ("x->y" if "gradient yes" in row["defense"] else "x->y,y->x")
            (only,) = run.metrics()
            values.append(only["diag/grad_sim"])
        assert row["diagnostics"]["grad_sim"]["values"] == pytest.approx(values)
        assert row["diagnostics"]["grad_sim"]["mean"] == pytest.approx(sum(values) / 2)
        key = tuple(part.rsplit(" ", 1)[1] for part in row["defense"].split(", "))
        assert tuple(row["published"][k] for k in ("clean", "autoattack", "grad_sim")) == PUBLISHED["resnet18"][key]
    text = found.markdown()
    assert "Grad-sim 0.68" in text
    assert "not of this table's network and data" in text
    assert "predictor adv off" in text
    assert (tmp_path / "table.md").read_text() == text + "\n"
    # Called again, by its command: nothing is trained or measured anew, and other factors have other folders.
    flags = ["--limit-train", "160", "--batch-size", "32", "--epochs", "1", "--no-tensorboard", "--attack.epsilon", "0.1",
             "--attack.num-steps", "2", "--eval.val-images", "40", "--eval.num-steps", "2"]  # fmt: skip
    asked = ["--seeds", "0,1", "--test-attack", "clean,pgd-2", "--limit", "40", "--out", str(tmp_path)]
    assert main(["ablate", *flags, *asked]) == 0
    out = capsys.readouterr().out
    assert "8 finished already" in out
    assert "evaluating" not in out
    assert "Grad-sim 0.68" in out
    assert main(["ablate", *flags, *asked, "--factors", "predictor,what"]) == 2
    assert main(["ablate", *flags, *asked, "--seed", "0"]) == 2
