"""CutMix and RandAugment: what they do to pixels and targets, and that both are the same whatever the loader."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from archives import place_cifar
from PIL import Image, ImageEnhance, ImageOps
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastarat
from fastarat import checkpoints
from fastarat.config import EvalConfig, from_dict, read_yaml
from fastarat.data import load_dataset, make_loader, prepare, randaugment
from fastarat.data.mixing import CutMix
from fastarat.data.randaugment import OPERATIONS, RandAugment, apply
from fastarat.errors import UserError
from fastarat.losses import smoothed


def pixels(n: int = 6, channels: int = 3, size: tuple[int, int] = (12, 17)) -> torch.Tensor:
    """Noise, a ramp, one value, a narrow range and two levels: what autocontrast and equalize tell apart."""
    g = torch.Generator().manual_seed(0)
    found = torch.randint(256, (n, channels, *size), generator=g, dtype=torch.uint8)
    found[1] = torch.arange(size[1]) * 7
    found[2] = 93
    found[3] = found[3] // 8 + 100
    found[4] = torch.where(found[4] > 128, 200, 10)
    return found


def by_pillow(image: Image.Image, name: str, magnitude: int, sign: int) -> Image.Image:
    """The operation as torchvision's RandAugment asks Pillow for it."""
    share = magnitude / 30
    width, height = image.size

    def affine(*coefficients):
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST)

    enhance = {
        "brightness": ImageEnhance.Brightness, "color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
    }  # fmt: skip
    if name in enhance:
        if name == "color" and image.mode == "L":
            return image
        return enhance[name](image).enhance(1 + sign * 0.9 * share)
    return {
        "identity": lambda: image,
        "shear-x": lambda: affine(1, sign * 0.3 * share, 0, 0, 1, 0),
        "shear-y": lambda: affine(1, 0, 0, sign * 0.3 * share, 1, 0),
        "translate-x": lambda: affine(1, 0, sign * int(150 / 331 * width * share), 0, 1, 0),
        "translate-y": lambda: affine(1, 0, 0, 0, 1, sign * int(150 / 331 * height * share)),
        "rotate": lambda: image.rotate(sign * 30 * share, Image.Resampling.NEAREST),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(magnitude / 7.5)),
        "solarize": lambda: ImageOps.solarize(image, 255 * (1 - share)),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 5, 9, 14, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_pillows_pixel_for_pixel(name, magnitude, channels):
    images = pixels(channels=channels)
    for sign in (1, -1):
        operation = torch.full((len(images),), OPERATIONS.index(name))
        found = apply(images, operation, torch.full_like(operation, int(sign < 0)), magnitude)
        for image, one in zip(images, found, strict=True):
            array = image.permute(1, 2, 0).numpy()
            expected = np.array(by_pillow(Image.fromarray(array.squeeze()), name, magnitude, sign))
            assert np.array_equal(one.permute(1, 2, 0).numpy().squeeze(), expected)


def test_a_batch_of_different_operations_is_each_image_by_itself():
    images = pixels(14, size=(8, 8))
    operation, sign = torch.randperm(14, generator=torch.Generator().manual_seed(1)), torch.arange(14) % 2
    together = apply(images, operation, sign, 9)
    for i in range(14):
        assert torch.equal(together[i : i + 1], apply(images[i : i + 1], operation[i : i + 1], sign[i : i + 1], 9))


def test_draws_depend_on_seed_and_image_alone_and_are_even():
    index = torch.arange(20_000)
    operations, signs = RandAugment(2, 9).draw(index, seed=7)
    assert operations.shape == signs.shape == (2, 20_000)
    some = torch.tensor([19_999, 3, 5000])
    assert torch.equal(RandAugment(2, 9).draw(some, seed=7)[0], operations[:, some])
    assert (RandAugment(2, 9).draw(index, seed=8)[0] == operations).float().mean() < 0.1
    counts = torch.bincount(operations.flatten(), minlength=14).double()
    expected = 40_000 / 14
    assert ((counts - expected) ** 2 / expected).sum() < 34.5  # chi squared of 13 degrees, p 0.001
    assert abs(signs.double().mean() - 0.5) < 0.01
    pairs = Counter(zip(*operations.tolist(), strict=True))
    assert len(pairs) == 14 * 14
    assert max(pairs.values()) < 2 * 20_000 / 196


def test_cutmix_pastes_one_window_and_shares_the_target_by_its_pixels():
    images = torch.rand(16, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 4
    mix = CutMix(1.0, 4)
    for seed in range(30):
        cut = mix.draw(16, (8, 10), seed)
        found, targets = mix(images.clone(), labels, seed)
        inside = torch.zeros(8, 10, dtype=torch.bool)
        inside[slice(*cut.rows), slice(*cut.columns)] = True
        assert torch.equal(found, torch.where(inside, images[cut.partners], images))
        kept = 1 - inside.float().mean().item()
        hot = torch.nn.functional.one_hot(labels, 4).float()
        torch.testing.assert_close(targets, kept * hot + (1 - kept) * hot[cut.partners])
        torch.testing.assert_close(targets.sum(1), torch.ones(16))


def test_cutmix_draws_windows_as_its_paper_does():
    """Beta(a, a): the side is sqrt(1 - lambda); centres are even over the image; the border cuts windows off."""
    cuts = [CutMix(1.0, 4).draw(4, (32, 32), seed) for seed in range(2000)]
    whole = [c for c in cuts if c.rows[0] > 0 and c.rows[1] < 32 and c.columns[0] > 0 and c.columns[1] < 32]
    assert all(c.rows[1] - c.rows[0] == c.columns[1] - c.columns[0] for c in whole)
    areas = [(c.rows[1] - c.rows[0]) * (c.columns[1] - c.columns[0]) / 1024 for c in cuts]
    # By hand: of a side s of 1 the border leaves s - s^2/4 in the mean; squared, over a uniform s^2.
    s = np.sqrt((np.arange(10_000) + 0.5) / 10_000)
    assert np.mean(areas) == pytest.approx(((s - s**2 / 4) ** 2).mean(), abs=0.03)
    assert all(sorted(c.partners.tolist()) == [0, 1, 2, 3] for c in cuts)
    narrow = [CutMix(50.0, 4).draw(4, (32, 32), seed) for seed in range(200)]  # lambda near 1/2
    assert np.std([c.rows[1] - c.rows[0] for c in narrow]) < np.std([c.rows[1] - c.rows[0] for c in cuts])


@pytest.fixture(scope="module")
def sets(ffcv, tmp_path_factory):
    """CIFAR-10's form in memory and as .beton."""
    root = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        place_cifar(root / "data", monkeypatch)
        beton = prepare("cifar10", root / "beton", data_dir=root / "data")
        return load_dataset("cifar10", data_dir=root / "data"), load_dataset(beton)


STRONG = {"randaugment": RandAugment(2, 9), "cutmix": CutMix(1.0, 10)}


def epoch_of(dataset, kind: str, epoch: int = 3, first: int = 0, **options):
    loader = make_loader(
        dataset.train, batch_size=8, device="cpu", kind=kind, shuffle=True, seed=5, **{**STRONG, **options}
    )
    return list(loader.epoch(epoch, first))


def test_both_loaders_and_an_epoch_begun_within_give_the_same_batches(sets):
    memory, beton = sets
    expected = epoch_of(memory, "resident")
    assert len(expected) > 2
    for found, start in ((epoch_of(beton, "ffcv"), 0), (epoch_of(memory, "resident", first=2), 2)):
        for one, two in zip(found, expected[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert expected[0].labels.shape == (8, 10)
    assert expected[0].images.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(expected[0].images, epoch_of(memory, "resident", epoch=4)[0].images)


def test_without_them_a_batch_is_what_it_was(sets):
    plain = epoch_of(sets[0], "resident", randaugment=None, cutmix=None)
    mixed = epoch_of(sets[0], "resident", randaugment=None)
    assert plain[0].labels.dtype == torch.int64
    assert torch.equal(plain[1].index, mixed[1].index)
    # Where the window is not, the image is as it was.
    same = (plain[0].images == mixed[0].images).all(1).float().mean((1, 2))
    assert (same > 0).all()


@pytest.mark.parametrize("given", [(0, 9), (2, 31), (2, -1)])
def test_numbers_that_cannot_be(given):
    with pytest.raises(UserError, match=f"randaugment={given[0]},{given[1]}: expected operations per image"):
        RandAugment(*given)


OPTIONS = {"cutmix": 1.0, "randaugment": (2, 9), "label_smoothing": 0.1, "augment": False, "ema": 0.9}


@pytest.mark.parametrize("defense", ["ar-at", "trades"])
def test_a_run_with_all_of_them_resumes_bit_for_bit_and_says_so(defense, tmp_path, monkeypatch):
    """Killed within an epoch; averaged too. The card names each."""
    options = OPTIONS | {"epochs": 2, "swa": True, "defense": defense, "optim": {"recipe": "cosine", "warmup": 1}}
    whole = small.trained(tmp_path / "whole", **options)
    card = (whole / "card.txt").read_text()
    for words in (
        "RandAugment of 2 operations, magnitude 9 of 30, CutMix, lambda ~ Beta(1, 1), in the attack too",
        "0.1 in the loss's cross-entropies, none in the attack",
        "lr 0 to 0.1 in 1 epoch, then along half a cosine to 0",
        "label_smoothing 0.1 (default 0), randaugment 2,9 (default unset), cutmix 1 (default unset)",
    ):
        assert words in card
    kept = checkpoints.Checkpoints.save_within

    def killed(self, place):
        kept(self, place)
        if place.epoch == 2 and place.steps == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save_within", killed)
        with pytest.raises(KeyboardInterrupt):
            small.trained(tmp_path / "killed", checkpoint_every=1, **options)
    fastarat.train(resume=tmp_path / "killed", progress=False)
    small.assert_same(tmp_path / "killed", whole)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cutmix": 1, "defense": "gairat"}, "cutmix=1: gairat asks of each image whether its one class is met"),
        ({"cutmix": 1, "defense": "mart"}, "cutmix=1: the loss of mart is of one class per image"),
        ({"cutmix": 1, "defense": "at", "attack": {"objective": "cw"}}, "the attack's objective cw is a margin"),
        ({"cutmix": 0}, "cutmix=0 is outside (0, inf)"),
        ({"randaugment": "2"}, "randaugment=2: expected operations per image and a magnitude, such as 2,9"),
        ({"randaugment": "2,99"}, "randaugment=2,99: expected operations per image, 1 or more"),
        ({"randaugment": "0,9"}, "randaugment=0,9: expected operations per image, 1 or more"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(values, words):
    with pytest.raises(UserError, match=re.escape(words)):
        from_dict(values)


def test_the_recipe_of_rebuffi_is_their_released_code_and_runs(tmp_path):
    config = from_dict(read_yaml(Path(__file__).parent.parent / "examples" / "rebuffi2021.yaml"))
    recipe = config.optim.schedule()
    assert (recipe.epochs, recipe.lr, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (
        400,
        0.4,
        0.9,
        True,
        5e-4,
    )
    short = {"model": "resnet-small", "dataset": "digits", "batch_size": 32, "limit_train": 64, "epochs": 1}
    run = fastarat.train(
        dataclasses.replace(config, **short, eval=EvalConfig(val_images=20, num_steps=1), out=str(tmp_path / "run")),
        progress=False,
    ).run
    card = (run / "card.txt").read_text()
    assert "lr 0.4, along half a cosine to 0" in card
    assert "maximises ce" in card
    assert (run / "ema.safetensors").exists()


def test_neither_waits_for_the_device():
    """Under fake tensors whatever the host would read of them raises."""
    randaugment.tables.cache_clear()
    try:
        with FakeTensorMode():
            images, labels = torch.rand(8, 3, 8, 8), torch.randint(4, (8,))
            images = RandAugment(2, 9)(images, torch.arange(8), seed=1)
            images, targets = CutMix(1.0, 4)(images, labels, seed=1)
            assert (images.shape, smoothed(targets, 0.1, 4).shape, smoothed(labels, 0.1, 4).shape) == (
                (8, 3, 8, 8), (8, 4), (8, 4),
            )  # fmt: skip
            with pytest.raises(DataDependentOutputException):
                targets.sum().item()
    finally:
        randaugment.tables.cache_clear()
