"""Published sets beyond CIFAR: SVHN, Tiny ImageNet, Imagenette and ImageNet, in the formats their authors give them.

URLs and MD5 sums are those of torchvision's datasets; Tiny ImageNet's, which is not there, is the one in wide use.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fastarat.data.archives import unpack_tar, unpacked
from fastarat.data.sources import Listing, check_md5, class_files, fetched, list_folder, listing_of
from fastarat.data.splits import Split, Stored
from fastarat.errors import UserError

_LARGEST_TEXT = 64 << 20  # bytes of a list or table in an archive


@runtime_checkable
class ImageSet(Protocol):
    """A named set of image files, which are listed before they are read."""

    def listing(self, name: str, data_dir: Path, download: bool) -> Listing:
        """List its files; data_dir: where archives lie and are unpacked. Raises: UserError."""
        ...


@dataclass(frozen=True)
class Svhn:
    """Street View House Numbers, cropped digits (Netzer et al., 2011): in MATLAB files; "0" is their 10."""

    url: str = "http://ufldl.stanford.edu/housenumbers/"
    train_md5: str = "e26dedcc434d2e4c54c9b2d4a06d8373"
    test_md5: str = "eb5a983be6a315427106f1b164d9cef3"

    def __call__(self, name: str, data_dir: Path, download: bool) -> Stored:
        train, test = (
            self._read(fetched(f"{self.url}{part}_32x32.mat", md5, data_dir, download))
            for part, md5 in (("train", self.train_md5), ("test", self.test_md5))
        )
        return Stored(name, tuple("0123456789"), train, test, self.url)

    @staticmethod
    def _read(path: Path) -> Split:
        from scipy.io import loadmat

        try:
            found = loadmat(path, variable_names=["X", "y"])
            images, labels = found["X"], found["y"].reshape(-1).astype(np.int64)
        except Exception as error:  # scipy raises many kinds for what is no MATLAB file
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}): delete it to download it again"
            ) from error
        if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)) or not len(labels):
            raise UserError(f"{path} holds {images.dtype} {images.shape}, expected uint8 (32, 32, 3, N): delete it")
        if not 1 <= labels.min() <= labels.max() <= 10:
            raise UserError(f"{path} has labels {labels.min()}..{labels.max()}, expected 1..10: it is damaged")
        return Split.of(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels % 10)


@dataclass(frozen=True)
class Imagenette:
    """Ten classes of ImageNet (Howard, 2019), whole or with shorter sides of 320 or 160 pixels."""

    file: str
    md5: str
    url: str = "https://s3.amazonaws.com/fast-ai-imageclas/"

    def listing(self, name: str, data_dir: Path, download: bool) -> Listing:
        """As said above."""
        return list_folder(unpacked(fetched(self.url + self.file, self.md5, data_dir, download), data_dir), name)


@dataclass(frozen=True)
class TinyImagenet:
    """200 classes of ImageNet at 64x64 (Le and Yang, 2015); its labelled validation images are the test set."""

    url: str = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    md5: str = "90528d7ca1a48142e341f4ef8d21d0de"

    def listing(self, name: str, data_dir: Path, download: bool) -> Listing:
        """As said above."""
        path = fetched(self.url, self.md5, data_dir, download)
        root = unpacked(path, data_dir)
        train = class_files(root / "train")
        place = root / "val" / "images"
        there = {file.name for file in place.iterdir()} if place.is_dir() else set()
        test: dict[str, list[str]] = {wnid: [] for wnid in train}
        for line in _annotations(path).splitlines():
            file, wnid = [*line.split("\t"), ""][:2]
            if file not in there or wnid not in test:
                raise UserError(f"{path}: val_annotations.txt names {file!r} of {wnid!r}, which it does not hold")
            test[wnid].append(str(place / file))
        if not all(test.values()):
            raise UserError(f"{path}: val_annotations.txt leaves out {next(k for k, v in test.items() if not v)}")
        return listing_of(name, root, train, {wnid: sorted(files) for wnid, files in test.items()})


def _annotations(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("val/val_annotations.txt")), None)
            if name is None:
                raise UserError(f"{path} holds no val_annotations.txt: it is not the published archive")
            with archive.open(name) as file:
                return _text(path, file)
    except (zipfile.BadZipFile, OSError, zlib.error, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path} is damaged ({error})") from error


def _text(path: Path, file: Any) -> str:
    content = file.read(_LARGEST_TEXT + 1)
    if len(content) > _LARGEST_TEXT:
        raise UserError(f"{path} holds a list of more than {_LARGEST_TEXT >> 20} MB: it is not the published archive")
    return content.decode("utf-8")


@dataclass(frozen=True)
class Imagenet:
    """ImageNet-1k (Russakovsky et al., IJCV 2015): a folder DATA_DIR/imagenet, or the three ILSVRC2012 archives.

    It is never downloaded: its licence has to be agreed to. DATA_DIR/imagenet holds train/WNID/*.JPEG and val/WNID, or
    val as a flat folder beside the devkit. Its validation images are the test set. WNIDs are the classes.
    """

    train: tuple[str, str] = ("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e")
    val: tuple[str, str] = ("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622")
    devkit: tuple[str, str] = ("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf")

    def listing(self, name: str, data_dir: Path, download: bool) -> Listing:
        """As said above."""
        root = data_dir / "imagenet"
        for part, (file, md5), nested in (("train", self.train, True), ("val", self.val, False)):
            if not (root / part).is_dir():
                self._present(data_dir, file)
                check_md5(data_dir / file, md5)
                unpack_tar(data_dir / file, root / part, data_dir, nested=nested)
        if any(entry.is_dir() for entry in (root / "val").iterdir()):
            return list_folder(root, name)
        train = class_files(root / "train")
        return listing_of(name, root, train, self._labelled(root / "val", train, data_dir))

    @staticmethod
    def _present(data_dir: Path, file: str) -> None:
        if not (data_dir / file).exists():
            raise UserError(
                f"imagenet is not downloaded for you: get {file} from https://image-net.org/download.php (ILSVRC2012) "
                f"and place it at {data_dir / file}, or a folder train/WNID and val/WNID at {data_dir / 'imagenet'}"
            )

    def _labelled(self, folder: Path, train: dict[str, list[str]], data_dir: Path) -> dict[str, list[str]]:
        """Sort the flat validation images by what the devkit says of them: line i is of the i-th image."""
        file, md5 = self.devkit
        self._present(data_dir, file)
        check_md5(data_dir / file, md5)
        wnids = self._truth(data_dir / file)
        images = sorted(str(entry) for entry in folder.iterdir() if not entry.name.startswith("."))
        test: dict[str, list[str]] = {wnid: [] for wnid in train}
        if len(images) != len(wnids):
            raise UserError(
                f"{folder} holds {len(images):,} images and {file} labels {len(wnids):,}: unpack them again"
            )
        for image, wnid in zip(images, wnids, strict=True):
            if wnid not in test:
                raise UserError(f"{file} labels {image} as {wnid}, of which there are no training images")
            test[wnid].append(image)
        if not all(test.values()):
            raise UserError(f"{folder} has no image of {next(k for k, v in test.items() if not v)}")
        return test

    @staticmethod
    def _truth(path: Path) -> list[str]:
        """Return the WNID of each validation image, in order."""
        from scipy.io import loadmat

        wanted, found = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"), {}
        try:
            with tarfile.open(path, "r:*") as tar:
                for member in tar:
                    name = PurePosixPath(member.name).name
                    if name in wanted and member.isfile() and member.size <= _LARGEST_TEXT:
                        content = tar.extractfile(member)
                        found[name] = content.read() if content else b""
            meta = loadmat(io.BytesIO(found["meta.mat"]), squeeze_me=True)["synsets"]
            leaves = meta[meta["num_children"] == 0]
            wnid_of = {int(k): str(wnid) for k, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
            return [wnid_of[int(line)] for line in found[wanted[1]].decode().split()]
        except Exception as error:  # tarfile and scipy raise many kinds
            raise UserError(f"{path} is not the devkit of ILSVRC2012 ({type(error).__name__}: {error})") from error
