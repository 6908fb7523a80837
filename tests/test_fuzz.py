"""Every reader of files refuses what is damaged or hostile in one line: what was found once, and a slice of new inputs."""

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
def test_a_reader_accepts_or_refuses(name, tool, tmp_path):
    """The corpus, then changed inputs of it: always the same ones, as many as a quick machine tries in the time."""
    if name == "beton":
        pytest.importorskip("ffcv")
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


def test_corpus_is_small():
    files = [p for p in CORPUS.rglob("*") if p.is_file()]
    assert {p.parent.name for p in files} == {*READERS}
    assert sum(p.stat().st_size for p in files) < 200_000
