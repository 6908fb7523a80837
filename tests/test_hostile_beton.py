"""Hostile and damaged .beton files and dataset.json: an error of one line, or the very same pixels; never a crash."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastarat.cli import main
from fastarat.data import beton, beton_file, checksums, info, load_dataset, make_loader, prepare
from fastarat.errors import UserError

FIRST_ROW = beton_file.HEADER.itemsize + 2 * beton_file.FIELD.itemsize
COUNT = 60  # more than one page of these images, so that pages turn


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw(root: Path, side: int = 128, per_class: int = COUNT // 2) -> Path:
    """A folder of two classes, grey gradients of different slopes."""
    ramp = np.add.outer(np.arange(side), np.arange(side))
    for split, count in (("train", per_class), ("test", 2)):
        for c in range(2):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.stack([(ramp * (1 + c) + 7 * i) % 256] * 3, -1).astype(np.uint8)
                pixels[..., 1] //= 2
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module", params=["raw", "jpg"])
def pristine(request, ffcv, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    return prepare(draw(root / "images"), root / request.param, data_dir=root / "data", write_mode=request.param)


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def tables(content: bytearray):
    """Views of a file's header, fields, rows and allocations: writing to them changes `content`."""
    header = np.frombuffer(content, beton_file.HEADER, 1)
    count, end = int(header["num_samples"][0]), int(header["alloc_table_ptr"][0])
    return {
        "header": header,
        "field": np.frombuffer(content, beton_file.FIELD, 2, beton_file.HEADER.itemsize),
        "image": np.frombuffer(content, beton_file.ROW, count, FIRST_ROW)["f0"],
        "label": np.frombuffer(content, beton_file.ROW, count, FIRST_ROW)[["f1"]],
        "allocation": np.frombuffer(content, beton_file.ALLOCATION, count, end),
    }


def forged(pristine: bytes):
    """Yield (what, content) for every value of every field, alone and with its twin made to agree, and random flips."""
    original = tables(bytearray(pristine))
    for table, rows in original.items():
        for name in rows.dtype.names:
            for at in {0, len(rows) - 1}:
                width = 8 * rows.dtype[name].itemsize if rows.dtype[name].shape == () else 8
                old = rows[name][at] if rows.dtype[name].shape == () else rows[name][at].reshape(-1)[0]
                for value in {0, 1, 2, 255, 2**width - 1, 2 ** (width - 1), int(old) ^ 1, int(old) + 8 & 2**width - 1}:
                    for twin in (False, True) if name in ("data_ptr", "ptr") else (False,):
                        content = bytearray(pristine)
                        changed = tables(content)
                        kind = changed[table].dtype[name].base
                        number = np.array(value % 2**width, f"<u{kind.itemsize}").view(kind)
                        target = changed[table][name][at : at + 1]
                        target.reshape(-1)[:1] = number
                        if twin:
                            changed["image"]["data_ptr"][at] = changed["allocation"]["ptr"][at] = number
                        if content != pristine:
                            yield f"{table}.{name}[{at}]={value}{' twin' * twin}", bytes(content)
    generator = np.random.default_rng(0)
    ends = [int(original["header"]["alloc_table_ptr"][0]), len(pristine)]
    for _ in range(270):
        content = bytearray(pristine)
        low, high = ([0, FIRST_ROW + 24 * COUNT], ends)[generator.integers(2)]
        for at in generator.integers(low, high, generator.integers(1, 4)):
            content[at] ^= 1 << int(generator.integers(8))
        yield "flips", bytes(content)
    for length in generator.integers(0, len(pristine), 20):
        yield f"cut at {length}", pristine[:length]


# Run as `python test_hostile_beton.py FOLDER`, so that a crash is this child's.
def child(folder: Path) -> None:
    path = folder / "train.beton"
    pristine = path.read_bytes()
    told = beton_file.describe(folder)
    accepted, refused = [], 0
    seen = 0
    for what, content in [("untouched", pristine), *forged(pristine)]:
        with path.open("r+b") as file:  # in place: making megabytes anew takes most of the time
            file.write(content)
            file.truncate()
        seen += 1
        try:
            split = beton.read_split(path, count=COUNT, shape=told.shape, num_classes=2, write_mode=told.write_mode)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
            continue
        accepted.append(what)
        for _ in make_loader(split, batch_size=16, device="cpu", kind="ffcv").epoch(0):
            pass
    print(json.dumps({"seen": seen, "refused": refused, "accepted": accepted}))


def test_every_field_forged(folder):
    """Some 500 mutations: what FFCV would follow is refused; what passes is read by FFCV without a crash."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environ, timeout=250, check=False
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["seen"] > 400
    # Labels within the classes and bits that nothing follows are left to the checksum.
    allowed = ("untouched", "label.", "flips")
    assert all(what.startswith(allowed) for what in told["accepted"]), told["accepted"]
    assert "untouched" in told["accepted"]


def damage(folder: Path, table: str, name: str, value, rows=slice(None)) -> None:
    path = folder / "train.beton"
    content = bytearray(path.read_bytes())
    tables(content)[table][name][rows] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("table", "name", "value", "rows", "message"),
    [
        ("image", "mode", 2, slice(0, 1), r"modes are \[.*2\]"),
        ("image", "mode", 7, slice(None), r"modes are \[7\]"),
        ("header", "page_size", 0, slice(None), "page size is 0"),
        ("header", "page_size", (1 << 21) - 1, slice(None), "page size is 2097151"),
        ("header", "num_samples", 0, slice(None), "holds 0 images"),
        ("header", "num_samples", 2**64 - 1, slice(None), "holds 18446744073709551615 images"),
        ("header", "alloc_table_ptr", 2**64 - 1, slice(None), "may be cut short"),
        ("image", "height", 0, slice(None), "not all 128x128"),
        ("allocation", "size", 0, slice(0, 1), "outside the stored images"),
        ("allocation", "sample_id", 0, slice(None), "does not name every image once"),
        ("field", "arguments", 1, slice(0, 1), "settings"),
    ],
)
def test_what_crashed_or_could_is_named(folder, table, name, value, rows, message):
    damage(folder, table, name, value, rows)
    with pytest.raises(UserError, match=message) as raised:
        load_dataset(folder)
    assert "train.beton" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_fields_in_another_order_are_refused(folder):
    """FFCV derives a row's layout from their order: the same names the other way round are other addresses."""
    path = folder / "train.beton"
    content = bytearray(path.read_bytes())
    fields = tables(content)["field"]
    fields[:] = fields[::-1].copy()
    path.write_bytes(content)
    with pytest.raises(UserError, match="its fields are"):
        load_dataset(folder)


@pytest.mark.parametrize("pristine", ["jpg"], indirect=True)
def test_a_jpeg_of_another_size_is_refused(folder):
    path = folder / "train.beton"
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xc0", int(tables(content)["allocation"]["ptr"][3]))
    content[at + 5 : at + 9] = (256).to_bytes(2, "big") * 2
    path.write_bytes(content)
    with pytest.raises(UserError, match="a JPEG does not begin as the first does"):
        load_dataset(folder)
    at = content.index(b"\xff\xc0", int(tables(content)["allocation"]["ptr"][0]))
    content[at + 5 : at + 9] = (256).to_bytes(2, "big") * 2
    path.write_bytes(content)
    with pytest.raises(UserError, match="not that of 128x128"):
        load_dataset(folder)


def test_damaged_pixels_are_noticed(folder):
    """In the pixels, where no table could tell: single bits, and a block that a disk lost."""
    for part, at, content in (("train", 3_000_000, b"\0" * 512), ("test", -200_000, None)):
        copy = Path(shutil.copytree(folder, folder.parent / f"damaged-{part}"))
        path = copy / f"{part}.beton"
        data = bytearray(path.read_bytes())
        if beton_file.describe(copy).write_mode == "jpg":
            at = int(np.frombuffer(data, beton_file.ROW, 1, FIRST_ROW)["f0"]["data_ptr"][0]) + 700
        if part == "test" and beton_file.describe(copy).write_mode == "raw":
            at = int(np.frombuffer(data, beton_file.ROW, 1, FIRST_ROW)["f0"]["data_ptr"][0]) + 700
        data[at : at + 512] = content or bytes([data[at] ^ 1]) + data[at + 1 : at + 512]
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{part}\.beton .*checksum in dataset.json says"):
            load_dataset(copy)


def test_a_checksum_is_verified_once_and_in_full_on_demand(folder, monkeypatch, capsys):
    load_dataset(folder)
    with monkeypatch.context() as patched:
        patched.setattr(checksums, "checksum", lambda path: pytest.fail("read again"))
        load_dataset(folder)
    path = folder / "train.beton"
    before = path.stat()
    data = bytearray(path.read_bytes())
    at = int(tables(data)["allocation"]["ptr"][0]) + 700
    data[at] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk would: nothing else tells
    with pytest.raises(UserError, match="checksum"):
        info(folder, verify=True)
    data[at] ^= 1
    path.write_bytes(data)
    assert main(["data", "info", str(folder), "--verify"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [line.rpartition("/")[2] for line in told["verified"]] == [
        "train.beton: every byte, by SHA-256", "test.beton: every byte, by SHA-256",
    ]  # fmt: skip


def test_verify_decodes_a_folder_again(tmp_path):
    images = draw(tmp_path / "images", side=16, per_class=3)
    assert info(images, data_dir=tmp_path / "data", verify=True)["verified"] == [
        f"10 decoded images, by decoding {images} again"
    ]
    path = images / "train" / "class0" / "0.png"
    stat = path.stat()
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(path)
    with path.open("ab") as file:
        file.write(b"\0" * max(0, stat.st_size - path.stat().st_size))
    os.truncate(path, stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="one of them is damaged"):
        info(images, data_dir=tmp_path / "data", verify=True)
    assert not list((tmp_path / "data").glob(".verify*"))


def test_folders_from_before_checksums_open_with_a_warning(folder):
    path = folder / "dataset.json"
    told = json.loads(path.read_text())
    del told["sha256"]
    path.write_text(json.dumps(told))
    with pytest.warns(UserWarning, match="no checksums.*preparing it again"):
        load_dataset(folder)


def with_entry(**changes):
    return lambda told: json.dumps(told | changes).encode()


@pytest.mark.parametrize(
    "write",
    [
        lambda told: b"",
        lambda told: b"\xff\xfe\x00",
        lambda told: b"[" * 200_000,
        lambda told: b'{"a":' * 100_000,
        lambda told: b"[1]",
        lambda told: b"null",
        lambda told: json.dumps(told).replace("128", "1e999").encode(),
        lambda told: json.dumps(told).replace("128", "9" * 5000).encode(),
        lambda told: json.dumps(told).replace("128", "NaN").encode(),
        lambda told: b" " * (1 << 24) + json.dumps(told).encode(),
        with_entry(format=3),
        with_entry(format=True),
        with_entry(shape="3x4"),
        with_entry(shape=[3, 128.5, 128]),
        with_entry(shape=[3, True, 128]),
        with_entry(shape=[3, 10**30, 128]),
        with_entry(shape=[3, -128, 128]),
        with_entry(shape={"0": 3}),
        with_entry(counts=[COUNT, 4]),
        with_entry(counts={"train": COUNT}),
        with_entry(counts={"train": 10**25, "test": 4}),
        with_entry(counts={"train": 0, "test": 4}),
        with_entry(classes="ab"),
        with_entry(classes={"a": 1, "b": 2}),
        with_entry(classes=[["a"], "b"]),
        with_entry(classes=["a", "\ud800"]),
        with_entry(classes=["a", "\x1b[2J"]),
        with_entry(name=None),
        with_entry(source=[1]),
        with_entry(notes="note"),
        with_entry(notes=[1]),
        with_entry(write_mode=["raw"]),
        with_entry(write_mode="smart"),
        with_entry(sha256="0" * 64),
        with_entry(sha256=None),
        with_entry(sha256={"train": "0" * 64}),
        with_entry(sha256={"train": "0" * 63, "test": 1}),
    ],
)
def test_dataset_json_of_any_content(write, tmp_path):
    told = {
        "format": 1, "name": "x", "classes": ["a", "b"], "shape": [3, 128, 128], "counts": {"train": COUNT, "test": 4},
        "write_mode": "raw", "source": "s", "notes": [], "sha256": {"train": "0" * 64, "test": "1" * 64},
    }  # fmt: skip
    (tmp_path / "dataset.json").write_bytes(json.dumps(told).encode())
    assert beton_file.describe(tmp_path).classes == ("a", "b")
    (tmp_path / "dataset.json").write_bytes(write(told))
    with pytest.raises(UserError, match=r"dataset\.json (cannot be read|says)") as raised:
        beton.open_prepared(tmp_path, None)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_dataset_json_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "dataset.json")  # reading it would wait for ever
    with pytest.raises(UserError, match="does not exist"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("kind", ["touched", "shorter", "gone", "another"])
def test_a_file_that_changes_while_it_is_read_is_named(folder, kind):
    split = load_dataset(folder).train
    loader = make_loader(split, batch_size=4, device="cpu", kind="ffcv")
    path, threads = folder / "train.beton", set(threading.enumerate())
    epoch = loader.epoch(0)
    next(epoch)
    if kind == "touched":
        os.utime(path, ns=(1, 1))
    elif kind == "gone":
        path.unlink()
    else:
        other = path.with_name("other")
        shutil.copy(folder / "test.beton", other)
        os.replace(other, path)
    with pytest.raises(UserError, match="went away" if kind == "gone" else "changed while it was read"):
        list(epoch)
    assert set(threading.enumerate()) <= threads
    with pytest.raises(UserError, match=r"usable \.beton"):
        next(loader.epoch(1))


def test_rows_that_a_file_does_not_have_are_refused(folder):
    """The file may have been replaced by a shorter one between opening and reading; FFCV would read beyond it."""
    split = load_dataset(folder).train
    shutil.copy(folder / "test.beton", folder / "train.beton")
    stream = beton.Stream(folder / "train.beton", 4, raw=split.raw)
    with pytest.raises(IndexError, match="holds rows 0 to 3"):
        next(stream.batches(split.indices))
    with pytest.raises(IndexError):
        next(stream.batches(torch.tensor([-1])))


@pytest.mark.parametrize("taken", [0, 1, 10, 13])
def test_an_epoch_left_early_leaves_no_thread(folder, taken):
    """Fourteen batches: after ten the reader has met the end and waits for room to say so."""
    loader = make_loader(load_dataset(folder).train, batch_size=4, device="cpu", kind="ffcv")
    threads = set(threading.enumerate())
    epoch = loader.epoch(0)
    for _ in range(taken):
        next(epoch)
    time.sleep(0.2)
    start = time.monotonic()
    epoch.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert time.monotonic() - start < 1
    assert set(threading.enumerate()) <= threads


def test_an_error_in_the_reader_ends_the_epoch(folder, monkeypatch):
    stream = beton.Stream(folder / "train.beton", 4, raw=load_dataset(folder).train.raw)

    def fail(self, b_ix, *_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(beton.ffcv_parts().Epoch, "run_pipeline", fail)
    threads = set(threading.enumerate())
    with pytest.raises(RuntimeError, match=r"FFCV failed while reading .*train\.beton"):
        list(stream.batches(torch.arange(COUNT)))
    assert set(threading.enumerate()) <= threads


def test_prepare_that_is_killed_leaves_nothing_to_the_next(ffcv, tmp_path):
    """Killed while it writes: no folder of that name, and the next call removes what is beside it."""
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom fastarat.data import beton\n"
        "with beton.unfinished(Path('out')) as folder:\n"
        "    (folder / 'train.beton').write_bytes(bytes(1000))\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=False, timeout=120)
    assert done.returncode == -9, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    prepare("digits", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "cache"}
    assert load_dataset(tmp_path / "out").shape == (1, 8, 8)


def test_two_at_once_on_one_folder(ffcv, tmp_path):
    with beton.unfinished(tmp_path / "out") as first:
        (first / "train.beton").write_text("being written")
        with pytest.raises(UserError, match=r"another `fastarat data prepare` is writing .*out"):
            prepare("digits", tmp_path / "out")
        assert (first / "train.beton").exists()
    assert not list(tmp_path.glob(".out*"))


def test_prepare_says_what_a_full_disk_lacks(ffcv, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(ffcv, "handle_sample", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(
        UserError, match=r"cannot write .*out: No space left.*needs about [\d.]+ MB, 1\.0 MB are free"
    ) as e:
        prepare("digits", tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_prepare_notices_a_page_that_arrived_in_part(ffcv, tmp_path, monkeypatch):
    """A disk that is almost full takes a part of a write and says so by its length alone, which FFCV does not read."""

    class Short:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[: len(data) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    class Allocator(ffcv.MemoryAllocator):
        def __enter__(self):
            super().__enter__()
            self.fp = Short(self.fp)

    monkeypatch.setattr(ffcv, "MemoryAllocator", Allocator)
    with pytest.raises(UserError, match=r"cannot write .*not all of it arrived"):
        prepare("digits", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_prepare_on_a_read_only_folder(ffcv, tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(beton.Path, "mkdir", lambda self, **k: refuse(self) if "unfinished" in self.name else None)
    with pytest.raises(UserError, match=r"cannot write .*out: Read-only file system.*make its folder writable"):
        prepare("digits", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_image_size_is_bounded(tmp_path):
    start = time.monotonic()
    for size in (0, -1, 4097, 60_000, 10**30):
        with pytest.raises(UserError, match="write 1 to 4096 pixels"):
            info(tmp_path, image_size=size)
    assert time.monotonic() - start < 1


def test_images_too_large_for_a_page_are_refused(ffcv, tmp_path):
    for split in ("train", "test"):
        for c in "ab":
            (tmp_path / "images" / split / c).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (4100, 4)).save(tmp_path / "images" / split / c / f"{i}.png")
    with pytest.raises(UserError, match=r"are 4x4100.*--image-size"):
        prepare(tmp_path / "images", tmp_path / "out", data_dir=tmp_path / "data")


if __name__ == "__main__":
    child(Path(sys.argv[1]))
