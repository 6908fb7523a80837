"""What a reader is told of an evaluation, and what a later one does to it: kept, labelled, refused where it is malformed."""

import json

import pytest
import torch
from small import trained
from torch import nn

from fastarat.cli import main
from fastarat.evaluation import check_record, evaluate, parse_attacks
from fastarat.evaluation.alarms import doubts, square_took
from fastarat.report import report
from fastarat.report.sections import _strongest
from fastarat.report.subjects import conditions, title_in
from fastarat.report.watch import watch


def told(attacks: str, num_images: int = 1000, clean: float = 0.9, **accuracy: float) -> list[str]:
    entries = [entry for entry in parse_attacks(attacks) if entry.key in accuracy]
    return doubts(entries, accuracy, {}, clean, num_images=num_images)


def test_a_lone_member_far_below_pgd_is_an_alarm():
    (note,) = told("pgd-20,square", robust_acc_pgd20=0.9, robust_acc_square=0.6)
    assert "30.0 points" in note
    (note,) = told("pgd-20,fab-t", robust_acc_pgd20=0.5, robust_acc_fab_t=0.4)
    assert "10.0 points" in note
    assert told("pgd-20,square", robust_acc_pgd20=0.5, robust_acc_square=0.6) == []


def test_one_image_is_no_alarm():
    assert told("pgd-20,autoattack", 30, robust_acc_pgd20=0.8, robust_acc_aa=0.8 - 1 / 30) == []
    assert told("pgd-20", 60, clean=0.5, robust_acc_pgd20=0.5 + 1 / 60) == []
    assert told("pgd-20", 60, clean=0.5, robust_acc_pgd20=0.5 + 5 / 60) != []


def test_square_is_an_alarm_whoever_ran_it():
    (note,) = square_took({"apgd-ce": 0.5, "square": 0.45})
    assert "5.0 points" in note
    assert square_took({"square": 0.4}) == square_took({"apgd-ce": 0.5, "square": 0.5}) == []


def test_results_say_what_they_are_of():
    fast = {"confirmed": {"autoattack-fast": False}, "norm": "linf", "epsilon": 0.1}
    assert title_in(fast, "robust_acc_aa_fast") == "AutoAttack-fast (unconfirmed)"
    assert title_in(fast, "robust_acc_worst").endswith("(unconfirmed)")
    assert "unconfirmed" not in title_in({"confirmed": {"autoattack-fast": True}}, "robust_acc_aa_fast")
    assert "branch clean" in conditions({**fast, "branch": "clean"})
    assert "on cifar10" in conditions({**fast, "dataset": "cifar10"})
    assert "branch" not in conditions({**fast, "branch": "adv"})


def test_classes_are_those_of_the_strongest_attack():
    counts = {"clean_acc": [5, 5], "robust_acc_pgd20": [3, 3], "robust_acc_cw20": [3, 2], "robust_acc_transfer": [1, 0]}
    assert _strongest(counts) == "robust_acc_cw20"
    assert _strongest(counts | {"robust_acc_aa": [4, 4]}) == "robust_acc_aa"
    assert _strongest({"clean_acc": [5, 5]}) is None


class Right(nn.Module):
    """A network that is right about every image of class 0, however it is corrupted."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * torch.tensor([[3.0, 0.0]]).expand(len(x), 2) + 0 * x.mean()


def test_shares_of_many_batches_come_to_one_and_no_more():
    images, labels = torch.rand(43, 1, 8, 8), torch.zeros(43, dtype=torch.int64)
    result = evaluate(Right(), (images, labels), "clean,corruptions", batch_size=7, progress=False)
    assert result.accuracy["corruption_acc"] == 1.0
    record = json.loads(result.to_json())
    check_record(record)
    for broken in ({"confirmed": None}, {"confirmed": {"autoattack-fast": "yes"}}):
        with pytest.raises(TypeError):
            check_record({**record, "settings": {**record["settings"], **broken}})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("kept") / "comparison" / "run", epochs=1)


def test_an_earlier_result_that_says_more_is_kept(run, tmp_path, capsys):
    where = tmp_path / "eval.json"
    asked = ["eval", str(run), "--limit", "20", "--out", str(where)]
    assert main([*asked, "--attack", "clean,pgd-3"]) == 0
    first = where.read_text()
    assert main([*asked, "--attack", "clean,pgd-3,pgd-5"]) == 0  # says all that the first one did
    assert not (tmp_path / "eval.previous.json").exists()
    second = where.read_text()
    assert main([*asked, "--attack", "clean"]) == 0
    assert "eval.previous.json" in capsys.readouterr().out
    assert (tmp_path / "eval.previous.json").read_text() == second != first
    assert main([*asked, "--attack", "clean", "--branch", "clean", "--overwrite"]) == 0
    assert (tmp_path / "eval.previous.json").read_text() == second


def test_a_source_that_is_the_run_itself_is_noted(run, tmp_path, capsys):
    assert (
        main(
            [
                "eval",
                str(run),
                "--from",
                str(run),
                "--limit",
                "8",
                "--attack",
                "clean",
                "--out",
                str(tmp_path / "e.json"),
            ]
        )
        == 0
    )
    assert "this very network" in capsys.readouterr().out


def test_a_comparisons_folder_can_be_watched(run, tmp_path):
    page = watch([run.parent], tmp_path / "page", every=0.1, progress=False)
    assert page == tmp_path / "page" / "report.html"
    assert "http-equiv" not in page.read_text()
    assert page.read_text().count("<h2") == report([run], tmp_path / "one").read_text().count("<h2")
