"""Triton body and launcher of `stem_input_grad`."""

# A launch takes options (num_warps) that the body does not, and tl.static_range is no iterator, to the checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import interpreting

BLOCK_PIXELS = 128
BLOCK_OUT = 64


@triton.jit
def _stem_input_grad_kernel(
    dy_ptr,
    weight_ptr,
    dx_ptr,
    pixels,
    H,
    W,
    C,
    stride_out,
    stride_in,
    stride_row,
    stride_column,
    OUT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """dx[h, w] = sum over taps (r, s) of dy[h + 1 - r, w + 1 - s] @ weight[r, s]: nine products of tiles.

    A run of pixels and its neighbours above and below stay in the multiprocessor's cache over the nine, so that dy
    comes from memory about once. The channels of x are padded to the 16 columns a tile must have.
    """
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    row, column = (pixel // W) % H, pixel % W
    channel = tl.arange(0, 16)
    total = tl.zeros((BLOCK_PIXELS, 16), tl.float32)
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            inside = (row + 1 - r >= 0) & (row + 1 - r < H) & (column + 1 - s >= 0) & (column + 1 - s < W)
            inside = inside & (pixel < pixels)
            at = (pixel + (1 - r) * W + (1 - s)).to(tl.int64) * OUT
            for first in tl.static_range(0, OUT, BLOCK_OUT):
                out = first + tl.arange(0, BLOCK_OUT)
                dy = tl.load(
                    dy_ptr + at[:, None] + out[None, :], mask=inside[:, None] & (out < OUT)[None, :], other=0.0
                )
                taps = weight_ptr + r * stride_row + s * stride_column
                taps += out[:, None] * stride_out + channel[None, :] * stride_in
                weight = tl.load(taps, mask=(out < OUT)[:, None] & (channel < C)[None, :], other=0.0)
                if WIDEN:
                    total = tl.dot(dy.to(tl.float32), weight.to(tl.float32), total, input_precision="ieee")
                else:
                    total = tl.dot(dy, weight, total)
    to = dx_ptr + pixel.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(to, total, mask=(pixel < pixels)[:, None] & (channel < C)[None, :])


def input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """dy: channels-last [B, O, H, W]; weight: [O, C, 3, 3], any strides; the result is float32 and channels-last."""
    batch, out, height, width = dy.shape
    shape = (batch, weight.shape[1], height, width)
    dx = torch.empty(shape, dtype=torch.float32, device=dy.device, memory_format=torch.channels_last)
    pixels = batch * height * width
    _stem_input_grad_kernel[(triton.cdiv(pixels, BLOCK_PIXELS),)](
        # Rows of O channels, also where a size of 1 leaves the strides undetermined.
        dy.permute(0, 2, 3, 1).contiguous(),
        weight,
        dx,
        pixels,
        height,
        width,
        weight.shape[1],
        *weight.stride(),
        OUT=out,
        BLOCK_PIXELS=BLOCK_PIXELS,
        BLOCK_OUT=min(BLOCK_OUT, triton.next_power_of_2(out)),
        WIDEN=interpreting(),  # the interpreter multiplies the bit patterns of bfloat16 numbers, and not the numbers
        num_warps=8,
    )
    return dx
