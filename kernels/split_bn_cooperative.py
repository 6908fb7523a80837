"""`split_bn`'s training passes with one launch and one read less: statistics, a barrier across the grid, then the rest.

One program per multiprocessor holds its share of a group in registers while all of them find the statistics together;
the two-pass kernels read that share again. Groups take turns. A cooperative launch: a grid that does not fit the device
is an error and not a deadlock. No GPU has run this yet: it serves backend="cooperative" alone.

Of the larger shares some registers are spilt (tests/kernels/test_compiled.py says how many), to a multiprocessor's own
cache. What is kept in 16 bits must be hidden from the compiler, which would rather keep what it made of it.
"""

# Triton's rules, which the checker cannot know: a launch takes options of its own, a tuple grows in an unrolled loop.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import arrivals, interpreting
from .split_bn_tiles import affine_at, load_bits, normalise, store_bits, summed_dy, tile_at
from .split_bn_triton import MAX_BLOCK_CHANNELS, bits_like, laid_out, like, rows_of, step_of

WARPS = 16
FORWARD_CHUNK, BACKWARD_CHUNK = 128, 64
"""Rows that are worked on at a time; all chunks of a share stay in registers."""
KEPT = 2048
"""Bytes of a channel's share that a program keeps: 64 of the 128 registers each of its threads may have."""


class Plan(NamedTuple):
    """How the rows of a group are shared out: parts of `share` rows, `chunk` at a time, for each channel block."""

    share: int
    chunk: int
    chunks: int
    parts: int
    channel_blocks: int
    block_channels: int
    kept: int  # bytes of one tensor and channel


def plan(x: Tensor, groups: int, chunk: int) -> Plan | None:
    """Return how the device's multiprocessors share x, or None where a share would not fit their registers."""
    rows, channels = x.numel() // x.shape[1] // groups, x.shape[1]
    block = max(8, min(MAX_BLOCK_CHANNELS, triton.next_power_of_2(channels)))
    channel_blocks = triton.cdiv(channels, block)
    most = multiprocessors(x.device) // channel_blocks
    if most == 0:
        return None
    share = triton.cdiv(triton.cdiv(rows, most), 8) * 8
    chunks = triton.cdiv(share, chunk)
    kept = chunks * chunk * x.element_size()
    return None if kept > KEPT else Plan(share, chunk, chunks, triton.cdiv(rows, share), channel_blocks, block, kept)


def multiprocessors(device: torch.device) -> int:
    """Return how many programs of one per multiprocessor are resident at once; 4 to an interpreter."""
    return _multiprocessors(device.index or 0) if device.type == "cuda" else 4


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@triton.jit
def _meet(count_ptr, expected):
    """Wait until `expected` programs have come here; what they stored before is then there to be read."""
    tl.debug_barrier()  # one thread counts the program in: after the stores of all its threads
    come = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") + 1
    while come < expected:
        come = tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _leave(count_ptr, programs):
    """The last to leave puts both counts back to zero, for the next launch."""
    if tl.atomic_add(count_ptr + 1, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(count_ptr, 0)
        tl.store(count_ptr + 1, 0)


@triton.jit
def _origin(rows, C, channel_blocks, share, BLOCK_C: tl.constexpr):
    """Of this program: channel block, part, its first row in a group and the one after its last, channels."""
    block, part = tl.program_id(0) % channel_blocks, tl.program_id(0) // channel_blocks
    first = part.to(tl.int64) * share
    return block, part, first, tl.minimum(first + share, rows), block * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _all_parts(a_ptr, b_ptr, base, num_parts, cols, C, rows, share, BLOCK_C: tl.constexpr, MOMENTS: tl.constexpr):
    """Every program folds all parts, in the same order: (mean, variance) by Chan's merge, or two sums, [1, BLOCK_C]."""
    lane = tl.arange(0, 32)
    shift = tl.load(a_ptr + base + cols, mask=cols < C, other=0.0, cache_modifier=".cg")[None, :]
    a = tl.zeros((32, BLOCK_C), tl.float32)
    b = tl.zeros((32, BLOCK_C), tl.float32)
    for first in range(0, num_parts, 32):
        part = first + lane
        mask = (part < num_parts)[:, None] & (cols < C)[None, :]
        at = base + part[:, None] * C + cols[None, :]
        # From the cache that multiprocessors share: their own may hold what was there before.
        part_a = tl.load(a_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        part_b = tl.load(b_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        if MOMENTS:
            start = part.to(tl.int64) * share
            count = tl.minimum(tl.maximum(rows - start, 0), share).to(tl.float32)[:, None]
            away = tl.where(mask, part_a - shift, 0.0)
            a += away * count
            b += part_b + away * away * count
        else:
            a += part_a
            b += part_b
    total_a, total_b = tl.sum(a, 0)[None, :], tl.sum(b, 0)[None, :]
    if MOMENTS:
        # The shift is a part's mean, and so close to the mean that little is cancelled.
        away = total_a / rows
        return shift + away, tl.maximum(total_b / rows - away * away, 0.0)
    else:
        return total_a, total_b


@triton.jit
def _veiled(x, zero):
    """x, of which the compiler does not know that it is: it would keep the float32 of what is kept in 16 bits."""
    if x.dtype.primitive_bitwidth == 16:
        return (x.to(tl.int16, bitcast=True) ^ zero.to(tl.int16)).to(x.dtype, bitcast=True)
    else:
        return (x.to(tl.int32, bitcast=True) ^ zero).to(x.dtype, bitcast=True)


@triton.jit
def _hold(x_ptr, before, first, end, cols, C, CHUNKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """A share of x, chunk by chunk; its mean and its squared deviations from it, [BLOCK_C]."""
    # The first row shifts both sums, which a large mean would swamp.
    shift = tl.load(x_ptr + (before + first) * C + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    kept = ()
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for i in tl.static_range(CHUNKS):
        at, mask = tile_at(before, first + i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), end, cols, C)
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        kept = kept + (x,)  # noqa: RUF005 - Triton does not unpack
        away = tl.where(mask, x.to(tl.float32) - shift, 0.0)
        total += away
        squares += away * away
    count = (end - first).to(tl.float32)
    own = tl.sum(total, 0)
    return kept, tl.sum(shift, 0) + own / count, tl.maximum(tl.sum(squares, 0) - own * own / count, 0.0)


@triton.jit
def _cooperative_forward_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    bits_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    affine_stride,
    part_mean_ptr,
    part_m2_ptr,
    count_ptr,
    zero_ptr,
    rows,
    C,
    channel_blocks,
    num_parts,
    share,
    eps,
    RELU: tl.constexpr,
    GROUPS: tl.constexpr,
    PHASE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """PHASE 0 is all of it; 1 is before the wait and 2 behind, for an interpreter that runs programs one by one."""
    # Longer than a function should be: pointers are half of it, and Triton has no structures to put them in.
    block, part, first, end, cols = _origin(rows, C, channel_blocks, share, BLOCK_C)
    channel = cols < C
    count_ptr += 2 * block
    for group in range(GROUPS):
        before, base, stat = rows * group, group * num_parts * C, group * C + cols
        kept, own_mean, own_m2 = _hold(x_ptr, before, first, end, cols, C, CHUNKS, BLOCK_ROWS, BLOCK_C)
        tl.store(part_mean_ptr + base + part * C + cols, own_mean, mask=channel)
        tl.store(part_m2_ptr + base + part * C + cols, own_m2, mask=channel)
        if PHASE == 0:
            _meet(count_ptr, num_parts * (group + 1))
        if PHASE != 1:
            zero = tl.load(zero_ptr)
            again = first + zero  # addresses, too, would be kept
            mean, var = _all_parts(part_mean_ptr, part_m2_ptr, base, num_parts, cols, C, rows, share, BLOCK_C, True)
            if part == 0:
                tl.store(mean_ptr + stat, tl.sum(mean, 0), mask=channel)
                tl.store(var_ptr + stat, tl.sum(var, 0), mask=channel)
            own = group * affine_stride + cols
            scale = tl.rsqrt(var + eps) * tl.load(weight_ptr + own, mask=channel, other=0.0).to(tl.float32)[None, :]
            bias = tl.load(bias_ptr + own, mask=channel, other=0.0).to(tl.float32)[None, :]
            for i in tl.static_range(CHUNKS):
                row = again + i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
                at, mask = tile_at(before, row, end, cols, C)
                z = normalise(_veiled(kept[i], zero).to(tl.float32), mean, scale, bias)
                if residual_ptr is not None:
                    z += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
                if RELU:
                    z = tl.where(z <= 0.0, 0.0, z)  # not tl.maximum: that would turn NaN into 0 and hide it
                y = z.to(y_ptr.dtype.element_ty)
                if bits_ptr is not None:
                    store_bits(bits_ptr, y != 0.0, before, row, end, cols, C, BLOCK_ROWS, BLOCK_C)
                tl.store(y_ptr + at, y, mask=mask)
    if PHASE == 0:
        _leave(count_ptr, num_parts)


@triton.jit
def _hold_gradient(
    dy_ptr,
    dy2_ptr,
    x_ptr,
    bits_ptr,
    dresidual_ptr,
    mean,
    before,
    first,
    end,
    cols,
    C,
    H,
    W,
    KEEP_X: tl.constexpr,
    KEEP_DY: tl.constexpr,
    DY2_STEP: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A share of x and of the masked dy, if they are to be kept; sums of dy and dy * (x - mean) over it, [BLOCK_C]."""
    kept_x, kept_dy = (), ()
    sum_dy = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_dyx = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for i in tl.static_range(CHUNKS):
        row = first + i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        at, mask = tile_at(before, row, end, cols, C)
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        dy = summed_dy(dy_ptr, dy2_ptr, before, row, cols, C, H, W, at, mask, DY2_STEP)
        if bits_ptr is not None:
            dy = tl.where(load_bits(bits_ptr, before, row, end, cols, C, BLOCK_ROWS, BLOCK_C), dy, 0.0)
        sum_dy += dy
        sum_dyx += dy * (x.to(tl.float32) - mean)
        low = dy.to(x.dtype)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, low, mask=mask)
        if KEEP_X:
            kept_x = kept_x + (x,)  # noqa: RUF005 - Triton does not unpack
        if KEEP_DY:
            kept_dy = kept_dy + (low,)  # noqa: RUF005
    return kept_x, kept_dy, tl.sum(sum_dy, 0), tl.sum(sum_dyx, 0)


@triton.jit
def _cooperative_backward_kernel(
    dy_ptr,
    dy2_ptr,
    x_ptr,
    bits_ptr,
    x_again_ptr,
    dy_again_ptr,
    dy2_again_ptr,
    bits_again_ptr,
    dx_ptr,
    dresidual_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    affine_stride,
    part_dy_ptr,
    part_dyx_ptr,
    dbias_ptr,
    dweight_ptr,
    count_ptr,
    zero_ptr,
    rows,
    C,
    channel_blocks,
    num_parts,
    share,
    H,
    W,
    eps,
    DY2_STEP: tl.constexpr,
    GROUPS: tl.constexpr,
    PHASE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As forward. x and the masked dy, in x's dtype, are kept where x_again_ptr and dy_again_ptr are None."""
    # Longer than a function should be, as above.
    block, part, first, end, cols = _origin(rows, C, channel_blocks, share, BLOCK_C)
    channel = cols < C
    count_ptr += 2 * block
    for group in range(GROUPS):
        before, base, stat = rows * group, group * num_parts * C, group * C + cols
        mean = tl.load(mean_ptr + stat, mask=channel, other=0.0)[None, :]
        kept_x, kept_dy, own_dy, own_dyx = _hold_gradient(
            dy_ptr, dy2_ptr, x_ptr, bits_ptr, dresidual_ptr, mean, before, first, end, cols, C, H, W,
            x_again_ptr is None, dy_again_ptr is None, DY2_STEP, CHUNKS, BLOCK_ROWS, BLOCK_C,
        )  # fmt: skip
        tl.store(part_dy_ptr + base + part * C + cols, own_dy, mask=channel)
        tl.store(part_dyx_ptr + base + part * C + cols, own_dyx, mask=channel)
        if PHASE == 0:
            _meet(count_ptr, num_parts * (group + 1))
        if PHASE != 1:
            zero = tl.load(zero_ptr)
            again = first + zero  # addresses, too, would be kept
            dbias, dyx = _all_parts(part_dy_ptr, part_dyx_ptr, base, num_parts, cols, C, rows, share, BLOCK_C, False)
            if part == 0:
                tl.store(dbias_ptr + stat, tl.sum(dbias, 0), mask=channel)
                own_rstd = tl.rsqrt(tl.load(var_ptr + stat, mask=channel, other=1.0) + eps)
                tl.store(dweight_ptr + stat, tl.sum(dyx, 0) * own_rstd, mask=channel)
            mean_dy, mean_dyx = dbias / rows, dyx / rows
            for i in tl.static_range(CHUNKS):
                row = again + i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
                at, mask = tile_at(before, row, end, cols, C)
                if dy_again_ptr is None:
                    dy = _veiled(kept_dy[i], zero).to(tl.float32)
                else:
                    dy = summed_dy(dy_again_ptr, dy2_again_ptr, before, row, cols, C, H, W, at, mask, DY2_STEP)
                    if bits_again_ptr is not None:
                        passed = load_bits(bits_again_ptr, before, row, end, cols, C, BLOCK_ROWS, BLOCK_C)
                        dy = tl.where(passed, dy, 0.0)
                if x_again_ptr is None:
                    x = _veiled(kept_x[i], zero).to(tl.float32)
                else:
                    x = tl.load(x_again_ptr + at, mask=mask, other=0.0).to(tl.float32)
                # Read for each chunk: to hold them, too, there are not enough registers.
                mean, rstd, scale, _ = affine_at(
                    weight_ptr, mean_ptr, mean_ptr, var_ptr, group * affine_stride + cols, stat, channel, eps
                )
                dx = (dy - mean_dy - (x - mean) * (rstd * rstd * mean_dyx)) * scale
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if PHASE == 0:
        _leave(count_ptr, num_parts)


def _room(x: Tensor, plan: Plan, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two quantities by part, the two results [G, C], and two counts at zero for each channel block."""
    channels = x.shape[1]
    a, b = x.new_empty((2, groups, plan.parts, channels), dtype=torch.float32)
    out_a, out_b = (x.new_empty((groups, channels), dtype=torch.float32) for _ in range(2))
    counts = arrivals(x, 2 * plan.channel_blocks + 1)
    return a, b, out_a, out_b, counts, counts[2 * plan.channel_blocks :]


def _launch(kernel, plan: Plan, *args, **options) -> None:
    grid = (plan.parts * plan.channel_blocks,)
    options |= {
        "CHUNKS": plan.chunks,
        "BLOCK_ROWS": plan.chunk,
        "BLOCK_C": plan.block_channels,
        "num_warps": WARPS,
        "maxnreg": 128,
    }
    for phase in (1, 2) if interpreting() else (0,):
        kernel[grid](*args, PHASE=phase, launch_cooperative_grid=True, **options)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    keep_bits: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, mean, variance and bits, as `split_bn_triton`'s statistics and apply give them."""
    groups, channels = weight.shape
    y, bits = like(x), bits_like(x) if keep_bits else None
    part_mean, part_m2, mean, var, *counts = _room(x, plan, groups)
    _launch(
        _cooperative_forward_kernel, plan, rows_of(x), None if residual is None else rows_of(residual), y, bits,
        *laid_out(weight, bias, mean, var), part_mean, part_m2, *counts, y.numel() // channels // groups, channels,
        plan.channel_blocks, plan.parts, plan.share, eps, RELU=relu, GROUPS=groups,
    )  # fmt: skip
    return y, mean, var, bits


def backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    bits: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    need_residual: bool,
    eps: float,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias (float32 [G, C]) and residual, by batch statistics.

    bits: of the ReLU, None where there is none.
    """
    groups, channels = weight.shape
    dx, dresidual = like(x), like(x) if need_residual else None
    x2d, more = rows_of(x), None if dy2 is None else rows_of(dy2)
    # Where there is no room for both, what takes fewer reads is read again: x, or the masked dy, which may have been
    # written as the residual's gradient.
    again = None, None, None, None
    if 2 * plan.kept > KEPT and dresidual is not None:
        again = None, rows_of(dresidual), None, None
    elif 2 * plan.kept > KEPT:
        again = (None, rows_of(dy), None, bits) if more is None else (x2d, None, None, None)
    laid, _, mean, var, stride = laid_out(weight, weight, mean, var)
    part_dy, part_dyx, dbias, dweight, *counts = _room(x, plan, groups)
    _launch(
        _cooperative_backward_kernel, plan, rows_of(dy), more, x2d, bits, *again,
        dx, dresidual, laid, mean, var, stride, part_dy, part_dyx, dbias, dweight,
        *counts, x2d.shape[0] // groups, channels, plan.channel_blocks, plan.parts, plan.share, *x.shape[2:], eps,
        DY2_STEP=step_of(dy2, x), GROUPS=groups,
    )  # fmt: skip
    return dx, dweight, dbias, dresidual
