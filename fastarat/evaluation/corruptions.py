"""The common corruptions: 15 kinds in 5 severities, made here or read from prepared files.

Source: Hendrycks and Dietterich, ICLR 2019. The severity constants are those of CIFAR-10-C (images of 32 pixels);
lengths in pixels grow and shrink with the image. No library has these: imagecorruptions has ImageNet's, kornia lacks
kinds. What differs from the published files, beside random numbers: frost is drawn, since theirs are photographs; snow
and motion blur average along a line of Gaussian weights, as ImageMagick does, without its rounding.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from scipy import ndimage
from torch import Tensor

from fastarat.errors import UserError
from fastarat.evaluation.sharing import dealt, together
from fastarat.evaluation.task import Task
from fastarat.nets.batchnorm import branch as use_branch, branches_of

Corruption = Callable[[np.ndarray, int, Generator], np.ndarray]
"""(image float64 [H, W, C] in [0, 1], severity 1 to 5, random numbers) -> float [H, W, C], to be clipped to [0, 1]."""
SEVERITIES = (1, 2, 3, 4, 5)
_CUT = 3.0  # standard deviations at which a Gaussian is cut


def measure(task: Task, prepared: Path | None, rows: Tensor | None) -> dict[str, dict[str, list[float]]]:
    """Measure the accuracy under each kind and severity, in every BatchNorm branch.

    Args:
        task: lent by the caller; its images have 1 or 3 channels.
        prepared: folder of `check_prepared`; None makes the corruptions here.
        rows: int64 [N], the task's images in the prepared files.
    Returns: by branch (the task's first), by kind, the five accuracies.
    """
    branches = [task.branch, *(name for name in branches_of(task.model) if name != task.branch)]
    batches = -(-len(task.labels) // task.batch_size)

    def count() -> dict[str, dict[str, list[int]]]:
        found = {name: {kind: [0] * len(SEVERITIES) for kind in KINDS} for name in branches}
        with task.bar("corruptions", len(KINDS) * len(SEVERITIES) * batches * task.batch_size) as bar:
            for kind in KINDS:
                file = None if prepared is None else _opened(prepared / f"{kind}.npy")
                for severity in SEVERITIES:
                    for at, x, y, own in dealt(task):
                        bar.update()
                        if not own:
                            continue
                        if file is None or rows is None:
                            points = corrupted(x.cpu(), kind, severity, seed=task.seed, first=int(at[0]))
                        else:
                            there = rows[at] + (severity - 1) * (len(file) // len(SEVERITIES))
                            points = torch.from_numpy(file[there.numpy()]).permute(0, 3, 1, 2).float() / 255
                        for name in branches:
                            with use_branch(task.model, name), torch.no_grad():
                                seen = task.forward(points.to(x.device)).argmax(1)
                            found[name][kind][severity - 1] += int((seen == y).sum())
        return found

    parts = together(task.world, count)

    def accuracy(name: str, kind: str) -> list[float]:
        # Counts are divided once: a sum of shares may come to more than 1.
        return [sum(counts) / len(task.labels) for counts in zip(*(p[name][kind] for p in parts), strict=True)]

    return {name: {kind: accuracy(name, kind) for kind in KINDS} for name in branches}


def mean_accuracy(by_kind: dict[str, list[float]]) -> float:
    """Return the mean over kinds and severities."""
    return float(np.mean([accuracy for accuracies in by_kind.values() for accuracy in accuracies]))


def check_shape(images: Tensor) -> None:
    """Raise UserError for images that the corruptions are not defined on."""
    channels, *size = images.shape[1:]
    if channels not in (1, 3) or min(size) < 8:
        raise UserError(
            f"corruptions are made of grey or RGB images of 8 pixels and more, these are {channels} x {size[0]} x "
            f"{size[1]}: leave corruptions out of --attack"
        )


def check_prepared(folder: str | Path, images: Tensor, labels: Tensor, limit: int | None) -> tuple[Path, Tensor]:
    """Find the images in files as CIFAR-10-C is published: KIND.npy uint8 [5 M, H, W, C] and labels.npy [5 M].

    Returns: the folder, and int64 [N], which of the M images those of the evaluation are.
    Raises: UserError for a folder without the 15 kinds, a file of another form or of other images.
    """
    folder = Path(folder)
    missing = [f"{kind}.npy" for kind in (*KINDS, "labels") if not (folder / f"{kind}.npy").is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: expected the 15 kinds and labels.npy, as in CIFAR-10-C")
    known = _opened(folder / "labels.npy", 1)
    total = len(known) // len(SEVERITIES)
    wanted = (len(SEVERITIES) * total, images.shape[2], images.shape[3], images.shape[1])
    for kind in KINDS:
        file = _opened(folder / f"{kind}.npy")
        if file.shape != wanted or file.dtype != np.uint8:
            raise UserError(
                f"{folder / kind}.npy is {file.dtype} {list(file.shape)}: expected uint8 {list(wanted)}, 5 severities "
                "of every test image"
            )
    count = len(labels)
    rows = torch.arange(total) if limit is None or limit >= total else torch.arange(limit) * total // limit
    if len(rows) != count or not np.array_equal(known[rows.numpy()], labels.cpu().numpy()):
        raise UserError(f"{folder}/labels.npy are not the labels of the images evaluated: it is of another test set")
    return folder, rows


def _opened(path: Path, dims: int = 4) -> np.ndarray:
    """Map an array into memory, so that only what is looked at is read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.ndim != dims:
            raise ValueError(f"expected an array of {dims} dimensions")
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): get the file again") from error
    return array


def corrupted(images: Tensor, kind: str, severity: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupt images float32 [N, C, H, W] in [0, 1] on the CPU; C is 1 or 3, H and W are 8 and more.

    Args:
        kind: one of KINDS. severity: 1 to 5.
        seed: of the random numbers. An image's depend on it, the kind, the severity and the image's number alone, not
            on how many are asked for at once.
        first: number of the first image.
    Returns: float32, of the same shape, in steps of 1/255 as the published files.
    """
    parts = []
    for i, image in enumerate(images.permute(0, 2, 3, 1).double().numpy(), start=first):
        rng = np.random.default_rng([seed, list(KINDS).index(kind), severity, i])
        parts.append((np.clip(KINDS[kind](image, severity, rng), 0, 1) * 255).astype(np.uint8))
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).float() / 255


def _pick(severity: int, *constants: Any) -> Any:
    return constants[severity - 1]


def _scale(image: np.ndarray) -> float:
    """How many times as large as CIFAR's."""
    return min(image.shape[:2]) / 32


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image, (sigma, sigma, 0)[: image.ndim], mode="nearest", truncate=_CUT)


def _gaussian_noise(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    return x + rng.normal(scale=_pick(severity, 0.04, 0.06, 0.08, 0.09, 0.1), size=x.shape)


def _shot_noise(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    photons = _pick(severity, 500, 250, 100, 75, 50)
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    amount = _pick(severity, 0.01, 0.02, 0.03, 0.05, 0.07)
    return np.where(rng.random(x.shape) < amount, rng.integers(0, 2, x.shape), x)


def _defocus_blur(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    radius, soft = _pick(severity, (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    larger = max(1.0, _scale(x))  # shrunk below a pixel the kernel would blur nothing
    radius *= larger
    reach = int(np.ceil(radius)) + 2
    at = np.arange(-reach, reach + 1)
    disk = (at[:, None] ** 2 + at**2 <= radius**2).astype(float)
    # The softening is a Gaussian of three pixels, whatever its width: that of the published kernel.
    near = np.exp(-(np.arange(-1, 2) ** 2) / (2 * (soft * larger) ** 2))
    kernel = ndimage.convolve(disk / disk.sum(), np.outer(near, near) / near.sum() ** 2)
    return ndimage.convolve(x, kernel[..., None], mode="mirror")


def _glass_blur(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    sigma, reach, rounds = _pick(severity, (0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    sigma, reach = sigma * _scale(x), max(1, round(reach * _scale(x)))
    x = _blur(x, sigma)
    height, width = x.shape[:2]
    for _ in range(rounds):
        moves = rng.integers(-reach, reach, (height, width, 2))
        for i in range(height - reach - 1, reach, -1):
            for j in range(width - reach - 1, reach, -1):
                # Changing places: on the right a copy, since rows of an array are views.
                other = i + moves[i, j, 0], j + moves[i, j, 1]
                x[i, j], x[other] = x[other].copy(), x[i, j].copy()
    return _blur(x, sigma)


def _along_line(x: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """Average along a line that begins at each pixel, with the falling half of a Gaussian for weights."""
    steps = np.arange(max(2, round(2 * radius) + 1))
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    angle = np.deg2rad(degrees)
    out = np.zeros_like(x)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        if weight > 1e-6:
            shift = (step * np.sin(angle), step * np.cos(angle), 0)
            out += weight * ndimage.shift(x, shift, order=1, mode="nearest")
    return out


def _motion_blur(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    radius, sigma = _pick(severity, (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
    return _along_line(x, radius * _scale(x), sigma * _scale(x), rng.uniform(-45, 45))


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge about the middle, with the size kept."""
    middle = (np.array(x.shape[:2]) - 1) / 2
    return _mapped(x, np.eye(2) / factor, middle - middle / factor, "nearest")


def _mapped(x: np.ndarray, matrix: np.ndarray, offset: np.ndarray, mode: str) -> np.ndarray:
    """Fill each place with what is at matrix @ place + offset, channel by channel."""
    places = np.tensordot(matrix, np.indices(x.shape[:2]), 1) + offset[:, None, None]
    return np.stack([ndimage.map_coordinates(x[..., c], places, order=1, mode=mode) for c in range(x.shape[2])], 2)


def _zoom_blur(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    factors = 1 + 0.01 * np.arange(_pick(severity, 6, 11, 16, 21, 26))
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


_SNOW = (
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)


def _snow(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    mean, deviation, zoom, threshold, radius, sigma, keep = _SNOW[severity - 1]
    flakes = _zoomed(rng.normal(mean, deviation, x.shape[:2])[..., None], zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _along_line(flakes, radius * _scale(x), sigma * _scale(x), rng.uniform(-135, -45))
    grey = x @ np.array([0.299, 0.587, 0.114])[:, None] if x.shape[2] == 3 else x
    paled = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return paled + flakes + np.rot90(flakes, 2)


def _frost(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    keep, amount = _pick(severity, (1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
    # Crystals: the ridges of smooth noise at three scales, bluish white, in place of the published photographs.
    ice = np.zeros(x.shape[:2])
    for octave, sigma in enumerate((4, 2, 1)):
        noise = ndimage.gaussian_filter(rng.normal(size=x.shape[:2]), sigma * _scale(x), mode="wrap")
        ice += 0.5**octave * (1 - np.abs(noise) / (np.abs(noise).max() + 1e-12)) ** 2
    ice = (ice - ice.min()) / (np.ptp(ice) + 1e-12)
    tint = np.array([0.85, 0.93, 1.0]) if x.shape[2] == 3 else np.ones(1)
    return keep * x + amount * ice[..., None] * tint


def _plasma(size: int, decay: float, rng: Generator) -> np.ndarray:
    """A fractal height map [size, size] in [0, 1], by diamonds and squares on a torus; size is a power of two."""
    heights, step, wobble = np.zeros((size, size)), size, 100.0

    def between(*corners: np.ndarray) -> np.ndarray:
        return sum(corners) / 4 + wobble * rng.uniform(-wobble, wobble, corners[0].shape)

    while step >= 2:
        half = step // 2
        corner = heights[::step, ::step]
        right, below = np.roll(corner, -1, 1), np.roll(corner, -1, 0)
        centre = between(corner, right, below, np.roll(right, -1, 0))
        heights[half::step, half::step] = centre
        heights[::step, half::step] = between(centre, np.roll(centre, 1, 0), corner, right)
        heights[half::step, ::step] = between(centre, np.roll(centre, 1, 1), corner, below)
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights / heights.max()


def _fog(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    amount, decay = _pick(severity, (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
    height, width = x.shape[:2]
    size = 1 << (max(height, width) - 1).bit_length()
    top = x.max()
    return (x + amount * _plasma(size, decay, rng)[:height, :width, None]) * top / (top + amount)


def _brightness(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    # The value of HSV is the largest channel; hue and saturation stay when all channels grow by one factor.
    value = x.max(2, keepdims=True)
    brighter = np.clip(value + _pick(severity, 0.05, 0.1, 0.15, 0.2, 0.3), 0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def _contrast(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * _pick(severity, 0.75, 0.5, 0.4, 0.3, 0.15) + mean


def _elastic_transform(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    size = min(x.shape[:2])
    shifts = _pick(severity, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    amount, sigma, corner = (size * value for value in shifts)
    middle, third = np.array(x.shape[:2]) // 2, size // 3
    # Three corners are moved at random; the affine map takes the moved ones back to where they were.
    fixed = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = fixed + rng.uniform(-corner, corner, (3, 2))
    matrix = np.linalg.solve(np.column_stack([moved, np.ones(3)]), fixed).T
    x = _mapped(x, matrix[:, :2], matrix[:, 2], "mirror")
    noise = rng.uniform(-1, 1, (2, *x.shape[:2]))
    rows, columns = np.indices(x.shape[:2]) + [
        amount * ndimage.gaussian_filter(part, sigma, mode="reflect", truncate=_CUT) for part in noise
    ]
    channels = [ndimage.map_coordinates(x[..., c], [rows, columns], order=1, mode="reflect") for c in range(x.shape[2])]
    return np.stack(channels, axis=2)


def _as_picture(x: np.ndarray) -> Image.Image:
    pixels = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if x.shape[2] == 1 else pixels)


def _as_array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture) / 255
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _pixelate(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    share = _pick(severity, 0.95, 0.9, 0.85, 0.75, 0.65)
    height, width = x.shape[:2]
    small = _as_picture(x).resize((int(width * share), int(height * share)), Image.Resampling.BOX)
    return _as_array(small.resize((width, height), Image.Resampling.BOX))


def _jpeg_compression(x: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
    file = io.BytesIO()
    _as_picture(x).save(file, "JPEG", quality=_pick(severity, 80, 65, 58, 50, 40))
    return _as_array(Image.open(file))


KINDS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
"""The corruptions in the paper's order, under the names of the published files."""
