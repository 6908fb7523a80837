"""Both loaders, the augmentation they share, and .beton files, on small files of the real formats."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import TEST, TRAIN, place_cifar
from PIL import Image

from fastarat.data import (
    Augment,
    augment,
    beton,
    beton_file,
    default_augment,
    info,
    load_dataset,
    loaders,
    make_loader,
    prepare,
)
from fastarat.errors import UserError


@pytest.fixture
def cifar(cifar_dir):
    return load_dataset("cifar10", data_dir=cifar_dir)


@pytest.fixture(scope="session")
def prepared(ffcv, tmp_path_factory) -> Path:
    """The small CIFAR-10 as .beton, once for all tests that only read it."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        place_cifar(root / "data", monkeypatch)
        return prepare("cifar10", root / "beton", data_dir=root / "data")


def batches(source, epoch: int = 0, **options):
    """The batches of an epoch of a loader, or of a loader made for a split."""
    return list((make_loader(source, device="cpu", **options) if options else source).epoch(epoch))


def same(first, second) -> bool:
    return all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


def by_hand(image: torch.Tensor, padding: int, down: int, right: int, flipped: bool) -> torch.Tensor:
    """Pad, crop and flip one uint8 [C, H, W] image."""
    _, height, width = image.shape
    padded = torch.nn.functional.pad(image.float() / 255, (padding,) * 4)
    cropped = padded[:, down : down + height, right : right + width]
    return cropped.flip(2) if flipped else cropped


@pytest.mark.parametrize(("channels", "padding", "flip"), [(3, 1, True), (1, 1, False), (3, 0, True), (2, 2, False)])
def test_augment_equals_the_loop(channels, padding, flip):
    generator = torch.Generator().manual_seed(0)
    # Not square, and values above zero: a row mistaken for a column, or padding for a pixel, shows.
    images = torch.randint(1, 256, (150, channels, 5, 4), dtype=torch.uint8, generator=generator)
    found = augment(images, Augment(padding, flip), generator)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    span = range(2 * padding + 1)
    choices = [(down, right, flipped) for down in span for right in span for flipped in (False, True)[: 1 + flip]]
    used = dict.fromkeys(choices, 0)
    for image, result in zip(images, found, strict=True):
        matching = [choice for choice in choices if torch.equal(result, by_hand(image, padding, *choice))]
        assert len(matching) == 1
        used[matching[0]] += 1
    assert min(used.values()) > 0  # no row, column or direction decides another: all combinations are drawn
    assert max(used.values()) < 4 * 150 / len(choices)


def test_augment_without_recipe_converts_exactly():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert augment(levels, None).flatten().tolist() == [float(np.float32(v) / np.float32(255)) for v in range(256)]
    images = torch.rand(2, 3, 4, 4)
    kept = augment(images, None)
    assert torch.equal(kept, images)
    assert kept.data_ptr() != images.data_ptr()
    assert torch.equal(augment(images, Augment(), None), images)


def test_augment_of_float_images_equals_that_of_pixels():
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    results = [augment(x, Augment(2, True), torch.Generator().manual_seed(5)) for x in (pixels, pixels / 255)]
    assert torch.equal(*results)


def test_augment_reads_nothing_back():
    """On the meta device a value cannot be read, so an operation that a CUDA graph refuses fails here."""
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    for recipe in (Augment(4, True), Augment(flip=True, scale=(0.08, 1.0))):
        assert augment(images, recipe).shape == (8, 3, 32, 32)


def test_default_augment(folder, cifar, tmp_path):
    assert default_augment(load_dataset("digits")) == Augment(padding=1, flip=False)
    assert default_augment(cifar) == Augment(padding=4, flip=True)
    assert default_augment(load_dataset(folder, data_dir=tmp_path)) == Augment(padding=1, flip=True)
    with pytest.raises(UserError, match="padding=-1"):
        Augment(padding=-1)


def test_resident_loader_visits_every_image_once(cifar):
    loader = make_loader(cifar.train, batch_size=32, device="cpu", shuffle=True)
    got = batches(loader)
    assert (loader.kind, len(loader)) == ("resident", 5)
    assert [len(batch.labels) for batch in got] == [32, 32, 32, 32, 7]
    images, labels, index = (torch.cat(parts) for parts in zip(*got, strict=True))
    assert sorted(index.tolist()) == list(range(135))
    assert index.tolist() != list(range(135))
    assert torch.equal(images, cifar.train.images[index].permute(0, 3, 1, 2) / 255)
    assert torch.equal(labels, cifar.train.labels[index])
    assert got[0].images.is_contiguous(memory_format=torch.channels_last)
    assert got[0].images.dtype == torch.float32
    assert got[0].index.dtype == torch.int64


def test_drop_last_and_no_shuffle(cifar):
    loader = make_loader(cifar.train, batch_size=32, device="cpu", kind="resident", drop_last=True)
    assert (loader.reason, len(loader)) == ("resident was asked for", 4)
    assert torch.cat([batch.index for batch in batches(loader)]).tolist() == list(range(128))


def test_loader_of_an_empty_split():
    loader = make_loader(load_dataset("digits", val_images=0).val, batch_size=8, device="cpu", shuffle=True)
    assert len(loader) == len(batches(loader)) == 0


def test_an_epoch_depends_on_seed_and_number_only(cifar):
    options = {"batch_size": 32, "augment": Augment(4, True)}
    used, fresh, other = (
        make_loader(cifar.train, device="cpu", shuffle=True, seed=seed, **options) for seed in (0, 0, 1)
    )
    torch.manual_seed(1)
    second = batches(used, 1)
    torch.manual_seed(2)
    batches(used, 0)
    assert same(second, batches(used, 1))
    assert same(second, batches(fresh, 1))
    assert not torch.equal(second[0].index, batches(used, 2)[0].index)
    assert not torch.equal(second[0].index, batches(other, 1)[0].index)
    unshuffled = [batches(cifar.train, epoch, **options)[0].images for epoch in (0, 1)]
    assert not torch.equal(*unshuffled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fcv"}, "unknown loader 'fcv'; did you mean 'ffcv'"),
        ({"kind": "ffcv"}, "fastarat data prepare"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"device": "cuda"}, r"0\.4 MB of pixels, more than a quarter of the 1\.7 MB of .*fastarat data prepare"),
    ],
)
def test_loader_choices_that_cannot_work(options, message, cifar, monkeypatch):
    room = 4 * cifar.train.num_bytes - 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (room, room))
    with pytest.raises(UserError, match=message):
        make_loader(cifar.train, **{"batch_size": 8, "device": "cpu"} | options)


def test_ffcv_equals_resident(prepared, cifar):
    """Through a real .beton file: the same pixels, labels and order, over two epochs, before and after augmentation."""
    streamed = load_dataset(prepared / "train.beton")
    assert (streamed.name, streamed.classes, streamed.shape) == (cifar.name, cifar.classes, cifar.shape)
    for name in ("train", "val", "test"):
        here, there = getattr(cifar, name), getattr(streamed, name)
        assert there.images is None
        assert torch.equal(here.labels, there.labels)
        assert torch.equal(here.indices, there.indices)
        for recipe in (None, Augment(4, True)):
            options = {"batch_size": 32, "device": "cpu", "shuffle": name != "test", "seed": 3, "augment": recipe}
            options["drop_last"] = name == "train"
            expected = make_loader(here, **options)
            found = [make_loader(there, kind=kind, **options) for kind in ("ffcv", "resident")]
            assert [loader.kind for loader in found] == ["ffcv", "resident"]
            for epoch in (0, 1):
                wanted = batches(expected, epoch)
                assert all(same(wanted, batches(loader, epoch)) for loader in found)


def test_ffcv_loaders_may_run_at_once_and_stop_early(prepared):
    streamed = load_dataset(prepared)
    threads, running = torch.get_num_threads(), threading.active_count()
    train, val = (make_loader(s, batch_size=4, device="cpu", kind="ffcv") for s in (streamed.train, streamed.val))
    alone = batches(val)
    together = [two for _, two in zip(train.epoch(0), val.epoch(0), strict=False)]
    assert same(alone, together)
    epoch = train.epoch(0)
    next(epoch)
    epoch.close()
    assert len(batches(train)) == len(train)
    assert torch.get_num_threads() == threads  # FFCV would have set it to its own number of workers
    assert threading.active_count() == running


def test_error_inside_ffcv_is_raised(prepared, ffcv, monkeypatch):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(ffcv.Epoch, "run_pipeline", fail)
    with pytest.raises(RuntimeError, match="FFCV failed while reading") as raised:
        batches(load_dataset(prepared).train, batch_size=32, kind="ffcv")
    assert "the disk is gone" in str(raised.value.__cause__)


def test_auto_streams_what_does_not_fit(prepared, monkeypatch):
    train = load_dataset(prepared).train
    size = 135 * 3 * 32 * 32
    for room, kind, relation in ((4 * size, "resident", "at most"), (4 * size - 1, "ffcv", "more than")):
        monkeypatch.setattr(loaders, "host_bytes", lambda room=room: room)
        loader = make_loader(train, batch_size=32, device="cpu")
        assert loader.kind == kind
        assert relation in loader.reason


def test_prepare_keeps_one_channel_and_repeats_itself(ffcv, tmp_path):
    first, second = (prepare("digits", tmp_path / name) for name in ("first", "second"))
    assert (first / "train.beton").read_bytes() == (second / "train.beton").read_bytes()
    described = json.loads((first / "dataset.json").read_text())
    assert (described["channels"], described["counts"]) == (1, {"train": 1437, "test": 360})
    digits, streamed = load_dataset("digits"), load_dataset(first)
    assert streamed.shape == (1, 8, 8)
    assert same(batches(digits.val, batch_size=64), batches(streamed.val, batch_size=64, kind="ffcv"))
    assert info(first) | {"source": ""} == info("digits") | {"source": ""}


def test_prepare_as_jpeg(ffcv, folder, tmp_path):
    ramp = np.add.outer(np.arange(16), np.arange(16))[..., None] * np.array([8, 4, 2])
    for path in folder.rglob("*.png"):  # noise would be lost; smooth images are not
        Image.fromarray((ramp + 2 * int(path.stem)).clip(0, 255).astype(np.uint8)).save(path)
    source = load_dataset(folder, data_dir=tmp_path / "data").train
    out = prepare(folder, tmp_path / "beton", data_dir=tmp_path / "data", write_mode="jpg", jpeg_quality=95)
    streamed = load_dataset(out)
    assert not streamed.train.raw
    assert "quality 95" in streamed.notes[0]
    lossless, lossy = batches(source, batch_size=4)[0], batches(streamed.train, batch_size=4, kind="ffcv")[0]
    assert torch.equal(lossless.labels, lossy.labels)
    assert 0 < (lossless.images - lossy.images).abs().mean() < 0.02


def overwrite(at: int, content: bytes):
    def damage(folder: Path) -> None:
        with (folder / "train.beton").open("r+b") as file:
            file.seek(at)
            file.write(content)

    return damage


def describe(**changes):
    def damage(folder: Path) -> None:
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def forge(row: dict[str, int], allocation: dict[str, int]):
    """Change the first image's row and its allocation together, so that they agree with each other."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / "train.beton").read_bytes())
        end = int(np.frombuffer(content, beton_file.HEADER, 1)["alloc_table_ptr"][0])
        first = np.frombuffer(content, beton_file.ROW, 1, FIRST_ROW)["f0"]
        allocations = np.frombuffer(content, beton_file.ALLOCATION, TRAIN, end)
        entry = int(np.flatnonzero(allocations["ptr"] == first["data_ptr"][0])[0])
        for name, value in row.items():
            first[name] = value
        for name, value in allocation.items():
            allocations[name][entry] = value
        (folder / "train.beton").write_bytes(content)

    return damage


# The header and two field descriptors come before the first row: mode, width, height, address; label.
FIRST_ROW = beton_file.HEADER.itemsize + 2 * beton_file.FIELD.itemsize


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "train.beton", (folder / "train.beton").stat().st_size - 1),
         r"train\.beton .*may be cut short"),
        (lambda folder: os.truncate(folder / "test.beton", 2), r"test\.beton .*cut short"),
        (lambda folder: (folder / "test.beton").unlink(), r"test\.beton .*does not exist"),
        (overwrite(0, b"\x09"), "header is not FFCV's"),
        (overwrite(beton_file.HEADER.itemsize, b"\0"), "its fields are"),
        (overwrite(FIRST_ROW + 1, b"\x21"), "not all 32x32"),
        (overwrite(FIRST_ROW + beton_file.ROW.fields["f1"][1], b"\3"), r"labels lie in 0\.\.3, outside the 3 classes"),
        (forge({"data_ptr": 1 << 40}, {"ptr": 1 << 40}), "outside the stored images"),
        (forge({"data_ptr": (1 << 21) + 1}, {}), "outside the stored images"),
        (forge({}, {"size": 3071}), "outside the stored images"),
        (forge({"mode": 0}, {"size": 1 << 30}), "outside the stored images"),
        (describe(counts={"train": 151, "test": TEST}), "holds 150 images and dataset.json says 151"),
        (describe(classes=["airplane", "automobile"]), "outside the 2 classes"),
        (describe(shape=[3, 32]), "dataset.json cannot be read"),
        (describe(shape=[4, 32, 32]), "says 4 channels"),
        (lambda folder: (folder / "dataset.json").unlink(), "is read together with the dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "dataset.json cannot be read"),
    ],
)  # fmt: skip
def test_damaged_beton(damage, message, prepared, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_dataset(folder / "train.beton")


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("file/out", {}, "cannot write to"),
        ("pets", {}, "exists already"),
        ("out", {"write_mode": "row"}, "unknown write mode 'row'; did you mean 'raw'"),
        ("out", {"jpeg_quality": 0}, "jpeg_quality=0"),
    ],
)
def test_prepare_refuses_before_work(out, options, message, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("images were decoded"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=message):
        prepare(folder, tmp_path / out, data_dir=tmp_path / "data", **options)


def test_prepare_refuses_what_is_prepared(prepared, tmp_path):
    with pytest.raises(UserError, match=r"in \.beton format already"):
        prepare(prepared, tmp_path / "out")


def test_prepare_that_fails_leaves_nothing(ffcv, tmp_path, monkeypatch):
    def fail(sample, row, *_):
        if row == 7:
            raise OSError(28, "No space left on device")

    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    monkeypatch.setattr(ffcv, "handle_sample", fail)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        prepare("digits", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert (set(shared.iterdir()) if shared.exists() else set()) <= before


def test_ffcv_that_is_not_installed(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv.fields", None)
    monkeypatch.setattr(beton, "ffcv_parts", beton.ffcv_parts.__wrapped__)
    threads = torch.get_num_threads()
    with pytest.raises(UserError, match=r"FFCV cannot be imported .*pip install 'fastarat\[ffcv\]'"):
        prepare(folder, tmp_path / "out", data_dir=tmp_path / "data")
    assert torch.get_num_threads() == threads
    assert not (tmp_path / "out").exists()
