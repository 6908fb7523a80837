"""SVHN, Tiny ImageNet, Imagenette and ImageNet, from small archives of the very form of the published ones."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fastarat import data
from fastarat.data import load_dataset, prepare
from fastarat.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02099601")


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def jpeg(value: int, size=(64, 64), mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 2 * value, 10)).save(file, "JPEG", quality=95)
    return file.getvalue()


def reds(split) -> list[float]:
    return split.images[..., 0].float().mean((1, 2)).tolist()


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_the_published_files_are_named():
    """As in torchvision's datasets; Tiny ImageNet's sum is the one in wide use."""
    assert data.SETS["svhn"].test_md5 == "eb5a983be6a315427106f1b164d9cef3"
    assert data.SETS["imagenette-160"].file == "imagenette2-160.tgz"
    assert data.SETS["imagenet"].val == ("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622")
    assert data.SETS["tiny-imagenet"].md5 == "90528d7ca1a48142e341f4ef8d21d0de"


def place_svhn(folder, monkeypatch, **change):
    rng, sums, images = np.random.default_rng(0), {}, {}
    for part, count in (("train", 40), ("test", 20)):
        images[part] = rng.integers(0, 256, (32, 32, 3, count), np.uint8)
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]  # 10 is the digit 0
        savemat(folder / f"{part}_32x32.mat", {"X": images[part], "y": labels} | change)
        sums[f"{part}_md5"] = md5(folder / f"{part}_32x32.mat")
    monkeypatch.setitem(data.SETS, "svhn", replace(data.SETS["svhn"], **sums))
    return images


def test_svhn(tmp_path, monkeypatch):
    images = place_svhn(tmp_path, monkeypatch)
    loaded = load_dataset("svhn", data_dir=tmp_path, val_images=0)
    assert (loaded.shape, loaded.classes) == ((3, 32, 32), tuple("0123456789"))
    assert loaded.train.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert (loaded.test.images[7].numpy() == images["test"][..., 7]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 2))}, "float64"),
        ({"y": np.full((40, 1), 11, np.uint8)}, r"labels 11\.\.11|holds uint8"),
    ],
)
def test_svhn_of_another_form(change, message, tmp_path, monkeypatch):
    place_svhn(tmp_path, monkeypatch, **change)
    with pytest.raises(UserError, match=message):
        load_dataset("svhn", data_dir=tmp_path)


def test_svhn_that_is_damaged_or_missing(tmp_path, monkeypatch):
    place_svhn(tmp_path, monkeypatch)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"test_32x32\.mat has md5"):
        load_dataset("svhn", data_dir=tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="place it at"):
        load_dataset("svhn", data_dir=tmp_path, download=False)


def place_tiny(folder, monkeypatch, annotations=None):
    lines, path = [], folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "\n".join(WNIDS))
        for c, wnid in enumerate(WNIDS):
            archive.writestr(f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt", "boxes")
            for i in range(4):
                mode = "L" if (c, i) == (1, 2) else "RGB"  # a few of the real ones are grey
                archive.writestr(f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG", jpeg(10 * c + i, mode=mode))
        for i in range(6):
            wnid = WNIDS[(i * 2) % 3]
            archive.writestr(f"tiny-imagenet-200/val/images/val_{i}.JPEG", jpeg(20 * i + 5))
            lines.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62")
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", annotations or "\n".join(lines) + "\n")
        archive.writestr("tiny-imagenet-200/test/images/test_0.JPEG", jpeg(200))
    monkeypatch.setitem(data.SETS, "tiny-imagenet", replace(data.SETS["tiny-imagenet"], md5=md5(path)))


def test_tiny_imagenet(tmp_path, monkeypatch):
    place_tiny(tmp_path, monkeypatch)
    loaded = load_dataset("tiny-imagenet", data_dir=tmp_path, val_images=0)
    assert (loaded.classes, loaded.shape) == (WNIDS, (3, 64, 64))
    assert loaded.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert loaded.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # val_2 is of WNIDS[1]: 2 * 2 % 3; the red of image i is 20 * i + 5.
    assert reds(loaded.test) == pytest.approx([5, 65, 45, 105, 25, 85], abs=2)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("val_0.JPEG\tn00000000\t0", "names 'val_0.JPEG' of 'n00000000'"),
        ("../train/x.JPEG\tn01440764\t0", "which it does not hold"),
        ("val_0.JPEG\tn01440764\t0", "leaves out n01443537"),
        ("val_0.JPEG", "which it does not hold"),
    ],
)
def test_tiny_imagenet_of_another_form(annotations, message, tmp_path, monkeypatch):
    place_tiny(tmp_path, monkeypatch, annotations)
    with pytest.raises(UserError, match=message):
        load_dataset("tiny-imagenet", data_dir=tmp_path)


def test_imagenette(ffcv, tmp_path, monkeypatch):
    files = {"imagenette2-160/noisy_imagenette.csv": b"path,noisy_labels_0"}
    for c, wnid in enumerate(WNIDS):
        for i in range(4):
            files[f"imagenette2-160/train/{wnid}/{wnid}_{i}.JPEG"] = jpeg(20 * c + i, (200 + i, 160))
        files[f"imagenette2-160/val/{wnid}/ILSVRC2012_val_{c}.JPEG"] = jpeg(20 * c, (160, 213))
    path = tmp_path / "imagenette2-160.tgz"
    path.write_bytes(tar_of(files, "w:gz"))
    monkeypatch.setitem(data.SETS, "imagenette-160", replace(data.SETS["imagenette-160"], md5=md5(path)))
    loaded = load_dataset("imagenette-160", data_dir=tmp_path, val_images=0, image_size=128)
    assert (loaded.classes, loaded.shape, len(loaded.train), len(loaded.test)) == (WNIDS, (3, 128, 128), 12, 3)
    with pytest.raises(UserError, match="differ in size"):
        load_dataset("imagenette-160", data_dir=tmp_path)
    prepared = prepare("imagenette-160", tmp_path / "out", data_dir=tmp_path, write_mode="jpg")
    assert load_dataset(prepared, val_images=0, image_size=128).shape == (3, 128, 128)


def place_imagenet(folder, monkeypatch):
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": jpeg(20 * c + i, (80 + i, 70)) for i in range(3)})
        for c, wnid in enumerate(WNIDS)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    val = {f"ILSVRC2012_val_{i:08}.JPEG": jpeg(20 * i, (90, 75)) for i in range(1, 7)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    # IDs are not in the order of the WNIDs, and the table holds inner nodes of the hierarchy too.
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [
        (3, WNIDS[0], "tench", 0),
        (1, WNIDS[1], "goldfish", 0),
        (2, WNIDS[2], "golden", 0),
        (4, "n00001740", "entity", 3),
    ]
    table, meta = io.BytesIO(), np.empty((len(rows), 1), kinds)
    for i, row in enumerate(rows):
        meta[i, 0] = row
    savemat(table, {"synsets": meta})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": table.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n2\n1\n3\n",
    }
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(devkit, "w:gz"))
    sums = {part: (name, md5(folder / name)) for part, (name, _) in vars(data.SETS["imagenet"]).items()}
    monkeypatch.setitem(data.SETS, "imagenet", replace(data.SETS["imagenet"], **sums))


def test_imagenet_from_its_three_archives(tmp_path, monkeypatch):
    place_imagenet(tmp_path, monkeypatch)
    loaded = load_dataset("imagenet", data_dir=tmp_path, val_images=0, image_size=64)
    assert (loaded.classes, loaded.shape) == (WNIDS, (3, 64, 64))
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    # Line i of the ground truth is of image i: 1 and 6 are ID 3, the first WNID.
    assert reds(loaded.test) == pytest.approx([20, 120, 40, 100, 60, 80], abs=2)
    assert sorted(path.name for path in (tmp_path / "imagenet/train").iterdir()) == sorted(WNIDS)
    # The archives may go once they are unpacked; the devkit labels what is flat.
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    assert len(load_dataset("imagenet", data_dir=tmp_path, val_images=0, image_size=64).test) == 6


def test_imagenet_as_a_folder(tmp_path):
    for part in ("train", "val"):
        for c, wnid in enumerate(WNIDS):
            (tmp_path / "imagenet" / part / wnid).mkdir(parents=True)
            for i in range(3):
                (tmp_path / "imagenet" / part / wnid / f"{i}.JPEG").write_bytes(jpeg(10 * c + i))
    loaded = load_dataset("imagenet", data_dir=tmp_path, val_images=0)
    assert (len(loaded.train), len(loaded.test)) == (9, 9)


def test_imagenet_is_never_downloaded(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"get ILSVRC2012_img_train\.tar from https://image-net\.org.* place it at"):
        load_dataset("imagenet", data_dir=tmp_path, image_size=64)
    place_imagenet(tmp_path, monkeypatch)
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(tar_of({"data/meta.mat": b"no table"}, "w:gz"))
    changed = replace(data.SETS["imagenet"], devkit=(devkit.name, md5(devkit)))
    monkeypatch.setitem(data.SETS, "imagenet", changed)
    with pytest.raises(UserError, match=r"devkit_t12\.tar\.gz is not the devkit"):
        load_dataset("imagenet", data_dir=tmp_path, image_size=64)


def test_a_hostile_archive_in_imagenets_is_refused(tmp_path, monkeypatch):
    """The rules for archives hold for the tar files in a tar file too."""
    place_imagenet(tmp_path, monkeypatch)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    for inner in (tar_of({"../x.JPEG": jpeg(1)}), tar_of({"a.JPEG": jpeg(1)})[:1100]):
        path.write_bytes(tar_of({f"{WNIDS[0]}.tar": inner}))
        monkeypatch.setitem(data.SETS, "imagenet", replace(data.SETS["imagenet"], train=(path.name, md5(path))))
        with pytest.raises(UserError, match=r"cannot unpack .*(would lie outside|damaged or cut short)"):
            load_dataset("imagenet", data_dir=tmp_path, image_size=64)
        assert not (tmp_path / "imagenet/train").exists()
        assert not list(tmp_path.rglob("x.JPEG"))
