"""What a stranger wrote (run folders, configs, metadata, names) runs no code, is refused in one line, and prints safely."""

import sys
from pathlib import Path

import pytest
import small
import yaml

import fastarat
from fastarat.cli import main
from fastarat.config import Config, from_dict, to_dict
from fastarat.defenses.naming import Foreign
from fastarat.errors import UserError
from fastarat.runs import Run

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
