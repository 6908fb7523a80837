"""SGD with momentum over many tensors, which also writes low-precision copies of the weights in the same pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import Backend, use_triton


def sgd_update(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    backend: Backend = "auto",
) -> None:
    """One step, in place: torch.optim.SGD's without dampening, and `copies` take the new weights, rounded.

        buffer <- momentum * buffer + (grad + weight_decay * weight)
        weight <- weight - lr * (buffer, or with nesterov grad + weight_decay * weight + momentum * buffer)

    A buffer of zeros makes the first step torch.optim.SGD's. One pass reads weight, gradient and buffer and writes
    weight, buffer and copy: 22 bytes an element with bfloat16 copies, where an optimiser and a cast read the weights
    again.

    weights, grads, buffers: float32, equally many, of equal shapes; weights contiguous or channels-last, buffers with
        their strides.
    copies: bfloat16, float16 or float32, like weights. lr: a number, or a float32 tensor [] on their device.
    backend: "triton", "plain", or "auto": Triton on CUDA where it is supported, plain elsewhere.

    Raises: ValueError for lists of unequal length, shapes or strides that do not fit; TypeError for a weight that is
    not float32.
    """
    _check(weights, grads, buffers, copies)
    if not weights:
        return
    with torch.no_grad():
        if not use_triton(backend, weights[0], "weights"):
            _plain(weights, grads, buffers, copies, lr, momentum, weight_decay, nesterov)
            return
        pairs = zip(weights, grads, strict=True)
        grads = [g if g.stride() == w.stride() else torch.empty_like(w).copy_(g) for w, g in pairs]
        rate, rate_tensor = (0.0, lr) if isinstance(lr, Tensor) else (float(lr), None)
        _sgd_update_op(
            list(weights), grads, list(buffers), list(copies), rate, rate_tensor, momentum, weight_decay, nesterov
        )


def _check(weights, grads, buffers, copies) -> None:
    if not len(weights) == len(grads) == len(buffers) == len(copies):
        raise ValueError(
            f"{len(weights)} weights, {len(grads)} gradients, {len(buffers)} buffers and {len(copies)} copies: "
            "expected equally many"
        )
    for i, (weight, grad, buffer, copy) in enumerate(zip(weights, grads, buffers, copies, strict=True)):
        for name, tensor in (("weight", weight), ("gradient", grad), ("buffer", buffer)):
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name} {i} is {tensor.dtype}: expected float32")
        for name, tensor in (("gradient", grad), ("buffer", buffer), ("copy", copy)):
            if tensor.shape != weight.shape:
                raise ValueError(f"{name} {i} has shape {list(tensor.shape)}: expected {list(weight.shape)}")
        for name, tensor in (("buffer", buffer), ("copy", copy)):
            if tensor.stride() != weight.stride():
                raise ValueError(f"{name} {i} has strides {tensor.stride()}: expected the weight's, {weight.stride()}")
        if not (
            weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
        ):
            raise ValueError(f"weight {i} has strides {weight.stride()}: expected a contiguous or channels-last tensor")


def _plain(weights, grads, buffers, copies, lr, momentum, weight_decay, nesterov) -> None:
    steps = torch._foreach_add(list(grads), list(weights), alpha=weight_decay)
    torch._foreach_mul_(list(buffers), momentum)
    torch._foreach_add_(list(buffers), steps)
    if nesterov:
        torch._foreach_add_(steps, list(buffers), alpha=momentum)
    else:
        steps = list(buffers)
    torch._foreach_sub_(list(weights), torch._foreach_mul(steps, lr))
    torch._foreach_copy_(list(copies), list(weights))


@torch.library.custom_op("fastarat::sgd_update", mutates_args=("weights", "buffers", "copies"))
def _sgd_update_op(
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
    from . import sgd_triton

    with torch.cuda.device_of(weights[0]):
        sgd_triton.update(weights, grads, buffers, copies, lr, lr_tensor, momentum, weight_decay, nesterov)


@_sgd_update_op.register_fake
def _(weights, grads, buffers, copies, lr, lr_tensor, momentum, weight_decay, nesterov):
    return None
