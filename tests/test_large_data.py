"""Image files of any number and sizes: written in threads, resumed after a kill, read as seeded crops, page by page."""

import io
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import assert_same, trained

from benchmarks import loaders
from fastarat.cli import main
from fastarat.config import from_dict, read_yaml
from fastarat.data import (
    Augment,
    beton,
    beton_file,
    default_augment,
    info,
    load_dataset,
    make_loader,
    mean_std,
    prepare,
)
from fastarat.data.augmenting import augment
from fastarat.data.crops import DRAWS, centre_boxes, pagewise, random_boxes, uniform
from fastarat.data.preparing import Progress
from fastarat.data.writing import BetonWriter, Encoded
from fastarat.errors import UserError
from fastarat.schedules import recipe_of

COUNT = 40  # training images of a class


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Smooth images of many sizes, so that JPEG hardly changes them; the class is the slope."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", COUNT), ("test", 6)):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(40, 100, 2)
                ramp = np.add.outer(np.arange(height), (1 + c) * np.arange(width))
                pixels = np.stack([ramp // 2, ramp // 3, ramp // 4 + i], -1).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:03}.png")
    return root


@pytest.fixture(scope="module", params=["raw", "jpg", "proportion"])
def prepared(request, ffcv, photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    return prepare(photos, root / request.param, data_dir=root / "data", write_mode=request.param, jpeg_quality=95)


@pytest.fixture(scope="module")
def raw(ffcv, photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    return prepare(photos, root / "raw", data_dir=root / "data", workers=1)


def epoch(split, number=0, first=0, **options):
    options = {"batch_size": 16, "device": "cpu", "kind": "ffcv", "shuffle": True, "seed": 3} | options
    return list(make_loader(split, **options).epoch(number, first))


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )


def test_images_of_any_size_are_stored_as_they_are(prepared, photos):
    told = json.loads((prepared / "dataset.json").read_text())
    assert told["format"] == 2
    assert told["counts"] == {"train": 2 * COUNT, "test": 12}
    assert told["per_class"] == {"train": [COUNT, COUNT], "test": [6, 6]}
    assert told["sizes"]["smallest"] < told["sizes"]["largest"]
    assert {path.name for path in prepared.iterdir()} == {"train.beton", "test.beton", "dataset.json"}
    table = beton_file.survey(prepared / "train.beton")
    assert {"raw": 0, "jpg": 2 * COUNT}.get(prepared.name, table.jpeg.sum()) == table.jpeg.sum()
    assert prepared.name != "proportion" or 20 < table.jpeg.sum() < 60
    # Whole images at their own size, one by one, are what the files hold.
    stream = beton.crops_of(load_dataset(prepared, image_size=64, val_images=0).train)
    for row in (0, 7, 55):
        name, number = ("cat", row) if row < COUNT else ("dog", row - COUNT)
        source = np.asarray(Image.open(photos / "train" / name / f"{number:03}.png").crop((0, 0, 32, 32)))
        stream.side = 32
        [pixels] = stream.batches([np.array([row])], lambda rows: torch.tensor([[0], [0], [32], [32]]))
        assert np.abs(pixels[0].numpy().astype(int) - source).mean() <= (2 if table.jpeg[row] else 0)
    assert info(prepared)["train_images"] == 2 * COUNT
    assert "every byte" in info(prepared, verify=True)["verified"][0]


def test_sizes_of_their_own_need_an_image_size(raw):
    with pytest.raises(UserError, match="--image-size N, such as 224"):
        load_dataset(raw)


def test_an_epoch_of_crops_depends_on_seed_and_number_alone(prepared):
    data = load_dataset(prepared, image_size=32)
    recipe = default_augment(data)
    assert recipe == Augment(flip=True, scale=(0.08, 1.0))
    first = epoch(data.train, augment=recipe)
    assert first[0].images.shape == (16, 3, 32, 32)
    assert equal(first, epoch(data.train, augment=recipe))
    assert equal(first[2:], epoch(data.train, first=2, augment=recipe))  # resumed within the epoch: bit for bit
    other = epoch(data.train, 1, augment=recipe)
    assert not equal(first, other)
    # The crop of a row is the same however the rows are batched and ordered; a flip apart.
    still = Augment(scale=(0.08, 1.0))
    one = {int(i): image for b in epoch(data.train, augment=still) for i, image in zip(b.index, b.images, strict=True)}
    two = {
        int(i): image
        for b in epoch(data.train, augment=still, batch_size=7, order="pages")
        for i, image in zip(b.index, b.images, strict=True)
    }
    assert one.keys() == two.keys() == set(range(len(data.train)))
    assert all(torch.equal(one[i], two[i]) for i in one)


def test_evaluation_sees_the_centres_in_order_from_either_loader(raw):
    data = load_dataset(raw, image_size=48)
    streamed, kept = (epoch(data.test, shuffle=False, kind=kind) for kind in ("ffcv", "resident"))
    assert equal(streamed, kept)
    assert make_loader(data.test, batch_size=8, device="cpu").kind == "resident"
    training = make_loader(data.train, batch_size=8, device="cpu", augment=default_augment(data))
    assert (training.kind, training.reason) == ("ffcv", "crops are cut from the whole images")
    mean, std = mean_std(data.train)
    assert all(0 < value < 1 for value in mean + std)


def test_one_size_is_cut_to_another(ffcv, photos, tmp_path):
    """A folder prepared at one size is read at another, without preparing it again."""
    out = prepare(photos, tmp_path / "out", data_dir=tmp_path / "data", image_size=40)
    assert json.loads((out / "dataset.json").read_text())["format"] == 1
    whole, cut = load_dataset(out), load_dataset(out, image_size=32)
    assert (whole.shape, whole.train.crop) == ((3, 40, 40), False)
    assert (cut.shape, cut.train.crop) == ((3, 32, 32), True)
    assert epoch(cut.train)[0].images.shape == (16, 3, 32, 32)
    in_memory = load_dataset(photos, data_dir=tmp_path / "data", image_size=40)
    assert equal(epoch(whole.train), epoch(in_memory.train, kind="resident"))


def test_max_resolution_caps_the_longer_side(ffcv, photos, tmp_path):
    out = prepare(photos, tmp_path / "out", data_dir=tmp_path / "data", max_resolution=50)
    told = json.loads((out / "dataset.json").read_text())
    assert max(told["sizes"]["largest"]) == 50
    assert "50 pixels on the longer side" in told["notes"][0]


def test_workers_do_not_change_the_file(ffcv, raw, photos, tmp_path):
    again = prepare(photos, tmp_path / "again", data_dir=tmp_path / "data", workers=3)
    for name in ("train.beton", "test.beton"):
        assert (again / name).read_bytes() == (raw / name).read_bytes()


def test_the_writer_lays_out_what_ffcv_does(ffcv, tmp_path):
    """Byte for byte FFCV's own file of the same images in the same order, over several pages."""
    images = np.random.default_rng(0).integers(0, 256, (500, 48, 48, 3), np.uint8)
    labels = np.arange(500) % 7
    beton.write(tmp_path / "ffcv.beton", images, labels)
    page = beton_file.page_size(48, 48)
    with BetonWriter(tmp_path / "ours.beton", 500, page) as writer:
        for row, image in enumerate(images):
            writer.add(row, int(labels[row]), Encoded(48, 48, beton_file.MODES["raw"], image.reshape(-1)))
        writer.finish()
    assert (tmp_path / "ours.beton").read_bytes() == (tmp_path / "ffcv.beton").read_bytes()


KILLED = """
import os, signal, sys
from fastarat.data import prepare, preparing, writing
flush, seen = writing.BetonWriter._flush, []
def killed(self):
    flush(self)
    seen.append(1)
    if len(seen) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
writing.BetonWriter._flush = killed
preparing.page_size = lambda *_: 1 << 21
prepare(sys.argv[1], sys.argv[2], data_dir="data", workers=1)
"""


def test_a_killed_prepare_goes_on_and_ends_the_same(ffcv, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for name, count in (("train/a", 30), ("train/b", 30), ("test/a", 2), ("test/b", 2)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.repeat(np.repeat(rng.integers(0, 256, (20, 20, 3), np.uint8), 18, 0), 18, 1)
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{i}.bmp")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastarat.data.preparing.page_size", lambda *_: 1 << 21)
    whole = prepare("in", "whole", data_dir="data")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "in", "out", "3"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    flush, seen = BetonWriter._flush, []

    def interrupted(self):
        flush(self)
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # once more, and further on
        patch.setattr(BetonWriter, "_flush", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("in", "out", data_dir="data")
    decoded = []
    decode = sys.modules["fastarat.data.preparing"].decode
    monkeypatch.setattr("fastarat.data.preparing.decode", lambda path, *a: decoded.append(path) or decode(path, *a))
    prepare("in", "out", data_dir="data", progress=True)
    assert "goes on after the" in capsys.readouterr().err
    assert len(decoded) < 64  # what was written for good was not decoded again
    for name in ("train.beton", "test.beton", "dataset.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / ".out.unfinished").exists()


def test_what_was_left_of_other_images_is_not_gone_on_with(ffcv, photos, raw, tmp_path):
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / beton.WHAT).write_text("{}")
    (left / "train.journal").write_bytes(bytes(1000))
    prepare(photos, tmp_path / "out", data_dir=tmp_path / "data")
    assert (tmp_path / "out/train.beton").read_bytes() == (raw / "train.beton").read_bytes()


def test_a_damaged_jpeg_is_named_while_it_is_read(ffcv, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = prepare(photos, tmp_path / "out", data_dir=tmp_path / "data", write_mode="jpg")
    table = beton_file.survey(out / "train.beton")
    data = load_dataset(out, image_size=32, val_images=0)
    for at, why in ((table.sizes[5] - 200, "JPEG is damaged"), (2, "no frame header|does not")):
        content = (out / "train.beton").read_bytes()
        with (out / "train.beton").open("r+b") as file:
            file.seek(int(table.places[5] + at))
            file.write(bytes(150))
        with pytest.raises(UserError, match=rf"train\.beton is not .* row 5: .*({why})"):
            epoch(data.train)
        (out / "train.beton").write_bytes(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_resolution": 5000}, "max_resolution=5000"),
        ({"max_resolution": 50, "image_size": 50}, "one of the two"),
        ({"jpeg_share": 1.5}, "jpeg_share"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_prepare_options_that_cannot_be(options, message, photos, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare(photos, tmp_path / "out", data_dir=tmp_path / "data", **options)


def test_pages_are_read_in_one_stretch(monkeypatch):
    monkeypatch.setattr("fastarat.data.crops.POOL", 100)
    pages = np.random.default_rng(0).permutation(np.repeat(np.arange(50), 20))
    order, again = (pagewise(pages, torch.Generator().manual_seed(seed)) for seed in (1, 1))
    assert torch.equal(order, again)
    assert sorted(order.tolist()) == list(range(1000))
    seen = pages[order.numpy()]
    for page in range(50):
        at = np.flatnonzero(seen == page)
        assert at[-1] - at[0] < 100  # within its pool of five pages
    assert len(set(seen[:20].tolist())) > 1  # mixed with the others of the pool


def test_order_of_pages_is_of_streamed_images(raw):
    data = load_dataset(raw, image_size=32)
    assert make_loader(data.test, batch_size=4, device="cpu", shuffle=True, order="pages").kind == "ffcv"
    with pytest.raises(UserError, match="use the ffcv loader"):
        make_loader(data.test, batch_size=4, device="cpu", kind="resident", order="pages")
    with pytest.raises(UserError, match="unknown order"):
        make_loader(data.test, batch_size=4, device="cpu", order="page")


def test_boxes_are_those_of_torchvision():
    """Areas and ratios as asked for; the loop of torchvision's get_params, number by number."""
    heights, widths = torch.tensor([100, 60, 400, 8]), torch.tensor([80, 300, 50, 8])
    rows = np.arange(4).repeat(50)
    high, wide = heights.repeat_interleave(50), widths.repeat_interleave(50)
    draws = uniform(7, rows * 1000 + np.tile(np.arange(50), 4), DRAWS)
    boxes = random_boxes(draws, high, wide, (0.08, 1.0), (3 / 4, 4 / 3))
    for i in range(200):
        h, w, found = int(high[i]), int(wide[i]), None
        for k in range(10):
            area = h * w * (0.08 + 0.92 * float(draws[i, k]))
            aspect = np.exp(np.log(3 / 4) + float(draws[i, 10 + k]) * (np.log(4 / 3) - np.log(3 / 4)))
            ww, hh = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < ww <= w and 0 < hh <= h:
                found = (int(float(draws[i, 20]) * (h - hh + 1)), int(float(draws[i, 21]) * (w - ww + 1)), hh, ww)
                break
        if found is None:
            ww, hh = (w, round(w / (3 / 4))) if w / h < 3 / 4 else (round(h * 4 / 3), h)
            found = ((h - hh + 1) // 2, (w - ww + 1) // 2, hh, ww)
        assert tuple(boxes[:, i].tolist()) == found
    top, left, side, _ = centre_boxes(heights, widths)
    assert side.tolist() == [70, 52, 44, 7]
    assert (top + side <= heights).all()
    assert (left + side <= widths).all()


def test_resized_crops_on_the_device():
    """A whole-image crop changes nothing; a flip is a mirror; the draws are the generator's."""
    images = torch.randint(256, (6, 3, 20, 24), dtype=torch.uint8)
    whole = Augment(scale=(1.0, 1.0), ratio=(1.2, 1.2))
    assert torch.allclose(augment(images, whole, torch.Generator()), images / 255, atol=1e-5)
    flipped = augment(images, Augment(flip=True, scale=(1.0, 1.0), ratio=(1.2, 1.2)), torch.Generator().manual_seed(0))
    for image, source in zip(flipped, images / 255, strict=True):
        assert torch.allclose(image, source, atol=1e-5) or torch.allclose(image, source.flip(-1), atol=1e-5)
    cut = augment(images, Augment(scale=(0.1, 0.5)), torch.Generator().manual_seed(0))
    assert cut.shape == images.shape
    assert 0 <= cut.min() <= cut.max() <= 1
    with pytest.raises(UserError, match="two kinds of crop"):
        Augment(padding=4, scale=(0.1, 1.0))


def test_progress_on_a_pipe_is_a_line_now_and_then(monkeypatch):
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("train", 1000, 0, True, stream)
    for _ in range(1000):
        now[0] += 0.05
        progress.add(1)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["train:", "200", "of", "1,000", "images,", "20", "images/s,", "0:00:40", "left"]


def test_a_run_trains_on_crops_page_by_page(raw, tmp_path):
    options = {"dataset": str(raw), "image_size": 8, "limit_train": 64, "order": "pages", "epochs": 1}
    one, two = (trained(tmp_path / name, **options) for name in ("one", "two"))
    assert "random resized crop of 0.08 to 1 of the area" in (one / "card.txt").read_text()
    assert_same(one, two)


def test_prepare_from_the_command_line(ffcv, photos, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--write-mode", "proportion", "--jpeg-share", "0.3", "--max-resolution", "64", "--workers", "2", "--quiet"]
    assert main(["data", "prepare", str(photos), "--out", str(out), "--data-dir", str(tmp_path / "data"), *flags]) == 0
    assert "--image-size 224" in capsys.readouterr().out
    assert "30% of the images" in json.loads((out / "dataset.json").read_text())["notes"][0]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "examples").glob("imagenet-*.yaml")), ids=lambda p: p.stem
)
def test_recipes_are_configs(path):
    config = from_dict(read_yaml(path), source=path.name)
    assert (config.image_size, config.dataset) == (224, "imagenet-beton")
    assert config.attack.step_size == pytest.approx(config.attack.epsilon * 2 / 3)
    assert getattr(config.defense, "split_bn", False) == (config.defense.name == "ar-at" and "resnet" in path.stem)
    assert recipe_of(config.optim.recipe).epochs == config.epochs


def test_memory_of_preparing_does_not_grow_with_the_set(ffcv, tmp_path):
    """Of pixels, a page and a few images are held; 40 images are 19 MB of them, 120 are 58 MB."""
    peaks = []
    for count in (40, 120):
        for name in ("train/a", "train/b", "test/a", "test/b"):
            folder = tmp_path / f"{count}" / name
            folder.mkdir(parents=True)
            for i in range(count // 2 if "train" in name else 1):
                Image.new("RGB", (400, 400), (i, 0, 0)).save(folder / f"{i}.png")
        tracemalloc.start()
        try:
            prepare(tmp_path / f"{count}", tmp_path / f"out{count}", data_dir=tmp_path / "data", workers=1)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[0] < 16 << 20
    assert peaks[1] - peaks[0] < 1 << 20


def test_the_benchmark_of_loaders(ffcv, tmp_path):
    flags = ["--images", "8", "--image-size", "32", "--batch-size", "4", "--rounds", "1", "--workers", "0"]
    assert loaders.main([*flags, "--out", str(tmp_path / "loaders.json")]) == 0
    record = json.loads((tmp_path / "loaders.json").read_text())
    [result] = record["results"]
    assert record["command"].startswith("python -m benchmarks loaders --images 8")
    assert set(result["median_images_per_s"]) == {"plain", "ours_jpg", "ours_raw"}


def test_batches_are_decoded_while_the_step_goes_on(raw, monkeypatch):
    """Three batches ahead of the one in use and no further; for a GPU in page-locked memory."""
    stream = beton.crops_of(load_dataset(raw, image_size=16, val_images=0).train)
    decoded, pinned, one, empty = [], [], stream._one, torch.empty
    monkeypatch.setattr(stream, "_one", lambda file, row, *rest: decoded.append(row) or one(file, row, *rest))

    def room(*shape, pin_memory=False, **options):
        pinned.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", room)
    batches = list(np.arange(2 * COUNT).reshape(-1, 8))
    gives = stream.batches(batches, lambda rows: centre_boxes(*torch.full((2, len(rows)), 30)), pin=True)
    next(gives)
    end = time.monotonic() + 20
    while len(decoded) < 32 and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(decoded) == list(range(32))
    gives.close()
    assert pinned == [True] * 4


def test_pages_are_asked_for_once_and_before_they_are_due(raw, monkeypatch):
    asked, read, pread = [], [], os.pread
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: asked.append((start, size)))
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.append((len(asked), at)) or pread(file, size, at))
    data = load_dataset(raw, image_size=16, val_images=0)
    epoch(data.train, order="pages")
    table = beton_file.survey(raw / "train.beton")
    assert sorted(asked) == sorted({(int(p) // table.page * table.page, table.page) for p in table.places})
    for count, at in read:
        assert any(start <= at < start + size for start, size in asked[:count])
