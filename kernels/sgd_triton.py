"""Triton body and launcher of `sgd_update`: many tensors in one launch, their addresses among its arguments."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
# More make the kernel slower to compile and its list of arguments longer, to no end.
MAX_TENSORS = 32


@triton.jit
def _update_block(
    weight_ptr,
    grad_ptr,
    buffer_ptr,
    copy_ptr,
    block,
    size,
    lr,
    momentum,
    weight_decay,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    weight = tl.load(weight_ptr + at, mask=mask)
    step = tl.load(grad_ptr + at, mask=mask) + weight_decay * weight
    buffer = momentum * tl.load(buffer_ptr + at, mask=mask) + step
    tl.store(buffer_ptr + at, buffer, mask=mask)
    if NESTEROV:
        step += momentum * buffer
    else:
        step = buffer
    weight -= lr * step
    tl.store(weight_ptr + at, weight, mask=mask)
    tl.store(copy_ptr + at, weight.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sgd_update_kernel(
    weights,
    grads,
    buffers,
    copies,
    lr,
    lr_ptr,
    momentum,
    weight_decay,
    SIZES: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tensors one after another, in blocks; each program finds its own and takes that branch alone."""
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    program = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(SIZES)):
        blocks = (SIZES[i] + BLOCK - 1) // BLOCK
        if (program >= first) & (program < first + blocks):
            _update_block(
                weights[i],
                grads[i],
                buffers[i],
                copies[i],
                program - first,
                SIZES[i],
                lr,
                momentum,
                weight_decay,
                NESTEROV,
                BLOCK,
            )
        first += blocks


def update(
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    copies: list[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """One flat pass over each tensor in the order of memory; the four lists share their strides."""
    for start in range(0, len(weights), MAX_TENSORS):
        part = slice(start, start + MAX_TENSORS)
        sizes = tuple(w.numel() for w in weights[part])
        if max(sizes) >= 2**31 - BLOCK:
            raise ValueError(f"a weight of {max(sizes):,} elements: the kernel counts them in 32 bits")
        _sgd_update_kernel[(sum(triton.cdiv(n, BLOCK) for n in sizes),)](
            tuple(weights[part]),
            tuple(grads[part]),
            tuple(buffers[part]),
            tuple(copies[part]),
            lr,
            lr_tensor,
            momentum,
            weight_decay,
            SIZES=sizes,
            NESTEROV=nesterov,
            BLOCK=BLOCK,
            num_warps=4,
        )
