"""The project itself: import direction, packaging, style, and the README's commands."""

import ast
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from archives import place_cifar

import fastarat
from fastarat.cli import main

ROOT = Path(__file__).parent.parent
# A module or package may import from layers above its own here, and from its own package, but not from its own layer
# or those below.
LAYERS = [
    {"errors", "kernels"},
    {"device"},
    {"checks", "files"},
    {"specs", "schedules", "doctor"},
    {"nets", "data"},
    {"attacks", "losses"},
    {"defenses"},
    {"config", "engine"},
    {"evaluation"},
    {"runs", "averages", "released"},
    {"card", "finite"},
    {"training"},
    {"report", "interchange", "tuning", "bench"},
    {"table"},
    {"compare"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def room(path: Path) -> str:
    """The module of fastarat/ that a file is, or the package it lies in."""
    return path.relative_to(ROOT / "fastarat").parts[0].removesuffix(".py")


def test_imports_point_one_way():
    for path in (ROOT / "fastarat").rglob("*.py"):
        own = room(path)
        if own in ("__init__", "__main__"):
            continue
        assert own in RANK, f"{path} is in no layer"
        for name in imported(path):
            assert name.split(".")[0] not in ("benchmarks", "tests", "kernels"), f"{path} imports {name}"
            parts = name.split(".")
            if parts[0] == "fastarat" and len(parts) > 1 and parts[1] in RANK and parts[1] != own:
                assert RANK[parts[1]] < RANK[own], f"{path} imports fastarat.{parts[1]}, which lies above it"
    for path in (ROOT / "kernels").glob("*.py"):
        assert not any(name.startswith("fastarat") for name in imported(path)), path.name


def test_importing_fastarat_loads_no_optional_package():
    code = "import sys, fastarat; print([m for m in ('triton', 'ffcv', 'pyautoattack', 'matplotlib', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_folder_of_code_is_packaged():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"fastarat", "fastarat.kernels"}
    folders |= {f"fastarat.{p.parent.name}" for p in (ROOT / "fastarat").glob("*/__init__.py")}
    assert set(config["packages"]) == folders


def test_wheel_and_sdist_work_outside_the_tree(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastarat/kernels/split_bn_triton.py" in names
    assert "fastarat/defenses/ar_at.py" in names
    assert not any(n.startswith(("tests", "benchmarks", "kernels")) for n in names)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        assert any(n.endswith("/kernels/split_bn.py") for n in tar.getnames())
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import fastarat, fastarat.kernels, sys; assert fastarat.__file__.startswith(sys.argv[1]), fastarat.__file__; "
        "assert fastarat.kernels.__file__.startswith(sys.argv[1]); from fastarat.cli import main; "
        "sys.exit(main(['train', '--epochs', '1', '--limit-train', '32', '--batch-size', '16', '--attack.num-steps', '1', "
        "'--quiet', '--out', 'run', '--no-tensorboard']))"
    )
    env = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    # -S would hide the dependencies; the path entry comes before the editable install instead.
    done = subprocess.run([sys.executable, "-c", code, str(site)], capture_output=True, text=True, cwd=tmp_path, env=env, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["check", "."], ["format", "--check", "."]])
def test_style(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


SHORT = ["--epochs", "1", "--limit-train", "16", "--batch-size", "8", "--attack.num-steps", "1", "--eval.num-steps", "1",
         "--eval.val-images", "10"]  # fmt: skip


def test_every_readme_command_runs(tmp_path, monkeypatch, ffcv):
    """As written, in order, in one folder; only made short, and CIFAR-10 is a tiny archive of the same format."""
    monkeypatch.chdir(tmp_path)
    place_cifar(tmp_path / "data", monkeypatch)
    commands = readme_commands()
    ran = 0
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        elif words[:3] == ["python", "-m", "benchmarks"]:
            done = subprocess.run(
                [sys.executable, *words[1:], "--dry"], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        elif words[0] == "fastarat":
            extra = []
            if words[1] == "train" and "--resume" not in words:
                extra = SHORT
            elif words[1] == "compare":
                extra = [*SHORT, "--limit", "6"]
            elif words[1] == "eval":
                extra = ["--limit", "6"]
            elif words[1] == "bench":
                extra = ["--repeats", "1", "--attack.num-steps", "1"]
            assert main([*words[1:], *extra]) == 0, command
        elif words[:2] == ["git", "clone"] or words[0] == "cd":
            continue
        elif words[0] == "tensorboard":
            assert Path(words[words.index("--logdir") + 1]).exists()
        else:
            pytest.fail(f"README has a command that no test knows how to run: {command}")
        ran += 1
    assert ran >= 8


@pytest.mark.parametrize("block", ["demo", "compare", "benchmarks"])
def test_readme_shows_what_was_printed(block):
    text = (ROOT / "README.md").read_text()
    (shown,) = re.findall(f"<!-- {block} -->(.*?)<!-- /{block} -->", text, re.DOTALL)
    assert len(shown.strip().splitlines()) > 4, (
        f"the {block} block is empty: see tools/readme.py and python -m benchmarks readme"
    )


def test_readme_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__readme__"})


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example, tmp_path):
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_example_defense_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    defense = f"{ROOT / 'examples' / 'own_defense.py'}:Smooth"
    assert main(["train", "--defense", defense, "--defense.beta", "3", *SHORT, "--quiet", "--out", "run"]) == 0
    assert "beta: 3.0" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(["eval", "run", "--attack", "clean", "--limit", "5"]) == 0


def test_public_names_exist():
    for name in fastarat.__all__:
        assert getattr(fastarat, name) is not None
