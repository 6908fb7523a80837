"""What the kernels of `split_bn` are made of: tiles of rows, the ReLU's bits, a reduction across programs.

A reduction is one launch. Each program folds one run of a group's rows into one partial result per channel; the last
program of a family of FAN to arrive folds the family's, and the last family's does the rest. Who is last differs from
run to run, what it folds and in which order does not: equal inputs give equal bits, on any GPU.
"""

# Triton's rules, which the checker cannot know: a number is a constexpr, `return` may stand in a branch.
# pyright: reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_origin(rows, C, channel_blocks, num_tiles, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: part, first row in the group, rows before the group, channels, their [G, C] offsets."""
    part = tl.program_id(0) // channel_blocks
    cols = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(1).to(tl.int64)
    return part, part.to(tl.int64) * num_tiles * BLOCK_ROWS, group * rows, cols, group * C + cols


@triton.jit
def tile_at(before, row, rows, cols, C):
    """Offsets and mask of a tile: rows of the group, which has `before` rows before it."""
    return (before + row)[:, None] * C + cols[None, :], (row < rows)[:, None] & (cols < C)[None, :]


@triton.jit
def affine_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, affine_stride, cols, stat, C, eps):
    """Mean, 1/std, weight/std and bias, float32 [1, BLOCK_C]; groups that share an affine have it at a stride of 0."""
    channel, own = cols < C, tl.program_id(1).to(tl.int64) * affine_stride + cols
    mean = tl.load(mean_ptr + stat, mask=channel, other=0.0).to(tl.float32)[None, :]
    rstd = tl.rsqrt(tl.load(var_ptr + stat, mask=channel, other=1.0).to(tl.float32) + eps)[None, :]
    scale = rstd * tl.load(weight_ptr + own, mask=channel, other=0.0).to(tl.float32)[None, :]
    return mean, rstd, scale, tl.load(bias_ptr + own, mask=channel, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalise(x, mean, scale, bias):
    # The mean is taken off before scaling: folded into the bias it would cancel when it is large.
    return (x - mean) * scale + bias


@triton.jit
def bits_at(before, row, rows, cols, C, BLOCK_C: tl.constexpr):
    """Offsets and mask of the bytes that hold a tile's bits: eight channels to a byte, a row of bytes to a row."""
    row_bytes = (C + 7) // 8
    byte = tl.min(cols, 0) // 8 + tl.arange(0, BLOCK_C // 8)
    return (before + row)[:, None] * row_bytes + byte[None, :], (row < rows)[:, None] & (byte < row_bytes)[None, :]


@triton.jit
def store_bits(bits_ptr, passed, before, row, rows, cols, C, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    at, mask = bits_at(before, row, rows, cols, C, BLOCK_C)
    eights = tl.reshape(passed.to(tl.int32), (BLOCK_ROWS, BLOCK_C // 8, 8)) << tl.arange(0, 8)[None, None, :]
    tl.store(bits_ptr + at, tl.sum(eights, 2).to(tl.uint8), mask=mask)


@triton.jit
def load_bits(bits_ptr, before, row, rows, cols, C, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    at, mask = bits_at(before, row, rows, cols, C, BLOCK_C)
    eights = tl.load(bits_ptr + at, mask=mask, other=0).to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(eights & 1, (BLOCK_ROWS, BLOCK_C)) != 0


@triton.jit
def is_last(count_ptr, expected):
    """Count this program in and say whether it is the last of `expected`; the count is then zero again.

    To the last one, what every thread of all of them has stored before is there to be read.
    """
    tl.debug_barrier()  # one thread counts the program in: after the stores of all its threads
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit
def folded(
    a_ptr, b_ptr, base, first, num_parts, cols, C, rows, rows_per_part, MOMENTS: tl.constexpr, FAN: tl.constexpr
):
    """Fold parts first to first + FAN, as far as there are: by Chan's merge of (mean, squared deviations), or sums."""
    part = first + tl.arange(0, FAN)
    mask = (part < num_parts)[:, None] & (cols < C)[None, :]
    at = base + part[:, None] * C + cols[None, :]
    # From the cache that multiprocessors share: their own may hold what was there before.
    a = tl.load(a_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    b = tl.load(b_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    if MOMENTS:
        start = part.to(tl.int64) * rows_per_part
        count = tl.minimum(tl.maximum(rows - start, 0), rows_per_part).to(tl.float32)[:, None]
        shift = tl.load(a_ptr + base + first * C + cols, mask=cols < C, other=0.0, cache_modifier=".cg")[None, :]
        mean = shift + tl.sum(tl.where(mask, (a - shift) * count, 0.0), 0)[None, :] / tl.sum(count)
        away = a - mean
        return tl.sum(mean, 0), tl.sum(tl.where(mask, b + away * away * count, 0.0), 0)
    else:
        return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def reduce(
    a,
    b,
    a_ptr,
    b_ptr,
    out_a_ptr,
    out_b_ptr,
    count_ptr,
    part,
    num_parts,
    cols,
    stat,
    C,
    channel_blocks,
    rows,
    rows_per_part,
    MOMENTS: tl.constexpr,
    FAN: tl.constexpr,
):
    """Hand in one part's results, [BLOCK_C] each; whoever comes last writes all parts' together, [G, C].

    a_ptr, b_ptr: [G, parts + families, C]. count_ptr: zeros [G, channel blocks, 1 + families].
    """
    channel = cols < C
    families = (num_parts + FAN - 1) // FAN
    base = tl.program_id(1).to(tl.int64) * (num_parts + families) * C
    tl.store(a_ptr + base + part * C + cols, a, mask=channel)
    tl.store(b_ptr + base + part * C + cols, b, mask=channel)
    block = tl.program_id(1) * channel_blocks + tl.program_id(0) % channel_blocks
    count_ptr += block * (families + 1)
    family = part // FAN
    first = family * FAN
    if is_last(count_ptr + 1 + family, tl.minimum(FAN, num_parts - first)):
        a, b = folded(a_ptr, b_ptr, base, first, num_parts, cols, C, rows, rows_per_part, MOMENTS, FAN)
        whole = families == 1
        if families > 1:
            inner = base + num_parts * C
            tl.store(a_ptr + inner + family * C + cols, a, mask=channel)
            tl.store(b_ptr + inner + family * C + cols, b, mask=channel)
            whole = is_last(count_ptr, families)
            if whole:
                a, b = folded(a_ptr, b_ptr, inner, 0, families, cols, C, rows, rows_per_part * FAN, MOMENTS, FAN)
        if whole:
            tl.store(out_a_ptr + stat, a, mask=channel)
            if MOMENTS:
                b /= rows
            tl.store(out_b_ptr + stat, b, mask=channel)


@triton.jit
def picked_row(row, H, W):
    """Of rows that are pixels of [B, H, W]: where they lie in [B, ceil(H / 2), ceil(W / 2)], and whether they do."""
    image, pixel = row // (H * W), (row % (H * W)).to(tl.int32)
    h, w = pixel // W, pixel % W
    return (image * ((H + 1) // 2) + h // 2) * ((W + 1) // 2) + w // 2, (h % 2 == 0) & (w % 2 == 0)


@triton.jit
def summed_dy(dy_ptr, dy2_ptr, before, row, cols, C, H, W, at, mask, DY2_STEP: tl.constexpr):
    """The gradient of both uses, float32; the second's is there for every pixel, or for every other one."""
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if dy2_ptr is not None:
        if DY2_STEP == 1:
            dy += tl.load(dy2_ptr + at, mask=mask, other=0.0).to(tl.float32)
        else:
            picked, there = picked_row(before + row, H, W)
            at = picked[:, None] * C + cols[None, :]
            dy += tl.load(dy2_ptr + at, mask=mask & there[:, None], other=0.0).to(tl.float32)
    return dy


@triton.jit
def masked_dy(
    dy,
    bits_ptr,
    x,
    mean,
    scale,
    bias,
    before,
    row,
    rows,
    cols,
    C,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient where the ReLU let it pass. Without bits the ReLU's input is worked out from x."""
    if RELU:
        if bits_ptr is not None:
            dy = tl.where(load_bits(bits_ptr, before, row, rows, cols, C, BLOCK_ROWS, BLOCK_C), dy, 0.0)
        else:
            dy = tl.where(normalise(x, mean, scale, bias) <= 0.0, 0.0, dy)
    return dy
