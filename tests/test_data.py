"""Data sets, where they come from and how they are split, on small files of the real formats."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import CLASSES, FOLDER, TEST, TRAIN, cifar_files, draw_folder, images_of, place_cifar, write_archive
from PIL import Image
from sklearn.datasets import load_digits

from fastarat import data
from fastarat.data import derive_seed, load_dataset
from fastarat.errors import UserError


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archive_is_parsed(name, tmp_path, monkeypatch):
    place_cifar(tmp_path / "data", monkeypatch, name)
    loaded = load_dataset(name, data_dir=tmp_path / "data", val_images=0)
    images, labels = images_of(0, TRAIN)
    assert (loaded.classes, loaded.shape) == (CLASSES, (3, 32, 32))
    assert torch.equal(loaded.train.images, torch.from_numpy(images).permute(0, 2, 3, 1))
    assert torch.equal(loaded.train.labels, torch.from_numpy(labels))
    assert torch.equal(loaded.test.images, torch.from_numpy(images_of(1, TEST)[0]).permute(0, 2, 3, 1))
    assert loaded.train.labels.dtype == torch.int64
    assert len(loaded.val) == 0


def test_archive_is_downloaded_and_checked(tmp_path, monkeypatch):
    place_cifar(tmp_path / "served", monkeypatch)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    monkeypatch.setattr(handler.func, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{data.SETS['cifar10'].file_name}"
        good = replace(data.SETS["cifar10"], url=url)
        monkeypatch.setitem(data.SETS, "cifar10", replace(good, md5="0" * 32))
        with pytest.raises(UserError, match="cannot download"):
            load_dataset("cifar10", data_dir=tmp_path / "data")
        assert not list((tmp_path / "data").iterdir())
        monkeypatch.setitem(data.SETS, "cifar10", good)
        assert len(load_dataset("cifar10", data_dir=tmp_path / "data").test) == TEST
        server.shutdown()
    assert len(load_dataset("cifar10", data_dir=tmp_path / "data", download=False).test) == TEST


def test_no_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    archive = replace(data.SETS["cifar10"], url="http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setitem(data.SETS, "cifar10", archive)
    with pytest.raises(UserError, match=r"cannot download .* place it at .*cifar-10-binary\.tar\.gz"):
        load_dataset("cifar10", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"downloading is off.* place it at"):
        load_dataset("cifar10", data_dir=tmp_path, download=False)


def test_registry_names_the_published_archives():
    archives = data.SETS["cifar10"], data.SETS["cifar100"]
    assert [a.md5 for a in archives] == ["c32a1d4ab5d03f1284b67883e8d87530", "03b5dce01913d631647c71ecec9e9cb8"]
    assert {(a.train_images, a.test_images) for a in archives} == {(50_000, 10_000)}


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("data_batch_5.bin", lambda content: content[:-1], "bytes, not 150 records"),
        ("data_batch_1.bin", lambda content: bytes([len(CLASSES)]) + content[1:], "label 3"),
        ("test_batch.bin", None, "does not hold test_batch.bin"),
    ],
)
def test_archive_with_wrong_contents(name, damage, message, tmp_path, monkeypatch):
    files = cifar_files()
    content = files.pop(f"cifar-10-batches-bin/{name}")
    if damage:
        files[f"cifar-10-batches-bin/{name}"] = damage(content)
    place_cifar(tmp_path / "data", monkeypatch, files=files)
    with pytest.raises(UserError, match=message):
        load_dataset("cifar10", data_dir=tmp_path / "data")


def test_damaged_archive(cifar_dir, monkeypatch):
    path = next(cifar_dir.iterdir())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"has md5 \w+, expected .*delete it"):
        load_dataset("cifar10", data_dir=cifar_dir)
    archive = replace(data.SETS["cifar10"], md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setitem(data.SETS, "cifar10", archive)
    with pytest.raises(UserError, match="damaged or cut short"):
        load_dataset("cifar10", data_dir=cifar_dir)


def test_digits():
    digits = load_dataset("digits")
    splits = digits.train, digits.val, digits.test
    assert [len(split) for split in splits] == [1437 - 143, 143, 360]
    assert digits.shape == (1, 8, 8)
    assert digits.train.images.shape[1:] == (8, 8, 1)
    assert digits.train.images.max() == 255
    assert set(digits.test.labels.tolist()) == set(range(10))
    # Every image is there once: the sorted rows equal those of the source.
    seen = torch.cat([split.images.flatten(1) for split in splits]).double().div(255 / 16).round()
    assert torch.equal(seen.sort(0).values, torch.from_numpy(load_digits().images).flatten(1).sort(0).values)
    # A checksum of the held-out images in order, as of the first release: published numbers depend on them.
    assert int((digits.test.images.long().sum((1, 2, 3)) * torch.arange(1, 361)).sum()) == 323332393


@pytest.mark.parametrize(("val_images", "expected"), [(None, 15), (0, 0), (31, 31)])
def test_validation_split(val_images, expected, cifar_dir):
    first, again, other = (
        load_dataset("cifar10", data_dir=cifar_dir, val_images=val_images, val_seed=seed) for seed in (0, 0, 1)
    )
    train, val = set(first.train.indices.tolist()), set(first.val.indices.tolist())
    assert len(val) == expected
    assert not train & val
    assert train | val == set(range(TRAIN))
    assert torch.equal(first.val.indices, again.val.indices)
    images, labels = images_of(0, TRAIN)
    assert torch.equal(first.val.labels, torch.from_numpy(labels)[first.val.indices])
    assert torch.equal(first.val.images, torch.from_numpy(images).permute(0, 2, 3, 1)[first.val.indices])
    if expected:
        assert np.ptp(np.bincount(first.val.labels)) <= 1  # the classes are of equal size
        assert not torch.equal(first.val.indices, other.val.indices)


def test_stratified_indices_keep_proportions():
    labels = np.repeat([0, 1, 2], [700, 200, 100])
    chosen = data.stratified_indices(labels, 55, 0)
    # 38.5, 11 and 5.5 by proportion; the half image goes to the first of the equal remainders.
    assert np.bincount(labels[chosen]).tolist() == [39, 11, 5]
    assert len(set(chosen.tolist())) == 55


def test_one_entry_adds_a_named_set(monkeypatch):
    """Its default validation split is that of a large set."""
    part = data.Split.of(np.zeros((20_000, 1, 1, 1), np.uint8), np.arange(20_000) % 10)
    stored = data.Stored("large", tuple("0123456789"), part, part, "here")
    monkeypatch.setitem(data.SETS, "large", lambda *_: stored)
    assert len(load_dataset("large").val) == 1000
    with pytest.raises(UserError, match="did you mean 'large'"):
        load_dataset("larg")


def test_image_folder(folder, tmp_path):
    loaded = load_dataset(folder, data_dir=tmp_path / "data", val_images=0)
    assert (loaded.name, loaded.classes, loaded.shape) == ("pets", ("cat", "dog"), (3, 12, 12))
    assert np.bincount(loaded.train.labels).tolist() == [20, 10]
    assert np.bincount(loaded.test.labels).tolist() == [3, 2]
    expected = np.asarray(Image.open(folder / "test/dog/1.png"))
    assert torch.equal(loaded.test.images[4], torch.from_numpy(expected.copy()))
    assert loaded.notes == ()


def test_val_folder_serves_as_test(folder, tmp_path):
    (folder / "test").rename(folder / "val")
    assert len(load_dataset(folder, data_dir=tmp_path / "data").test) == 5
    draw_folder(folder, {"test/cat": 1, "test/dog": 1})
    both = load_dataset(folder, data_dir=tmp_path / "data")
    assert len(both.test) == 2
    assert "val is not used" in both.notes[0]


def test_single_level_folder_holds_out_a_test_set(tmp_path):
    draw_folder(tmp_path / "pets", {"cat": 30, "dog": 20})
    with pytest.warns(UserWarning, match="10 of 50 images are held out") as warned:
        loaded = load_dataset(tmp_path / "pets", data_dir=tmp_path / "data", val_images=0)
    assert warned[0].filename == __file__  # it points at the caller
    assert np.bincount(loaded.test.labels).tolist() == [6, 4]
    assert len(loaded.train) == 40
    assert "own test split" in loaded.name
    assert "held out" in loaded.notes[0]
    train = {image.numpy().tobytes() for image in loaded.train.images}
    assert not any(image.numpy().tobytes() in train for image in loaded.test.images)


def test_grey_images_keep_one_channel_until_a_colour_one_appears(tmp_path):
    draw_folder(tmp_path / "grey", FOLDER, mode="L")
    assert load_dataset(tmp_path / "grey", data_dir=tmp_path / "data").shape == (1, 12, 12)
    draw_folder(tmp_path / "grey", {"test/dog": 1})
    mixed = load_dataset(tmp_path / "grey", data_dir=tmp_path / "data", val_images=0)
    assert mixed.shape == (3, 12, 12)
    assert torch.equal(mixed.train.images[..., 0], mixed.train.images[..., 2])


def test_images_of_unequal_size_need_image_size(folder, tmp_path):
    draw_folder(folder, {"test/dog": 1}, size=(30, 20))
    with pytest.raises(UserError, match=r"differ in size: .*30x20 .*12x12; set image_size"):
        load_dataset(folder, data_dir=tmp_path / "data")
    resized = load_dataset(folder, data_dir=tmp_path / "data", image_size=10)
    assert resized.shape == (3, 10, 10)
    # Shorter side 20 to 10 makes 15x10; the centre square starts at column 2.
    whole = Image.open(folder / "test/dog/0.png").resize((15, 10), Image.Resampling.BILINEAR)
    assert torch.equal(resized.test.images[3], torch.from_numpy(np.asarray(whole)[:, 2:12].copy()))


def test_decoded_images_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    folder = draw_folder(tmp_path / "pets", FOLDER, suffix=".bmp")
    first = load_dataset(folder, data_dir=tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded again"))
        again = load_dataset(folder, data_dir=tmp_path / "data")
    assert torch.equal(first.train.images, again.train.images)

    # A .bmp keeps its size, so its time alone says that it changed.
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(folder / "test/dog/1.bmp")
    changed = load_dataset(folder, data_dir=tmp_path / "data")
    assert changed.test.images[4].max() == 0
    (kept,) = (tmp_path / "data/decoded").iterdir()  # the stale copy is gone

    os.truncate(kept, kept.stat().st_size - 100)
    assert torch.equal(load_dataset(folder, data_dir=tmp_path / "data").test.images, changed.test.images)


def pack(source: Path, path: Path) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        tar.add(source, arcname=source.name)
    return path


@pytest.fixture(params=["this Python", "before 3.11.4"])
def any_python(request, monkeypatch):
    """Python before 3.11.4 has no filter for what an archive may unpack."""
    if request.param == "before 3.11.4" and hasattr(tarfile, "data_filter"):
        monkeypatch.delattr(tarfile, "data_filter")
        trusting = staticmethod(lambda member, path: member)
        monkeypatch.setattr(tarfile.TarFile, "extraction_filter", trusting, raising=False)


@pytest.mark.usefixtures("any_python")
def test_tar_archive_is_unpacked_once(folder, tmp_path, monkeypatch):
    archive = pack(folder, tmp_path / "pets.tar.xz")
    first = load_dataset(archive, data_dir=tmp_path / "data")
    assert first.name == "pets"
    assert torch.equal(first.train.images, load_dataset(folder, data_dir=tmp_path / "data").train.images)
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("unpacked again"))
    load_dataset(archive, data_dir=tmp_path / "data")


@pytest.mark.usefixtures("any_python")
@pytest.mark.parametrize("name", ["../../escaped.png", "{root}/escaped.png"])
def test_tar_archive_cannot_write_outside(tmp_path, name):
    write_archive(tmp_path / "evil.tar.gz", {"fine.png": b"x", name.format(root=tmp_path): b"x"})
    with pytest.raises(UserError, match="cannot unpack" if name.startswith("..") else None):
        load_dataset(tmp_path / "evil.tar.gz", data_dir=tmp_path / "data")
    outside = [p for p in tmp_path.rglob("escaped.png") if not p.is_relative_to(tmp_path / "data/unpacked")]
    assert not outside  # Python's filter takes an absolute name for one inside
    if name.startswith(".."):
        assert not list((tmp_path / "data/unpacked").iterdir())


@pytest.mark.usefixtures("any_python")
def test_tar_archive_links_nowhere(tmp_path):
    (tmp_path / "target.png").write_bytes(b"x")
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("train/link.png")
        member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / "target.png")
        tar.addfile(member)
    with pytest.raises(UserError, match="cannot unpack"):
        load_dataset(tmp_path / "evil.tar.gz", data_dir=tmp_path / "data")


@pytest.mark.usefixtures("any_python")
def test_damaged_tar_archive(folder, tmp_path):
    archive = pack(folder, tmp_path / "pets.tar.xz")
    os.truncate(archive, archive.stat().st_size - 2000)
    with pytest.raises(UserError, match="cannot unpack"):
        load_dataset(archive, data_dir=tmp_path / "data")


DOG = "train/dog/3.png"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "train/dog"), "holds 1 class folders; expected two or more"),
        (lambda root: [file.unlink() for file in (root / "train/dog").iterdir()], "class folder .*dog holds no images"),
        (lambda root: (root / "test/dog").rename(root / "test/fox"), "'dog' has a folder in .*train but none in .*test"),
        (lambda root: (root / "train/dog").rename(root / "train/fox"), "'dog' has a folder in .*test but none in .*train"),
        (lambda root: os.truncate(root / DOG, 60), rf"cannot read image .*{DOG}"),
        (lambda root: Image.fromarray(np.zeros((12, 12), np.uint16)).save(root / DOG), rf"{DOG}.*more than 8 bits"),
        (lambda root: draw_folder(root / "train", {"ant": 1}).rename(root / "all"), "class of one image"),
    ],
)  # fmt: skip
def test_broken_folder(damage, message, folder, tmp_path):
    damage(folder)
    if (folder / "all").exists():  # a folder of one level
        folder = folder / "all"
    with pytest.raises(UserError, match=message):
        load_dataset(folder, data_dir=tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.npy*"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar1", {}, r"unknown dataset 'cifar1'; did you mean 'cifar10'\?"),
        ("a/nothing", {}, "does not exist: .* or one of digits, cifar10, cifar100"),
        ("notes.txt", {}, "notes.txt is not a data set"),
        ("pets", {"data_dir": "notes.txt/data"}, "cannot write to .*choose another"),
        ("digits", {"image_size": 0}, "image_size=0"),
        ("digits", {"image_size": 64}, "image_size=64"),
        ("digits", {"val_images": -1}, "val_images=-1 .* 1437 training images"),
        ("digits", {"val_images": 1437}, "val_images=1437 .* 1437 training images"),
    ],
)
def test_what_cannot_be_loaded(name, options, message, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("notes.txt").write_text("no images")
    with pytest.raises(UserError, match=message):
        load_dataset(name, **options)


def test_info(cifar_dir):
    described = data.info("cifar10", data_dir=cifar_dir)
    assert json.loads(json.dumps(described)) == described
    assert described["train_images"] == TRAIN
    assert described["train_images_per_class"] == [50, 50]
    assert described["decoded_bytes"] == (TRAIN + TEST) * 3072


def test_derive_seed():
    # BLAKE2b of b"[0]" to 8 bytes, shifted right once: the same for ever, or old runs cannot be repeated.
    assert derive_seed(0) == 6197007067532723406
    seeds = [derive_seed(seed, name, epoch) for seed in range(9) for name in ("a", "b") for epoch in range(9)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")
    assert derive_seed(1, 2) != derive_seed(1, "2")
    assert derive_seed(np.int64(1), np.int64(2)) == derive_seed(1, 2)
