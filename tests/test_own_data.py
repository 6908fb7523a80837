"""Anybody's data in Python: every kind becomes the same run, what is wrong is one line, a run goes on only with its own."""

import random

import numpy as np
import pytest
import small
import torch
from beside import neighbour
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import fastarat
from fastarat.cli import main
from fastarat.config import EvalConfig
from fastarat.data import Data, as_dataset, as_split, make_loader

PIXELS = np.random.RandomState(0).randint(0, 256, (96, 8, 8, 3)).astype(np.uint8)
LABELS = np.arange(96) % 4


class Own(torch.utils.data.Dataset):
    """The pixels above; flips: by a coin of PyTorch's, NumPy's or Python's own generator."""

    def __init__(self, kind="pil", flips=None, **changed):
        self.kind, self.flips, self.changed = kind, flips, changed

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, row):
        image, label = PIXELS[row], int(LABELS[row])
        coin = {"torch": lambda: torch.rand(()) < 0.5, "numpy": lambda: np.random.rand() < 0.5,
                "random": lambda: random.random() < 0.5, None: lambda: False}[self.flips]()  # fmt: skip
        image = image[:, ::-1] if coin else image
        if row == 3 and "image" in self.changed:
            image = self.changed["image"]
        if row == 3 and "label" in self.changed:
            label = self.changed["label"]
        if row == 3 and "error" in self.changed:
            raise self.changed["error"]
        if self.kind == "pil" and isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        if self.kind == "tensor":
            image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
        return image, label


def config(out, **options):
    options = {"limit_train": None, "epochs": 2, "eval": EvalConfig(num_steps=1)} | options
    return small.small_config(out, **options)


def epochs(loader, *numbers):
    return [(b.images, b.labels) for number in numbers for b in loader.epoch(number)]


def same(one, other):
    assert len(one) == len(other)
    for (a, b), (c, d) in zip(one, other, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def hugging_face():
    datasets = neighbour("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    return datasets.Dataset.from_dict({"img": list(PIXELS), "label": LABELS.tolist()}, features=features)


FLOATS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255
KINDS = {
    "NumPy, channels last": lambda: (PIXELS, LABELS),
    "NumPy, channels first, float64": lambda: (PIXELS.transpose(0, 3, 1, 2) / 255, LABELS.astype(np.int32)),
    "tensors": lambda: (FLOATS, torch.from_numpy(LABELS)),
    "TensorDataset": lambda: TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS)),
    "Dataset of PIL images": Own,
    "Dataset of tensors": lambda: Own("tensor"),
    "Dataset of arrays": lambda: Own("array"),
    "Subset": lambda: Subset(Own(), range(96)),
    "list": lambda: [(PIXELS[i], LABELS[i]) for i in range(96)],
    "DataLoader": lambda: DataLoader(Own("tensor"), batch_size=10),
    "Hugging Face": hugging_face,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_is_the_same_pixels(kind):
    split = as_split(KINDS[kind](), num_classes=4)
    assert split.images.dtype == torch.uint8
    assert torch.equal(split.images, torch.from_numpy(PIXELS))
    assert torch.equal(split.labels, torch.from_numpy(LABELS))
    few = as_split(KINDS[kind](), limit=7)
    rows = torch.arange(7) * 96 // 7
    assert torch.equal(few.images, torch.from_numpy(PIXELS)[rows])
    assert torch.equal(few.labels, torch.from_numpy(LABELS)[rows])


def test_grey_images_and_names_of_classes():
    assert as_split((PIXELS[..., 0], LABELS)).shape == (1, 8, 8)
    dataset = as_dataset(hugging_face())
    assert dataset.classes == ("a", "b", "c", "d")
    assert as_dataset({"train": (PIXELS, LABELS), "classes": ["w", "x", "y", "z"]}).classes == ("w", "x", "y", "z")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (87, 9, 0)


def test_pixels_that_8_bits_do_not_hold_stay_floating_point():
    split = as_split((FLOATS * 0.999, LABELS))
    assert split.images.dtype == torch.float32
    (images, _), *_ = epochs(make_loader(split, batch_size=96, device="cpu"), 1)
    assert torch.equal(images, FLOATS * 0.999)


def test_a_stream_and_what_is_held_in_memory_give_the_same_batches():
    held, streamed = (as_dataset(Data(train=Own(), hold=hold)).train for hold in (True, False))
    assert streamed.images is None
    options = {"batch_size": 16, "device": "cpu", "shuffle": True, "seed": 3, "augment": fastarat.data.Augment(1, True)}
    one, other = make_loader(held, **options), make_loader(streamed, **options)
    assert (one.kind, other.kind) == ("resident", "stream")
    same(epochs(one, 1, 2), epochs(other, 1, 2))


@pytest.mark.parametrize("flips", ["torch", "numpy", "random"])
def test_augmentation_on_the_host_is_seen_repeats_and_moves_no_generator(flips):
    """With a process of its own and without, from the start of an epoch and from within it."""
    loaders = [
        make_loader(as_dataset(Data(train=Own(flips=flips), workers=n), val_images=0).train, batch_size=16, device="cpu", shuffle=True)
        for n in (0, 1)
    ]  # fmt: skip
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = epochs(loaders[0], 1)
    same(first, epochs(loaders[1], 1))
    same(first[2:], [(b.images, b.labels) for b in loaders[1].epoch(1, 2)])
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(first, epochs(loaders[0], 2), strict=True))
    with pytest.raises(fastarat.UserError, match="augmented by itself"):
        as_dataset(Own(flips=flips))


def test_a_data_loader_is_taken_as_it_is():
    own = DataLoader(Own("tensor", flips="torch"), batch_size=19, shuffle=True)  # 5 batches and one image
    dataset = as_dataset({"train": own, "val": (PIXELS, LABELS)})
    loader = make_loader(dataset.train, batch_size=19, device="cpu")
    assert (loader.kind, dataset.train.source.num_batches) == ("dataloader", 5)
    assert not dataset.given.partition("@")[2]
    one, other = epochs(loader, 1), epochs(loader, 1)
    assert [len(labels) for _, labels in one] == [19] * 5 + [1]
    same(one, other)
    same(one[2:], [(b.images, b.labels) for b in loader.epoch(1, 2)])
    assert not torch.equal(one[0][1], epochs(loader, 2)[0][1])
    with pytest.raises(fastarat.UserError, match="none can be held out"):
        as_dataset(own, val_images=5)


def test_a_run_on_own_data_is_that_of_any_kind_and_goes_on_with_it_alone(tmp_path, capsys):
    arrays = {"train": (PIXELS, LABELS), "test": (PIXELS[:8], LABELS[:8])}
    first = fastarat.train(config(tmp_path / "a"), data=arrays, progress=False)
    second = fastarat.train(config(tmp_path / "b"), data=Data(train=Own(), hold=False), progress=False)
    small.assert_same(first.run, second.run)
    assert first.config.dataset.startswith("python:arrays@")
    longer = fastarat.train(resume=first.run, overrides={"epochs": 3}, data=Own("tensor"), progress=False)
    assert len(longer.metrics) == 3
    for data, said in ((None, "asked for again"), ((PIXELS, LABELS[::-1].copy()), "not what the run was trained on")):
        with pytest.raises(fastarat.UserError, match=said):
            fastarat.train(resume=first.run, data=data, progress=False)
    for command in (["eval", str(first.run)], ["train", "--resume", str(first.run)]):
        assert main(command) == 2
        assert "was given in Python" in capsys.readouterr().err
    found = fastarat.evaluate(first.model, as_split(arrays["test"]), "clean")
    assert found.num_images == 8


def test_a_run_interrupted_within_an_epoch_sees_the_same_augmented_images(tmp_path, monkeypatch):
    """Augmentation on the host and, beside it, on the device."""

    def noise(images):
        return (images + 0.05 * torch.rand_like(images)).clamp(0, 1)

    data = {"train": Own(flips="numpy"), "val": (PIXELS, LABELS), "transforms": noise}
    whole = fastarat.train(config(tmp_path / "whole"), data=data, progress=False)
    assert "noise" in (whole.run / "card.txt").read_text()
    with monkeypatch.context() as patched:
        small.stop_within(patched, epoch=2)
        with pytest.raises(KeyboardInterrupt):
            fastarat.train(config(tmp_path / "parts", checkpoint_every="2"), data=data, progress=False)
    resumed = fastarat.train(resume=tmp_path / "parts", data=data, progress=False)
    small.assert_same(whole.run, resumed.run)


class Endless(IterableDataset):
    def __iter__(self):
        yield PIXELS[0], 0


WRONG = {
    "another shape": (lambda: Own("array", image=PIXELS[0][:4]), r"item 3 .* is \[3, 4, 8\], others are \[3, 8, 8\]"),
    "another number of channels": (lambda: Own("array", image=PIXELS[0][..., :1]), r"item 3 .* is \[1, 8, 8\]"),
    "NaN": (lambda: Own("array", image=np.full((8, 8, 3), np.nan, np.float32)), "item 3 .*contain NaN"),
    "0..255 as floats": (lambda: (PIXELS.astype(np.float32), LABELS), "divide by 255"),
    "normalised": (lambda: ((FLOATS - 0.5) / 0.25, LABELS), "normalisation"),
    "int64 pixels": (lambda: (PIXELS.astype(np.int64), LABELS), "expected uint8"),
    "16 bits": (lambda: Own(image=Image.new("I;16", (8, 8))), "more than 8 bits"),
    "no image": (lambda: Own(image="cat.png"), "item 3 .*'cat.png'"),
    "fails": (lambda: Own(error=OSError("disk gone\nat once")), r"item 3 .*OSError: disk gone\)"),
    "a negative label": (lambda: Own(label=-1), "item 3 .*-1: expected 0 or more"),
    "a fraction": (lambda: Own(label=0.5), "item 3 .*0.5: expected a whole number"),
    "one-hot item": (lambda: Own(label=np.eye(4)[0]), r"item 3 .*\[4\].*argmax"),
    "one-hot": (lambda: (PIXELS, np.eye(4)[LABELS]), r"argmax\(1\)"),
    "fewer labels": (lambda: (PIXELS, LABELS[:5]), "96 images but 5 labels"),
    "negative labels": (lambda: (PIXELS, LABELS - 1), "label -1, of item 0"),
    "outside the classes": (lambda: {"train": (PIXELS, LABELS), "classes": "abc"}, "item 3 .*label 3, and 3 names"),
    "another shape to validate on": (lambda: {"train": Own(), "val": (PIXELS[:, :4], LABELS)}, "expected one shape"),
    "no length": (Endless, "no length"),
    "a loader without length": (lambda: DataLoader(Endless()), "no length"),
    "a generator": (lambda: (item for item in [(PIXELS[0], 0)]), "no length"),
    "empty": (list, "no images"),
    "empty arrays": (lambda: (PIXELS[:0], LABELS[:0]), "no images"),
    "two data sets": (lambda: (Own(), Own()), "a tuple of 2"),
    "three values": (lambda: [(PIXELS[0], 0, 0)] * 4, "3 values"),
    "a path": (lambda: "cifar10", "'cifar10'"),
    "a number": (lambda: 3, "is 3"),
    "another key": (lambda: {"train": Own(), "valid_set": Own()}, "did you mean 'val'|valid_set"),
    "no training images": (lambda: {"test": Own()}, "no training images"),
    "other columns": (lambda: [{"picture": PIXELS[0], "label": 0}] * 4, "keys picture, label.*'image'"),
    "sixty channels": (lambda: (np.zeros((4, 60, 60, 60), np.uint8), [0, 1, 2, 3]), "at most 4 channels"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_data_is_one_line(what):
    make, said = WRONG[what]
    with pytest.raises(fastarat.UserError, match=said) as found:
        as_dataset(make())
    assert "\n" not in str(found.value)


def test_a_stream_names_the_item_that_is_wrong_from_whatever_process():
    source = as_split((PIXELS, LABELS))
    dataset = as_dataset(Data(train=Own("array"), hold=False, workers=1)).train
    dataset.source.data.changed["error"] = OSError("disk gone")
    with pytest.raises(fastarat.UserError, match=r"item 3 of the training data cannot be read \(OSError: disk gone\)"):
        epochs(make_loader(dataset, batch_size=16, device="cpu"), 1)
    assert len(source) == 96


def test_transforms_of_another_shape_and_what_goes_not_together_is_refused(tmp_path):
    data = {"train": (PIXELS, LABELS), "transforms": lambda images: images[..., :4]}
    for options, said in (
        ({"data": data}, r"transforms returned torch.float32 \[2, 3, 8, 4\]"),
        ({"data": (PIXELS, LABELS), "dataset": "cifar10"}, "the config names dataset=cifar10"),
        ({"data": (PIXELS, LABELS), "image_size": 8}, "image_size=8"),
        ({"data": (PIXELS, LABELS), "loader": "ffcv"}, "loader=ffcv"),
        ({"data": DataLoader(Own("tensor"), 16), "limit_train": 8}, "limit_train=8"),
        ({"dataset": "python:x"}, "given in Python"),
        ({"model": "python:Net"}, "given in Python"),
    ):
        data = options.pop("data", None)
        with pytest.raises(fastarat.UserError, match=said):
            fastarat.train(config(tmp_path / "run", **options), data=data, progress=False)


def test_cutmix_and_randaugment_reach_data_of_every_kind(tmp_path):
    for name, data in (("stream", Own(flips="torch")), ("loader", DataLoader(Own("tensor"), batch_size=32))):
        data = {"train": data, "val": (PIXELS[:8], LABELS[:8])}
        options = {"cutmix": 1.0, "randaugment": (2, 14), "epochs": 1, "defense": "trades"}
        card = (
            fastarat.train(config(tmp_path / name, **options), data=data, progress=False).run / "card.txt"
        ).read_text()
        assert "the data's own, on the host, RandAugment of 2 operations" in card
        assert "CutMix" in card


@pytest.mark.parametrize(
    ("transforms", "said"),
    [
        (lambda batch: batch * 3 - 1, r"transforms returned images that span"),
        (lambda batch: batch[:, :, 1:], r"transforms returned .* expected the same"),
        (lambda batch: 1 / 0, r"transforms raised ZeroDivisionError"),
    ],
)
def test_bad_transforms_are_named_and_nothing_is_left(transforms, said, tmp_path):
    """The run folder was there already, and the mended call was refused because of it."""
    rng = np.random.default_rng(0)
    data = {"train": (rng.integers(0, 256, (40, 8, 8, 1), np.uint8), np.arange(40) % 4), "transforms": transforms}
    with pytest.raises(fastarat.UserError, match=said):
        fastarat.train(small.small_config(tmp_path / "run", limit_train=None, eval=EvalConfig(val_images=4)), data=data)
    assert not (tmp_path / "run").exists()


def test_one_class_is_said_to_be_the_labels(tmp_path):
    with pytest.raises(fastarat.UserError, match="has one class"):
        as_dataset((np.zeros((40, 8, 8, 1), np.uint8), np.zeros(40, np.int64)))
