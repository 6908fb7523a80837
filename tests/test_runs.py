"""The run folder as a class: names, what resuming clears up, which settings may differ, and the evaluations there are."""

import dataclasses
import json

import pytest
import torch

import fastarat
from fastarat.config import Config
from fastarat.files import write_atomic
from fastarat.resuming import config_to_resume, finished
from fastarat.runs import MAY_DIFFER, WEIGHTS, Run, load_start


def test_making_a_run_touches_nothing(tmp_path):
    run = Run(tmp_path / "none")
    names = [p.name for which in WEIGHTS for p in (run.weights(which), run.checkpoint(which), run.evaluation(which))]
    assert names[:3] == ["last.safetensors", "last.pt", "eval.json"]
    assert names[-3:] == ["ema.safetensors", "ema.pt", "eval-ema.json"]
    assert (run.metrics(), run.last_validation(), run.evaluations(), run.read_config()) == ([], {}, {}, None)
    assert not finished(run)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_lies_in_its_run(tmp_path):
    for path in (tmp_path, tmp_path / "last.pt"):
        assert Run.holding(path).path == tmp_path


def test_evaluations_are_those_of_all_weights(tmp_path):
    run = Run.create(tmp_path / "run")
    found = {"settings": {"norm": "linf", "epsilon": 0.1, "attacks": {"clean": "clean_acc"}}, "num_images": 9,
             "accuracy": {"clean_acc": 0.5}}  # fmt: skip
    for which in ("ema", "last"):
        run.evaluation(which).write_text(json.dumps(found))
    assert run.evaluations() == {"last": found, "ema": found}
    for broken in ({}, {**found, "num_images": 0}, {**found, "accuracy": {}}, {**found, "settings": {}}, []):
        run.evaluation("ema").write_text(json.dumps(broken))
        with pytest.raises(fastarat.UserError, match=r"eval-ema\.json is not an evaluation.*fastarat eval"):
            run.evaluations()


def test_which_settings_may_differ(tmp_path):
    run, config = Run.create(tmp_path / "run"), Config(epochs=3, out=str(tmp_path / "run"))
    run.write_config(config)
    assert run.read_config() == config
    same = dataclasses.replace(config, device="cuda:1", log_every=7, data_dir="elsewhere", out="moved")
    assert run.difference(same) is None
    assert run.difference(dataclasses.replace(config, epochs=4)) == ("epochs", 3)
    attack = dataclasses.replace(config.attack, num_steps=3)
    assert run.difference(dataclasses.replace(config, attack=attack)) == ("attack.num_steps", config.attack.num_steps)
    assert set(MAY_DIFFER) <= {f.name for f in dataclasses.fields(Config)}
    assert config_to_resume(run, {"device": "cpu"}).out == str(run.path)
    with pytest.raises(
        fastarat.UserError, match=r"seed cannot change \(only device, .*early_stop may, and epochs grow\)"
    ):
        config_to_resume(run, {"seed": 4})


def test_resuming_clears_what_a_kill_left(tmp_path):
    run = Run.create(tmp_path / "run")
    run.write_config(Config())
    (run.path / ".last.pt.123.partial").write_text("half")
    Run.resume(run.path)
    assert [p.name for p in run.path.iterdir()] == ["config.yaml"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    def full(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    with pytest.raises(fastarat.UserError, match=r"cannot write .*a: No space left"):
        write_atomic(tmp_path / "a", full)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize(
    ("defense", "needed"),
    [
        (fastarat.AT(), False),
        (fastarat.ARREST(), True),
        (fastarat.CURE(), True),
        (fastarat.CURE(warmup_epochs=1), False),
        (fastarat.CURE(warmup_epochs=1, pretrained="x"), True),
    ],
)
def test_who_starts_from_a_standard_run(defense, needed):
    assert defense.needs_start == needed
    model = torch.nn.Linear(2, 2)
    if needed:
        with pytest.raises(fastarat.UserError, match=f"{defense.name} starts from a standardly trained network"):
            load_start(defense, model)
    else:
        load_start(defense, model)
