"""Two BatchNorms whose outputs are added, as a residual block with a projection ends, and the ReLU behind them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import Backend, use_triton
from .fork import take_two, taken

_LAST = torch.channels_last


class Joined(NamedTuple):
    """What `split_bn_join` returns.

    y: like x. mean, var; mean2, var2: float32 [G, C], of x and of x2, as `SplitBN`'s.
    """

    y: Tensor
    mean: Tensor
    var: Tensor
    mean2: Tensor
    var2: Tensor


def joins(x: Tensor, x2: Tensor, backend: Backend = "auto") -> bool:
    """Whether `split_bn_join` has kernels for these images, and no others would need fewer passes."""
    return backend != "cooperative" and x.shape == x2.shape and x.dtype == x2.dtype and use_triton(backend, x, "x")


def split_bn_join(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    eps: float = 1e-5,
    eps2: float = 1e-5,
) -> Joined:
    """relu(split_bn(x, weight, bias).y + split_bn(x2, weight2, bias2).y), both by batch statistics, in fewer passes.

    The second normalised tensor is never written, and backward masks the gradient for both in one pass.

    x, x2: float [G*B, C, H, W], for which `joins` says yes; the rest float [G, C], as in `split_bn`. Gradients flow to
    all six.
    """
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias, x2, weight2, bias2))
    x, x2 = (t.contiguous(memory_format=_LAST) for t in (x, x2))
    return Joined(*_join_op(x, weight, bias, x2, weight2, bias2, eps, eps2, keep)[:5])


@torch.library.custom_op("fastarat::split_bn_join", mutates_args=())
def _join_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    eps2: float,
    keep_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import split_bn_join_triton as kernels

    with torch.cuda.device_of(x):
        y, stats, bits = kernels.join(x, x2, (weight, bias, weight2, bias2), eps, eps2, keep_bits)
    mean, var, mean2, var2 = stats
    return y, mean, var, mean2, var2, x.new_empty(0, dtype=torch.uint8) if bits is None else bits


@_join_op.register_fake
def _(x, weight, bias, x2, weight2, bias2, eps, eps2, keep_bits):
    stats = [x.new_empty(weight.shape, dtype=torch.float32) for _ in range(4)]
    size = (x.shape[0] * x.shape[2] * x.shape[3], (x.shape[1] + 7) // 8) if keep_bits else (0,)
    return torch.empty_like(x, memory_format=_LAST), *stats, x.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("fastarat::split_bn_join_backward", mutates_args=())
def _join_backward_op(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    x2: Tensor,
    bits: Tensor,
    affine: list[Tensor],
    stats: list[Tensor],
    eps: float,
    eps2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and x2, of both weights, and of either bias.

    dy2: as in `split_bn_backward`. affine: weight, weight2. stats: mean, var, mean2, var2.
    """
    from . import split_bn_join_triton as kernels

    with torch.cuda.device_of(x):
        return kernels.join_backward(dy, dy2, x, x2, bits, affine, stats, eps, eps2)


@_join_backward_op.register_fake
def _(dy, dy2, x, x2, bits, affine, stats, eps, eps2):
    images = [torch.empty_like(t, memory_format=_LAST) for t in (x, x2)]
    return *images, *(torch.empty_like(stats[0]) for _ in range(3))


def _setup(ctx, inputs, output) -> None:
    x, weight, _, x2, weight2, _, eps, eps2, _ = inputs
    _, mean, var, mean2, var2, bits = output
    ctx.mark_non_differentiable(mean, var, mean2, var2, bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, x2, bits, weight, weight2, mean, var, mean2, var2)
    ctx.eps = eps, eps2
    take_two(ctx)


def _backward(ctx, dy, *_):
    x, x2, bits, weight, weight2, *stats = ctx.saved_tensors
    dy, dy2 = taken(ctx, dy, x)
    if dy is None:
        return (None,) * 9
    dx, dx2, dweight, dweight2, dbias = _join_backward_op(dy, dy2, x, x2, bits, [weight, weight2], stats, *ctx.eps)
    # A copy for the second: two parameters whose gradients share memory would be scaled, clipped and summed twice.
    one = dweight.to(weight.dtype), dbias.to(weight.dtype)
    two = dweight2.to(weight2.dtype), dbias.to(weight2.dtype, copy=True) if ctx.needs_input_grad[5] else None
    found = (dx, *one, dx2, *two)
    return *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False)), None, None, None


_join_op.register_autograd(_backward, setup_context=_setup)
