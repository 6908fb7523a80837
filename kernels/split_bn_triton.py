"""Triton bodies and launchers of `split_bn`. Images are seen as rows: [G*N, C], N = B*H*W rows per group.

Arithmetic is float32; reductions are `split_bn_tiles`'s, one launch each.
"""

# Triton's rules, which the checker cannot know: a launch takes options of its own, a number is a constexpr.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import arrivals
from .split_bn_tiles import affine_of, masked_dy, normalise, reduce, store_bits, summed_dy, tile_at, tile_origin

# Three programs of eight warps for each multiprocessor of an H200, 132 of them: one wave. Fewer and larger ones than in
# the streaming passes, because each leaves partial results behind.
REDUCE_PROGRAMS = 396
# Below this many programs a pass leaves multiprocessors idle, and smaller tiles pay.
MIN_PROGRAMS = 512
MAX_BLOCK_CHANNELS = 64
# Bytes of one tensor that a program holds at a time. The reducing passes carry two float32 accumulators per element as
# well: with more than this they need so many registers that REDUCE_PROGRAMS are no longer resident at once.
APPLY_TILE, STATS_TILE, SUMS_TILE = 8192, 8192, 4096
# Partial results that one program folds: two levels reach FAN * FAN of them, all that REDUCE_PROGRAMS can be.
FAN = 32


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

    @property
    def families(self) -> int:
        return triton.cdiv(self.num_parts, FAN)


def launch_shape(rows: int, channels: int, groups: int, itemsize: int, *, tile_bytes: int, reduce: bool) -> Launch:
    """Choose the launch of a pass over [groups * rows, channels], from the shape alone.

    A tile row holds up to 64 channels, one or two full cache lines. tile_bytes: of one tensor, a program's share at a
    time, 2048 to a 16-byte vector of each thread in four warps, which is what a program has; twice that to reduce.
    """
    # Eight at least, whose ReLU bits fill a byte.
    block_channels = max(8, min(MAX_BLOCK_CHANNELS, triton.next_power_of_2(channels)))
    channel_blocks = triton.cdiv(channels, block_channels)
    tile = tile_bytes // itemsize
    least = REDUCE_PROGRAMS if reduce else MIN_PROGRAMS
    while tile > 1024 and triton.cdiv(rows * block_channels, tile) * channel_blocks * groups < least:
        tile //= 2
    block_rows = min(max(1, tile // block_channels), triton.next_power_of_2(rows))
    tiles = triton.cdiv(rows, block_rows)
    most = min(FAN * FAN, max(1, REDUCE_PROGRAMS // (channel_blocks * groups)))
    parts = min(tiles, most) if reduce else tiles
    num_tiles = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, num_tiles)
    return Launch(block_rows, block_channels, num_tiles, parts, channel_blocks, groups)


@triton.jit
def _stats_kernel(
    x_ptr,
    part_mean_ptr,
    part_m2_ptr,
    mean_ptr,
    var_ptr,
    count_ptr,
    rows,
    C,
    channel_blocks,
    num_tiles,
    num_parts,
    FAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of each group, [G, C]."""
    part, first, before, cols, stat = tile_origin(rows, C, channel_blocks, num_tiles, BLOCK_ROWS, BLOCK_C)
    lane = tl.arange(0, BLOCK_ROWS)
    mean = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    # Welford's update, one state per element of the tile: threads meet only once, after the loop.
    # Two tiles at a time, so that the loads of the second are under way during the first.
    for tile in tl.range(0, num_tiles, loop_unroll_factor=2):
        at, mask = tile_at(before, first + tile * BLOCK_ROWS + lane, rows, cols, C)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / (tile + 1))
        m2 += delta * (x - mean)
    # Rows seen by each lane. The first row of the run shifts the sum, which a large mean would swamp.
    left = tl.minimum(rows - first, num_tiles * BLOCK_ROWS)
    count = tl.maximum((left - lane + BLOCK_ROWS - 1) // BLOCK_ROWS, 0).to(tl.float32)[:, None]
    shift = tl.load(x_ptr + (before + first) * C + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    part_shift = tl.sum(tl.where(count > 0, (mean - shift) * count, 0.0), 0)[None, :] / left.to(tl.float32)
    away = mean - (shift + part_shift)
    part_m2 = tl.sum(tl.where(count > 0, m2 + away * away * count, 0.0), 0)
    part_mean = tl.sum(shift + part_shift, 0)
    reduce(
        part_mean, part_m2, part_mean_ptr, part_m2_ptr, mean_ptr, var_ptr, count_ptr, part, num_parts, cols, stat, C,
        channel_blocks, rows, num_tiles * BLOCK_ROWS, True, FAN,
    )  # fmt: skip


@triton.jit
def _apply_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    bits_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    affine_stride,
    rows,
    C,
    channel_blocks,
    eps,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalise, add and clamp; bits say, where they are wanted, what the ReLU let pass."""
    _, first, before, cols, stat = tile_origin(rows, C, channel_blocks, 1, BLOCK_ROWS, BLOCK_C)
    row = first + tl.arange(0, BLOCK_ROWS)
    at, mask = tile_at(before, row, rows, cols, C)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean, _, scale, bias = affine_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, affine_stride, cols, stat, C, eps)
    z = normalise(x, mean, scale, bias)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        z = tl.where(z <= 0.0, 0.0, z)  # not tl.maximum: that would turn NaN into 0 and hide it
    y = z.to(y_ptr.dtype.element_ty)
    if bits_ptr is not None:
        # What is stored decides, as in PyTorch: a float16 may be rounded to 0.
        store_bits(bits_ptr, y != 0.0, before, row, rows, cols, C, BLOCK_ROWS, BLOCK_C)
    tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def _backward_sums_kernel(
    dy_ptr,
    dy2_ptr,
    x_ptr,
    bits_ptr,
    dresidual_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    affine_stride,
    part_dy_ptr,
    part_dyx_ptr,
    dbias_ptr,
    dweight_ptr,
    count_ptr,
    rows,
    C,
    channel_blocks,
    num_tiles,
    num_parts,
    H,
    W,
    eps,
    RELU: tl.constexpr,
    DY2_STEP: tl.constexpr,
    FAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of the masked dy and of its product with xhat, [G, C]; the masked dy is the residual's gradient."""
    part, first, before, cols, stat = tile_origin(rows, C, channel_blocks, num_tiles, BLOCK_ROWS, BLOCK_C)
    mean, rstd, scale, bias = affine_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, affine_stride, cols, stat, C, eps)
    sum_dy = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_dyx = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for tile in range(num_tiles):
        row = first + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        at, mask = tile_at(before, row, rows, cols, C)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = summed_dy(dy_ptr, dy2_ptr, before, row, cols, C, H, W, at, mask, DY2_STEP)
        dy = masked_dy(
            dy, bits_ptr, x, mean, scale, bias, before, row, rows, cols, C, RELU, BLOCK_ROWS, BLOCK_C
        )  # fmt: skip
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, dy.to(dresidual_ptr.dtype.element_ty), mask=mask)
        sum_dy += dy
        sum_dyx += dy * (x - mean)
    total_dyx = tl.sum(sum_dyx, 0) * tl.sum(rstd, 0)
    reduce(
        tl.sum(sum_dy, 0), total_dyx, part_dy_ptr, part_dyx_ptr, dbias_ptr, dweight_ptr, count_ptr, part, num_parts,
        cols, stat, C, channel_blocks, rows, num_tiles * BLOCK_ROWS, False, FAN,
    )  # fmt: skip


@triton.jit
def _backward_apply_kernel(
    dy_ptr,
    dy2_ptr,
    x_ptr,
    bits_ptr,
    dx_ptr,
    dresidual_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    affine_stride,
    dbias_ptr,
    dweight_ptr,
    rows,
    C,
    channel_blocks,
    H,
    W,
    eps,
    RELU: tl.constexpr,
    DY2_STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx from (masked) dy; without dbias and dweight the statistics are constants (evaluation)."""
    _, first, before, cols, stat = tile_origin(rows, C, channel_blocks, 1, BLOCK_ROWS, BLOCK_C)
    row = first + tl.arange(0, BLOCK_ROWS)
    at, mask = tile_at(before, row, rows, cols, C)
    channel = cols < C
    mean, rstd, scale, bias = affine_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, affine_stride, cols, stat, C, eps)
    x = mean  # not read where neither the mask nor the statistics need it
    if (RELU and bits_ptr is None) or dweight_ptr is not None:
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dy = summed_dy(dy_ptr, dy2_ptr, before, row, cols, C, H, W, at, mask, DY2_STEP)
    dy = masked_dy(dy, bits_ptr, x, mean, scale, bias, before, row, rows, cols, C, RELU, BLOCK_ROWS, BLOCK_C)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at, dy.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        dx = dy
        if dweight_ptr is not None:
            mean_dy = tl.load(dbias_ptr + stat, mask=channel, other=0.0)[None, :] / rows
            mean_dyx = tl.load(dweight_ptr + stat, mask=channel, other=0.0)[None, :] / rows
            dx -= mean_dy + (x - mean) * rstd * mean_dyx
        tl.store(dx_ptr + at, (dx * scale).to(dx_ptr.dtype.element_ty), mask=mask)


def rows_of(images: Tensor) -> Tensor:
    """[G*B, C, H, W] as contiguous rows [G*N, C]: a view of channels-last images, a copy of any other."""
    return images.permute(0, 2, 3, 1).contiguous().view(-1, images.shape[1])


def like(images: Tensor) -> Tensor:
    return torch.empty_like(images, memory_format=torch.channels_last)


def bits_like(images: Tensor) -> Tensor:
    """Room for a bit per element of images [G*B, C, H, W]: uint8 [G*N, C / 8 rounded up]."""
    rows = images.numel() // images.shape[1]
    return images.new_empty((rows, triton.cdiv(images.shape[1], 8)), dtype=torch.uint8)


def step_of(dy2: Tensor | None, x: Tensor) -> int:
    """1, or 2 for a second gradient of every other pixel."""
    return 1 if dy2 is None or dy2.shape == x.shape else 2


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """In the dtype of `like`; an empty tensor for none, which an op of torch.library cannot return."""
    return like.new_empty(0) if gradient is None else gradient.to(like.dtype)


def laid_out(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The four [G, C] as kernels read them, and how far the groups' weights and biases lie apart: 0 if shared."""
    if weight.stride() == bias.stride() == (0, 1):
        return weight, bias, mean.contiguous(), var.contiguous(), 0
    return weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous(), weight.shape[1]


def walk(launch: Launch) -> tuple[int, int, int]:
    return launch.channel_blocks, launch.num_tiles, launch.num_parts


def streaming(launch: Launch) -> dict[str, int]:
    return {"BLOCK_ROWS": launch.block_rows, "BLOCK_C": launch.block_channels, "num_warps": 4}


def reducing(launch: Launch) -> dict[str, int]:
    # Capped, so that all of REDUCE_PROGRAMS are resident at once: 65,536 registers are three programs of 256 threads.
    return {**streaming(launch), "FAN": FAN, "num_warps": 8, "maxnreg": 80}


def room(x: Tensor, launch: Launch, channels: int, number: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two quantities by part and family, the two results [G, C], and counts at zero, of the number-th reduction."""
    groups, counts = launch.groups, launch.groups * launch.channel_blocks * (1 + launch.families)
    a, b = x.new_empty((2, groups, launch.num_parts + launch.families, channels), dtype=torch.float32)
    out_a, out_b = (x.new_empty((groups, channels), dtype=torch.float32) for _ in range(2))
    return a, b, out_a, out_b, arrivals(x, (number + 1) * counts)[number * counts :]


def statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group, float32 [G, C]."""
    x2d = rows_of(x)
    rows, channels = x2d.shape[0] // groups, x2d.shape[1]
    launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=STATS_TILE, reduce=True)
    space = room(x, launch, channels)
    _stats_kernel[launch.grid](x2d, *space, rows, channels, *walk(launch), **reducing(launch))
    return space[2], space[3]


def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    keep_bits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Normalise, scale, add and clamp in one pass: y, channels-last, and its bits if they are to be kept."""
    x2d, y = rows_of(x), like(x)
    groups = weight.shape[0]
    rows, channels = x2d.shape[0] // groups, x2d.shape[1]
    launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=APPLY_TILE, reduce=False)
    affine = laid_out(weight, bias, mean, var)
    bits = bits_like(x) if keep_bits else None
    added = None if residual is None else rows_of(residual)
    shape = rows, channels, launch.channel_blocks
    _apply_kernel[launch.grid](x2d, added, y, bits, *affine, *shape, eps, RELU=relu, **streaming(launch))
    return y, bits


def backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    bits: Tensor | None,
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
    writes the residual's gradient, which is the masked dy, and the second pass reads that and not what made it.
    """
    dy2d, x2d = rows_of(dy), rows_of(x)
    more, step = None if dy2 is None else rows_of(dy2), step_of(dy2, x)
    bits = bits if relu else None
    affine = laid_out(weight, bias, mean, var)
    dx = like(x) if need_x else None
    dresidual = like(x) if need_residual else None
    dweight = dbias = None
    reduced = need_affine or (training and need_x)
    if reduced:
        dbias, dweight = _backward_sums(dy2d, more, step, x, bits, dresidual, affine, relu, eps)
    if need_x or (need_residual and not reduced):
        residual_ptr = dresidual
        if reduced and dresidual is not None:
            dy2d, more, step, bits, residual_ptr, relu = rows_of(dresidual), None, 1, None, None, False
        groups, channels = weight.shape
        rows = x2d.shape[0] // groups
        launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=APPLY_TILE, reduce=False)
        sums = (dbias, dweight) if training else (None, None)
        shape = rows, channels, launch.channel_blocks, *x.shape[2:]
        _backward_apply_kernel[launch.grid](
            dy2d, more, x2d, bits, dx, residual_ptr, *affine, *sums, *shape, eps, RELU=relu, DY2_STEP=step,
            **streaming(launch),
        )  # fmt: skip
    if not need_affine:
        dweight = dbias = None
    return or_empty(dx, x), or_empty(dweight, weight), or_empty(dbias, bias), or_empty(dresidual, x)


def _backward_sums(
    dy: Tensor,
    dy2: Tensor | None,
    step: int,
    x: Tensor,
    bits: Tensor | None,
    dresidual: Tensor | None,
    affine: tuple[Tensor, Tensor, Tensor, Tensor, int],
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Sums of the masked dy and of its product with xhat, float32 [G, C]; fills `dresidual` in passing.

    dy, dy2: rows [G*N, C], of dy2 each step-th either way. affine: as `laid_out` returns it.
    """
    x2d, (groups, channels) = rows_of(x), affine[0].shape
    rows = x2d.shape[0] // groups
    launch = launch_shape(rows, channels, groups, x.element_size(), tile_bytes=SUMS_TILE, reduce=True)
    space = room(x, launch, channels)
    _backward_sums_kernel[launch.grid](
        dy, dy2, x2d, bits, dresidual, *affine, *space, rows, channels, *walk(launch), *x.shape[2:], eps, RELU=relu,
        DY2_STEP=step,
        **reducing(launch),
    )  # fmt: skip
    return space[2], space[3]
