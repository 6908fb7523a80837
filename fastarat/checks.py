"""What a person may give as images, labels, a network's logits: one place, the same words everywhere.

What reads no tensor's values costs nothing and is asked at every call. `check_pixels` and `check_classes` wait for the
device: where that means waiting, they are asked once per shape, before work starts and where `readable` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastarat.device import check_device, readable, waits
from fastarat.errors import UserError
from fastarat.values import shown


def input_channels(model: nn.Module) -> int | None:
    """Channels of the images `model` takes, as far as its first convolution tells."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def check_images(images: Any, name: str = "images", channels: int | None = None) -> None:
    """Raise UserError unless `images` look like float32 [B, C, H, W], with the expression that mends them.

    channels: C that the network takes, to tell [B, H, W, C] by; without it, by a last dimension of 3, or 1 of square
    images. No value is read.
    """
    if not isinstance(images, Tensor):
        mend = f"; write torch.from_numpy({name})" if type(images).__module__ == "numpy" else ""
        raise UserError(f"{name}={shown(images)}: expected a float32 tensor [B, C, H, W] in [0, 1]{mend}")
    mended, shape, looks = name, list(images.shape), ""
    if len(shape) == 3:
        mended, shape = f"{mended}[None]", [1, *shape]
    if len(shape) == 4:
        _, second, third, last = shape
        swapped = last == channels != second
        if channels is None:
            swapped = second > 4 and third > 4 and (last == 3 or (last == 1 and second == third))
        if swapped:
            mended, looks = f"{mended}.permute(0, 3, 1, 2)", ", which looks like [B, H, W, C]"
    if images.dtype != torch.float32:
        mended += ".float()" if images.is_floating_point() or images.dtype == torch.bool else ".float() / 255"
    if mended != name or len(shape) != 4 or images.numel() == 0:
        mend = f"; write {mended}" if mended != name and len(shape) == 4 and images.numel() else ""
        raise UserError(
            f"{name} {'are' if name.endswith('s') else 'is'} {images.dtype} {list(images.shape)}{looks}: "
            f"expected float32 [B, C, H, W] in [0, 1]{mend}"
        )


def check_pixels(images: Tensor, name: str = "images") -> None:
    """Raise UserError unless every pixel lies in [0, 1], rounding of 1e-6 aside. Reads them: waits for the device."""
    low, high = (v.item() for v in images.detach().aminmax())
    if math.isnan(low) or math.isnan(high):
        raise UserError(f"{name} contain NaN: expected values in [0, 1]")
    if low >= -1e-6 and high <= 1 + 1e-6:
        return
    if max(-low, high) > 255:
        mend = "these are no 8-bit pixels; look at how they were read"
    elif low >= 0 and high > 2:
        mend = f"divide by 255 (write {name} / 255)"
    elif low > -0.01 and high < 1.01:
        mend = f"write {name}.clamp(0, 1)"
    else:
        mend = "remove the normalisation and put it inside the model"
    raise UserError(f"{name} span [{low:.8g}, {high:.8g}], outside [0, 1]: {mend}")


def check_labels(labels: Any, images: Tensor, name: str = "labels") -> None:
    """Raise UserError unless `labels` are int64 [B], one per image. No value is read."""
    size = len(images)
    if not isinstance(labels, Tensor):
        listed = isinstance(labels, (list, tuple)) or type(labels).__module__ == "numpy"
        mend = f"; write torch.as_tensor({name})" if listed else ""
        raise UserError(f"{name}={shown(labels)}: expected an int64 tensor [{size}]{mend}")
    mended = name
    if labels.dim() == 2:
        mended += ".squeeze(1)" if labels.shape[1] == 1 else ".argmax(1)"
    if labels.dtype != torch.int64 and not mended.endswith(".argmax(1)"):
        mended += ".long()"
    if mended != name or labels.dim() != 1:
        mend = f"; write {mended}" if labels.dim() in (1, 2) else ""
        verb = "are" if name.endswith("s") else "is"
        raise UserError(f"{name} {verb} {labels.dtype} {list(labels.shape)}: expected int64 [{size}]{mend}")
    if len(labels) != size:
        raise UserError(f"{size} images but {len(labels)} {name}: expected one label per image")


def check_classes(labels: Tensor, num_classes: int, name: str = "labels") -> None:
    """Raise UserError unless every label lies in [0, num_classes). Reads the values: waits for the device."""
    low, high = (v.item() for v in labels.aminmax())
    if low < 0 or high >= num_classes:
        mend = f"; write {name} - 1" if (low, high) == (1, num_classes) else ""
        raise UserError(
            f"{name} span {low} to {high}, but the model has {num_classes} classes: "
            f"expected 0 to {num_classes - 1}{mend}"
        )


def check_logits(logits: Any, images: Tensor, who: str = "the model") -> None:
    """Raise UserError unless `logits` are a tensor [B, K] of at least two classes."""
    size = len(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != size or logits.shape[1] < 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{who} returned {got} for {size} images: expected logits [{size}, K], K >= 2")


def logits_of(forward: Callable[[Tensor], Tensor], images: Tensor, model: nn.Module | None = None) -> Tensor:
    """Return a network's logits [B, K] of `images`. Raises: UserError in one line where it takes or makes others.

    model: whose forward it is, to tell a network in another precision by. During a capture errors stay as they are.
    """
    try:
        logits = forward(images)
    except (UserError, torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if not readable(images):
            raise
        first = str(error).strip().split("\n")[0]
        if not isinstance(error, (RuntimeError, ValueError)):
            first = f"{type(error).__name__}: {first}"
        parameters = () if model is None else model.named_parameters()
        others = [(n, p.dtype) for n, p in parameters if p.is_floating_point() and p.dtype != images.dtype]
        # Not refused before: a network may cast its images itself.
        mend = f"; {others[0][0]} is {others[0][1]}: call model.float()" if others else ""
        raise UserError(f"the model does not take images {images.dtype} {list(images.shape)}: {first}{mend}") from error
    check_logits(logits, images)
    return logits


def check_no_probabilities(logits: Tensor) -> None:
    """Raise UserError for probabilities (rows in [0, 1] that sum to 1), their logarithms (logsumexp 0), and NaN.

    logits: float [B, K]. Reads the values: waits for the device.
    """
    rows, close = logits.detach().float(), 1e-4  # a softmax in half precision is as near as that, and chance is not
    if not bool(rows.isfinite().all()):
        raise UserError("the model returned NaN or infinite logits: expected finite ones; check its weights")
    low, high = (value.item() for value in rows.aminmax())
    if low >= -1e-6 and high <= 1 + close and bool(((rows.sum(1) - 1).abs() < close).all()):
        raise UserError(
            "the model returned probabilities (rows in [0, 1] that sum to 1): expected logits, because "
            "attacks on a saturated softmax find no gradient; remove the final softmax"
        )
    if high <= close and bool((rows.logsumexp(1).abs() < close).all()):
        raise UserError(
            "the model returned log-probabilities (logsumexp 0 in every row): expected logits, of which losses and "
            "attacks take the softmax themselves; remove the final log-softmax"
        )


def check_soft(targets: Tensor, num_classes: int, name: str = "labels") -> None:
    """Raise UserError unless every row of `targets`, float [B, K], is a distribution over the classes. Waits."""
    low, high = (v.item() for v in targets.sum(1).aminmax())
    if targets.shape[1] != num_classes or not (abs(low - 1) < 1e-3 and abs(high - 1) < 1e-3) or targets.min() < -1e-6:
        raise UserError(
            f"{name} are {targets.dtype} {list(targets.shape)} with rows that sum to {low:.4g} to {high:.4g}: expected "
            f"a class of {num_classes} each (int64 [B]), or rows of {num_classes} shares that sum to 1"
        )


def is_soft(targets: Any, size: int) -> bool:
    """Whether `targets` look like shares of the classes, float [size, K], and not like labels. No value is read."""
    floats = isinstance(targets, Tensor) and targets.is_floating_point()
    return floats and targets.dim() == 2 and len(targets) == size and targets.shape[1] > 1


def check_same(labels: Any, *, soft: bool = False, **tensors: Any) -> None:
    """Raise UserError unless the tensors, logits [B, K] by name, have one shape and the labels are int64 [B].

    soft: whether the labels may also be shares of the classes, float [B, K].
    """
    first, one = next(iter(tensors.items()))
    for name, other in tensors.items():
        if not isinstance(other, Tensor) or other.dim() != 2 or not other.is_floating_point():
            raise UserError(f"{name}={shown(other)}: expected logits, float [B, K]")
        if other.shape != one.shape:
            raise UserError(f"{name} is {list(other.shape)}, {first} {list(one.shape)}: expected one shape, [B, K]")
    if not (soft and is_soft(labels, len(one)) and labels.shape == one.shape):
        check_labels(labels, one)


class BatchCheck:
    """Raises UserError for a batch that is not what a step takes; a GPU's values are read once per shape.

    why_hard: why each image must have one class, "" where labels may be shares of the classes, float [B, K].
    """

    def __init__(
        self,
        model: nn.Module,
        companions: nn.Module,
        channels: int,
        num_classes: int,
        defense: object,
        why_hard: str = "",
    ) -> None:
        self.why_hard = why_hard
        self.device = next(model.parameters()).device
        self.channels, self.num_classes, self.owner = channels, num_classes, type(defense).__name__
        self.needs_two = any(isinstance(m, nn.BatchNorm1d) for m in companions.modules())
        self.seen: set[torch.Size] = set()

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        check_images(images, channels=self.channels)
        if soft := is_soft(labels, len(images)):
            if self.why_hard:
                raise UserError(f"labels are {labels.dtype} {list(labels.shape)}, but {self.why_hard}: write int64 [B]")
        else:
            check_labels(labels, images)
        if images.shape[1] != self.channels:
            raise UserError(f"images have {images.shape[1]} channels, the example had {self.channels}")
        check_device(self.device, images=images, labels=labels)
        if len(images) == 1 and self.needs_two:
            raise UserError(
                f"images are a batch of one: BatchNorm in what {self.owner} trains beside the model needs at least "
                "2 images; leave a last batch of one out, drop_last=True"
            )
        if (waits(images) and images.shape in self.seen) or not readable(images):
            return
        check_pixels(images)
        (check_soft if soft else check_classes)(labels, self.num_classes)
        self.seen.add(images.shape)
