"""The loader of images that are cut to squares as they are read."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastarat.data import beton
from fastarat.data.augmenting import Augment
from fastarat.data.crops import DRAWS, CropStream, centre_boxes, random_boxes, uniform
from fastarat.data.loaders import Loader
from fastarat.data.splits import Split, derive_seed

_WHOLE = 256  # images that are read at a time where all of them are kept


class CropLoader(Loader):
    """Streams squares cut from a .beton file of images of any sizes: random ones to train on, else the centres.

    Where a random one lies depends on (seed, epoch, row in the file); threads decode ahead of the training.
    """

    kind = "ffcv"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stream = beton.crops_of(self.split)

    @property
    def on_device(self) -> Augment | None:
        """As said above: crops are not."""
        return None if self.recipe is None else replace(self.recipe, scale=None)

    def pages(self) -> np.ndarray:
        """As said above."""
        return self._stream.survey.pages[self.split.indices.numpy()]

    def _pixels(self, order: Tensor, indices: Sequence[Tensor], epoch: int) -> Generator[Tensor, None, None]:
        channels, recipe, seed = self.split.shape[0], self.recipe, derive_seed(self.seed, "crop", epoch)

        def boxes(rows: np.ndarray) -> Tensor:
            heights, widths = _sides(self._stream, rows)
            if recipe is None or recipe.scale is None:
                return centre_boxes(heights, widths)
            return random_boxes(uniform(seed, rows, DRAWS), heights, widths, recipe.scale, recipe.ratio)

        # By what is asked for: a batch may be shared with other processes.
        rows = [part.numpy() for part in self.split.indices[order].split([len(index) for index in indices])]
        pin, ahead = self.device.type == "cuda", self.order_by == "pages"
        for pixels in self._stream.batches(rows, boxes, pin=pin, ahead=ahead):
            yield pixels[..., :channels].to(self.device, non_blocking=True)


def _sides(stream: CropStream, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return heights and widths of a file's images at `rows`: int64 [B] each."""
    table = stream.survey
    return (
        torch.from_numpy(table.heights[rows].astype(np.int64)),
        torch.from_numpy(table.widths[rows].astype(np.int64)),
    )


def centres(split: Split) -> Iterator[Tensor]:
    """Yield the centres of a split's images in its order, uint8 [B, H, W, 3], a few hundred at a time."""
    crops = beton.crops_of(split)
    rows = [part.numpy() for part in split.indices.split(_WHOLE)] if len(split) else []
    return crops.batches(rows, lambda part: centre_boxes(*_sides(crops, part)))
