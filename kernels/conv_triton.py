"""Triton bodies and launchers around convolutions with folded BatchNorm: ReLU's backward, and the folding."""

# A launch takes options (num_warps) that the body does not; what jitted functions return the checker cannot know.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .split_bn_tiles import picked_row

BLOCK = 2048
FOLD_BLOCK = 1024


@triton.jit
def _masked_sum_kernel(dy_ptr, dy2_ptr, y_ptr, out_ptr, size, C, H, W, DY2_STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if DY2_STEP == 1:
        dy += tl.load(dy2_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        picked, there = picked_row(at // C, H, W)
        dy += tl.load(dy2_ptr + picked * C + at % C, mask=mask & there, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, tl.where(y <= 0.0, 0.0, dy).to(out_ptr.dtype.element_ty), mask=mask)


def masked_sum(dy: Tensor, dy2: Tensor, y: Tensor) -> Tensor:
    """dy + dy2 where the ReLU whose output is y let pass. Channels-last, of one dtype; dy2 as in `fork.taken`."""
    out, size = torch.empty_like(y), y.numel()
    step = 1 if dy2.shape == y.shape else 2
    grid = (triton.cdiv(size, BLOCK),)
    _masked_sum_kernel[grid](dy, dy2, y, out, size, *y.shape[1:], DY2_STEP=step, BLOCK=BLOCK, num_warps=4)
    return out


@triton.jit
def _affine_at(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, channel):
    """Scale and shift that BatchNorm in eval mode is, float32, of one channel."""
    scale = tl.load(weight_ptr + channel).to(tl.float32) * tl.rsqrt(tl.load(var_ptr + channel).to(tl.float32) + eps)
    return scale, tl.load(bias_ptr + channel).to(tl.float32) - tl.load(mean_ptr + channel).to(tl.float32) * scale


@triton.jit
def _fold_kernel(
    weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    norm_mean_ptr,
    norm_var_ptr,
    side_weight_ptr,
    side_bias_ptr,
    side_mean_ptr,
    side_var_ptr,
    out_ptr,
    out_bias_ptr,
    wide_ptr,
    wide_bias_ptr,
    eps,
    side_eps,
    O,
    row,
    stride,
    blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has a part of one output channel's weights, which are `stride` apart from the next one's."""
    channel, part = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    scale, bias = _affine_at(norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr, eps, channel)
    if side_weight_ptr is not None:
        _, side_bias = _affine_at(side_weight_ptr, side_bias_ptr, side_mean_ptr, side_var_ptr, side_eps, channel)
        bias += side_bias
    within = part * BLOCK + tl.arange(0, BLOCK)
    mask = within < row
    if ROWS:
        at = channel.to(tl.int64) * row + within
    else:  # where the output channels are not the outermost: `stride` weights of each by turns
        at = (within // stride).to(tl.int64) * O * stride + channel * stride + within % stride
    weight = tl.load(weight_ptr + at, mask=mask).to(tl.float32) * scale
    tl.store(out_ptr + at, weight.to(out_ptr.dtype.element_ty), mask=mask)
    if out_bias_ptr is not None:
        tl.store(out_bias_ptr + channel, bias.to(out_bias_ptr.dtype.element_ty), mask=part == 0)
    if wide_ptr is not None:
        tl.store(wide_ptr + at, weight.to(wide_ptr.dtype.element_ty), mask=mask)
        if wide_bias_ptr is not None:
            tl.store(wide_bias_ptr + channel, bias.to(wide_bias_ptr.dtype.element_ty), mask=part == 0)


def fold(
    weight: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    side: Sequence[Tensor],
    side_eps: float,
    out: Tensor,
    out_bias: Tensor | None,
    wide: Tensor | None,
    wide_bias: Tensor | None,
) -> None:
    """Fill `out` and `wide`, each with its bias. Weights are dense and share their strides; norm and side are [O]s."""
    channels, row = weight.shape[0], weight[0].numel()
    blocks = triton.cdiv(row, FOLD_BLOCK)
    _fold_kernel[(channels * blocks,)](
        weight,
        *(t.contiguous() for t in norm),
        *((t.contiguous() for t in side) if side else (None,) * 4),
        out,
        out_bias,
        wide,
        wide_bias,
        eps,
        side_eps,
        channels,
        row,
        weight.stride(0),
        blocks,
        ROWS=channels == 1 or weight.stride(0) == row,
        BLOCK=FOLD_BLOCK,
        num_warps=4,
    )
