"""The augmentation that both loaders share: crops and flips of whole batches, on the device, from one generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastarat.data.crops import DRAWS, random_boxes, resize_boxes
from fastarat.data.splits import Dataset
from fastarat.errors import UserError

_LARGE = 128  # pixels a side from which images are augmented as ImageNet's are


@dataclass(frozen=True)
class Augment:
    """Random crop, after zero padding (pixels on each side) or resized, then a fair coin's horizontal flip.

    scale: smallest and largest share of an image's area of a resized crop, None for none. ratio: of width to height.
    """

    padding: int = 0
    flip: bool = False
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not isinstance(self.padding, int) or self.padding < 0:
            raise UserError(f"padding={self.padding!r} is not a number of pixels: write 0 or more")
        if self.scale is not None and not (0 < self.scale[0] <= self.scale[1] <= 1):
            raise UserError(f"scale={self.scale!r} is not a range of shares of an image: write such as (0.08, 1.0)")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio={self.ratio!r} is not a range of widths to heights: write such as (0.75, 1.33)")
        if self.scale is not None and self.padding:
            raise UserError(f"padding={self.padding} and scale={self.scale} are two kinds of crop: choose one")

    def __str__(self) -> str:
        crop = f"random crop, zero padding {self.padding}"
        if self.scale is not None:
            crop = f"random resized crop of {self.scale[0]:g} to {self.scale[1]:g} of the area"
        return crop + (", horizontal flip" if self.flip else "")

    def __call__(self, images: Tensor) -> Tensor:
        """What is done to a batch, float32 [B, C, H, W] in [0, 1], after crop and flip."""
        return images


@dataclass(frozen=True)
class Transforms(Augment):
    """A person's own augmentation, on the device, in the place of ours.

    by: float32 [B, C, H, W] in [0, 1] -> the same. Its random numbers are PyTorch's global ones, which a run seeds.
    """

    by: Callable[[Tensor], Tensor] = field(default=lambda images: images)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images as `by` makes them. Raises: UserError for others than float32 of the same shape."""
        try:
            made = self.by(images)
        except Exception as error:  # anybody's code fails in its own ways
            first = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
            raise UserError(f"transforms raised {type(error).__name__} ({first}) for a batch of images") from error
        if not isinstance(made, Tensor) or made.shape != images.shape or made.dtype != images.dtype:
            got = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise UserError(
                f"transforms returned {got} for images float32 {list(images.shape)}: expected the same type and shape"
            )
        return made.contiguous(memory_format=torch.channels_last)

    def __str__(self) -> str:
        return f"{getattr(self.by, '__name__', type(self.by).__name__)}, given in Python, on the device"


def check_transforms(recipe: Augment | None, images: Tensor) -> None:
    """Try a person's own augmentation on float32 [B, C, H, W] in [0, 1]. Raises: UserError for what leaves that."""
    if isinstance(recipe, Transforms) and len(images):
        least, most = (float(value) for value in recipe(images).aminmax())
        if not (least >= 0 and most <= 1):
            raise UserError(
                f"transforms returned images that span [{least:g}, {most:g}]: expected [0, 1]; clamp them, and put a "
                "normalisation inside the model (normalize=True)"
            )


def default_augment(dataset: Dataset) -> Augment:
    """Choose the usual augmentation for a data set's shape.

    Images cut as they are read, and sides of 128 and more, get ImageNet's: random resized crops of 8 % to all of the
    area. Sides of 16 and more are padded by 4 (CIFAR's custom), smaller ones by 1 (digits); colour images are flipped,
    grey ones, which are mostly characters, are not. A person's own `transforms` take
    their place.
    """
    if dataset.transforms is not None:
        return Transforms(by=dataset.transforms)
    channels, height, width = dataset.shape
    if dataset.train.crop or min(height, width) >= _LARGE:
        return Augment(flip=channels == 3, scale=(0.08, 1.0))
    return Augment(padding=4 if min(height, width) >= 16 else 1, flip=channels == 3)


def augment(
    images: Tensor,
    recipe: Augment | None,
    generator: torch.Generator | None = None,
    rows: Tensor | None = None,
    total: int | None = None,
) -> Tensor:
    """Convert pixels to float32 in [0, 1] and apply a seeded random crop and flip to each image.

    images: uint8 or float32 [B, C, H, W], pixels 0..255 or [0, 1]; channels-last is fastest. recipe: None converts
    only. generator: of the images' device. rows: int64 [B], which ones of a batch of `total` the images are: what is
    drawn is drawn for all of them. Shapes are fixed and nothing is read back, so a CUDA graph can hold it.

    Returns: float32 [B, C, H, W], channels-last; never a view of `images`.
    """
    batch, channels, height, width = images.shape
    if recipe is not None and recipe.scale is not None:
        return _resized(images, recipe, draw(recipe, total or batch, images.device, generator, rows))
    pixels = images.permute(0, 2, 3, 1)
    if recipe is not None and (recipe.padding or recipe.flip):
        device, padding = images.device, recipe.padding
        # Crop and flip are one gather of whole pixels: slicing per image is a Python loop, and grid_sample
        # interpolates.
        flipped, offsets, _ = draw(recipe, total or batch, device, generator, rows)
        rows = torch.arange(height, device=device).expand(batch, height)
        columns = torch.arange(width, device=device).expand(batch, width)
        if flipped is not None:
            columns = torch.where(flipped, width - 1 - columns, columns)
        if offsets is not None:
            rows, columns = rows + offsets[0], columns + offsets[1]
            pixels = F.pad(pixels, (0, 0, padding, padding, padding, padding))
        high, wide = height + 2 * padding, width + 2 * padding
        rows = rows + high * torch.arange(batch, device=device)[:, None]
        # Whole pixels are copied by one flat index: on a CPU four times faster than indexing with three tensors.
        flat = (rows[:, :, None] * wide + columns[:, None, :]).reshape(-1)
        pixels = pixels.reshape(-1, channels).index_select(0, flat).view(batch, height, width, channels)
    scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if images.dtype == torch.uint8:
        scaled.div_(255)
    return scaled.permute(0, 3, 1, 2)


def _resized(images: Tensor, recipe: Augment, drawn: tuple[Tensor | None, Tensor | None, Tensor | None]) -> Tensor:
    batch, _, height, width = images.shape
    flipped, _, draws = drawn
    assert recipe.scale is not None
    assert draws is not None
    high, wide = (torch.full((batch,), side, device=images.device) for side in (height, width))
    boxes = random_boxes(draws, high, wide, recipe.scale, recipe.ratio)
    return resize_boxes(augment(images, None), boxes, None if flipped is None else flipped[:, 0])


def draw(
    recipe: Augment,
    batch: int,
    device: torch.device,
    generator: torch.Generator | None,
    rows: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Draw who of a batch is flipped, bool [B, 1]; a crop's offsets, int64 [2, B, 1]; and a resized crop's numbers.

    None where there is none; the numbers are uniform, float32 [B, DRAWS]. All that `augment` draws, so that a batch can
    be passed over without its pixels. rows: those that are wanted of what is drawn for all; None: all.
    """
    integers = partial(torch.randint, generator=generator, device=device)
    flipped = integers(2, (batch, 1), dtype=torch.bool) if recipe.flip else None
    offsets = integers(2 * recipe.padding + 1, (2, batch, 1)) if recipe.padding else None
    resized = None if recipe.scale is None else torch.rand((batch, DRAWS), generator=generator, device=device)
    if rows is not None:
        rows = rows.to(device)
        flipped, resized = (None if drawn is None else drawn[rows] for drawn in (flipped, resized))
        offsets = None if offsets is None else offsets[:, rows]
    return flipped, offsets, resized
