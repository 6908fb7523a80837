"""A tensor that is used twice, whose producer's backward reads both gradients: nobody adds them up first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def fork(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return `y` twice, for its two uses; where the operation that made it can, it takes their gradients apart.

    An addition of its own reads both gradients and writes their sum, which the backward of y's producer then reads
    again. Where the producer is not one of ours the two are `y` itself, and autograd adds as ever.

    y: a tensor that nobody else takes a gradient by: `torch.autograd.grad(loss, y)`, a hook on y or its `.grad` would
    see that of the first use alone.
    """
    producer = y.grad_fn
    if torch.compiler.is_compiling() or not hasattr(producer, "second_gradient") or y.output_nr:
        return y, y
    return _Fork.apply(y, producer)


def take_two(ctx: Any) -> None:
    """Declare, in a forward or its setup, that this operation's first output may be forked; backward asks `taken`."""
    ctx.second_gradient = None


def taken(ctx: Any) -> Tensor | None:
    """Return what is to be added to the first output's gradient, once, or None."""
    second, ctx.second_gradient = ctx.second_gradient, None
    return second


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, producer: Any):
        ctx.set_materialize_grads(False)
        ctx.producer = producer
        return y.view_as(y), y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, first: Tensor | None, second: Tensor | None):
        if first is None or second is None:
            return second if first is None else first, None
        ctx.producer.second_gradient = second
        return first, None
