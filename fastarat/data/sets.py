"""The data sets with a name, and what is done with any: load it, describe it, write it as .beton files."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastarat.data import beton
from fastarat.data.archives import ARCHIVE_SUFFIXES, make_folder, unpacked
from fastarat.data.beton_file import LARGEST_SIDE, WriteMode, describe
from fastarat.data.named import Imagenet, Imagenette, ImageSet, Svhn, TinyImagenet
from fastarat.data.preparing import PrepareOptions, write_listing
from fastarat.data.sources import CifarArchive, Listing, list_folder, open_digits, open_listing
from fastarat.data.splits import Dataset, Stored, held_out, stratified_indices
from fastarat.errors import UserError, unknown
from fastarat.texts import GIVEN

# A data set with a name is one entry here: what opens it, given the name, the folder for downloads and whether to
# download; or an `ImageSet`, which lists image files. Help texts and error messages take the names from here.
SETS: dict[str, Callable[[str, Path, bool], Stored] | ImageSet] = {
    "digits": open_digits,
    # The authors' binary archives rather than their Python ones, which are pickles: reading those runs their code.
    "cifar10": CifarArchive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test=("test_batch.bin",),
        class_names="batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": CifarArchive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        train=("train.bin",),
        test=("test.bin",),
        class_names="fine_label_names.txt",
        label_bytes=2,
    ),
    "svhn": Svhn(),
    "tiny-imagenet": TinyImagenet(),
    "imagenette": Imagenette("imagenette2.tgz", "fe2fc210e6bb7c5664d602c3cd71e612"),
    "imagenette-320": Imagenette("imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
    "imagenette-160": Imagenette("imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    "imagenet": Imagenet(),
}


def load_dataset(
    name_or_path: str | os.PathLike,
    *,
    data_dir: str | os.PathLike = "data",
    val_images: int | None = None,
    val_seed: int = 0,
    download: bool = True,
    image_size: int | None = None,
) -> Dataset:
    """Load a data set by name or path, and cut a validation split from its training images.

    name_or_path: a name in `SETS`; a folder PATH/train/CLASS/*.png with PATH/test or PATH/val beside it, or
    PATH/CLASS/*.png; a tar or zip archive of such a folder; a folder made by `prepare`, or a .beton file in it.
    data_dir: downloads, unpacked archives and decoded folders are kept here.
    val_images: size of the validation split, stratified by class and fixed by `val_seed`; None is 1,000 of
    10,000 training images or more, else a tenth. 0 leaves it empty.
    image_size: folders only: resize the shorter side to this many pixels and cut out the centre square.

    Except from .beton files the training images are held in memory.

    Raises: UserError.
    """
    stored = _open(name_or_path, Path(data_dir), download, image_size)
    if stored.train.crop and image_size is None:
        raise UserError(f"the images in {name_or_path} have sizes of their own: write --image-size N, such as 224")
    count = len(stored.train)
    if val_images is None:
        val_images = 1000 if count >= 10_000 else count // 10
    if not 0 <= val_images < count:
        raise UserError(
            f"val_images={val_images} does not fit: {stored.name} has {count} training images to cut from: "
            f"write 0 to {count - 1}"
        )
    # Cut by row and seed, never stored: every source of one data set, .beton files too, has the same validation
    # images.
    train, val = (torch.from_numpy(rows) for rows in held_out(stored.train.labels.numpy(), val_images, val_seed))
    return Dataset(
        name=stored.name,
        classes=stored.classes,
        shape=stored.train.shape,
        train=stored.train.take(train),
        val=stored.train.take(val),
        test=stored.test.take(stored.test.indices),  # a copy: the stored images may be a mapped file
        notes=stored.notes,
    )


def info(
    name_or_path: str | os.PathLike,
    *,
    data_dir: str | os.PathLike = "data",
    download: bool = True,
    image_size: int | None = None,
    verify: bool = False,
) -> dict[str, object]:
    """Describe a data set in a few plain values, for a person or for JSON.

    verify: read everything again that was verified or decoded before, and say under "verified" what that was: .beton
    files against their checksums, decoded images against the files they come from.

    Raises: UserError, also for what is damaged.
    """
    stored = _open(name_or_path, Path(data_dir), download, image_size, full=verify)
    per_class = np.bincount(stored.train.labels.numpy(), minlength=len(stored.classes))
    told: dict[str, object] = {
        "name": stored.name,
        "source": stored.source,
        "classes": list(stored.classes),
        "shape": list(stored.train.shape),
        "train_images": len(stored.train),
        "test_images": len(stored.test),
        "train_images_per_class": [int(per_class.min()), int(per_class.max())],
        "decoded_bytes": stored.train.num_bytes + stored.test.num_bytes,
        "notes": list(stored.notes),
    }
    if verify:
        told["verified"] = _verify(name_or_path, Path(data_dir), image_size, stored)
    return told


def _verify(name_or_path: str | os.PathLike, data_dir: Path, image_size: int | None, stored: Stored) -> list[str]:
    """Say what of an opened set was read in full; images that were decoded before are decoded again here."""
    if stored.train.beton is not None:
        folder = stored.train.beton.parent
        files = [folder / f"{part}.beton" for part in describe(folder).sha256]
        return [f"{path}: every byte, by SHA-256" for path in files] or ["the tables alone: there are no checksums"]
    if str(name_or_path) in SETS:
        return [
            "the archive, by its authors' checksum" if str(name_or_path) != "digits" else "nothing: no file of ours"
        ]
    with tempfile.TemporaryDirectory(dir=make_folder(data_dir), prefix=".verify.") as fresh:
        again = _open(name_or_path, Path(fresh), False, image_size)
        for one, other in ((stored.train, again.train), (stored.test, again.test)):
            assert one.images is not None
            assert other.images is not None
            if not (torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)):
                raise UserError(
                    f"the images of {name_or_path} decoded in {data_dir} are not what its files hold: one of them is "
                    f"damaged; delete the decoded folder in {data_dir} and it is made again"
                )
    return [f"{len(stored.train) + len(stored.test)} decoded images, by decoding {name_or_path} again"]


def prepare(
    name_or_path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    data_dir: str | os.PathLike = "data",
    write_mode: WriteMode = "raw",
    jpeg_quality: int = 90,
    jpeg_share: float = 0.5,
    download: bool = True,
    image_size: int | None = None,
    max_resolution: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Write a data set as a folder of train.beton, test.beton and dataset.json, whole or not at all.

    write_mode, jpeg_quality, jpeg_share, image_size, max_resolution, workers: as `PrepareOptions` says; image files
    may be of any number and sizes, and what a killed process wrote of them is gone on with. progress: on stderr.
    The validation split is not stored: `load_dataset` cuts it by row, the same way as for every other source.

    Returns: `out`. Raises: UserError, also when `out` exists already.
    """
    options = PrepareOptions(write_mode, jpeg_quality, jpeg_share, image_size, max_resolution, workers)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: delete it or choose another folder")
    make_folder(out.parent)
    beton.ffcv_parts()  # a missing FFCV should be known before the images are decoded
    listing = _listed(name_or_path, Path(data_dir), download, image_size)
    if listing is not None:
        if listing.own_test:
            warnings.warn(f"{listing.root}: {listing.notes[0]}", stacklevel=2)
        digest = listing.digest()
        what = json.dumps({"files": digest} | dataclasses.asdict(dataclasses.replace(options, workers=None)))
        with beton.unfinished(out, what) as unfinished:
            write_listing(unfinished, out, listing, options, digest, progress=progress)
        return out
    with beton.unfinished(out) as unfinished:
        stored = _open(name_or_path, Path(data_dir), download, image_size)
        if stored.train.beton is not None:
            raise UserError(f"{name_or_path} is in .beton format already")
        if write_mode == "proportion" or max_resolution is not None:
            raise UserError(f"{name_or_path} is no set of image files: its images are of one size, raw or jpg")
        beton.write_prepared(unfinished, out, stored, write_mode=write_mode, jpeg_quality=jpeg_quality)
    return out


def _listed(name_or_path: str | os.PathLike, data_dir: Path, download: bool, image_size: int | None) -> Listing | None:
    """List the files of a set of image files; None for one of another kind, or none at all."""
    name, path = str(name_or_path), Path(name_or_path)
    _check_size(image_size)
    if isinstance(entry := SETS.get(name), ImageSet):
        return entry.listing(name, data_dir, download)
    if name in SETS or (path / "dataset.json").exists():
        return None
    if path.is_dir():
        return list_folder(path, path.resolve().name)
    if path.exists() and path.name.endswith(ARCHIVE_SUFFIXES):
        return list_folder(unpacked(path, data_dir), path.name.split(".")[0])
    return None


def _check_size(image_size: int | None) -> None:
    if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
        raise UserError(
            f"image_size={image_size} is not a side of images to train on: write 1 to {LARGEST_SIDE} pixels"
        )


def _open(
    name_or_path: str | os.PathLike, data_dir: Path, download: bool, image_size: int | None, *, full: bool = False
) -> Stored:
    name, path = str(name_or_path), Path(name_or_path)
    if name.startswith(GIVEN):
        raise UserError(
            f"data set {name} was given in Python, and lies in no file: name another with --dataset, or go on in "
            "Python, fastarat.train(resume=..., data=...) or fastarat.evaluate(model, data)"
        )
    listing = _listed(name_or_path, data_dir, download, image_size)
    if listing is not None:
        return open_listing(listing, data_dir, image_size)
    if name in SETS:
        if image_size is not None:
            raise UserError(f"image_size={image_size} is for image folders; the images of {name} have one size")
        entry = SETS[name]
        assert not isinstance(entry, ImageSet)
        return entry(name, data_dir, download)
    if not path.exists():
        if path.parent == Path() and not path.suffix:
            raise unknown("dataset", name, SETS)
        raise UserError(
            f"data set {name} does not exist: give a folder, an archive, a .beton file or one of {', '.join(SETS)}"
        )
    if path.suffix == ".beton" or (path / "dataset.json").exists():
        return beton.open_prepared(path.parent if path.suffix == ".beton" else path, image_size, full=full)
    raise UserError(
        f"{name} is not a data set: give a folder, an archive ({', '.join(ARCHIVE_SUFFIXES)}) or a .beton file"
    )


def limited(dataset: Dataset, count: int | None, batch_size: int) -> Dataset:
    """Return `dataset` with `count` training images, drawn by class; None keeps all.

    Raises: UserError for a training set that leaves a class out or does not fill a batch.
    """
    asked = "" if count is None or count > len(dataset.train) else f" (limit_train={count})"
    if count is not None and count < len(dataset.train):
        rows = torch.from_numpy(stratified_indices(dataset.train.labels.numpy(), count, seed=0))
        dataset = dataclasses.replace(dataset, train=dataset.train.take(rows))
    size = len(dataset.train)
    empty = (torch.bincount(dataset.train.labels, minlength=len(dataset.classes)) == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(
            f"the {size} training image(s) of {dataset.name}{asked} leave out {len(empty)} of its "
            f"{len(dataset.classes)} classes, {dataset.classes[empty[0]]!r} first: "
            + (
                f"write --limit-train {len(dataset.classes)} or more"
                if asked
                else "hold out fewer with --eval.val-images, or remove those classes"
            )
        )
    if batch_size > size:
        raise UserError(
            f"batch_size={batch_size} is more than the {size:,} training images of {dataset.name}{asked}: "
            f"every step would see fewer than asked for; write --batch-size {size} for all of them, or less"
        )
    return dataset
