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


def test_an_input_that_kills_the_process_is_a_finding(tmp_path, monkeypatch):
    """The reader is made to end its process on inputs of one kind."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Planted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'tools.readers':\n"
        "            import fastarat.config\n"
        "            fastarat.config.read_yaml = lambda path: os.abort() if b'trades' in open(path,'rb').read() else {}\n"
        "sys.meta_path.insert(0, Planted())\n"
    )
    popen = subprocess.Popen

    def planted(argv, **options):
        options["env"]["PYTHONPATH"] += f":{tmp_path}"
        return popen(argv, **options)

    monkeypatch.setattr(fuzz.subprocess, "Popen", planted)
    found = fuzz.fuzz("config", 0.2, CORPUS, tmp_path, seed=0)
    assert any("exit code" in finding["what"] for finding in found["findings"])
    assert any(b"trades" in path.read_bytes() for path in tmp_path.glob("finding-config-killed-*"))
