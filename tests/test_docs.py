"""README.md, CONTRIBUTING.md and docs/: every command and snippet runs, every flag exists, no number is typed."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from archives import place_cifar

import fastarat
from benchmarks import loaders, structure
from benchmarks.__main__ import main as benchmarks
from fastarat.cli import main

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
# A block that cannot run in a test says why in a comment before it; its commands are then only parsed.
BLOCK = re.compile(
    r'(?P<mark><!-- only parsed: [^\n]+ -->\n)?^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)
FLAG = re.compile(r"(?<![\w-])(?<!var\()--[a-z][\w.-]*\w")
COMMANDS = ("train", "eval", "compare", "ablate", "report", "import", "export", "data", "bench", "doctor")
SHORT = ["--epochs", "1", "--limit-train", "16", "--batch-size", "8", "--attack.num-steps", "1", "--eval.num-steps", "1",
         "--eval.val-images", "10"]  # fmt: skip
# What makes a command short, whatever the page says; flags that come later win.
EXTRA = {
    "train": SHORT,
    "compare": [*SHORT, "--limit", "6"],
    "ablate": [*SHORT, "--limit", "6", "--seeds", "0", "--test-attack", "clean,pgd-2"],
    "eval": ["--limit", "6"],
    "bench": ["--repeats", "1", "--steps", "1", "--attack.num-steps", "1"],
}


class Block(NamedTuple):
    """A fenced block. line: of its first line of text, from 1. title: the file it is shown as, or None."""

    line: int
    language: str
    title: str | None
    text: str
    only_parsed: bool

    def commands(self) -> list[list[str]]:
        """The words of each command, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(text[: m.start("text")].count("\n") + 1, m["language"], m["title"], m["text"], bool(m["mark"]))
        for m in BLOCK.finditer(text)
    ]


def parse(words: list[str], capsys) -> None:
    """Fail unless the command line of fastarat exists: its flags, and the values of those that have choices."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known, words


def in_the_repository(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr[-2000:]}"


def run(words: list[str], only_parsed: bool, folder: Path, capsys) -> None:
    """Run a command of a page in `folder`, the current one, made short; what is only parsed must exist."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["fastarat", *rest] if only_parsed:
            parse(rest, capsys)
        case ["fastarat", *rest]:
            extra = EXTRA.get(rest[0], [])
            if "--resume" in rest:
                extra = ["--epochs", "2"] if "--epochs" in rest else []
            if rest[0] == "compare" and "--tune" not in rest:  # one table with AutoAttack, the longest part, is enough
                extra = [*extra, "--test-attack", "clean,pgd-20"]
            assert main([*rest, *extra]) == 0, capsys.readouterr().err[-2000:]
        case ["make", *rest]:
            in_the_repository("make", "-n", *rest)
        case ["python", "-m", "benchmarks", *rest]:
            in_the_repository(sys.executable, "-m", "benchmarks", *rest, "--dry", "--out", str(folder / "benchmarks"))
        case ["python", "-m", "pytest", *rest] if only_parsed:
            files = [word for word in rest if word.startswith("tests")]
            assert all((ROOT / file).exists() for file in files), words
            if "-k" in rest:
                assert rest[rest.index("-k") + 1] in "".join((ROOT / file).read_text() for file in files), words
        case ["python", file, *rest]:
            in_the_repository(sys.executable, file, *rest)
        case ["bash", file, *_] if only_parsed:
            in_the_repository("bash", "-n", file)
        case ["pip", "install", "-e", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.fullmatch(r"\.\[(.+)\]", what)[1].split(",")) <= set(extras)
        case ["tensorboard", "--logdir", where]:
            assert list(Path(where).rglob("events.out.tfevents.*"))
        case ["pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").exists()
        case _:
            pytest.fail(f"no test knows how to run this command: {shlex.join(words)}")


def test_what_survives_what_names_tests_that_exist():
    """Each line of the page has its test, and the README's files are those."""
    page = (DOCS / "reliability.md").read_text()
    rows = [line for line in page.partition("## ")[0].splitlines() if line.startswith("| ")][2:]
    named = [re.search(r"`(test_\w+\.py)::(test_\w+)` \|$", row) for row in rows]
    assert len(rows) > 25
    assert all(named)
    for match in named:
        assert f"\ndef {match[2]}(" in (ROOT / "tests" / match[1]).read_text(), match[0]
    files = set(re.findall(r"`tests/(test_\w+\.py)`", README.read_text().partition("## What survives what")[2]))
    assert files >= {match[1] for match in named} - {"test_train.py"}
    for file in files:
        assert (ROOT / "tests" / file).exists()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda p: p.name)
def test_every_command_and_snippet_runs(page, tmp_path, monkeypatch, request, capsys):
    """As written, in order, in one folder; only made short, and CIFAR-10 is a tiny archive of the same format."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    place_cifar(tmp_path / "data", monkeypatch)
    if "fastarat data prepare" in text or "--loader ffcv" in text:
        request.getfixturevalue("ffcv")
    names = {"__name__": "__docs__"}
    for block in blocks_of(page):
        if block.language == "bash":
            for words in block.commands():
                run(words, block.only_parsed, tmp_path, capsys)
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            if block.title:
                Path(block.title).write_text(block.text)
            if not block.only_parsed:
                exec(code, names)
    if page.name == "run-card.md":
        shown, printed = (
            {line.split("  ")[0].rstrip(" 0123456789") for line in card.splitlines()}
            for card in (between(page, "card").strip("`\n").removeprefix("text\n"), Path("runs/mine/card.txt").read_text())
        )  # fmt: skip
        assert shown == printed, "the card has other rows now: see tools/readme.py"


def test_blocks_are_of_known_kinds_and_all_found():
    for page in PAGES:
        blocks = blocks_of(page)
        assert {block.language for block in blocks} <= {"bash", "python", "text"}, page.name
        assert 2 * len(blocks) == len(re.findall(r"^\s*```", page.read_text(), re.MULTILINE)), page.name
        marks = re.findall("^<!-- only parsed:", page.read_text(), re.MULTILINE)
        assert len(marks) == sum(block.only_parsed for block in blocks), page.name


def strings(file: Path):
    """The string literals of a source file, adjacent ones as one; what is filled in at run time as a space."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else " " for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_flag_named_in_prose_or_by_the_program_exists(capsys, monkeypatch):
    def flags_of(call, *commands: list[str]) -> set[str]:
        for words in commands:
            with pytest.raises(SystemExit):
                call([*words, "--help"])
        return set(FLAG.findall(capsys.readouterr().out))

    monkeypatch.setenv("COLUMNS", "1000")
    defenses = [["train", "--defense", name] for name in fastarat.DEFENSES]
    known = flags_of(main, *defenses, *([command] for command in COMMANDS)) | {"--help", "--version"}
    launcher = {"--nproc-per-node", "--max-restarts"}  # of torchrun
    others = launcher | {"--format=csv", "--query-gpu", "--porcelain", "--no-build-isolation", "--force-reinstall"}
    for file in Path(fastarat.__file__).parent.rglob("*.py"):
        for text in strings(file):
            flags = set() if ":root" in text else set(FLAG.findall(text))
            assert flags <= known | others, f"{file.name} names {sorted(flags - known)}: {text[:100]}"
    known |= launcher | flags_of(benchmarks, []) | flags_of(structure.main, []) | flags_of(loaders.main, [])
    for page in PAGES:
        flags = set(FLAG.findall(" ".join(re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text())))))
        # compare's --tune names settings without dashes; --defense.beta may belong to a defense of one's own.
        assert flags <= known, f"{page.name}: {sorted(flags - known)}"


def between(page: Path, block: str) -> str:
    (shown,) = re.findall(f"<!-- {block} -->(.*?)<!-- /{block} -->", page.read_text(), re.DOTALL)
    return shown.strip()


@pytest.mark.parametrize(
    ("page", "block"),
    [
        ("README.md", "digits"),
        ("docs/results.md", "demo"),
        ("docs/results.md", "compare"),
        ("docs/measuring.md", "benchmarks"),
        ("docs/run-card.md", "card"),
    ],
)
def test_pages_show_what_was_printed(page, block):
    lines = between(ROOT / page, block).splitlines()
    assert len(lines) > 4, f"the {block} block is empty: see tools/readme.py and python -m benchmarks readme"


def test_the_readmes_numbers_are_those_of_the_results(monkeypatch):
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools" / "readme.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    shown = between(README, "digits")
    assert shown == tool.digits()
    full = between(DOCS / "results.md", "compare").splitlines()
    for row in shown.splitlines()[2:]:
        assert any(line.startswith(row) for line in full), row
    (speed,) = re.findall(r"\*\*Speed, on a CPU\.\*\*(.*?)\n\n", README.read_text(), re.DOTALL)
    steps = [
        line for line in between(DOCS / "measuring.md", "benchmarks").splitlines() if line.startswith("| arat-step")
    ]
    numbers = re.findall(r"\d,\d{3}(?= ms)|\d\.\d\d(?= times)", speed)
    assert len(numbers) == 5
    for number in numbers:
        assert any(f"| {number} (" in line for line in steps), f"{number} is not what was measured"


def test_the_readme_can_be_read_in_five_minutes():
    assert len(README.read_text().split()) <= 1200


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings}, link


def test_the_docs_build_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    built = (tmp_path / "site" / "api" / "index.html").read_text()
    missing = [name for name in fastarat.__all__ if f'id="fastarat.{name}' not in built]
    assert not missing, f"docs/api.md leaves out {missing}"
    assert 'id="fastarat.Config.batch_size"' in built, "fields of dataclasses are not shown: tools/griffe_fields.py"
    pages = "".join(p.read_text() for p in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', pages), (
        "something is fetched from elsewhere"
    )


def test_results_are_kept_seed_by_seed():
    for file in (DOCS / "results").glob("digits-*.json"):
        rows = json.loads(file.read_text()).get("rows", {})
        for row in rows if isinstance(rows, list) else ():
            assert len(row["clean_acc"]["values"]) == len(row["seeds"])


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
