"""The command line: every mistake one line and exit code 2, nothing overwritten; the real commands end to end."""

import ast
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from archives import draw_classes

import fastarat
from fastarat.cli import _INTERRUPTED, main
from fastarat.schedules import RECIPES

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


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --dataset ''", "--dataset '': expected a value"),
        ("train --defense.layers=", "--defense.layers '': expected a value"),
        (f"train --defense.layers penultimate, {shlex.join(SMALL)}", "unknown feature layer ''"),
        ("eval ''", "run '': expected a value"),
        ("report runs/one ' '", "runs ' ': expected a value"),
        ("trian", "unknown command 'trian'; did you mean 'train'"),
        ("train --dataset digit", "did you mean 'digits'"),
        ("train --defense arat", "did you mean 'ar-at'"),
        ("train --model resnet8", "did you mean 'resnet18'"),
        ("train --epocs 3", "unknown flag --epocs; did you mean '--epochs'"),
        ("train --defense at --defense.gamma 3", "unknown flag --defense.gamma"),
        ("train --attack.epsilon 8", "write 8/255"),
        ("train --attack.epsilon", "expected one argument"),
        ("bench --attack.norm l1", "Expected one of: linf, l2."),
        ("train --batch-size 1", "at least 2 images"),
        ("train --device cuda:9", "device"),
        ("train --config missing.yaml", "cannot read config missing.yaml"),
        ("train extra", "unexpected argument 'extra'"),
        ("train --loader ffcv", "data prepare"),
        ("train --kernels triton --quiet", "kernels=triton cannot be had here"),
        ("eval", "required: run"),
        ("eval nowhere", "no run folder or checkpoint nowhere"),
        ("eval nowhere --attack pdg-20", "did you mean"),
        ("eval nowhere --limit 0", "expected 1 or more"),
        ("data prepare digits", "--out"),
        ("data info no/such/folder", "no/such/folder"),
        ("report nowhere", "nowhere"),
        ("train --batch-size 5000", "batch_size=5000 is more than the 1,294 training images of digits: every step"),
        ("train --limit-train 40", "the 40 training images of digits (limit_train=40): every step would see fewer"),
        ("train --limit-train 5", "(limit_train=5) leave out 5 of its 10 classes, '0' first: write --limit-train 10"),
        ("train --eval.val-images 1436", "leave out 9 of its 10 classes, '0' first: hold out fewer with --eval.val"),
        ("train --eval.val-images 2000", "1437 training images to cut from: write 0 to 1436"),
        ("train --threads 100000", "threads=100000: this machine has"),
        ("eval nowhere --seed -1", "seed=-1 is outside [0, 2^63)"),
        (
            "data info digits --image-size 60000",
            "image_size=60000 is not a side of images to train on: write 1 to 4096",
        ),
        ("train --defense", "argument --defense: expected one argument (see fastarat train --help)"),
        ("--verison", "unknown flag --verison; did you mean '--version'? (see fastarat --help)"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(command, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in mistake(shlex.split(command), capsys)
    assert not (tmp_path / "runs").exists(), "a refused command must not leave a run folder"


def test_yaml_mistakes(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    for text, words in (
        ("attack:\n  epsilom: 8/255\n", "unknown key 'attack.epsilom'; did you mean 'epsilon'"),
        ("dataset: [digits\n", "c.yaml line"),
        ("- a\n- b\n", "key: value"),
        ("defense:\n  name: ar-at\n  gama: 3\n", "unknown key 'defense.gama'; did you mean 'gamma'"),
    ):
        file.write_text(text)
        assert words in mistake(["train", "--config", str(file)], capsys)
        if "defense" not in text:  # which compare has flags for
            assert words in mistake(["compare", "--defenses", "at", "--config", str(file)], capsys)


def test_flags_win_over_yaml_and_fractions_are_numbers(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        sys.modules["fastarat.training"], "train", lambda config=None, **options: seen.update(options, config=config)
    )
    file = tmp_path / "c.yaml"
    file.write_text("attack: {epsilon: 0.5, num_steps: 3}\ndefense: {name: ar-at, gamma: 5}\nbatch-size: 16\n")
    flags = "--attack.epsilon 8/255 --amp --no-augment --defense.layers 'a, b' --optim.optimizer fastarat --epochs none"
    assert main(["train", "--quiet", "--config", str(file), *shlex.split(flags)]) == 0
    config = seen["config"]
    assert (config.attack.epsilon, config.attack.num_steps, config.batch_size) == (8 / 255, 3, 16)
    assert (config.amp, config.augment, config.epochs, config.optim.optimizer) == (True, False, None, "torch")
    assert config.defense == fastarat.ARAT(layers=("a", "b"), gamma=5.0)
    assert main(["train", "--quiet", "--config", str(file), "--defense", "AT"]) == 0
    assert seen["config"].defense == fastarat.AT()
    file.write_text("defense: trades\n")
    assert main(["train", "--quiet", "--config", str(file), "--defense.beta", "3", "--no-defense.exact"]) == 0
    assert seen["config"].defense == fastarat.TRADES(beta=3.0, exact=False)
    argv = "train --quiet --resume RUN --device cpu --no-tensorboard --attack.num-steps 10"
    assert main(argv.split()) == 0
    assert seen["resume"] == "RUN"
    assert seen["overrides"] == {"device": "cpu", "tensorboard": False, "attack": {"num_steps": "10"}}


def test_data_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two = draw_classes(tmp_path / "two", 2)
    (two / "train" / "class0" / "0.png").write_bytes(b"not an image")
    assert "0.png" in mistake(["train", "--dataset", str(two)], capsys)
    (tmp_path / "broken.beton").write_bytes(b"broken")
    assert "dataset.json" in mistake(["train", "--dataset", "broken.beton"], capsys)


def test_a_network_without_batchnorm_cannot_be_split(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fastarat.nets.models.MODELS, "plain", lambda k, c: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, k)))  # fmt: skip
    assert "no BatchNorm layer to split" in mistake(["train", "--model", "plain"], capsys)
    assert not (tmp_path / "runs").exists()
    assert main(["train", "--model", "plain", "--no-defense.split-bn", *SMALL, "--quiet"]) == 0, "the mend it names"
    assert len(list((tmp_path / "runs").glob("*/last.safetensors"))) == 1


def test_a_batch_of_the_whole_set_is_taken(tmp_path):
    argv = ["train", "--defense", "standard", *SMALL, "--limit-train", "64", "--batch-size", "64", "--quiet"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0


class Fixed(torch.nn.Module):
    """Takes images of one size only, as a vision transformer does."""

    def __init__(self, size, num_classes, in_chans):
        super().__init__()
        self.size, self.bn = size, torch.nn.BatchNorm2d(in_chans)
        self.linear = torch.nn.Linear(in_chans * size * size, num_classes)

    def forward(self, x):
        assert x.shape[2] == self.size, f"Input height ({x.shape[2]}) doesn't match model ({self.size})."
        return self.linear(self.bn(x).flatten(1))


@pytest.fixture
def timm(monkeypatch):
    module = type(sys)("timm")
    module.list_models = lambda: [
        f"vit_{size}_patch{p}_{n}" for size in ("tiny", "base") for p in range(20) for n in range(40)
    ]
    module.create_model = lambda name, pretrained, num_classes, in_chans: Fixed(int(name[-1]), num_classes, in_chans)
    module.get_pretrained_cfg = lambda name: SimpleNamespace(fixed_input_size=False)
    monkeypatch.setitem(sys.modules, "timm", module)


def test_a_network_of_another_image_size(timm, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for defense in ("ar-at", "at", "standard"):
        error = mistake(["train", "--model", "timm:vit_tiny_patch16_4", "--defense", defense], capsys)
        assert (
            "timm:vit_tiny_patch16_4 does not take images of 8x8 with 1 channel(s) (Input height (8) doesn't match"
            in error
        )
    assert not (tmp_path / "runs").exists()
    assert main(["train", "--model", "timm:vit_tiny_patch16_8", *SMALL, "--quiet", "--out", "run"]) == 0


def test_of_many_names_the_nearest_are_listed(timm, capsys):
    error = mistake(["train", "--model", "timm:vit_tiny_patch16_x"], capsys)
    assert "Nearest of 1,600 known: vit_tiny_patch16_" in error
    assert len(error) < 250


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"hello", "a file that begins with b'hello"),
    ],
)
def test_what_is_no_checkpoint_is_called_by_its_name(start, what, capsys, tmp_path):
    for name in ("x.pt", "x.png", "x.safetensors"):
        if name == "x.safetensors" and start == b"hello":
            continue  # the format has no magic number
        (tmp_path / name).write_bytes(start + bytes(range(100)))
        for argv in (["import", str(tmp_path / name), "--out", str(tmp_path / "run")], ["eval", str(tmp_path / name)]):
            error = mistake(argv, capsys)
            assert f"cannot be read: it is {what}" in error
            assert "weights_only" not in error


def test_a_broken_checkpoint_and_one_of_others(capsys, tmp_path):
    file = tmp_path / "x.pt"
    file.write_bytes(b"\x80\x02broken")
    error = mistake(["import", str(file), "--out", str(tmp_path / "run")], capsys)
    assert "corrupt or not a PyTorch checkpoint" in error
    assert "weights_only" not in error
    torch.save({"conv.weight": torch.ones(2)}, file)
    error = mistake(["eval", str(file)], capsys)
    assert "is not a fastarat checkpoint" in error
    assert f"fastarat import {file} --out RUN" in error


COMMANDS = ["train", "eval", "compare", "report", "import", "export", "data", "bench", "doctor"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", "nothing was begun, and the same command starts again"),
        ("eval", "AutoAttack's finished batches are kept"),
        ("compare", "finished and begun runs are kept: the same command goes on"),
        ("report", "the same command writes it anew"),
        ("import", "once the folder it may have begun (--out) is deleted"),
        ("export", "nothing was written; the same command starts again"),
        ("data", "of image files, those written so far are kept beside --out, and the same command goes on"),
        ("bench", "are in the file named with --out"),
        ("doctor", "the same command starts again"),
    ],
)
def test_interrupts_say_what_is_kept(command, words, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fastarat.cli._{command}", interrupt)
    assert main([command]) == 130
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert "train --resume" not in error


@pytest.mark.parametrize("command", ["eval", "report", "bench", "data"])
def test_sigterm_is_one_line_that_says_what_is_kept(command, capsys, monkeypatch):
    def interrupt(*args):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(f"fastarat.cli._{command}", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    assert main([command]) == 143
    assert signal.getsignal(signal.SIGTERM) == before
    error = capsys.readouterr().err
    assert error.startswith(f"fastarat: ended by SIGTERM; {_INTERRUPTED.get(command, 'nothing was written')}")
    assert error.count("\n") == 1


def test_a_warning_is_one_line_without_the_code_it_came_from(capsys, monkeypatch):
    def warn(*args):
        warnings.warn("a file is\ndamaged", stacklevel=1)
        return 0

    monkeypatch.setattr("fastarat.cli._data", warn)
    shown = warnings.showwarning
    assert main(["data"]) == 0
    assert capsys.readouterr().err == "warning: a file is\\ndamaged\n"
    assert warnings.showwarning is shown


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("doctor", "eval", "train")])
def test_a_launcher_of_several_processes_is_refused(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"WORLD_SIZE=2: fastarat {command} runs in one process" in mistake([command], capsys)
    with pytest.raises(fastarat.UserError, match="WORLD_SIZE=2"):
        fastarat.train()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "unknown flag" in mistake(["train", "--nonsense"], capsys)


def help_of(command, capsys, monkeypatch, *argv) -> str:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        main([command, *argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_names_what_can_be_chosen(capsys, monkeypatch):
    text = help_of("train", capsys, monkeypatch)
    joined = re.sub(r"\n {20,}", " ", text).splitlines()
    lines = {line.split()[0].rstrip(","): line for line in joined if line.strip().startswith("--")}
    assert "--no-defense.split-bn" in text
    assert {"--defense.center", "--attack.bn", "--amp", "--optim.recipe", "--resume", "--swa"} <= lines.keys()
    assert all(f"{name}," in lines["--defense"] for name in fastarat.DEFENSES)
    assert "FILE.py:CLASS" in lines["--defense"]
    assert all(name in lines["--optim.recipe"] for name in RECIPES)
    assert all(name in lines["--model"] for name in fastarat.nets.models.MODELS)
    assert "wrn-DEPTH-WIDTH" in lines["--model"]
    assert "timm:NAME" in lines["--model"]
    assert "{'x->y','y->x','x->y,y->x','x<->y'}" in lines["--defense.align"]
    assert "the mean of both" in lines["--defense.align"]
    assert "--no-optim.nesterov" in lines["--optim.nesterov"]
    assert "\nar-at: L = a CE" in text
    assert ".:\n" not in text
    assert all(f"{name}," in help_of("compare", capsys, monkeypatch) for name in fastarat.DEFENSES)


def test_branches_and_limits_of_an_evaluation(run, tmp_path, capsys):
    one = tmp_path / "one"
    assert main(["train", "--defense", "at", *SMALL, "--out", str(one), "--quiet"]) == 0
    assert "one BatchNorm set, called adv" in mistake(
        ["eval", str(one), "--branch", "clean", "--attack", "clean"], capsys
    )
    assert "it has clean, adv" in mistake(["eval", str(run), "--branch", "advs", "--attack", "clean"], capsys)
    assert not (one / "eval.json").exists()
    assert main(["eval", str(one), "--branch", "adv", "--attack", "clean", "--limit", "5000"]) == 0
    assert "note: --limit 5000 is above the 360 test images: all of them are evaluated" in capsys.readouterr().out
    assert main(["eval", str(one), "--attack", "clean", "--weights", "best", "--limit", "10"]) == 0
    assert "(best, epoch 1, highest validation PGD-1 accuracy)" in capsys.readouterr().out


def test_the_norm_of_an_evaluation(run, capsys, tmp_path):
    """Its other spellings: test_threat_model."""
    where = tmp_path / "e.json"
    argv = ["eval", str(run), "--attack", "pgd-2", "--limit", "40", "--norm", "L2", "--epsilon", "0.1"]
    assert main([*argv, "--out", str(where)]) == 0
    settings = json.loads(where.read_text())["settings"]
    assert (settings["norm"], settings["epsilon"]) == ("l2", 0.1)
    for flags, words in (
        (["--norm", "l1"], "--norm='l1'"),
        (["--epsilon", "8"], "--epsilon=8 is outside (0, 1]"),
        (["--step-size", "2"], "--step-size=2 is outside (0, 1]"),
    ):
        assert words in mistake(["eval", str(run), *flags], capsys)


def test_existing_folder_is_kept(run, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    error = mistake(["train", *SMALL, "--out", str(run)], capsys)
    assert f"run folder {run} exists already: continue it with --resume {run}" in error
    assert {p.name: p.stat().st_mtime_ns for p in run.iterdir()} == before


def test_unwritable_disk(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in mistake(["train", *SMALL, "--out", str(tmp_path / "file" / "run")], capsys)


def test_an_unwritable_result_is_found_before_the_evaluation(run, capsys, tmp_path, monkeypatch):
    def evaluated(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(sys.modules["fastarat.evaluation"], "evaluate", evaluated)
    (tmp_path / "file").write_text("")
    for where, words in ((tmp_path, "it is a folder; name a file"), (tmp_path / "file" / "e.json", "another place")):
        error = mistake(["eval", str(run), "--attack", "clean", "--out", str(where)], capsys)
        assert f"cannot write {where}: " in error
        assert words in error


def test_corrupt_checkpoints(run, capsys, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for file in ("config.yaml", "metrics.jsonl"):
        (copy / file).write_bytes((run / file).read_bytes())
    (copy / "last.pt").write_bytes((run / "last.pt").read_bytes()[:5000])
    (copy / "last.safetensors").write_bytes(b"\x00" * 100)
    assert "cannot be read" in mistake(["train", "--resume", str(copy)], capsys)
    assert "cannot be read" in mistake(["eval", str(copy)], capsys)
    config = str(run / "config.yaml")
    assert "leave --config out" in mistake(["train", "--resume", str(run), "--config", config], capsys)


def test_checkpoint_of_another_data_set(run, capsys, tmp_path):
    other = draw_classes(tmp_path / "images", 3)
    error = mistake(["eval", str(run), "--dataset", str(other)], capsys)
    assert "10 classes and 1 channel" in error
    assert "3 and 3" in error


def test_eval_of_a_run_and_of_a_file_and_resume(run, capsys):
    assert main(["eval", str(run), "--attack", "clean,pgd-2", "--limit", "20", "--weights", "best"]) == 0
    out = capsys.readouterr().out
    assert "pgd-2" in out
    saved = json.loads((run / "eval-best.json").read_text())
    assert saved["num_images"] == 20
    assert set(saved["accuracy"]) == {"clean_acc", "robust_acc_pgd2"}
    assert saved["settings"]["epsilon"] == 0.1
    assert main(["eval", str(run / "best.safetensors"), "--attack", "clean", "--limit", "20", "--out", str(run / "x.json")]) == 0  # fmt: skip
    assert json.loads((run / "x.json").read_text())["accuracy"]["clean_acc"] == saved["accuracy"]["clean_acc"]
    assert main(["train", "--resume", str(run)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_beton_end_to_end(tmp_path, monkeypatch, ffcv):
    monkeypatch.chdir(tmp_path)
    images = draw_classes(tmp_path / "images", 3)
    assert main(["data", "prepare", str(images), "--out", "b"]) == 0
    for loader in ("resident", "ffcv"):
        argv = ["train", "--dataset", "b", "--loader", loader, "--epochs", "1", "--batch-size", "4", "--out", loader]
        assert main([*argv, "--attack.num-steps", "1", "--quiet"]) == 0
    a, b = ((tmp_path / n / "last.safetensors").read_bytes() for n in ("resident", "ffcv"))
    assert a == b, "both loaders give the same pixels in the same order, so the same weights"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def loss(self):\n        return {}", "mine.py: Mine.loss takes (self): expected (self, views)"),
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


@pytest.mark.parametrize("argv", [["--version"], ["--help"], []], ids=str)
def test_what_needs_no_torch_answers_at_once(argv):
    command = [sys.executable, "-X", "importtime", "-m", "fastarat", *argv]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5, "0.1 s on an idle machine"
    assert done.stdout.startswith("fastarat 0." if argv == ["--version"] else "usage: fastarat [-h] [--version]")
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "fastarat" in imported
    assert not imported & {"torch", "numpy", "yaml", "sklearn"}


def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    for command in ("train", "doctor"):
        argv = [sys.executable, "-m", "fastarat", command]
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 130
        assert done.stderr.startswith("fastarat: interrupted; ")
        assert done.stderr.count("\n") == 1


EVERY_NAME = """
import fastarat, importlib, pickle, pkgutil, sys, types
everything = []
def names():
    [getattr(fastarat, name) for name in fastarat.__all__]
def submodules():  # walk_packages imports the packages itself
    everything.extend(m.name for m in pkgutil.walk_packages(fastarat.__path__, "fastarat."))
    [importlib.import_module(name) for name in everything if not name.endswith(("__main__", "_triton"))]
steps = [names, submodules]
for step in steps[::int(sys.argv[1])]:
    step()
    print([m for m in ("triton", "ffcv", "pyautoattack", "matplotlib", "timm") if m in sys.modules])
for name in fastarat.__all__:
    value = getattr(fastarat, name)
    assert isinstance(value, types.ModuleType) == (name in ("attacks", "losses")), (name, value)
    assert name in dir(fastarat)
    if isinstance(value, type):
        assert value.__name__ == name and pickle.loads(pickle.dumps(value)) is value
assert {"fastarat.training", "fastarat.evaluation", "fastarat.nets.models"} <= set(everything)
assert fastarat.nets.models.build_model is fastarat.build_model
from fastarat import *
assert train is fastarat.train and callable(train) and callable(evaluate) and callable(capture) and callable(branch)
"""


@pytest.mark.parametrize("order", ["1", "-1"], ids=["names-first", "submodules-first"])
def test_no_submodule_takes_a_public_name(order):
    done = subprocess.run([sys.executable, "-c", EVERY_NAME, order], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if order == "1":
        assert done.stdout.splitlines()[0] == "[]", "the public names load no optional package"


def test_type_checkers_see_the_public_names():
    tree = ast.parse(Path(fastarat.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert sorted(alias.asname for node in imports for alias in node.names) == fastarat.__all__
    assert all(
        hasattr(importlib.import_module(node.module or ""), alias.name) for node in imports for alias in node.names
    )
    assert not hasattr(fastarat, "SGD")
    assert not hasattr(fastarat, "trian")
    with pytest.raises(ImportError, match="trian"):
        exec("from fastarat import trian")


@pytest.mark.parametrize("module", ["fastarat", "fastarat.cli"])
def test_exit_codes_of_the_installed_command(module):
    command = [sys.executable, "-m", module]
    assert subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0
    done = subprocess.run([*command, "train", "--attack.epsilon", "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("defense", "rate", "words"),
    [("ar-at", "1e30", "NaN or infinite at epoch"), *((name, "1000", "") for name in ("ar-at", "at", "standard"))],
)
def test_divergence_exits_1_with_the_message_of_the_training(defense, rate, words, tmp_path, capsys):
    """At 1000 the losses, of batch statistics, stay finite for a while, and the running statistics do not."""
    argv = ["train", "--defense", defense, "--limit-train", "320", "--batch-size", "32", "--epochs", "3", "--optim.lr", rate,
            "--attack.epsilon", "0.1", "--attack.num-steps", "2", "--no-tensorboard", "--quiet"]  # fmt: skip
    assert main([*argv, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastarat: training stopped: ")
    assert error.count("\n") == 1
    assert words in error
    assert "check the checkpoint" not in error
