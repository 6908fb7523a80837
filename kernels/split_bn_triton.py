"""Triton bodies and launchers of `split_bn`. Images are seen as rows: [G*N, C], N = B*H*W rows per group.

Every reduction is in two stages without atomics. Stage one: a program folds one run of a group's rows into
one partial result per channel; stage two: a tiny kernel folds the partial results. The order is fixed by the
shape alone, so equal inputs give equal bits, on any GPU. All arithmetic is float32.
"""

# Triton's rules, which the checker cannot know: a launch takes options of its own, a number is a constexpr.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# About eight resident programs per multiprocessor of an H200 (132 of them), in one wave.
REDUCE_PROGRAMS = 1024
# Below this many programs a pass leaves multiprocessors idle, and smaller tiles pay.
MIN_PROGRAMS = 512
MAX_BLOCK_CHANNELS = 64


class Launch(NamedTuple):
    """How one pass cuts the rows of each group and the channels into programs."""

    block_rows: int
    block_channels: int
    num_tiles: int  # tiles of block_rows rows that one program walks
    num_parts: int  # programs along the rows of one group
    channel_blocks: int
    groups: int

    @property
    def grid(self) -> tuple[int, int]:
        # Rows on the first axis: the others end at 65,535 programs. Neighbours share rows, hence DRAM pages.
        return self.num_parts * self.channel_blocks, self.groups


def launch_shape(rows: int, channels: int, groups: int, itemsize: int, *, reduce: bool) -> Launch:
    """Choose the launch of a pass over [groups * rows, channels], from the shape alone.

    A tile row holds up to 64 channels, one or two full cache lines; a thread (four warps) holds four 16-byte
    vectors of each tensor in the streaming pass, two in the reducing ones, which carry accumulators as well.
    """
    block_channels = min(MAX_BLOCK_CHANNELS, triton.next_power_of_2(channels))
    channel_blocks = triton.cdiv(channels, block_channels)
    tile = (4096 if reduce else 8192) // itemsize
    while tile > 1024 and triton.cdiv(rows * block_channels, tile) * channel_blocks * groups < MIN_PROGRAMS:
        tile //= 2
    block_rows = min(max(1, tile // block_channels), triton.next_power_of_2(rows))
    tiles = triton.cdiv(rows, block_rows)
    parts = min(tiles, max(1, REDUCE_PROGRAMS // (channel_blocks * groups))) if reduce else tiles
    num_tiles = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, num_tiles)
    return Launch(block_rows, block_channels, num_tiles, parts, channel_blocks, groups)


@triton.jit
def _tile_origin(rows, C, channel_blocks, num_tiles, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: part, first row in the group, the group's offset, channels, their [G, C] offsets."""
    part = tl.program_id(0) // channel_blocks
    cols = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(1).to(tl.int64)
    first = part.to(tl.int64) * num_tiles * BLOCK_ROWS
    return part, first, group * rows * C, cols, group * C + cols


@triton.jit
def _tile_mask(row, rows, cols, C):
    return (row < rows)[:, None] & (cols < C)[None, :]


@triton.jit
def _normalise(x, mean, scale, bias):
    # The mean is taken off before scaling: folded into the bias it would cancel when it is large.
    return (x - mean) * scale + bias


@triton.jit
def _stats_kernel(
    x_ptr,
    mean_ptr,
    m2_ptr,
    rows,
    C,
    channel_blocks,
    num_tiles,
    num_parts,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and sum of squared deviations of one run of rows, [G, num_parts, C]."""
    part, first, base, cols, _ = _tile_origin(rows, C, channel_blocks, num_tiles, BLOCK_ROWS, BLOCK_C)
    lane = tl.arange(0, BLOCK_ROWS)
    mean = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    # Welford's update, one state per element of the tile: threads meet only once, after the loop.
    # Two tiles at a time, so that the loads of the second are under way during the first.
    for tile in tl.range(0, num_tiles, loop_unroll_factor=2):
        row = first + tile * BLOCK_ROWS + lane
        at = base + row[:, None] * C + cols[None, :]
        mask = _tile_mask(row, rows, cols, C)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / (tile + 1))
        m2 += delta * (x - mean)
    # Rows seen by each lane. The first row of the run shifts the sum, which a large mean would swamp.
    left = tl.minimum(rows - first, num_tiles * BLOCK_ROWS)
    count = tl.maximum((left - lane + BLOCK_ROWS - 1) // BLOCK_ROWS, 0).to(tl.float32)[:, None]
    shift = tl.load(x_ptr + base + first * C + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    part_shift = tl.sum(tl.where(count > 0, (mean - shift) * count, 0.0), 0)[None, :] / left.to(tl.float32)
    away = mean - (shift + part_shift)
    part_m2 = tl.sum(tl.where(count > 0, m2 + away * away * count, 0.0), 0)
    part_mean = tl.sum(shift + part_shift, 0)
    out = (tl.program_id(1).to(tl.int64) * num_parts + part) * C + cols
    tl.store(mean_ptr + out, part_mean, mask=cols < C)
    tl.store(m2_ptr + out, part_m2, mask=cols < C)


@triton.jit
def _merge_stats_kernel(
    part_mean_ptr,
    part_m2_ptr,
    mean_ptr,
    var_ptr,
    rows,
    C,
    rows_per_part,
    num_parts,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's merge of all parts of a group at once: they fit one tile, so each is read once."""
    group = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_PARTS)
    mask = _tile_mask(part, num_parts, cols, C)
    base = group * num_parts * C
    at = base + part[:, None] * C + cols[None, :]
    part_mean = tl.load(part_mean_ptr + at, mask=mask, other=0.0)
    part_m2 = tl.load(part_m2_ptr + at, mask=mask, other=0.0)
    start = part.to(tl.int64) * rows_per_part
    count = tl.minimum(tl.maximum(rows - start, 0), rows_per_part).to(tl.float32)[:, None]
    shift = tl.load(part_mean_ptr + base + cols, mask=cols < C, other=0.0)
    mean = shift + tl.sum(tl.where(mask, (part_mean - shift[None, :]) * count, 0.0), 0) / rows
    away = part_mean - mean[None, :]
    var = tl.sum(tl.where(mask, part_m2 + away * away * count, 0.0), 0) / rows
    tl.store(mean_ptr + group * C + cols, mean, mask=cols < C)
    tl.store(var_ptr + group * C + cols, var, mask=cols < C)


@triton.jit
def _apply_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    rows,
    C,
    channel_blocks,
    eps,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, first, base, cols, stat = _tile_origin(rows, C, channel_blocks, 1, BLOCK_ROWS, BLOCK_C)
    row = first + tl.arange(0, BLOCK_ROWS)
    at = base + row[:, None] * C + cols[None, :]
    mask = _tile_mask(row, rows, cols, C)
    x = tl.load(x_ptr + at, mask=mask).to(tl.float32)
    channel = cols < C
    mean = tl.load(mean_ptr + stat, mask=channel).to(tl.float32)
    rstd = tl.rsqrt(tl.load(var_ptr + stat, mask=channel, other=1.0).to(tl.float32) + eps)
    scale = rstd * tl.load(weight_ptr + stat, mask=channel).to(tl.float32)
    bias = tl.load(bias_ptr + stat, mask=channel).to(tl.float32)
    z = _normalise(x, mean[None, :], scale[None, :], bias[None, :])
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=mask).to(tl.float32)
    if RELU:
        z = tl.where(z <= 0.0, 0.0, z)  # not tl.maximum: that would turn NaN into 0 and hide it
    tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _masked_dy(dy, x, y, mean, scale, bias, RELU: tl.constexpr, HAS_Y: tl.constexpr):
    """dy where the ReLU passed it. Without a residual the ReLU's input is recomputed from x, to spare y."""
    if RELU:
        if HAS_Y:
            dy = tl.where(y <= 0.0, 0.0, dy)
        else:
            dy = tl.where(_normalise(x, mean, scale, bias) <= 0.0, 0.0, dy)
    return dy


@triton.jit
def _backward_sums_kernel(
    dy_ptr,
    x_ptr,
    y_ptr,
    dresidual_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    sum_dy_ptr,
    sum_dyx_ptr,
    rows,
    C,
    channel_blocks,
    num_tiles,
    num_parts,
    eps,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dy and dy * xhat over one run of rows, [G, num_parts, C]; the masked dy is the residual's."""
    part, first, base, cols, stat = _tile_origin(rows, C, channel_blocks, num_tiles, BLOCK_ROWS, BLOCK_C)
    channel = cols < C
    mean = tl.load(mean_ptr + stat, mask=channel, other=0.0).to(tl.float32)[None, :]
    rstd = tl.rsqrt(tl.load(var_ptr + stat, mask=channel, other=1.0).to(tl.float32) + eps)
    scale = (rstd * tl.load(weight_ptr + stat, mask=channel, other=0.0).to(tl.float32))[None, :]
    bias = tl.load(bias_ptr + stat, mask=channel, other=0.0).to(tl.float32)[None, :]
    sum_dy = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_dyx = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for tile in range(num_tiles):
        row = first + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        at = base + row[:, None] * C + cols[None, :]
        mask = _tile_mask(row, rows, cols, C)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dy = _masked_dy(dy, x, y, mean, scale, bias, RELU, True)
        else:
            dy = _masked_dy(dy, x, x, mean, scale, bias, RELU, False)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, dy.to(dresidual_ptr.dtype.element_ty), mask=mask)
        sum_dy += dy
        sum_dyx += dy * (x - mean)
    out = (tl.program_id(1).to(tl.int64) * num_parts + part) * C + cols
    tl.store(sum_dy_ptr + out, tl.sum(sum_dy, 0), mask=channel)
    tl.store(sum_dyx_ptr + out, tl.sum(sum_dyx, 0) * rstd, mask=channel)


@triton.jit
def _merge_sums_kernel(
    part_dy_ptr, part_dyx_ptr, dbias_ptr, dweight_ptr, C, num_parts, BLOCK_PARTS: tl.constexpr, BLOCK_C: tl.constexpr
):
    group = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_PARTS)
    mask = _tile_mask(part, num_parts, cols, C)
    at = group * num_parts * C + part[:, None] * C + cols[None, :]
    dbias = tl.sum(tl.load(part_dy_ptr + at, mask=mask, other=0.0), 0)
    dweight = tl.sum(tl.load(part_dyx_ptr + at, mask=mask, other=0.0), 0)
    tl.store(dbias_ptr + group * C + cols, dbias, mask=cols < C)
    tl.store(dweight_ptr + group * C + cols, dweight, mask=cols < C)


@triton.jit
def _backward_apply_kernel(
    dy_ptr,
    x_ptr,
    y_ptr,
    dx_ptr,
    dresidual_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    dbias_ptr,
    dweight_ptr,
    rows,
    C,
    channel_blocks,
    eps,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx from (masked) dy; without dbias and dweight the statistics are constants (evaluation)."""
    _, first, base, cols, stat = _tile_origin(rows, C, channel_blocks, 1, BLOCK_ROWS, BLOCK_C)
    row = first + tl.arange(0, BLOCK_ROWS)
    at = base + row[:, None] * C + cols[None, :]
    mask = _tile_mask(row, rows, cols, C)
    dy = tl.load(dy_ptr + at, mask=mask).to(tl.float32)
    channel = cols < C
    mean = tl.load(mean_ptr + stat, mask=channel).to(tl.float32)[None, :]
    rstd = tl.rsqrt(tl.load(var_ptr + stat, mask=channel, other=1.0).to(tl.float32) + eps)[None, :]
    scale = rstd * tl.load(weight_ptr + stat, mask=channel).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + stat, mask=channel).to(tl.float32)[None, :]
    if y_ptr is not None:
        y = tl.load(y_ptr + at, mask=mask).to(tl.float32)
        dy = _masked_dy(dy, y, y, mean, scale, bias, RELU, True)
    elif RELU:
        x = tl.load(x_ptr + at, mask=mask).to(tl.float32)
        dy = _masked_dy(dy, x, x, mean, scale, bias, RELU, False)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at, dy.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        dx = dy
        if dweight_ptr is not None:
            xhat = (tl.load(x_ptr + at, mask=mask).to(tl.float32) - mean) * rstd
            mean_dy = tl.load(dbias_ptr + stat, mask=channel)[None, :] / rows
            mean_dyx = tl.load(dweight_ptr + stat, mask=channel)[None, :] / rows
            dx -= mean_dy + xhat * mean_dyx
        tl.store(dx_ptr + at, (dx * scale).to(dx_ptr.dtype.element_ty), mask=mask)


def _rows(images: Tensor) -> Tensor:
    """[G*B, C, H, W] as contiguous rows [G*N, C]: a view of channels-last images, a copy of any other."""
    return images.permute(0, 2, 3, 1).contiguous().view(-1, images.shape[1])


def _like(images: Tensor) -> Tensor:
    return torch.empty_like(images, memory_format=torch.channels_last)


def _merge_launch(launch: Launch, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and options of a stage-two kernel: all parts of 8 channels (one 32-byte sector) in one tile."""
    block_parts = triton.next_power_of_2(launch.num_parts)
    block_channels = min(8, triton.next_power_of_2(channels))
    warps = 8 if block_parts * block_channels >= 4096 else 4
    grid = (triton.cdiv(channels, block_channels), launch.groups)
    return grid, {"BLOCK_PARTS": block_parts, "BLOCK_C": block_channels, "num_warps": warps}


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """In the dtype of `like`; an empty tensor for none, which an op of torch.library cannot return."""
    return like.new_empty(0) if gradient is None else gradient.to(like.dtype)


def _blocks(launch: Launch) -> dict[str, int]:
    return {"BLOCK_ROWS": launch.block_rows, "BLOCK_C": launch.block_channels, "num_warps": 4}


def statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group, float32 [G, C]."""
    x2d = _rows(x)
    rows, channels = x2d.shape[0] // groups, x2d.shape[1]
    launch = launch_shape(rows, channels, groups, x.element_size(), reduce=True)
    part_mean, part_m2 = x.new_empty((2, groups, launch.num_parts, channels), dtype=torch.float32)
    mean, var = (x.new_empty((groups, channels), dtype=torch.float32) for _ in range(2))
    walk = launch.channel_blocks, launch.num_tiles, launch.num_parts
    _stats_kernel[launch.grid](x2d, part_mean, part_m2, rows, channels, *walk, **_blocks(launch))
    grid, blocks = _merge_launch(launch, channels)
    rows_per_part = launch.num_tiles * launch.block_rows
    _merge_stats_kernel[grid](part_mean, part_m2, mean, var, rows, channels, rows_per_part, launch.num_parts, **blocks)
    return mean, var


def apply(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None, relu: bool, eps: float
) -> Tensor:
    """Normalise, scale, add and clamp in one pass; the result is channels-last."""
    x2d, y = _rows(x), _like(x)
    groups = weight.shape[0]
    rows, channels = x2d.shape[0] // groups, x2d.shape[1]
    launch = launch_shape(rows, channels, groups, x.element_size(), reduce=False)
    affine = (t.contiguous() for t in (weight, bias, mean, var))
    shape = rows, channels, launch.channel_blocks
    added = None if residual is None else _rows(residual)
    _apply_kernel[launch.grid](x2d, added, y, *affine, *shape, eps, RELU=relu, **_blocks(launch))
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    training: bool,
    relu: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; see `split_bn_backward`.

    With constant statistics and a frozen affine nothing is reduced: one pass. Otherwise the reducing pass
    writes the residual's gradient, which is the masked dy, and the second pass reads that and not dy and y.
    """
    dy2d, x2d = _rows(dy), _rows(x)
    y2d = None if y is None or not relu else _rows(y)
    affine = tuple(t.contiguous() for t in (weight, bias, mean, var))
    dx = _like(x) if need_x else None
    dresidual = _like(x) if need_residual else None
    dweight = dbias = None
    reduced = need_affine or (training and need_x)
    if reduced:
        dbias, dweight = _backward_sums(dy2d, x2d, y2d, dresidual, affine, relu, eps)
    if need_x or (need_residual and not reduced):
        residual_ptr = dresidual
        if reduced and dresidual is not None:
            dy2d, y2d, residual_ptr, relu = _rows(dresidual), None, None, False
        groups, channels = weight.shape
        rows = x2d.shape[0] // groups
        launch = launch_shape(rows, channels, groups, x.element_size(), reduce=False)
        sums = (dbias, dweight) if training else (None, None)
        shape = rows, channels, launch.channel_blocks
        _backward_apply_kernel[launch.grid](
            dy2d, x2d, y2d, dx, residual_ptr, *affine, *sums, *shape, eps, RELU=relu, **_blocks(launch)
        )
    if not need_affine:
        dweight = dbias = None
    return _or_empty(dx, x), _or_empty(dweight, weight), _or_empty(dbias, bias), _or_empty(dresidual, x)


def _backward_sums(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    dresidual: Tensor | None,
    affine: tuple[Tensor, ...],
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Sums of the masked dy and of its product with xhat, float32 [G, C]; fills `dresidual` in passing.

    dy, x, y: rows [G*N, C]. affine: weight, bias, mean and variance, contiguous [G, C].
    """
    groups, channels = affine[0].shape
    rows = x.shape[0] // groups
    launch = launch_shape(rows, channels, groups, x.element_size(), reduce=True)
    part_dy, part_dyx = x.new_empty((2, groups, launch.num_parts, channels), dtype=torch.float32)
    walk = launch.channel_blocks, launch.num_tiles, launch.num_parts
    _backward_sums_kernel[launch.grid](
        dy, x, y, dresidual, *affine, part_dy, part_dyx, rows, channels, *walk, eps, RELU=relu, **_blocks(launch)
    )
    dbias, dweight = (x.new_empty((groups, channels), dtype=torch.float32) for _ in range(2))
    grid, blocks = _merge_launch(launch, channels)
    _merge_sums_kernel[grid](part_dy, part_dyx, dbias, dweight, channels, launch.num_parts, **blocks)
    return dbias, dweight
