"""Extra training images from an .npz file: their share of each batch, the order over epochs, resuming, bad files."""

import numpy as np
import pytest
import small
import torch

import fastarat
from fastarat.config import Config, EvalConfig
from fastarat.data import Augment, Data, Split, as_dataset, mixed_loader, open_extra
from fastarat.data.extra import dealt
from fastarat.distributed import World
from fastarat.errors import UserError

RNG = np.random.RandomState(0)
OWN = (np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 4)
IMAGES = np.arange(1, 101, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)  # the row, from 1
EXTRA = {"image": IMAGES, "label": np.arange(100) % 4}


def written(tmp_path, save=np.savez, **changed):
    path = tmp_path / "extra.npz"
    save(path, **{name: value for name, value in {**EXTRA, **changed}.items() if value is not None})
    return path


def opened(path, tmp_path):
    return open_extra(path, (3, 8, 8), 4, tmp_path / "data")


def mixed(extra, split=None, ratio=0.7, **options):
    options = {"batch_size": 10, "device": "cpu", "shuffle": True, "seed": 1} | options
    return mixed_loader(split or as_dataset(OWN, val_images=0).train, extra, ratio, **options)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_is_mapped_as_it_is_or_unpacked_once(tmp_path, save):
    path = written(tmp_path, save)
    extra = opened(path, tmp_path)
    assert torch.equal(extra.images, torch.from_numpy(IMAGES))
    assert torch.equal(extra.labels, torch.from_numpy(EXTRA["label"]))
    kept = list((tmp_path / "data").rglob("*.npy"))
    assert len(kept) == (save is np.savez_compressed)
    before = [file.stat().st_mtime_ns for file in kept]
    opened(path, tmp_path)
    assert [file.stat().st_mtime_ns for file in kept] == before


def test_each_batch_has_its_share_and_all_are_seen_before_any_is_seen_again(tmp_path):
    loader = mixed(opened(written(tmp_path), tmp_path), ratio=0.5)
    assert len(loader) == 4  # the steps of the 40 images alone
    own, extra, places = [], [], set()
    for epoch in range(1, 10):
        for batch in loader.epoch(epoch):
            is_extra = batch.index >= 40
            assert is_extra.sum() == 5
            values = (batch.images[:, 0, 0, 0] * 255).round().int()
            assert torch.equal(values, torch.where(is_extra, batch.index - 39, 0).int())
            assert torch.equal(batch.labels[is_extra], (batch.index[is_extra] - 40) % 4)
            own += batch.index[~is_extra].tolist()
            extra += (batch.index[is_extra] - 40).tolist()
            places |= set(is_extra.nonzero().flatten().tolist())
    # Epoch 1 begins after the 20 own and 20 extra images that an epoch 0 has.
    assert sorted(own[20:60]) == list(range(40))
    assert sorted(extra[80:180]) == list(range(100))
    assert places == set(range(10))


def test_the_order_is_the_seeds_and_an_epoch_can_be_entered_anywhere(tmp_path):
    extra = opened(written(tmp_path), tmp_path)
    options = {"augment": fastarat.data.Augment(1, True)}
    first = [batch.images for batch in mixed(extra, **options).epoch(3)]
    again = [batch.images for batch in mixed(extra, **options).epoch(3, 2)]
    assert all(torch.equal(a, b) for a, b in zip(first[2:], again, strict=True))
    other = [batch.index for batch in mixed(extra, seed=2).epoch(3)]
    assert not torch.equal(other[0], next(mixed(extra).epoch(3)).index)


def test_beside_images_that_stream_and_those_in_floating_point(tmp_path):
    extra = opened(written(tmp_path), tmp_path)
    held = [(b.images, b.labels) for b in mixed(extra).epoch(2)]
    items = list(zip(*OWN, strict=True))
    streamed = mixed(extra, as_dataset(Data(train=items, hold=False), val_images=0).train)
    fractions = mixed(extra, as_dataset((OWN[0] + np.float32(0.3), OWN[1]), val_images=0).train)
    for (a, b), c, d in zip(held, streamed.epoch(2), fractions.epoch(2), strict=True):
        assert torch.equal(a, c.images)
        assert torch.equal(b, c.labels)
        assert torch.allclose(d.images[d.index >= 40], a[d.index >= 40])
        assert torch.allclose(d.images[d.index < 40], torch.tensor(0.3))


def test_a_run_with_extra_images_goes_on_bit_for_bit(tmp_path, monkeypatch):
    image, label = RNG.randint(0, 256, (100, 8, 8, 1)).astype(np.uint8), np.arange(100) % 10
    path = written(tmp_path, image=image, label=label)
    options = {"extra_data": str(path), "eval": EvalConfig(val_images=20, num_steps=1), "epochs": 2, "limit_train": 96}
    whole = small.trained(tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        small.stop_within(patched, epoch=2)
        with pytest.raises(KeyboardInterrupt):
            small.trained(tmp_path / "part", checkpoint_every="2", **options)
    small.assert_same(whole, fastarat.train(resume=tmp_path / "part", progress=False).run)
    card = (whole / "card.txt").read_text()
    assert "22 of 32 images of a batch extra ones, of 100" in card
    assert "70% of each batch are extra images" in card


WRONG = {
    "keys": ({"image": None, "pixels": IMAGES}, "holds label, pixels"),
    "type": ({"image": IMAGES.astype(np.float32)}, "image is float32"),
    "shape": ({"image": IMAGES[..., 0]}, r"image is uint8 \[100, 8, 8\]"),
    "size": ({"image": IMAGES[:, :4]}, r"\[3, 4, 8\], the data set of \[3, 8, 8\]"),
    "order": ({"image": IMAGES.transpose(0, 3, 1, 2)}, r"\[8, 3, 8\]"),
    "objects": ({"image": np.array([None, 1])}, "holds Python objects"),
    "labels of objects": ({"label": np.array([None, 1])}, "holds Python objects"),
    "labels as floats": ({"label": np.zeros(100)}, "label is float64"),
    "one-hot": ({"label": np.eye(4)[EXTRA["label"]]}, r"label is float64 \[100, 4\]"),
    "classes": ({"label": np.arange(100)}, "labels span 0 to 99, the data set has 4 classes"),
    "count": ({"label": np.zeros(7, int)}, "100 images but 7 labels"),
    "empty": ({"image": IMAGES[:0], "label": np.zeros(0, int)}, "0 images"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, what):
    changed, said = WRONG[what]
    with pytest.raises(fastarat.UserError, match=said) as found:
        opened(written(tmp_path, **changed), tmp_path)
    assert "\n" not in str(found.value)


def test_damaged_and_missing_files_and_shares_are_refused(tmp_path):
    path = written(tmp_path)
    extra = opened(path, tmp_path)
    whole = path.read_bytes()
    for damaged in (
        whole[:100],
        whole[:-30],
        b"",
        whole.replace(b"\x93NUMPY", b"xxxxxx"),
        whole.replace(b"|u1", b"<q9"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(fastarat.UserError, match=r"extra data .*extra\.npz"):
            opened(path, tmp_path)
    with pytest.raises(fastarat.UserError, match="is no file"):
        opened(tmp_path / "none.npz", tmp_path)
    with pytest.raises(fastarat.UserError, match="of 10 images is 0"):
        mixed(extra, ratio=0.05)
    with pytest.raises(fastarat.UserError, match="name them with --extra-data"):
        Config(extra_ratio=0.5)
    with pytest.raises(fastarat.UserError, match="extra_ratio"):
        Config(extra_data="a.npz", extra_ratio=1.0)
    loader = torch.utils.data.DataLoader([(OWN[0][i], i % 4) for i in range(8)], batch_size=4)
    with pytest.raises(fastarat.UserError, match="beside a DataLoader"):
        mixed(extra, as_dataset(loader).train)


def test_images_are_dealt_in_other_numbers_than_they_come():
    chunks = iter(torch.arange(12).split(5))
    shares = [share if share is None else share.tolist() for share in dealt(chunks, [2, 0, 6, 4])]
    assert shares == [[0, 1], None, [2, 3, 4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_process_reads_its_own_rows_of_each_batch_alone(tmp_path):
    """However many of them are extra: every second one, say."""
    loader = mixed(opened(written(tmp_path), tmp_path))
    whole = [batch.index for batch in loader.epoch(1)]
    rows = [index[1::2] for index in whole]
    found = list(loader._pixels(torch.cat(rows), rows, 1))
    for index, images in zip(rows, found, strict=True):
        assert torch.equal(images[:, 0, 0, 0], torch.where(index >= 40, index - 39, 0).to(torch.uint8))


def test_ranks_share_batches_with_extra_images(tmp_path):
    """They have the rows and the crops of one process, whichever images are extra ones."""
    rng = np.random.default_rng(0)
    split, extra = (
        Split.of(rng.integers(0, 256, (count, 8, 8, 1), np.uint8), rng.integers(0, 4, count)) for count in (30, 50)
    )
    options = {"batch_size": 8, "device": "cpu", "shuffle": True, "seed": 3, "augment": Augment(padding=1)}
    whole = list(mixed_loader(split, extra, 0.5, **options).epoch(1))
    for accumulate in (1, 2):
        worlds = [World(rank, 2) for rank in range(2)]
        shares = [
            list(mixed_loader(split, extra, 0.5, world=world, accumulate=accumulate, **options).epoch(1))
            for world in worlds
        ]
        for number, batch in enumerate(whole):
            for world, own in zip(worlds, shares, strict=True):
                rows = torch.cat([torch.arange(p.start, p.stop) for p in world.parts(len(batch.labels), accumulate)])
                assert torch.equal(own[number].images, batch.images[rows])
                assert torch.equal(own[number].labels, batch.labels[rows])


@pytest.mark.parametrize("wrong", ["keys", "labels"])
def test_a_sound_file_of_other_content_is_not_called_damaged(wrong, tmp_path):
    file = tmp_path / "extra.npz"
    images, labels = np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 9])
    np.savez(file, **({"image": images, "labels": labels} if wrong == "keys" else {"image": images, "label": labels}))
    with pytest.raises(UserError) as error:
        open_extra(file, (1, 8, 8), 4, tmp_path)
    assert str(error.value).count(str(file)) == 1
    assert "damaged" not in str(error.value)
