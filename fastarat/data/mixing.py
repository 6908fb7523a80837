"""CutMix: a window of each image of a batch is another image's, and its class is shared accordingly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Cut(NamedTuple):
    """What is random in a batch. rows, columns: of the window, [first, last). partners: int64 [B], on the CPU."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    partners: Tensor


@dataclass(frozen=True)
class CutMix:
    """Mixes the images of a batch, as Yun et al. (ICCV 2019) do, with one window and one permutation per batch.

    lambda ~ Beta(alpha, alpha); the window has sqrt(1 - lambda) of each side, is centred on a pixel anywhere and cut
    off at the border. The share that its image keeps of a target is that of the pixels it keeps. Of several processes
    each mixes its own rows of a batch.

    Source: Rebuffi et al., NeurIPS 2021 (arXiv 2111.05328), released code, with alpha 1.
    """

    alpha: float
    num_classes: int

    def draw(self, count: int, size: tuple[int, int], seed: int) -> Cut:
        """Draw what a batch of `count` images of `size` (height, width) needs: the same on every device."""
        random = np.random.RandomState(seed % 2**32)  # whose stream is frozen for good
        side = np.sqrt(1 - random.beta(self.alpha, self.alpha))
        rows, columns = (_window(random.randint(length), int(side * length), length) for length in size)
        return Cut(rows, columns, torch.from_numpy(random.permutation(count)))

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        images: float32 [B, C, H, W], written to. labels: int64 [B]. seed: of the batch.
        Returns: images, and shares of the classes, float32 [B, K], rows that sum to 1.
        """
        _, _, height, width = images.shape
        (top, bottom), (left, right), partners = self.draw(len(images), (height, width), seed)
        # Without waiting: of memory that is not pinned the driver takes its copy before this returns.
        partners = partners.to(images.device, non_blocking=True)
        images[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / (height * width)
        shares = (torch.arange(self.num_classes, device=labels.device) == labels[:, None]).float()
        return images, kept * shares + (1 - kept) * shares[partners]


def _window(centre: int, length: int, size: int) -> tuple[int, int]:
    """A window around `centre`, cut off at 0 and `size`; as released, an odd length loses its last pixel."""
    return max(centre - length // 2, 0), min(centre + length // 2, size)
