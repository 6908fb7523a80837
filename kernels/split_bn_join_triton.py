"""Triton bodies and launchers of `split_bn_join`: the two BatchNorms that meet at the end of a residual block."""

# Triton's rules, which the checker cannot know: a launch takes options of its own, a number is a constexpr.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .split_bn_tiles import affine_of, load_bits, normalise, reduce, store_bits, summed_dy, tile_at, tile_origin
from .split_bn_triton import (
    APPLY_TILE,
    SUMS_TILE,
    bits_like,
    launch_shape,
    like,
    reducing,
    room,
    rows_of,
    statistics,
    step_of,
    streaming,
    walk,
)

Affine = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight, bias, mean, variance: float [G, C]."""


@triton.jit
def _join_apply_kernel(
    x_ptr,
    x2_ptr,
    y_ptr,
    bits_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    weight2_ptr,
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    rows,
    C,
    channel_blocks,
    eps,
    eps2,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, first, before, cols, stat = tile_origin(rows, C, channel_blocks, 1, BLOCK_ROWS, BLOCK_C)
    row = first + tl.arange(0, BLOCK_ROWS)
    at, mask = tile_at(before, row, rows, cols, C)
    channel = cols < C
    mean, _, scale, bias = affine_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, stat, channel, eps)
    mean2, _, scale2, bias2 = affine_of(weight2_ptr, bias2_ptr, mean2_ptr, var2_ptr, stat, channel, eps2)
    z = normalise(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), mean, scale, bias)
    z += normalise(tl.load(x2_ptr + at, mask=mask, other=0.0).to(tl.float32), mean2, scale2, bias2)
    y = tl.where(z <= 0.0, 0.0, z).to(y_ptr.dtype.element_ty)
    if bits_ptr is not None:
        store_bits(bits_ptr, y != 0.0, before, row, rows, cols, C, BLOCK_ROWS, BLOCK_C)
    tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def _join_sums_kernel(
    dy_ptr,
    dy2_ptr,
    x_ptr,
    x2_ptr,
    bits_ptr,
    mean_ptr,
    var_ptr,
    mean2_ptr,
    var2_ptr,
    part_dy_ptr,
    part_dyx_ptr,
    dbias_ptr,
    dweight_ptr,
    count_ptr,
    part_again_ptr,
    part_dyx2_ptr,
    dbias2_ptr,
    dweight2_ptr,
    rows,
    C,
    channel_blocks,
    num_tiles,
    num_parts,
    H,
    W,
    eps,
    eps2,
    DY2_STEP: tl.constexpr,
    FAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of the masked dy and of its products with both xhat, [G, C]."""
    part, first, before, cols, stat = tile_origin(rows, C, channel_blocks, num_tiles, BLOCK_ROWS, BLOCK_C)
    channel = cols < C
    mean = tl.load(mean_ptr + stat, mask=channel, other=0.0)[None, :]
    mean2 = tl.load(mean2_ptr + stat, mask=channel, other=0.0)[None, :]
    sum_dy = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_dyx = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_dyx2 = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for tile in range(num_tiles):
        row = first + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        at, mask = tile_at(before, row, rows, cols, C)
        dy = summed_dy(dy_ptr, dy2_ptr, before, row, cols, C, H, W, at, mask, DY2_STEP)
        dy = tl.where(load_bits(bits_ptr, before, row, rows, cols, C, BLOCK_ROWS, BLOCK_C), dy, 0.0)
        sum_dy += dy
        sum_dyx += dy * (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean)
        sum_dyx2 += dy * (tl.load(x2_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean2)
    rstd = tl.rsqrt(tl.load(var_ptr + stat, mask=channel, other=1.0) + eps)
    rstd2 = tl.rsqrt(tl.load(var2_ptr + stat, mask=channel, other=1.0) + eps2)
    total = tl.sum(sum_dy, 0)
    reduce(
        total, tl.sum(sum_dyx, 0) * rstd, part_dy_ptr, part_dyx_ptr, dbias_ptr, dweight_ptr, count_ptr, part, num_parts,
        cols, stat, C, channel_blocks, rows, num_tiles * BLOCK_ROWS, False, FAN,
    )  # fmt: skip
    # The counts are zero again once all have come, and not before: the second reduction has its own.
    count_ptr += (num_parts + FAN - 1) // FAN * channel_blocks * tl.num_programs(1) + channel_blocks * tl.num_programs(
        1
    )
    reduce(
        total, tl.sum(sum_dyx2, 0) * rstd2, part_again_ptr, part_dyx2_ptr, dbias2_ptr, dweight2_ptr, count_ptr, part,
        num_parts, cols, stat, C, channel_blocks, rows, num_tiles * BLOCK_ROWS, False, FAN,
    )  # fmt: skip


@triton.jit
def _join_backward_kernel(
    dy_ptr,
    dy2_ptr,
    x_ptr,
    x2_ptr,
    bits_ptr,
    dx_ptr,
    dx2_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    weight2_ptr,
    mean2_ptr,
    var2_ptr,
    dbias_ptr,
    dweight_ptr,
    dweight2_ptr,
    rows,
    C,
    channel_blocks,
    H,
    W,
    eps,
    eps2,
    DY2_STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, first, before, cols, stat = tile_origin(rows, C, channel_blocks, 1, BLOCK_ROWS, BLOCK_C)
    row = first + tl.arange(0, BLOCK_ROWS)
    at, mask = tile_at(before, row, rows, cols, C)
    channel = cols < C
    dy = summed_dy(dy_ptr, dy2_ptr, before, row, cols, C, H, W, at, mask, DY2_STEP)
    dy = tl.where(load_bits(bits_ptr, before, row, rows, cols, C, BLOCK_ROWS, BLOCK_C), dy, 0.0)
    dy -= tl.load(dbias_ptr + stat, mask=channel, other=0.0)[None, :] / rows
    mean, rstd, scale, _ = affine_of(weight_ptr, mean_ptr, mean_ptr, var_ptr, stat, channel, eps)
    mean_dyx = tl.load(dweight_ptr + stat, mask=channel, other=0.0)[None, :] / rows
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dx = (dy - (x - mean) * rstd * mean_dyx) * scale
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    mean2, rstd2, scale2, _ = affine_of(weight2_ptr, mean2_ptr, mean2_ptr, var2_ptr, stat, channel, eps2)
    mean_dyx2 = tl.load(dweight2_ptr + stat, mask=channel, other=0.0)[None, :] / rows
    x2 = tl.load(x2_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dx2 = (dy - (x2 - mean2) * rstd2 * mean_dyx2) * scale2
    tl.store(dx2_ptr + at, dx2.to(dx2_ptr.dtype.element_ty), mask=mask)


def join(
    x: Tensor, x2: Tensor, affine: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, eps2: float, keep_bits: bool
) -> tuple[Tensor, Affine, Affine, Tensor | None]:
    """relu(BN(x) + BN(x2)): y, channels-last; both affines with their batch statistics; the ReLU's bits.

    affine: weight and bias of x's BatchNorm, then of x2's, float [G, C].
    """
    groups = affine[0].shape[0]
    one = (*(t.contiguous() for t in affine[:2]), *statistics(x, groups))
    two = (*(t.contiguous() for t in affine[2:]), *statistics(x2, groups))
    x2d, other, y = rows_of(x), rows_of(x2), like(x)
    rows, channels = x2d.shape[0] // groups, x2d.shape[1]
    launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=APPLY_TILE, reduce=False)
    bits = bits_like(x) if keep_bits else None
    shape = rows, channels, launch.channel_blocks
    _join_apply_kernel[launch.grid](x2d, other, y, bits, *one, *two, *shape, eps, eps2, **streaming(launch))
    return y, one, two, bits


def join_backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    x2: Tensor,
    bits: Tensor,
    one: Affine,
    two: Affine,
    eps: float,
    eps2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and x2, of both weights, and of the bias, which is both's: float32 [G, C]."""
    dy2d, more = rows_of(dy), None if dy2 is None else rows_of(dy2)
    x2d, other, dx, dx2 = rows_of(x), rows_of(x2), like(x), like(x2)
    step, (groups, channels) = step_of(dy2, x), one[0].shape
    rows = x2d.shape[0] // groups
    launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=SUMS_TILE, reduce=True)
    first, second = room(x, launch, channels, reductions=2), room(x, launch, channels, reductions=2)
    stats = one[2], one[3], two[2], two[3]
    _join_sums_kernel[launch.grid](
        dy2d, more, x2d, other, bits, *stats, *first, *second[:4], rows, channels, *walk(launch), *x.shape[2:], eps,
        eps2, DY2_STEP=step, **reducing(launch),
    )  # fmt: skip
    launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=APPLY_TILE // 2, reduce=False)
    dbias, dweight, dweight2 = first[2], first[3], second[3]
    scales = one[0], one[2], one[3], two[0], two[2], two[3]
    shape = rows, channels, launch.channel_blocks, *x.shape[2:]
    _join_backward_kernel[launch.grid](
        dy2d, more, x2d, other, bits, dx, dx2, *scales, dbias, dweight, dweight2, *shape, eps, eps2, DY2_STEP=step,
        **streaming(launch),
    )  # fmt: skip
    return dx, dx2, dweight, dweight2, dbias
