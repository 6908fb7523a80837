"""RandAugment on the device: a whole batch at once, pixel for pixel what Pillow makes of each image."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastarat.errors import UserError

OPERATIONS = (
    "identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
STRONGEST = 30
"""Magnitudes are 0 to 30, as in the paper."""
_BLENDS = ("brightness", "color", "contrast", "sharpness")
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Tables(NamedTuple):
    """What each operation does at one magnitude, by (operation, sign); what it does not concern is left as it is.

    affine: int64 [14, 2, 6], 16.16 fixed point, from a pixel of the result to one of the image. blend: float32
    [14, 2, 4], factors of `_BLENDS`. mask: int64 [14, 2], the bits kept. threshold: float64 [14, 2], of solarize.
    """

    affine: Tensor
    blend: Tensor
    mask: Tensor
    threshold: Tensor


@dataclass(frozen=True)
class RandAugment:
    """Applies `count` operations, drawn for each image from fourteen with equal chances, at one magnitude of 0 to 30.

    Range and kind of the operations are torchvision's: shear to 0.3, translation to 150/331 of a side, rotation to 30
    degrees, blends 1 +- 0.9, posterize to 4 bits, solarize from 255 down; where a sign has a meaning it is drawn.
    Geometry takes the nearest pixel and fills with black.

    What an image gets depends on (seed, image) alone, not on its batch.

    Source: Cubuk et al., 2020 (arXiv 1909.13719); torchvision's RandAugment, whose operations on PIL images these are.
    """

    count: int
    magnitude: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.magnitude <= STRONGEST:
            raise UserError(
                f"randaugment={self.count},{self.magnitude}: expected operations per image, 1 or more, and a magnitude "
                f"of 0 to {STRONGEST}, such as 2,9"
            )

    @classmethod
    def of(cls, numbers: Sequence[int]) -> RandAugment:
        """Return the one of these two numbers, as a config holds them. Raises: UserError."""
        if len(numbers) != 2:
            given = ",".join(map(str, numbers))
            raise UserError(f"randaugment={given}: expected operations per image and a magnitude, such as 2,9")
        return cls(*numbers)

    def draw(self, index: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Draw operations and signs, int64 [count, B] each. index: int64 [B], which images; on any device the same."""
        draws = index[None] * self.count + torch.arange(self.count, device=index.device)[:, None]
        bits = _scramble(draws, seed)
        return (bits >> 8 & 0xFFFFFFFFFFFF) % len(OPERATIONS), bits & 1

    def __call__(self, images: Tensor, index: Tensor, seed: int) -> Tensor:
        """Augment a batch. images: float32 [B, C, H, W], k/255. index: int64 [B]. Returns new ones like them."""
        pixels = (images * 255).round_().to(torch.uint8)
        operations, signs = self.draw(index, seed)
        for operation, sign in zip(operations, signs, strict=True):
            pixels = apply(pixels, operation, sign, self.magnitude)
        return torch.empty_like(images).copy_(pixels).div_(255)


def apply(pixels: Tensor, operation: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Apply one of OPERATIONS to each image.

    pixels: uint8 [B, C, H, W]. operation: int64 [B], positions in OPERATIONS. sign: int64 [B], 1 for minus.
    Returns: uint8 [B, C, H, W].
    """
    at = tables(magnitude, *pixels.shape[2:], pixels.device)
    affine, blend, mask, threshold = (table[operation, sign] for table in at)
    # One after the other: an operation's numbers leave an image as it is in the parts that are not its own.
    pixels = _moved(pixels.contiguous(), affine)
    pixels = _mapped(pixels, operation, blend, mask, threshold)
    return _sharpened(_coloured(pixels, blend), blend)


@functools.lru_cache(maxsize=8)
def tables(magnitude: int, height: int, width: int, device: torch.device) -> Tables:
    """Return what the operations do at `magnitude` to images of this size."""
    share = magnitude / STRONGEST
    unit = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    affine = [[unit, unit] for _ in OPERATIONS]
    blend = torch.ones(len(OPERATIONS), 2, len(_BLENDS))
    mask = torch.full((len(OPERATIONS), 2), 255)
    threshold = torch.full((len(OPERATIONS), 2), 256.0, dtype=torch.float64)
    by_name = {name: i for i, name in enumerate(OPERATIONS)}
    for minus, sign in enumerate((1, -1)):
        shear, turn = sign * 0.3 * share, -math.radians(sign * 30 * share)
        cos, sin = math.cos(turn), math.sin(turn)
        x, y = width / 2, height / 2
        moves = {
            "shear-x": (1.0, shear, 0.0, 0.0, 1.0, 0.0),
            "shear-y": (1.0, 0.0, 0.0, shear, 1.0, 0.0),
            "translate-x": (1.0, 0.0, float(sign * int(150 / 331 * width * share)), 0.0, 1.0, 0.0),
            "translate-y": (1.0, 0.0, 0.0, 0.0, 1.0, float(sign * int(150 / 331 * height * share))),
            "rotate": (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y),
        }
        for name, coefficients in moves.items():
            affine[by_name[name]][minus] = coefficients
        for i, name in enumerate(_BLENDS):
            blend[by_name[name], minus, i] = 1 + sign * 0.9 * share
    mask[by_name["posterize"]] = 256 - 2 ** round(magnitude / (STRONGEST / 4))
    threshold[by_name["solarize"]] = 255 * (1 - share)
    fixed = [[_fixed(*coefficients) for coefficients in signed] for signed in affine]
    return Tables(*(t.to(device) for t in (torch.tensor(fixed), blend, mask, threshold)))


def _fixed(a: float, b: float, c: float, d: float, e: float, f: float) -> tuple[int, ...]:
    """16.16 fixed point of Pillow's nearest resampling, its origin the centre of the first pixel."""
    values = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return tuple(math.floor(value * 65536 + 0.5) for value in values)


def _moved(pixels: Tensor, affine: Tensor) -> Tensor:
    _, channels, height, width = pixels.shape
    a, b, c, d, e, f = (v[:, None, None] for v in affine.unbind(1))
    x, y = torch.arange(width, device=pixels.device), torch.arange(height, device=pixels.device)[:, None]
    columns, rows = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    flat = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).flatten(1)[:, None]
    found = pixels.flatten(2).gather(2, flat.expand(-1, channels, -1)).view_as(pixels)
    return found * inside[:, None]


def _mapped(pixels: Tensor, operation: Tensor, blend: Tensor, mask: Tensor, threshold: Tensor) -> Tensor:
    """Send each value of each image through a table of 256."""
    values = torch.arange(256, device=pixels.device)
    mean = (_grey(pixels).double().mean((1, 2)) + 0.5).floor()[:, None]
    brightness, contrast = (blend[:, _BLENDS.index(name), None] for name in ("brightness", "contrast"))
    table = _blended(torch.zeros_like(brightness), values.float(), brightness)
    table = _blended(mean.float(), table, contrast).long() & mask[:, None]
    table = torch.where(table < threshold[:, None], table, 255 - table)[:, None].expand(-1, pixels.shape[1], -1)
    flat = pixels.flatten(2)
    low, high = (t.long() for t in torch.aminmax(flat, dim=2, keepdim=True))
    for name, own in (
        ("autocontrast", _stretching(low, high, values)),
        ("equalize", _equalizing(flat, high, values)),
    ):
        table = torch.where((operation == OPERATIONS.index(name))[:, None, None], own, table)
    return table.to(torch.uint8).gather(2, flat.long()).view_as(pixels)


def _stretching(low: Tensor, high: Tensor, values: Tensor) -> Tensor:
    width = (high - low).double()
    scale = torch.full_like(width, 255) / width  # 255 / width would be a product with the inverse, rounded twice
    stretched = (values * scale - low * scale).clamp(0, 255).long()
    return torch.where(high > low, stretched, values)


def _equalizing(flat: Tensor, high: Tensor, values: Tensor) -> Tensor:
    counts = torch.zeros((*flat.shape[:2], 256), dtype=torch.int64, device=flat.device)
    counts.scatter_add_(2, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    step = (flat.shape[2] - counts.gather(2, high)) // 255
    before = counts.cumsum(2) - counts
    table = (step // 2 + before) // step.clamp(min=1)
    return torch.where(step > 0, table.clamp(max=255), values)


def _coloured(pixels: Tensor, blend: Tensor) -> Tensor:
    if pixels.shape[1] != 3:
        return pixels
    factor = blend[:, _BLENDS.index("color"), None, None, None]
    return _blended(_grey(pixels)[:, None].float(), pixels.float(), factor).to(torch.uint8)


def _sharpened(pixels: Tensor, blend: Tensor) -> Tensor:
    height, width = pixels.shape[2:]
    if min(height, width) < 3:
        return pixels
    wide = pixels.int()
    around = sum(wide[:, :, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    smooth = wide.clone()
    # Thirteenths to the nearest, which are never halfway.
    smooth[:, :, 1:-1, 1:-1] = (2 * (around + 4 * wide[:, :, 1:-1, 1:-1]) + 13) // 26
    factor = blend[:, _BLENDS.index("sharpness"), None, None, None]
    return _blended(smooth.float(), wide.float(), factor).to(torch.uint8)


def _blended(degenerate: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    """Pillow's Image.blend: float32, cut off at 0 and 255, its fractions dropped. A factor of 1 gives `image`."""
    return (degenerate + factor * (image - degenerate)).clamp_(0, 255).floor_()


def _grey(pixels: Tensor) -> Tensor:
    """Pillow's mode L, int32 [B, H, W]; for other than three channels their mean."""
    wide = pixels.int()
    if pixels.shape[1] != 3:
        return wide.sum(1) // pixels.shape[1]
    red, green, blue = wide.unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _scramble(counter: Tensor, seed: int) -> Tensor:
    """SplitMix64 of (seed, counter): int64 of even bits, without state, so that no order of drawing matters."""
    x = _times(counter + 1, _GOLDEN) + _signed(seed)
    x = _times(x ^ _shifted(x, 30), _FIRST)
    x = _times(x ^ _shifted(x, 27), _SECOND)
    return x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _times(x: Tensor, factor: int) -> Tensor:
    return x * _signed(factor)  # int64 products wrap around


def _shifted(x: Tensor, by: int) -> Tensor:
    return x >> by & (1 << (64 - by)) - 1
