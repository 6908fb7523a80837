"""Results on disk that are damaged: never used, never a traceback."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastarat.compare import _saved_evaluation
from fastarat.errors import UserError
from fastarat.runs import Run

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
    run.meta = lambda which="last": {"epoch": 1, "epsilon": 0.03, "norm": "linf"}
    plan: Any = SimpleNamespace(run=run, which="last")
    assert _saved_evaluation(plan, "clean", None) is None
    assert "damaged: evaluated anew" in capsys.readouterr().err
