"""Triton body and launcher of `pgd_update`."""

# A launch takes options (num_warps) that the body does not, which the checker cannot know.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _pgd_update_kernel(
    images_ptr,
    grad_ptr,
    center_ptr,
    out_ptr,
    epsilon,
    step_size,
    epsilon_ptr,
    step_size_ptr,
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    if epsilon_ptr is not None:
        epsilon = tl.load(epsilon_ptr).to(tl.float32)
    if step_size_ptr is not None:
        step_size = tl.load(step_size_ptr).to(tl.float32)
    images = tl.load(images_ptr + at, mask=mask)
    grad = tl.load(grad_ptr + at, mask=mask).to(tl.float32)
    center = tl.load(center_ptr + at, mask=mask)
    # Neither branch is taken by 0 or NaN: both leave the pixel where it is, as torch.sign does.
    step = tl.where(grad > 0.0, step_size, tl.where(grad < 0.0, -step_size, 0.0))
    out = images + step
    ALL: tl.constexpr = tl.PropagateNan.ALL
    out = tl.maximum(out, center - epsilon, propagate_nan=ALL)
    out = tl.minimum(out, center + epsilon, propagate_nan=ALL)
    out = tl.minimum(tl.maximum(out, 0.0, propagate_nan=ALL), 1.0, propagate_nan=ALL)
    tl.store(out_ptr + at, out, mask=mask)


def update(
    images: Tensor,
    grad: Tensor,
    center: Tensor,
    epsilon: float,
    step_size: float,
    epsilon_tensor: Tensor | None,
    step_size_tensor: Tensor | None,
) -> Tensor:
    """One flat pass in the order of memory; all three tensors are dense and share their strides."""
    out = torch.empty_like(images)
    grid = (triton.cdiv(images.numel(), BLOCK),)
    _pgd_update_kernel[grid](
        images,
        grad,
        center,
        out,
        epsilon,
        step_size,
        epsilon_tensor,
        step_size_tensor,
        images.numel(),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return out
