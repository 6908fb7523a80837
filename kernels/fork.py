"""A tensor that is used twice, whose producer's backward reads both gradients: nobody adds them up first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def fork(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return `y` twice, for its two uses; where the operation that made it can, it takes their gradients apart.

    An addition of its own reads both gradients and writes their sum, which the backward of y's producer then reads
    again. Where the producer is not one of ours the two are `y` itself, and autograd adds as ever.

    y: a tensor that nobody else takes a gradient by: `torch.autograd.grad(loss, y)`, a hook on y or its `.grad` would
    see that of the first use alone.
    """
    producer: Any = y.grad_fn
    if torch.compiler.is_compiling() or not hasattr(producer, "second_gradient") or y.output_nr or producer.forked:
        return y, y
    producer.forked = True  # it takes two, and no third
    return _Fork.apply(y, producer)


def take_two(ctx: Any) -> None:
    """Declare, in a forward or its setup, that this operation's first output may be forked; backward asks `taken`."""
    ctx.second_gradient, ctx.forked = None, False


def taken(ctx: Any, dy: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of an output that may have been forked, once: the one that came and the other, or None.

    like: of the output's shape. The second may be of every other pixel alone, [B, C, ceil(H / 2), ceil(W / 2)]: the
    others' are zero.
    """
    handed, ctx.second_gradient = ctx.second_gradient, None
    # One of another backward is nobody's: that one had asked for a shortcut's weight, and came no further.
    second = handed[1] if handed is not None and handed[0] == _this_backward() else None
    if dy is None and second is not None:
        return whole(second, like), None
    return dy, second


def _this_backward() -> int:
    """A number of the backward that runs now, which no other has."""
    return torch._C._current_graph_task_id()


def whole(gradient: Tensor, like: Tensor) -> Tensor:
    """Put zeros between the pixels of a gradient of every other one."""
    if gradient.shape == like.shape:
        return gradient
    full = torch.zeros_like(like, dtype=gradient.dtype, memory_format=torch.channels_last)
    full[:, :, ::2, ::2] = gradient
    return full


def pick_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight, stride=2) for 1x1 taps, as a block's shortcut has it.

    x: [B, I, H, W]; weight: [O, I, 1, 1], cast to x's dtype. Of a forked x the producer gets the gradient of the pixels
    that were picked; three quarters of the whole one would be zeros, written and read again.
    """
    forked: Any = x.grad_fn
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype
    if cast or getattr(forked, "picked", True):
        return F.conv2d(x, weight if cast else weight.to(x.dtype), stride=2)
    forked.picked = True
    return _PickPointwise.apply(x, weight.to(x.dtype), forked.producer)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, producer: Any):
        ctx.set_materialize_grads(False)
        ctx.producer, ctx.picked = producer, False
        return y.view_as(y), y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, first: Tensor | None, second: Tensor | None):
        if first is None or second is None:
            return second if first is None else first, None
        handed = ctx.producer.second_gradient
        if handed is not None and handed[0] == _this_backward():  # the side was picked from, and used as it is as well
            second = second + whole(handed[1], second)
        ctx.producer.second_gradient = _this_backward(), second
        return first, None


class _PickPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, producer: Any):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.producer = producer
        return F.conv2d(x, weight, stride=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dweight = None
        if ctx.needs_input_grad[0]:
            rows = dy.permute(0, 2, 3, 1)
            # To the producer and past the fork, which sees no gradient of this use.
            picked = (rows @ weight.flatten(1)).permute(0, 3, 1, 2)
            ctx.producer.second_gradient = _this_backward(), picked
        if ctx.needs_input_grad[1]:
            dweight = torch.ops.aten.convolution_backward(
                dy, x, weight, None, (2, 2), (0, 0), (1, 1), False, (0, 0), 1, (False, True, False)
            )[1]
        return None, dweight, None
