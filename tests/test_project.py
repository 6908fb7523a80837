"""The project itself: import direction, packaging, style, one version, and what to cite."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import fastarat

ROOT = Path(__file__).parent.parent
# A module or package may import from layers above its own here, and from its own package, but not from its own layer
# or those below.
LAYERS = [
    {"errors", "kernels", "child", "texts", "bars"},
    {"device", "files", "locks", "children", "interrupts"},
    {"values", "distributed"},
    {"checks", "specs", "schedules", "doctor", "metadata"},
    {"nets", "data", "losses"},
    {"ascent"},
    {"attacks"},
    {"defenses"},
    {"config", "engine", "flags"},
    {"evaluation"},
    {"stopping"},
    {"runs", "averages", "released", "diagnostics"},
    {"card", "finite", "building", "resuming", "logs", "given"},
    {"checkpoints", "results", "together"},
    {"callbacks"},
    {"loggers"},
    {"training"},
    {"report", "interchange", "tuning", "bench", "evaluating"},
    {"table", "plans"},
    {"live", "sweep"},
    {"compare"},
    {"ablation"},
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
    code = "import sys, fastarat; print([m for m in ('triton', 'ffcv', 'pyautoattack', 'matplotlib', 'timm', 'wandb', 'mlflow') if m in sys.modules])"
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
    assert "fastarat/py.typed" in names
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


def test_types_are_clean():
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_public_names_exist():
    for name in fastarat.__all__:
        assert getattr(fastarat, name) is not None


def test_the_version_has_one_home():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert fastarat.__version__ == declared
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == declared
    assert f"## {declared}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_every_method_is_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "references"} <= set(citation)
    ids = set()
    for work in citation["references"]:
        assert {"type", "title", "authors", "year"} <= set(work), work
        assert all({"family-names", "given-names"} <= set(author) for author in work["authors"]), work["title"]
        assert isinstance(work["year"], int)
        assert ("conference" in work) or ("journal" in work) or ("identifiers" in work), work["title"]
        ids |= {i["value"].removeprefix("arXiv:") for i in work.get("identifiers", ())}
    named = {i for p in (ROOT / "fastarat").rglob("*.py") for i in re.findall(r"arXiv (\d{4}\.\d{5})", p.read_text())}
    assert named <= ids, f"CITATION.cff lacks {named - ids}"


def test_the_pins_agree():
    (rev,) = re.findall(r"rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert f"ruff=={rev}\n" in (ROOT / "constraints.txt").read_text()
