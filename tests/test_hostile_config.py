"""What a stranger wrote (run folders, configs, metadata, names) runs no code, is refused in one line, and prints safely."""

import csv
import io
import os
import re
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import small
import torch
import yaml

import fastarat
from fastarat import cli, texts
from fastarat.cli import main
from fastarat.config import Config, from_dict, read_yaml, to_dict
from fastarat.defenses.naming import Foreign
from fastarat.errors import UserError
from fastarat.files import load_weights
from fastarat.runs import Run
from fastarat.table import Comparison

MINE = """
from dataclasses import dataclass
from pathlib import Path
import torch.nn.functional as F
from fastarat import Defense

with open(Path(__file__).with_suffix(".ran"), "a") as file:
    file.write("ran ")


@dataclass(frozen=True, kw_only=True)
class Mine(Defense):
    attacks = False
    scale: float = 1.0

    def loss(self, views):
        return {"ce": self.scale * F.cross_entropy(views.logits_clean, views.labels)}
"""


def mistake(argv, capsys) -> str:
    """Run a command that must refuse: exit code 2, and one line on stderr."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2, argv
    said = capsys.readouterr().err
    assert said.startswith("fastarat: "), said
    assert said.count("\n") == 1, said
    assert len(said) < 1500, said
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of a defense in a file of its own."""
    root = tmp_path_factory.mktemp("stranger")
    (root / "mine.py").write_text(MINE)
    small.trained(root / "run", defense={"name": f"{root}/mine.py:Mine", "scale": 0.5}, epochs=1)
    return root


def ran(root: Path) -> bool:
    """Whether the file's code was run since last asked; it is forgotten as a module too."""
    mark = root / "mine.ran"
    found = mark.exists()
    mark.unlink(missing_ok=True)
    for name in [n for n in sys.modules if n.startswith("_fastarat_defense_")]:
        del sys.modules[name]
    return found


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "{run}", "--attack", "clean", "--limit", "10", "--out", "{root}/found.json"],
        ["report", "{run}", "--out", "{root}/report", "--images", "2"],
        ["export", "{run}", "--out", "{root}/out.safetensors"],
    ],
)
def test_a_run_folder_runs_no_code(folder, command):
    ran(folder)
    assert main([part.format(run=folder / "run", root=folder) for part in command]) == 0
    assert not ran(folder)


def test_a_run_of_code_is_resumed_only_when_the_code_is_named(folder, capsys, tmp_path):
    ran(folder)
    run, name = folder / "run", f"{folder}/mine.py:Mine"
    said = mistake(["train", "--resume", run], capsys)
    assert f"--resume {run} --defense {name}" in said
    assert not ran(folder)
    (tmp_path / "other.py").write_text(MINE)
    assert "was trained with" in mistake(["train", "--resume", run, "--defense", f"{tmp_path}/other.py:Mine"], capsys)
    assert "defense cannot change" in mistake(
        ["train", "--resume", run, "--defense", name, "--defense.scale", "2"], capsys
    )
    assert main(["train", "--resume", str(run), "--defense", name, "--quiet"]) == 0
    assert ran(folder)
    with pytest.raises(UserError, match="never run unasked"):
        fastarat.train(resume=run, progress=False)
    result = fastarat.train(resume=run, defense=from_dict({"defense": name}).defense.__class__, progress=False)
    assert result.config.defense.scale == 0.5
    with pytest.raises(UserError, match="give the same class"):
        fastarat.train(resume=run, defense=fastarat.ARAT, progress=False)


def test_a_config_file_runs_code_only_beside_its_name_on_the_command_line(folder, capsys, tmp_path, monkeypatch):
    ran(folder)
    monkeypatch.chdir(folder)
    asked = tmp_path / "c.yaml"
    asked.write_text((folder / "run" / "config.yaml").read_text())
    said = mistake(["train", "--config", asked, "--out", tmp_path / "new"], capsys)
    assert "is code, which runs only where the command line names it" in said
    assert not ran(folder)
    compared = ["compare", "--defenses", "standard", "--config", asked, "--out", tmp_path / "c", "--limit", "zero"]
    mistake(compared, capsys)
    assert not ran(folder)
    line = ["train", "--config", str(asked), "--defense", "mine.py:Mine", "--out", str(tmp_path / "new"), "--quiet"]
    assert main(line) == 0
    saved = Run(tmp_path / "new").read_config()
    assert isinstance(saved.defense, Foreign)
    assert saved.defense.settings == {"scale": 0.5}


def test_a_foreign_defense_keeps_its_words(folder):
    saved = Run(folder / "run").read_config()
    assert to_dict(saved) == yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert saved == from_dict(to_dict(saved), code=False)
    assert (
        Run(folder / "run").difference(Config(**{**vars(saved), "defense": from_dict(to_dict(saved)).defense})) is None
    )


ALIASES = "a: &a [x, x, x]\n" + "".join(f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in pairwise("abcdefghi"))
DAMAGED_YAML = {
    "endless": b"epochs: .inf",
    "huge": b"epochs: 1" + b"0" * 400,
    "digits": b"epochs: 1" + b"0" * 5000,
    "exponent": b"optim: {lr: 1e999}",
    "by zero": b"attack: {epsilon: 8/0}",
    "nan": b"attack: {epsilon: .nan}",
    "seconds": b"attack: {epsilon: 2020-99-99}",
    "date": b"epochs: 2020-01-01",
    "deep list": b"epochs: " + b"[" * 10_000 + b"]" * 10_000,
    "deep mapping": b"epochs: " + b"{a: " * 10_000 + b"1" + b"}" * 10_000,
    "alias bomb": ALIASES.encode(),
    "self": b"epochs: &a [*a]",
    "twice": b"epochs: 1\nepochs: 2",
    "no text": b"1: 2",
    "list key": b"? [a]\n: 2",
    "tag": b"epochs: !!python/object/apply:os.system [true]",
    "bad tag": b"epochs: !!int abc",
    "bad bool": b"swa: !!bool abc",
    "bad float": b"ema: !!float abc",
    "merge": b"<<: 3",
    "nul": b"epochs: \0",
    "latin": b"out: \xe9",
    "utf-16": "epochs: 1".encode("utf-16"),
    "list": b"- 1\n- 2",
    "text": b"epochs",
    "large": b"#" * 1_000_001,
    "list of attacks": b"attack: [1]",
    "defense": b"defense: [1]",
    "nested defense": b"defense: {name: {name: at}}",
    "image size": b"image_size: 60000",
    "threads": b"threads: 1000000",
    "batch": b"batch_size: 1000000000000",
    "model": b"model: wrn-99994-1",
    "long model": b"model: wrn-" + b"9" * 5000 + b"-1",
    "hub": b"model: timm:hf-hub:somebody/code",
    "local": b"model: timm:local-dir:/tmp",
}


@pytest.mark.parametrize("name", DAMAGED_YAML)
def test_a_damaged_config_is_one_line(name, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_bytes(DAMAGED_YAML[name])
    start = time.monotonic()
    compared = ["compare", "--defenses", "standard", "--out", tmp_path / "compared", "--test-attack", "clean"]
    for command in (["train"], compared):
        mistake([*command, "--config", file, "--epochs=1", "--limit-train=32"] if name in NETWORKS else
                [*command, "--config", file], capsys)  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes(DAMAGED_YAML[name])
    mistake(["train", "--resume", run], capsys) if name not in NETWORKS else None
    assert time.monotonic() - start < 5


NETWORKS = ("model", "long model", "hub", "local")


@pytest.mark.parametrize("fill", ["1,", "{a: ", "[", "&a x,", '"\\u00e9",'])
def test_a_config_as_long_as_may_be_is_read_in_seconds(fill, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: [" + (fill * 70_000)[:65_000] + "]")
    started = time.process_time()
    with pytest.raises(UserError):
        from_dict(read_yaml(path))
    assert time.process_time() - started < 5, "under 1 s on an idle machine"
    path.write_text("a" * 70_000)
    with pytest.raises(UserError, match="is over 65,536 bytes"):
        read_yaml(path)


def test_a_comparisons_folder_is_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("out: [1]")
    said = mistake(["compare", "--defenses", "standard", "--test-attack", "clean", "--config", "c.yaml"], capsys)
    assert "c.yaml: out=[1]: expected text" in said


def test_a_config_that_is_no_file_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", "/dev/zero", "a\0b"):
        assert "cannot read config" in mistake(["train", "--config", path], capsys)


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "1e999"],
        ["--epochs", "9" * 5000],
        ["--attack.epsilon", "8/0"],
        ["--attack.epsilon", "1/" + "9" * 400],
        ["--image-size", "60000"],
        ["--batch-size", "1000000000000"],
        ["--threads", "1000000"],
        ["--optim.lr", "inf"],
        ["--seed", "9" * 400],
        ["--dataset", "a\0b"],
        ["--model", "wrn-99994-1"],
        ["--model", "wrn-400000-40000"],
        ["--model", "timm:hf_hub:x/y"],
    ],
)
def test_a_hostile_flag_is_one_line(flags, capsys, tmp_path):
    mistake(["train", "--out", tmp_path / "run", *flags], capsys)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return small.trained(tmp_path_factory.mktemp("plain") / "run", defense="standard", epochs=1)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "wrn-99994-1"},
        {"model": "wrn-400-32"},
        {"model": "timm:hf-hub:somebody/code"},
        {"model": ["resnet18"]},
        {"model": None},
        {"num_classes": 10**9},
        {"num_classes": 10**6},
        {"num_classes": "10"},
        {"num_classes": 1e999},
        {"in_channels": 10**6},
        {"in_channels": -1},
        {"image_size": 60_000},
        {"image_size": True},
        {"normalized": "yes"},
        {"branches": ["../x", "adv"]},
        {"branches": "adv"},
        {"branches": ["adv"] * 1000},
        {"epsilon": float("nan")},
        {"epsilon": "much"},
        {"norm": "l7"},
        {"classes": 7},
        {"defense": {}},
        {"epoch": "last"},
        {"best": 3},
    ],
    ids=str,
)
def test_hostile_metadata_builds_no_network(plain, changed, tmp_path, capsys):
    weights, meta = load_weights(plain / "last.safetensors")
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.save_weights("last", weights, {**meta, **changed})
    (run.config_file).write_text((plain / "config.yaml").read_text())
    (run.metrics_file).write_text((plain / "metrics.jsonl").read_text())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    mistake(["eval", run.path, "--attack", "clean", "--limit", "2"], capsys)
    mistake(["report", run.path], capsys)
    mistake(["export", run.path], capsys)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def itself():
    content = {"model": {}, "w": torch.zeros(1)}
    content["model"] = content
    return content


EXOTIC = {
    "complex": lambda: {"conv1.weight": torch.zeros(4, 3, 3, 3, dtype=torch.complex64), "layer1.0.conv1.weight": ONE},
    "meta": lambda: {"conv1.weight": torch.zeros(4, 3, 3, 3, device="meta")},
    "sparse": lambda: {"conv1.weight": torch.zeros(4, 3, 3, 3).to_sparse()},
    "repeats": lambda: {"conv1.weight": torch.zeros(1).as_strided((10**6, 10**6, 1, 1), (0, 0, 0, 0))},
    "repeated mean": lambda: {"mean": torch.zeros(1).expand(10**12), "a.std": torch.zeros(1)},
    "no dimensions": lambda: {"conv1.weight": torch.zeros(()), "layer1.0.conv1.weight": torch.zeros(())},
    "one dimension": lambda: {"block1.layer.0.conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(())},
    "empty": lambda: {"block1.layer.0.conv1.weight": torch.zeros(0, 0, 3, 3), "fc.weight": torch.zeros(0)},
    "itself": itself,
    "numbers": lambda: {1: torch.zeros(1), 2.5: torch.zeros(1), "x.y": 3},
    "a list": lambda: [torch.zeros(1)],
    "tensor": lambda: torch.zeros(3),
    "none": lambda: {"state_dict": {"a.b": None}},
    "deep wide": lambda: {f"block{i}.layer.{n}.conv1.weight": torch.zeros(16 * 2 ** (i - 1), 1, 1, 1)
                          for i in (1, 2, 3) for n in range(90)},
}  # fmt: skip
ONE = torch.zeros(1, 1, 1, 1)


@pytest.mark.parametrize("name", EXOTIC)
def test_an_exotic_checkpoint_is_one_line(name, tmp_path, capsys):
    torch.save(EXOTIC[name](), tmp_path / "x.pt")
    mistake(["import", tmp_path / "x.pt", "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


HOSTILE = "=x|y`$\\input{/etc/passwd}&#%_~^\n\x1b[31m\u202eevil<script>*[l](u)"


def comparison(tmp_path) -> Comparison:
    spread = {"mean": 0.5, "std": 0.1, "values": [0.4, 0.6]}
    row = {"defense": HOSTILE, "seeds": [0, 1], "clean_acc": spread, "epoch_s": 1.0, "published": None,
           "settings": {"defense.x": HOSTILE}, "schedule": "s", "tried": 0, "collapsed": [], "diverged": [],
           "warnings": []}  # fmt: skip
    settings = {"dataset": HOSTILE, "model": "m", "epochs": "1", "seeds": [0, 1], "epsilon": 0.1, "norm": "linf",
                "precision": "", "keys": ["clean_acc"], "num_images": 5, "device": "d", "rule": "",
                "warnings": [HOSTILE]}  # fmt: skip
    return Comparison([row], settings, tmp_path)


def test_tables_print_names_and_run_none_of_them(tmp_path):
    table = comparison(tmp_path)
    for text in (table.markdown(), table.latex(), table.csv()):
        assert "\x1b" not in text
        assert "\u202e" not in text
    tex = table.latex()
    body = [line for line in tex.splitlines() if not line.startswith("%")]
    assert "\\input" not in "\n".join(body)
    assert re.search(r"\\textbackslash\{\}input\\\{/etc/passwd\\\}\\&\\#\\%\\_", "\n".join(body))
    assert all(line.startswith(("\\begin", "\\top", "defense", "\\mid", "=x", "\\bottom", "\\end")) for line in body)
    assert "50.00 $\\pm$ 10.00" in tex
    lines = table.markdown().split("\n\n")[0].splitlines()
    assert len(lines) == 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    assert "<script>" not in table.markdown()
    assert not re.search(r"(?<!\\)`", table.markdown())
    (row,) = csv.DictReader(io.StringIO(table.csv()))
    assert row["defense"].startswith("'=x")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x"])
def test_a_spreadsheet_takes_no_name_for_a_formula(text):
    assert texts.cell(text) == "'" + text
    assert texts.cell(-1.5) == -1.5


def test_an_ascii_terminal_prints_all_and_is_left_as_it_was(monkeypatch, tmp_path):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(cli, "_doctor", lambda parser, argv: print("± \udcff ∞") or 0)
    assert main(["doctor"]) == 0
    assert main(["train", "--config", "\udcff\x1b[31mñ"]) == 2
    for stream in (out, err):
        stream.flush()
        assert stream.errors == "strict"
    assert out.buffer.getvalue() == b"\\xb1 \\udcff \\u221e\n"
    said = err.buffer.getvalue()
    assert b"\\udcff\\x1b[31m\\xf1" in said
    assert b"\x1b" not in said
