"""Data sets, the validation split, both loaders and the augmentation, on small files of the real formats."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import shutil
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import CLASSES, TEST, TRAIN, cifar_files, images_of, place_cifar, write_archive
from PIL import Image

from fastarat import data
from fastarat.data import Augment, augment, beton, derive_seed, load_dataset, make_loader, prepare
from fastarat.errors import UserError


@pytest.fixture
def cifar_dir(tmp_path, monkeypatch) -> Path:
    place_cifar(tmp_path / "data", monkeypatch)
    return tmp_path / "data"


def draw_folder(root: Path, layout: dict[str, int], size=(12, 12), mode: str = "RGB", suffix: str = ".png") -> None:
    """Write `count` random images into each folder of `layout`."""
    rng = np.random.default_rng(0)
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            pixels = rng.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels, mode).save(root / folder / f"{number}{suffix}")


FOLDER = {"train/cat": 20, "train/dog": 10, "test/cat": 3, "test/dog": 2}


@pytest.fixture
def folder(tmp_path) -> Path:
    draw_folder(tmp_path / "pets", FOLDER)
    return tmp_path / "pets"


@pytest.fixture(scope="session")
def prepared(ffcv, tmp_path_factory) -> Path:
    """The small CIFAR-10 as .beton, once for all tests that only read it."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        place_cifar(root / "data", monkeypatch)
        return prepare("cifar10", root / "beton", data_dir=root / "data")


def copied(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


# Sources


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archive_is_parsed(name, tmp_path, monkeypatch):
    place_cifar(tmp_path / "data", monkeypatch, name)
    loaded = load_dataset(name, data_dir=tmp_path / "data", val_images=0)
    images, labels = images_of(0, TRAIN)
    assert loaded.classes == CLASSES
    assert loaded.shape == (3, 32, 32)
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
        url = f"http://127.0.0.1:{server.server_port}/{data.ARCHIVES['cifar10'].file_name}"
        good = replace(data.ARCHIVES["cifar10"], url=url)
        monkeypatch.setitem(data.ARCHIVES, "cifar10", replace(good, md5="0" * 32))
        with pytest.raises(UserError, match="cannot download"):
            load_dataset("cifar10", data_dir=tmp_path / "data")
        assert not list((tmp_path / "data").iterdir())
        monkeypatch.setitem(data.ARCHIVES, "cifar10", good)
        assert len(load_dataset("cifar10", data_dir=tmp_path / "data").test) == TEST
        server.shutdown()
    assert len(load_dataset("cifar10", data_dir=tmp_path / "data", download=False).test) == TEST


def test_no_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    archive = replace(data.ARCHIVES["cifar10"], url="http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setitem(data.ARCHIVES, "cifar10", archive)
    with pytest.raises(UserError, match=r"cannot download .* place it at .*cifar-10-binary\.tar\.gz"):
        load_dataset("cifar10", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"downloading is off.* place it at"):
        load_dataset("cifar10", data_dir=tmp_path, download=False)


def test_registry_names_the_published_archives():
    assert data.ARCHIVES["cifar10"].md5 == "c32a1d4ab5d03f1284b67883e8d87530"
    assert data.ARCHIVES["cifar100"].md5 == "03b5dce01913d631647c71ecec9e9cb8"
    assert {archive.train_images for archive in data.ARCHIVES.values()} == {50_000}


def truncate(files: dict[str, bytes]) -> None:
    files["cifar-10-batches-bin/data_batch_5.bin"] = files["cifar-10-batches-bin/data_batch_5.bin"][:-1]


def forget(files: dict[str, bytes]) -> None:
    del files["cifar-10-batches-bin/test_batch.bin"]


def mislabel(files: dict[str, bytes]) -> None:
    name = "cifar-10-batches-bin/data_batch_1.bin"
    files[name] = bytes([len(CLASSES)]) + files[name][1:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "bytes, not 150 records"), (forget, "does not hold test_batch.bin"), (mislabel, "label 3")],
)
def test_archive_with_wrong_contents(damage, message, tmp_path, monkeypatch):
    files = cifar_files()
    damage(files)
    place_cifar(tmp_path / "data", monkeypatch, files=files)
    with pytest.raises(UserError, match=message):
        load_dataset("cifar10", data_dir=tmp_path / "data")


def test_damaged_archive(cifar_dir, monkeypatch):
    path = next(cifar_dir.iterdir())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"has md5 \w+, expected .*delete it"):
        load_dataset("cifar10", data_dir=cifar_dir)
    archive = replace(data.ARCHIVES["cifar10"], md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setitem(data.ARCHIVES, "cifar10", archive)
    with pytest.raises(UserError, match="damaged or cut short"):
        load_dataset("cifar10", data_dir=cifar_dir)


def test_digits():
    digits = load_dataset("digits")
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1437 - 143, 143, 360)
    assert digits.shape == (1, 8, 8)
    assert digits.train.images.shape[1:] == (8, 8, 1)
    assert digits.train.images.max() == 255
    assert set(digits.test.labels.tolist()) == set(range(10))
    seen = torch.cat([split.images.flatten(1) for split in (digits.train, digits.val, digits.test)])
    from sklearn.datasets import load_digits

    # Every image is there once: the sorted rows equal those of the source.
    source = torch.from_numpy(load_digits().images).flatten(1)
    assert torch.equal(seen.double().div(255 / 16).round().sort(0).values, source.sort(0).values)


def test_digits_test_split_never_moves():
    """A checksum of the held-out images in order, as of the first release: published numbers depend on them."""
    test = load_dataset("digits").test
    assert int((test.images.long().sum((1, 2, 3)) * torch.arange(1, 361)).sum()) == 323332393


@pytest.mark.parametrize(("val_images", "expected"), [(None, 15), (0, 0), (31, 31)])
def test_validation_split(val_images, expected, cifar_dir):
    first = load_dataset("cifar10", data_dir=cifar_dir, val_images=val_images)
    again = load_dataset("cifar10", data_dir=cifar_dir, val_images=val_images)
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
        other = load_dataset("cifar10", data_dir=cifar_dir, val_images=val_images, val_seed=1)
        assert not torch.equal(first.val.indices, other.val.indices)


def test_stratified_indices_keep_proportions():
    labels = np.repeat([0, 1, 2], [700, 200, 100])
    chosen = data.stratified_indices(labels, 55, 0)
    # 38.5, 11 and 5.5 by proportion; the half image goes to the first of the equal remainders.
    assert np.bincount(labels[chosen]).tolist() == [39, 11, 5]
    assert len(set(chosen.tolist())) == 55


def test_default_validation_split_of_a_large_set(tmp_path, monkeypatch):
    labels = np.arange(20_000) % 10
    part = data._Part(np.zeros((20_000, 1, 1, 1), np.uint8), labels)
    stored = data._Stored("large", tuple("0123456789"), (1, 1, 1), part, part, "here")
    monkeypatch.setattr(data, "_open", lambda *_: stored)
    assert len(load_dataset("large").val) == 1000


@pytest.mark.parametrize("val_images", [-1, TRAIN])
def test_validation_split_that_does_not_fit(val_images, cifar_dir):
    with pytest.raises(UserError, match=f"val_images={val_images} .* 150 training images"):
        load_dataset("cifar10", data_dir=cifar_dir, val_images=val_images)


# Image folders


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
    with pytest.warns(UserWarning, match="10 of 50 images are held out"):
        loaded = load_dataset(tmp_path / "pets", data_dir=tmp_path / "data", val_images=0)
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
    expected = torch.from_numpy(np.asarray(whole)[:, 2:12].copy())
    assert torch.equal(resized.test.images[3], expected)


def test_decoded_images_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    folder = tmp_path / "pets"
    draw_folder(folder, FOLDER, suffix=".bmp")
    first = load_dataset(folder, data_dir=tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", lambda *_: pytest.fail("decoded again"))
        again = load_dataset(folder, data_dir=tmp_path / "data")
    assert torch.equal(first.train.images, again.train.images)

    # A .bmp keeps its size, so its time alone says that it changed.
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(folder / "test/dog/1.bmp")
    changed = load_dataset(folder, data_dir=tmp_path / "data")
    assert changed.test.images[4].max() == 0
    kept = list((tmp_path / "data/decoded").iterdir())
    assert len(kept) == 1  # the stale copy is gone

    kept[0].write_bytes(kept[0].read_bytes()[:-100])
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
        monkeypatch.setattr(
            tarfile.TarFile, "extraction_filter", staticmethod(lambda member, path: member), raising=False
        )


@pytest.mark.usefixtures("any_python")
def test_tar_archive_is_unpacked_once(folder, tmp_path, monkeypatch):
    archive = pack(folder, tmp_path / "pets.tar.xz")
    first = load_dataset(archive, data_dir=tmp_path / "data")
    assert first.name == "pets"
    assert torch.equal(first.train.images, load_dataset(folder, data_dir=tmp_path / "data").train.images)
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("unpacked again"))
    load_dataset(archive, data_dir=tmp_path / "data")


@pytest.mark.usefixtures("any_python")
@pytest.mark.parametrize("name", ["../../escaped.png", "{root}/escaped.png"])
def test_tar_archive_cannot_write_outside(tmp_path, name):
    write_archive(tmp_path / "evil.tar.gz", {"fine.png": b"x", name.format(root=tmp_path): b"x"})
    with pytest.raises(UserError, match="cannot unpack" if name.startswith("..") else ""):
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
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(UserError, match="cannot unpack"):
        load_dataset(archive, data_dir=tmp_path / "data")


def one_class(root: Path) -> None:
    shutil.rmtree(root / "train/dog")


def empty_class(root: Path) -> None:
    (root / "train/dog").rename(root / "dogs")
    (root / "train/dog").mkdir()


def unknown_test_class(root: Path) -> None:
    (root / "test/dog").rename(root / "test/fox")


def broken_image(root: Path) -> None:
    path = root / "train/dog/3.png"
    path.write_bytes(path.read_bytes()[:60])


def deep_image(root: Path) -> None:
    Image.fromarray(np.zeros((12, 12), np.uint16)).save(root / "train/dog/3.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (one_class, "holds 1 class folders; expected two or more"),
        (empty_class, "class folder .*dog holds no images"),
        (unknown_test_class, "class 'dog' has a folder in .*train but none in .*test"),
        (broken_image, r"cannot read image .*dog/3\.png"),
        (deep_image, r"cannot read image .*dog/3\.png.*more than 8 bits"),
    ],
)
def test_broken_folder(damage, message, folder, tmp_path):
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_dataset(folder, data_dir=tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.npy*"))


def test_single_level_class_of_one_image(tmp_path):
    draw_folder(tmp_path / "pets", {"cat": 30, "dog": 1})
    with pytest.raises(UserError, match="class of one image"):
        load_dataset(tmp_path / "pets", data_dir=tmp_path / "data")


def test_names_and_paths_that_do_not_exist(tmp_path):
    with pytest.raises(UserError, match=r"unknown dataset 'cifar1'; did you mean 'cifar10'\?"):
        load_dataset("cifar1")
    with pytest.raises(UserError, match="does not exist"):
        load_dataset(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(UserError, match=r"notes.txt is not a data set"):
        load_dataset(tmp_path / "notes.txt")


def test_data_dir_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*choose another"):
        load_dataset(folder, data_dir=tmp_path / "file/data")


@pytest.mark.parametrize("image_size", [0, 64])
def test_image_size_is_for_folders(image_size):
    with pytest.raises(UserError, match=f"image_size={image_size}"):
        load_dataset("digits", image_size=image_size)


# Seeds and augmentation


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


def by_hand(image: torch.Tensor, padding: int, down: int, right: int, flipped: bool) -> torch.Tensor:
    """Crop and flip one uint8 [C, H, W] image, pixel by pixel."""
    channels, height, width = image.shape
    result = torch.zeros(channels, height, width)
    for row in range(height):
        for column in range(width):
            from_row, from_column = row + down - padding, column + right - padding
            if 0 <= from_row < height and 0 <= from_column < width:
                target = width - 1 - column if flipped else column
                result[:, row, target] = image[:, from_row, from_column].float() / 255
    return result


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
    assert min(used.values()) > 0  # every offset and both directions are drawn
    assert max(used.values()) < 4 * 150 / len(choices)


def test_augment_draws_each_offset_for_itself():
    """Of 400 equal images no row, column or direction decides another: all 18 combinations turn up."""
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).expand(400, 1, 4, 4)
    results = augment(images, Augment(1, True), torch.Generator().manual_seed(1))
    assert len({result.numpy().tobytes() for result in results}) == 18


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
    assert augment(images, Augment(4, True)).shape == (8, 3, 32, 32)


def test_default_augment(folder, cifar_dir, tmp_path):
    assert data.default_augment(load_dataset("digits")) == Augment(padding=1, flip=False)
    assert data.default_augment(load_dataset("cifar10", data_dir=cifar_dir)) == Augment(padding=4, flip=True)
    assert data.default_augment(load_dataset(folder, data_dir=tmp_path)) == Augment(padding=1, flip=True)
    with pytest.raises(UserError, match="padding=-1"):
        Augment(padding=-1)


# Loaders


def batches(loader, epoch: int = 0):
    return list(loader.epoch(epoch))


@pytest.fixture
def cifar(cifar_dir):
    return load_dataset("cifar10", data_dir=cifar_dir)


def test_resident_loader_visits_every_image_once(cifar):
    loader = make_loader(cifar.train, batch_size=32, device="cpu", shuffle=True)
    got = batches(loader)
    assert (loader.kind, len(loader)) == ("resident", 5)
    assert [len(batch.labels) for batch in got] == [32, 32, 32, 32, 7]
    index = torch.cat([batch.index for batch in got])
    assert sorted(index.tolist()) == list(range(135))
    assert index.tolist() != list(range(135))
    images = torch.cat([batch.images for batch in got])
    assert torch.equal(images, cifar.train.images[index].permute(0, 3, 1, 2) / 255)
    assert torch.equal(torch.cat([batch.labels for batch in got]), cifar.train.labels[index])
    assert got[0].images.is_contiguous(memory_format=torch.channels_last)
    assert got[0].images.dtype == torch.float32
    assert got[0].index.dtype == torch.int64


def test_drop_last_and_no_shuffle(cifar):
    loader = make_loader(cifar.train, batch_size=32, device="cpu", drop_last=True)
    assert len(loader) == 4
    assert torch.cat([batch.index for batch in batches(loader)]).tolist() == list(range(128))


def test_loader_of_an_empty_split(cifar_dir):
    val = load_dataset("cifar10", data_dir=cifar_dir, val_images=0).val
    loader = make_loader(val, batch_size=8, device="cpu", shuffle=True)
    assert len(loader) == len(batches(loader)) == 0


def same(first, second) -> bool:
    return all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


def test_an_epoch_depends_on_seed_and_number_only(cifar):
    def loader(seed):
        return make_loader(cifar.train, batch_size=32, device="cpu", shuffle=True, seed=seed, augment=Augment(4, True))

    used = loader(0)
    torch.manual_seed(1)
    second = batches(used, 1)
    torch.manual_seed(2)
    batches(used, 0)
    assert same(second, batches(used, 1))
    assert same(second, batches(loader(0), 1))
    assert not torch.equal(second[0].index, batches(used, 2)[0].index)
    assert not torch.equal(second[0].index, batches(loader(1), 1)[0].index)
    unshuffled = make_loader(cifar.train, batch_size=32, device="cpu", augment=Augment(4, True))
    assert not torch.equal(batches(unshuffled, 0)[0].images, batches(unshuffled, 1)[0].images)


def test_loader_choices_that_cannot_work(cifar):
    with pytest.raises(UserError, match="unknown loader 'fcv'; did you mean 'ffcv'"):
        make_loader(cifar.train, batch_size=8, device="cpu", kind="fcv")
    with pytest.raises(UserError, match="fastarat data prepare"):
        make_loader(cifar.train, batch_size=8, device="cpu", kind="ffcv")
    with pytest.raises(UserError, match="batch_size=0"):
        make_loader(cifar.train, batch_size=0, device="cpu")


def test_auto_refuses_what_fits_nowhere(cifar, monkeypatch):
    monkeypatch.setattr(data, "_fits", lambda *_: (False, "9 GB of pixels, more than a quarter of 1 GB"))
    with pytest.raises(UserError, match=r"9 GB of pixels.*fastarat data prepare"):
        make_loader(cifar.train, batch_size=8, device="cpu")
    assert make_loader(cifar.train, batch_size=8, device="cpu", kind="resident").kind == "resident"


# FFCV


def test_ffcv_equals_resident(prepared, cifar):
    """Through a real .beton file: the same pixels, labels and order, over two epochs, before and after augmentation."""
    streamed = load_dataset(prepared)
    assert (streamed.name, streamed.classes, streamed.shape) == (cifar.name, cifar.classes, cifar.shape)
    for name in ("train", "val", "test"):
        here, there = getattr(cifar, name), getattr(streamed, name)
        assert there.images is None
        assert torch.equal(here.labels, there.labels)
        assert torch.equal(here.indices, there.indices)
        for recipe in (None, Augment(4, True)):
            options = {"batch_size": 32, "device": "cpu", "shuffle": name != "test", "seed": 3, "augment": recipe}
            expected = make_loader(here, **options)
            found = [make_loader(there, kind=kind, **options) for kind in ("ffcv", "resident")]
            assert [loader.kind for loader in found] == ["ffcv", "resident"]
            for epoch in (0, 1):
                wanted = batches(expected, epoch)
                assert all(same(wanted, batches(loader, epoch)) for loader in found)


def test_ffcv_drop_last_and_path_to_file(prepared):
    train = load_dataset(prepared / "train.beton").train
    loader = make_loader(train, batch_size=32, device="cpu", kind="ffcv", shuffle=True, drop_last=True)
    assert [len(batch.labels) for batch in batches(loader)] == [32] * 4 == [32] * len(loader)


def test_ffcv_loaders_may_run_at_once_and_stop_early(prepared):
    streamed = load_dataset(prepared)
    threads, running = torch.get_num_threads(), threading.active_count()
    train, val = (
        make_loader(split, batch_size=4, device="cpu", kind="ffcv") for split in (streamed.train, streamed.val)
    )
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
    loader = make_loader(load_dataset(prepared).train, batch_size=32, device="cpu", kind="ffcv")
    with pytest.raises(RuntimeError, match="FFCV failed while reading") as raised:
        batches(loader)
    assert "the disk is gone" in str(raised.value.__cause__)


def test_auto_streams_what_does_not_fit(prepared, monkeypatch):
    train = load_dataset(prepared).train
    size = 135 * 3 * 32 * 32
    for room, kind, relation in ((4 * size, "resident", "at most"), (4 * size - 1, "ffcv", "more than")):
        monkeypatch.setattr(data, "_host_bytes", lambda room=room: room)
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
    kinds = ((digits.val, "resident"), (streamed.val, "ffcv"))
    assert same(*(batches(make_loader(split, batch_size=64, device="cpu", kind=kind)) for split, kind in kinds))
    assert data.info(first) | {"source": ""} == data.info("digits") | {"source": ""}


def test_prepare_as_jpeg(ffcv, tmp_path):
    ramp = np.add.outer(np.arange(16), np.arange(16))[..., None] * np.array([8, 4, 2])
    for name in FOLDER:
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(4):
            image = Image.fromarray((ramp + 2 * number).clip(0, 255).astype(np.uint8))
            image.save(tmp_path / "pets" / name / f"{number}.png")
    source = load_dataset(tmp_path / "pets", data_dir=tmp_path / "data")
    out = prepare(tmp_path / "pets", tmp_path / "beton", data_dir=tmp_path / "data", write_mode="jpg", jpeg_quality=95)
    streamed = load_dataset(out)
    assert not streamed.train.raw
    assert "quality 95" in streamed.notes[0]
    kinds = ((source.train, "resident"), (streamed.train, "ffcv"))
    lossless, lossy = (batches(make_loader(s, batch_size=4, device="cpu", kind=kind))[0] for s, kind in kinds)
    assert torch.equal(lossless.labels, lossy.labels)
    assert 0 < (lossless.images - lossy.images).abs().mean() < 0.02


def cut(folder: Path) -> None:
    path = folder / "train.beton"
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_nothing(folder: Path) -> None:
    (folder / "test.beton").write_bytes(b"\2\0")


def lose(folder: Path) -> None:
    (folder / "test.beton").unlink()


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
        end = int(np.frombuffer(content, beton._HEADER, 1)["alloc_table_ptr"][0])
        first = np.frombuffer(content, beton._ROW, 1, FIRST_ROW)["f0"]
        allocations = np.frombuffer(content, beton._ALLOCATION, TRAIN, end)
        entry = int(np.flatnonzero(allocations["ptr"] == first["data_ptr"][0])[0])
        for name, value in row.items():
            first[name] = value
        for name, value in allocation.items():
            allocations[name][entry] = value
        (folder / "train.beton").write_bytes(content)

    return damage


# The header and two field descriptors come before the first row: mode, width, height, address; label.
FIRST_ROW = beton._HEADER.itemsize + 2 * beton._FIELD.itemsize


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"train\.beton .*may be cut short"),
        (cut_to_nothing, r"test\.beton .*cut short"),
        (lose, r"test\.beton .*does not exist"),
        (overwrite(0, b"\x09"), "header is not FFCV's"),
        (overwrite(beton._HEADER.itemsize, b"\0"), "its fields are"),
        (overwrite(FIRST_ROW + 1, b"\x21"), "not all 32x32"),
        (overwrite(FIRST_ROW + beton._ROW.fields["f1"][1], b"\3"), r"labels lie in 0\.\.3, outside the 3 classes"),
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
)
def test_damaged_beton(damage, message, prepared, tmp_path):
    folder = copied(prepared, tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_dataset(folder / "train.beton")


def test_prepare_refuses_before_work(prepared, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("images were decoded"))
    (tmp_path / "file").write_text("in the way")
    for options, message in (
        ({"out": tmp_path / "file/out"}, "cannot write to"),
        ({"out": folder}, "exists already"),
        ({"out": tmp_path / "out", "write_mode": "row"}, "unknown write mode 'row'; did you mean 'raw'"),
        ({"out": tmp_path / "out", "jpeg_quality": 0}, "jpeg_quality=0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(folder, data_dir=tmp_path / "data", **options)
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


def test_info(cifar_dir):
    described = data.info("cifar10", data_dir=cifar_dir)
    assert json.loads(json.dumps(described)) == described
    assert described["train_images"] == TRAIN
    assert described["train_images_per_class"] == [50, 50]
    assert described["decoded_bytes"] == (TRAIN + TEST) * 3072
