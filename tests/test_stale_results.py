"""Results on disk that are damaged: never used, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from archives import FOLDER, draw_folder
from small import trained

from fastarat.cli import main
from fastarat.compare import compare
from fastarat.data import load_dataset
from fastarat.errors import UserError
from fastarat.evaluation import collect, data_hash, saved_evaluation
from fastarat.files import load_weights
from fastarat.runs import Run, is_current

GOOD = '{"settings": {"attacks": {"clean": "clean_acc"}, "norm": "linf", "epsilon": 0.03}, "num_images": 10, '
DAMAGED = {
    "nested": "[" * 100_000,
    "infinite count": GOOD.replace("10", "1e999") + '"accuracy": {"clean_acc": 0.5}}',
    "infinite": GOOD + '"accuracy": {"clean_acc": 1e999}}',
    "nan": GOOD + '"accuracy": {"clean_acc": NaN}}',
    "above one": GOOD + '"accuracy": {"clean_acc": 7}}',
    "list": "[]",
    "half": GOOD,
    "not text": "\udcff",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_evaluation_is_one_line_and_is_evaluated_anew(tmp_path, capsys, text):
    run = Run(tmp_path)
    for file in (run.evaluation("last"), run.compared("last")):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="delete it"):
        run.read_evaluation()
    assert saved_evaluation(run.compared("last"), {"epoch": 1}, weights="x", data="y") is None
    assert "damaged" in capsys.readouterr().err


@pytest.fixture
def evaluated(tmp_path) -> Run:
    run = Run(trained(tmp_path / "run", epochs=1))
    assert main(["eval", str(run.path), "--attack", "clean", "--limit", "20"]) == 0
    return run


def replace_weights(run: Run) -> None:
    weights, meta = load_weights(run.weights())
    weights["fc.bias" if "fc.bias" in weights else next(k for k in weights if k.endswith("bias"))] += 1
    run.save_weights("last", weights, {key: value for key, value in meta.items() if key != "sha256"})


def asked_again(run: Run) -> dict[str, Any] | None:
    meta, digits = run.meta(), load_dataset("digits", data_dir=run.path.parent).test
    asked = {"attacks": ["clean"], "limit": 20, "epoch": 1, "norm": "linf", "epsilon": meta["epsilon"]}
    return saved_evaluation(run.compared(), asked, weights=meta["sha256"], data=data_hash(digits, 20))


def test_an_evaluation_is_used_for_its_own_weights_alone(evaluated, capsys):
    shutil.copy(evaluated.evaluation(), evaluated.compared())
    assert asked_again(evaluated) is not None
    assert is_current(evaluated, "last")
    replace_weights(evaluated)
    assert asked_again(evaluated) is None
    assert "is of other weights than the run holds now: evaluated anew" in capsys.readouterr().err
    assert not is_current(evaluated, "last")
    assert main(["report", str(evaluated.path)]) == 0
    assert "eval.json is of other weights than are in the run now, and is left out" in capsys.readouterr().err


def test_an_evaluation_is_used_for_its_own_images_alone(evaluated, capsys):
    file, test = evaluated.evaluation(), load_dataset("digits", data_dir=evaluated.path.parent).test
    weights, asked = evaluated.meta()["sha256"], {"attacks": ["clean"], "limit": 20}
    assert saved_evaluation(file, asked, weights=weights, data=data_hash(test, 20)) is not None
    images, labels = collect(test, limit=20)
    assert data_hash((images, labels)) == data_hash(test, 20)
    for other in ((images.flip(3), labels), (images, (labels + 1) % 10)):
        assert saved_evaluation(file, asked, weights=weights, data=data_hash(other)) is None
        assert "is of other test images than there are now: evaluated anew" in capsys.readouterr().err
    assert saved_evaluation(file, {**asked, "limit": None}, weights=weights, data=data_hash(test)) is None
    assert not capsys.readouterr().err


def test_compare_evaluates_other_test_images_anew(tmp_path, capsys):
    """The same folder of images, with one file of the test set exchanged."""
    folder = draw_folder(tmp_path / "pets", FOLDER)
    base = {"dataset": str(folder), "epochs": 1, "batch_size": 10, "attack": {"num_steps": 1}, "augment": False}
    options = {"base": {**base, "data_dir": str(tmp_path), "eval": {"val_images": 4}}, "attack": "clean"}
    compare(["at"], [0], out=tmp_path / "out", progress=False, **options)
    shown = Run(tmp_path / "out" / "at-seed0").evaluation()
    text = shown.read_text()
    shown.unlink()  # as a kill leaves it that comes between the evaluation and its copy for reports
    compare(["at"], [0], out=tmp_path / "out", progress=False, **options)
    assert "evaluated anew" not in capsys.readouterr().err
    assert shown.read_text() == text
    cats = sorted((folder / "test" / "cat").iterdir())
    cats[0].write_bytes(next((folder / "train" / "dog").iterdir()).read_bytes())
    compare(["at"], [0], out=tmp_path / "out", progress=False, **options)
    assert "is of other test images than there are now: evaluated anew" in capsys.readouterr().err


def test_an_edited_evaluation_is_noticed(evaluated, capsys):
    text = evaluated.evaluation().read_text()
    record = json.loads(text)
    record["accuracy"]["clean_acc"] = 1.0
    evaluated.compared().write_text(json.dumps(record))
    assert asked_again(evaluated) is None
    assert "was edited, or is damaged: evaluated anew" in capsys.readouterr().err
    evaluated.evaluation().write_text(json.dumps(record))
    assert main(["report", str(evaluated.path)]) == 2
    assert "its checksum does not hold" in capsys.readouterr().err


def test_a_run_on_a_read_only_disk_is_evaluated_elsewhere(evaluated, tmp_path, monkeypatch, capsys):
    before = sorted(path.name for path in evaluated.path.rglob("*"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != evaluated.path and access(path, mode))
    out = tmp_path / "elsewhere" / "result.json"
    assert main(["eval", str(evaluated.path), "--attack", "apgd-ce", "--limit", "4", "--out", str(out)]) == 0
    assert out.is_file()
    assert list((tmp_path / "elsewhere" / "result-state").glob("apgd-ce-*.json"))
    assert sorted(path.name for path in evaluated.path.rglob("*")) == before
