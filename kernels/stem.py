"""The first convolution of a network for small images, whose input gradient an attack needs at every step.

Three input channels fill no tile of a library's input-gradient kernel, and training never asks for this gradient, so
that nobody has made it fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton

MAX_IN_CHANNELS = 16
_LOW = (torch.bfloat16, torch.float16)


def stem_applies(x: Tensor, weight: Tensor, backend: Backend = "auto") -> bool:
    """Whether `stem_conv` would run its kernel: 3x3 taps, up to 16 channels in, a multiple of 16 out, half precision.

    x: [B, C, H, W] of any float dtype. weight: [O, C, 3, 3], bfloat16 or float16 as the convolution is to be.
    """
    return (
        weight.dtype in _LOW
        and weight.shape[1] <= MAX_IN_CHANNELS
        and weight.shape[0] % 16 == 0
        and tuple(weight.shape[2:]) == (3, 3)
        and x.numel() < 2**31
        and use_triton(backend, weight, "weight")
    )


def stem_conv(x: Tensor, weight: Tensor, backend: Backend = "auto") -> Tensor:
    """conv2d(x, weight, padding=1) in the weight's dtype, whose input gradient is float32 and has a kernel of its own.

    x: float [B, C, H, W]; cast to the weight's dtype, while its gradient is not rounded to it.
    weight: [O, C, 3, 3]. Returns: like weight, [B, O, H, W].
    backend: "triton", "plain", or "auto": Triton where `stem_applies`, plain elsewhere.
    """
    return _StemConv.apply(x, weight, backend)


def stem_input_grad(dy: Tensor, weight: Tensor, backend: Backend = "auto") -> Tensor:
    """Gradient of conv2d(x, weight, padding=1) by x, float32 [B, C, H, W], channels-last.

    dy: [B, O, H, W]; weight: [O, C, 3, 3], of dy's dtype. backend: as in `stem_conv`.
    """
    if stem_applies(dy, weight, backend):
        return _stem_input_grad_op(dy.contiguous(memory_format=torch.channels_last), weight)
    shape = (dy.shape[0], weight.shape[1], *dy.shape[2:])
    return torch.nn.grad.conv2d_input(shape, weight, dy, padding=1).float()


class _StemConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, backend: Backend) -> Tensor:
        low = x.to(weight.dtype)
        ctx.save_for_backward(low if ctx.needs_input_grad[1] else None, weight)
        ctx.backend, ctx.dtype = backend, x.dtype
        return F.conv2d(low, weight, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = stem_input_grad(dy, weight, ctx.backend).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dw = torch.ops.aten.convolution_backward(
                dy, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
            )[1]
        return dx, dw, None


@torch.library.custom_op("fastarat::stem_input_grad", mutates_args=())
def _stem_input_grad_op(dy: Tensor, weight: Tensor) -> Tensor:
    from . import stem_triton

    with torch.cuda.device_of(dy):
        return stem_triton.input_grad(dy, weight)


@_stem_input_grad_op.register_fake
def _(dy, weight):
    shape = (dy.shape[0], weight.shape[1], *dy.shape[2:])
    return dy.new_empty(shape, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
