"""What anybody's data set holds, one item or a whole array at a time, as our pixels and labels.

Images are PIL ones, NumPy arrays or tensors; 8 bits, or floating point in [0, 1]. Of an array the last dimension is the
channels, of a tensor the first, unless that one is larger than 4 and the other is not; without a third dimension it is
grey.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastarat.checks import check_pixels
from fastarat.errors import UserError
from fastarat.values import shown

_IMAGES = ("image", "images", "img", "pixel_values")
_LABELS = ("label", "labels", "fine_label", "target", "targets")
_MOST_CHANNELS = 4
_EXPECTED = "an image [C, H, W] or [H, W, C], a PIL image, uint8, or floating point in [0, 1]"


def parted(item: Any, who: str) -> tuple[Any, Any]:
    """Return image and label of an item: a pair, or a mapping as Hugging Face's. Raises: UserError."""
    if isinstance(item, Mapping):
        return item[key_of(item, _IMAGES, who, "image")], item[key_of(item, _LABELS, who, "label")]
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    got = f"{len(item)} values" if isinstance(item, (tuple, list)) else f"a {type(item).__name__}"
    raise UserError(f"{who} is {got}: expected (image, label); select those two, in __getitem__ or a wrapper")


def key_of(item: Any, names: tuple[str, ...], who: str, what: str) -> str:
    """Return the one of `names` that a mapping has. Raises: UserError naming the keys there are."""
    for name in names:
        if name in item:
            return name
    raise UserError(
        f"{who} has the keys {', '.join(map(str, item))}, none of them an {what}'s: expected {' or '.join(names)}; "
        f"rename_column makes one, such as rename_column({str(next(iter(item), 'x'))!r}, {what!r})"
    )


def label_key(columns: Any, who: str) -> str:
    """Return the column of labels. Raises: UserError."""
    return key_of(columns, _LABELS, who, "label")


def pixels(image: Any, who: str) -> Tensor:
    """Return an image as a tensor [H, W, C], uint8 or float32 in [0, 1]. Raises: UserError."""
    if type(image).__module__.startswith("PIL."):
        if image.mode[0] in "IF":  # Pillow would clip 16 bits at 255 without a word
            raise UserError(f"{who} has pixels of mode {image.mode}, more than 8 bits: convert them to [0, 1] yourself")
        image = np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    return _in_memory(_last(image, who, 2), who)


def stacked(images: Any, who: str) -> Tensor:
    """Return images, [N, C, H, W], [N, H, W, C] or grey [N, H, W], as [N, H, W, C]; uint8 or float32 in [0, 1]."""
    return _in_memory(_last(images, who, 3), who)


def _last(image: Any, who: str, grey: int) -> Tensor:
    """Channels last. grey: dimensions of what has no channels."""
    tensor = isinstance(image, Tensor)
    if not tensor and not isinstance(image, np.ndarray):
        if isinstance(image, (list, tuple)) or hasattr(image, "__array__"):
            raise UserError(f"{who} is a {type(image).__name__}: expected {_EXPECTED}; write numpy.asarray of it")
        raise UserError(f"{who} is {shown(image)}: expected {_EXPECTED}")
    if not tensor and image.dtype.kind not in "uifb":
        raise UserError(f"{who} is an array of {image.dtype}: expected {_EXPECTED}")
    if not tensor:
        image = torch.from_numpy(image if image.flags.writeable and image.dtype.isnative else image.copy())
    image = image.detach().cpu()
    if image.dim() == grey:
        return image[..., None]
    if image.dim() != grey + 1 or image.numel() == 0:
        raise UserError(f"{who} has the shape {list(image.shape)}: expected {_EXPECTED}")
    first, last = image.shape[grey - 2], image.shape[-1]
    if min(first, last) > _MOST_CHANNELS:
        raise UserError(f"{who} has the shape {list(image.shape)}: expected at most {_MOST_CHANNELS} channels")
    is_first = first <= _MOST_CHANNELS if tensor else last > _MOST_CHANNELS
    return image.movedim(grey - 2, -1) if is_first else image


def _in_memory(image: Tensor, who: str) -> Tensor:
    if image.dtype == torch.uint8:
        return image.contiguous()
    if not image.is_floating_point():
        raise UserError(f"{who} is {image.dtype}: expected uint8, or floating point in [0, 1]; write .astype('uint8')")
    image = image.to(torch.float32).contiguous()
    try:
        check_pixels(image, "pixels")
    except UserError as error:
        raise UserError(f"{who}: {error}") from None
    return image


def in_8_bits(images: Tensor) -> Tensor:
    """Return images as uint8 if all are n / 255 within 1e-6, which takes a quarter of the room; else as they are."""
    if images.dtype == torch.uint8:
        return images
    made = torch.empty(images.shape, dtype=torch.uint8)
    for start in range(0, len(images), 1024):  # a whole set twice may not fit
        part = images[start : start + 1024]
        made[start : start + 1024] = (part * 255).round_().clamp_(0, 255)
        if ((made[start : start + 1024].float() / 255) - part).abs().max() > 1e-6:
            return images
    return made


def label(value: Any, who: str) -> int:
    """Return a label as a whole number of 0 or more. Raises: UserError."""
    shape = list(getattr(value, "shape", ())) or ([len(value)] if isinstance(value, (list, tuple)) else [])
    if shape not in ([], [1]):
        raise UserError(
            f"the label of {who} has the shape {shape}: expected one whole number; of one-hot, its .argmax()"
        )
    try:
        found = operator.index(next(iter(value)) if shape else value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise UserError(
            f"the label of {who} is {shown(value)}: expected a whole number, 0 for the first class"
        ) from None
    if found < 0:
        raise UserError(f"the label of {who} is {found}: expected 0 or more")
    return found


def labels(values: Any, count: int, who: str) -> Tensor:
    """Return labels as int64 [N]. Raises: UserError for others, or another number of them than `count`."""
    try:
        found = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError):
        raise UserError(f"the labels of {who} are {shown(values)}: expected whole numbers [N]") from None
    if found.dim() == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.dim() != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        mend = "; of one-hot ones write .argmax(1)" if found.dim() == 2 else "; write .astype('int64')"
        raise UserError(f"the labels of {who} are {found.dtype} {list(found.shape)}: expected whole numbers [N]{mend}")
    if len(found) != count:
        raise UserError(f"{who}: {count} images but {len(found)} labels: expected one label per image")
    found = found.to(torch.int64)
    if count and found.min() < 0:
        raise UserError(f"{who}: label {int(found.min())}, of item {int(found.argmin())}: expected 0 or more")
    return found
