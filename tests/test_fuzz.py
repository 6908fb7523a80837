"""Every reader of files refuses what is damaged or hostile in one line: what was found once, and a slice of new inputs."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastarat.errors import UserError

TOOLS = Path(__file__).parent.parent / "tools"
CORPUS = Path(__file__).parent / "corpus"
READERS = ("config", "checkpoint", "safetensors", "archive", "beton", "metrics")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import fuzz

    return fuzz


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
@pytest.mark.parametrize("name", READERS)
def test_a_reader_accepts_or_refuses(name, tool, tmp_path, request):
    """The corpus, then changed inputs of it: always the same ones, as many as a quick machine tries in the time."""
    if name == "beton":
        request.getfixturevalue("ffcv")
    found = tool.fuzz(name, tmp_path, CORPUS, 8.0, seed=1, count=400)
    told = "\n".join(p.read_text() for p in tmp_path.glob("findings/*.txt"))
    assert found["findings"] == [], told
    assert found["inputs"] > 10


def test_what_no_reader_may_do_is_a_finding(tool, tmp_path, monkeypatch):
    """A fuzzer that finds nothing in a reader that fails would prove nothing."""
    (tmp_path / "private").mkdir()
    watched = tool.Watched("config", tmp_path, tmp_path / "private")
    failures = [ValueError("a bug"), UserError("x" * 3000), AssertionError("written outside")]
    for error in failures:

        def read(data: bytes, error=error) -> None:
            raise error

        monkeypatch.setattr(watched.reader, "read", read)
        watched.one(b"x")
    assert {what.split()[0] for what in watched.findings} == {"ValueError", "long", "AssertionError"}


PLANTED = """
import os, pickle, subprocess, sys
from pathlib import Path
sys.path.insert(0, {tools!r})
import fuzz
private, outside = Path({private!r}), {outside!r}
guard = fuzz.Guard(private)
os.chdir(private)

def swallowed():
    try:
        open(outside, "w")
    except BaseException:
        pass

def within():
    Path("a").write_text("in")
    os.mkdir("b")
    os.rename("a", "b/a")
    os.symlink(outside, "link")
    open("/etc/hostname").close()

def through():
    Path("link").write_text("out")

for act in (within, through, lambda: open(outside, "w"), swallowed, lambda: os.symlink("x", outside), lambda: os.mkdir("../x"),
            lambda: os.rename("b/a", outside), lambda: subprocess.run(["true"]), lambda: pickle.loads(pickle.dumps(Path))):
    guard.armed, guard.heard = True, ""
    try:
        act()
    except AssertionError:
        pass
    guard.armed = False
    print(guard.heard.split(" ")[0] or "nothing")
assert not os.path.exists(outside)
"""


def test_what_no_file_may_cause_is_heard(tmp_path):
    (tmp_path / "private").mkdir()
    code = PLANTED.format(tools=str(TOOLS), private=str(tmp_path / "private"), outside=str(tmp_path / "outside"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "nothing", "open", "open", "open", "os.symlink", "os.mkdir", "os.rename", "subprocess.Popen", "pickle.find_class"
    ]  # fmt: skip


def test_corpus_is_small():
    files = [p for p in CORPUS.rglob("*") if p.is_file()]
    assert {p.parent.name for p in files} == {*READERS}
    assert sum(p.stat().st_size for p in files) < 200_000
