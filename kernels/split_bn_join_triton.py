"""Triton bodies and launchers of `split_bn_join`: the two BatchNorms that meet at the end of a residual block."""

# Triton's rules, which the checker cannot know: a launch takes options of its own, a number is a constexpr.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .split_bn_tiles import affine_of, load_bits, normalise, reduce, store_bits, summed_dy, tile_at, tile_origin
from .split_bn_triton import (
    APPLY_TILE,
    SUMS_TILE,
    bits_like,
    laid_out,
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

# Half of what one BatchNorm has: there are two of everything.
TILE = APPLY_TILE // 2


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
    affine_stride,
    weight2_ptr,
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    affine_stride2,
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
    mean, _, scale, bias = affine_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, affine_stride, cols, stat, C, eps)
    mean2, _, scale2, bias2 = affine_of(
        weight2_ptr, bias2_ptr, mean2_ptr, var2_ptr, affine_stride2, cols, stat, C, eps2
    )
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
    count2_ptr,
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
    # Longer than a function should be for its pointers, as in split_bn_cooperative.
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
    sum_dyx = tl.sum(sum_dyx, 0) * tl.rsqrt(tl.load(var_ptr + stat, mask=channel, other=1.0) + eps)
    sum_dyx2 = tl.sum(sum_dyx2, 0) * tl.rsqrt(tl.load(var2_ptr + stat, mask=channel, other=1.0) + eps2)
    total = tl.sum(sum_dy, 0)
    reduce(
        total, sum_dyx, part_dy_ptr, part_dyx_ptr, dbias_ptr, dweight_ptr, count_ptr, part, num_parts, cols, stat, C,
        channel_blocks, rows, num_tiles * BLOCK_ROWS, False, FAN,
    )  # fmt: skip
    reduce(
        total, sum_dyx2, part_again_ptr, part_dyx2_ptr, dbias2_ptr, dweight2_ptr, count2_ptr, part, num_parts, cols,
        stat, C, channel_blocks, rows, num_tiles * BLOCK_ROWS, False, FAN,
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
    affine_stride,
    weight2_ptr,
    mean2_ptr,
    var2_ptr,
    affine_stride2,
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
    mean, rstd, scale, _ = affine_of(weight_ptr, mean_ptr, mean_ptr, var_ptr, affine_stride, cols, stat, C, eps)
    mean_dyx = tl.load(dweight_ptr + stat, mask=channel, other=0.0)[None, :] / rows
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dx = (dy - (x - mean) * rstd * mean_dyx) * scale
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    mean2, rstd2, scale2, _ = affine_of(
        weight2_ptr, mean2_ptr, mean2_ptr, var2_ptr, affine_stride2, cols, stat, C, eps2
    )
    mean_dyx2 = tl.load(dweight2_ptr + stat, mask=channel, other=0.0)[None, :] / rows
    x2 = tl.load(x2_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dx2 = (dy - (x2 - mean2) * rstd2 * mean_dyx2) * scale2
    tl.store(dx2_ptr + at, dx2.to(dx2_ptr.dtype.element_ty), mask=mask)


def join(
    x: Tensor, x2: Tensor, affine: Sequence[Tensor], eps: float, eps2: float, keep_bits: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """relu(BN(x) + BN(x2)): y, channels-last; mean, var, mean2, var2, float32 [G, C]; the ReLU's bits.

    affine: weight and bias of x's BatchNorm, then of x2's, float [G, C].
    """
    groups = affine[0].shape[0]
    stats = [*statistics(x, groups), *statistics(x2, groups)]
    both = *laid_out(*affine[:2], *stats[:2]), *laid_out(*affine[2:], *stats[2:])
    x2d, y = rows_of(x), like(x)
    rows, channels = x2d.shape[0] // groups, x2d.shape[1]
    launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=TILE, reduce=False)
    bits = bits_like(x) if keep_bits else None
    shape = rows, channels, launch.channel_blocks
    _join_apply_kernel[launch.grid](x2d, rows_of(x2), y, bits, *both, *shape, eps, eps2, **streaming(launch))
    return y, stats, bits


def join_backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    x2: Tensor,
    bits: Tensor,
    affine: Sequence[Tensor],
    stats: Sequence[Tensor],
    eps: float,
    eps2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and x2, of both weights, and of the bias, which is both's: float32 [G, C].

    affine: both weights. stats: as `join` returns them.
    """
    images = rows_of(dy), None if dy2 is None else rows_of(dy2), rows_of(x), rows_of(x2), bits
    dx, dx2 = like(x), like(x2)
    step, (groups, channels) = step_of(dy2, x), affine[0].shape
    rows = images[2].shape[0] // groups
    launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=SUMS_TILE, reduce=True)
    # Counters are zero again only once all have come: the second reduction has its own.
    first, second = room(x, launch, channels, number=0), room(x, launch, channels, number=1)
    _join_sums_kernel[launch.grid](
        *images, *stats, *first, *second, rows, channels, *walk(launch), *x.shape[2:], eps, eps2, DY2_STEP=step,
        **reducing(launch),
    )  # fmt: skip
    launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=TILE, reduce=False)
    dbias, dweight, dweight2 = first[2], first[3], second[3]
    # The bias does not show in the gradients: the weight stands in for it.
    weight, _, *one = laid_out(affine[0], affine[0], *stats[:2])
    weight2, _, *two = laid_out(affine[1], affine[1], *stats[2:])
    scales = weight, *one, weight2, *two
    shape = rows, channels, launch.channel_blocks, *x.shape[2:]
    _join_backward_kernel[launch.grid](
        *images, dx, dx2, *scales, dbias, dweight, dweight2, *shape, eps, eps2, DY2_STEP=step, **streaming(launch)
    )
    return dx, dx2, dweight, dweight2, dbias
