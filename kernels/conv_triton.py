"""Triton bodies and launchers around convolutions with folded BatchNorm: ReLU's backward, and the folding."""

# A launch takes options (num_warps) that the body does not, which the checker cannot know.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
FOLD_BLOCK = 1024


@triton.jit
def _masked_sum_kernel(dy_ptr, dy2_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    dy = tl.load(dy_ptr + at, mask=mask).to(tl.float32) + tl.load(dy2_ptr + at, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + at, mask=mask).to(tl.float32)
    tl.store(out_ptr + at, tl.where(y <= 0.0, 0.0, dy).to(out_ptr.dtype.element_ty), mask=mask)


def masked_sum(dy: Tensor, dy2: Tensor, y: Tensor) -> Tensor:
    """dy + dy2 where the ReLU whose output is y let pass. All dense, of one shape, dtype and layout."""
    out = torch.empty_like(y)
    size = y.numel()
    _masked_sum_kernel[(triton.cdiv(size, BLOCK),)](dy, dy2, y, out, size, BLOCK=BLOCK, num_warps=4)
    return out
