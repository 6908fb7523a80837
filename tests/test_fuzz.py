"""A slice of `make fuzz`: the corpus, and some seconds of mutations of each kind of file, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import fuzz

ROOT = Path(__file__).parent.parent
CORPUS = Path(__file__).parent / "corpus"
# Seconds of a reader, most of them its set-up: PyTorch, a tiny training, FFCV's compilation.
SECONDS = {"config": 9, "checkpoint": 14, "safetensors": 13, "archive": 10, "beton": 26, "metrics": 15}


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
@pytest.mark.parametrize("name", fuzz.NAMES)
def test_some_seconds_of_make_fuzz(name, tmp_path, request):
    if name == "beton":
        request.getfixturevalue("ffcv")
    found = fuzz.fuzz(name, SECONDS[name] / 60, CORPUS, tmp_path, seed=0)
    assert found["findings"] == []
    assert found["inputs"] > len(list((CORPUS / name).iterdir())) + 20
    assert found["inputs"] == found["accepted"] + found["refused"]
    assert found["accepted"]


def test_the_corpus_is_small():
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(fuzz.NAMES)
    assert sum(path.stat().st_size for path in files) < 200_000


PLANTED = """
import os, pickle, subprocess, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tools import fuzz
from tools.readers import UserError
trial = fuzz.Trial("config", Path({work!r}))

def raising(error):
    def read(data):
        raise error
    return read

def writing(data):
    Path({outside!r}).write_text("out")

def linking(data):
    os.symlink({outside!r}, "inside")

def swallowing(data):
    try:
        writing(data)
    except BaseException:
        pass

def running(data):
    subprocess.run(["true"])

def unpickling(data):
    pickle.loads(pickle.dumps(Path))

def greedy(data):
    bytearray(1 << 34)

def within(data):
    Path("fine").write_text("in")
    os.mkdir("fine.d")
    os.rename("fine", "fine.d/fine")

reads = [lambda data: None, raising(UserError("one line")), within, raising(ValueError("no")),
         raising(UserError("two\\nlines")), raising(UserError("\\ud800")), writing, linking, swallowing, running, unpickling,
         greedy, raising(RecursionError()), raising(SystemExit(0))]
for read in reads:
    trial.reader.read = read
    print(trial.feed(b"x").replace("\\n", " "))
assert not Path({outside!r}).exists()
fuzz.SLOW_S = -1
print(trial.feed(b"x"))
trial.save()
"""


def test_the_fuzzer_sees_what_it_looks_for(tmp_path):
    names = {"root": str(ROOT), "work": str(tmp_path / "work"), "outside": str(tmp_path / "outside")}
    code = PLANTED.format(**names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.splitlines()
    wanted = [
        "accepted", "refused", "accepted", "ValueError", "an error that is no single line", "an error that is no single line",
        "trespass: open", "trespass: os.symlink", "trespass: open", "trespass: subprocess.Popen",
        "trespass: pickle.find_class", "MemoryError", "RecursionError", "SystemExit", "slow",
    ]  # fmt: skip
    assert len(found) == len(wanted)
    for line, begin in zip(found, wanted, strict=True):
        assert line.startswith(begin)
    counts = json.loads((tmp_path / "work" / "counts.json").read_text())
    assert (counts["inputs"], counts["accepted"], counts["refused"]) == (15, 2, 1)
    inputs = {finding["input"] for finding in counts["findings"]}
    assert all((tmp_path / "work" / name).read_bytes() == b"x" for name in inputs)


@pytest.mark.parametrize(
    ("does", "wanted"),
    [("os.abort()", "exit code -6"), ("time.sleep(60)", "hangs"), ("sys.exit('no such reader')", "did not begin")],
)
def test_an_input_that_ends_or_holds_up_its_process_is_a_finding(does, wanted, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    begun = "" if "exit" in does else "(work / 'current').write_bytes(b'bad')"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        f"work = Path(sys.argv[sys.argv.index('--work') + 1])\nwork.mkdir()\n{begun}\n{does}\n"
    )
    monkeypatch.setattr(fuzz, "__file__", str(script))
    monkeypatch.setattr(fuzz, "HANGS_S", 1.0)
    found = fuzz.fuzz("config", 0.1, CORPUS, tmp_path, seed=0)
    assert found["findings"][0]["what"].startswith(wanted)
    kept = list(tmp_path.glob("finding-config-killed-*"))
    assert bool(kept) == bool(begun)
    assert all(path.read_bytes() == b"bad" for path in kept)
