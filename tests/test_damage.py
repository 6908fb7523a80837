"""Damaged, edited and hostile files of a run: noticed when they are read, and what can stand in for them does."""

import io
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from small import small_config, trained

import fastarat
from fastarat import UserError
from fastarat.cli import main
from fastarat.files import (
    append_text,
    load_checkpoint,
    load_tensors,
    load_weights,
    parse_json,
    read_json,
    save_weights,
    tensors_hash,
    write_atomic,
    write_bytes,
    write_text,
)
from fastarat.resuming import finished
from fastarat.runs import Run, load_network
from fastarat.training import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("damage") / "run")


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]


def zeroed(content: bytes, place: int) -> bytes:
    return content[:place] + bytes(len(content[place : place + 512])) + content[place + 512 :]


@pytest.mark.parametrize("damage", [flipped, zeroed])
@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "last.pt", "best.pt"])
def test_no_damaged_byte_of_a_checkpoint_is_used(name, damage, whole, tmp_path):
    content, copy = (whole / name).read_bytes(), tmp_path / name
    expected, draw, said = load_weights(whole / name), random.Random(0), []
    for place in [draw.randrange(len(content)) for _ in range(60)]:
        copy.write_bytes(bad := damage(content, place))
        if bad == content:  # zeros upon zeros
            continue
        try:
            weights, meta = load_weights(copy)
        except UserError as error:
            said.append(str(error))
            continue
        # What an archive holds between its files is read by nobody.
        assert name.endswith(".pt"), f"byte {place} was not noticed"
        assert meta == expected[1]
        assert all(torch.equal(weights[key], value) for key, value in expected[0].items())
    assert said
    assert all("cannot be read" in text and name in text for text in said)


@pytest.mark.parametrize("size", [0, 1, 9, 100, 5000, -1])
@pytest.mark.parametrize("name", ["last.safetensors", "last.pt"])
def test_a_checkpoint_cut_short_is_not_used(name, size, whole, tmp_path):
    (tmp_path / name).write_bytes((whole / name).read_bytes()[:size])
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(tmp_path / name)


def test_weights_of_before_there_was_a_checksum_are_read(whole, tmp_path):
    weights, meta = load_weights(whole / "last.safetensors")
    save_file(weights, tmp_path / "old.safetensors", {"fastarat": '{"model": "resnet-small", "epoch": 3}'})
    old, found = load_weights(tmp_path / "old.safetensors")
    assert found == {"model": "resnet-small", "epoch": 3, "sha256": meta["sha256"]}
    assert meta["sha256"] == tensors_hash(dict(sorted(old.items())))


@pytest.mark.parametrize("metadata", ["[1]", "{", "NaN", "[" * 100_000, '{"epoch": 1e999}', ""])
def test_metadata_that_are_none(metadata, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"fastarat": metadata})
    with pytest.raises(UserError, match="its metadata are corrupt"):
        load_weights(tmp_path / "x.safetensors")


def test_equal_weights_make_equal_files(tmp_path):
    weights = {"b": torch.ones(2), "a": torch.zeros(3)}
    for name in ("x", "y"):
        save_weights(tmp_path / name, weights, {"model": "resnet-small"})
        weights = dict(reversed(weights.items()))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def damage(file: Path) -> None:
    content = file.read_bytes()
    place = len(content) // 2
    file.write_bytes(content[:place] + bytes(b ^ 255 for b in content[place : place + 64]) + content[place + 64 :])


def test_a_damaged_last_checkpoint_is_gone_on_from_the_one_before(whole, run):
    damage(run / "last.pt")
    with pytest.warns(UserWarning, match=r"last\.pt.*Using previous\.pt instead, of epoch 2"):
        train(resume=run, progress=False)
    assert load_checkpoint(run / "last.pt")["epoch"] == 3
    assert tensors_of(run) == tensors_of(whole)
    assert [row["epoch"] for row in Run(run).metrics()] == [1, 2, 3]
    # The damaged file has not taken the place of the good one.
    assert load_checkpoint(run / "previous.pt")["epoch"] == 2


def tensors_of(run: Path) -> str:
    return load_weights(run / "last.safetensors")[1]["sha256"]


def test_without_another_checkpoint_nothing_is_made_up(run, capsys):
    damage(run / "last.pt")
    damage(run / "previous.pt")
    assert main(["train", "--resume", str(run)]) == 2
    assert "last.pt cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(("gone", "epoch"), [((), 3), (("last.pt",), 2)])
def test_damaged_weights_are_taken_from_the_checkpoint(gone, epoch, run, capsys):
    damage(run / "last.safetensors")
    for name in gone:
        damage(run / name)
    with pytest.warns(UserWarning, match=rf"last\.safetensors.*instead, of epoch {epoch}"):
        assert load_network(run)[1]["epoch"] == epoch


def test_the_last_two_checkpoints_are_kept(whole):
    assert [load_checkpoint(whole / f"{name}.pt")["epoch"] for name in ("previous", "last")] == [2, 3]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 7, "seed: 7, trained with 0"),
        ("batch_size", 16, "batch_size: 16, trained with 32"),
        ("attack", {"epsilon": 0.2}, "attack.epsilon: 0.2, trained with 0.1"),
        ("optim", {"lr": 0.01}, "optim.lr: 0.01, trained with 0.1"),
        ("defense", {"name": "trades"}, "defense.name: 'trades', trained with 'ar-at'"),
        ("swa", True, "swa: True, trained with False"),
    ],
)
def test_a_changed_config_is_refused_with_the_difference(key, value, words, run, capsys):
    before = (run / "last.pt").read_bytes()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[key] = {**config[key], **value} if isinstance(value, dict) and key != "defense" else value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "was changed since" in said
    assert (run / "last.pt").read_bytes() == before


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_the_config_in_the_checkpoint_is_the_truth(how, whole, run, tmp_path):
    if how == "deleted":
        (run / "config.yaml").unlink()
        shutil.copy(run / "previous.pt", run / "last.pt")
    else:  # where the run lies, and on what device it runs, may differ
        run = run.rename(tmp_path / "elsewhere")
    train(resume=run, progress=False)
    assert tensors_of(run) == tensors_of(whole)
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 0 if how == "moved" else True


def test_a_damaged_config_names_the_way_out(run, capsys):
    (run / "config.yaml").write_bytes(b"\xff\xfe: [")
    assert main(["train", "--resume", str(run)]) == 2
    assert f"Delete {run / 'config.yaml'}: the checkpoint holds the config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\n", b"[1]\n", b'{"epoch": "3"}\n', b'{"epoch": 1e999}\n', b"[" * 10**5 + b"\n", b'{"a": 1}\n']
)
def test_damaged_metrics_are_left_out_and_counted(line, run):
    file = run / "metrics.jsonl"
    file.write_bytes(line + file.read_bytes() + b'{"epoch": 4, "half')
    with pytest.warns(UserWarning, match=r"1 damaged line\(s\) left out, line 1 first"):
        assert [row["epoch"] for row in Run(run).metrics()] == [1, 2, 3]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 10**6, b"1e999", b"-Infinity", b"NaN", b"9" * 10**5, b""])
def test_json_that_is_none(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json is not a table that can be read"):
        read_json(tmp_path / "x.json", "a table")
    with pytest.raises(ValueError):
        parse_json(content)


def test_json_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading one would wait for ever
    for path in (tmp_path, tmp_path / "gone", tmp_path / "pipe"):
        with pytest.raises(UserError, match="it is no file"):
            read_json(path, "a table")


def test_a_checkpoint_that_unpacks_to_a_thousand_times_its_size(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**8))
    with pytest.raises(UserError, match="unpacks to 100 times"):
        load_tensors(tmp_path / "bomb.pt")


def torn(**changes) -> dict:
    return {"format": 1, "epoch": 1, "meta": {}, "step": {"model": {"a": torch.zeros(1)}}} | changes


@pytest.mark.parametrize(
    "state",
    [
        torn(epoch="1"), torn(meta=[]), torn(step=[]), torn(step={}), torn(step={"model": [1]}), torn(format=2), [],
        torn(step={"model": {"a": 1}}), torn(step={"model": {1: torch.zeros(1)}}), torch.zeros(1), None,
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_make_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a fastarat checkpoint"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_safetensors_header_that_lies(tmp_path):
    for header in (b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}', b"[" * 5000, b"{}"):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(UserError):
            load_weights(tmp_path / "x.safetensors")


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit is an error, as on a full disk
from pathlib import Path
from fastarat.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
sys.exit(main({argv!r}))
"""


def on_a_full_disk(argv: list[str], limit: int) -> subprocess.CompletedProcess:
    code = FULL.format(tests=str(Path(__file__).parent), limit=limit, argv=argv)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("limit", [100, 200_000])
def test_a_disk_that_fills_while_training(limit, whole, run):
    """100 bytes hold no config and no row of metrics, 200 kB no checkpoint of this network."""
    shutil.copy(run / "previous.pt", run / "last.pt")
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.suffix in (".pt", ".yaml")}
    done = on_a_full_disk(["train", "--resume", str(run)], limit)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fastarat: cannot write ")
    assert "needed" in last
    assert "Free space or choose another --out" in last
    assert not list(run.glob(".*"))
    assert {name: (run / name).read_bytes() for name in before} == before
    train(resume=run, progress=False)
    assert tensors_of(run) == tensors_of(whole)


def test_a_disk_that_fills_under_tensorboard(whole, run, monkeypatch, capfd):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(self, data):
        raise OSError(28, os.strerror(28))

    shutil.copy(run / "previous.pt", run / "last.pt")
    hook = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", refuse)
    with pytest.raises(UserError, match=r"cannot write .*tensorboard: No space left on device.*--no-tensorboard"):
        train(resume=run, overrides={"tensorboard": True}, progress=False)
    assert threading.excepthook is hook
    assert "Traceback" not in capfd.readouterr().err
    train(resume=run, overrides={"tensorboard": False}, progress=False)
    assert tensors_of(run) == tensors_of(whole)


def test_a_damaged_row_of_metrics_is_noticed(run):
    rows = Run(run).metrics()
    text = (run / "metrics.jsonl").read_text()
    assert all(isinstance(json.loads(line)["crc32"], int) for line in text.splitlines())
    assert "crc32" not in rows[0]
    value = json.loads(text.splitlines()[0])["train/loss"]
    (run / "metrics.jsonl").write_text(text.replace(f"{value}", f"{value + 1}", 1))
    with pytest.warns(UserWarning, match=r"1 damaged line\(s\) left out, line 1 first"):
        assert Run(run).metrics() == rows[1:]
    old = [{key: number for key, number in json.loads(line).items() if key != "crc32"} for line in text.splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))  # of an earlier version
    assert Run(run).metrics() == rows


def test_a_row_of_metrics_is_added_whole_or_not_at_all(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append_text(file, "x" * 90 + "\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = (
        "import resource, signal, sys; from pathlib import Path; from fastarat.files import append_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"append_text(Path({str(file)!r}), 'y' * 90)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "cannot write" in done.stderr
    assert file.read_text() == "x" * 90 + "\n"
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


@pytest.mark.parametrize(
    "write",
    [
        lambda p: write_text(p, "x" * 10),
        lambda p: write_bytes(p, b"x" * 10),
        lambda p: save_weights(p, {"a": torch.zeros(3)}, {}),
        lambda p: fastarat.runs.save_tensors(p, {"a": 1}),
        lambda p: append_text(p, "x"),
    ],
)
@pytest.mark.parametrize(("number", "mend"), [(30, "or make the folder writable"), (28, "needed")])
def test_every_writer_says_what_is_missing(write, number, mend, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=rf"cannot write .*x: {os.strerror(number)}.*{mend}"):
        write(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_library_that_knows_no_errno(tmp_path):
    def torchs(path):
        torch.save({"a": torch.zeros(10)}, io.BytesIO())
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0")

    with pytest.raises(UserError, match=r"cannot write .*PytorchStreamWriter failed"):
        write_atomic(tmp_path / "x", torchs)

    def bug(path):
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        write_atomic(tmp_path / "x", bug)


def test_files_are_readable_by_others(run):
    """safetensors' own writer makes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    assert {(run / name).stat().st_mode & 0o777 for name in ("last.safetensors", "last.pt")} == {0o666 & ~mask}


def test_a_run_that_never_saved_starts_over(tmp_path):
    run = Run.create(tmp_path / "run")
    run.write_config(small_config(tmp_path / "run", epochs=1))
    assert not run.resumable()
    train(resume=run.path, progress=False)
    assert finished(run)
