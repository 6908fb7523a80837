"""Triton bodies and launchers around convolutions with folded BatchNorm: ReLU's backward, and the folding."""

# A launch takes options (num_warps) that the body does not, which the checker cannot know.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

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
