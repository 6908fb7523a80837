"""Anybody's data set, given in Python: a Dataset, a DataLoader, arrays, a Hugging Face split, as our splits."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from fastarat.data.items import in_8_bits, label_key, labels, stacked
from fastarat.data.loaders import Loader, host_bytes
from fastarat.data.splits import Dataset, Split, held_out
from fastarat.data.streams import Indexed, Passes
from fastarat.errors import UserError, nearest
from fastarat.texts import GIVEN
from fastarat.values import coerce, shown

_FRACTION = 0.25  # of the host's memory that a set may take; a larger one is read while training
_PROBED = 32  # items that are read twice before anything else, to see whether they stay
_HASHED = 2 << 30  # bytes of pixels a fingerprint looks at: of larger sets, images at even distances
_ALIASES = {"validation": "val", "valid": "val"}
_KINDS = (
    "a torch Dataset or DataLoader, (images, labels) as tensors or arrays, a Hugging Face split, or "
    '{"train": ..., "val": ..., "test": ...} of those'
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A person's own data set, for `fastarat.train(config, data=...)`; a dict of these fields is the same.

    train, val, test: each a map-style `torch.utils.data.Dataset` of (image, label), a DataLoader, (images, labels) as
    tensors or NumPy arrays, a Hugging Face split, or a `Split`. Without val a part of train is held out.
    transforms: float32 [B, C, H, W] in [0, 1] -> the same, applied to training batches on the device in the place of
    our random crop and flip; its random numbers are PyTorch's global ones, which the run seeds.
    classes: their names, in the order of the labels (default: the data set's own, or the numbers).
    name: for the run folder and tables. hold: keep the images in memory as they are read once, or read each again in
    every epoch (default: hold what fits a quarter of the memory and does not differ from read to read).
    workers: processes that read (default: none where reading takes seconds, else one less than there are cores).
    """

    train: Any
    val: Any = None
    test: Any = None
    transforms: Callable[[Tensor], Tensor] | None = None
    classes: tuple[str, ...] | None = None
    name: str | None = None
    hold: bool | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.train is None:
            raise UserError('data has no training images: expected {"train": ...}, and "val" and "test" beside it')
        if self.transforms is not None and not callable(self.transforms):
            raise UserError(f"transforms={shown(self.transforms)}: expected a function of a batch [B, C, H, W]")
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        if self.workers is not None:
            coerce(self.workers, int, "workers")

    @classmethod
    def of(cls, data: Any) -> Data:
        """Return what a person gave as `data=`. Raises: UserError for something else."""
        if isinstance(data, Data):
            return data
        if isinstance(data, Dataset):
            val, test = (part if len(part) else None for part in (data.val, data.test))
            return cls(train=data.train, val=val, test=test, classes=data.classes, name=data.name)
        if not isinstance(data, Mapping):
            return cls(train=data)
        fields, given = [f.name for f in dataclasses.fields(cls)], {}
        for key, value in data.items():
            name = _ALIASES.get(str(key), str(key))
            if name not in fields:
                raise UserError(f"data has the key {key!r}{nearest(name, fields) or '.'} Known: {', '.join(fields)}.")
            given[name] = value
        if "train" not in given:
            raise UserError('data has no training images: expected {"train": ...}, and "val" and "test" beside it')
        return cls(**given)


class _Part(NamedTuple):
    """A split, and what is known beside it: names of classes, and of the set."""

    split: Split
    classes: tuple[str, ...] | None
    name: str


class _Options(NamedTuple):
    hold: bool | None = None
    workers: int | None = None


def as_split(data: Any, *, num_classes: int | None = None, limit: int | None = None, what: str = "data") -> Split:
    """Return anybody's data as a split, in its order: in memory where it fits, else streamed item by item.

    data: as a part of `Data`. num_classes: that the labels lie within. limit: number of images, taken at even
    distances through the set. what: its name in errors.
    Raises: UserError for what is none, is empty, or holds other than images and labels, naming the item.
    """
    part = _part(data, what, _Options(), limit)
    _check_labels(part.split, num_classes, what)
    return part.split


def as_dataset(data: Any, *, val_images: int | None = None, hold: bool | None = None) -> Dataset:
    """Return anybody's data as a data set; without validation images some of the training images are held out.

    data: a `Data`, what is one, or training images alone. val_images: how many to hold out; None is 1,000 of 10,000 or
    more, else a tenth, and of a DataLoader, whose order is its own, none. hold: overrides `Data.hold`.
    Raises: UserError naming what is wrong, before any training.
    """
    given = Data.of(data)
    options = _Options(given.hold if hold is None else hold, given.workers)
    train = _part(given.train, "training data", options, stream_passes=True)
    others = {
        key: None if part is None else _part(part, f"{key} data", options, shape=train.split.shape)
        for key, part in (("val", given.val), ("test", given.test))
    }
    classes = given.classes or train.classes or _numbered(train.split)
    if len(classes) < 2:
        raise UserError("the training data has one class, label 0: expected 2 or more; look at its labels")
    for what, part in (("training", train), *others.items()):
        if part is not None:
            _check_labels(part.split, len(classes), f"{what} data", named=given.classes is not None)
    content = _fingerprint(train.split, None if others["val"] is None else others["val"].split, len(classes))
    notes = _notes(train.split, content)
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in str(given.name or train.name))[:60]
    kept, val = _validation(train.split, None if others["val"] is None else others["val"].split, val_images)
    empty = Split.empty(kept.shape)
    test = empty if others["test"] is None else others["test"].split
    if others["test"] is None:
        notes = (*notes, "no test images were given")
    return Dataset(
        name=name,
        classes=classes,
        shape=kept.shape,
        train=kept,
        val=empty if val is None else val,
        test=test,
        notes=notes,
        held_out=others["val"] is None,
        given=f"{GIVEN}{name}" + (f"@{content}" if content else ""),
        transforms=given.transforms,
    )


def _numbered(split: Split) -> tuple[str, ...]:
    return tuple(map(str, range(int(split.labels.max()) + 1)))


def _validation(train: Split, val: Split | None, count: int | None) -> tuple[Split, Split | None]:
    """Cut the validation images from the training ones, unless there are some; by row and seed, as `load_dataset`."""
    if val is not None:
        if count not in (None, len(val)):
            raise UserError(f"val_images={count}: {len(val)} validation images were given; leave --eval.val-images out")
        return train, val
    if train.source is not None and train.source.in_order:
        if count:
            raise UserError(
                f"val_images={count}: a DataLoader chooses its images itself, and none can be held out; give the "
                'validation images, data={"train": loader, "val": ...}'
            )
        return train, None
    size = len(train)
    if count is None:
        count = 1000 if size >= 10_000 else size // 10
    if not 0 <= count < size:
        raise UserError(f"val_images={count} does not fit {size} training images: write 0 to {size - 1}")
    kept, chosen = (torch.from_numpy(rows) for rows in held_out(train.labels.numpy(), count, 0))
    val = train.take(chosen)
    if count and val.source is not None and val.source.augmented:
        raise UserError(
            "the training data is augmented by itself, and validation images held out of it would be, too: give "
            'others, data={"train": ..., "val": ...}, or none, eval.val_images=0 (--eval.val-images 0)'
        )
    return train.take(kept), val


def _notes(train: Split, content: str) -> tuple[str, ...]:
    kept = f"given in Python, content {content} (SHA-256, first 16 digits)"
    if train.source is None or not train.source.augmented:
        return (kept,)
    if train.source.in_order:
        return (
            "given in Python as a DataLoader: what it holds is not recorded; a run that goes on within an epoch sees "
            "the same batches only if they depend on global random numbers alone",
        )
    return (f"{kept}, of labels alone: items differ from read to read, by an augmentation of their own",)


def _part(
    data: Any,
    what: str,
    options: _Options,
    limit: int | None = None,
    *,
    stream_passes: bool = False,
    shape: tuple[int, int, int] | None = None,
) -> _Part:
    """Read a part of a data set. stream_passes: a DataLoader stays one. shape: (C, H, W) that is expected."""
    if isinstance(data, Loader):
        data = data.split
    if isinstance(data, torch_data.TensorDataset) and len(data.tensors) == 2:
        data = tuple(data.tensors)
    if isinstance(data, Split):
        part = _Part(data if limit is None else data.take(_evenly(len(data), limit)), None, "split")
    elif _are_arrays(data):
        part = _from_arrays(data[0], data[1], what, limit)
    elif isinstance(data, torch_data.DataLoader):
        part = _from_loader(data, what, limit, stream_passes)
    else:
        part = _from_items(data, what, options, limit)
    if not len(part.split):
        raise UserError(f"the {what} holds no images: expected at least 1")
    if shape not in (None, part.split.shape):
        raise UserError(
            f"the {what} is of images {list(part.split.shape)}, the training data of {list(shape or ())}: "
            "expected one shape"
        )
    return part


def _are_arrays(data: Any) -> bool:
    """Whether these are (images, labels), images in one array."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], (Tensor, np.ndarray))


def _from_arrays(images: Any, numbers: Any, what: str, limit: int | None) -> _Part:
    if len(images) == 0:
        raise UserError(f"the {what} holds no images: expected at least 1")
    found = labels(numbers, len(images), f"the {what}")
    if limit is not None:
        rows = _evenly(len(images), limit)
        images, found = images[rows if isinstance(images, Tensor) else rows.numpy()], found[rows]
    kept = in_8_bits(stacked(images, f"the {what}"))
    count, height, width, channels = kept.shape
    return _Part(Split(kept, found, torch.arange(count), (channels, height, width)), None, "arrays")


def _evenly(count: int, limit: int | None) -> Tensor:
    """Rows at even distances, as an evaluation takes them."""
    return torch.arange(count) if limit is None or limit >= count else torch.arange(limit) * count // limit


def _from_loader(data: torch_data.DataLoader, what: str, limit: int | None, stream: bool) -> _Part:
    try:
        length = len(data)
    except TypeError:
        raise UserError(_endless(data.dataset, what)) from None
    names, name = _classes_of(data.dataset), _name_of(data.dataset)
    if not length:
        raise UserError(f"the {what} holds no images: expected at least 1")
    # A whole pass: classes and their counts are known before work starts, and so is a batch of another shape.
    found, shape = [], (0, 0, 0)
    for images, numbers in Passes(data, what).batches(0):
        shape = (images.shape[3], images.shape[1], images.shape[2])
        found.append((images[:0] if stream else images, numbers))
    numbers = torch.cat([numbers for _, numbers in found])
    rows = torch.arange(len(numbers))
    if stream:
        sizes = [len(numbers) for _, numbers in found]
        source = Passes(data, what, shape, tuple(sizes))
        return _Part(Split(None, numbers, rows, shape, source=source), names, name)
    split = Split(in_8_bits(torch.cat([images for images, _ in found])), numbers, rows, shape)
    return _Part(split if limit is None else split.take(_evenly(len(split), limit)), names, name)


def _endless(data: Any, what: str) -> str:
    return (
        f"the {what} is a {type(data).__name__} that has no length, so that no epoch of it ends: expected a data set "
        "with __len__ and __getitem__; collect an iterable in a list, or write its items to a folder"
    )


def _from_items(data: Any, what: str, options: _Options, limit: int | None) -> _Part:
    """Read a data set item by item: whole, into memory, or a few, and the others while training."""
    if isinstance(data, (tuple, dict, str, bytes)) or not (hasattr(data, "__getitem__") or hasattr(data, "__iter__")):
        got = f"a {type(data).__name__} of {len(data)}" if isinstance(data, tuple) else shown(data)
        raise UserError(f"the {what} is {got}: expected {_KINDS}")
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise UserError(_endless(data, what))
    try:
        total = len(data)
    except TypeError:
        raise UserError(_endless(data, what)) from None
    if total == 0:
        raise UserError(f"the {what} holds no images: expected at least 1")
    rows = _evenly(total, limit)
    source = _probed(data, rows, what, options.workers)
    split = Split(None, torch.zeros(len(rows), dtype=torch.int64), rows, source.shape, source=source)
    size = len(rows) * source.shape[0] * source.shape[1] * source.shape[2] * (1 if source.dtype == torch.uint8 else 4)
    hold = options.hold
    if hold is None:
        hold = not source.augmented and size <= _FRACTION * host_bytes()
    numbers = None if hold else _known_labels(data, source, rows)
    if numbers is None:
        split = _read(split, source, hold)
    else:
        split = dataclasses.replace(split, labels=numbers)
    return _Part(split, _classes_of(data), _name_of(data))


def _probed(data: Any, rows: Tensor, what: str, workers: int | None) -> Indexed:
    """Look at a few items, twice: shape, type, and whether they stay. Raises: UserError naming the item."""
    probed = rows[_evenly(len(rows), _PROBED)].tolist()
    reader = Indexed(data, what, (0, 0, 0), torch.uint8)
    began = time.perf_counter()
    first = reader.read(probed, 0)
    seconds = (time.perf_counter() - began) / len(probed)
    again = reader.read(probed, 1)
    height, width, channels = first[0][0].shape
    floating = any(image.is_floating_point() for image, _ in (*first, *again))
    moved = any(a.shape != b.shape or not torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    dtype = torch.float32 if floating else torch.uint8
    return Indexed(data, what, (channels, height, width), dtype, moved, seconds, workers)


def _read(split: Split, source: Indexed, hold: bool) -> Split:
    """Read all items once: all of them, or the labels alone."""
    count, (channels, height, width) = len(split), source.shape
    images = torch.empty((count if hold else 0, height, width, channels), dtype=source.dtype)
    parts = [part.tolist() for part in split.indices.split(256)]
    found, start = [], 0
    for pixels_, numbers in source.batches(parts, 0):
        if hold:
            images[start : start + len(numbers)] = pixels_
        found.append(numbers)
        start += len(numbers)
    numbers = torch.cat(found)
    if not hold:
        return dataclasses.replace(split, labels=numbers)
    return Split(in_8_bits(images), numbers, torch.arange(count), source.shape)


def _known_labels(data: Any, source: Indexed, rows: Tensor) -> Tensor | None:
    """Return the labels of all items without reading an image, where the data set has them and they are true."""
    found = _listed(data)
    if found is None or len(found) != len(data):
        return None
    probed = rows[_evenly(len(rows), 8)].tolist()
    if any(number != int(found[row]) for row, (_, number) in zip(probed, source.read(probed, 0), strict=True)):
        return None  # a target_transform, for one
    return found[rows]


def _listed(data: Any) -> Tensor | None:
    if isinstance(data, torch_data.Subset):
        inner = _listed(data.dataset)
        return None if inner is None else inner[torch.as_tensor(list(data.indices))]
    try:
        if hasattr(data, "features") and hasattr(data, "column_names"):  # Hugging Face's
            return labels(list(data[label_key(data.column_names, "data")]), len(data), "data")
        listed = getattr(data, "targets", getattr(data, "labels", None))
        return None if listed is None else labels(listed, len(data), "data")
    except (UserError, TypeError, ValueError):
        return None


def _classes_of(data: Any) -> tuple[str, ...] | None:
    """Names of the classes, where a data set has them: `classes`, or Hugging Face's feature."""
    if isinstance(data, torch_data.Subset):
        return _classes_of(data.dataset)
    names = getattr(data, "classes", None)
    features = getattr(data, "features", None)
    if isinstance(features, Mapping) and hasattr(data, "column_names"):
        try:
            names = getattr(features[label_key(features, "data")], "names", None)
        except UserError:
            return None
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _name_of(data: Any) -> str:
    while isinstance(data, torch_data.Subset):
        data = data.dataset
    named = getattr(getattr(data, "info", None), "dataset_name", None)
    return str(named) if named else type(data).__name__


def _check_labels(split: Split, num_classes: int | None, what: str, named: bool = False) -> None:
    if num_classes is None or int(split.labels.max()) < num_classes:
        return
    row = int(split.labels.argmax())
    of = "names were given" if named else "classes are known"
    raise UserError(
        f"item {int(split.indices[row])} of the {what} has the label {int(split.labels[row])}, and {num_classes} {of}: "
        f"expected 0 to {num_classes - 1}"
    )


def _fingerprint(train: Split, val: Split | None, num_classes: int) -> str:
    """Hash what a run depends on, 16 hexadecimal digits; "" for a DataLoader, whose content nobody can look at twice.

    Of a data set that is read while training, and so of what is augmented, its labels and shape alone.
    """
    if train.source is not None and train.source.in_order:
        return ""
    digest = hashlib.sha256(f"{num_classes}".encode())
    for split in (train, val):
        if split is None:
            continue
        digest.update(repr((split.shape, len(split), split.images is None)).encode())
        digest.update(split.labels.numpy().tobytes())
        if split.images is not None:
            digest.update(str(split.images.dtype).encode())
            for part in split.images[:: max(1, -(-split.num_bytes // _HASHED))].split(1024):
                digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
