"""The command line: every mistake one line and exit code 2, nothing overwritten; the real commands end to end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastarat.cli import main

SMALL = ["--limit-train", "64", "--batch-size", "32", "--epochs", "1", "--attack.num-steps", "1", "--eval.num-steps", "1",
         "--eval.val-images", "20", "--attack.epsilon", "0.1", "--no-tensorboard"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *SMALL, "--out", str(out), "--quiet"]) == 0
    return out


def mistake(argv, capsys) -> str:
    """Run a command that must fail with exit code 2 and one line."""
    code = main(argv)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.err.startswith("fastarat: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def folder_of_images(root: Path, classes: int) -> Path:
    for split in ("train", "test"):
        for c in range(classes):
            (root / split / f"class{c}").mkdir(parents=True)
            for i in range(6):
                pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{c}" / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["train", "--dataset", "digit"], "did you mean 'digits'"),
        (["train", "--defense", "arat"], "did you mean 'ar-at'"),
        (["train", "--model", "resnet8"], "did you mean 'resnet18'"),
        (["train", "--epocs", "3"], "unknown flag --epocs; did you mean '--epochs'"),
        (["train", "--defense", "at", "--defense.gamma", "3"], "unknown flag --defense.gamma"),
        (["train", "--attack.epsilon", "8"], "write 8/255"),
        (["train", "--attack.epsilon"], "expected one argument"),
        (["train", "--batch-size", "1"], "at least 2 images"),
        (["train", "--device", "cuda:9"], "device"),
        (["train", "--config", "missing.yaml"], "cannot read config missing.yaml"),
        (["train", "extra"], "unexpected argument 'extra'"),
        (["train", "--loader", "ffcv"], "data prepare"),
        (["train", "--kernels", "triton", "--quiet"], "kernels=triton cannot be had here"),
        (["eval"], "required: run"),
        (["eval", "nowhere"], "no run folder or checkpoint nowhere"),
        (["eval", "nowhere", "--attack", "pdg-20"], "did you mean"),
        (["eval", "nowhere", "--limit", "0"], "expected 1 or more"),
        (["data", "prepare", "digits"], "--out"),
        (["data", "info", "no/such/folder"], "no/such/folder"),
        (["report", "nowhere"], "nowhere"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_are_one_line_and_exit_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in mistake(argv, capsys)
    assert not (tmp_path / "runs").exists(), "a refused command must not leave a run folder"


def test_yaml_mistakes(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    for text, words in (
        ("attack:\n  epsilom: 8/255\n", "unknown key 'attack.epsilom'; did you mean 'epsilon'"),
        ("dataset: [digits\n", "c.yaml line"),
        ("- a\n- b\n", "key: value"),
        ("defense:\n  name: ar-at\n  gama: 3\n", "did you mean 'gamma'"),
    ):
        file.write_text(text)
        assert words in mistake(["train", "--config", str(file)], capsys)


def test_data_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = folder_of_images(tmp_path / "one", 1)
    assert "class" in mistake(["train", "--dataset", str(one)], capsys)
    two = folder_of_images(tmp_path / "two", 2)
    (two / "train" / "class0" / "0.png").write_bytes(b"not an image")
    assert "0.png" in mistake(["train", "--dataset", str(two)], capsys)
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "cifar-10-binary.tar.gz").write_bytes(b"broken")
    assert "cifar-10-binary.tar.gz" in mistake(["train", "--dataset", "cifar10"], capsys)
    (tmp_path / "broken.beton").write_bytes(b"broken")
    assert "dataset.json" in mistake(["train", "--dataset", "broken.beton"], capsys)


def test_a_network_without_batchnorm_cannot_be_split(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("fastarat").models.MODELS, "plain", lambda k, c: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, k)))  # fmt: skip
    assert "no BatchNorm layer to split" in mistake(["train", "--model", "plain"], capsys)
    assert not (tmp_path / "runs").exists()


def test_existing_folder_is_kept(run, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    assert "--resume" in mistake(["train", *SMALL, "--out", str(run)], capsys)
    assert {p.name: p.stat().st_mtime_ns for p in run.iterdir()} == before


def test_unwritable_disk(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in mistake(["train", *SMALL, "--out", str(tmp_path / "file" / "run")], capsys)


def test_corrupt_checkpoints(run, capsys, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for file in ("config.yaml", "metrics.jsonl"):
        (copy / file).write_bytes((run / file).read_bytes())
    (copy / "last.pt").write_bytes((run / "last.pt").read_bytes()[:5000])
    (copy / "last.safetensors").write_bytes(b"\x00" * 100)
    assert "cannot be read" in mistake(["train", "--resume", str(copy)], capsys)
    assert "cannot be read" in mistake(["eval", str(copy)], capsys)
    assert "leave --config out" in mistake(
        ["train", "--resume", str(run), "--config", str(run / "config.yaml")], capsys
    )
    assert "epochs cannot change" in mistake(["train", "--resume", str(run), "--epochs", "5"], capsys)


def test_checkpoint_of_another_data_set(run, capsys, tmp_path):
    other = folder_of_images(tmp_path / "images", 3)
    error = mistake(["eval", str(run), "--dataset", str(other)], capsys)
    assert "10 classes and 1 channel" in error
    assert "3 and 3" in error


def test_train_eval_report_resume(run, capsys):
    assert main(["eval", str(run), "--attack", "clean,pgd-2", "--limit", "20", "--weights", "best"]) == 0
    out = capsys.readouterr().out
    assert "pgd-2" in out
    saved = json.loads((run / "eval-best.json").read_text())
    assert saved["num_images"] == 20
    assert set(saved["accuracy"]) == {"clean_acc", "robust_acc_pgd2"}
    assert saved["settings"]["epsilon"] == 0.1
    assert main(["eval", str(run / "best.safetensors"), "--attack", "clean", "--limit", "20", "--out", str(run / "x.json")]) == 0  # fmt: skip
    assert json.loads((run / "x.json").read_text())["accuracy"]["clean_acc"] == saved["accuracy"]["clean_acc"]
    assert "nothing to do" not in capsys.readouterr().out
    assert main(["train", "--resume", str(run)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_image_folder_end_to_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = folder_of_images(tmp_path / "images", 3)
    argv = [
        "train",
        "--dataset",
        str(images),
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--attack.num-steps",
        "1",
        "--quiet",
    ]
    assert main(argv) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "last.safetensors").exists()


def test_beton_end_to_end(tmp_path, monkeypatch, ffcv):
    monkeypatch.chdir(tmp_path)
    images = folder_of_images(tmp_path / "images", 3)
    assert main(["data", "prepare", str(images), "--out", "b"]) == 0
    for loader in ("resident", "ffcv"):
        argv = [
            "train",
            "--dataset",
            "b",
            "--loader",
            loader,
            "--epochs",
            "1",
            "--batch-size",
            "4",
            "--out",
            loader,
            "--quiet",
        ]
        assert main([*argv, "--attack.num-steps", "1"]) == 0
    a, b = ((tmp_path / n / "last.safetensors").read_bytes() for n in ("resident", "ffcv"))
    assert a == b, "both loaders give the same pixels in the same order, so the same weights"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def loss(self):\n        return {}", "mine.py: Mine.loss takes (self): expected (self, views)"),
        (
            "def loss(self, views):\n        return views.logits_adv.mean()",
            "Mine.loss returned Tensor: expected a dict",
        ),
        (
            "def loss(self, views):\n        return {'a': views.logits_adv.mean(1)}",
            "term 'a' has shape [2]: expected a scalar",
        ),
        ("def loss(self, views):\n        return {'a': 1.0}", "term 'a' is a float"),
        ("def loss(self, views):\n        return {'a': views.logits_adv.detach().mean()}", "no term has a gradient"),
        (
            "def loss(self, views):\n        return {'a': views.logits_clean.mean()}",
            "mine.py:9 in loss: AttributeError",
        ),
        (
            "objective = 'kll'\n    def loss(self, views):\n        return {'a': views.logits_adv.mean()}",
            "did you mean",
        ),
        ("start = 'unifrm'\n    def loss(self, views):\n        return {'a': views.logits_adv.mean()}", "did you mean"),
        ("other = 1", "must define loss(self, views)"),
        (
            "def loss(self, views):\n        return {'a': views.logits_adv.mean()",
            "mine.py does not import: SyntaxError",
        ),
    ],
)
def test_mistakes_in_a_defense_of_ones_own(body, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nimport torch\nimport fastarat\n\n\n"
        f"@dataclass(frozen=True, kw_only=True)\nclass Mine(fastarat.Defense):\n    {body}\n"
    )
    assert words in mistake(["train", *SMALL, "--defense", "mine.py:Mine", "--out", "run"], capsys)
    assert not (tmp_path / "run").exists()


def test_exit_codes_of_the_installed_command():
    command = [sys.executable, "-m", "fastarat.cli"]
    assert subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0
    done = subprocess.run([*command, "train", "--attack.epsilon", "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--defense.center", "--attack.bn", "--amp", "--optim.recipe", "--resume", "--swa"):
        assert flag in text


def test_nan_exits_1_and_names_the_checkpoint(tmp_path, capsys):
    code = main(["train", *SMALL, "--epochs", "3", "--optim.lr", "1e30", "--out", str(tmp_path / "run"), "--quiet"])
    assert code == 1
    assert "became NaN or infinite at epoch" in capsys.readouterr().err


@pytest.mark.parametrize("defense", ["ar-at", "at", "standard"])
def test_divergence_is_the_message_of_the_training(defense, tmp_path, capsys):
    """At this rate the losses, of batch statistics, stay finite for a while, and the running statistics do not."""
    argv = ["train", "--defense", defense, "--limit-train", "320", "--batch-size", "32", "--epochs", "3", "--optim.lr", "1000",
            "--attack.epsilon", "0.1", "--attack.num-steps", "2", "--no-tensorboard", "--quiet"]  # fmt: skip
    assert main([*argv, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastarat: training stopped: ")
    assert error.count("\n") == 1
    assert "check the checkpoint" not in error
